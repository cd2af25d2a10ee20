"""The checker that `test_types.py` puts around every function of the package."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

# An int where a float is asked for is what everyone means by float.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))

"""Parts of a model compiled for a while, in place: `torch.compile` of each, and as it was afterwards.

Parts of one kind share one compiled function, so that what is paid at the start does not grow with depth. Names of
parameters, and so checkpoints, stay as they are: the modules themselves are not replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def compiled(parts: Sequence[nn.Module], **options: Any) -> Iterator[None]:
    """Compile each of `parts` as long as the context lasts; `options` are those of `torch.compile`."""
    before = [part._compiled_call_impl for part in parts]
    # Each kind of part is compiled with and without derivatives, with and without a state to go on from.
    limit = max(torch._dynamo.config.recompile_limit, 4 * len(parts))
    try:
        for part in parts:
            part.compile(**options)
        with torch._dynamo.config.patch(recompile_limit=limit):
            yield
    finally:
        for part, call in zip(parts, before, strict=True):
            part._compiled_call_impl = call

from __future__ import annotations

import pytest
import torch

from ostinato.analysis.taxonomy import COLUMNS, measure_transition, taxonomy
from ostinato.errors import UnknownNameError
from ostinato.mixers import registry


@pytest.mark.parametrize("name", registry.mixers())
def test_what_is_declared_is_measured(name: str) -> None:
    torch.manual_seed(0)
    layer = registry.mixer(name, 16)
    before = [parameter.clone() for parameter in layer.parameters()]
    found, traits = measure_transition(layer), layer.traits
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    if name == "attention":
        assert found is None
        return
    assert found is not None
    assert found.mixes == traits.channel_mixing
    # Their memory is linear; what is not is their window of softmax attention, which is no memory here.
    assert found.by_state == (not traits.linear and name not in ("liger", "lolcats"))
    assert found.identity == (traits.transition == "identity")
    if traits.transition.startswith("fixed"):
        assert not found.by_input
    if traits.transition.startswith("data") or "rank" in traits.transition.removeprefix("fixed vector + rank-1"):
        assert found.by_input


def test_the_table_of_the_paper() -> None:
    rows = {row["mixer"]: row for row in taxonomy(["retnet", "mamba2", "gated_delta_net", "attention"])}
    assert all(tuple(row) == COLUMNS for row in rows.values())
    retnet, mamba2, delta, attention = rows.values()
    assert (retnet["depends on"], mamba2["depends on"]) == ("nothing", "input")
    assert (mamba2["mixes channels"], delta["mixes channels"]) == ("no", "yes")
    assert (retnet["short convolution"], mamba2["short convolution"]) == ("no", "yes")
    assert (attention["output gate"], mamba2["output gate"], delta["output gate"]) == ("no", "yes", "yes")
    assert attention["depends on"] == "nothing is forgotten"
    with pytest.raises(UnknownNameError):
        taxonomy(["mamba7"])

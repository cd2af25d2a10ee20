"""The law, over every registered mixer, every plain route and three types; and that it catches what breaks it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ostinato.mixers import registry
from ostinato.testing import FREE, PLAIN_ROUTES, TOLERANCES, check_mixer, law
from ostinato.testing.runs import difference, run

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", [FREE, *PLAIN_ROUTES])
@pytest.mark.parametrize("name", registry.mixers())
def test_the_law_holds(name: str, route: str, dtype: str) -> None:
    mixer = registry.mixer(name, 16)
    kind = DTYPES[dtype]
    if route != FREE and not law.serves(mixer, route, kind, "cpu"):
        # Not every engine has both routes; the free choice is always held to the law.
        assert route == "parallel", f"{name} has no reference"
        return
    report = check_mixer(mixer, name=name, dtypes=(kind,), routes=(route,), compile=False)
    assert len(report.rows) > 20
    assert any(row.check == "step by step: gradient of parameters" for row in report.rows)


@pytest.mark.parametrize("name", registry.mixers())
def test_forward_compiles_and_step_exports(name: str) -> None:
    report = check_mixer(registry.mixer(name, 16), name=name, routes=(), length=8)
    assert {row.check for row in report.rows} >= {"torch.compile", "torch.export"}


VARIANTS = [
    ("attention", {"window": 4}),
    ("attention", {"key_value_heads": 2, "qk_norm": True}),
    ("attention", {"rope": False, "heads": 1}),
    ("delta_net", {"negative_eigenvalues": True, "qk_activation": "elu", "qk_norm": "l1"}),
    ("delta_net", {"conv": None, "output_gate": True}),
    ("delta_product", {"householders": 3, "negative_eigenvalues": True, "conv": None}),
    ("delta_product", {"householders": 1}),
    ("elman", {"heads": 4}),
    ("gated_delta_net", {"negative_eigenvalues": True}),
    ("gated_delta_net", {"output_gate": False, "conv": None}),
    ("gated_delta_product", {"negative_eigenvalues": True, "householders": 3}),
    ("gla", {"conv": 4, "gate_floor": -5.0}),
    ("gla", {"gate_values": True, "gate_floor": -5.0}),
    ("gru", {"heads": 4, "expand": 2.0}),
    ("hgrn2", {"lower_bound": 0.5}),
    ("kimi_delta_attention", {"negative_eigenvalues": True, "gate_floor": -5.0}),
    ("liger", {"window": 4, "key_value_heads": 2, "recurrence": "hgrn2"}),
    ("liger", {"window": 4, "key_value_heads": 2, "recurrence": "gsa", "slots": 3, "qk_norm": True}),
    ("liger", {"window": 1, "gate": "none", "mix": 1.0, "rope": False}),
    ("liger", {"gate": "fresh"}),
    ("liger", {"features": "learned", "window": 3}),
    ("linear_attention", {"normalize": True, "conv": 3, "output_norm": False}),
    ("linear_attention", {"feature_map": "identity"}),
    ("linear_attention", {"feature_map": "relu"}),
    ("lolcats", {"window": 4, "key_value_heads": 2, "qk_norm": True}),
    ("lolcats", {"window": 1, "rope": False}),
    ("lru", {"d_state": 7}),
    ("lstm", {"heads": 4, "expand": 2.0}),
    ("m2rnn", {"heads": 4, "key_dim": 4, "value_dim": 4, "query_heads": 2, "key_heads": 4}),
    ("mamba", {"negative_eigenvalues": True, "step_rank": 2}),
    ("mamba2", {"groups": 2, "state_dim": 8}),
    ("min_gru", {"expand": 2.0}),
    ("min_lstm", {"expand": 2.0}),
    ("mlstm", {"input_gate": "sigmoid"}),
    ("mlstm", {"input_gate": "sigmoid", "normalize": True, "input_bias": 0.0}),
    ("mlstm", {"input_bias": 0.0, "soft_cap": None}),
    ("gated_slot_attention", {"slots": 3, "conv": 4}),
    ("mom", {"base": "gla", "conv": 4}),
    ("mom", {"base": "linear_attention", "memories": 3, "top_k": 3, "shared_memory": False}),
    ("mom", {"base": "retnet", "shared_projections": True}),
    ("mom", {"base": "gated_slot_attention", "memories": 2}),
    ("mom", {"base": "delta_net", "memories": 2, "top_k": 1, "router": "frozen"}),
    ("para_gru", {"max_recurrent": 0.9, "expand": 2.0}),
    ("para_lstm", {"max_recurrent": 0.9}),
    ("retnet", {"expand_v": 1.0}),
    ("rg_lru", {"gated": False, "heads": 1}),
    ("rwkv7", {"layer": 1, "layers": 4}),
    ("s4", {"measure": "legt", "copies": 2, "output": "none", "block_length": 4}),
    ("s4", {"clamp_inputs": True, "rate": 2.0}),
    ("s4d", {"initialization": "inv", "discretization": "bilinear", "block_length": 4}),
    ("s5", {"blocks": 1, "gated": False}),
    ("slstm", {"heads": 1}),
]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=lambda value: value if isinstance(value, str) else "")
def test_the_law_holds_with_other_options(name: str, options: dict[str, Any]) -> None:
    mixer = registry.mixer(name, 16, **options)
    assert check_mixer(mixer, name=name, routes=(FREE,), length=11, seed=1, compile=False).ok


@pytest.mark.parametrize("name", registry.mixers())
def test_the_law_holds_across_chunks(name: str) -> None:
    # Twenty steps fit into one chunk of any engine; these are more than two.
    bench = law.Bench(registry.mixer(name, 16), torch.float64, "cpu", 1, 131, 2)
    problem = bench.problems()[1]
    for cuts in ([131], [63, 128, 131], [1, 65, 131]):
        found = run(bench.mixer, problem, cuts)
        for kind, wanted in bench.truth(problem).values.items():
            error, where = difference(found.values[kind], wanted)
            assert error <= TOLERANCES[torch.float64], f"{kind} is {error:.1e} off in {where}, cut at {cuts}"

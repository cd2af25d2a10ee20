"""`fit(compile=…)`: the same curve and the same files as without, a model that is as before, and clear errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ostinato
from ostinato.errors import ConfigurationError
from ostinato.files import read_json, read_tensors
from ostinato.tasks.text import Text
from ostinato.training.compiled import blocks_of, compiled_blocks
from ostinato.training.fit import fit

# Tracing looks at the gradient of a block's input, and PyTorch warns itself that it is no leaf.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

QUIET: dict[str, Any] = {
    "progress": False,
    "batch_size": 4,
    "device": "cpu",
    "evaluate_every": 0,
    "checkpoint_every": 3,
}


def build() -> ostinato.LanguageModel:
    torch.manual_seed(0)
    return ostinato.LanguageModel(d_model=8, plan="min_gru", depth=2)


def test_a_compiled_run_is_the_run_and_resumes(text: Text, tmp_path: Path) -> None:
    plain = fit(build(), text, steps=6, directory=tmp_path / "plain", **QUIET)
    model = build()
    names = list(model.state_dict())
    stop: list[Callable[[Any], bool]] = [lambda report: report.step == 3]
    fit(model, text, steps=6, directory=tmp_path / "compiled", callbacks=stop, compile="aot_eager", **QUIET)
    assert list(model.state_dict()) == names
    # The other half without the compiler: the files are the same.
    rest = fit(build(), text, steps=6, directory=tmp_path / "compiled", resume=True, **QUIET)
    assert rest.losses == pytest.approx(plain.losses, rel=1e-4)
    weights, _ = read_tensors(tmp_path / "compiled" / "checkpoints" / "step-00000003" / "model" / "model.safetensors")
    assert set(weights) <= set(names)
    ostinato.LanguageModel.from_pretrained(tmp_path / "compiled" / "checkpoints" / "step-00000003" / "model")
    assert read_json(tmp_path / "compiled" / "run.json")["training"]["compile"] is False


def test_the_blocks_are_compiled_inside_and_as_before_outside() -> None:
    model = build()
    assert blocks_of(model) == list(model.backbone.blocks)
    compiled = []

    def counting(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch._dynamo.register_backend(counting, name="counting")
    tokens = torch.randint(0, 256, (2, 5))
    wanted = model(tokens)[0]
    with compiled_blocks(model, "counting"):
        assert torch.allclose(model(tokens)[0], wanted, atol=1e-6)
    found = len(compiled)
    assert found >= 1
    torch._dynamo.reset()
    model(tokens)
    assert len(compiled) == found


def test_what_cannot_be_compiled(small: Callable[..., Any], text: Text) -> None:
    with pytest.raises(ConfigurationError, match="no list of `blocks`"):
        fit(small(), text, steps=1, compile=True, **QUIET)
    with pytest.raises(ConfigurationError, match="no backend 'fast'"):
        fit(build(), text, steps=1, compile="fast", **QUIET)

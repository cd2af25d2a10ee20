"""Checkpoints: what is saved comes back, what is not ours is refused, and failures leave the old one whole."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ostinato
from ostinato import LanguageModel
from ostinato.errors import CheckpointError
from ostinato.files import FORMAT_VERSION, read_tensors, write_tensors
from ostinato.mixers.minimal import MinGRU

TOKENS = torch.arange(10).unsqueeze(0)


def build(**options: object) -> LanguageModel:
    options = {"d_model": 16, "plan": "min_gru, attention(window=5, heads=2)", "depth": 3, **options}
    return LanguageModel(**options).eval()  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


OTHERS = {"tie_embeddings": False, "channel_mixer": None, "dropout": 0.1, "vocab_size": 300}


@pytest.mark.parametrize("options", [{}, OTHERS], ids=str)
def test_what_is_saved_comes_back(tmp_path: Path, options: dict) -> None:
    model = build(**options)
    model.save_pretrained(tmp_path)
    again = LanguageModel.from_pretrained(tmp_path)
    assert again.config == model.config and not again.training
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    torch.testing.assert_close(again(TOKENS)[0], model(TOKENS)[0], atol=0, rtol=0)
    assert all(parameter.requires_grad for parameter in again.parameters())
    again.save_pretrained(str(tmp_path / "again"))
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()
    first, second = (read_tensors(path / "model.safetensors") for path in (tmp_path, tmp_path / "again"))
    torch.testing.assert_close(second[0], first[0], atol=0, rtol=0)
    assert second[1] == first[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_types_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    model = build().to(dtype)
    model.save_pretrained(tmp_path)
    again = LanguageModel.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}
    torch.testing.assert_close(again(TOKENS)[0], model(TOKENS)[0], atol=0, rtol=0)


def test_loading_leaves_the_random_generator_alone(folder: Path) -> None:
    before = torch.random.get_rng_state()
    LanguageModel.from_pretrained(folder)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_state_fits_the_loaded_model(folder: Path) -> None:
    first, second = (LanguageModel.from_pretrained(folder) for _ in range(2))
    state = first.read("Once upon")
    expected = first.stream(" a time", state=state, seed=0, max_tokens=20).read()
    assert second.stream(" a time", state=state, seed=0, max_tokens=20).read() == expected


def test_nothing_there(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder"):
        LanguageModel.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no folder"):
        LanguageModel.from_pretrained(folder / "config.json")
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(folder / "aside")
        with pytest.raises(CheckpointError, match=f"no file .*{name}"):
            LanguageModel.from_pretrained(folder)
        (folder / "aside").rename(folder / name)


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -1])
def test_truncated_weights(folder: Path, kept: int) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        LanguageModel.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"format": "ostina'])
def test_a_damaged_configuration(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        LanguageModel.from_pretrained(folder)


@pytest.mark.parametrize("content", ['{"model_type": "llama", "hidden_size": 64}', "[1]", '"text"'])
def test_a_foreign_configuration(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="not written by Ostinato"):
        LanguageModel.from_pretrained(folder)


def test_foreign_weights(folder: Path) -> None:
    save_file({"weight": torch.zeros(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="not written by Ostinato"):
        LanguageModel.from_pretrained(folder)
    ostinato.state.save(build().initial_state(1), folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds state, not a language model"):
        LanguageModel.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_newer_version(folder: Path, name: str) -> None:
    newer = FORMAT_VERSION + 1
    if name == "config.json":
        note = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**note, "version": newer}))
    else:
        tensors, metadata = read_tensors(folder / name)
        save_file(tensors, folder / name, metadata={**metadata, "version": str(newer)})
    with pytest.raises(CheckpointError, match=f"version {newer}, this package reads up to {FORMAT_VERSION}: update"):
        LanguageModel.from_pretrained(folder)


def rewrite(folder: Path, *, tensors: dict | None = None, config: dict | str | None = None) -> None:
    """Write the weights' file again with other content."""
    old, metadata = read_tensors(folder / "model.safetensors")
    if isinstance(config, dict):
        config = json.dumps({**json.loads(metadata["config"]), **config})
    notes = {"kind": metadata["kind"], "config": config or metadata["config"]}
    write_tensors(folder / "model.safetensors", tensors or old, notes)


def test_weights_that_do_not_fit(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "backbone.blocks.0.mixer.to_output.weight"
    rewrite(folder, tensors={key: value for key, value in tensors.items() if key != name})
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        LanguageModel.from_pretrained(folder)
    rewrite(folder, tensors={**tensors, "another": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="another is not known"):
        LanguageModel.from_pretrained(folder)
    rewrite(folder, tensors={**tensors, name: torch.zeros(16, 8)})
    with pytest.raises(CheckpointError, match=r"has shape \(16, 8\), wanted \(16, 16\)"):
        LanguageModel.from_pretrained(folder)
    rewrite(folder, tensors={"another": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"is missing; .* and \d+ more"):
        LanguageModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"plan": "min_gru*"}, "cannot be built"),
        ({"plan": "attention(windows=5)"}, "no option 'windows'"),
        ({"depth": 0}, "cannot be built"),
        ({"color": "red"}, "configuration of .* is damaged"),
        ("[1]", "configuration of .* is damaged"),
        ("{", "configuration of .* is damaged"),
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_model(folder: Path, config: dict | str, what: str) -> None:
    rewrite(folder, config=config)
    with pytest.raises(CheckpointError, match=what):
        LanguageModel.from_pretrained(folder)


def test_a_mixer_of_ones_own_must_be_registered_first(tmp_path: Path) -> None:
    ostinato.register("my_mixer", type("MyMixer", (MinGRU,), {}), check=False)
    try:
        model = build(plan="my_mixer*2")
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(LanguageModel.from_pretrained(tmp_path)(TOKENS)[0], model(TOKENS)[0])
    finally:
        ostinato.unregister("my_mixer")
    with pytest.raises(CheckpointError, match=r"'my_mixer'.*ostinato\.register"):
        LanguageModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_full_disk_leaves_the_old_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    """The first file that is flushed is the weights', the second the configuration's."""
    old, new = LanguageModel.from_pretrained(folder), build(plan="min_gru", depth=2)
    flush, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        new.save_pretrained(folder)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    # Whichever file failed, the folder is one whole model: the old one, or already the new one.
    found = LanguageModel.from_pretrained(folder)
    torch.testing.assert_close(found(TOKENS)[0], (old if fails_at == 1 else new)(TOKENS)[0], atol=0, rtol=0)


def test_a_disk_that_fills_while_writing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path, metadata: object = None) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    expected = LanguageModel.from_pretrained(folder)(TOKENS)[0]
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        build().save_pretrained(folder)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    torch.testing.assert_close(LanguageModel.from_pretrained(folder)(TOKENS)[0], expected, atol=0, rtol=0)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        build().save_pretrained(tmp_path / "file")

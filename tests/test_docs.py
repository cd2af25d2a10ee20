"""What the README, the documentation and the examples say is run, at small sizes."""

from __future__ import annotations

import re
import runpy
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import ostinato
from ostinato.mixers import registry

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def smaller(source: str) -> str:
    """The same program, in seconds: fewer steps, less width, shorter streams."""
    for pattern, size in {
        r"steps=\d+": "steps=2",
        "d_model=256": "d_model=16",
        r"max_tokens=\d+": "max_tokens=6",
    }.items():
        source = re.sub(rf"\b{pattern}", size, source)
    return source


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In an empty folder with one book; training is short; what was registered is forgotten."""
    monkeypatch.chdir(tmp_path)
    fit = ostinato.fit

    def short_fit(model: object, task: object, **options: object) -> object:
        batches = 1 if task.name == "text" else None  # type: ignore[attr-defined]
        return fit(model, task, **{**options, "batch_size": 2, "evaluation_batches": batches, "progress": False})

    monkeypatch.setattr(ostinato, "fit", short_fit)
    (tmp_path / "book.txt").write_text("It was a dark and stormy night; the rain fell in torrents.\n" * 40)
    before = set(registry.mixers())
    yield
    for name in set(registry.mixers()) - before:
        ostinato.unregister(name)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_of_a_page_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("page")  # a real one: classes that are defined in it must be found again
    monkeypatch.setitem(sys.modules, "page", module)
    for block in blocks(page):
        exec(compile(smaller(block), str(page), "exec"), module.__dict__)


def test_the_readme_has_what_it_must() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    ten_lines = blocks(ROOT / "README.md")[0].strip().splitlines()
    assert len([line for line in ten_lines if line.strip()]) <= 10
    for name in ("ostinato.fit", ".stream(", "ostinato.state.save", "make demo", "make test"):
        assert name in text
    assert set(re.findall(r"^\| `(\w+)` \|", text.partition("<!-- speeds -->")[0], re.M)) == {
        "diagonal_scan",
        "linear_attention",
        "exponential_attention",
        "delta_rule",
        "recurrent_scan",
        "newton_scan",
        "long_convolution",
        "attention",
    }


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(example: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"stream_and_fork": ["--d-model", "16"], "who_can_count": ["--test-size", "4"]}.get(example.stem, [])
    monkeypatch.setattr(sys, "argv", [str(example), "--steps", "2", *small])
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_generated_pages_are_generated() -> None:
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    page = generate["catalogue_page"]()
    assert page.count("https://arxiv.org/abs/") == 82
    for name in registry.mixers():
        assert f"| `{name}` |" in generate["mixers_table"]()
    assert "| `parity` |" in generate["tasks_table"]()


def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the docs extra is not installed")
    pytest.importorskip("material", reason="the docs extra is not installed")
    import shutil
    import subprocess

    for name in ("docs", "mkdocs.yml", "README.md"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    subprocess.run([sys.executable, "docs/generate.py"], cwd=tmp_path, check=True)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "catalogue.html").is_file()


def test_the_readme_has_the_committed_speeds() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    with_speeds = runpy.run_path(str(ROOT / "docs" / "generate.py"))["with_speeds"]
    assert with_speeds(readme) == readme, "run python docs/generate.py"

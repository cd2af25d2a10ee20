"""What importing costs and does, and the order of the rooms: who may import whom."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ostinato

SOURCE = Path(ostinato.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

HEAVY = {"transformers", "accelerate", "matplotlib", "rich", "typer", "tensorboard", "datasets", "pandas", "scipy"}

# Each room with the rooms that it may import from; files beside the rooms are rooms of one file.
FOUNDATION = {"_version", "cores", "errors", "files", "state", "timing"}
ALLOWED = {
    "__init__": {"_version", "errors", "mixers", "models", "ops", "state", "tasks", "testing", "training"},
    "__main__": {"cli"},
    "_version": set(),
    "cores": set(),
    "errors": set(),
    "files": {"errors"},
    "state": {"errors", "files"},
    "timing": {"errors"},
    "report": {*FOUNDATION},
    "layers": {*FOUNDATION, "ops"},
    "ops": {*FOUNDATION},
    "mixers": {*FOUNDATION, "layers", "ops"},
    "tasks": {*FOUNDATION},
    "models": {*FOUNDATION, "layers", "mixers", "ops"},
    "training": {*FOUNDATION, "layers", "mixers", "models", "ops", "tasks"},
    "analysis": {*FOUNDATION, "layers", "mixers", "models", "ops", "tasks"},
    "theory": {*FOUNDATION, "layers", "ops"},
    "quantum": {*FOUNDATION, "layers", "ops"},
    "testing": {*FOUNDATION, "mixers", "ops"},
    "papers": {*FOUNDATION, "analysis", "layers", "mixers", "models", "ops", "report", "tasks", "theory"}
    | {"training"},
    "comparison": {*FOUNDATION, "mixers", "models", "report", "tasks", "training"},
    "cli": {*FOUNDATION, "analysis", "layers", "mixers", "models", "ops", "papers", "report", "tasks", "testing"}
    | {"comparison", "training"},
}
# The registry holds what is registered to the law, which is above it; it asks when it needs to, inside a function.
EXCEPTIONS = {("mixers/registry.py", "testing")}


def room(path: Path) -> str:
    relative = path.relative_to(SOURCE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def targets(node: ast.AST) -> Iterator[str]:
    """Full names of what an import statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        for alias in node.names:
            # `from package import module` imports the module, `from module import name` the module.
            inner = SOURCE.joinpath(*f"{node.module}.{alias.name}".split(".")[1:])
            is_module = str(node.module).startswith("ostinato") and (
                inner.is_dir() or inner.with_suffix(".py").exists()
            )
            yield f"{node.module}.{alias.name}" if is_module or node.module == "ostinato" else str(node.module)


def imported_at_once(tree: ast.AST) -> Iterator[str]:
    """Imports outside functions and outside `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield from targets(node)
        yield from imported_at_once(node)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_one_way(path: Path) -> None:
    own, name = room(path), str(path.relative_to(SOURCE))
    assert own in ALLOWED, f"{own} is a new room: say in this test what it may import"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for target in targets(node):
            package, _, rest = target.partition(".")
            other = rest.split(".")[0]
            if package != "ostinato" or other in ("", own):
                continue
            if not (SOURCE / other).is_dir() and not (SOURCE / f"{other}.py").is_file():
                assert own in ("cli", "papers", "report"), f"{name} imports {target} from the top of the package"
                continue
            assert other in ALLOWED[own] or (name, other) in EXCEPTIONS, f"{name} imports {target}"


def test_no_file_imports_itself_in_a_circle() -> None:
    known = {".".join(("ostinato", *path.relative_to(SOURCE).with_suffix("").parts)): path for path in FILES}
    known = {name.removesuffix(".__init__"): path for name, path in known.items()}
    graph = {
        name: [target for target in imported_at_once(ast.parse(path.read_text(encoding="utf-8"))) if target in known]
        for name, path in known.items()
    }
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> None:
        assert name not in way, f"a circle: {' -> '.join([*way, name])}"
        if name not in done:
            for target in graph[name]:
                visit(target, [*way, name])
            done.add(name)

    for name in graph:
        visit(name, [])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_heavy_packages_are_imported_where_they_are_used(path: Path) -> None:
    found = {target.split(".")[0] for target in imported_at_once(ast.parse(path.read_text(encoding="utf-8")))}
    permitted = {"rich", "typer"} if room(path) == "cli" else set()
    assert not found & HEAVY - permitted


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_everything_public_is_explained(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) or path.name == "_version.py", "a file opens with its subject"
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for outer in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
        if isinstance(outer, ast.ClassDef) and outer.name.startswith("_"):
            continue
        for node in outer.body:
            if isinstance(node, kinds) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{node.name} (line {node.lineno}) has no docstring"


def python(script: str, folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:ostinato", "-c", script],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


COST = """
import time, torch
start = time.process_time()
import ostinato
for name in ostinato.__all__:
    getattr(ostinato, name)
print(time.process_time() - start)
"""


def test_importing_is_cheap(tmp_path: Path) -> None:
    # CPU time, not wall time, and the least of a few: the machine may be busy with other things.
    costs: list[float] = []
    while len(costs) < 5 and min(costs, default=1.0) > 0.3:
        costs.append(float(python(COST, tmp_path)))
    assert min(costs) <= 0.3, f"import ostinato, and touching every name, took {costs} CPU seconds beyond torch"


def test_importing_loads_nothing_heavy_and_writes_nothing(tmp_path: Path) -> None:
    script = f"""
import json, sys, torch
before = set(sys.modules)
written = []
def watch(event, args):
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        written.append(str(args[0]))
    elif event in ("os.mkdir", "os.rename", "socket.connect", "subprocess.Popen"):
        written.append(event)
sys.addaudithook(watch)
import ostinato
for name in ostinato.__all__:
    getattr(ostinato, name)
from ostinato.mixers import registry
for name in registry.mixers():
    registry.mixer_class(name)
loaded = sorted({{name.split(".")[0] for name in set(sys.modules) - before}} & set({sorted(HEAVY)!r}))
print(json.dumps([loaded, written, "torch._dynamo" in set(sys.modules) - before]))
"""
    loaded, written, compiler = json.loads(python(script, tmp_path))
    assert loaded == [] and written == [] and not compiler
    assert os.listdir(tmp_path) == []


def test_the_package_alone_does_not_import_torch(tmp_path: Path) -> None:
    assert python("import sys, ostinato; print('torch' in sys.modules, ostinato.__version__)", tmp_path) == (
        f"False {ostinato.__version__}\n"
    )


def test_names_at_the_top_are_there() -> None:
    assert set(ostinato.__all__) <= set(dir(ostinato))
    for name in ostinato.__all__:
        assert getattr(ostinato, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ostinato.nonsense

"""Writes the pages and lists of the documentation that come from the code: the catalogue, the mixers, the tasks, the
tolerances.

Run by `make docs`; what it writes is not committed, so it cannot go stale. The README's table of speeds is: it is
written here too, and a test compares.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

from ostinato.analysis.taxonomy import COLUMNS, taxonomy
from ostinato.comparison.linear import rows_of
from ostinato.mixers import registry as mixers
from ostinato.papers import catalogue
from ostinato.papers.runner import verdict
from ostinato.tasks import registry as tasks
from ostinato.testing.report import GRADIENT_TOLERANCES, TOLERANCES, dtype_name

DOCS = Path(__file__).parent


def table(headers: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def code(names: tuple[str, ...]) -> str:
    """Names as code, by spaces."""
    return " ".join(f"`{name}`" for name in names)


def systems_table(room: str | None = None) -> str:
    """The systems, or those of a room."""
    rows = [
        [
            s.label,
            f"[{s.system}](https://arxiv.org/abs/{s.arxiv})",
            str(s.year),
            s.built_of,
            *([] if room else [" ".join(s.rooms)]),
            catalogue.state(s),
            *([] if room else [code(s.mixers)]),
        ]
        for s in catalogue.systems()
        if room is None or room in s.rooms
    ]
    more = [] if room else ["rooms"], [] if room else ["mixers that are there"]
    return table(["no", "system", "year", "built of", *more[0], "state", *more[1]], rows)


def result_table(found: dict) -> str:
    """A run's claims, and where it ran."""
    rows = [[c["claim"], c["theirs"], c["ours"], verdict(c["holds"]), c.get("note", "")] for c in found["claims"]]
    where = f"budget {found['budget']}, seed {found['seed']}, {found['seconds']} s, "
    where += ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    where += f". {found['conditions']}" if "conditions" in found else ""
    return table(["claim", "theirs", "ours", "verdict", "note"], rows) + f"\n{where}\n\n"


def results() -> str:
    """What committed runs found, claim by claim."""
    parts = []
    for system in catalogue.systems():
        if (found := catalogue.result(system)) is not None:
            parts.append(f"### {system.label} {system.system}\n\n" + result_table(found))
            if (smaller := catalogue.smaller_result(system)) is not None:
                parts.append(f"#### {system.label} at the {smaller['budget']} budget\n\n" + result_table(smaller))
    return "".join(parts) or "No run of an experiment has been committed yet.\n"


def benchmarks() -> str:
    """The measured speeds that are committed, machine by machine."""
    parts = []
    for path in sorted((catalogue.results_folder() / "benchmarks").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        where = ", ".join(f"{key} {value}" for key, value in content["machine"].items())
        parts.append(f"### On a {path.stem.upper()}\n\n{content['date']}: {where}. {content.get('conditions', '')}\n\n")
        for name, rows in {**content.get("figures", {}), **content}.items():
            if not (isinstance(rows, list) and rows):
                continue
            rows = [line for row in rows for line in _sides(row)]
            headers = list(dict.fromkeys(header for row in rows for header in row))
            cells = [[_cell(row.get(header, "")) for header in headers] for row in rows]
            parts.append(f"#### {name}\n\n" + table(headers, cells) + "\n")
    return "".join(parts) or "No benchmark has been committed yet.\n"


def speed_summary() -> str:
    """The README's table of kernels: forward with backward, queued, and how much longer peers take."""
    path = catalogue.results_folder() / "benchmarks" / "gpu.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for row in content["speed"]:
        ours = row["sides"]["ours"]["queued, ms"][1]
        others = [
            f"{name} {side['times ours, queued'][1]:.2f}×" for name, side in row["sides"].items() if name != "ours"
        ]
        share = f"{100 * row['fraction of the floor'][1]:.0f} %"
        rows.append([f"`{row['call']}`", row["shape"], f"{ours:.2f}", share, ", ".join(others)])
    headers = ["call", "shape", "ms", "floor / time", "time of others / ours"]
    machine = content["machine"]
    where = f"{machine['gpu']}, torch {machine['torch']}, {content['date']}; forward with backward, queued behind other"
    how = f"work, so without what the host takes to launch. {content['conditions']}"
    return f"{table(headers, rows)}\n{where}\n{how}\n\n{whole_models(content)}\n"


def whole_models(content: dict) -> str:
    """What a benchmark on a GPU found of training, streaming and first results, in sentences."""
    rates = {row["side"]: f"{row['tokens a second']:,}" for row in content["training"]}
    peer = "flash-linear-attention layers"
    token = min(row["µs a token"] for row in content["streaming"])
    firsts = [row["seconds"] for row in content["first result"]]
    model = content["training"][0]["model"].removesuffix(", ours by `fit`")
    return (
        f"In the same run, {model}: `fit(capture=True)` reads {rates['ours, captured']} tokens a second, on {peer} "
        f"{rates[f'{peer}, captured']}; launched by the host, as usual, {rates['ours']} and {rates[peer]}. A streamed "
        f"token of that model takes {token:.0f} µs. The first gradient of a call came {min(firsts)} to {max(firsts)} s "
        "after the start of its process, nothing compiled before."
    )


def _sides(row: dict) -> list[dict]:
    """A row for each side of a comparison on a GPU, ours with the floor; other rows as they are, without quartiles."""
    if "sides" not in row:
        return [{key: value for key, value in row.items() if not key.startswith("quartiles")}]
    call = {"call": f"{row['call']}, {row['shape']}"}
    lines = []
    for name, side in row["sides"].items():
        beside = {"fraction of the floor": row["fraction of the floor"]} if name == "ours" else {}
        lines.append({**call, "side": name, **side, **beside})
    return lines


def _cell(value: object) -> str:
    """A figure; forward, and forward with backward, beside each other."""
    return " / ".join(map(str, value)) if isinstance(value, list) else str(value)


def catalogue_page() -> str:
    """The catalogue."""
    records = catalogue.systems()
    counts = ", ".join(
        f"{sum(catalogue.state(record) == state for record in records)} {state}" for state in catalogue.STATES
    )
    return (
        "# The catalogue\n\n"
        f"{len(records)} systems: {counts}. [papers](rooms/papers.md) says what the states mean; `ostinato papers` "
        "prints this list.\n\n" + systems_table() + "\n## Results\n\n" + results() + "\n## Speed\n\n" + benchmarks()
    )


def mixers_table() -> str:
    """The mixers and their traits."""
    rows = []
    for name in mixers.mixers():
        traits = mixers.mixer_class(name).traits
        state = f"`{traits.state}`" if traits.state else ""
        rows.append([f"`{name}`", f"`{traits.engine}`", traits.transition, traits.input_gate, state, traits.paper])
    return table(["mixer", "engine", "transition", "input gate", "state per layer", "source"], rows)


def tasks_table() -> str:
    """The tasks."""
    rows = []
    for name in tasks.tasks():
        cls = tasks.task_class(name)
        first = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")
        rows.append([f"`{name}`", cls.metric.replace("_", " "), first])
    return table(["task", "metric", "what is asked"], rows)


def taxonomy_table() -> str:
    """What moves each mixer's state on."""
    return table(list(COLUMNS), [[f"`{row['mixer']}`", *list(row.values())[1:]] for row in taxonomy()])


def linear_family() -> str:
    """What each linear recurrence can do: the committed table, with what moves each state on beside the numbers."""
    path = catalogue.results_folder() / "linear_family.json"
    if not path.is_file():
        return "No run of `ostinato compare --preset linear` has been committed yet.\n"
    content = json.loads(path.read_text(encoding="utf-8"))
    headers, rows, best = rows_of(content)
    rows = [[f"**{cell}**" if (i, j) in best else cell for j, cell in enumerate(row)] for i, row in enumerate(rows)]
    kinds = {row["mixer"]: row for row in taxonomy(dict.fromkeys(row["mixer"] for row in content["rows"]))}
    beside = ("transition", "depends on", "mixes channels")
    shown = []
    for row, record in zip(rows, content["rows"], strict=True):
        kind = kinds[record["mixer"]]
        shown.append([f"`{row[0]}`", *(kind[column] for column in beside), *row[1:]])
    parts = [table([headers[0], *beside, *headers[1:]], shown), "\n", _tasks_of(content), "\n"]
    sizes = ", ".join(f"{key} {value}" for key, value in content["sizes"].items())
    done, total = content["finished"]
    where = ", ".join(f"{key} {value}" for key, value in content["machine"].items())
    how = content.get("conditions", "")
    parts.append(f"Budget {content['budget']}: {sizes}; {done} of {total} runs; {where}. {how}\n")
    failures = [
        [f"`{row['plan']}`", column, message]
        for row in content["rows"]
        for column, score in row["scores"].items()
        for message in dict.fromkeys(score["failed"])
    ]
    failures += [
        [f"`{row['plan']}`", f"speed, {k}", v["failed"]]
        for row in content["rows"]
        for k, v in row["speed"].items()
        if "failed" in v
    ]
    failures += [[f"`{key}`", "left out", message] for key, message in content["left_out"].items()]
    if failures:
        parts.append("\nWhat failed:\n\n" + table(["mixer", "where", "message"], failures))
    for name, load in content["speed_loads"].items():
        kind = "two threads of the processor" if name == "cpu" else "GPU"
        half = ", bfloat16" if load["half"] else ""
        parts.append(
            f"\nTokens a second, {kind}: forward and backward of {load['depth']} layers of width {load['d_model']} "
            f"over {load['batch']} × {load['length']} tokens{half}, without channel mixers.\n"
        )
    return "".join(parts)


def _tasks_of(content: dict) -> str:
    """The tasks of the table, and what needs no network."""
    rows = []
    for part in content["trainings"]:
        floors = {"chance": part["chance"], **part["baselines"]}
        width = f"at {part['parameters']:,} parameters" if part["parameters"] else ""
        rows.append(
            [
                ", ".join(part["columns"]),
                f"`{part['task']}` {width}".strip(),
                f"{part['steps']} × {part['batch_size']}",
                ", ".join(f"{name} {value:.2f}" for name, value in floors.items()),
            ]
        )
    return table(["columns", "task", "steps × batch", "without a network"], rows)


def tolerances_table() -> str:
    """What the law allows, by type."""
    rows = [[dtype_name(t), f"{TOLERANCES[t]:.1e}", f"{GRADIENT_TOLERANCES[t]:.1e}"] for t in TOLERANCES]
    return table(["type", "outputs and states", "gradients"], rows)


def with_speeds(readme: str) -> str:
    """The README with the table of the committed benchmark between its two marks."""
    before, _, rest = readme.partition("<!-- speeds -->\n")
    _, mark, after = rest.partition("<!-- end of speeds -->")
    return f"{before}<!-- speeds -->\n{speed_summary()}{mark}{after}"


def main() -> None:
    """Write everything."""
    generated = DOCS / "generated"
    generated.mkdir(exist_ok=True)
    lists = {"mixers": mixers_table(), "tasks": tasks_table(), "tolerances": tolerances_table()}
    lists["taxonomy"] = taxonomy_table()
    lists["linear_family"] = linear_family()
    lists |= {room: systems_table(room) for room in ("analysis", "theory", "quantum")}
    for name, text in lists.items():
        (generated / f"{name}.md").write_text(text, encoding="utf-8")
    (DOCS / "catalogue.md").write_text(catalogue_page(), encoding="utf-8")
    readme = DOCS.parent / "README.md"
    readme.write_text(with_speeds(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Pages and figures: one self-contained HTML file, light and dark, that opens anywhere.

    page = Page("A comparison", "parity, three mixers")
    page.table(["mixer", "accuracy"], [["lstm", 0.98], ["gla", 0.51]])
    page.figure(Figure("Loss", [Series("lstm", steps, losses)], x_label="step", y_label="nats"))
    page.save("index.html")

Figures are SVG written here: small, sharp, and of the page's own colours. The same figure can be saved as
an SVG file or, by matplotlib, as a PNG. Nothing here imports PyTorch.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_COLOURS = ("#1f77b4", "#d1600b", "#2a8a3e", "#8e4bb5", "#0f8b8d", "#c2304a", "#b8860b", "#6b6b6b")
_COLOURS_DARK = ("#6cb2eb", "#f59a4c", "#6fcf84", "#c792ea", "#56c7c9", "#f27a8f", "#e3c14f", "#b0b0b0")


@dataclass
class Series:
    """A line of a figure."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass
class Figure:
    """Lines over common axes; `levels` are reference lines by label, of a value of y (a baseline, a floor).

    With `categories`, x counts them: each is a row of points, named at its left, and y runs along the rows.
    """

    title: str
    series: list[Series]
    x_label: str = ""
    y_label: str = ""
    log_x: bool = False
    log_y: bool = False
    levels: dict[str, float] = field(default_factory=dict)
    categories: Sequence[str] = ()


class Strong(str):
    """Text of a table that stands out: the best of a column."""


def provenance() -> dict[str, str]:
    """What stands under every figure: the processor, the threads, the versions."""
    import os

    from ostinato import __version__
    from ostinato.timing import machine

    return {**machine(), "cores": str(os.cpu_count()), "ostinato": __version__}


def number(value: Any) -> str:
    """A number as a person writes it: four significant digits; anything else as it is."""
    if not _is_number(value):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e6):
        return f"{value:.2e}"
    digits = max(0, 3 - math.floor(math.log10(size))) if size else 0
    return f"{value:,.{min(digits, 4)}f}"


class Page:
    """An HTML page, built from top to bottom."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title, self.subtitle = title, subtitle
        self._parts: list[str] = []

    def heading(self, text: str) -> None:
        """A section's heading."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def sample(self, text: str) -> None:
        """Text in a box, with its line breaks: code, or what a model wrote."""
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; numbers are set to the right."""
        right = [
            any(_is_number(row[i]) for row in rows) and all(_is_number(row[i]) or row[i] in ("", "–") for row in rows)
            for i in range(len(headers))
        ]
        kinds = [' class="number"' if numeric else "" for numeric in right]
        head = "".join(f"<th{kind}>{html.escape(h)}</th>" for h, kind in zip(headers, kinds, strict=True))
        body = []
        for row in rows:
            cells = (f"<td{kind}>{_cell(cell)}</td>" for cell, kind in zip(row, kinds, strict=True))
            body.append(f"<tr>{''.join(cells)}</tr>")
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        self._parts.append(f'<div class="wide">{table}</div>')

    def figure(self, figure: Figure) -> None:
        """A figure with its title."""
        self._parts.append(f"<figure><figcaption>{html.escape(figure.title)}</figcaption>{svg(figure)}</figure>")

    def html(self) -> str:
        """The whole page."""
        subtitle = f'<p class="subtitle">{html.escape(self.subtitle)}</p>' if self.subtitle else ""
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}{_FIGURE_STYLE}</style></head><body><main>"
            f"<h1>{html.escape(self.title)}</h1>{subtitle}\n" + "\n".join(self._parts) + "\n</main></body></html>\n"
        )

    def save(self, path: str | Path) -> Path:
        """Write the page; folders are made."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.html(), encoding="utf-8")
        return path


def svg(figure: Figure, *, standalone: bool = False) -> str:
    """A figure as SVG: inside a page it takes the page's colours, `standalone` brings its own."""
    if figure.categories:
        return _rows(figure, standalone)
    points = [
        [
            (_axis(x, figure.log_x), _axis(y, figure.log_y))
            for x, y in zip(s.x, s.y, strict=True)
            if _drawable(x, figure.log_x) and _drawable(y, figure.log_y)
        ]
        for s in figure.series
    ]
    levels = {k: _axis(v, figure.log_y) for k, v in figure.levels.items() if _drawable(v, figure.log_y)}
    xs = [x for line in points for x, _ in line] or [0.0, 1.0]
    ys = [y for line in points for _, y in line] + list(levels.values()) or [0.0, 1.0]
    (x0, x1), (y0, y1) = _span(xs, 0.0), _span(ys, 0.06)
    left, top, width, height = 64, 12, 560, 270
    entries = [s.label for s in figure.series] + list(levels)
    # As many columns as the longest label allows.
    longest = max((len(label) for label in entries), default=0)
    columns = 3 if longest <= 22 else 2 if longest <= 36 else 1
    total = top + height + 52 + 20 * math.ceil(len(entries) / columns)

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (x - x0) / (x1 - x0) * width, top + (y1 - y) / (y1 - y0) * height

    out = [_opening(figure, left + width + 16, total, standalone)]
    for value, label in _ticks(y0, y1, figure.log_y):
        y = place(x0, value)[1]
        out.append(f'<line class="grid" x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for value, label in _ticks(x0, x1, figure.log_x):
        x = place(value, y0)[0]
        out.append(f'<text x="{x:.1f}" y="{top + height + 18}" text-anchor="middle">{label}</text>')
    out.append(
        f'<text x="{left + width / 2}" y="{top + height + 38}" class="axis">{html.escape(figure.x_label)}</text>'
    )
    middle = top + height / 2
    out.append(
        f'<text class="axis" transform="translate(14 {middle}) rotate(-90)">{html.escape(figure.y_label)}</text>'
    )
    for index, line in enumerate(points):
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in line)
        kind = f'class="line s{index % len(_COLOURS)}"'
        tip = f"<title>{html.escape(figure.series[index].label)}</title>"
        if len(line) == 1:
            x, y = place(*line[0])
            out.append(f'<circle {kind} cx="{x:.1f}" cy="{y:.1f}" r="3">{tip}</circle>')
        elif line:
            out.append(f'<polyline {kind} points="{path}">{tip}</polyline>')
    for index, (label, value) in enumerate(levels.items(), start=len(points)):
        y = place(x0, value)[1]
        kind = f'class="line level s{index % len(_COLOURS)}"'
        tip = f"<title>{html.escape(label)}</title>"
        out.append(f'<line {kind} x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}">{tip}</line>')
    out += _legend(entries, len(points), columns, (left, top + height + 58, width))
    return "".join(out) + "</svg>"


def _opening(figure: Figure, width: float, height: float, standalone: bool) -> str:
    opening = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(figure.title)}"'
    opening += ' xmlns="http://www.w3.org/2000/svg">'
    return opening + (f"<style>{_FIGURE_STYLE}</style><title>{html.escape(figure.title)}</title>" if standalone else "")


def _legend(entries: list[str], lines: int, columns: int, place: tuple[float, float, float]) -> list[str]:
    """The names of lines and, after them, of levels, in columns from `place` (left, top, width)."""
    left, top, width = place
    out = []
    for index, label in enumerate(entries):
        x, y = left + (index % columns) * width / columns, top + 20 * (index // columns)
        kind = f'class="line{" level" if index >= lines else ""} s{index % len(_COLOURS)}"'
        out.append(f'<line {kind} x1="{x:.0f}" x2="{x + 20:.0f}" y1="{y}" y2="{y}"/>')
        out.append(f'<text x="{x + 26:.0f}" y="{y + 4}">{html.escape(label)}</text>')
    return out


def _rows(figure: Figure, standalone: bool) -> str:
    """A figure whose x are categories: a row of points each."""
    left = min(300, 24 + 7 * max(map(len, figure.categories)))
    top, width, step = 12, 640 - left - 16, 24
    height = step * len(figure.categories)
    drawable = [
        [(int(x), _axis(y, figure.log_y)) for x, y in zip(s.x, s.y, strict=True) if _drawable(y, figure.log_y)]
        for s in figure.series
    ]
    levels = {k: _axis(v, figure.log_y) for k, v in figure.levels.items() if _drawable(v, figure.log_y)}
    low, high = _span([y for s in drawable for _, y in s] + list(levels.values()) or [0.0, 1.0], 0.06)
    entries = [s.label for s in figure.series] + list(levels)
    columns = 3 if max(map(len, entries), default=0) <= 22 else 2
    out = [_opening(figure, 640, top + height + 52 + 20 * math.ceil(len(entries) / columns), standalone)]

    def across(value: float) -> float:
        return left + (value - low) / (high - low) * width

    for value, label in _ticks(low, high, figure.log_y):
        x = across(value)
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{top + height}"/>')
        out.append(f'<text x="{x:.1f}" y="{top + height + 18}" text-anchor="middle">{label}</text>')
    out.append(
        f'<text x="{left + width / 2}" y="{top + height + 38}" class="axis">{html.escape(figure.y_label)}</text>'
    )
    for row, name in enumerate(figure.categories):
        y = top + step * (row + 0.5)
        out.append(f'<text x="{left - 12}" y="{y + 4:.1f}" text-anchor="end">{html.escape(name)}</text>')
        for index, points in enumerate(drawable):
            tip = html.escape(f"{name}, {figure.series[index].label}")
            # Series stand a little apart, so that none hides another.
            beside = y + 6 * ((index + 0.5) / len(drawable) - 0.5)
            out += [
                f'<circle class="line s{index % len(_COLOURS)}" cx="{across(value):.1f}" cy="{beside:.1f}" r="3.5">'
                f"<title>{tip}</title></circle>"
                for place, value in points
                if place == row
            ]
    for index, value in enumerate(levels.values(), start=len(drawable)):
        kind = f'class="line level s{index % len(_COLOURS)}"'
        out.append(f'<line {kind} x1="{across(value):.1f}" x2="{across(value):.1f}" y1="{top}" y2="{top + height}"/>')
    out += _legend(entries, len(drawable), columns, (left, top + height + 58, width))
    return "".join(out) + "</svg>"


def save_svg(figure: Figure, path: str | Path) -> None:
    """Write a figure as an SVG file of its own."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(svg(figure, standalone=True) + "\n", encoding="utf-8")


def save_png(figure: Figure, path: str | Path) -> None:
    """Write a figure as a PNG, by matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    level = axes.axvline if figure.categories else axes.axhline
    for index, series in enumerate(figure.series):
        ends = (series.y, series.x) if figure.categories else (series.x, series.y)
        kind: dict[str, Any] = {"marker": "o", "linestyle": ""} if figure.categories else {}
        axes.plot(*ends, label=series.label, color=_COLOURS[index % len(_COLOURS)], **kind)
    for index, (label, value) in enumerate(figure.levels.items(), start=len(figure.series)):
        level(value, label=label, color=_COLOURS[index % len(_COLOURS)], linestyle="--", linewidth=1)
    axes.set_title(figure.title)
    if figure.categories:
        axes.set_yticks(range(len(figure.categories)), figure.categories)
        axes.invert_yaxis()
        axes.set(xlabel=figure.y_label, xscale="log" if figure.log_y else "linear")
    else:
        axes.set(xlabel=figure.x_label, ylabel=figure.y_label)
        axes.set_xscale("log" if figure.log_x else "linear")
        axes.set_yscale("log" if figure.log_y else "linear")
    axes.grid(alpha=0.25)
    if figure.series or figure.levels:
        axes.legend(frameon=False, fontsize=8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path)


def _cell(value: Any) -> str:
    text = html.escape(number(value))
    return f"<strong>{text}</strong>" if isinstance(value, Strong) else text


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _drawable(value: float, logarithmic: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not logarithmic)


def _axis(value: float, logarithmic: bool) -> float:
    return math.log10(value) if logarithmic and value > 0 else float(value)


def _span(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high == low:
        low, high = low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5
    pad = (high - low) * margin
    return low - pad, high + pad


def _ticks(low: float, high: float, logarithmic: bool) -> list[tuple[float, str]]:
    """Round numbers inside the span: powers of ten on a logarithmic axis that spans at least one.

    Where these are fewer than three, their double and fivefold too.
    """
    if logarithmic and high - low >= 1:
        powers = range(math.floor(low), math.floor(high) + 1)
        for factors in ((1,), (1, 2, 5)):
            values = [factor * 10.0**power for power in powers for factor in factors]
            inside = [value for value in values if low - 1e-9 <= math.log10(value) <= high + 1e-9]
            if len(inside) > 2:
                break
        return [(math.log10(value), f"{value:,g}") for value in inside]
    raw = (high - low) / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    decimals = max(0, 1 - math.floor(math.log10(step)))
    out, value = [], math.ceil(low / step) * step
    while value <= high + step * 1e-9:
        value = 0.0 if abs(value) < step * 1e-9 else value  # not −0
        shown = 10**value if logarithmic else value
        text = number(shown) if logarithmic else f"{shown:,.{min(decimals, 6)}f}"
        out.append((value, text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text))
        value += step
    return out


def _palette(colours: Sequence[str]) -> str:
    return "".join(f".line.s{i}{{stroke:{c}}}circle.line.s{i}{{fill:{c}}}" for i, c in enumerate(colours))


_FIGURE_STYLE = (
    "svg{width:100%;height:auto;font:12px system-ui,sans-serif}svg text{fill:#555}"
    "svg .axis{text-anchor:middle;fill:#222}.grid{stroke:#8884;stroke-width:1}"
    ".line{fill:none;stroke-width:2;stroke-linejoin:round}.level{stroke-dasharray:6 4;stroke-width:1.5}"
    + _palette(_COLOURS)
    + "@media(prefers-color-scheme:dark){svg text{fill:#aaa}svg .axis{fill:#ddd}"
    + _palette(_COLOURS_DARK)
    + "}"
)
_STYLE = (
    ":root{color-scheme:light dark}body{margin:0;background:#fff;color:#1b1b1b;font:16px/1.55 system-ui,sans-serif}"
    "main{max-width:54rem;margin:0 auto;padding:2rem 1rem 4rem}h1{margin:0 0 .25rem;line-height:1.2}"
    "h2{margin:2.25rem 0 .5rem;font-size:1.2rem}.subtitle{margin:0 0 1.5rem;color:#666}"
    "table{border-collapse:collapse;font-size:.92rem;min-width:60%}.wide{overflow-x:auto;margin:1rem 0}"
    "th,td{padding:.35rem .8rem .35rem 0;text-align:left;border-bottom:1px solid #8883;vertical-align:top}"
    "th{font-weight:600}th.number{text-align:right}.number{text-align:right;font-variant-numeric:tabular-nums}"
    "figure{margin:1.5rem 0}figcaption{font-weight:600;margin-bottom:.4rem}"
    "pre{background:#8881;padding:.8rem 1rem;border-radius:6px;white-space:pre-wrap;overflow-wrap:anywhere;"
    "font:14px/1.5 ui-monospace,monospace}"
    "@media(prefers-color-scheme:dark){body{background:#16181c;color:#e6e6e6}.subtitle{color:#9a9a9a}}"
)

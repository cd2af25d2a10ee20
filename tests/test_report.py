"""Pages and figures: self-contained, escaped, and with the numbers that were given."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ostinato.report import Figure, Page, Series, number, provenance, save_png, save_svg, svg


def figure(**options: object) -> Figure:
    lines = [Series("a <b> & c", [1, 10, 100], [3.0, 2.0, 1.0]), Series("flat", [1, 100], [2.0, 2.0])]
    return Figure("A title", lines, "step", "loss", **options)  # type: ignore[arg-type]


def test_a_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    page = Page("Title <1>", "sub & title")
    page.heading("A heading")
    page.text("x < y")
    page.sample("<script>alert(1)</script>\nsecond line")
    page.table(["name", "value"], [["<b>", 0.12345], ["n", 1234567]])
    page.figure(figure())
    text = page.save(tmp_path / "deep" / "index.html").read_text()
    assert text == page.html()
    assert "<script" not in text and "&lt;script&gt;" in text and "Title &lt;1&gt;" in text
    assert not re.findall(r'(?:src|href)="', text), "a page must not need other files"
    assert "prefers-color-scheme:dark" in text
    assert '<td class="number">0.1235</td>' in text and '<td class="number">1,234,567</td>' in text


def test_a_column_is_numeric_only_if_all_of_it_is() -> None:
    page = Page("t")
    page.table(["mixed", "numbers", "with gaps"], [["x", 1, 2], [3, 4, ""]])
    assert page.html().count('<th class="number">') == 2


@pytest.mark.parametrize("options", [{}, {"log_x": True}, {"log_y": True}, {"levels": {"floor": 0.5, "gzip": 9.0}}])
def test_a_figure_is_valid_svg_within_its_frame(options: dict[str, object]) -> None:
    root = ElementTree.fromstring(svg(figure(**options), standalone=True))
    space = "{http://www.w3.org/2000/svg}"
    lines = root.findall(f"{space}polyline")
    assert len(lines) == 2
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    for line in lines:
        for point in line.attrib["points"].split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= width and 0 <= y <= height
    texts = [element.text for element in root.iter(f"{space}text")]
    assert {"step", "loss", "a <b> & c", "flat"} <= set(texts)
    assert set(options.get("levels", ())) <= set(texts)  # type: ignore[call-overload]


def test_long_labels_do_not_run_into_each_other() -> None:
    labels = [f"delta_net(negative_eigenvalues=True, heads={heads})" for heads in (1, 2, 4)]
    root = ElementTree.fromstring(svg(Figure("f", [Series(label, [0, 1], [-0.1, 0.1]) for label in labels])))
    texts = {element.text: element.attrib for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert len({texts[label]["y"] for label in labels}) == 3
    assert "0" in texts and "-0" not in texts


def test_lines_are_where_their_numbers_are() -> None:
    root = ElementTree.fromstring(svg(Figure("f", [Series("s", [0, 1, 2], [0.0, 5.0, 10.0])])))
    points = root.find("{http://www.w3.org/2000/svg}polyline").attrib["points"].split()  # type: ignore[union-attr]
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, point.split(","))) for point in points)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and x2 > x1
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2) and y2 < y1


@pytest.mark.parametrize(
    "series",
    [[], [Series("one point", [3], [4.0])], [Series("gaps", [1, 2, 3], [1.0, float("nan"), float("inf")])]],
    ids=["empty", "one point", "not finite"],
)
def test_odd_figures_are_drawn(series: list[Series], tmp_path: Path) -> None:
    text = svg(Figure("odd", series, log_x=True))
    ElementTree.fromstring(text)
    assert "nan" not in text and "inf" not in text.replace("infinity", "")
    save_svg(Figure("odd", series), tmp_path / "odd.svg")
    ElementTree.parse(tmp_path / "odd.svg")


def test_a_png_has_the_figure(tmp_path: Path) -> None:
    save_png(figure(levels={"gzip": 2.5}, log_x=True), tmp_path / "figure.png")
    content = (tmp_path / "figure.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 5000


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.23456, "1.235"),
        (12345.6, "12,346"),
        (0.00012, "1.20e-04"),
        (2.5e9, "2.50e+09"),
        (7, "7"),
        (1234567, "1,234,567"),
        (float("nan"), "nan"),
        ("text", "text"),
        (True, "True"),
        (None, "None"),
    ],
)
def test_numbers_as_people_write_them(value: object, text: str) -> None:
    assert number(value) == text


def test_provenance_names_the_machine_and_the_versions() -> None:
    import torch

    found = provenance()
    assert found["torch"] == torch.__version__
    assert {"processor", "threads", "cores", "python", "ostinato"} <= set(found)


def test_categories_are_rows_of_points(tmp_path: Path) -> None:
    arms = Figure("f", [Series("first", [0, 1, 1], [1.0, 2.0, 3.0]), Series("second", [0], [float("nan")])])
    arms.categories, arms.levels = ["a <b>", "c"], {"floor": 0.5}
    root = ElementTree.fromstring(svg(arms, standalone=True))
    space = "{http://www.w3.org/2000/svg}"
    circles = [element.attrib for element in root.iter(f"{space}circle")]
    assert len(circles) == 3 and circles[1]["cy"] == circles[2]["cy"] != circles[0]["cy"]
    assert float(circles[0]["cx"]) < float(circles[1]["cx"]) < float(circles[2]["cx"])
    assert {"a <b>", "c", "first", "floor"} <= {element.text for element in root.iter(f"{space}text")}
    save_png(arms, tmp_path / "arms.png")
    assert (tmp_path / "arms.png").read_bytes().startswith(b"\x89PNG")

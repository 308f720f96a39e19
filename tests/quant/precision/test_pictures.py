"""Pictures of a report, read as what they are: SVG whose marks lie where the numbers say."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT

from localrun.quant.precision.copies import BetterCopies
from localrun.quant.precision.error import ErrorTable, LayerErrors
from localrun.quant.precision.pictures import _shade, curve_picture, heat_map
from localrun.quant.precision.solver import CurvePoint, PrecisionSolution

SVG = "{http://www.w3.org/2000/svg}"
MIB = 1 << 20


def solution(*, best: float = 0.001) -> PrecisionSolution:
    curve = (CurvePoint(100 * MIB, 0.1), CurvePoint(200 * MIB, 0.01), CurvePoint(300 * MIB, best))
    uniform = (CurvePoint(100 * MIB, 0.1, "iq2_xxs"), CurvePoint(300 * MIB, best, "mxfp4"))
    chosen = CurvePoint(200 * MIB, 0.01)
    return PrecisionSolution(QT.IQ2_XXS, BetterCopies({}), chosen, 100 * MIB, 100 * MIB, 0, curve, uniform)


def texts(root: ET.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def test_size_grows_to_the_right_and_error_upwards() -> None:
    root = ET.fromstring(curve_picture(solution(), "a <model> & more"))
    (line,) = root.iter(f"{SVG}polyline")
    points = np.array([[float(v) for v in point.split(",")] for point in line.attrib["points"].split()])
    assert np.allclose(np.diff(points[:, 0]), points[1, 0] - points[0, 0]), "equal steps of size"
    assert (np.diff(points[:, 1]) > 0).all(), "a smaller error lies lower"
    width, height = (float(v) for v in root.attrib["viewBox"].split()[2:])
    assert ((points > 0) & (points < (width, height))).all()
    circles = {circle[0].text: (circle.attrib["cx"], circle.attrib["cy"]) for circle in root.iter(f"{SVG}circle")}
    assert [tuple(map(float, circles[name])) for name in ("iq2_xxs", "mxfp4")] == [tuple(points[0]), tuple(points[2])]
    (mark,) = root.iter(f"{SVG}path")
    x, y = (float(v) for v in re.findall(r"[\d.]+", mark.attrib["d"])[:2])
    assert (x + 7, y) == pytest.approx(tuple(points[1]), abs=0.11)


def test_a_picture_says_in_words_what_it_shows() -> None:
    root = ET.fromstring(curve_picture(solution(), "a <model> & more"))
    assert root.findtext(f"{SVG}title") == "a <model> & more: size against expected error"
    assert root.findtext(f"{SVG}desc") == (
        "all iq2_xxs: 100.00 MiB, 0.100000; all mxfp4: 300.00 MiB, 0.001000; chosen: 200.00 MiB, 0.010000"
    )
    assert {"all iq2_xxs", "all mxfp4", "chosen", "best mix over iq2_xxs", "1e-1", "1e-2", "≤ 1e-3"} <= set(texts(root))


def test_without_an_error_a_mark_lies_at_the_bottom() -> None:
    root = ET.fromstring(curve_picture(solution(best=0.0), "m"))
    lowest = max(float(line.attrib["y1"]) for line in root.iter(f"{SVG}line"))
    assert float(list(root.iter(f"{SVG}circle"))[-1].attrib["cy"]) == lowest


def test_four_decades_are_shown_however_small_the_least_error_is() -> None:
    labels = [text for text in texts(ET.fromstring(curve_picture(solution(best=1e-30), "m"))) if "1e" in text]
    assert labels == ["≤ 1e-5", "1e-4", "1e-3", "1e-2", "1e-1"]


def table(*means: tuple[float, float]) -> ErrorTable:
    def layer(*values: float) -> LayerErrors:
        relative = {kind: np.full(2, value) for kind, value in zip((QT.Q2_K, QT.MXFP4), values, strict=True)}
        return LayerErrors(relative, np.ones(2, bool), np.ones(2, np.int64), 1.0)

    return ErrorTable({number: layer(*values) for number, values in enumerate(means)}, real_rows=True)


def cells(root: ET.Element) -> dict[str, str]:
    """Title of each cell -> its colour."""
    found = {}
    for rect in root.iter(f"{SVG}rect"):
        if (title := rect.findtext(f"{SVG}title")) is not None:
            found[title] = rect.attrib["fill"]
    return found


def test_worse_is_darker_and_exact_is_white() -> None:
    root = ET.fromstring(heat_map(table((0.1, 0.0), (0.01, 0.001)), "m"))
    assert cells(root) == {
        "layer 0, q2_k: 0.100000": _shade(1.0),
        "layer 1, q2_k: 0.010000": _shade(0.5),
        "layer 0, mxfp4: 0.000000": "#ffffff",
        "layer 1, mxfp4: 0.001000": _shade(0.0),
    }
    assert _shade(0.0) == "#e6eef6"
    assert _shade(1.0) == "#1b3a5e"
    assert {"0.1000", "exact", "q2_k", "mxfp4", "0", "1"} <= set(texts(root))
    assert root.findtext(f"{SVG}desc") == "q2_k: 0.10000, 0.01000; mxfp4: 0.00000, 0.00100"


def test_cells_of_many_layers_stay_apart_without_numbers_in_them() -> None:
    root = ET.fromstring(heat_map(table(*[(0.1, 0.01)] * 61), "m"))
    lefts = sorted({float(rect.attrib["x"]) for rect in root.iter(f"{SVG}rect") if len(rect)})
    assert len(lefts) == 61
    assert lefts[-1] + 12 < float(root.attrib["viewBox"].split()[2])
    assert not any(text.startswith("0.") for text in texts(root))
    assert [text for text in texts(root) if text.isdecimal()] == [str(n) for n in range(0, 61, 2)]


def test_errors_that_are_all_zero_or_all_equal_make_a_picture_too() -> None:
    assert set(cells(ET.fromstring(heat_map(table((0.0, 0.0)), "m"))).values()) == {"#ffffff"}
    assert set(cells(ET.fromstring(heat_map(table((0.1, 0.1)), "m"))).values()) == {_shade(0.0)}

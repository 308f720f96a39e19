"""The report: all pieces, few pieces, names that could break a table or a picture."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as QT

from localrun.quant.precision.copies import BetterCopies
from localrun.quant.precision.error import ErrorTable, LayerErrors
from localrun.quant.precision.importance import ImportanceSummary
from localrun.quant.precision.report import REPORT_NAMES, Evaluation, PrecisionReport
from localrun.quant.precision.solver import HotBudget, solve_hot
from tests.quant.precision.test_solver import costs


def error_table() -> ErrorTable:
    measured = np.array([True, True, False, True])
    layers = {
        number: LayerErrors(
            {QT.Q2_K: np.array([0.04, 0.02, 0.03, 0.03]) * (number + 1), QT.MXFP4: np.zeros(4)},
            measured,
            np.array([16, 3, 0, 8]),
            2.0,
        )
        for number in (0, 1)
    }
    return ErrorTable(layers, True)


def test_whole_report_is_complete_and_well_formed(tmp_path: Path) -> None:
    table = costs(np.random.default_rng(0), 4, n_layers=2)
    solution = solve_hot(table, QT.Q2_K, [HotBudget(QT.MXFP4, 320_000)])
    report = PrecisionReport(
        model="A <b>model</b> | & more",
        sizes={"base": 2 << 30, "overlay": 1 << 30},
        options={"base": "q2_k", "hot": "mxfp4:1GiB"},
        importance=ImportanceSummary(5000, 8, 1, 2, ((1, 1),), ("te|xt",), "d1"),
        errors=error_table(),
        solution=solution,
        evaluations=[Evaluation("tiers", 1000, 5.1, 5.0, 0.02, 0.001, 0.3, 0.95, 3 << 30)],
        text="held out",
    )
    assert {path.name for path in report.write(tmp_path)} == set(REPORT_NAMES)
    assert {path.name for path in tmp_path.iterdir()} == set(REPORT_NAMES)
    text = (tmp_path / "report.md").read_text()
    for wanted in (
        "1 were never used and 2 fewer than",
        "Never used: layer 1: 1.",
        "6 of 8 experts",
        "3.00 GiB | 5.1000 | 0.020000 | 0.001000 | 0.300000 | 95.00% |",
        "all q2_k |",
        "te\\|xt",
    ):
        assert wanted in text
    data = json.loads((tmp_path / "report.json").read_text())
    assert BetterCopies.from_json(data["tiers"]["better"]).formats == solution.plan.formats
    again = ErrorTable.from_json(data["errors"])
    assert (again.n_measured, again.n_experts, again.real_rows) == (6, 8, True)
    np.testing.assert_allclose(again.errors(1, QT.Q2_K), [0.08, 0.04, 0.06, 0.06])
    for name in REPORT_NAMES[2:]:
        root = ET.parse(tmp_path / name).getroot()
        assert root.findtext("{http://www.w3.org/2000/svg}title", "").startswith("A <b>model</b> | & more")
        numbers = [float(element.get(key, "0")) for element in root.iter() for key in ("x", "y", "width", "cx", "cy")
                   if element.get(key)]  # fmt: skip
        assert all(0 <= number <= 1000 for number in numbers)


def test_report_of_few_pieces(tmp_path: Path) -> None:
    report = PrecisionReport("m", {"base": 5}, {})
    assert {path.name for path in report.write(tmp_path)} == {"report.md", "report.json"}
    assert "Precision of the experts" not in (tmp_path / "report.md").read_text()

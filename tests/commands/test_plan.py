"""`localrun plan` as a command: bars on a terminal and as SVG, suggestions as commands."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from localrun import cli
from localrun.engine.planner.bars import bar_lines, bars, shares
from localrun.engine.planner.boxes import BY_SLUG
from localrun.engine.planner.plan import Plan, PlanOptions
from localrun.engine.planner.planner import make_plan
from localrun.engine.planner.sizes import sizes_of

BOX = "gpu-24-ram-64"


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(sizes_of("flash"), BY_SLUG[BOX].hardware, PlanOptions())


def test_bars_are_as_long_as_what_they_stand_for(plan: Plan) -> None:
    drawn = {bar.name: bar for bar in bars(plan)}
    assert list(drawn) == ["RAM", "GPU", "drive", "token"]
    assert drawn["RAM"].total == pytest.approx(plan.machine.total_ram_bytes)
    assert drawn["GPU"].total == pytest.approx(plan.machine.vram_bytes)
    assert drawn["drive"].total == pytest.approx(plan.sizes.expert_file_bytes)
    assert plan.decode is not None
    assert drawn["token"].total == pytest.approx(1 / plan.decode.likely.tokens_per_s)


@pytest.mark.parametrize("width", [40, 80, 160])
def test_a_terminal_is_filled_and_not_exceeded(plan: Plan, width: int) -> None:
    lines = bar_lines(bars(plan), width)
    assert max(map(len, lines)) == width
    assert sum(len(line) == width for line in lines) >= 4


def test_every_cell_is_given_to_a_part() -> None:
    assert shares([1.0, 1.0, 1.0], 10) == [4, 3, 3]
    assert shares([0.001, 5.0], 8) == [0, 8]
    assert shares([], 8) == []


def test_a_pipe_gets_no_bars_and_each_suggestion_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "flash", "--box", BOX]) == 0
    out = capsys.readouterr().out
    assert "█" not in out
    assert "  localrun convert MODEL DIR --base q2_k " in out
    assert f"  localrun plan flash --box {BOX} --machine-ram 96GiB " in out
    assert "      prompts; " in out


def test_a_terminal_gets_bars() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm"}
    command = [sys.executable, "-m", "localrun", "plan", "flash", "--box", BOX]
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL, env=environment) as process:
        os.close(theirs)
        out = b""
        try:
            while piece := os.read(ours, 1 << 16):
                out += piece
        except OSError:  # Linux's way to say that the other end is closed
            pass
        assert process.wait() == 0
    os.close(ours)
    lines = out.decode().splitlines()
    assert any(line.startswith("token ") for line in lines)
    assert sum("█" in line for line in lines) >= 4


def test_svg_has_every_part_with_its_number(tmp_path: Path, plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "plan.svg"
    assert cli.main(["plan", "flash", "--box", BOX, "--svg", str(target)]) == 0
    assert str(target) in capsys.readouterr().err
    words = "".join(ET.parse(target).getroot().itertext())
    for bar in bars(plan):
        for part in bar.parts:
            assert f"{part.name} {bar.show(part.value)}" in words

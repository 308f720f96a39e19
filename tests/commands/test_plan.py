"""`localrun plan` as a command: bars on a terminal and as SVG, suggestions as commands."""

from __future__ import annotations

import argparse
import json
import os
import pty
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from gguf import GGMLQuantizationType

from localrun import cli
from localrun.api import demo, models
from localrun.commands.plan import command_of
from localrun.engine.planner.bars import bar_lines, bars, shares
from localrun.engine.planner.boxes import BY_SLUG
from localrun.engine.planner.plan import Plan, PlanOptions
from localrun.engine.planner.planner import make_plan
from localrun.engine.planner.quality import SAME_TOP_TOKEN, exactness
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
    assert "  localrun convert ~/models/DeepSeek-V4-Flash DIR --base q2_k\n      answers " in out
    assert "  with 96 GiB of RAM:\n      answers " in out, "no command makes the machine larger"
    advised = out[out.index("what would be faster") : out.index("to get it")].splitlines()
    assert not [line for line in advised if "localrun plan" in line]
    assert not [line for line in out.splitlines() if line.startswith("faster ")], "said once"
    assert " in batches of 2048 (prompts " in out


def test_a_plan_s_lines_go_without_what_would_be_faster(plan: Plan) -> None:
    assert [line.split()[0] for line in plan.lines()] == ["model", "machine", "memory", "experts", "speed", "faster"]
    assert plan.lines(faster=False) == plan.lines()[:-1]


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
    commands = ("  localrun ", "  hf ")  # are whole, to be copied
    assert max(len(line) for line in lines if not line.startswith(commands)) <= 80
    assert any(line.startswith("         ") and "(rates derived" in line for line in lines), "folded between words"
    assert sum("█" in line for line in lines) >= 4


def test_svg_has_every_segment_with_its_number(tmp_path: Path, plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "plan.svg"
    assert cli.main(["plan", "flash", "--box", BOX, "--svg", str(target)]) == 0
    assert str(target) in capsys.readouterr().err
    words = "".join(ET.parse(target).getroot().itertext())
    for bar in bars(plan):
        for segment in bar.segments:
            assert f"{segment.name} {bar.show(segment.value)}" in words


def test_a_model_that_is_not_there_comes_with_its_download_and_its_hours(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "flash", "--box", BOX]) == 0
    *_, title, download, chat = capsys.readouterr().out.splitlines()
    assert title == "to get it (160 GB: 3h32m at 100 Mbit/s, 21m17s at 1 Gbit/s)"
    assert download == "  hf download deepseek-ai/DeepSeek-V4-Flash --local-dir ~/models/DeepSeek-V4-Flash"
    assert chat == "  localrun chat ~/models/DeepSeek-V4-Flash"
    assert cli.main(["plan", "demo", "--no-probe"]) == 0
    assert "hf download" not in capsys.readouterr().out


def test_without_a_model_the_plan_is_that_of_the_one_that_is_set_or_was_used_last_or_flash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCALRUN_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("LOCALRUN_CONFIG_DIR", str(tmp_path / "config"))

    def planned() -> str:
        assert cli.main(["plan", "--box", BOX]) == 0
        out = capsys.readouterr()
        assert "no MODEL given" in out.err
        return out.out.splitlines()[0]

    assert "DeepSeek-V4-Flash" in planned()
    monkeypatch.setenv("LOCALRUN_CACHE_DIR", str(tmp_path / "cache"))
    models.remember(demo.checkpoint())
    assert "demo" in planned()
    monkeypatch.setenv("LOCALRUN_MODEL", "pro")
    assert "DeepSeek-V4-Pro" in planned()


def test_what_the_machine_or_the_model_can_not_do_is_refused_before_anything_is_measured_or_converted(
    tmp_path: Path,
) -> None:
    """In an empty cache: a refusal leaves nothing compiled, converted or probed in it. (A process of its own, since this one has
    used another cache.)"""
    cache = tmp_path / "cache"
    refused: list[tuple[list[str], int, str]] = [
        (["demo", "--ram", "900TiB"], 1, "--ram"),
        (["demo", "--vram", "900TiB"], 1, "--vram"),
        (["flash", "--ram", "900TiB"], 1, "--ram"),
        (["flash", "--context", "2000000"], 2, "--context"),
        (["flash", "--threads", "5000"], 2, "--threads"),
        (["flash", "--machine-ram", "64GiB", "--ram", "65GiB"], 1, "--ram"),
        (["flash", "--box", BOX, "--vram", "25GiB"], 1, "--vram"),
    ]
    code = """
import json, sys
from localrun import cli
for arguments in json.loads(sys.argv[1]):
    print(cli.main(["plan", *arguments, "--cache-dir", sys.argv[2]]), flush=True)
    print("---", file=sys.stderr, flush=True)
"""
    commands = json.dumps([arguments for arguments, _, _ in refused])
    done = subprocess.run([sys.executable, "-c", code, commands, str(cache)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    errors = done.stderr.split("---\n")
    for (arguments, expected, option), found, said in zip(refused, done.stdout.split(), errors[:-1], strict=True):
        assert (int(found), option in said, "hint: " in said) == (expected, True, True), (arguments, said)
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_exactness_is_what_the_tables_of_measured_quality_say() -> None:
    """Only formats that were measured have a figure."""
    tables = Path("docs/quantization.md").read_text()
    files = tables[tables.index("## Measured quality of converted files") :]
    for kind, share in SAME_TOP_TOKEN.items():
        name = kind.name.lower()
        row = re.search(rf"^\| {name} \|.*? (\d+\.\d+)% \|", files, re.M) or re.search(
            rf"^\| uniform {name} \|.*? (\d+\.\d+)% \|", tables, re.M
        )
        assert row is not None
        assert share == pytest.approx(float(row[1]) / 100), name
    assert "%" not in exactness(GGMLQuantizationType.Q6_K)
    (suggestion,) = [s for s in make_plan(sizes_of("flash"), BY_SLUG[BOX].hardware).suggestions if "q2_k" in s.text]
    assert suggestion.cost.endswith("top token agrees 90% on the demo model")


def test_no_conversion_is_advised_for_what_has_no_checkpoint(tmp_path: Path) -> None:
    sizes = sizes_of("flash")
    args = argparse.Namespace(model="m.gguf", box=None)
    assert command_of("convert --base q2_k", args, convertible=False) == "localrun convert CHECKPOINT DIR --base q2_k"
    other = replace(sizes, convertible=False, shape=replace(sizes.shape, architecture="olmoe"))
    plan = make_plan(other, BY_SLUG[BOX].hardware)
    assert plan.suggestions
    assert not [s for s in plan.suggestions if s.text.startswith("convert")]

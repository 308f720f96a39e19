"""The campaign for a graphics card, to its end on the stand-in with small dimensions; its table; what a bare machine gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.rpc_server import rpc_server
from tools.gpu_check import __main__ as gpu_check
from tools.gpu_check.campaign import Campaign, run
from tools.gpu_check.models import PooledSource, write_model
from tools.gpu_check.pack import one_of_each
from tools.gpu_check.table import table


def test_the_campaign_runs_to_its_end_on_the_stand_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    with rpc_server() as (endpoint, _):
        campaign = Campaign(
            folder=tmp_path / "models",
            preset="tiny",
            second=None,
            own_layers=2,
            rpc=endpoint,
            shares=(1.0, 0.02),
            limit_s=300,
            least_s=0,
            prompt_tokens=32,
            new_tokens=2,
            n_threads=1,
        )
        run(campaign, out, lambda text: None)
    result = json.loads(out.read_text())
    assert [task.get("error") for task in result["tasks"]] == [None] * 5
    assert result["left_out"] == []
    most, none, *_ = result["tasks"]
    assert most["gpu_experts"] > 0
    assert none["gpu_experts"] == 0
    assert result["tasks"][-1]["stock"]
    assert all({phase["kind"] for phase in task["phases"]} == {"prefill", "decode"} for task in result["tasks"])
    assert gpu_check.main(["table", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| whole tiny") for line in lines) == 3
    assert any(line.startswith("| 3 layers, llama.cpp") for line in lines)


def test_what_the_time_is_too_short_for_is_named(tmp_path: Path) -> None:
    campaign = Campaign(folder=tmp_path, preset="tiny", second=None, gpu="none", limit_s=10, least_s=60)
    result = run(campaign, tmp_path / "result.json", lambda text: None)
    assert result["tasks"] == []
    assert len(result["left_out"]) == 3
    assert "* left out: whole tiny, no card: 10 s were left" in table(result)


def test_layers_share_the_experts_that_were_written(tmp_path: Path) -> None:
    write_model(tmp_path, "tiny", own_layers=2)
    source = PooledSource(tmp_path, 2)
    layers = list(source.moe_layers)
    assert source.expert(layers[2], 3) == source.expert(layers[0], 3)
    assert source.expert(layers[3], 3) == source.expert(layers[1], 3) != source.expert(layers[0], 3)
    sizes = [file.stat() for file in source.files]
    assert sum(size.st_blocks * 512 for size in sizes) < sum(size.st_size for size in sizes)


def test_a_library_is_packed_once(tmp_path: Path) -> None:
    source = tmp_path / "lib"
    source.mkdir()
    content = Path("/bin/true").resolve().read_bytes()
    for name in ("libx.so", "libx.so.0", "libx.so.0.1.2"):
        (source / name).write_bytes(content)
    one_of_each(source, tmp_path / "packed")
    packed = sorted((tmp_path / "packed").iterdir())
    assert [file.name for file in packed] == ["libx.so", "libx.so.0", "libx.so.0.1.2"]
    assert [file.is_symlink() for file in packed] == [False, True, True]

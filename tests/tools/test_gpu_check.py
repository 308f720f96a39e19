"""The campaign for a graphics card, to its end on the stand-in with small dimensions; its table; what a bare machine gets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from localrun.errors import LocalrunError
from tests.rpc_server import rpc_server
from tools.gpu_check import __main__ as gpu_check
from tools.gpu_check import start
from tools.gpu_check.campaign import Campaign, run
from tools.gpu_check.fit import Fit, whole_that_fits
from tools.gpu_check.models import PooledSource, write_model
from tools.gpu_check.pack import PACKAGES, RUN, copy_package, one_of_each
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
            limit_s=3000,  # far more than it takes on a busy machine
            least_s=0,
            prompt_tokens=32,
            new_tokens=2,
            n_threads=1,
            memory_bytes=8 << 30,  # whatever else runs here
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


def test_a_machine_with_little_memory_measures_less_and_says_so(tmp_path: Path) -> None:
    """Of Flash and Pro fewer layers; of a small model nothing, with a line for each step."""
    assert whole_that_fits("flash", 2, 128 << 30) == Fit(None, 2)
    assert whole_that_fits("flash", 2, None) == Fit(None, 2)
    fewer_own = whole_that_fits("flash", 2, 24 << 30)
    assert (fewer_own.layers, fewer_own.own_layers) == (None, 1)
    fewer = whole_that_fits("pro", 2, 40 << 30)
    assert fewer.layers is not None
    assert 3 <= fewer.layers < 61
    assert f"{fewer.layers} of its 61 layers" in fewer.left_out
    assert "40.00 GiB are free" in fewer.left_out
    with pytest.raises(LocalrunError, match="3 layers of flash need"):
        whole_that_fits("flash", 2, 4 << 30)
    campaign = Campaign(folder=tmp_path, preset="flash", second=None, gpu="none", least_s=0, memory_bytes=4 << 30)
    result = run(campaign, tmp_path / "result.json", lambda text: None)
    assert result["tasks"] == []
    assert all("are free" in text for text in result["left_out"])
    assert [text.split(":")[0] for text in result["left_out"]] == [
        "whole flash, no card",
        "3 layers, localrun",
        "3 layers, llama.cpp with experts on the CPU",
    ]


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


def test_what_the_campaign_imports_is_packed(tmp_path: Path) -> None:
    """Everything outside the standard library and the project that a task has loaded when it is done."""
    write_model(tmp_path, "tiny", own_layers=2)
    task = json.dumps(
        {
            "name": "",
            "model": str(tmp_path),
            "own_layers": 2,
            "gpu": "none",
            "prompt_tokens": 8,
            "new_tokens": 1,
            "n_threads": 1,
        }
    )
    code = (
        "import sys; import tools.gpu_check.__main__; from importlib.metadata import packages_distributions as p;"
        "from tools.gpu_check.task import main; main(sys.argv[1:]);"
        "known = p(); names = {m.split('.')[0] for m in sys.modules};"
        "print(sorted({d.lower() for n in names for d in known.get(n, [])}))"
    )
    done = subprocess.run([sys.executable, "-c", code, task], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout.splitlines()[-1].replace("'", '"')))
    ours = {"localrun", "llama-cpp-python", "llama_cpp_python", "setuptools"}
    assert {name.replace("-", "_") for name in loaded - ours} <= set(PACKAGES)


def test_a_package_is_copied_without_its_tests(tmp_path: Path) -> None:
    copy_package("xxhash", tmp_path)
    found = subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            "import sys; sys.path[:] = [sys.argv[1], *sys.path]; import xxhash; print(xxhash.__file__)",
            tmp_path,
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.startswith(str(tmp_path))


def test_a_bare_machine_is_told_what_it_lacks(tmp_path: Path) -> None:
    shutil.copyfile(Path(start.__file__), tmp_path / "start.py")
    (tmp_path / "run.sh").write_text(RUN)
    made_for = {**start.made_here(), "python": "3.9", "packages": "all"}
    (tmp_path / "made-for.json").write_text(json.dumps(made_for))
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(["sh", tmp_path / "run.sh"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert "packed for python 3.9" in done.stderr
    assert "PYTHON=python3.9" in done.stderr
    assert start.other_python({**made_for, "packages": "none"}) == ""
    assert "driver" in start.why_not("ImportError: libcuda.so.1: cannot open shared object file")
    assert "nvidia-cublas" in start.why_not("OSError: libcublas.so.13: cannot open shared object file")


def test_the_users_folders_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "lacks_runtime", lambda: True)
    environment = start.environment_for(tmp_path / "project")
    assert environment["HOME"] == str(tmp_path / "scratch")
    assert environment["XDG_CACHE_HOME"].startswith(str(tmp_path))
    assert environment["LD_LIBRARY_PATH"].split(os.pathsep)[0] == str(tmp_path / "project" / "system")

"""What `run.sh` of a packed campaign starts on a bare machine: unpacks, says what is missing, measures, prints the table.

It runs with the machine's Python before anything is unpacked: standard library only.
"""

from __future__ import annotations

import ctypes
import glob
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE / "project"


def main(arguments: list[str]) -> int:
    """Exit code: 0 measured, 1 failed, 2 this machine can't."""
    made_for = json.loads((HERE / "made-for.json").read_text())
    problem = other_python(made_for)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    for archive in sorted(HERE.glob("*.tar.xz")):
        with tarfile.open(archive) as packed:
            packed.extractall(PROJECT, filter="fully_trusted")
    environment = environment_for(PROJECT)
    loaded = subprocess.run(
        [sys.executable, "-c", "import llama_cpp"], cwd=PROJECT, env=environment, capture_output=True, text=True
    )
    if loaded.returncode:
        print(f"error: {why_not(loaded.stderr)}", file=sys.stderr)
        return 2
    out = Path(os.environ.get("OUT", HERE)) / "gpu-check.json"
    command = [sys.executable, "-m", "tools.gpu_check"]
    code = subprocess.run([*command, "run", str(out), *arguments], cwd=PROJECT, env=environment).returncode
    if code == 0:
        code = subprocess.run([*command, "table", str(out)], cwd=PROJECT, env=environment).returncode
    return code


def other_python(made_for: dict[str, str]) -> str:
    """Why this Python or machine can't run what was packed; empty: it can."""
    here = made_here()
    if made_for["packages"] == "none":
        here["python"] = made_for["python"]  # whatever the machine has packages for
    wrong = [
        f"{name} {made_for[name]}, here is {here[name]}"
        for name in ("python", "machine")
        if made_for[name] != here[name]
    ]
    if not wrong:
        return ""
    return f"packed for {', '.join(wrong)}; name another one: PYTHON=python{made_for['python']} sh run.sh, or pack it with that one"


def made_here() -> dict[str, str]:
    """The present Python's version and the processor, as `made-for.json` has them."""
    return {"python": f"{sys.version_info[0]}.{sys.version_info[1]}", "machine": os.uname().machine}


def environment_for(project: Path) -> dict[str, str]:
    """Where Python and the loader find what was packed, and scratch beside it instead of the user's folders."""
    result = dict(os.environ)
    scratch = project.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    result["PYTHONPATH"] = os.pathsep.join([str(project), str(project / "packages")])
    result.update(HOME=str(scratch), XDG_CACHE_HOME=str(scratch / "cache"), XDG_DATA_HOME=str(scratch / "data"))
    result.update(PYTHONUNBUFFERED="1", GGML_NO_BACKTRACE="1")
    folders = [str(project / "system")] if lacks_runtime() else []
    folders += [path for path in result.get("LD_LIBRARY_PATH", "").split(os.pathsep) if path]
    for folder in ("/usr/local/cuda/lib64", "/usr/local/nvidia/lib64", *nvidia_packages()):
        if os.path.isdir(folder):
            folders.append(folder)
    result["LD_LIBRARY_PATH"] = os.pathsep.join(folders)
    return result


def nvidia_packages() -> list[str]:
    """Libraries of PyPI's CUDA packages, where the machine's Python has them."""
    patterns = ("nvidia/cu*/lib", "nvidia/*/lib")
    return sorted({folder for path in sys.path for pattern in patterns for folder in glob.glob(f"{path}/{pattern}")})


def lacks_runtime() -> bool:
    """The machine has no GCC runtime, with which llama.cpp is linked."""
    for name in ("libgomp.so.1", "libstdc++.so.6"):
        try:
            ctypes.CDLL(name)
        except OSError:
            return True
    return False


def why_not(trace: str) -> str:
    """One line about a library that does not load."""
    last = trace.strip().splitlines()[-1] if trace.strip() else "llama.cpp does not load"
    hints = {
        "libcuda.so": "NVIDIA's driver is not installed",
        "libcublas": "cuBLAS is missing: pip install nvidia-cublas, or name its folder in LD_LIBRARY_PATH",
        "libcudart": "CUDA's runtime is missing: pip install nvidia-cuda-runtime, or name its folder in LD_LIBRARY_PATH",
        "GLIBC": "the machine's C library is older than the one it was built with",
    }
    return "; ".join([last, *(hint for word, hint in hints.items() if word in last)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

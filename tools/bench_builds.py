"""Compares builds of llama-cpp-python: the same tiny mixture of experts, decoded and prefilled by stock llama.cpp.

    python -m tools.bench_builds native=.venv/bin/python portable=~/localrun/bin/python

The builds alternate, so that a temporarily busy machine affects all of them equally; the fastest round of each counts.
`NAME=PYTHON:VARIANT` leaves a portable build only that variant of the CPU backend, e.g. `avx2=~/localrun/bin/python:haswell`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DIMS = {"n_layers": 8, "n_embd": 1024, "n_heads": 16, "n_kv_heads": 16, "n_experts": 32, "n_used": 4, "n_ff": 1024}
N_VOCAB = 4096
N_PROMPT, N_DECODE = 256, 48


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("builds", nargs="+", metavar="NAME=PYTHON[:VARIANT]")
    parser.add_argument("--type", default="Q4_0", help="ggml type of the experts (Q4_0); all else is F16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    best: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="localrun-builds-") as name:
        folder = Path(name)
        model = _write_model(folder / "model.gguf", args.type)
        builds = [_prepare(text, folder) for text in args.builds]
        for _ in range(args.rounds):
            for build, python, path in builds:
                result = _measure(python, path, model, args.threads)
                known = best.setdefault(build, result)
                best[build] = {**result, **{key: min(known[key], result[key]) for key in ("decode_ms", "prefill_ms")}}
    for build, result in best.items():
        print(
            f"{build:10} decode {result['decode_ms']:6.2f} ms/token  prefill {result['prefill_ms']:7.1f} ms for {N_PROMPT}"
            f"  {result['backend']}"
        )
    return 0


def _write_model(path: Path, kind: str) -> Path:
    from gguf import GGMLQuantizationType

    from tools.make_moe_gguf import MoeDims, write_moe_gguf

    write_moe_gguf(path, "olmoe", MoeDims(**DIMS, vocab=N_VOCAB), expert_type=GGMLQuantizationType[kind])
    return path


def _prepare(text: str, folder: Path) -> tuple[str, str, str]:
    """Name, interpreter, and what to put before its module path: a copy of llama_cpp with one variant only."""
    name, _, rest = text.partition("=")
    python, _, variant = rest.partition(":")
    python = os.path.expanduser(python)
    if not variant:
        return name, python, ""
    code = "import importlib.util; print(importlib.util.find_spec('llama_cpp').submodule_search_locations[0])"
    source = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    target = folder / name
    shutil.copytree(source, target / "llama_cpp")
    for library in (target / "llama_cpp" / "lib").glob("libggml-cpu-*.so"):
        if library.name != f"libggml-cpu-{variant}.so":
            library.unlink()
    return name, python, str(target)


def _measure(python: str, path: str, model: Path, n_threads: int) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": path}
    command = [python, str(Path(__file__).resolve()), "--child", str(model), str(n_threads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _child(model_path: str, n_threads: int) -> None:
    """Imports llama_cpp only: any interpreter that has it will do."""
    import ctypes

    import llama_cpp as L

    lib = L.llama_cpp._lib
    loaded: list[str] = []

    @L.llama_log_callback
    def log(level: int, text: bytes, data: object) -> None:
        line = text.decode(errors="replace").strip()
        if "loaded CPU backend from" in line:
            loaded.append(Path(line.split()[-1]).name)

    L.llama_log_set(log, None)
    if lib.ggml_backend_reg_count() == 0:
        lib.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
        lib.ggml_backend_load_all_from_path(os.fsencode(Path(L.__file__).parent / "lib"))
    L.llama_backend_init()
    model = L.llama_model_load_from_file(model_path.encode(), L.llama_model_default_params())
    params = L.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 512, N_PROMPT, N_PROMPT
    params.n_threads = params.n_threads_batch = n_threads
    context = L.llama_init_from_model(model, params)

    def decode(tokens: list[int]) -> float:
        array = (L.llama_token * len(tokens))(*tokens)
        start = time.perf_counter()
        code = L.llama_decode(context, L.llama_batch_get_one(array, len(tokens)))
        L.llama_synchronize(context)
        if code:
            raise SystemExit(f"llama_decode: {code}")
        return time.perf_counter() - start

    tokens = [(i * 37) % N_VOCAB for i in range(N_PROMPT)]
    decode(tokens[:8])
    L.llama_memory_clear(L.llama_get_memory(context), True)
    prefill = decode(tokens)
    times = sorted(decode([token]) for token in tokens[:N_DECODE])
    with contextlib.suppress(IndexError):
        loaded.append("built in" if not loaded else loaded.pop())
    # The median: the fastest token alone could be one that met an idle machine.
    print(json.dumps({"decode_ms": 1e3 * times[len(times) // 2], "prefill_ms": 1e3 * prefill, "backend": loaded[0]}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _child(sys.argv[2], int(sys.argv[3]))
    else:
        sys.exit(main())

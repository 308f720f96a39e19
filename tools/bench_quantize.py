"""Whole conversion to a quantized base against llama.cpp's quantizer on the same tensors and cores: time, memory, error.

    python -m tools.bench_quantize CHECKPOINT SCRATCH [--base q2_k] [--threads 2] [--rounds 1]

llama.cpp makes such a file in two steps, its conversion script and `llama_model_quantize`. Here only the second is measured, from
the exact GGUF that localrun made of the checkpoint (FP4 experts as MXFP4), so its time is a lower bound of what it takes there;
ours is the whole way from safetensors to the finished, synced, checksummed file. Neither uses an importance matrix. Tensors other
than experts keep their types on both sides. Each step runs in a process of its own; the time is that of the work in it, so compile
what is missing beforehand (`localrun doctor --warm`). SCRATCH needs room for the exact GGUF and one result, which are deleted.
"""

from __future__ import annotations

import argparse
import ctypes as C
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType

from localrun.quant.checkpoint.mapping import BASE_TYPES, ConversionOptions
from localrun.quant.convert.converter import MODEL_NAME, convert
from localrun.quant.formats.quantize import dequantize_rows, quantize_rows
from localrun.quant.open import open_model
from localrun.quant.precision.error import exact_weights


def convert_ours(source: Path, target: Path, base: GGMLQuantizationType | None, threads: int) -> None:
    """From safetensors to the finished directory."""
    convert(source, target, ConversionOptions(base=base), jobs=threads)


def quantize_theirs(exact: Path, target: Path, base: GGMLQuantizationType, threads: int) -> None:
    """`llama_model_quantize`: experts to `base`, everything else as it is."""
    import llama_cpp

    kinds = {info.name: base if "_exps." in name else info.type for name, info in open_model(exact).tensors.items()}
    patterns = [(f"^{re.escape(name)}$".encode(), int(kind)) for name, kind in kinds.items()]
    overrides = (llama_cpp.llama_model_tensor_override * (len(patterns) + 1))()  # an empty one ends the list
    for override, (pattern, kind) in zip(overrides, patterns, strict=False):
        override.pattern, override.type = pattern, kind
    params: Any = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype = threads, int(LlamaFileType.MOSTLY_Q8_0)
    params.allow_requantize = params.pure = True
    params.output_tensor_type = int(kinds["output.weight"])
    params.token_embedding_type = int(kinds["token_embd.weight"])
    params.tt_overrides = C.cast(overrides, type(params.tt_overrides))
    target.mkdir(parents=True)
    code = llama_cpp.llama_model_quantize(
        str(exact / MODEL_NAME).encode(), str(target / MODEL_NAME).encode(), C.byref(params)
    )
    if code:
        raise SystemExit(f"llama_model_quantize gave {code}")
    file = os.open(target / MODEL_NAME, os.O_RDONLY)
    os.fsync(file)  # as ours does
    os.close(file)


def step(which: str, source: Path, target: Path, base: str, threads: int) -> dict[str, float]:
    """Runs one side in a process of its own: seconds of the work alone, CPU seconds and peak memory of the whole process."""
    command = [sys.executable, "-m", "tools.bench_quantize", str(source), str(target)]
    with tempfile.TemporaryFile("w+") as log:  # a file: llama.cpp says more than a pipe holds
        process = subprocess.Popen(
            [*command, "--base", base, "--threads", str(threads), "--step", which],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
        if status:
            log.seek(0)
            raise SystemExit(f"{which} failed:\n{log.read()[-2000:]}")
    return {
        "seconds": float(output.split()[-1]),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mib": round(usage.ru_maxrss / 1024),
    }


def relative_rms(exact: Path, base: GGMLQuantizationType, n: int = 8) -> dict[str, float]:
    """Root of squared error over squared weights of `n` experts spread over the model, by both quantizers."""
    model = open_model(exact)
    places = [(layer, expert) for layer, moe in model.moe_layers.items() for expert in range(moe.n_experts)]
    error, power = {"ours": 0.0, "theirs": 0.0}, 0.0
    for layer, expert in places[:: max(1, len(places) // n)]:
        for recipe in model.base_expert(layer, expert):
            x = exact_weights(model, recipe)
            power += float(np.square(x, dtype=np.float64).sum())
            for which in error:
                rows = quantize_rows(x, base, ours=which == "ours")
                kept = dequantize_rows(rows.reshape(recipe.n_out, -1), base).reshape(x.shape)
                error[which] += float(np.square(x - kept, dtype=np.float64).sum())
    return {which: float((value / power) ** 0.5) for which, value in error.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--base", default="q2_k")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--step", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step is not None:
        start = time.perf_counter()
        work = convert_ours if args.step == "ours" else quantize_theirs
        work(args.checkpoint, args.scratch, BASE_TYPES[args.base], args.threads)
        print(time.perf_counter() - start)
        return 0
    exact = args.scratch / "exact"
    convert_ours(args.checkpoint, exact, None, args.threads)
    rows: dict[str, list[dict[str, float]]] = {"theirs": [], "ours": []}
    for _ in range(args.rounds):
        for which, source in (("theirs", exact), ("ours", args.checkpoint)):
            target = args.scratch / which
            row = step(which, source, target, args.base, args.threads)
            print(f"{which}: {row}", file=sys.stderr, flush=True)
            rows[which].append(row)
            shutil.rmtree(target)
    errors = relative_rms(exact, BASE_TYPES[args.base])
    n_weights = sum(3 * moe.n_experts * moe.n_embd * moe.n_ff for moe in open_model(exact).moe_layers.values())
    shutil.rmtree(exact)
    seconds = {which: statistics.median(row["seconds"] for row in runs) for which, runs in rows.items()}
    summary = {
        "base": args.base,
        "threads": args.threads,
        "expert_weights": n_weights,
        **{f"{which}_s": round(value, 1) for which, value in seconds.items()},
        **{f"{which}_peak_mib": max(row["peak_mib"] for row in runs) for which, runs in rows.items()},
        **{f"{which}_relative_rms": round(value, 5) for which, value in errors.items()},
        "times_faster": round(seconds["theirs"] / seconds["ours"], 2),
    }
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())

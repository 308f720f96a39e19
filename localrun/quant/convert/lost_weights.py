"""Searches a model without checksums for zeros where weights were lost (see `localrun.quant.zeros`).

Reads everything from disk, bypassing the page cache where it can. Damage is reported rather than raised, as in `integrity`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from threading import local

from localrun.errors import LocalrunError
from localrun.quant.convert.direct_io import AlignedBuffer, DirectReader
from localrun.quant.model.source import ModelSource
from localrun.quant.zeros import LostWeights

READS_IN_FLIGHT = 8


def find_lost_weights(
    source: ModelSource, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[str]:
    """What is wrong, with files and tensors; empty if nothing is.

    Args:
        progress: called with (bytes done, total bytes), from this thread.
    """
    problems = []
    total = sum(tensor.n_bytes for tensor in source.tensors.values())
    done = 0
    stacks = {f"blk.{layer}.ffn_{name}_exps.weight" for layer in source.moe_layers for name in ("gate", "up", "down")}
    for name in source.tensors:
        if name in stacks:
            continue
        try:
            source.read_tensor(name)
        except LocalrunError as error:
            problems.append(str(error))
        done += source.tensors[name].n_bytes
        progress(done, total)
    with ExitStack() as opened:
        readers = [DirectReader(path, path.stat().st_size) for path in source.files]
        for reader in readers:
            opened.callback(reader.close)
        pool = opened.enter_context(ThreadPoolExecutor(READS_IN_FLIGHT, thread_name_prefix="verify"))
        experts = ((layer, expert) for layer, shape in source.moe_layers.items() for expert in range(shape.n_experts))
        own, lost = local(), LostWeights(source)

        def look(layer: int, expert: int) -> str | None:
            buffers: list[AlignedBuffer] = own.__dict__.setdefault("buffers", [AlignedBuffer() for _ in range(6)])
            projections = source.expert(layer, expert)
            free = iter(buffers)
            try:
                raw = [
                    [
                        readers[extent.file].read(extent.offset, extent.n_bytes, next(free))
                        for extent in projection.extents
                    ]
                    for projection in projections
                ]
                lost.refuse(layer, expert, projections, raw)
            except LocalrunError as error:
                return str(error)
            return None

        for batch in _batches(experts, 4 * READS_IN_FLIGHT):
            for (layer, _), problem in zip(batch, pool.map(look, *zip(*batch, strict=True)), strict=True):
                if problem is not None:
                    problems.append(problem)
                done += source.moe_layers[layer].expert_bytes
            progress(done, total)
    return problems


def _batches(experts: Iterator[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int]]]:
    while batch := list(islice(experts, size)):
        yield batch

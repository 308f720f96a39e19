"""Searches a model without checksums for zeros where weights were lost (see `localrun.quant.zeros`).

Reads everything from disk, bypassing the page cache where it can. Damage is reported rather than raised, as in `integrity`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import local

from localrun.errors import LocalrunError
from localrun.quant.convert.direct_io import AlignedBuffer, DirectReader
from localrun.quant.gguf.source import GgufSource
from localrun.quant.model.source import PROJECTIONS, ModelSource
from localrun.quant.zeros import LostWeights

READS_IN_FLIGHT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class LostPart:
    """A tensor, or an expert of a stack, that lacks weights or can't be read.

    Attributes:
        path: its file; None for a dense tensor of a checkpoint, which may be made from several.
        offset, n_bytes: where it lies in that file; None likewise.
        problem: what is wrong, with file and tensor.
    """

    tensor: str
    expert: int | None
    path: Path | None
    offset: int | None
    n_bytes: int | None
    problem: str

    def __str__(self) -> str:
        return self.problem


def find_lost_weights(
    source: ModelSource, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[LostPart]:
    """What is wrong, in the model's order; empty if nothing is. Of an expert only its first problem.

    Args:
        progress: called with (bytes done, total bytes), from this thread.
    """
    problems: list[LostPart] = []
    total = sum(tensor.n_bytes for tensor in source.tensors.values())
    done = 0
    stacks = {f"blk.{layer}.ffn_{name}_exps.weight" for layer in source.moe_layers for name in ("gate", "up", "down")}
    for name in source.tensors:
        if name in stacks:
            continue
        try:
            source.read_tensor(name)
        except LocalrunError as error:
            problems.append(_dense(source, name, str(error)))
        done += source.tensors[name].n_bytes
        progress(done, total)
    with ExitStack() as opened:
        readers = [DirectReader(path, path.stat().st_size) for path in source.files]
        for reader in readers:
            opened.callback(reader.close)
        pool = opened.enter_context(ThreadPoolExecutor(READS_IN_FLIGHT, thread_name_prefix="verify"))
        experts = ((layer, expert) for layer, shape in source.moe_layers.items() for expert in range(shape.n_experts))
        own, lost = local(), LostWeights(source)

        def look(layer: int, expert: int) -> LostPart | None:
            buffers: list[AlignedBuffer] = own.__dict__.setdefault("buffers", [AlignedBuffer() for _ in range(6)])
            free = iter(buffers)
            for name, projection in zip(PROJECTIONS, source.expert(layer, expert), strict=True):
                try:
                    raw = [
                        readers[extent.file].read(extent.offset, extent.n_bytes, next(free))
                        for extent in projection.extents
                    ]
                    lost.refuse_one(layer, expert, name, projection, raw)
                except LocalrunError as error:
                    extent = projection.extents[0]
                    return LostPart(
                        tensor=f"blk.{layer}.ffn_{name}_exps.weight",
                        expert=expert,
                        path=source.files[extent.file],
                        offset=extent.offset,
                        n_bytes=extent.n_bytes,
                        problem=str(error),
                    )
            return None

        for batch in _batches(experts, 4 * READS_IN_FLIGHT):
            for (layer, _), problem in zip(batch, pool.map(look, *zip(*batch, strict=True)), strict=True):
                if problem is not None:
                    problems.append(problem)
                done += source.moe_layers[layer].expert_bytes
            progress(done, total)
    return problems


def _dense(source: ModelSource, name: str, problem: str) -> LostPart:
    if not isinstance(source, GgufSource):
        return LostPart(tensor=name, expert=None, path=None, offset=None, n_bytes=None, problem=problem)
    extent = source.tensor_extent(name)
    path = source.files[extent.file]
    return LostPart(tensor=name, expert=None, path=path, offset=extent.offset, n_bytes=extent.n_bytes, problem=problem)


def _batches(experts: Iterator[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int]]]:
    while batch := list(islice(experts, size)):
        yield batch

"""Converts a whole synthetic checkpoint whose layers share experts: only distinct experts are converted.

    python -m tools.make_checkpoint flash /mnt/xfs/flash --own-layers 2
    python -m tools.convert_whole /mnt/xfs/flash /mnt/xfs/flash.lr --own-layers 2
    python -m tools.convert_whole /mnt/xfs/flash /mnt/xfs/flash.q2 --own-layers 2 --base q2_k --dense q4_k
    python -m tools.convert_whole /mnt/xfs/flash /mnt/xfs/flash.small --own-layers 2 --keep-experts --dense q4_k

The result is what `localrun convert` would write, byte for byte, manifest included: a layer's experts and dense matrices are those
of its donor (`tools.shared_layers`), so their converted rows are, too, and share its blocks (`tools.shared_extents`).
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from localrun.errors import DiskSpaceError, LocalrunError, UsageError
from localrun.quant.checkpoint.mapping import (
    BASE_TYPES,
    DENSE_TYPES,
    ConversionOptions,
    ConversionPlan,
    PlannedTensor,
    make_plan,
)
from localrun.quant.convert import converter, writing
from localrun.quant.convert.journal import Journal
from localrun.quant.convert.report import build_manifest
from localrun.quant.model.manifest import write_manifest
from localrun.units import format_duration, format_size
from tools import shared_extents, shared_layers


@dataclass(frozen=True, slots=True)
class Shared:
    """A tensor that gets another one's blocks."""

    donor: PlannedTensor
    tensor: PlannedTensor


def shared_stacks(plan: ConversionPlan, own_layers: int) -> list[Shared]:
    """Every stack of experts that another layer's is equal to, by `make_checkpoint`'s rule.

    Raises:
        UsageError: `own_layers` is not less than the model's layers, or not positive.
    """
    stacks = {(t.layer, t.projection): t for t in plan.tensors.values() if t.is_experts}
    layers = sorted({layer for layer, _ in stacks})
    shared_layers.check_own_layers(own_layers, len(layers))
    if own_layers == len(layers):
        raise UsageError(f"--own-layers {own_layers}: no layer shares experts", hint="use localrun convert")
    return [
        Shared(stacks[layers[index % own_layers], projection], stacks[layer, projection])
        for index, layer in enumerate(layers[own_layers:], own_layers)
        for projection in sorted({p for at, p in stacks if at == layer})
    ]


def shared_matrices(plan: ConversionPlan) -> list[Shared]:
    """Every dense matrix that another layer's is equal to, by `shared_layers`' rule."""
    config = plan.checkpoint.config
    ratios = config.compress_ratios[: config.num_hidden_layers]
    dense = {t.parts[0].source.spec.name: t for t in plan.tensors.values() if not t.is_experts}
    donors = {name: shared_layers.donor_name(ratios, name) for name in dense}
    return [
        Shared(dense[donor], dense[name])
        for name, donor in donors.items()
        if donor != name and dense[donor].info.type == dense[name].info.type
    ]


class _SharingRun(writing._Run):
    """Converts what is not shared, then shares the rest and takes the donors' checksums for it."""

    reserves_space = False
    shared: list[Shared]

    def _write_all(self, start: float) -> None:
        number = {work.offset: work.number for work in self._work}
        twins = {
            number[s.tensor.offset + part.offset]: number[s.donor.offset + twin.offset]
            for s in self.shared
            for part, twin in zip(s.tensor.parts, s.donor.parts, strict=True)
        }
        everything = self._work
        self._work = [work for work in everything if work.number not in twins]
        self._total = sum(work.part.n_bytes for work in self._work)
        super()._write_all(start)
        self._work = everything
        for s in self.shared:
            shared_extents.share(self._partial, s.donor.offset, self._partial, s.tensor.offset, s.tensor.info.n_bytes)
        done = self._journal.done
        done.update({twin: done[donor] for twin, donor in twins.items()})


def convert_whole(source: Path, target: Path, options: ConversionOptions, own_layers: int, *, jobs: int) -> int:
    """Writes the model; returns the bytes of its file, of which the disk holds a fraction.

    Raises:
        LocalrunError: as the converter does; SharingError: `target`'s file system can't share blocks.
    """
    converter.check_target(source, target)
    if target.exists():
        raise UsageError(f"{target} exists already", hint="delete it, or choose another folder")
    plan = make_plan(converter.open_checkpoint(source), options)
    shared_layers.check_own_layers(own_layers, plan.checkpoint.config.num_hidden_layers)
    shared = shared_matrices(plan) + ([] if options.keep_experts else shared_stacks(plan, own_layers))
    shared_extents.check(target)
    target.mkdir(parents=True)
    described = converter.described_options(plan)
    output = converter.output_file(plan, target)
    journal = Journal(output.work, described, {"source": str(source.resolve()), "identity": plan.checkpoint.identity})
    try:
        run = _SharingRun(plan, output, journal, jobs, _report)
        run.shared = shared
        result = run.execute()
        manifest = build_manifest(plan, output.final.name, journal.done, described, result.losses)
        write_manifest(manifest, target)
    finally:
        journal.close()
    for path in sorted(output.work.iterdir()):
        path.unlink()
    output.work.rmdir()
    return plan.file_size


def _report(progress: writing.ConversionProgress) -> None:
    print(f"\r{progress.done_bytes / max(1, progress.total_bytes):4.0%}", end="", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="convert_whole", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--own-layers", type=int, required=True, metavar="N", help="as make_checkpoint was told")
    parser.add_argument("--base", choices=sorted(BASE_TYPES), help="as `localrun convert`")
    parser.add_argument("--dense", choices=sorted(DENSE_TYPES), default="q8_0", help="as `localrun convert`")
    parser.add_argument("--keep-experts", action="store_true", help="as `localrun convert`")
    parser.add_argument("--jobs", type=int, default=4)
    options = parser.parse_args(arguments)
    started = time.monotonic()
    base = None if options.base is None else BASE_TYPES[options.base]
    try:
        conversion_options = ConversionOptions(DENSE_TYPES[options.dense], base, keep_experts=options.keep_experts)
        size = convert_whole(options.source, options.target, conversion_options, options.own_layers, jobs=options.jobs)
    except LocalrunError as error:
        # This program does not go on where it was, as the converter's own hints say.
        hint = (
            f"delete {options.target}, then run the same command again"
            if isinstance(error, DiskSpaceError)
            else error.hint
        )
        print(f"error: {error}", *([f"hint: {hint}"] if hint else []), sep="\n", file=sys.stderr)
        return 1
    print(f"\n{options.target}: {format_size(size)} in {format_duration(time.monotonic() - started)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

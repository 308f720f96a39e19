"""Plans for this machine or a described one: what fits where, and how fast it will be. Loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from localrun import config
from localrun.api import demo, models
from localrun.api.options import ByteRate, Limits, Size, given
from localrun.engine import memory
from localrun.engine.options import check_lengths
from localrun.errors import BudgetError, UsageError
from localrun.units import check_memory_size, check_rate, format_size, parse_rate, parse_size

if TYPE_CHECKING:
    from localrun.engine.planner.hardware import Gpu, Hardware
    from localrun.engine.planner.plan import Plan
    from localrun.engine.planner.sizes import ModelSizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine to plan for. Unspecified values are those of the box, or of this machine.

    Attributes:
        box: name of a typical machine, such as `gpu-24-ram-64`.
        ram: its memory, 2 GiB of it in use.
        vram: memory of each GPU; 0 for a machine without.
        gpu: names of cards, such as `RTX 4090`, for those whose memory and bandwidth are known; instead of `vram`.
        threads: its cores.
        memory_rate, drive_rate: bandwidth of its RAM and read speed of the model's drive.
        drives: 2 for a mirror on a second drive.
        gpu_rate: bandwidth of the GPUs' memory; otherwise what their names say, or an assumption.
    """

    box: str | None = None
    ram: Size | None = None
    vram: Sequence[Size] = ()
    gpu: Sequence[str] = ()
    threads: int | None = None
    memory_rate: ByteRate | None = None
    drive_rate: ByteRate | None = None
    drives: int | None = None
    gpu_rate: ByteRate | None = None


def plan(
    model: str | Path = "flash",
    *,
    machine: Machine | str | None = None,
    base: str | None = None,
    position: int | None = None,
    prompt_tokens: int = 2048,
    probe: bool = True,
    **limits: Unpack[Limits],
) -> Plan:
    """Places a model on a machine and predicts its speed.

    Args:
        model: `flash`, `pro`, a config.json, or whatever `localrun.load` takes.
        machine: another machine, or the name of a box; None: this one, with the user's settings.
        base: type of all experts, for a model not converted yet.
        position: tokens already in the context when an answer begins; None: a quarter of the context, at most 8192.
        prompt_tokens: length of the prompt.
        probe: measure drive and memory of this machine (a second or two, remembered for a day).
        limits: as for loading: `ram="48GiB"`, `context=131072`, ...

    Raises:
        BudgetError: it can't fit, or a limit exceeds the machine; the hint has the nearest setting that fits.
        LocalrunError: there is no such model or box, or an option is invalid.
    """
    user = config.load()
    if isinstance(machine, str):
        machine = Machine(box=machine)
    if machine is not None:  # settings for this machine don't apply to another one
        user = config.Settings(models=user.models)
    settings = given(limits, user)
    return plan_with(model, settings, machine, base=base, position=position, prompt_tokens=prompt_tokens, probe=probe)


def plan_with(
    model: str | Path,
    settings: config.Settings,
    machine: Machine | None = None,
    *,
    base: str | None = None,
    position: int | None = None,
    prompt_tokens: int = 2048,
    probe: bool = True,
) -> Plan:
    """As `plan`, with limits as settings."""
    from localrun.engine.planner.plan import PlanOptions
    from localrun.engine.planner.planner import make_plan
    from localrun.engine.planner.sizes import format_of, sizes_of
    from localrun.quant.checkpoint.official import BUILT_IN
    from localrun.quant.open import dense_type

    _check_count("position", position, 0)
    _check_count("prompt_tokens", prompt_tokens, 1)
    if str(model) not in BUILT_IN or Path(model).exists():
        model = models.resolve(str(model), settings, command="plan") or demo.checkpoint()  # converting it would compile
    _check_limits(settings, hardware_of(machine, settings, probe=False))  # refused before anything is measured
    sizes = sizes_of(model, base=format_of(base) if base else None, dense=dense_type(settings["dense"]))
    check_lengths(sizes.shape.n_ctx_train or 0, n_ctx=settings["context"], n_batch=settings["batch"])
    hardware = hardware_of(machine, settings, sizes, probe=probe)
    wanted = PlanOptions(
        ram_bytes=settings["ram"],
        vram_bytes=settings["vram"],
        n_ctx=settings["context"],
        kv_type=settings["kv"],
        n_batch=settings["batch"],
        adaptive=settings["adaptive"],
        position=position,
        prompt_tokens=prompt_tokens,
        fixed=settings.given,
    )
    return make_plan(sizes, hardware, wanted)


def hardware_of(
    machine: Machine | None, settings: config.Settings, sizes: ModelSizes | None = None, *, probe: bool
) -> Hardware:
    """This machine, or the described one; unspecified values are taken from this machine, and marked as such.

    Args:
        sizes: of the model that will run on it; None: of no certain one.

    Raises:
        UsageError: no such box, or a value that no machine has.
    """
    from localrun.engine.planner import hardware
    from localrun.engine.planner.boxes import BY_SLUG

    def detected(*, gpus: bool = False) -> Hardware:
        n_threads = settings["threads"]
        if sizes is None:
            return hardware.detect(n_threads=n_threads, probe=probe, gpus=gpus)
        dense = sizes.dense_format
        return hardware.detect(sizes.files, n_threads=n_threads, probe=probe, gpus=gpus, specs=sizes.specs, dense=dense)

    if machine is None:
        memory.check_threads(settings["threads"])
        return detected(gpus=True)
    _check_count("threads", machine.threads, 1)
    _check_count("drives", machine.drives, 1, 2)
    if machine.box is not None and machine.box not in BY_SLUG:
        raise UsageError(f"unknown box '{machine.box}'", hint=f"one of {', '.join(BY_SLUG)}")
    if machine.box is not None:
        known = BY_SLUG[machine.box].hardware
    else:
        known = detected()
        origin = {name: _HERE.get(how, how) for name, how in known.origin.items()}
        known = replace(known, others=0.0, origin=origin)  # what runs here now is not what the other machine has to do
    ram = _bytes(machine.ram)
    return known.given(
        ram_bytes=None if ram is None else max(0, ram - hardware.SYSTEM_BYTES),
        total_ram_bytes=ram,
        disk_bytes_per_s=_per_s(machine.drive_rate),
        n_drives=machine.drives,
        memory_bytes_per_s=_per_s(machine.memory_rate),
        n_threads=_threads(machine, known, settings["threads"]),
        gpus=_gpus(machine, known.gpus),
    )


def _threads(machine: Machine, known: Hardware, wanted: int) -> int | None:
    """Compute threads, at most the machine's cores; None: as many as `known` has, `wanted` included.

    Args:
        wanted: by the user; 0: one per core.
    """
    if machine.threads is None and machine.box is None:
        return None
    return min(wanted, machine.threads or known.n_threads) if wanted else machine.threads


_HERE = {"measured": "this machine's"}


def _gpus(machine: Machine, known: Sequence[Gpu]) -> tuple[Gpu, ...] | None:
    """The described GPUs; None: the known ones.

    Raises:
        UsageError: a rate for no GPU.
    """
    from localrun.engine.planner import hardware
    from localrun.engine.planner.cards import card_of

    if machine.vram and machine.gpu:
        raise UsageError(
            "both the memory and the names of GPUs are given",
            hint="use --machine-gpu for known cards, or --machine-vram",
        )
    rate = _per_s(machine.gpu_rate)
    sizes = [size for size in (_bytes(size) for size in machine.vram) if size]
    if machine.gpu:
        return tuple(hardware.Gpu.of_card(card_of(name), bytes_per_s=rate) for name in machine.gpu)
    if machine.vram:
        known = [hardware.Gpu.described(size, name=f"GPU {number}") for number, size in enumerate(sizes)]
    if rate is not None and not known:
        raise UsageError(
            "a GPU's memory bandwidth is given for a machine without a GPU",
            hint="say how much memory the GPU has, too: --machine-vram 24GiB",
        )
    if not machine.vram and rate is None:
        return None
    return tuple(
        gpu if rate is None else hardware.Gpu.described(gpu.vram_bytes, name=gpu.name, bytes_per_s=rate)
        for gpu in known
    )


def _bytes(size: Size | None) -> int | None:
    n_bytes = parse_size(size) if isinstance(size, str) else size
    if n_bytes is not None:
        check_memory_size(n_bytes)
    return n_bytes


def _per_s(rate: ByteRate | None) -> float | None:
    if rate is None or isinstance(rate, str):
        return None if rate is None else parse_rate(rate)
    check_rate(rate)
    return rate


def _check_count(name: str, value: int | None, low: int, high: int | None = None) -> None:
    if value is not None and (value < low or (high is not None and value > high)):
        raise UsageError(f"{name}={value}: expected {f'at least {low}' if high is None else f'{low} to {high}'}")


def _check_limits(settings: config.Settings, machine: Hardware) -> None:
    """Raises BudgetError for more memory than the machine has, however small the model."""
    total = machine.total_ram_bytes
    if settings["ram"] is not None and total is not None and settings["ram"] > total:
        raise BudgetError(
            f"--ram {format_size(settings['ram'])}: the machine has {format_size(total)}, of which "
            f"{format_size(machine.ram_bytes or 0)} are free",
            hint="to plan for another machine: --machine-ram SIZE, or --box NAME",
        )
    if settings["vram"] and settings["vram"] > machine.vram_bytes:
        raise BudgetError(
            f"--vram {format_size(settings['vram'])}: the machine's GPUs have {format_size(machine.vram_bytes)}",
            hint="to plan for another machine: --machine-vram SIZE, or --box NAME",
        )

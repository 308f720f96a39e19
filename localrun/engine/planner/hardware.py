"""A machine's memory, bandwidths, cores and GPUs: measured here, or given for another machine.

Every value records its origin ("measured", "given", "assumed"), because a prediction from an assumed bandwidth is no better
than the assumption. Nothing here may fail a start: unknown values are assumed and marked as such.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gguf import GGMLQuantizationType

from localrun.engine import memory
from localrun.engine.company import cores, seconds_of_others
from localrun.engine.planner import drivers
from localrun.engine.planner.cards import ASSUMED_BUS, Card, card_named, pcie_bytes_per_s
from localrun.engine.planner.last_runs import company_cost
from localrun.engine.planner.usual_rates import sustained_rates, usual_rates
from localrun.errors import LocalrunError
from localrun.offload.gpu.rates import GpuRates, assumed_rates
from localrun.offload.kernels.rates import CpuRates, ExpertRates

if TYPE_CHECKING:
    from localrun.ggml.devices import GpuDevice
    from localrun.offload.kernels import FfnSpec

log = logging.getLogger(__name__)

ASSUMED_DISK_BYTES_PER_S = 3.0e9
"""Bytes per second of a PCIe 3.0 NVMe drive, where there is nothing to measure."""

ASSUMED_MEMORY_BYTES_PER_S = 40.0e9
"""Two channels of DDR4-3200 give 51.2 GB/s on paper; a reader gets about four fifths."""

ASSUMED_VRAM_BYTES_PER_S = 500.0e9
"""A middle-class card of recent years."""

ASSUMED_GPU = assumed_rates(ASSUMED_VRAM_BYTES_PER_S)

ASSUMED_BUS_BYTES_PER_S = pcie_bytes_per_s(*ASSUMED_BUS)

SEEN = "tokens: "
"""Begins the names of rates that come from whole tokens."""

BUSY_CORES = 0.35
"""Cores that other programs may use before the machine counts as busy: a desktop's idle programs."""

USUAL_COMPANY_COST = 1.0
"""How much longer a token takes while others use all cores, where no run has shown it: each core is shared by two. [m] Three
layers of Flash with 32 experts each, all in RAM, on two Zen 4 cores beside one busy process per core: 1.7 times as long."""


@dataclass(frozen=True, slots=True)
class Known:
    """What whole tokens have shown for one kind of model; empty: nothing.

    Attributes:
        rates: name as in `Rate.seconds`, or of a share of reads (`speed.py`) -> what was seen.
    """

    rates: Mapping[str, float] = field(default_factory=dict)

    def of(self, name: str, assumed: float) -> float:
        """What was seen, or what is assumed."""
        return self.rates.get(name, assumed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One graphics card, or an RPC device.

    Attributes:
        vram_bytes: free memory.
        rates: its rates; `rates.measured` tells whether they were measured.
        bus_bytes_per_s: between RAM and its memory, in one direction, on paper.
        derived_from: what unmeasured rates follow from, such as `936 GB/s`; empty: they are assumed.
    """

    name: str = "GPU"
    vram_bytes: int
    rates: GpuRates = ASSUMED_GPU
    bus_bytes_per_s: float = ASSUMED_BUS_BYTES_PER_S
    derived_from: str = ""

    @property
    def rates_from(self) -> str:
        """`measured`, `derived from ...`, or `assumed`."""
        if self.rates.measured:
            return "measured"
        return f"derived from {self.derived_from}" if self.derived_from else "assumed"

    @classmethod
    def described(cls, vram_bytes: int, *, name: str = "GPU", bytes_per_s: float | None = None) -> Gpu:
        """A card of which no more is known than its memory, and perhaps the bandwidth of that."""
        if bytes_per_s is None:
            return cls(name=name, vram_bytes=vram_bytes)
        return cls(
            name=name,
            vram_bytes=vram_bytes,
            rates=assumed_rates(bytes_per_s),
            derived_from=f"{bytes_per_s / 1e9:.0f} GB/s",
        )

    @classmethod
    def of_card(cls, card: Card, vram_bytes: int | None = None, *, bytes_per_s: float | None = None) -> Gpu:
        """A card from the list, with all of its memory or some of it free, and its bandwidth or another."""
        size = card.gib << 30 if vram_bytes is None else vram_bytes
        known = cls.described(size, name=card.name, bytes_per_s=bytes_per_s or card.bytes_per_s)
        bus = f"PCIe {card.pcie}.0 x{card.lanes}" if card.lanes else "NVLink-C2C"
        return replace(known, bus_bytes_per_s=card.bus_bytes_per_s, derived_from=f"{known.derived_from}, {bus}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A machine.

    Attributes:
        ram_bytes: available to one program, including what this process already uses; None: unknown, and a plan assumes that
            everything fits.
        total_ram_bytes: of the machine, or of its cgroup.
        disk_bytes_per_s: of the model's drive, with several reads in flight, bypassing the page cache.
        disk_spread: what it gave at its slowest and its fastest while it was measured, relative to that.
        drive: which one that is; empty: unknown, or given.
        drive_seen: the rate is that of tokens that read, not of a probe.
        n_drives: 2: a mirror on a second one.
        memory_bytes_per_s: of RAM, all cores reading.
        n_threads: compute threads.
        cpu: our kernels' rates here; None: assumed from memory and threads.
        seen: what whole tokens have shown here (`token_rates.py`), by `seen_key`. For a model's formats: a resource's rate inside
            a token, relative to that of the `reference` machine; for all formats together: relative to this machine's probes.
            Shares of reads as they are.
        others: cores that other programs used before the probes; those of lower priority count in part, see `cores_of_others`.
        n_cores: of the machine.
        company_cost: how much longer a token takes while others use all of them.
        origin: name of a value -> "measured", "given" or "assumed".
    """

    ram_bytes: int | None
    total_ram_bytes: int | None
    disk_bytes_per_s: float = ASSUMED_DISK_BYTES_PER_S
    disk_spread: tuple[float, float] = (1.0, 1.0)
    drive: str = ""
    drive_seen: bool = False
    n_drives: int = 1
    memory_bytes_per_s: float = ASSUMED_MEMORY_BYTES_PER_S
    n_threads: int = 1
    cpu: CpuRates | None = None
    gpus: tuple[Gpu, ...] = ()
    seen: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    others: float = 0.0
    n_cores: int = 1
    company_cost: float = USUAL_COMPANY_COST
    origin: Mapping[str, str] = field(default_factory=dict)

    @property
    def vram_bytes(self) -> int:
        """Of all GPUs."""
        return sum(gpu.vram_bytes for gpu in self.gpus)

    @property
    def reference(self) -> Hardware:
        """A machine with as many threads whose rates are all assumed, and so are the same whatever a probe met."""
        return replace(self, cpu=None, memory_bytes_per_s=ASSUMED_MEMORY_BYTES_PER_S)

    @property
    def is_busy(self) -> bool:
        """Other programs used more than a desktop at rest."""
        return self.others > BUSY_CORES

    @property
    def company_factor(self) -> float:
        """How many times as long a token takes because of others; 1.0 if the machine isn't busy."""
        return 1 + self.company_cost * self.others / self.n_cores if self.is_busy else 1.0

    def known(self, formats: str, *, reads: bool) -> Known:
        """What tokens have shown for models in these formats; those that read experts are a kind of their own."""
        return Known(self.seen.get(seen_key(formats, reads=reads), {}))

    def given(self, **values: object) -> Hardware:
        """With these values, marked as given; None leaves a value unchanged."""
        named = {name: value for name, value in values.items() if value is not None}
        origin = {**self.origin, **dict.fromkeys(named, "given")}
        if "disk_bytes_per_s" in named:
            named |= {"drive": "", "drive_seen": False, "disk_spread": (1.0, 1.0)}
        if named.keys() & {"memory_bytes_per_s", "n_threads"}:  # measurements with other values don't apply
            named |= {"cpu": None, "seen": {}}
            origin.pop("cpu", None)
        return replace(self, **named, origin=origin)  # type: ignore[arg-type]


def detect(
    files: Sequence[Path] = (),
    *,
    n_threads: int = 0,
    probe: bool = True,
    n_drives: int = 1,
    gpus: bool = False,
    specs: Collection[FfnSpec] = (),
    dense: GGMLQuantizationType = GGMLQuantizationType.Q8_0,
) -> Hardware:
    """This machine.

    Args:
        files: of the model, whose drive is measured (once a day, three seconds); without any, a cached figure for the cache
            folder's drive is used.
        n_threads: compute threads; 0: one per physical core.
        probe: measure bandwidths; otherwise use only what is free to determine and assume the rest.
        gpus: look for GPUs that llama.cpp can use.
        specs: experts to measure the kernels with.
        dense: format of the dense matrices to measure them with.
    """
    n_threads = n_threads or memory.physical_cores()
    others = cores_of_others(LOOK_S) if probe else 0.0
    cpu, device, drive_seen, disk_spread = None, "", False, (1.0, 1.0)
    origin = {
        "ram_bytes": "measured",
        "n_threads": "measured",
        "disk_bytes_per_s": "assumed",
        "memory_bytes_per_s": "assumed",
    }
    disk_bytes_per_s, memory_bytes_per_s = ASSUMED_DISK_BYTES_PER_S, ASSUMED_MEMORY_BYTES_PER_S
    if probe:
        from localrun.offload.cache.drive_probe import disk_profiles_path, probe_disk, probe_memory

        drive = probe_disk(list(files) or [disk_profiles_path()])
        if drive.bytes_per_s is not None:
            device, origin["disk_bytes_per_s"] = drive.device, "measured"
            # What tokens have read says more than seconds of nothing else.
            seen = sustained_rates(drive_name(device)).get(drive_name(device))
            disk_bytes_per_s, drive_seen = seen or drive.bytes_per_s, seen is not None
            disk_spread = (1.0, 1.0) if drive_seen else drive.spread
        memory_bytes_per_s, origin["memory_bytes_per_s"] = probe_memory(), "measured"
        if specs:
            from localrun.offload.kernels.probe import probe_cpu

            try:
                cpu, origin["cpu"] = probe_cpu(specs, n_threads=n_threads, dense=dense), "measured"
            except LocalrunError as error:  # loading reports what is wrong with such a model
                log.warning("could not measure the processor: %s", error)
        memory_bytes_per_s, cpu = _usual(memory_bytes_per_s, cpu, specs, dense, n_threads, quiet=others <= BUSY_CORES)
    available = memory.available_memory()
    return Hardware(
        ram_bytes=None if available is None else available + memory.resident_bytes(),
        total_ram_bytes=memory.total_memory(),
        disk_bytes_per_s=disk_bytes_per_s,
        disk_spread=disk_spread,
        drive=device,
        drive_seen=drive_seen,
        n_drives=n_drives,
        memory_bytes_per_s=memory_bytes_per_s,
        n_threads=n_threads,
        cpu=cpu,
        gpus=local_gpus(probe=probe) if gpus else (),
        seen=seen_tokens(n_threads) if probe else {},
        others=others,
        n_cores=len(cores()),
        company_cost=(company_cost() if probe else None) or USUAL_COMPANY_COST,
        origin=origin,
    )


def _usual(
    memory_bytes_per_s: float,
    cpu: CpuRates | None,
    specs: Collection[FfnSpec],
    dense: GGMLQuantizationType,
    n_threads: int,
    *,
    quiet: bool,
) -> tuple[float, CpuRates | None]:
    """These rates as this machine has them when nothing else runs (`usual_rates.py`)."""

    def key(spec: FfnSpec, name: str) -> str:
        kinds = "/".join(kind.name for kind in spec.types)
        return f"{name} of {kinds} {spec.n_embd}x{spec.n_ff}, {n_threads} threads"

    measured = {"memory": memory_bytes_per_s}
    if cpu is None:
        return usual_rates(measured, quiet=quiet)["memory"], None
    matrices = {f.name: f"{f.name} of {dense.name}, {n_threads} threads" for f in fields(cpu) if f.name != "experts"}
    seconds = [f.name for f in fields(ExpertRates)]
    measured |= {key: getattr(cpu, name) for name, key in matrices.items()}
    measured |= {key(spec, name): 1 / getattr(cpu.experts[spec.types], name) for spec in specs for name in seconds}
    usual = usual_rates(measured, quiet=quiet)
    experts = {spec.types: ExpertRates(**{name: 1 / usual[key(spec, name)] for name in seconds}) for spec in specs}
    return usual["memory"], CpuRates(experts=experts, **{name: usual[key] for name, key in matrices.items()})


LOOK_S = 0.2
"""How long a load looks at what other programs use; /proc/stat has a resolution of 10 ms."""


LOW_PRIORITY = 0.5
"""What a core that programs of lower priority use counts: they yield, but the memory's bandwidth and a moment to wake up are gone.
[m] Whole Flash beside such programs on both cores: matrices took 1.4 to 1.8 times as long."""


def cores_of_others(seconds: float) -> float:
    """Cores that other programs use while this one sleeps; those of lower priority count as `LOW_PRIORITY`."""

    def now() -> tuple[float, float]:
        return seconds_of_others(low_priority=False), seconds_of_others()

    before, started = now(), time.monotonic()
    time.sleep(seconds)
    after, took = now(), time.monotonic() - started
    normal, every = (max(0.0, b - a) for a, b in zip(before, after, strict=True))
    return (normal + LOW_PRIORITY * max(0.0, every - normal)) / took


def drive_name(device: str) -> str:
    """The name under which a week remembers a drive's rate."""
    return f"drive {device}"


def seen_key(formats: str, *, reads: bool) -> str:
    """The kind of model that tokens have shown something for.

    Args:
        formats: `ModelSizes.formats`; empty: all.
        reads: experts are read meanwhile.
    """
    return (formats or "any formats") + (" with reads" if reads else "")


def seen_name(resource: str, key: str, n_threads: int) -> str:
    """The name under which a week remembers what tokens have shown of a resource; `key` as `seen_key`."""
    return f"{SEEN}{resource}, {key}, {n_threads} threads"


def seen_tokens(n_threads: int) -> dict[str, dict[str, float]]:
    """`Hardware.seen` of this machine."""
    seen: dict[str, dict[str, float]] = {}
    for name, rate in sustained_rates(SEEN).items():
        parts = name.removeprefix(SEEN).split(", ")
        if len(parts) == 3 and parts[2] == f"{n_threads} threads":
            seen.setdefault(parts[1], {})[parts[0]] = rate
    return seen


def local_gpus(*, probe: bool = True) -> tuple[Gpu, ...]:
    """GPUs that llama.cpp was built for and that a load would use unasked, measured or as `measured_gpus` assumes."""
    from localrun.ggml.devices import choose_gpus

    return measured_gpus(choose_gpus("auto"), probe=probe)


def measured_gpus(devices: Sequence[GpuDevice], *, probe: bool = True) -> tuple[Gpu, ...]:
    """These devices with their rates. If `probe` is False or fails, rates are derived from the card's name, else from what its
    driver says, else assumed."""
    from localrun.offload.gpu.probe import probe_gpu

    result = []
    for device in devices:
        gpu = _known(device)
        measured = probe_gpu(device) if probe else None
        if measured is not None:
            gpu = replace(gpu, rates=measured)
        result.append(gpu)
    return tuple(result)


def _known(device: GpuDevice) -> Gpu:
    """A device without a measurement."""
    name, free = device.description or device.name, max(0, device.free_bytes - device.display_bytes)
    card, link = card_named(name, device.total_bytes), drivers.pcie_link(device.card)
    if card is not None:
        if link is not None and card.lanes:  # the slot's, which may be less than the card's
            card = card._replace(pcie=min(link[0], card.pcie), lanes=link[1])
        return replace(Gpu.of_card(card, free), name=name)
    gpu = Gpu.described(free, name=name, bytes_per_s=drivers.memory_bytes_per_s(device.card))
    return gpu if link is None else replace(gpu, bus_bytes_per_s=pcie_bytes_per_s(*link))


def described(
    *,
    ram_bytes: int,
    n_threads: int,
    disk_bytes_per_s: float,
    memory_bytes_per_s: float,
    n_drives: int = 1,
    gpus: Sequence[Gpu] = (),
) -> Hardware:
    """A machine that somebody describes; all of its RAM but what a system takes is free."""
    return Hardware(
        ram_bytes=max(0, ram_bytes - SYSTEM_BYTES),
        total_ram_bytes=ram_bytes,
        disk_bytes_per_s=disk_bytes_per_s,
        n_drives=n_drives,
        memory_bytes_per_s=memory_bytes_per_s,
        n_threads=n_threads,
        gpus=tuple(gpus),
        origin=dict.fromkeys(
            ("ram_bytes", "n_threads", "gpus", "disk_bytes_per_s", "memory_bytes_per_s", "n_drives"), "given"
        ),
    )


PROCESS_BYTES = 350 << 20
"""Python, numba, llama.cpp and their code; 320 MiB resident before a model is loaded."""

SYSTEM_BYTES = 2 * 2**30
"""What an operating system and a desktop hold of a machine that is only described."""

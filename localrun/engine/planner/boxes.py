"""Typical machines by name, to plan for one without describing it.

Bandwidths are realistic, not nominal.
"""

from __future__ import annotations

from dataclasses import dataclass

from localrun.engine.planner.hardware import Gpu, Hardware, described

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Box:
    """A machine. Rates in GB/s."""

    name: str
    ram_gib: int
    memory_gb_per_s: float
    threads: int
    disk_gb_per_s: float
    n_drives: int = 1
    vram_gib: tuple[int, ...] = ()
    gpu_gb_per_s: float = 0.0

    @property
    def slug(self) -> str:
        """`2 x 24 GB GPU, 256 GB` -> `gpu-2x24-ram-256`: the name on a command line."""
        gpus = f"{len(self.vram_gib)}x" if len(self.vram_gib) > 1 else ""
        gpu = f"gpu-{gpus}{self.vram_gib[0]}-" if self.vram_gib else ""
        return f"{gpu}ram-{self.ram_gib}"

    @property
    def hardware(self) -> Hardware:
        """For the planner."""
        return described(
            ram_bytes=self.ram_gib * GIB,
            n_threads=self.threads,
            gpus=[Gpu.described(size * GIB, bytes_per_s=self.gpu_gb_per_s * 1e9) for size in self.vram_gib],
            disk_bytes_per_s=self.disk_gb_per_s * 1e9,
            memory_bytes_per_s=self.memory_gb_per_s * 1e9,
            n_drives=self.n_drives,
        )


BOXES = (
    Box("no GPU, 32 GB", 32, 45, 8, 3.5),
    Box("no GPU, 64 GB", 64, 80, 16, 5.0),
    Box("no GPU, 128 GB", 128, 65, 16, 6.0),
    Box("12 GB GPU, 32 GB", 32, 45, 8, 3.5, vram_gib=(12,), gpu_gb_per_s=360),
    Box("16 GB GPU, 64 GB", 64, 70, 8, 6.0, vram_gib=(16,), gpu_gb_per_s=670),
    Box("24 GB GPU, 64 GB", 64, 70, 12, 6.0, vram_gib=(24,), gpu_gb_per_s=930),
    Box("32 GB GPU, 64 GB", 64, 80, 16, 10.0, vram_gib=(32,), gpu_gb_per_s=1700),
    Box("24 GB GPU, 128 GB", 128, 70, 16, 6.0, vram_gib=(24,), gpu_gb_per_s=930),
    Box("2 x 24 GB GPU, 256 GB, 2 drives", 256, 180, 24, 6.0, n_drives=2, vram_gib=(24, 24), gpu_gb_per_s=930),
)

BY_SLUG = {box.slug: box for box in BOXES}

"""What drivers say of a card that no list has: the bandwidth of its memory, by clock and width, and its bus.

Asks the kernel and, for NVIDIA's cards, NVML; makes no context on the card. Everything may be missing: None then.
"""

from __future__ import annotations

import contextlib
import ctypes as C
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

KFD = Path("/sys/class/kfd/kfd/topology/nodes")
"""AMD's compute driver (amdkfd/kfd_topology.c)."""

_GENERATIONS = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}
"""GT/s of a lane -> PCI Express generation."""


def pcie_link(card: str) -> tuple[int, int] | None:
    """Generation and lanes of a card's link, by Linux.

    The lanes are those in use, so a slot with fewer than the card has counts; the speed is the highest one, because an idle link
    slows down.

    Args:
        card: PCI address, such as 0000:01:00.0.
    """
    from localrun.ggml import devices

    folder = devices.SYS_PCI / card
    try:
        speed = re.match(r"[\d.]+", (folder / "max_link_speed").read_text())
        lanes = int((folder / "current_link_width").read_text())
    except (OSError, ValueError):
        return None
    generation = _GENERATIONS.get(float(speed.group())) if speed else None
    return (generation, lanes) if generation and 0 < lanes <= 32 and card else None


def memory_bytes_per_s(card: str) -> float | None:
    """Bandwidth of a card's memory on paper, from its clock and width.

    Args:
        card: PCI address.
    """
    return _amd(card) or _nvidia(card) if card else None


def _amd(card: str) -> float | None:
    """HBM, recognizable by its width, transfers twice per clock, GDDR6 sixteen times."""
    match = re.fullmatch(r"([0-9a-f]+):([0-9a-f]+):([0-9a-f]+)\.([0-7])", card)
    if match is None:
        return None
    domain, bus, slot, function = (int(part, 16) for part in match.groups())
    wanted = {"domain": domain, "location_id": bus << 8 | slot << 3 | function}
    for node in sorted(KFD.glob("*")):
        about = _properties(node / "properties")
        if not about.get("simd_count") or any(about.get(name) != value for name, value in wanted.items()):
            continue
        for path in sorted(node.glob("mem_banks/*/properties")):
            bank = _properties(path)
            bits, mhz = bank.get("width", 0), bank.get("mem_clk_max", 0)
            if bits and mhz:
                return bits / 8 * mhz * 1e6 * (2 if bits >= 1024 else 16)
    return None


def _properties(path: Path) -> dict[str, int]:
    result = {}
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            name, _, value = line.partition(" ")
            result[name] = int(value)
    return result


NVML_NAMES = ("libnvidia-ml.so.1", "nvml.dll")
_MEMORY_CLOCK = 2  # NVML_CLOCK_MEM


def _nvidia(card: str) -> float | None:
    """NVML's clock of the memory counts for two transfers on all of its cards."""
    for name in NVML_NAMES:
        with contextlib.suppress(OSError, AttributeError):
            return _ask_nvml(C.CDLL(name), card)
    return None


def _ask_nvml(nvml: Any, card: str) -> float | None:
    if nvml.nvmlInit_v2() != 0:
        return None
    try:
        handle, bits, mhz = C.c_void_p(), C.c_uint(), C.c_uint()
        steps: tuple[Callable[[], int], ...] = (
            lambda: nvml.nvmlDeviceGetHandleByPciBusId_v2(card.encode(), C.byref(handle)),
            lambda: nvml.nvmlDeviceGetMemoryBusWidth(handle, C.byref(bits)),
            lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, _MEMORY_CLOCK, C.byref(mhz)),
        )
        if any(step() != 0 for step in steps):
            return None
        return bits.value / 8 * mhz.value * 1e6 * 2 or None
    finally:
        nvml.nvmlShutdown()

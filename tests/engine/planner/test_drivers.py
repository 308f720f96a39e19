"""What drivers say of cards: files of Linux in a folder of our own, and NVML as a library of C with its functions."""

from __future__ import annotations

import ctypes as C
import shutil
import subprocess
from pathlib import Path

import pytest

from localrun.engine.planner import drivers, hardware
from localrun.ggml import devices
from localrun.ggml.devices import GpuDevice
from localrun.offload.gpu.rates import assumed_rates

CARD = "0000:03:00.0"


@pytest.fixture(autouse=True)
def nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "SYS_PCI", tmp_path / "pci")
    monkeypatch.setattr(drivers, "KFD", tmp_path / "kfd")
    monkeypatch.setattr(drivers, "NVML_NAMES", ())


def link(tmp_path: Path, speed: str, lanes: str) -> None:
    folder = tmp_path / "pci" / CARD
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "max_link_speed").write_text(f"{speed}\n")
    (folder / "current_link_width").write_text(f"{lanes}\n")


def test_a_link_is_what_linux_says(tmp_path: Path) -> None:
    assert drivers.pcie_link(CARD) is None
    link(tmp_path, "16.0 GT/s PCIe", "8")
    assert drivers.pcie_link(CARD) == (4, 8)
    assert drivers.pcie_link("") is None
    for speed, lanes in (("Unknown", "16"), ("16.0 GT/s PCIe", "0"), ("16.0 GT/s PCIe", "255"), ("17 GT/s", "16")):
        link(tmp_path, speed, lanes)
        assert drivers.pcie_link(CARD) is None


@pytest.mark.parametrize(("bits", "mhz", "gb_per_s"), [(384, 1249, 959), (4096, 1600, 1638)])
def test_amd_s_memory_has_width_and_clock(tmp_path: Path, bits: int, mhz: int, gb_per_s: int) -> None:
    """An RX 7900 XTX and an MI210, beside a processor."""
    for number, (simd_count, location) in enumerate(((0, 0), (192, 3 << 8))):
        node = tmp_path / "kfd" / str(number)
        (node / "mem_banks" / "0").mkdir(parents=True)
        (node / "properties").write_text(f"simd_count {simd_count}\nlocation_id {location}\ndomain 0\n")
        (node / "mem_banks" / "0" / "properties").write_text(f"heap_type 1\nwidth {bits}\nmem_clk_max {mhz}\n")
    assert drivers.memory_bytes_per_s(CARD) == pytest.approx(gb_per_s * 1e9, rel=0.01)
    assert drivers.memory_bytes_per_s("0000:04:00.0") is None
    assert drivers.memory_bytes_per_s("0001:03:00.0") is None
    assert drivers.memory_bytes_per_s("") is None


NVML = """
#include <string.h>
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *id, void **handle) { *handle = &nvmlInit_v2; return strcmp(id, "0000:03:00.0"); }
int nvmlDeviceGetMemoryBusWidth(void *device, unsigned *bits) { *bits = 384; return device != (void *)&nvmlInit_v2; }
int nvmlDeviceGetMaxClockInfo(void *device, int clock, unsigned *mhz) { *mhz = clock == 2 ? 10501 : 1; return 0; }
"""


def test_nvidia_s_memory_has_width_and_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = tmp_path / "nvml.c", tmp_path / "libnvml.so"
    source.write_text(NVML)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    monkeypatch.setattr(drivers, "NVML_NAMES", ("there-is-no-such-library.so", str(library)))
    assert drivers.memory_bytes_per_s(CARD) == pytest.approx(1008e9, rel=0.001)  # an RTX 4090's
    assert drivers.memory_bytes_per_s("0000:04:00.0") is None
    monkeypatch.setattr(drivers, "NVML_NAMES", (C.CDLL(None)._name or "libc.so.6",))
    assert drivers.memory_bytes_per_s(CARD) is None, "a library without these functions"


def test_a_plan_takes_what_the_driver_says_of_an_unknown_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drivers, "memory_bytes_per_s", lambda card: 777e9)
    monkeypatch.setattr(drivers, "pcie_link", lambda card: (3, 8))
    device = GpuDevice(0, "CUDA0", "unheard of", 1, 1, card=CARD)
    (gpu,) = hardware.measured_gpus([device], probe=False)
    assert gpu.rates == assumed_rates(777e9)
    assert gpu.rates_from == "derived from 777 GB/s"
    assert gpu.bus_bytes_per_s == pytest.approx(7.9e9, rel=0.01)

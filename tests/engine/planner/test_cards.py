"""What is known of a card before it is measured."""

from __future__ import annotations

import pytest

from localrun.engine.planner import hardware
from localrun.engine.planner.cards import CARD_GB_PER_S, card_bytes_per_s
from localrun.ggml.devices import GpuDevice
from localrun.offload.gpu.rates import assumed_rates


@pytest.mark.parametrize(
    ("description", "gb_per_s"),
    [
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 672),
        ("NVIDIA GeForce RTX 4070 Ti", 504),
        ("NVIDIA GeForce RTX 3090", 936),
        ("NVIDIA RTX 6000 Ada Generation", 960),
        ("NVIDIA H100 80GB HBM3", 3350),
        ("NVIDIA H100 PCIe", 2000),
        ("NVIDIA A100-PCIE-40GB", 1555),
        ("NVIDIA A100-SXM4-80GB", 2039),
        ("AMD Radeon RX 7900 XTX (RADV NAVI31)", 960),
        ("Intel(R) Arc(TM) B580 Graphics", 456),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("127.0.0.1:50052", None),
    ],
)
def test_cards_are_known_by_their_whole_name(description: str, gb_per_s: int | None) -> None:
    assert card_bytes_per_s(description) == (gb_per_s and gb_per_s * 1e9)


def test_a_card_that_is_not_measured_has_its_maker_s_bandwidth() -> None:
    devices = [GpuDevice(0, "CUDA0", "NVIDIA GeForce RTX 3090", 1, 1), GpuDevice(0, "CUDA1", "unheard of", 1, 1)]
    known, other = hardware.measured_gpus(devices, probe=False)
    assert known.rates == assumed_rates(936e9)
    assert other.rates == assumed_rates(hardware.ASSUMED_VRAM_BYTES_PER_S)
    assert not known.rates.measured


MEMORY = {
    "RTX PRO 6000": (512, 28), "RTX 5090": (512, 28), "RTX 5080": (256, 30), "RTX 5070 Ti": (256, 28), "RTX 5070": (192, 28),
    "RTX 5060 Ti": (128, 28), "RTX 5060": (128, 28), "RTX 4090": (384, 21), "RTX 4080 SUPER": (256, 23), "RTX 4080": (256, 22.4),
    "RTX 4070 Ti SUPER": (256, 21), "RTX 4070 Ti": (192, 21), "RTX 4070 SUPER": (192, 21), "RTX 4070": (192, 21),
    "RTX 4060 Ti": (128, 18), "RTX 4060": (128, 17), "RTX 3090 Ti": (384, 21), "RTX 3090": (384, 19.5), "RTX 3080 Ti": (384, 19),
    "RTX 3080": (320, 19), "RTX 3070 Ti": (256, 19), "RTX 3070": (256, 14), "RTX 3060 Ti": (256, 14), "RTX 3060": (192, 15),
    "RTX 2080 Ti": (352, 14), "RTX 6000 Ada": (384, 20), "RTX A6000": (384, 16), "L40S": (384, 18),
    "A100": (5120, 2.43), "A100 80GB PCIe": (5120, 3.02), "A100-SXM4-80GB": (5120, 3.19), "H100 NVL": (6144, 5.1),
    "H100 PCIe": (5120, 3.2), "H100": (5120, 5.23), "H200": (6144, 6.25), "RX 9070 XT": (256, 20.1), "RX 9070": (256, 20.1),
    "RX 7900 XTX": (384, 20), "RX 7900 XT": (320, 20), "RX 6900 XT": (256, 16), "RX 6800 XT": (256, 16), "PRO W7900": (384, 18),
    "Arc B580": (192, 19), "Arc A770": (256, 17.5),
}  # fmt: skip
"""Width of the memory's bus in bits, and Gbit/s of each."""


def test_bandwidths_are_what_bus_and_memory_give() -> None:
    assert MEMORY.keys() == CARD_GB_PER_S.keys()
    for name, (n_bits, gbit_per_s) in MEMORY.items():
        assert CARD_GB_PER_S[name] == pytest.approx(n_bits / 8 * gbit_per_s, rel=0.03), name

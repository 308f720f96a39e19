"""What is known of a card before it is measured."""

from __future__ import annotations

import pytest

from localrun.engine.planner import hardware
from localrun.engine.planner.cards import card_bytes_per_s
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
        ("AMD Radeon RX 7900 XTX (RADV NAVI31)", 960),
        ("Intel(R) Arc(TM) B580 Graphics", 456),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("127.0.0.1:50052", None),
    ],
)
def test_cards_are_known_by_their_whole_name(description: str, gb_per_s: int | None) -> None:
    assert card_bytes_per_s(description) == (gb_per_s and gb_per_s * 1e9)


def test_a_card_that_is_not_measured_has_its_maker_s_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "display_links", lambda: [16e9, 16e9])
    devices = [GpuDevice(0, "CUDA0", "NVIDIA GeForce RTX 3090", 1, 1), GpuDevice(0, "CUDA1", "unheard of", 1, 1)]
    known, other = hardware.measured_gpus(devices, probe=False)
    assert known.rates == assumed_rates(936e9, 16e9)
    assert other.rates == assumed_rates(hardware.ASSUMED_VRAM_BYTES_PER_S, 16e9)
    assert not known.rates.measured

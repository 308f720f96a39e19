"""What is known of a card before it is measured."""

from __future__ import annotations

import pytest

from localrun.engine.planner import hardware
from localrun.engine.planner.cards import CARDS, card_named, card_of
from localrun.engine.planner.hardware import Gpu
from localrun.errors import UsageError
from localrun.ggml.devices import GpuDevice
from localrun.offload.gpu.rates import assumed_rates

GIB = 1 << 30


@pytest.mark.parametrize(
    ("description", "gib", "gb_per_s", "bus"),
    [
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 16, 672, 31.5),
        ("NVIDIA GeForce RTX 4070 Ti", 12, 504, 31.5),
        ("NVIDIA GeForce RTX 3090", 24, 936, 31.5),
        ("NVIDIA GeForce RTX 3080", 10, 760, 31.5),
        ("NVIDIA GeForce RTX 3080", 12, 912, 31.5),
        ("NVIDIA GeForce RTX 4060 Ti", 16, 288, 15.75),
        ("NVIDIA GeForce RTX 5060 Ti", 16, 448, 31.5),
        ("NVIDIA GeForce RTX 5090", 32, 1792, 63.0),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", 24, 896, 63.0),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16, 576, 31.5),
        ("NVIDIA RTX 6000 Ada Generation", 48, 960, 31.5),
        ("NVIDIA RTX A6000", 48, 768, 31.5),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 96, 1792, 63.0),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 96, 1792, 63.0),
        ("NVIDIA L40S", 48, 864, 31.5),
        ("NVIDIA H100 80GB HBM3", 80, 3350, 63.0),
        ("NVIDIA H100 PCIe", 80, 2000, 63.0),
        ("NVIDIA H200", 141, 4800, 63.0),
        ("NVIDIA GH200 480GB", 96, 4000, 450),
        ("NVIDIA A100-PCIE-40GB", 40, 1555, 31.5),
        ("NVIDIA A100-SXM4-80GB", 80, 2039, 31.5),
        ("Tesla V100-SXM2-16GB", 16, 900, 15.75),
        ("AMD Radeon RX 7900 XTX (RADV NAVI31)", 24, 960, 31.5),
        ("AMD Radeon RX 7900 XT", 20, 800, 31.5),
        ("AMD Radeon RX 9070 XT", 16, 644, 63.0),
        ("AMD Instinct MI300X", 192, 5300, 63.0),
        ("Radeon 8060S Graphics", 0, 256, 31.5),
        ("Intel(R) Arc(TM) A770 Graphics", 16, 560, 31.5),
        ("Intel(R) Arc(TM) B580 Graphics", 12, 456, 15.75),
    ],
)
def test_a_card_is_what_its_maker_says(description: str, gib: int, gb_per_s: int, bus: float) -> None:
    """Against the makers' figures in GB/s; the list has width and rate of the memory."""
    card = card_named(description, gib * GIB - (300 << 20) if gib else 0)
    assert card is not None
    assert card.gib == gib
    assert card.bytes_per_s == pytest.approx(gb_per_s * 1e9, rel=0.01)
    assert card.bus_bytes_per_s == pytest.approx(bus * 1e9, rel=0.01)


@pytest.mark.parametrize(
    "description",
    ["NVIDIA GeForce RTX 3060 Ti Mobile", "RTX 2080 with Max-Q Design", "AMD Radeon RX 6800M", "127.0.0.1:50052", ""],
)
def test_a_card_of_another_name_is_unknown(description: str) -> None:
    assert card_named(description) is None


def test_names_and_sizes_tell_cards_apart() -> None:
    assert len({(card.name, card.gib) for card in CARDS}) == len(CARDS)
    for card in CARDS:
        assert card_named(card.name, card.gib * GIB) == card


@pytest.mark.parametrize(
    ("text", "name", "gib"),
    [
        ("4090", "RTX 4090", 24),
        ("rtx 4090", "RTX 4090", 24),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", 24),
        ("RTX 4060 Ti 16GB", "RTX 4060 Ti", 16),
        ("4060 Ti 8 GB", "RTX 4060 Ti", 8),
        ("rtx3090ti", "RTX 3090 Ti", 24),
        ("RTX PRO 6000", "RTX PRO 6000", 96),
        ("7900 XTX", "RX 7900 XTX", 24),
        ("AMD Radeon PRO W7800 48GB", "PRO W7800 48GB", 48),
        ("A100 80GB PCIe", "A100 80GB PCIe", 80),
        ("Intel Arc A770 16GB", "Arc A770", 16),
    ],
)
def test_users_name_cards_as_they_do(text: str, name: str, gib: int) -> None:
    card = card_of(text)
    assert (card.name, card.gib) == (name, gib)


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("RTX 4060 Ti", "has 8 or 16 GB", "'RTX 4060 Ti 16GB'"),
        ("RTX 4060 Ti 12GB", "unknown", "--machine-vram"),
        ("Voodoo 2", "unknown", "--machine-vram"),
        ("", "unknown", "--machine-vram"),
        ("8060S", "no memory of its own", "--machine-vram"),
        ("Laptop", "may be any of", "RTX"),
    ],
)
def test_other_names_are_refused_with_a_way_out(text: str, said: str, hint: str) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        card_of(text)
    assert hint in str(refused.value.hint)


def test_a_card_that_is_not_measured_has_its_maker_s_bandwidth() -> None:
    devices = [
        GpuDevice(0, "CUDA0", "NVIDIA GeForce RTX 3090", 1, 24 * GIB),
        GpuDevice(0, "CUDA1", "unheard of", 1, 1),
    ]
    known, other = hardware.measured_gpus(devices, probe=False)
    assert known.rates == assumed_rates(936e9)
    assert known.rates_from == "derived from 936 GB/s, PCIe 4.0 x16"
    assert other.rates == assumed_rates(hardware.ASSUMED_VRAM_BYTES_PER_S)
    assert other.rates_from == "assumed"
    assert not known.rates.measured
    assert known.bus_bytes_per_s == other.bus_bytes_per_s == hardware.ASSUMED_BUS_BYTES_PER_S


def test_a_narrow_slot_counts_for_a_known_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localrun.engine.planner.drivers.pcie_link", lambda card: (5, 4) if card else None)
    device = GpuDevice(0, "CUDA0", "NVIDIA GeForce RTX 3090", 1, 24 * GIB, card="0000:01:00.0")
    (gpu,) = hardware.measured_gpus([device], probe=False)
    assert gpu.rates_from == "derived from 936 GB/s, PCIe 4.0 x4"
    assert gpu.bus_bytes_per_s == pytest.approx(7.9e9, rel=0.01)


def test_a_bandwidth_that_is_given_counts_more_than_a_name() -> None:
    assert Gpu.of_card(card_of("4090"), bytes_per_s=900e9).rates == assumed_rates(900e9)

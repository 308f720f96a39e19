"""Memory bandwidths of known graphics cards: better than a generic assumption.

Sources, by family. `maker`: read in a document of the maker's. `computed`: width of the memory bus times data rate, as the tests do
it; the maker's own page was not read.

* RTX 50 and RTX PRO 6000 (GDDR7), RTX 40, 30, 20, RTX 6000 Ada, A6000, L40S (GDDR6X, GDDR6): computed.
* A100, H100, H100 NVL, H200 (HBM): computed; H100 PCIe: maker (NVIDIA, H100 PCIe GPU product brief PB-11133-001_v02: more than
  2,000 GB/s).
* RX 6000, 7000, 9000 and PRO W7900 (GDDR6), Arc (GDDR6): computed.
"""

from __future__ import annotations

import re
from typing import Final

CARD_GB_PER_S: Final = {
    # NVIDIA's
    "RTX PRO 6000": 1792,
    "RTX 5090": 1792,
    "RTX 5080": 960,
    "RTX 5070 Ti": 896,
    "RTX 5070": 672,
    "RTX 5060 Ti": 448,
    "RTX 5060": 448,
    "RTX 4090": 1008,
    "RTX 4080 SUPER": 736,
    "RTX 4080": 717,
    "RTX 4070 Ti SUPER": 672,
    "RTX 4070 Ti": 504,
    "RTX 4070 SUPER": 504,
    "RTX 4070": 504,
    "RTX 4060 Ti": 288,
    "RTX 4060": 272,
    "RTX 3090 Ti": 1008,
    "RTX 3090": 936,
    "RTX 3080 Ti": 912,
    "RTX 3080": 760,
    "RTX 3070 Ti": 608,
    "RTX 3070": 448,
    "RTX 3060 Ti": 448,
    "RTX 3060": 360,
    "RTX 2080 Ti": 616,
    "RTX 6000 Ada": 960,
    "RTX A6000": 768,
    "L40S": 864,
    "A100": 1555,  # the 40 GB one
    "A100 80GB PCIe": 1935,
    "A100-SXM4-80GB": 2039,
    "H100 PCIe": 2000,
    "H100 NVL": 3900,
    "H100": 3350,
    "H200": 4800,
    # AMD's
    "RX 9070 XT": 644,
    "RX 9070": 644,
    "RX 7900 XTX": 960,
    "RX 7900 XT": 800,
    "RX 6900 XT": 512,
    "RX 6800 XT": 512,
    "PRO W7900": 864,
    # Intel's
    "Arc B580": 456,
    "Arc A770": 560,
}
"""GB/s (10**9); a test holds them against width and rate of each card's memory. Variants for laptops have less and are left out."""


def card_bytes_per_s(description: str) -> float | None:
    """Bytes per second of the memory of a card with this name; None for a card that is not in the list.

    Args:
        description: the driver's, such as `NVIDIA GeForce RTX 4070 Ti SUPER` or `AMD Radeon RX 7900 XTX (RADV NAVI31)`.
    """
    if re.search(r"laptop|mobile|max-q", description, re.IGNORECASE):
        return None
    description = re.sub(r"\((?:R|TM)\)", "", description)
    # The longest name first: an RTX 4070 Ti is not an RTX 4070.
    for name in sorted(CARD_GB_PER_S, key=len, reverse=True):
        if re.search(rf"\b{re.escape(name)}\b", description, re.IGNORECASE):
            return CARD_GB_PER_S[name] * 1e9
    return None

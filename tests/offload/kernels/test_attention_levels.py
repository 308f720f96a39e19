"""Attention and the indexer on other processors than this one.

Their code has no levels of its own: LLVM makes it for whatever processor numba names, at the first import. So the tests of this
level run in a process of its own, whose compiler is limited by `tests/conftest.py`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from localrun.offload.kernels.cpu import Level, level, levels

TESTS = Path(__file__).with_name("test_attention.py")

# What vectors there are, and how many registers. VNNI multiplies integers, of which attention has none.
OTHERS = [other for other in (Level.AVX2, Level.AVX512) if other in levels() and other.value not in level().value]


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: other.value)
def test_attention_is_exact_on_a_processor_of_that_level(other: Level) -> None:
    """In `LOCALRUN_KERNELS=avx2 make test` all of this runs at that level anyway, and there is no other."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_CPU", "PYTEST_"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-o", "addopts=", "-p", "no:cacheprovider", str(TESTS)],
        env={**environment, "LOCALRUN_KERNELS": other.value},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    last = done.stdout.splitlines()[-1]
    passed = re.search(r"(\d+) passed", last)
    assert passed is not None, last
    assert int(passed[1]) >= 10, last
    assert "skipped" not in last

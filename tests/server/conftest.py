"""SDK clients for a running server, and the check that what it sends is what the SDKs' own types say."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.running import Running, serving
from tests.server.scripted import ScriptedEngine


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def running(engine: ScriptedEngine) -> Iterator[Running]:
    with serving(engine) as running:
        yield running

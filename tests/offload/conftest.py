"""Fixtures that several test files of the expert path share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from localrun.ggml.devices import GpuDevice
from localrun.offload.gpu.stream_probe import measure
from tests.offload.models import write_model
from tests.rpc_server import a_gpu


@pytest.fixture(scope="module")
def gpu() -> Iterator[GpuDevice]:
    """llama.cpp's RPC device on loopback, or what `LOCALRUN_TEST_GPU` names."""
    with a_gpu() as device:
        yield device


@pytest.fixture
def nothing_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the measurement says: on a busy machine it may say that streaming pays, and rings take slots."""

    def measured(*args: Any) -> None:
        measure(*args)

    monkeypatch.setattr("localrun.offload.setup.measure", measured)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`models.MODEL` as a file. Nobody changes it."""
    return write_model(tmp_path_factory.mktemp("model"))

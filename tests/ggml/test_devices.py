"""Which devices count, and which are left alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from localrun.errors import UsageError
from localrun.ggml import devices
from localrun.ggml.devices import DISPLAY_BYTES, GpuDevice, choose_gpus, gpu_devices, has_display, one_per_card
from tests.gpu_shim import shim
from tests.rpc_server import a_gpu


def test_a_card_that_two_backends_know_counts_once() -> None:
    cuda = GpuDevice(1, "CUDA0", "RTX 4090", 20 << 30, 24 << 30, card="0000:01:00.0")
    second = GpuDevice(2, "CUDA1", "RTX 4090", 20 << 30, 24 << 30, card="0000:02:00.0")
    vulkan = replace(cuda, address=3, name="Vulkan0")
    unnamed = [GpuDevice(4, "RPC0", "here:1", 1 << 30, 1 << 30), GpuDevice(5, "RPC1", "there:1", 1 << 30, 1 << 30)]
    assert one_per_card([cuda, second, vulkan, *unnamed]) == [cuda, second, *unnamed]


def test_a_connected_monitor_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "SYS_PCI", tmp_path)
    connector = tmp_path / "0000:01:00.0/drm/card1/card1-DP-1"
    connector.mkdir(parents=True)
    (connector / "status").write_text("disconnected\n")
    assert not has_display("0000:01:00.0")
    (connector / "status").write_text("connected\n")
    assert has_display("0000:01:00.0")
    assert not has_display("0000:02:00.0")
    assert not has_display("")
    device = GpuDevice(1, "CUDA0", "", 2 << 30, 2 << 30, has_display=True)
    assert device.display_bytes == DISPLAY_BYTES
    assert replace(device, has_display=False).display_bytes == 0


def test_only_named_devices_are_asked_for_their_memory() -> None:
    with a_gpu() as device, shim(device) as state:
        state.free_bytes = 12345
        assert {found.name: found.free_bytes for found in choose_gpus(device.name)} == {device.name: 12345}
        asked = state.n_asked
        assert asked > 0
        assert gpu_devices(["cuda7"]) == []
        with pytest.raises(UsageError) as caught:
            choose_gpus("CUDA7")
        assert device.name in (caught.value.hint or "")
        assert state.n_asked == asked

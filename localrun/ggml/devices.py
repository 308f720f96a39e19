"""ggml's GPU devices, their memory, and RPC devices on other machines.

Covers every backend llama.cpp was built with (CUDA, ROCm, Vulkan, Metal), and any `rpc-server` the user names, which ggml
treats as a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes as C
import logging
import mmap
import socket
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from localrun.errors import LocalrunError, UsageError
from localrun.ggml import structures as ggml
from localrun.ggml.library import library

log = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 5.0

DISPLAY_BYTES = 512 << 20
SYS_PCI = Path("/sys/bus/pci/devices")


@dataclass(frozen=True, slots=True)
class GpuDevice:
    """One device. Handles are valid for the life of the process.

    Attributes:
        address: ggml_backend_dev_t.
        name: ggml's, e.g. `CUDA0`, `Vulkan1`, `RPC0`.
        description: for people, e.g. the card's name or the server's address.
        free_bytes, total_bytes: at the time of the query.
        is_integrated: part of the processor; its memory is the machine's RAM.
        card: the PCI address; empty where the backend does not say. One card has one device for each backend that knows it.
        has_display: a monitor is connected.
    """

    address: int
    name: str
    description: str
    free_bytes: int
    total_bytes: int
    is_integrated: bool = False
    card: str = ""
    has_display: bool = False

    @property
    def display_bytes(self) -> int:
        """Additional memory that the automatic choice leaves for the desktop, whose use varies."""
        return DISPLAY_BYTES if self.has_display else 0


class HostMemory:
    """RAM for the fastest uploads to a device: pinned if its backend supports that, else ordinary pages. `close` frees it.

    Attributes:
        array: (n_bytes,) the memory; not to be used after `close`.
    """

    def __init__(self, device: GpuDevice, n_bytes: int) -> None:
        lib = library()
        buffer_type = lib.ggml_backend_dev_host_buffer_type(device.address)
        self._buffer = lib.ggml_backend_buft_alloc_buffer(buffer_type, n_bytes) if buffer_type else None
        self._pages: mmap.mmap | None = None
        memory: Any
        if self._buffer:
            memory = (C.c_uint8 * n_bytes).from_address(lib.ggml_backend_buffer_get_base(self._buffer))
        else:  # the backend has none, or no more of it
            memory = self._pages = mmap.mmap(-1, n_bytes)
        self.array: npt.NDArray[np.uint8] = np.frombuffer(memory, np.uint8, n_bytes)

    def close(self) -> None:
        """Frees the memory."""
        self.array = np.zeros(0, np.uint8)
        buffer, self._buffer, self._pages = self._buffer, None, None  # plain pages go with their last array
        if buffer:
            library().ggml_backend_buffer_free(buffer)


def gpu_devices(names: Collection[str] | None = None) -> list[GpuDevice]:
    """Devices of type GPU, including integrated ones, in ggml's order; unreachable RPC devices are skipped.

    Args:
        names: only these, in lower case. Querying a card's memory creates a context on it, which takes 300 to 450 MB.
    """
    lib = library()
    devices = []
    for address, name, description in _listed():
        if names is not None and name.lower() not in names:
            continue
        if name.startswith("RPC") and not is_reachable(description):
            log.warning("%s: the server %s has stopped responding", name, description)
            continue
        props = ggml.DeviceProps()
        lib.ggml_backend_dev_get_props(address, C.byref(props))
        # Vulkan subtracts what is used from what the driver would like us to use, which may be less: a huge number.
        free_bytes = props.memory_free if props.memory_free <= props.memory_total else 0
        is_integrated = lib.ggml_backend_dev_type(address) == ggml.DEVICE_TYPE_IGPU
        card = (props.device_id or b"").decode(errors="replace").lower()
        devices.append(
            GpuDevice(
                address, name, description, free_bytes, props.memory_total, is_integrated, card, has_display(card)
            )
        )
    return devices


def free_memory(device: GpuDevice) -> int:
    """Free bytes as reported by the device."""
    free, total = C.c_size_t(), C.c_size_t()
    library().ggml_backend_dev_memory(device.address, C.byref(free), C.byref(total))
    return free.value if free.value <= total.value else 0  # see `gpu_devices`


def _listed() -> Iterator[tuple[int, str, str]]:
    """(address, name, description) of GPUs, none of which is touched."""
    lib = library()
    for index in range(lib.ggml_backend_dev_count()):
        address = lib.ggml_backend_dev_get(index)
        if lib.ggml_backend_dev_type(address) in (ggml.DEVICE_TYPE_GPU, ggml.DEVICE_TYPE_IGPU):
            yield (
                address,
                lib.ggml_backend_dev_name(address).decode(),
                lib.ggml_backend_dev_description(address).decode(),
            )


def has_display(card: str) -> bool:
    """Whether a monitor is connected to the card at this PCI address, according to Linux; False on other systems."""
    if not card:
        return False
    for status in (SYS_PCI / card).glob("drm/card*/card*-*/status"):
        with contextlib.suppress(OSError):
            if status.read_text().strip() == "connected":
                return True
    return False


def one_per_card(devices: Sequence[GpuDevice]) -> list[GpuDevice]:
    """Drops the second device of a card that two backends list (CUDA and Vulkan, in ggml's order), because they share its
    memory."""
    cards: set[str] = set()
    result = []
    for device in devices:
        if device.card and device.card in cards:
            continue
        cards.add(device.card)
        result.append(device)
    return result


def add_rpc_server(endpoint: str) -> None:
    """Makes the devices of a llama.cpp `rpc-server` available in this process.

    Args:
        endpoint: `HOST:PORT`. The connection is neither encrypted nor authenticated.

    Raises:
        UsageError: not an endpoint.
        LocalrunError: no server answers there, or this llama.cpp has no RPC backend.
    """
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise UsageError(f"--rpc {endpoint}: expected HOST:PORT")
    # llama.cpp aborts the process when it can't connect, so somebody else has to try first.
    try:
        socket.create_connection((host, int(port)), _CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise LocalrunError(
            f"--rpc {endpoint}: {error.strerror or error}",
            hint="start `rpc-server -H ADDRESS -p PORT` (llama.cpp) there, or leave out --rpc",
        ) from error
    lib = library()
    registry = lib.ggml_backend_reg_by_name(b"RPC")
    function = registry and lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_rpc_add_server")
    if not function:
        raise LocalrunError("this llama.cpp was built without its RPC backend", hint="make clean setup")
    known = {description for _, _, description in _listed()}
    if endpoint in known:
        return
    server = C.CFUNCTYPE(C.c_void_p, C.c_char_p)(function)(endpoint.encode())
    if not server:
        raise LocalrunError(f"--rpc {endpoint}: the server has no devices")
    lib.ggml_backend_register(server)


def is_reachable(endpoint: str) -> bool:
    """Somebody listens at `HOST:PORT`. llama.cpp aborts the process when it asks a server that has gone."""
    host, _, port = endpoint.rpartition(":")
    try:
        socket.create_connection((host, int(port)), _CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError):
        return False
    return True


def choose_gpus(choice: str, rpc: Sequence[str] = ()) -> list[GpuDevice]:
    """The devices that the user chose.

    Args:
        choice: `auto` (all with dedicated memory), `none`, or comma-separated names.
        rpc: servers to add first.

    Raises:
        UsageError: an unknown device name; the message lists the known ones.
        LocalrunError: see `add_rpc_server`.
    """
    for endpoint in rpc:
        add_rpc_server(endpoint)
    if choice == "none":
        return []
    if choice == "auto":
        return one_per_card([device for device in gpu_devices() if not device.is_integrated])
    names = [name.strip().lower() for name in choice.split(",")]
    by_name = {device.name.lower(): device for device in gpu_devices(names)}
    chosen = []
    for name in choice.split(","):
        device = by_name.get(name.strip().lower())
        if device is None:
            there = ", ".join(f"{other} ({what})" for _, other, what in _listed()) or "none"
            raise UsageError(f"--gpu {name.strip()}: no such GPU", hint=f"GPUs this llama.cpp can use: {there}")
        chosen.append(device)
    return chosen

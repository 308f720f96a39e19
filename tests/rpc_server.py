"""A GPU for machines without one: llama.cpp's RPC device on loopback, a process of its own with memory of its own.

With `LOCALRUN_TEST_GPU=CUDA0` in the environment, tests that ask for `a_gpu` run on that device.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from localrun.ggml.devices import GpuDevice, choose_gpus, gpu_devices

TEST_GPU = os.environ.get("LOCALRUN_TEST_GPU", "")

_SERVE = """
import ctypes as C, sys
import llama_cpp
from localrun.ggml import library as ggml
lib = ggml.library()
registry = lib.ggml_backend_reg_by_name(b"RPC")
start = lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_rpc_start_server")
if start:
    start = C.CFUNCTYPE(None, C.c_char_p, C.c_char_p, C.c_size_t, C.c_size_t, C.POINTER(C.c_void_p))(start)
else:
    start = llama_cpp.llama_cpp._lib.ggml_backend_rpc_start_server
    start.argtypes = [C.c_char_p, C.c_char_p, C.c_size_t, C.c_size_t, C.POINTER(C.c_void_p)]
cpu = (C.c_void_p * 1)(lib.ggml_backend_dev_by_type(0))
start(sys.argv[1].encode(), None, 1, 1, cpu)
"""


@contextlib.contextmanager
def rpc_server() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """(endpoint, process) of a running server; ended at the end."""
    # The port stays bound, so no other socket gets it before the server does, nor one that asks whether the server is there:
    # connected to itself, it would get an answer.
    claim = socket.socket()
    claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    claim.bind(("127.0.0.1", 0))
    port = claim.getsockname()[1]
    endpoint = f"127.0.0.1:{port}"
    # Each buffer is asked of the system, not taken from what glibc has in reserve: `limit_memory` is exact.
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE, endpoint],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None, "the RPC server ended"
                assert time.monotonic() < deadline, "the RPC server does not answer"
                time.sleep(0.05)
        yield endpoint, process
    finally:
        process.kill()
        process.wait()
        claim.close()


def limit_memory(server: subprocess.Popen[bytes], n_bytes: int) -> None:
    """The server can take only so much more, whatever it says is free."""
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "prlimit"):
        pytest.skip("limits of other processes need Linux")
    (size,) = re.findall(r"VmSize:\s+(\d+) kB", Path(f"/proc/{server.pid}/status").read_text())
    limit = int(size) * 1024 + n_bytes
    resource.prlimit(server.pid, resource.RLIMIT_AS, (limit, limit))


@contextlib.contextmanager
def a_gpu() -> Iterator[GpuDevice]:
    """The device that the environment names, or else one of a server of its own."""
    if TEST_GPU:
        device = next((device for device in gpu_devices() if device.name == TEST_GPU), None)
        if device is None:
            pytest.fail(f"LOCALRUN_TEST_GPU: no {TEST_GPU} here")  # a skip would look like success
        yield device
        return
    with rpc_server() as (endpoint, _):
        devices = choose_gpus("auto", [endpoint])
        yield next(device for device in devices if device.description == endpoint)

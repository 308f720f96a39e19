"""A GPU for machines without one: llama.cpp's RPC device on loopback, a process of its own with memory of its own."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

_SERVE = """
import ctypes as C, sys
import llama_cpp
from localrun.offload import ggml
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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    endpoint = f"127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE, endpoint], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 30
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

"""Runs a command so that it dies at the first network socket: `python tests/network_guard.py COMMAND...`, or `guarded([...])`.

A seccomp filter (Linux, x86-64 and ARM64; no root needed) kills the process that asks the kernel for a socket of any family but
AF_UNIX, whoever asks: Python, llama.cpp, a library, a child process. The filter is inherited and can't be taken off.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from pathlib import Path

SYSTEM_CALLS = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
"""Machine -> AUDIT_ARCH_* (linux/audit.h) and the number of socket(2)."""

KILLED = -31
"""Return code, as subprocess has it, of a process that broke the rule (SIGSYS)."""

AF_UNIX = 1
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
ALLOW, KILL_PROCESS = 0x7FFF0000, 0x80000000
_LOAD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06  # linux/bpf_common.h
_NUMBER_AT, _ARCH_AT, _ARGUMENT_AT = 0, 4, 16  # struct seccomp_data, linux/seccomp.h; little-endian


def available() -> bool:
    return sys.platform == "linux" and platform.machine() in SYSTEM_CALLS


def guarded(command: list[str]) -> list[str]:
    """`command` under the guard."""
    return [sys.executable, str(Path(__file__).resolve()), *command]


def install() -> None:
    """Puts this process under the filter.

    Raises:
        OSError: the kernel refuses.
    """
    arch, socket_call = SYSTEM_CALLS[platform.machine()]
    # A jump names how many instructions are left out if equal, and if not. Another architecture's calls (32-bit) kill too.
    program = [
        (_LOAD, 0, 0, _ARCH_AT),
        (_JUMP_EQUAL, 1, 0, arch),
        (_RETURN, 0, 0, KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_JUMP_EQUAL, 1, 0, socket_call),
        (_RETURN, 0, 0, ALLOW),
        (_LOAD, 0, 0, _ARGUMENT_AT),
        (_JUMP_EQUAL, 0, 1, AF_UNIX),
        (_RETURN, 0, 0, ALLOW),
        (_RETURN, 0, 0, KILL_PROCESS),
    ]
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in program))
    header = struct.pack("@HP", len(program), ctypes.addressof(instructions))  # struct sock_fprog
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    where = ctypes.create_string_buffer(header)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(where), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "the kernel refuses the filter")


if __name__ == "__main__":
    install()
    os.execvp(sys.argv[1], sys.argv[1:])

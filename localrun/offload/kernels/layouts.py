"""Records of one kernel call: its operands and progress."""

from __future__ import annotations

from typing import Annotated

from localrun.offload.kernels.records import Layout, Words


class _Matrix(Layout):
    """One projection as the driver sees it; `KernelCall` writes it once, compiled code reads it."""

    rows: int
    """Address of the row kernel, signature `compiled.ROWS`."""
    extra: int
    """The row kernel's second argument."""
    offset: int
    """Bytes from the slot's start to the matrix."""
    n_in: int
    """Values of a row."""
    n_out: int
    """Rows."""
    kind: int
    """Of the activation panel, a constant of `panels`."""
    aux: int
    """The panel's `offset`."""
    unit: int
    """Values of one record of the panel."""
    unit_bytes: int
    """Bytes of one record of the panel, for one token."""


MATRIX = _Matrix()


class _Call(Layout):
    """One kind of call. The caller, in Python or compiled, fills in the batch; the driver works through it in windows."""

    threads: int
    """Threads to use, the caller's included; `KernelCall` writes once."""
    matrix_only: int
    """1 if only `down` is applied to x; `KernelCall` writes once."""
    limit_bits: int
    """The SwiGLU's clamp, bits of an F32; `KernelCall` writes once."""
    n_experts: int
    """Entries of `slots`; the caller writes, as it does up to `panels`: see `FfnKernel.run` for what they are."""
    slots: int
    """Address of (E,) uint64, the experts' addresses."""
    starts: int
    """Address of (E + 1,) int32, pairs by expert."""
    x_rows: int
    """Address of (P,) int32."""
    out_rows: int
    """Address of (P,) int32."""
    x: int
    """Address of F32 rows."""
    x_stride: int
    """Bytes from row to row."""
    out: int
    """Address of F32 rows."""
    out_stride: int
    """Bytes from row to row."""
    jobs: int
    """Address of scratch for `MAX_JOBS` JOB records."""
    tasks: int
    """Address of scratch for tasks, two int32 each: job * 4 + stage, and which block or tile."""
    panels: int
    """Address of scratch for activations."""
    n_tasks: int
    """Of the window; the driver writes."""
    expert: int
    """The first expert that has pairs left; the caller writes 0, the driver the rest."""
    pair: int
    """The first pair that is left; the caller writes `starts[0]`, the driver the rest."""
    up_rows: int
    """Rows of a gate and up task; the driver writes for each window."""
    down_rows: int
    """Rows of a down task; the driver writes for each window."""
    sched_yield: int
    """Address of libc's function, 0: none; `KernelCall` writes once, as the next two."""
    pool: int
    """Address of the POOL record whose threads help, 0: this thread alone."""
    task: int
    """Address of `int64 f(call, ticket)`, which runs one task."""
    matrices: Annotated[int, Words(3 * MATRIX.size)]
    """MATRIX records of gate, up, down; `KernelCall` writes once."""


CALL = _Call()


class _Job(Layout):
    """Up to `JOB_PAIRS` pairs of one expert in the running window; the driver writes, threads read and count."""

    slot: int
    """The expert's address."""
    pair: int
    """Its first pair."""
    n_pairs: int
    """How many."""
    n_tiles: int
    """Tiles of at most 16 tokens."""
    panel: Annotated[int, Words(3)]
    """Addresses of the inputs of gate, up and down; gate's and up's are one where they take the same activations."""
    quantized: int
    """Finished tasks of the first stage; threads add atomically."""
    activated: int
    """Finished tasks of the second stage; threads add atomically."""


JOB = _Job()

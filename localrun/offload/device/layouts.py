"""Records of the compiled path, which the device's C callback reaches from a tensor and from its context.

Written by the decoding thread between decodes or while Python has the call, unless a field says otherwise. Read-ahead may add
residents meanwhile: one aligned store of address and variant, after the bytes.
"""

from __future__ import annotations

from typing import Annotated, Final

from localrun.offload.kernels.records import Layout, Words

MOST_PAIRS: Final = 64
"""Maximum (token, expert) pairs on GPUs of a compiled call, and its tokens: enough for decode. Longer calls take so long that
going through Python does not matter."""


MOST_LAUNCHES: Final = 16
"""Graphs that one GPU computes in a compiled call: one for each format of a layer."""

MOST_INPUTS: Final = 16
"""Inputs of a split that are remembered: an expert layer has three."""

NOTE_BYTES: Final = 2 * MOST_PAIRS * 4
"""Of one launch: 64 int32, slots, then as many F32, weights. Backends want addresses at multiples of 256."""


class _Process(Layout):
    """The process: ggml's and libc's functions, the way back to Python, scratch. `Process` writes, compiled code reads."""

    n_nodes: int
    """Address of `int32 ggml_graph_n_nodes(graph)`."""
    node_at: int
    """Address of `ggml_graph_node(graph, index)`."""
    python: int
    """Address of `int64 f(graph, index)`: nodes done, or what means failure."""
    clock: int
    """Address of `clock_gettime`."""
    timespec: int
    """Address of two int64 that the clock writes: s, ns."""
    run: int
    """Address of the driver's `run(call)`."""
    scratch: int
    """Address of the calls' scratch, 64-byte aligned."""
    capacity: int
    """Pairs that fit `x_rows` and `out_rows`."""
    slots: int
    """Address of `MAX_EXPERTS` uint64; compiled code writes and reads, as the next six."""
    starts: int
    """Address of `MAX_EXPERTS + 1` int32."""
    x_rows: int
    """Address of `capacity` int32."""
    out_rows: int
    """Address of `capacity` int32."""
    counts: int
    """Address of `MAX_EXPERTS` int32: pairs by expert."""
    places: int
    """Address of `MAX_EXPERTS` int32: where an expert's next pair goes."""
    bounds: int
    """Address of `MAX_VARIANTS + 1` int32: the distinct experts by variant."""
    iota: int
    """Address of int32 0, 1, ...: the rows of dense calls."""
    iota_size: int
    """How many."""
    dense_ns: int
    """Time in dense matrices; compiled code adds, Python reads."""
    n_bytes: int
    """Address of `ggml_nbytes(tensor)`."""
    get_tensor: int
    """Address of `ggml_backend_tensor_get_async`."""
    synchronize: int
    """Address of `ggml_backend_synchronize`."""
    awaited: int
    """`ggml_backend_t` that is still copying our inputs, 0: none; compiled code writes and reads."""
    buffer_type: int
    """Address of `ggml_backend_buffer_get_type(buffer)`."""
    weights_type: int
    """Address of our weights' buffer type."""
    weights: int
    """Address of `capacity` F32: the router's weights of the running call's pairs; compiled code writes, as the next
    four."""
    taken: int
    """Address of `capacity` uint8: 1 for a pair that is weighted and added up elsewhere (on a GPU)."""
    tail_end: int
    """The node after the weighting and the sum that follow the present expert chain; 0: they don't."""
    tail_weights: int
    """Address of the weights' tensor."""
    tail_sum: int
    """Address of the sum's tensor."""
    attention_ns: int
    """Time in attention and the indexer; likewise."""
    attention: int
    """Address of an ATTENTION record; compiled code writes and reads."""
    indexer: int
    """Address of an INDEXER record; likewise."""
    attend: int
    """Address of the task of `attention.attend`."""
    index: int
    """Address of the task of `attention.index`."""
    pool: int
    """Address of the POOL record whose threads help with attention, 0: the calling thread alone."""
    threads: int
    """Threads that do."""
    takes_attention: int
    """1 while graphs are made with attention on our device; Python writes."""
    takes_between: int
    """1 while they are made with what comes between matrices on our device, too; Python writes."""
    is_host: int
    """Address of `ggml_backend_buft_is_host(type)`."""
    get_base: int
    """Address of `ggml_backend_buffer_get_base(buffer)`."""
    set_tensor: int
    """Address of `ggml_backend_tensor_set_async`."""
    set_now: int
    """Address of `ggml_backend_tensor_set`, which waits."""
    read_back: int
    """Address of `get_tensor` in the table of our buffers on a GPU; 0: there are none. Python writes, as the next one."""
    shadow: int
    """Address of the pinned RAM that mirrors such a buffer."""
    near: int
    """`ggml_backend_t` from which the running split's inputs came, 0: none; compiled code writes and reads, as the next three."""
    behind: int
    """`ggml_backend_t` that has our work queued, or our results' uploads, and that nobody has waited for since; 0: none."""
    inputs: int
    """Address of `MOST_INPUTS` pairs of tensors: a split's input, and what it is a copy of."""
    n_inputs: int
    """How many."""
    unread_joins: int
    """Joined rows of the running decode that no attention has read in place yet; compiled code counts, Python reads and clears."""
    unsettled: int
    """Address of the MISSES record of a call that was computed and may not be settled yet, 0: none; compiled code writes and
    reads."""
    settle_ns: int
    """Time that the decoding thread waited for that; compiled code adds."""
    n_entered: int
    """How often compiled code entered Python; compiled code adds."""
    n_parts: int
    """Parts of graphs computed; compiled code adds."""
    between: int
    """Address of a BETWEEN record; compiled code writes and reads."""
    between_task: int
    """Address of the task of `between.compute`."""
    shared_bytes: int
    """From so many bytes on, it uses several threads; Python writes."""
    compressor: int
    """Address of a COMPRESSOR record."""
    compressor_task: int
    """Address of the task of `compressor.compute`."""


PROCESS = _Process()


class _Between(Layout):
    """The operation between matrices that is being computed; compiled code writes and reads."""

    node: int
    """Its tensor."""
    kind: int
    """ggml's number of it."""
    n_units: int
    """Rows of its result, or whatever one task has some of."""
    units_per_task: int
    """How many a task has."""


BETWEEN = _Between()

MOST_POOLED: Final = 8192
"""Rows that a compressor's call reads, and columns, at most; more are computed one operation at a time."""
MOST_LEFT_OUT: Final = 24
"""Operations that it does without, at most: there are 18."""


class _Compressor(Layout):
    """The compressor that is being computed; compiled code writes and reads all but addresses."""

    total: int
    """The tensor of the sums that it ends with, 0: there is none."""
    n_rows: int
    """Rows that become one."""
    width: int
    """Columns."""
    n_blocks: int
    """Rows of the result."""
    values: int
    """Address of `MOST_POOLED` int64, the addresses of rows by block."""
    scores: int
    """The same for scores."""
    left_out: int
    """Address of `MOST_LEFT_OUT` tensors that nobody computes."""
    n_left_out: int
    """How many."""
    zeros: int
    """Address of 2 * `MOST_POOLED` F32, a row of zeros."""
    lowest: int
    """The same of minus infinity."""
    n_done: int
    """Compressors computed so far; compiled code adds, Python reads."""


COMPRESSOR = _Compressor()


class _Weight(Layout):
    """One of our weights; a tensor's `extra` points to it."""

    kind: int
    """`KIND_DENSE` or `KIND_EXPERTS`."""
    projection: int
    """Of experts: 0 gate, 1 up, 2 down."""
    layer: int
    """Of experts: address of the LAYER record."""
    call: int
    """Of a dense matrix: address of its CALL record."""
    jobs_bytes: int
    """Scratch of the call's jobs."""
    tasks_bytes: int
    """Scratch of the call's tasks."""
    n_batch: int
    """Matrices: one, or one per group."""
    packed: int
    """Address of `n_batch` uint64, the matrices' addresses."""


WEIGHT = _Weight()
KIND_DENSE, KIND_EXPERTS = 1, 2


class _Layer(Layout):
    """A layer's experts. Compiled code reads the addresses and counts in their targets."""

    number: int
    """Block number."""
    n_experts: int
    """Experts that the router may choose."""
    resident: int
    """Address of (E,) uint64: address plus variant of an expert's slot in RAM (`SlotTable.resident`), or 0; read-ahead may write it
    while the layer runs."""
    stamps: int
    """Address of (E,) int64: `tick` of the last use; compiled code writes."""
    uses: int
    """Address of (E,) int64: pairs computed; compiled code adds."""
    tick: int
    """Address of one int64: calls so far, of all layers; compiled code adds."""
    telemetry: int
    """Address of the layer's row of `telemetry.Counter`; compiled code adds."""
    compiled_below: int
    """Address of one int64: calls of this many tokens and more go to Python."""
    n_calls: int
    """Variants."""
    calls: int
    """Address of `n_calls` VARIANT records."""
    gpu: int
    """Address of the GPU_LAYER record, 0: no experts on GPUs."""
    misses: int
    """Address of the MISSES record, 0: a call that lacks an expert goes to Python."""
    gate: int
    """Address of the GATE record (`cache/gate.py`), 0: nobody evicts during a call."""


LAYER = _Layer()


class _Misses(Layout):
    """The running call's missing experts: what compiled code asks of the thread that fetches them (`misses.Misses`).

    "Asks": written by the decoding thread before `posted`. "Answers": by the fetching thread before `answered`.
    """

    posted: int
    """Calls so far; atomic."""
    bell: int
    """Calls, and reads ahead that have arrived; atomic. The fetching thread sleeps on its low 32 bits (futex)."""
    answered: int
    """Answers so far; atomic. The decoding thread sleeps on its low 32 bits."""
    settled: int
    """Posted calls that the fetching thread is done with; atomic, answers."""
    computed: int
    """Missing experts of the running call that are computed; atomic, compiled code adds."""
    status: int
    """0, or what the call fails with, as Python's answer to compiled code; answers."""
    closing: int
    """1: the fetching thread ends; Python writes."""
    syscall: int
    """Address of libc's `syscall`; Python writes once, as the next six."""
    early: int
    """Address of the store's EARLY record, 0: it has none."""
    gate: int
    """Address of the GATE record of the calls' layers, 0: they have none."""
    looks: int
    """1: calls of a single token that lack nothing are posted, too, to look ahead; Python writes."""
    ids: int
    """Address of `MOST_PAIRS` int32: the call's choices, (T, K); asks."""
    experts: int
    """Address of `MOST_PAIRS` int32: the distinct missing experts, ascending; asks."""
    words: int
    """Address of `MOST_PAIRS` int64, one for each of `experts`: 0, its word as in `LAYER.resident` once it is there (answers), -1
    once it is computed."""
    x: int
    """Address of a row of F32: the input of a single token; asks."""
    layer: int
    """Block number; asks."""
    n_tokens: int
    """Tokens of the call; asks."""
    n_used: int
    """Choices of a token; asks."""
    n_experts: int
    """How many are missing; asks."""


MISSES = _Misses()


class _Variant(Layout):
    """One format that experts of a layer may have."""

    call: int
    """Address of the CALL record."""
    jobs_bytes: int
    """Scratch of its jobs."""
    tasks_bytes: int
    """Scratch of its tasks."""


VARIANT = _Variant()


class _Device(Layout):
    """A GPU. `DeviceRecord` writes, compiled code reads."""

    backend: int
    """`ggml_backend_t`."""
    notes: int
    """Address of pinned memory for `MOST_LAUNCHES` notes of `NOTE_BYTES`: a launch's slots, then its weights."""
    x: int
    """Address of pinned memory for `MOST_PAIRS` rows of F32: inputs; a launch has its range."""
    out: int
    """The same for outputs."""
    notes_tensor: int
    """Tensor on the device for all notes."""
    x_tensor: int
    """Tensor on the device for `MOST_PAIRS` rows of inputs."""
    out_tensor: int
    """The same for outputs."""
    notes_data: int
    """Address of the notes on the device, as its tensors have it."""
    x_data: int
    """The same of the inputs."""
    out_data: int
    """The same of the outputs."""
    n_embd: int
    """Values of a row."""
    set: int
    """Address of `ggml_backend_tensor_set_async`."""
    compute: int
    """Address of `ggml_backend_graph_compute_async`."""
    get: int
    """Address of `ggml_backend_tensor_get_async`."""
    synchronize: int
    """Address of `ggml_backend_synchronize`."""
    handle: int
    """`ggml_backend_dev_t`."""
    joins: int
    """Address of `MOST_LAUNCHES + 2` JOIN records: the sum of so many of the first rows of outputs, from two on."""
    current: int
    """`ggml_backend_t` of the running call: our own, or llama.cpp's on the same device; compiled code writes and reads."""


DEVICE = _Device()


class _Join(Layout):
    """A graph that adds up rows of outputs. `DeviceRecord` writes, compiled code reads."""

    graph: int
    """`ggml_cgraph *`, 0: none."""
    nodes: int
    """Address of its nodes' addresses: each is written where the sum goes."""
    n_nodes: int
    """How many."""


JOIN = _Join()


class _Graph(Layout):
    """A graph of one bank. `BankRecord.add` writes, compiled code reads."""

    graph: int
    """`ggml_cgraph *`, 0: not made yet."""
    x: int
    """Input tensor."""
    ids: int
    """Slots of the pairs, a tensor."""
    weights: int
    """Their weights, a tensor; 0 where each pair has a row of outputs."""
    out: int
    """Output tensor."""
    pairs: int
    """How many it computes."""


GRAPH = _Graph()


class _Bank(Layout):
    """Slots of one layer and format on one GPU."""

    device: int
    """Address of the DEVICE record."""
    graphs: Annotated[int, Words(2 * (MOST_PAIRS + 1) * GRAPH.size)]
    """GRAPH records for 0 to `MOST_PAIRS` pairs of one token, whose weighted sum is one row, and as many for pairs of several."""


BANK = _Bank()


class _GpuLayer(Layout):
    """A layer's experts on GPUs. `LayerOnGpu` writes, compiled code reads but for the running call's fields."""

    where: int
    """Address of (E,) int16: the GPU, -1: none."""
    slot: int
    """Address of (E,) int32: the slot in its bank."""
    variant: int
    """Address of (E,) int32: which format."""
    n_gpus: int
    """GPUs."""
    n_variants: int
    """Formats."""
    banks: int
    """Address of BANK addresses by GPU and variant, 0: none."""
    n_tokens: int
    """Of the running call; compiled code writes."""
    n_used: int
    """Experts of a token in the running call; compiled code writes."""
    launches: int
    """Address of `MOST_PAIRS` LAUNCH records of the running call; compiled code writes them."""
    rows: int
    """Address of `MOST_PAIRS` int32: output rows (token * n_used + choice) of the launches' pairs; compiled code writes them."""


GPU_LAYER = _GpuLayer()


class _Launch(Layout):
    """What one graph computes in the running call; compiled code writes and reads."""

    bank: int
    """Address of the BANK record."""
    graph: int
    """Address of the GRAPH record."""
    first: int
    """Its first pair in `GPU_LAYER.rows`."""
    n_pairs: int
    """How many."""
    n_rows: int
    """Rows of its inputs and of its outputs."""
    note: int
    """Its number among the device's launches."""
    row: int
    """Its first row among the device's."""


LAUNCH = _Launch()

"""Compiled calls and eviction keep out of each other's way."""

from __future__ import annotations

import threading
from typing import Final

import numba as nb
import numpy as np
import pytest

from localrun.alignment import PAGE_BYTES
from localrun.offload.cache.gate import GATE, Gate, enter, leave
from localrun.offload.cache.slots import SlotTable
from localrun.offload.kernels import futex
from localrun.offload.kernels.lowlevel import load_i64, store_i64

N_LAYERS, N_EXPERTS = 4, 8


@nb.njit(nogil=True)
def call_layers(gate: int, resident: int, n_layers: int, n_experts: int, n_rounds: int, stop: int) -> int:
    """Looks each layer's experts up, over and over; how often one went while its layer was in use."""
    n_lost = 0
    for _ in range(n_rounds):
        for layer in range(n_layers):
            enter(gate, layer)
            row = resident + layer * n_experts * 8
            for e in range(n_experts):
                word = load_i64(row + e * 8)
                for _ in range(20):
                    if load_i64(row + e * 8) != word:
                        n_lost += 1
            leave(gate)
        if load_i64(stop) != 0:
            break
    store_i64(stop, 2)
    return n_lost


def filled() -> SlotTable:
    table = SlotTable(N_LAYERS * N_EXPERTS * PAGE_BYTES, N_LAYERS, N_EXPERTS)
    fill(table)
    return table


def fill(table: SlotTable) -> None:
    for layer in range(N_LAYERS):
        for expert in range(N_EXPERTS):
            if table.peek(layer, expert) is None:
                slot = table.reserve(layer, expert, PAGE_BYTES, evict=False)
                assert slot is not None
                table.ready(slot)


@nb.njit
def begin(gate: int, layer: int) -> None:
    enter(gate, layer)


@nb.njit
def end(gate: int) -> None:
    leave(gate)


@pytest.mark.parametrize("has_futex", [True, False])
def test_no_slot_goes_while_a_call_uses_its_layer(has_futex: bool) -> None:
    """A thread of compiled code reads what another one gives back and, between two calls, fills again."""
    if has_futex and not futex.is_supported():
        pytest.skip("no futex on this system")
    table = filled()
    if not has_futex:
        table.gate._fields[GATE.syscall] = 0
    stop, lost = np.zeros(1, np.int64), []
    arguments = (table.gate.address, table.resident.ctypes.data, N_LAYERS, N_EXPERTS)

    def call() -> None:
        lost.append(call_layers(*arguments, 1 << 40, stop.ctypes.data))

    call_layers(*arguments, 1, np.ones(1, np.int64).ctypes.data)  # compiled before the thread begins
    thread = threading.Thread(target=call)
    thread.start()
    n_evicted = 0
    for _ in range(300):
        n_evicted += table.withhold(5 * PAGE_BYTES, 0)
        with table.gate.closed() as layer:
            table.use_again(table.withheld_bytes)
            if layer is None:
                fill(table)
    stop[0] = 1
    thread.join(300)
    assert lost == [0]
    assert n_evicted > 0
    table.close()


def test_the_layer_in_use_stays_even_if_its_slots_are_the_coldest() -> None:
    table: Final = filled()
    begin(table.gate.address, 0)
    assert table.withhold(N_EXPERTS * PAGE_BYTES, 0) == N_EXPERTS * PAGE_BYTES
    assert {slot.layer for slot in table} == {0, 2, 3}
    end(table.gate.address)
    assert table.withhold(PAGE_BYTES, 0) == PAGE_BYTES
    assert len([slot for slot in table if slot.layer == 0]) == N_EXPERTS - 1
    table.check()
    table.close()


def test_a_call_begins_when_the_gate_opens() -> None:
    gate = Gate()
    begin(gate.address, 1)
    end(gate.address)
    done = threading.Event()

    @nb.njit(nogil=True)
    def wait(address: int) -> None:
        enter(address, 2)

    wait(Gate().address)  # compiled before the thread begins

    def call() -> None:
        wait(gate.address)
        done.set()

    with gate.closed() as layer:
        assert layer is None
        thread = threading.Thread(target=call)
        thread.start()
        assert not done.wait(0.05)
    assert done.wait(300)
    thread.join()
    with gate.closed() as layer:
        assert layer == 2

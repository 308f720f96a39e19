"""Records that Python and compiled code share: arrays of int64 whose fields are declared once, by name.

A layout is a class with one annotation per field, in order, each with a docstring that says the field's unit and who writes and who
reads it; its one instance has the fields' indices as attributes:

    class _Timer(Layout):
        started_ns: int
        \"""Clock at the start; Python writes, compiled code reads.\"""
        laps_ns: Annotated[int, Words(3)]
        \"""The last three laps; compiled code writes, Python reads.\"""

    TIMER = _Timer()                # TIMER.started_ns == 0, TIMER.laps_ns == 1, TIMER.size == 4
    record = TIMER.make(started_ns=5)
    get(address_of(record), TIMER.started_ns)      # in compiled code: a load at a constant offset

To numba an instance is a module, whose attributes it takes as constants: the machine code is that of written-out numbers.
"""

from __future__ import annotations

import types
import typing
from dataclasses import dataclass

import numba as nb
import numpy as np
import numpy.typing as npt

from localrun.offload.kernels.lowlevel import load_i64, store_i64

Record = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Words:
    """Of a field that is an array: its length in int64."""

    count: int


class Layout(types.ModuleType):
    """The fields of one kind of record. Immutable, made once.

    Attributes:
        size: int64 of a record.
    """

    size: int

    def __init__(self) -> None:
        super().__init__(f"{type(self).__module__}.{type(self).__qualname__}", type(self).__doc__)
        self._widths: dict[str, int] = {}
        at = 0
        for name, hint in typing.get_type_hints(type(self), include_extras=True).items():
            if name in Layout.__annotations__ or name.startswith("__"):
                continue
            assert not hasattr(Layout, name), f"{name} is an attribute of every layout"
            self._widths[name] = next((m.count for m in getattr(hint, "__metadata__", ()) if isinstance(m, Words)), 1)
            setattr(self, name, at)
            at += self._widths[name]
        self.size = at

    def empty(self) -> Record:
        """A record of zeros."""
        return np.zeros(self.size, np.int64)

    def make(self, **values: int) -> Record:
        """A record with these values; arrays are zero.

        Raises:
            TypeError: a field that the layout lacks, or one that is missing.
        """
        scalars = {name for name, width in self._widths.items() if width == 1}
        if scalars != values.keys():
            raise TypeError(f"{self.__name__}: fields {sorted(scalars ^ values.keys())} are unknown or missing")
        record = self.empty()
        self.fill(record, **values)
        return record

    def fill(self, record: Record, **values: int) -> None:
        """Sets fields of one int64 by name.

        Raises:
            TypeError: no record of this layout, a field that the layout lacks, or one that is an array.
        """
        if record.shape != (self.size,) or record.dtype != np.int64:
            raise TypeError(f"{self.__name__}: {record.size} {record.dtype}, not {self.size} int64")
        for name, value in values.items():
            if self._widths.get(name) != 1:
                raise TypeError(f"{self.__name__}: no single field {name}")
            record[getattr(self, name)] = value

    def span(self, *names: str) -> slice:
        """Where these fields are, for setting them all at once.

        Raises:
            TypeError: they don't follow one another in this order.
        """
        first = list(self._widths).index(names[0])
        if tuple(self._widths)[first : first + len(names)] != names:
            raise TypeError(f"{self.__name__}: {names} don't follow one another")
        return slice(getattr(self, names[0]), getattr(self, names[-1]) + self._widths[names[-1]])


@nb.njit(inline="always")
def get(record: int, field: int) -> int:
    """A field of the record at an address."""
    return load_i64(record + field * 8)


@nb.njit(inline="always")
def put(record: int, field: int, value: int) -> None:
    """Sets a field of the record at an address."""
    store_i64(record + field * 8, value)


@nb.njit(inline="always")
def add(record: int, field: int, amount: int) -> None:
    """Adds to a field of the record at an address; not atomic."""
    store_i64(record + field * 8, load_i64(record + field * 8) + amount)

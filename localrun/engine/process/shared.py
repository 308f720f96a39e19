"""Shares an object that one thread may free while others use it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class Shared(Generic[T]):
    """Holds a value, or None. The owner puts and takes it; any thread may use it inside a block, and the owner gets it back, to
    free it, only after those blocks have ended.

    Lock: `_idle`, held briefly, never inside a block of `use`.
    """

    def __init__(self) -> None:
        self._idle = threading.Condition()
        self._value: T | None = None
        self._n_users = 0

    def put(self, value: T) -> None:
        """From now on `use` gives this value; the place must be empty."""
        with self._idle:
            assert self._value is None
            self._value = value

    @property
    def value(self) -> T | None:
        """For the owner, who alone takes it away."""
        return self._value

    @contextmanager
    def use(self) -> Iterator[T | None]:
        """The value, which stays alive during the block; None if there is none. Keep it short: `take` waits for it."""
        with self._idle:
            value = self._value
            self._n_users += value is not None
        try:
            yield value
        finally:
            if value is not None:
                with self._idle:
                    self._n_users -= 1
                    self._idle.notify_all()

    def take(self) -> T | None:
        """Removes the value and waits until it is unused; the caller may then free it."""
        with self._idle:
            value, self._value = self._value, None
            self._idle.wait_for(lambda: self._n_users == 0)
            return value

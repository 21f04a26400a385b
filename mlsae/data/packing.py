"""Tokens in line: added in arrays of any length, taken in rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]


class TokenQueue:
    """Token ids, first in, first out. Each is copied once on its way in and once on its way out,
    whatever the lengths."""

    def __init__(self) -> None:
        self._arrays: deque[Ids] = deque()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, ids: Sequence[int] | Ids) -> None:
        """Add ids at the end."""
        if len(ids):
            self._arrays.append(np.asarray(ids, dtype=np.int32))
            self._size += len(ids)

    def take(self, n: int) -> Ids:
        """Remove the first `n` ids, of at least as many."""
        taken: list[Ids] = []
        self._size -= n
        while n > 0:
            array = self._arrays.popleft()
            taken.append(array[:n])
            if len(array) > n:
                self._arrays.appendleft(array[n:])
            n -= len(taken[-1])
        return np.concatenate([np.empty(0, np.int32), *taken])

    def all(self) -> Ids:
        """A copy of all ids."""
        return np.concatenate([np.empty(0, np.int32), *self._arrays])

"""Where the rows of a parameter lie in a checkpoint: whole, or in the parts of a sharded head.

Rows [a, b) of NAME are saved as `NAME[a:b]`. A rank asks for a whole parameter or for some rows,
whichever way they were saved.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from adaptis.errors import InputError
from adaptis.execute.storage import Slice

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

_PART = re.compile(r"(.*)\[(\d+):(\d+)\]")


class Rows(NamedTuple):
    """Rows [start, stop) of a parameter of the whole model; `stop` is 0 where all are meant."""

    name: str  # of the whole
    start: int = 0
    stop: int = 0

    def __str__(self) -> str:
        """The name under which they are known; `rows_of` reads it."""
        return f"{self.name}[{self.start}:{self.stop}]" if self.stop else self.name


def rows_of(name: str) -> Rows:
    """What a name stands for."""
    found = _PART.fullmatch(name)
    return Rows(found[1], int(found[2]), int(found[3])) if found else Rows(name)


class Index:
    """The saved parts of each parameter."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names: dict[str, list[tuple[int, int, str]]] = {}
        for name in names:
            whole, start, stop = rows_of(name)
            self._names.setdefault(whole, []).append((start, stop, name))
        for parts in self._names.values():
            parts.sort()

    def sources(self, name: str) -> list[tuple[str, int, int]]:
        """The saved names that hold `name`, in its order, each with the rows to take of it.

        The rows are (0, 0) where all of what was saved under a name is meant.
        """
        whole, start, stop = rows_of(name)
        parts = self._names.get(whole, [])
        if any(saved == name for _, _, saved in parts):
            return [(name, 0, 0)]
        found = []
        for first, last, saved in parts:
            if not last:
                return [(saved, start, stop)]
            a, b = max(first, start), min(last, stop or last)
            if a < b:
                found.append((saved, a - first, b - first))
        return found


def assemble(pieces: list[tuple[Any, int, int]], name: str) -> Tensor:
    """The tensor that lies in `pieces` of the checkpoint: each a slice and the rows of it.

    A number that counts for all rows is the same in every piece.

    Raises:
        InputError: damage, or a tensor that does not consist of rows.
    """
    tensors = []
    for part, start, stop in pieces:
        if not stop or not part.shape:
            tensors.append(part.read())
        elif stop > part.shape[0]:
            raise InputError(
                f"{part.path}: {name} cannot be divided by rows; resume with the same number of "
                f"devices and the same kind of head"
            )
        else:
            tensors.append(part.read_rows(start, stop))
    return tensors[0] if len(tensors) == 1 or not tensors[0].dim() else torch.cat(tensors)


def value_of(pieces: list[tuple[Any, int, int]], name: str) -> Any:
    """A part of an optimizer's state, which need not be a tensor."""
    first = pieces[0][0]
    return assemble(pieces, name) if isinstance(first, Slice) else first

"""A program as columns: what takes time, on which lane, and what must have ended before.

A lane does one row at a time, in order. The first lanes are the devices with their computations;
then come the links, one for each pair of devices and direction, with a row for each transfer; then
what else goes on beside computation. ::

    lane 0        device 0            0F0   0F1   0B0 ...
    lane 1        device 1                  1F0   1B0   1F1 ...
    lane 2        link 0 to 1            0F0   0F1 ...
    lane 3        link 1 to 0                        1B0 ...
    further       OFFLOAD of device d, RELOAD of device d, the network of device d (UNSHARD,
                  REDUCE_GRAD; with copies of the model one each), SHARE_F, SUM_S, SUM_T

Only the structure is here, no seconds: the rows of a program are made once and replayed under any
costs. `needed` is the array form of what `Layout.reads` says of values that cross stages.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from adaptis.errors import ProgramError
from adaptis.program import (
    BACKWARDS,
    OPS,
    Compute,
    Copy,
    Join,
    Kind,
    Op,
    Overlap,
    Receive,
    Shard,
    Sharding,
    Together,
    Way,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from adaptis.program import Instruction, Layout, Program

    Ints = NDArray[np.int64]

F, B, I, W, R, S, T = (OPS.index(op) for op in Op)  # noqa: E741 - the letters of the field
# What is no computation: codes beyond those of OPS.
_OTHERS = (*Way, *Sharding, Together.SHARE, Together.SUM_S, Together.SUM_T)
_CODES = {name: code for code, name in enumerate((*OPS, *_OTHERS))}
OFFLOAD, RELOAD, GATHER, FREE, REDUCE, SHARE, SUM_S, SUM_T = (_CODES[name] for name in _OTHERS)
TRANSFER = len(_CODES)


class Extra(NamedTuple):
    """Something beside computation, as it stands in the program of a device."""

    code: int
    device: int
    stage: int
    microbatch: int
    behind: int  # the device's computations before it have the rows up to this one; -1: none


@dataclass(frozen=True, eq=False)
class Columns:
    """The computations of a program, device after device, and what stands between them."""

    offsets: Ints  # (D + 1,) the rows of device d: offsets[d] to offsets[d + 1]
    op: NDArray[np.int8]  # (n,) index in OPS
    stage: NDArray[np.int32]
    microbatch: NDArray[np.int32]
    partner: NDArray[np.int32]  # the other part of a fused pair, -1: none
    posted: NDArray[np.int32]  # the row before which the receive for row i was posted, -1: none
    extras: tuple[Extra, ...] = ()
    freed: tuple[Extra, ...] = ()  # where gathered parameters are forgotten

    @property
    def device(self) -> Ints:
        """(n,) where each row runs."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))


@dataclass(frozen=True, eq=False)
class Rows:
    """Everything that takes time; the first rows are those of `columns`."""

    columns: Columns
    layout: Layout
    offsets: Ints  # (L + 1,) the rows of each lane
    op: NDArray[np.int8]  # (N,) index in OPS, or TRANSFER, ...
    stage: NDArray[np.int32]  # of a transfer: that wrote the value
    microbatch: NDArray[np.int32]
    source: NDArray[np.int32]  # the device; of a transfer the sending one
    target: NDArray[np.int32]  # of a transfer the receiving one, else as `source`
    need_offsets: Ints  # (N + 1,) row i needs the rows needs[need_offsets[i] : need_offsets[i + 1]]
    needs: NDArray[np.int32]  # of other lanes
    transfer: NDArray[np.int32]  # (n,) the row that carries what computation i reads, -1: none
    sent: NDArray[np.int32]  # (n,) the row that carries what computation i writes, -1: none
    onwards: NDArray[np.bool_]  # (k,) whether a transfer carries an output, or an input gradient

    @property
    def num_computations(self) -> int:
        """How many rows are computations."""
        return len(self.columns.op)

    @property
    def num_transfers(self) -> int:
        """How many rows, right after the computations, are transfers."""
        return len(self.onwards)

    @property
    def num_devices(self) -> int:
        """How many lanes are devices."""
        return len(self.columns.offsets) - 1


_MADE: dict[int, Rows] = {}  # by identity: hashing a program would cost as much as its rows


def rows_of(program: Program) -> Rows:
    """The rows of `program`, made once for each program."""
    name = id(program)
    if name not in _MADE:
        _MADE[name] = make_rows(columns_of(program), program.layout)
        weakref.finalize(program, _MADE.pop, name, None)
    return _MADE[name]


def columns_of(program: Program) -> Columns:
    """The columns of `program`."""
    walk = _Walk()
    offsets = [0]
    for device, instructions in enumerate(program.devices):
        walk.device(device, instructions)
        offsets.append(len(walk.table))
    array = np.array(walk.table, dtype=np.int32).reshape(-1, 5)
    return Columns(
        np.array(offsets, dtype=np.int64),
        array[:, 0].astype(np.int8),
        *(np.ascontiguousarray(array[:, column]) for column in range(1, 5)),
        extras=tuple(walk.extras),
        freed=tuple(walk.freed),
    )


class _Walk:
    """One pass over the instructions."""

    def __init__(self) -> None:
        self.table: list[tuple[int, int, int, int, int]] = []  # as the columns of `Columns`
        self.extras: list[Extra] = []
        self.freed: list[Extra] = []

    def device(self, device: int, instructions: Iterable[Instruction]) -> None:
        """All of one device."""
        table, posted = self.table, {}
        first = len(table)
        for item in instructions:
            here = len(table)
            match item:
                case Compute():
                    table.append(_columns(item, -1, posted))
                case Overlap(one, two):
                    table.append(_columns(one, here + 1, posted))
                    table.append(_columns(two, here, posted))
                case Receive(value):
                    posted[value.kind, value.stage, value.microbatch] = here
                case Join(what, stage, microbatch):
                    if what is Together.TAKE:
                        posted[Kind.OUTPUT, stage - 1, microbatch] = here
                    else:
                        self._extra(_CODES[what], device, stage, microbatch, first)
                case Copy(way, stage, microbatch):
                    self._extra(_CODES[way], device, stage, microbatch, first)
                case Shard(what, stage):
                    self._extra(_CODES[what], device, stage, 0, first)
                case _:
                    pass

    def _extra(self, code: int, device: int, stage: int, microbatch: int, first: int) -> None:
        behind = len(self.table) - 1
        extra = Extra(code, device, stage, microbatch, behind if behind >= first else -1)
        (self.freed if code == FREE else self.extras).append(extra)


def _columns(
    compute: Compute, partner: int, posted: dict[tuple[Kind, int, int], int]
) -> tuple[int, int, int, int, int]:
    """The row of a computation; its receive stands before it on its device."""
    op, stage, microbatch = compute.op, compute.stage, compute.microbatch
    asked = -1
    if posted and op in (Op.FORWARD, Op.SCORES):
        asked = posted.pop((Kind.OUTPUT, stage - 1, microbatch), -1)
    elif posted and op in BACKWARDS:
        asked = posted.pop((Kind.INPUT_GRAD, stage + 1, microbatch), -1)
    return _CODES[op], stage, microbatch, partner, asked


def written(
    op: NDArray[np.int8],
    stage: NDArray[np.int32],
    microbatch: NDArray[np.int32],
    layout: Layout,
) -> tuple[Ints, Ints]:
    """The rows that leave outputs, and input gradients; -1: none.

    Both (S + 2, m), with stage s in row s + 1.
    """
    index = np.arange(len(op))
    tables = []
    for mask in (op == F, (op == B) | (op == I)):
        table = np.full((layout.num_stages + 2, layout.num_microbatches), -1, dtype=np.int64)
        table[stage[mask] + 1, microbatch[mask]] = index[mask]
        tables.append(table)
    return tables[0], tables[1]


def needed(
    op: NDArray[np.int8],
    stage: NDArray[np.int32],
    microbatch: NDArray[np.int32],
    layout: Layout,
) -> Ints:
    """(n,) the row that writes what row i reads from another stage, -1: none.

    The array form of what `Layout.reads` says of outputs and input gradients. A micro-batch goes
    through one copy of the model, so what would pass from copy to copy is never there.
    """
    output, gradient = written(op, stage, microbatch, layout)
    result = np.full(len(op), -1, dtype=np.int64)
    forward, backward = (op == F) | (op == S), (op == B) | (op == I)
    result[forward] = output[stage[forward], microbatch[forward]]
    result[backward] = gradient[stage[backward] + 2, microbatch[backward]]
    return result


def make_rows(columns: Columns, layout: Layout) -> Rows:
    """All rows of what `columns` says, the transfers first among those that are no computations.

    Raises:
        ProgramError: a device computes something before what it needs.
    """
    op, stage, device, n = columns.op, columns.stage, columns.device, len(columns.op)
    index = np.arange(n)
    alone = columns.partner < 0
    begins = np.where(alone, index, np.minimum(index, columns.partner))  # of a fused pair: together
    ends = np.where(alone, index, np.maximum(index, columns.partner))
    need = needed(op, stage, columns.microbatch, layout)
    remote = (need >= 0) & (device[need] != device)
    if (ends[need] >= begins)[(need >= 0) & ~remote].any():
        raise ProgramError("a device waits for ever for itself; `adaptis check` says for what")
    readers = np.flatnonzero(remote & (op != S))
    writers = need[readers]
    link = device[writers] * (len(columns.offsets) - 1) + device[readers]
    order = np.lexsort((writers, link))
    readers, writers, link = readers[order], writers[order], link[order]
    carried = n + np.arange(len(readers))
    transfer, sent = np.full(n, -1, np.int32), np.full(n, -1, np.int32)
    transfer[readers], sent[writers] = carried, carried
    beside = _beside(columns, layout, begins, ends, n + len(readers))
    edges = [
        np.stack([begins[readers], carried]),
        np.stack([carried, ends[writers]]),
        np.array(beside.edges, dtype=np.int64).reshape(-1, 2).T,
    ]
    total = n + len(readers) + len(beside.table)
    need_offsets, needs = _grouped(np.concatenate(edges, axis=1), total)
    others = np.array(beside.table, dtype=np.int32).reshape(-1, 4)

    def column(of_devices: Any, of_links: Any, k: int) -> NDArray[np.int32]:
        return np.concatenate([of_devices, of_links, others[:, k]]).astype(np.int32)

    lanes = [np.diff(columns.offsets), np.unique(link, return_counts=True)[1], beside.lanes]
    return Rows(
        columns=columns,
        layout=layout,
        offsets=np.cumsum([0, *np.concatenate(lanes)]).astype(np.int64),
        op=column(op, np.full(len(link), TRANSFER), 0).astype(np.int8),
        stage=column(stage, stage[writers], 1),
        microbatch=column(columns.microbatch, columns.microbatch[writers], 2),
        source=column(device, device[writers], 3),
        target=column(device, device[readers], 3),
        need_offsets=need_offsets,
        needs=needs,
        transfer=transfer,
        sent=sent,
        onwards=op[writers] == F,
    )


def _grouped(edges: Ints, count: int) -> tuple[Ints, NDArray[np.int32]]:
    """(row, need) pairs as one run of needs for each row."""
    if (np.diff(edges[0]) < 0).any():
        edges = edges[:, np.argsort(edges[0], kind="stable")]
    offsets = np.zeros(count + 1, dtype=np.int64)
    np.cumsum(np.bincount(edges[0], minlength=count), out=offsets[1:])
    return offsets, edges[1].astype(np.int32)


class _Beside(NamedTuple):
    """The rows of copies, networks and collectives."""

    table: list[tuple[int, int, int, int]]  # code, stage, micro-batch, device
    lanes: list[int]  # how many rows each lane has
    edges: list[tuple[int, int]]  # row, need


OF_ALL = (SHARE, SUM_S, SUM_T)  # one row for all devices


def _beside(columns: Columns, layout: Layout, begins: Ints, ends: Ints, first: int) -> _Beside:
    """What goes on beside computation; rare, and therefore plain Python.

    A row begins when the computation before its instruction has ended, on every device that has
    part in it, and its lane is free.
    """

    def lane(extra: Extra) -> tuple[int, int]:
        # With copies a reduction waits for other devices, which may wait for what is gathered here.
        network = extra.code == GATHER or (extra.code == REDUCE and layout.copies == 1)
        return GATHER if network else extra.code, -1 if extra.code in OF_ALL else extra.device

    def key(extra: Extra) -> tuple[int, ...]:
        again = extra.behind if extra.code == GATHER else 0
        return *lane(extra), extra.code, extra.stage, extra.microbatch, again

    distinct: dict[tuple[int, ...], Extra] = {}
    for extra in columns.extras:
        distinct.setdefault(key(extra), extra)
    ordered = sorted(distinct.values(), key=lane)
    number = {key(extra): first + i for i, extra in enumerate(ordered)}
    readers = _Readers(columns, layout) if ordered else None
    edges = []
    for extra in columns.extras:
        row = number[key(extra)]
        if extra.behind >= 0:
            edges.append((row, int(ends[extra.behind])))
        if readers:
            edges += [(int(begins[reader]), row) for reader in readers.of(extra) if reader >= 0]
        if extra.code == RELOAD:
            edges.append((row, number[key(extra._replace(code=OFFLOAD))]))
        if extra.code == REDUCE and layout.copies > 1:
            twins = [e for e in columns.extras if e.code == REDUCE and e.behind >= 0]
            same = extra.stage % layout.length
            edges += [(row, int(ends[e.behind])) for e in twins if e.stage % layout.length == same]
    return _Beside(
        [(e.code, e.stage, e.microbatch, e.device) for e in ordered],
        [len(list(group)) for _, group in groupby(ordered, key=lane)],
        sorted(set(edges)),
    )


class _Readers:
    """Which computations wait for what goes on beside computation."""

    def __init__(self, columns: Columns, layout: Layout) -> None:
        self._columns, self._layout = columns, layout
        self._device = columns.device
        _, self._gradient = written(columns.op, columns.stage, columns.microbatch, layout)
        self._head: dict[tuple[int, int], list[int]] = {}
        for row in np.flatnonzero((columns.op == S) | (columns.op == T)):
            place = int(columns.op[row]), int(columns.microbatch[row])
            self._head.setdefault(place, []).append(int(row))
        self._of_stage: dict[int, Ints] = {}

    def of(self, extra: Extra) -> list[int]:
        """The computations that wait for `extra`."""
        code, device, stage, m = extra.code, extra.device, extra.stage, extra.microbatch
        backward = [int(self._gradient[stage + (1 if code == RELOAD else 0), m])]
        if code in (RELOAD, SUM_T):
            return backward
        if code == SUM_S:
            return self._head.get((T, m), []) + backward * (self._layout.reductions == 1)
        if code == SHARE:
            return [row for row in self._head.get((S, m), []) if self._device[row] != device]
        if code == GATHER:
            if stage not in self._of_stage:
                self._of_stage[stage] = np.flatnonzero(self._columns.stage == stage)
            rows = self._of_stage[stage]
            return rows[np.searchsorted(rows, extra.behind, side="right") :][:1].tolist()
        return []

"""What the ranks settle between the last backward and the optimizer: shared gradients, the norm.

A parameter that several ranks hold whole (tied embedding and head, copies of a stage) gets the sum
of their gradients, in the order of the ranks. Of a weight that is tied to a sharded head, some rank
holds all rows and each other rank the head's rows: theirs are added at the first whole holder,
which gives each of them the sums for its rows. After that everybody who holds a value updates it
alike, as long as the optimizer treats each element by itself.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from adaptis.execute.device import synchronise
from adaptis.execute.mesh import refuse_unlike
from adaptis.execute.units import layout_of, local, place
from adaptis.execute.wire import wire_of
from adaptis.profile import typical

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from adaptis.execute.mesh import Mesh
    from adaptis.execute.rows import Rows
    from adaptis.execute.world import World

_TAG = 1 << 30  # above every tag of the transport


class _Piece(NamedTuple):
    """Rows of a weight that is whole on `owner`; they are on `holder`."""

    owner: int
    holder: int
    name: str  # of the whole
    key: str  # of the rows
    start: int
    stop: int


class Gradients:
    """The gradients of one rank, among those of the others."""

    def __init__(
        self, mesh: Mesh, parameters: Mapping[str, nn.Parameter], rows: Mapping[str, Rows]
    ) -> None:
        """Find out who holds what; every rank calls this.

        Args:
            mesh: the ranks; what follows is about those of this row.
            parameters: of this rank, those named in `rows` among them.
            rows: those parameters that are a part of another one.
        """
        self._mesh, self._world = mesh, mesh.row
        self._parameters = {n: p for n, p in parameters.items() if p.requires_grad}
        mine = {
            "whole": {n: layout_of(p) for n, p in self._parameters.items() if n not in rows},
            "rows": [
                [k, r.name, r.start, r.stop] for k, r in rows.items() if k in self._parameters
            ],
        }
        found = [json.loads(text) for text in self._world.gather(json.dumps(mine))]
        holders: dict[str, list[int]] = {}
        for rank, entry in enumerate(found):
            for name in entry["whole"]:
                holders.setdefault(name, []).append(rank)
        self._pieces = [
            _Piece(holders[name][0], rank, name, key, start, stop)
            for rank, entry in enumerate(found)
            for key, name, start, stop in entry["rows"]
            if name in holders
        ]
        for name, ranks in holders.items():
            refuse_unlike(name, [found[rank]["whole"][name] for rank in ranks])
        self.shared = [(name, ranks) for name, ranks in holders.items() if len(ranks) > 1]
        elsewhere = {name for name, ranks in self.shared if ranks[0] != self._world.rank}
        elsewhere |= {piece.key for piece in self._pieces}
        self._wire = wire_of(self._world)
        self._wire.prepare(self._links())
        self._counted = [
            p for name, p in self._parameters.items() if name not in elsewhere and mesh.counts(p)
        ]

    def _links(self) -> set[tuple[int, int]]:
        """Between which ranks something passes, either way."""
        pairs = [(piece.owner, piece.holder) for piece in self._pieces]
        pairs += [pair for _, ranks in self.shared for pair in itertools.combinations(ranks, 2)]
        return {link for a, b in pairs for link in ((a, b), (b, a))}

    @torch.no_grad()
    def settle(self) -> None:
        """Sum what several ranks hold."""
        self._world.progress.waits()
        for parameter in self._parameters.values():
            place(parameter)
        self._collect_pieces()
        self._sum_shared()
        self._hand_out_pieces()
        self._world.progress.resumes()

    @torch.no_grad()
    def clip(self, max_norm: float) -> float:
        """Scale all gradients so that their norm is at most `max_norm`; the norm before.

        What several ranks hold counts once.
        """
        own = [local(p.grad) for p in self._counted if p.grad is not None]
        norms = [torch.linalg.vector_norm(gradient) for gradient in own]
        squares = float(torch.stack(norms).double().square().sum()) if norms else 0.0
        norm = math.sqrt(self._mesh.sum(squares))
        scale = max_norm / (norm + 1e-6)  # as torch.nn.utils.clip_grad_norm_
        if not scale >= 1.0:
            for parameter in self._parameters.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
        return norm

    def _collect_pieces(self) -> None:
        works, arrived = [], []
        for index, piece in enumerate(self._pieces):
            tag = _TAG + index
            if self._world.rank == piece.holder:
                works.append(
                    self._wire.isend(_gradient(self._parameters[piece.key]), piece.owner, tag)
                )
            elif self._world.rank == piece.owner:
                whole = _gradient(self._parameters[piece.name])
                buffer = torch.empty_like(whole[piece.start : piece.stop])
                arrived.append((piece, buffer, self._wire.irecv(buffer, piece.holder, tag)))
        for piece, buffer, work in arrived:
            _wait(work)
            _gradient(self._parameters[piece.name])[piece.start : piece.stop] += buffer
        for work in works:
            _wait(work)

    def _hand_out_pieces(self) -> None:
        works = []
        for index, piece in enumerate(self._pieces):
            tag = _TAG + index
            if self._world.rank == piece.owner:
                rows = _gradient(self._parameters[piece.name])[piece.start : piece.stop]
                works.append((self._wire.isend(rows, piece.holder, tag), rows))
            elif self._world.rank == piece.holder:
                rows = _gradient(self._parameters[piece.key])
                works.append((self._wire.irecv(rows, piece.owner, tag), rows))
        for work, _ in works:
            _wait(work)

    def _sum_shared(self) -> None:
        """All at once on the wire; each sum in the order of the ranks."""
        sends, arriving = [], []
        for index, (name, holders) in enumerate(self.shared):
            if self._world.rank not in holders:
                continue
            own, tag = _gradient(self._parameters[name]), _TAG + len(self._pieces) + index
            terms: list[tuple[Tensor, Any]] = []
            for rank in holders:
                if rank == self._world.rank:
                    terms.append((own, None))
                else:
                    sends.append(self._wire.isend(own, rank, tag))
                    other = torch.empty_like(own)
                    terms.append((other, self._wire.irecv(other, rank, tag)))
            arriving.append((own, terms))
        for work in sends:
            _wait(work)  # what leaves must not change before
        for own, terms in arriving:
            for _, work in terms:
                _wait(work)
            _sum(own, [term for term, _ in terms])


def _sum(own: Tensor, terms: Sequence[Tensor]) -> None:
    """The sum of `terms` in their order, in `own`, which is one of them; the others are spent."""
    total, *rest = terms
    if rest[0] is own:
        total, rest[0] = own, total  # of two numbers the order makes no difference
    for term in rest:
        total += term
    if total is not own:
        own.copy_(total)


def measure_sum(world: World, num_bytes: int, rounds: int = 10) -> float:
    """Seconds in which two ranks sum a gradient of so many bytes that both hold.

    Every rank calls this; they do it two by two, each with its neighbour.
    """
    own = torch.zeros(max(num_bytes // 4, 1), device=world.device)
    wire, other = wire_of(world), world.rank ^ 1
    pairs = [(left, left + 1) for left in range(0, world.size - 1, 2)]
    wire.prepare([link for a, b in pairs for link in ((a, b), (b, a))])
    times = []
    for _ in range(rounds):
        world.barrier()
        begin = time.perf_counter()
        if other < world.size:
            sent = wire.isend(own, other, _TAG)
            term = torch.empty_like(own)
            arriving = wire.irecv(term, other, _TAG)
            _wait(sent)
            _wait(arriving)
            _sum(own, [own, term])
            synchronise(world.device)
        times.append(time.perf_counter() - begin)
    return typical(times)


def _gradient(parameter: nn.Parameter) -> Tensor:
    """This rank's part of the gradient; zeros where no micro-batch has left one."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return local(parameter.grad)


def _wait(work: Any) -> None:
    if work is not None:
        work.wait()

"""What the running ranks spend beside computing: on transfers, and on the executor's own loop.

Needs an initialised process group. Between idle processes a transfer is fast, and so is a loop that
does nothing else; between computations both find the caches cold and, over a network, its threads
wait for a core. So the ranks compute meanwhile. Each rank is measured with the next one; the
slowest pair counts.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from adaptis.cluster import Link
from adaptis.execute.device import synchronise
from adaptis.execute.executor import Executor
from adaptis.execute.offload import HostMemory
from adaptis.execute.transport import WireTransport
from adaptis.execute.wire import TorchWire, wire_of
from adaptis.lower import lower
from adaptis.plan import Plan, Stage
from adaptis.profile import typical
from adaptis.program import Compute, Op

if TYPE_CHECKING:
    from collections.abc import Callable

    from adaptis.execute.wire import Wire, Work
    from adaptis.execute.world import World

SMALL = 4096  # bytes
ROUNDS = 30
BUSY = 2e-3  # seconds of computation beside each transfer
_TAG = (1 << 30) - 1


@dataclass(frozen=True, slots=True)
class LinkCost:
    """One directed link, and what a transfer costs the two ends' processors; seconds.

    A value is at a waiting reader's after `send` + the link's latency and bytes + `receive`.
    """

    link: Link
    send: float
    receive: float


def measure_links(
    world: World, num_bytes: int, beside: Callable[[float], None] | None = None
) -> LinkCost:
    """Measure with messages of `num_bytes`, those that the layers exchange.

    Every rank calls this. `beside` is what the ranks do for some seconds meanwhile; None: compute.
    """
    num_bytes = max(num_bytes, 2 * SMALL)
    wire, slowest = wire_of(world), LinkCost(Link(), 0.0, 0.0)
    pairs = [(left, left + 1) for left in range(world.size - 1)]
    wire.prepare([link for a, b in pairs for link in ((a, b), (b, a))])
    for left in range(world.size - 1):
        world.barrier()
        mine = [0.0] * 6
        if world.rank in (left, left + 1):
            other, first = 2 * left + 1 - world.rank, world.rank == left
            compute = beside or partial(_compute, world.device)
            pair = _Pair(wire, compute, other, world.device, first=first)
            mine = [x for size in (SMALL, num_bytes) for x in pair.cost(size)]
        found = [json.loads(text) for text in world.gather(json.dumps(mine))]
        columns = [max(column) for column in zip(*found, strict=True)]
        small, large = (
            max(way - send - receive, 0.0) for way, send, receive in (columns[:3], columns[3:])
        )
        _, send, receive = columns[3:]
        per_byte = max(large - small, 1e-9) / (num_bytes - SMALL)
        link = Link(max(small - SMALL * per_byte, 0.0), 1.0 / per_byte)
        if link.seconds(num_bytes) >= slowest.link.seconds(num_bytes):
            slowest = LinkCost(link, send, receive)
    return slowest


class _Busy:
    """A stage that computes, and does nothing with it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def forward(self, *_: Any) -> None:
        _compute(self._device, BUSY)

    def backward(self, *_: Any) -> None:
        _compute(self._device, BUSY)


def measure_loop(world: World) -> float:
    """Seconds that pass on this rank between two computations that wait for nothing."""
    order = [Compute(op, 0, m) for m in range(ROUNDS) for op in (Op.FORWARD, Op.BACKWARD)]
    program = lower(Plan(ROUNDS, (Stage(0, 1, 0),), (tuple(order),)))
    stages: dict[int, Any] = {0: _Busy(world.device)}
    transport = WireTransport(1, ROUNDS, TorchWire())
    executor = Executor(program, 0, stages, transport, world.progress, host=HostMemory())
    rows = executor.run([{}] * ROUNDS, 1.0, 0, lambda: None)
    return typical([begin - end for (_, _, end), (_, begin, _) in pairwise(rows)])


def _compute(device: torch.device, seconds: float) -> None:
    """So long, and with so much memory that little else stays in the caches."""
    values, end = torch.ones(1 << 19, device=device), time.perf_counter() + seconds
    while time.perf_counter() < end:
        values.mul_(1.0)
        synchronise(device)


class _Pair:
    """This rank and its neighbour."""

    def __init__(
        self,
        wire: Wire,
        beside: Callable[[float], None],
        other: int,
        device: torch.device,
        *,
        first: bool,
    ) -> None:
        self.wire, self.other, self.first = wire, other, first
        self._beside, self._device = beside, device
        self._offset = self._clock_offset()

    def _isend(self, tensor: torch.Tensor) -> Work:
        return self.wire.isend(tensor, self.other, _TAG)

    def _irecv(self, tensor: torch.Tensor) -> Work:
        return self.wire.irecv(tensor, self.other, _TAG)

    def _wait(self, work: Work) -> None:
        """Until it is done, not only queued."""
        work.wait()
        synchronise(self._device)

    def _clock_offset(self) -> float:
        """The other's clock minus ours, seconds; from the fastest of several round trips."""
        stamp = torch.zeros(1, dtype=torch.float64, device=self._device)
        trips = []
        for _ in range(ROUNDS):
            if self.first:
                begin = time.perf_counter()
                self._isend(stamp).wait()
                self._wait(self._irecv(stamp))
                end = time.perf_counter()
                trips.append((end - begin, float(stamp) - (begin + end) / 2))
            else:
                self._wait(self._irecv(stamp))
                stamp[0] = time.perf_counter()
                self._isend(stamp).wait()
        return min(trips)[1] if trips else 0.0

    def cost(self, num_bytes: int) -> tuple[float, float, float]:
        """Seconds of the whole way (0 on the second rank), and of both ends' processors."""
        return self.one_way(num_bytes), *self.exchange(num_bytes)

    def one_way(self, num_bytes: int) -> float:
        """Seconds from the start of a send to the arrival at a waiting rank; 0 on that one."""
        message = torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)
        token = torch.zeros(1, device=self._device)
        stamps = torch.zeros(ROUNDS, dtype=torch.float64)
        for i in range(ROUNDS):
            if self.first:
                self._wait(self._irecv(token))
                stamps[i] = time.perf_counter()
                work = self._isend(message)
                self._beside(BUSY)
                work.wait()
            else:
                work = self._irecv(message)
                self._isend(token).wait()
                self._wait(work)
                stamps[i] = time.perf_counter()
        if not self.first:
            self._isend(stamps.to(self._device)).wait()
            return 0.0
        arrivals = torch.zeros_like(stamps, device=self._device)
        self._irecv(arrivals).wait()
        return max(typical((arrivals.cpu() - stamps - self._offset).tolist()), 0.0)

    def exchange(self, num_bytes: int) -> tuple[float, float]:
        """Seconds that a send and a receive cost, when both ends compute and nobody waits."""
        out, back = (
            torch.zeros(num_bytes, dtype=torch.uint8, device=self._device) for _ in range(2)
        )
        sends, receives = [], []
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            arriving = self._irecv(back)
            posted = time.perf_counter() - begin
            self._beside(BUSY)
            begin = time.perf_counter()
            leaving = self._isend(out)
            sends.append(time.perf_counter() - begin)
            self._beside(2 * BUSY)
            begin = time.perf_counter()
            arriving.wait()
            receives.append(posted + time.perf_counter() - begin)
            leaving.wait()
        return typical(sends), typical(receives)

"""DualPipe and DualPipe-V: forward of one micro-batch and backward of another run as one."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from adaptis.program import Compute, Op, Overlap
from adaptis.schedules.shape import by_rank

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adaptis.program import Work
    from adaptis.schedules.shape import Shape


class _Rank:
    """What comes next on one rank, in each of two phases: a stage and its micro-batches."""

    def __init__(self, *phases: tuple[int, range]) -> None:
        self.stages = [stage for stage, _ in phases]
        self.forwards = [iter(microbatches) for _, microbatches in phases]
        self.backwards = [iter(microbatches) for _, microbatches in phases]
        self.due: deque[Compute] = deque()  # weight halves

    def forward(self, phase: int) -> Compute:
        return Compute(Op.FORWARD, self.stages[phase], next(self.forwards[phase]))

    def backward(self, phase: int) -> Compute:
        return Compute(Op.BACKWARD, self.stages[phase], next(self.backwards[phase]))

    def half(self, phase: int) -> Compute:
        """A backward whose weight half is left for later."""
        whole = self.backward(phase)
        self.due.append(Compute(Op.BACKWARD_WEIGHT, whole.stage, whole.microbatch))
        return Compute(Op.BACKWARD_INPUT, whole.stage, whole.microbatch)

    def pair(self, phase: int) -> Overlap:
        """A forward of this phase with a backward of the other."""
        return Overlap(self.forward(phase), self.backward(1 - phase))


def _both(rank: int, p: int, n: int, todo: _Rank) -> Iterator[Work]:
    """Rank `rank` of p, with n micro-batches in each phase; the steps are the paper's."""
    after = p - 1 - rank
    for _ in range(2 * after):  # 1: only phase 0 has anything to do
        yield todo.forward(0)
    for _ in range(rank + 1):  # 2
        yield from (todo.forward(0), todo.forward(1))
    for _ in range(after):  # 3
        yield from (todo.half(1), todo.due.popleft(), todo.forward(1))
    for i in range(n - 2 * p + rank + 1):  # 4: the steady state
        if i == 0 and after == 0:
            yield from (todo.forward(0), todo.backward(1))
        else:
            yield todo.pair(0)
        yield todo.pair(1)
    for _ in range(after):  # 5
        yield from (todo.backward(1), todo.pair(1))
    for i in range(2 * rank + 2):  # 6: phases 1 and 0 in turn; W's are put off from half-way on
        one = todo.backward if i <= rank else todo.half
        yield one((i + 1) % 2)
    for _ in range(after):  # 7
        yield from (todo.due.popleft(), todo.half(0))
    yield from todo.due  # 8


@by_rank
def dualpipe_v(rank: int, shape: Shape) -> Iterator[Work]:
    """A V of two chunks: the forward of one is fused with the backward of the other.

    Drawn for p = 2, m = 4, v = 2, F = I = W and nothing hidden by a pair: ::

        rank 0 | 0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3 3B1----     3F2 0B0---- 3B2----     3F3 0B1---- 3B3---- 0I2 0W2 0I3 0W3
        rank 1 |     1F0 2F0 1F1 2F1 1F2 2B0---- 2F2 1B0---- 1F3 2B1---- 2F3 1B1---- 2B2---- 1B2----     2I3 1I3 2W3 1W3

    Bubble (p - 1)(X + B - 3 W) / 2 at most, where X is F + B less what pairs hide, and exactly that
    for F = I = W with nothing hidden. Every rank holds 2 p + 1 chunks, as many bytes as p + 1/2
    micro-batches.

    References: Qi et al., "DualPipe could be better without the Dual", 2025.
    """  # noqa: E501 - the drawing is as wide as the schedule is long
    p, m = shape.p, shape.m
    yield from _both(rank, p, m, _Rank((rank, range(m)), (2 * p - 1 - rank, range(m))))


@by_rank
def dualpipe(rank: int, shape: Shape) -> Iterator[Work]:
    """Two copies in opposite directions: the forward of one is fused with the other's backward.

    Drawn for p = 2, m = 4, v = 2, F = I = W and nothing hidden by a pair: ::

        rank 0 | 0F0 3F1 0F2 3B1---- 3F3 0B0---- 3B3---- 0I2 0W2
        rank 1 | 2F1 1F0 2F3 1B0---- 1F2 2B1---- 1B2---- 2I3 2W3

    Rank r and rank p - 1 - r hold the same two stages, and each does what DualPipe-V does on p / 2
    ranks. Stage s of the copy that goes up has the number p + s, and its micro-batches are odd.

    Bubble (p / 2 - 1)(X + B - 3 W) at most, where X is F + B less what pairs hide; p + 1
    micro-batches on every rank. The weights are there twice.

    References: DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, section 3.2.1.
    """
    p, m = shape.p, shape.m
    near = min(rank, p - 1 - rank)
    down, up = (rank, range(0, m, 2)), (2 * p - 1 - rank, range(1, m, 2))
    yield from _both(near, p // 2, m // 2, _Rank(*((down, up) if rank == near else (up, down))))


def full_pipeline(shape: Shape) -> str:
    """What is missing to have all ranks busy in both phases."""
    if shape.m >= 2 * shape.p:
        return ""
    return f"at least {2 * shape.p} micro-batches on {shape.p} devices, found {shape.m}"


def two_full_pipelines(shape: Shape) -> str:
    """What is missing to have all ranks busy in both directions."""
    if shape.p % 2:
        return f"an even number of devices, found {shape.p}"
    if shape.m % 2:
        return f"an even number of micro-batches, found {shape.m}"
    return full_pipeline(shape)

"""Schedules: generators of computations, one small function each, with its drawing and its paper.

A schedule knows nothing of transfers, torch or time: it yields what each rank computes, in order.
`SCHEDULES` is the table that the command line, the planner, the tests and the docs loop over;
`docs/write-a-schedule.md` shows how to add to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptis.errors import PlanError
from adaptis.schedules.bitpipe import bitpipe
from adaptis.schedules.breadth_first import breadth_first
from adaptis.schedules.chimera import chimera, whole_units
from adaptis.schedules.dualpipe import dualpipe, dualpipe_v, full_pipeline, two_full_pipelines
from adaptis.schedules.gis import gis, room_for_half
from adaptis.schedules.gpipe import gpipe
from adaptis.schedules.hanayo import hanayo
from adaptis.schedules.interleaved import interleaved
from adaptis.schedules.one_f_one_b import one_f_one_b, one_f_one_b_eager
from adaptis.schedules.shape import Shape, both_ways, loop, wave
from adaptis.schedules.slices import seq1f1b, slimpipe, terapipe, whole_groups, whole_rounds
from adaptis.schedules.v_family import v_half, v_min
from adaptis.schedules.v_search import room_for_a_v, v_search
from adaptis.schedules.zb_auto import zb_auto
from adaptis.schedules.zb_v import zb_v
from adaptis.schedules.zero_bubble import zb_h1, zb_h2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from adaptis.program import Work

MANY = 1 << 16
ONE, TWO, FOUR = range(1, 2), range(2, 3), range(4, 5)  # stages per rank
ANY, SEVERAL, EVEN = range(1, MANY), range(2, MANY), range(2, MANY, 2)


@dataclass(frozen=True, slots=True)
class Schedule:
    """One named order, and when it applies."""

    name: str
    generate: Callable[[Shape], Iterable[Iterable[Work]]]
    paper: str
    bubble: str  # idle seconds of a rank, for F, I, W (B = I + W) of a rank and micro-batch
    memory: str  # the most that a rank holds, in activations of its whole share of the layers
    use: str  # when to take it
    chunks: range = ONE  # how many stages per rank it is for
    placement: Callable[[Shape], tuple[int, ...]] = loop
    copies: int = 1  # of the model's weights
    sliced: bool = False  # whether micro-batches come in slices
    needs: Callable[[Shape], str] = lambda shape: ""  # what else it needs and does not have

    def orders(self, shape: Shape) -> tuple[tuple[Work, ...], ...]:
        """The computations of each rank.

        Raises:
            PlanError: the schedule does not exist for these numbers.
        """
        lacking = self.lacks(shape)
        if lacking:
            raise PlanError(f"{self.name} needs {lacking}")
        return tuple(tuple(order) for order in self.generate(shape))

    def lacks(self, shape: Shape) -> str:
        """What the schedule would need and `shape` does not have; empty if it can be made."""
        if min(shape.p, shape.m, shape.v, shape.s) < 1:
            return f"at least one rank, micro-batch, stage per rank and slice, found {shape}"
        if shape.v not in self.chunks:
            allowed = ", ".join(map(str, self.chunks[:3]))
            more = ", ..." if len(self.chunks) > 3 else ""
            return f"{allowed}{more} stages per device, found {shape.v}"
        if shape.s > 1 and not self.sliced:
            return f"whole micro-batches, found {shape.s} slices each"
        return self.needs(shape)


def _whole_groups(shape: Shape) -> str:
    if shape.v == 1 or shape.m % shape.p == 0:
        return ""
    return f"a multiple of {shape.p} micro-batches on {shape.p} devices, found {shape.m}"


def _some_room(shape: Shape) -> str:
    if shape.most is None or shape.most > 0:
        return ""
    return f"room for at least one micro-batch, found {shape.most}"


SCHEDULES: dict[str, Schedule] = {
    schedule.name: schedule
    for schedule in (
        Schedule(
            "gpipe",
            gpipe,
            "Huang et al., GPipe, NeurIPS 2019",
            bubble="(p - 1)(F + B)",
            memory="m",
            use="a baseline; needs all activations at once",
        ),
        Schedule(
            "1f1b",
            one_f_one_b,
            "Narayanan et al., PipeDream, SOSP 2019",
            bubble="(p - 1)(F + B)",
            memory="p - r",
            use="few stages, little memory",
            needs=_some_room,
        ),
        Schedule(
            "1f1b-eager",
            one_f_one_b_eager,
            "Fan et al., DAPPLE, PPoPP 2021",
            bubble="(p - 1)(F + B)",
            memory="2 (p - r) - 1",
            use="1F1B where transfers take about as long as computations",
            needs=_some_room,
        ),
        Schedule(
            "interleaved",
            interleaved,
            "Narayanan et al., Megatron-LM, SC 2021",
            bubble="(p - 1)(F + B) / v",
            memory="(p v + p - 1) / v",
            use="even layers, fast links, a whole backward",
            chunks=ANY,
            needs=_whole_groups,
        ),
        Schedule(
            "breadth-first",
            breadth_first,
            "Lamy-Poirier, Breadth-First Pipeline Parallelism, MLSys 2023",
            bubble="(p - 1)(F + B) / v",
            memory="m",
            use="sharded parameters: each stage's are gathered twice a step",
            chunks=ANY,
        ),
        Schedule(
            "gis",
            gis,
            "Wan et al., PipeOffload, ICML 2025",
            bubble="about (p - 1)(F + B) / v",
            memory="p + 1/2 for v = 2, or as given from 3p/4 + 1/2 on",
            use="interleaved with less memory, or with activations sent to the host",
            chunks=SEVERAL,
            needs=room_for_half,
        ),
        Schedule(
            "zb-h1",
            zb_h1,
            "Qi et al., Zero Bubble, ICLR 2024",
            bubble="(p - 1)(F + I - W)",
            memory="p",
            use="the memory of 1F1B's first rank on all ranks is affordable",
        ),
        Schedule(
            "zb-h2",
            zb_h2,
            "Qi et al., Zero Bubble, ICLR 2024",
            bubble="(p - 1) F at least, for starts and ends",
            memory="2p - 1",
            use="plenty of memory, W shorter than I",
        ),
        Schedule(
            "zb-auto",
            zb_auto,
            "Qi et al., Zero Bubble, ICLR 2024",
            bubble="that of ZB-H1 or ZB-H2 at most, where they fit",
            memory="as given, 2p - 1 at most by default",
            use="unequal F, I and W, slow links, or a memory in between",
            needs=_some_room,
        ),
        Schedule(
            "zb-v",
            zb_v,
            "Qi et al., Pipeline Parallelism with Controllable Memory, NeurIPS 2024",
            bubble="(p - 1) F / 2 where F = I = W",
            memory="p",
            use="F, I and W about the same, fast links, memory for p",
            chunks=TWO,
            placement=wave,
        ),
        Schedule(
            "v-half",
            v_half,
            "Qi et al., Pipeline Parallelism with Controllable Memory, NeurIPS 2024",
            bubble="about 0.6 p (F + B) where F = I = W",
            memory="(p + 2) / 2",
            use="memory for half of what ZB-V holds",
            chunks=TWO,
            placement=wave,
        ),
        Schedule(
            "v-min",
            v_min,
            "Qi et al., Pipeline Parallelism with Controllable Memory, NeurIPS 2024",
            bubble="about 2(p - 1)(F + B) / 3 where F = I = W; else it grows with m",
            memory="(p + 4) / 3",
            use="memory for a third of what ZB-V holds; F, I and W the same, fast links",
            chunks=TWO,
            placement=wave,
        ),
        Schedule(
            "v-search",
            v_search,
            "Qi et al., Pipeline Parallelism with Controllable Memory, NeurIPS 2024",
            bubble="at most that of the best V that fits",
            memory="as given; p by default",
            use="unequal F, I and W, slow links, or a memory between those of the other V's",
            chunks=TWO,
            placement=wave,
            needs=room_for_a_v,
        ),
        Schedule(
            "hanayo",
            hanayo,
            "Liu et al., Hanayo, SC 2023",
            bubble="about 4(p - 1)(F + B) / (3 v) for m = p",
            memory="p",
            use="m about p, fast links, a whole backward",
            chunks=EVEN,
            placement=wave,
        ),
        Schedule(
            "chimera",
            chimera,
            "Li and Hoefler, Chimera, SC 2021",
            bubble="(p - 2) max(F, B) m / p",
            memory="p; two copies of the weights",
            use="m = p, and room for the weights twice",
            chunks=TWO,
            placement=both_ways,
            copies=2,
            needs=whole_units,
        ),
        Schedule(
            "bitpipe",
            bitpipe,
            "Wu et al., BitPipe, 2024",
            bubble="(p - 2) max(F, B) m / (2 p)",
            memory="p; two copies of the weights",
            use="m = p, fast links, and room for the weights twice",
            chunks=FOUR,
            placement=both_ways,
            copies=2,
            needs=whole_units,
        ),
        Schedule(
            "dualpipe",
            dualpipe,
            "DeepSeek-AI, DeepSeek-V3 Technical Report, 2024",
            bubble="(p / 2 - 1)(X + B - 3 W) at most; X: F + B less what pairs hide",
            memory="p + 1; two copies of the weights",
            use="F fused with B hides much, as with experts on other devices; weights are small",
            chunks=TWO,
            placement=both_ways,
            copies=2,
            needs=two_full_pipelines,
        ),
        Schedule(
            "dualpipe-v",
            dualpipe_v,
            "Qi et al., DualPipe could be better without the Dual, 2025",
            bubble="(p - 1)(X + B - 3 W) / 2 at most; X: F + B less what pairs hide",
            memory="p + 1 / 2",
            use="F fused with B hides much, as with experts on other devices",
            chunks=TWO,
            placement=wave,
            needs=full_pipeline,
        ),
        Schedule(
            "terapipe",
            terapipe,
            "Li et al., TeraPipe, ICML 2021",
            bubble="(p - 1)(F + B) / s",
            memory="m",
            use="a baseline for slices; needs all activations at once",
            sliced=True,
        ),
        Schedule(
            "seq1f1b",
            seq1f1b,
            "Sun et al., Seq1F1B, 2024",
            bubble="(p - 1)(F + B) / (v s)",
            memory="(p - 1 + s) / s for v = 1",
            use="long sequences, few micro-batches",
            chunks=ANY,
            sliced=True,
            needs=whole_groups,
        ),
        Schedule(
            "slimpipe",
            slimpipe,
            "Li et al., SlimPipe, SC 2025",
            bubble="(p - 1)(F + B) / (v s)",
            memory="1 + 2(p - 1) / (v s)",
            use="the longest sequences: about one micro-batch of activations for any p",
            chunks=ANY,
            sliced=True,
            needs=whole_rounds,
        ),
    )
}

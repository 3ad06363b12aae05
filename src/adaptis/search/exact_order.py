"""The best order for given stages, by constraint programming: a model of the simulator in ticks.

Durations are rounded down to whole ticks, so what the solver proves holds for the true seconds as
well. Micro-batches are equal: whatever a plan does, its k-th F, B, I and W of a stage can be called
those of micro-batch k, so each stage takes them in order. What an instruction spends on receiving
and sending keeps its device busy and is part of its interval. A directed link carries values in the
order in which they were written.

Memory counts what the stages save and keep, and what is received: while its reader runs, or, where
`posted`, from the computation before which its receive stands. The latter is exact and slow; the
former takes less, so that what it proves holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptis.costs import price
from adaptis.errors import InputError
from adaptis.lower import LOOKAHEAD
from adaptis.plan import Plan
from adaptis.program import Compute, Op
from adaptis.rows import B, F, I, W

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adaptis.cluster import Cluster
    from adaptis.plan import Stage
    from adaptis.profile import Profile

FUSED, SPLIT, EITHER = "fused", "split", "either"  # how the backward of a stage may run


@dataclass(frozen=True, slots=True)
class Problem:
    """Stages on their devices with all they cost, in ticks and bytes; one entry per stage."""

    stages: tuple[Stage, ...]
    num_devices: int
    num_microbatches: int
    backward: tuple[str, ...]  # FUSED, SPLIT or EITHER
    ticks: tuple[tuple[int, ...], ...]  # of F, B, I, W, with receiving and sending
    busy: tuple[tuple[int, ...], ...]  # ticks on the link: of the output, of the input gradient
    latency: tuple[tuple[int, ...], ...]
    saved: tuple[int, ...]  # bytes from F to B or I
    kept: tuple[int, ...]  # bytes from I to W
    arriving: tuple[tuple[int, ...], ...]  # bytes that F, and B or I, receive
    room: tuple[float, ...]  # bytes besides what a device holds throughout, one per device
    update: tuple[int, ...]  # ticks at the end, one per device
    shared: tuple[tuple[tuple[int, ...], int], ...]  # who exchanges a gradient, and its ticks

    def crosses(self, stage: int, way: int) -> bool:
        """Whether what `stage` sends on (way 0) or back (way 1) goes to another device."""
        other = stage + (1 if way == 0 else -1)
        there = 0 <= other < len(self.stages)
        return there and self.stages[other].device != self.stages[stage].device


@dataclass(frozen=True, slots=True)
class Solved:
    """What became of a problem."""

    orders: tuple[tuple[Compute, ...], ...] | None  # one per device; None: nothing found
    bound: float  # ticks that every order takes at least; inf: none is below the limit


def make_problem(
    stages: Sequence[Stage],
    profile: Profile,
    cluster: Cluster,
    num_microbatches: int,
    tick: float,
    backward: Sequence[str] | None = None,
) -> Problem:
    """The problem of ordering `stages`; `backward` None leaves it to what can be of use."""
    empty = Plan(num_microbatches, tuple(stages), ((),) * cluster.num_devices)
    costs = price(empty, profile, cluster)
    device, last = empty.placement, len(stages) - 1

    def whole(seconds: Any) -> Any:
        return np.floor(np.asarray(seconds) / tick + 1e-6).astype(np.int64)

    onto = np.array([s < last and device[s + 1] != device[s] for s in range(last + 1)])
    back = np.array([s > 0 and device[s - 1] != device[s] for s in range(last + 1)])
    first_ends = back * costs.receive + onto * costs.send
    later_ends = onto * costs.receive + back * costs.send
    table = np.stack(
        [
            whole(costs.forward + first_ends),
            whole(costs.backward + later_ends),
            whole(costs.backward_input + later_ends),
            whole(costs.backward_weight),
        ]
    )
    cheaper = costs.backward >= costs.backward_input + costs.backward_weight
    free = [
        SPLIT if cheaper[s] and costs.saved_weight[s] <= costs.saved[s] else EITHER
        for s in range(last + 1)
    ]
    return Problem(
        stages=tuple(stages),
        num_devices=cluster.num_devices,
        num_microbatches=num_microbatches,
        backward=tuple(backward or free),
        ticks=_rows(table),
        busy=_rows(whole([costs.forward_busy, costs.backward_busy])),
        latency=_rows(whole([costs.forward_latency, costs.backward_latency])),
        saved=tuple(map(int, costs.saved)),
        kept=tuple(map(int, costs.saved_weight)),
        arriving=_rows(np.array([costs.input * back, costs.output * onto]).astype(np.int64)),
        room=tuple((costs.limits - costs.static_bytes).tolist()),
        update=tuple(whole(costs.update).tolist()),
        shared=tuple((devices, int(whole(seconds))) for devices, seconds in costs.shared),
    )


def _rows(table: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in table.tolist())


def solver_module() -> Any:
    """OR-tools' CP-SAT, an optional part of the installation.

    Raises:
        InputError: it is not installed.
    """
    try:
        from ortools.sat.python import cp_model
    except ImportError:
        raise InputError(
            'proving a plan optimal needs ortools, which is not here: pip install "adaptis[exact]"'
        ) from None
    return cp_model


def solve(
    problem: Problem,
    least: int,
    most: int,
    seconds: float,
    workers: int,
    *,
    posted: bool = False,
) -> Solved:
    """The best order that takes `most` ticks or fewer; no order takes fewer than `least`."""
    if most < least or min(problem.room) < 0:
        return Solved(None, math.inf)
    cp_model = solver_module()
    model = _Model(problem, cp_model.CpModel(), most, posted)
    model.build(least)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = max(seconds, 0.01)
    solver.parameters.num_workers = workers
    solver.parameters.linearization_level = 0  # linear relaxations of orders prove nothing
    status = solver.solve(model.cp)
    if status == cp_model.INFEASIBLE:
        return Solved(None, math.inf)
    bound = max(math.ceil(solver.best_objective_bound - 1e-6), least)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Solved(None, bound)
    return Solved(model.orders(solver), bound)


class _Model:
    """The variables of one problem; `G` is the B or I of a stage, whichever it has."""

    def __init__(self, problem: Problem, cp: Any, most: int, posted: bool) -> None:
        self.problem, self.cp, self.most, self.all_posted = problem, cp, most, posted
        self.posted: dict[tuple[int, int, int], Any] = {}  # when room is made, for each value
        self.split = [
            cp.new_bool_var(f"split{s}") if how == EITHER else how == SPLIT
            for s, how in enumerate(problem.backward)
        ]
        names = [
            (s, i) for s in range(len(problem.stages)) for i in range(problem.num_microbatches)
        ]
        self.forward = {at: self._fixed(F, *at) for at in names}
        self.gradient = {at: self._gradient(*at) for at in names}
        self.weight = {at: self._weight(*at) for at in names if self.split[at[0]] is not False}
        self.transfer: dict[tuple[int, int, int], Any] = {}  # way, stage, micro-batch

    def build(self, least: int) -> None:
        """All that an order must keep to, and that the step be short."""
        self._precedences()
        for device in range(self.problem.num_devices):
            self.cp.add_no_overlap(self._on(device))
            self._memory(device)
        self._links()
        self._end(least)

    def _start(self, name: str) -> Any:
        return self.cp.new_int_var(0, self.most, name)

    def _fixed(self, op: int, s: int, i: int) -> Any:
        size = self.problem.ticks[op][s]
        return self.cp.new_fixed_size_interval_var(
            self._start(f"{op}_{s}_{i}"), size, f"{op}{s}{i}"
        )

    def _gradient(self, s: int, i: int) -> Any:
        split = self.split[s]
        if isinstance(split, bool):
            return self._fixed(I if split else B, s, i)
        whole, half = self.problem.ticks[B][s], self.problem.ticks[I][s]
        start, end = self._start(f"1_{s}_{i}"), self._start(f"e_{s}_{i}")
        return self.cp.new_interval_var(start, whole + (half - whole) * split, end, f"1{s}{i}")

    def _weight(self, s: int, i: int) -> Any:
        split, size = self.split[s], self.problem.ticks[W][s]
        if isinstance(split, bool):
            return self._fixed(W, s, i)
        start = self._start(f"3_{s}_{i}")
        return self.cp.new_optional_fixed_size_interval_var(start, size, split, f"3{s}{i}")

    def _on(self, device: int) -> list[Any]:
        """All intervals that keep a device busy."""
        kinds = (self.forward, self.gradient, self.weight)
        stages = self.problem.stages
        return [x for kind in kinds for (s, _), x in kind.items() if stages[s].device == device]

    def _precedences(self) -> None:
        last = len(self.problem.stages) - 1
        for kind in (self.forward, self.gradient, self.weight):
            for (s, i), interval in kind.items():
                if i:
                    self.cp.add(interval.start_expr() >= kind[s, i - 1].end_expr())
        for (s, i), interval in self.weight.items():
            self.cp.add(interval.start_expr() >= self.gradient[s, i].end_expr())
        for (s, i), gradient in self.gradient.items():
            forward = self.forward[s, i]
            self.cp.add(gradient.start_expr() >= forward.end_expr())
            if s < last:
                self.cp.add(self.forward[s + 1, i].start_expr() >= self._there(0, s, i))
                self.cp.add(gradient.start_expr() >= self._there(1, s + 1, i))

    def _written(self, way: int, s: int, i: int) -> Any:
        return (self.forward if way == 0 else self.gradient)[s, i]

    def _there(self, way: int, s: int, i: int) -> Any:
        """When others see what stage s wrote."""
        written, problem = self._written(way, s, i), self.problem
        if not problem.crosses(s, way):
            return written.end_expr()
        if not any(self._occupied(*self._ends(way, s))):
            return written.end_expr() + problem.latency[way][s]
        start, size = self._start(f"t{way}_{s}_{i}"), problem.busy[way][s]
        moved = self.cp.new_fixed_size_interval_var(start, size, f"t{way}{s}{i}")
        self.cp.add(start >= written.end_expr())
        self.transfer[way, s, i] = moved
        return moved.end_expr() + problem.latency[way][s]

    def _ends(self, way: int, s: int) -> tuple[int, int]:
        stages = self.problem.stages
        return stages[s].device, stages[s + (1 if way == 0 else -1)].device

    def _carried(self, source: int, target: int) -> list[tuple[int, int]]:
        """Way and stage of all values that go over one directed link."""
        pairs = [(way, s) for way in range(2) for s in range(len(self.problem.stages))]
        return [
            p
            for p in pairs
            if self.problem.crosses(p[1], p[0]) and self._ends(*p) == (source, target)
        ]

    def _occupied(self, source: int, target: int) -> list[int]:
        return [self.problem.busy[way][s] for way, s in self._carried(source, target)]

    def _links(self) -> None:
        """First written, first carried: on each link transfers keep the order of their writers."""
        links: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        for name in {**self.transfer, **self.posted}:
            links.setdefault(self._ends(name[0], name[1]), []).append(name)
        for names in links.values():
            self.cp.add_no_overlap(self.transfer[name] for name in names if name in self.transfer)
            for one, two in combinations(names, 2):
                self._same_order(one, two)

    def _same_order(self, one: tuple[int, int, int], two: tuple[int, int, int]) -> None:
        if one[:2] == two[:2]:
            first, then = sorted((one, two))
            if first in self.transfer:
                moved = self.transfer[first].end_expr()
                self.cp.add(self.transfer[then].start_expr() >= moved)
            return
        before = self.cp.new_bool_var("")
        for a, b, literal in ((one, two, before), (two, one, before.negated())):
            rules = [self._written(*b).start_expr() >= self._written(*a).end_expr()]
            if a in self.transfer:
                rules.append(self.transfer[b].start_expr() >= self.transfer[a].end_expr())
            if a in self.posted and b in self.posted:  # receives stand in the order of the sends
                rules.append(self.posted[a] <= self.posted[b])
            for rule in rules:
                self.cp.add(rule).only_enforce_if(literal)

    def _memory(self, device: int) -> None:
        room, problem = self.problem.room[device], self.problem
        if math.isinf(room):
            return
        held: list[tuple[Any, int]] = []
        for (s, i), gradient in self.gradient.items():
            if problem.stages[s].device != device:
                continue
            forward, kept = self.forward[s, i], problem.kept[s]
            held.append((self._span(forward.start_expr(), gradient.end_expr()), problem.saved[s]))
            held.append((self._received(0, s, i), problem.arriving[0][s]))
            held.append((self._received(1, s, i), problem.arriving[1][s]))
            if (s, i) in self.weight:
                split, weight = self.split[s], self.weight[s, i]
                more = max(kept - problem.saved[s], 0)
                held.append((self._span(gradient.end_expr(), weight.end_expr(), split), kept))
                held.append((self._span(gradient.start_expr(), gradient.end_expr(), split), more))
        held = [(interval, size) for interval, size in held if size > 0]
        # A common divisor keeps the numbers small.
        unit = math.gcd(*(size for _, size in held)) or 1
        if sum(size for _, size in held) > room:
            sizes = [size // unit for _, size in held]
            self.cp.add_cumulative([x for x, _ in held], sizes, math.floor(room / unit))

    def _received(self, way: int, s: int, i: int) -> Any:
        """While room is kept for what F (way 0), or B or I, of stage s receives."""
        reader = self._written(way, s, i)
        if not self.all_posted or self.problem.arriving[way][s] == 0:
            return reader
        begin = self._start(f"p{way}_{s}_{i}")
        self.cp.add(begin <= reader.start_expr())
        # Not after the start of `LOOKAHEAD` others before the reader, where there are as many.
        chosen = [self.cp.new_bool_var("") for _ in range(LOOKAHEAD)]
        for literal in chosen:
            self.cp.add(begin <= 0).only_enforce_if(literal)
        for other, there in self._may_precede(way, s, i):
            literal = self.cp.new_bool_var("")
            self.cp.add(other.end_expr() <= reader.start_expr()).only_enforce_if(literal)
            self.cp.add(begin <= other.start_expr()).only_enforce_if(literal)
            if there is not True:
                self.cp.add_implication(literal, there)
            chosen.append(literal)
        self.cp.add(sum(chosen) >= LOOKAHEAD)
        self.posted[way, s - 1 if way == 0 else s + 1, i] = begin
        return self._span(begin, reader.end_expr())

    def _may_precede(self, way: int, s: int, i: int) -> list[tuple[Any, Any]]:
        """Computations of the same device that need not follow F, or B or I, of stage s."""
        stages, found = self.problem.stages, []
        for kind in (self.forward, self.gradient, self.weight):
            for (t, j), interval in kind.items():
                downstream, upstream = way == 0 and t >= s, way == 0 or t <= s
                follows = downstream if kind is self.forward else upstream
                if stages[t].device == stages[s].device and not (follows and j >= i):
                    found.append((interval, self.split[t] if kind is self.weight else True))
        return found

    def _span(self, start: Any, end: Any, there: Any = True) -> Any:
        size = self.cp.new_int_var(0, self.most, "")
        if there is True:
            return self.cp.new_interval_var(start, size, end, "")
        return self.cp.new_optional_interval_var(start, size, end, there, "")

    def _end(self, least: int) -> None:
        problem, last = self.problem, self.problem.num_microbatches - 1
        ends: list[list[Any]] = [[] for _ in range(problem.num_devices)]
        for s, stage in enumerate(problem.stages):
            ends[stage.device].append((self.gradient[s, last].end_expr(), True))
            if (s, last) in self.weight:
                ends[stage.device].append((self.weight[s, last].end_expr(), self.split[s]))
        step = self.cp.new_int_var(least, self.most, "step")
        for devices, ticks in problem.shared:
            done = self._start("shared")
            for device in devices:
                for end, there in ends[device]:
                    self._after(done, end, there)
                ends[device] = [(done + ticks, True)]
        for device, found in enumerate(ends):
            for end, there in found:
                self._after(step, end + problem.update[device], there)
        self.cp.minimize(step)

    def _after(self, later: Any, end: Any, there: Any) -> None:
        constraint = self.cp.add(later >= end)
        if there is not True:
            constraint.only_enforce_if(there)

    def orders(self, solver: Any) -> tuple[tuple[Compute, ...], ...]:
        """What was found, one order per device."""
        last = len(self.problem.stages)
        result: list[list[tuple[int, int, int, Compute]]] = [
            [] for _ in range(self.problem.num_devices)
        ]
        split = [bool(x) if isinstance(x, bool) else solver.boolean_value(x) for x in self.split]
        for s, i in self.forward:
            back = Op.BACKWARD_INPUT if split[s] else Op.BACKWARD
            found = [(self.forward, Op.FORWARD), (self.gradient, back)]
            found += [(self.weight, Op.BACKWARD_WEIGHT)] if split[s] else []
            for kind, op in found:
                start = solver.value(kind[s, i].start_expr())
                end = solver.value(kind[s, i].end_expr())
                # Where computations take no tick, the way through the stages decides.
                way = (
                    s if op is Op.FORWARD else 2 * last - s + (op is Op.BACKWARD_WEIGHT) * 2 * last
                )
                row = result[self.problem.stages[s].device]
                row.append((start, end, way, Compute(op, s, i)))
        return tuple(tuple(c for *_, c in sorted(row, key=lambda x: x[:3])) for row in result)

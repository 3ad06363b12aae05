"""The published generator: balanced starts, then one phase at a time, chosen by the bubbles.

Written from the published description of the method alone, in its strongest reading: every start
and every kind of move that is described anywhere, compiled schedulers, moves tried in random order
and the first improving one taken, and new runs from kicked plans until the time is up. What stays
as published is the selection: the phase that the rule names is tuned, and a run ends where that
phase has no improving move.

    devices unequally idle, by more than a layer    partition
    most idle time at the ends of the step          placement
    most idle time in between                       schedule
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptis.cluster import uniform
from adaptis.plan import Plan, Stage
from adaptis.profile import LayerCost, Profile
from adaptis.program import Compute, Op
from adaptis.schedules import SCHEDULES
from adaptis.schedules.shape import Shape
from adaptis.simulate import simulate_plan
from published.moves import MOVES, Point, Trial
from published.problem import Problem, make_problem, price
from published.scheduler import Order, list_schedule, listed, replay
from published.starts import cuts, placements

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adaptis.cluster import Cluster

STARTS_SHARE = 0.35  # of the time goes into simulating starts
TOP = 8  # starts that are tuned before anything is kicked
SLACK = 0.07  # how much heavier a kick may make the heaviest device
KINDS = {Op.FORWARD: 0, Op.BACKWARD: 1}


@dataclass(frozen=True)
class Answer:
    """What the published method finds in the same time."""

    plan: Plan
    step: float  # seconds, as simulated
    evaluated: int
    phases: dict[str, int]  # accepted moves of each phase


class Generator:
    """One run of the method on one problem."""

    def __init__(
        self, problem: Problem, seconds: float, seed: int, evaluations: float = np.inf
    ) -> None:
        self.problem = problem
        self.evaluations = evaluations
        self.random = np.random.default_rng(seed)
        self.began = time.perf_counter()
        self.seconds = seconds
        self.evaluated = 0
        self.phases = dict.fromkeys(MOVES, 0)

    def left(self, share: float = 1.0) -> bool:
        """Whether `share` of the time, and of the evaluations, is not used up yet."""
        used = time.perf_counter() - self.began
        return used < share * self.seconds and self.evaluated < share * self.evaluations

    def evaluate(self, trial: Trial) -> Point | None:
        """`trial` simulated: its own order replayed, or the list scheduler's; None: impossible."""
        problem, device = self.problem, trial.device
        self.evaluated += 1
        priced = price(problem, trial.stop, device, trial.split)
        m, memory, order = problem.num_microbatches, problem.memory, trial.order
        if order is None:
            rows = list_schedule(
                m, device, memory, trial.split, trial.defer, trial.exempt, tuple(priced)
            )
            if len(rows) < len(device) * m * (3 if trial.split else 2):
                return None
            order = listed(rows, len(memory))
        start, end, step = replay(m, device, memory, trial.split, tuple(order), tuple(priced))
        return Point(trial, order, start, end, step) if np.isfinite(step) else None

    def trial(self, stop: Any, device: Any, *, split: bool, defer: bool) -> Trial:
        """A trial that the list scheduler orders, with nothing exempt."""
        exempt = np.zeros((2, self.problem.num_microbatches), dtype=np.bool_)
        return Trial(np.asarray(stop), np.asarray(device), split, defer, exempt)

    def starts(self) -> list[Point]:
        """All starts there is time for, the best first."""
        found = []
        for trial in self._starts():
            point = self.evaluate(trial)
            if point is not None:
                found.append(point)
            if found and not self.left(STARTS_SHARE):
                break
        return sorted(found, key=lambda point: point.step)

    def _starts(self) -> Iterator[Trial]:
        """Each number of stages in turn: its best cut and placement, its second best ..."""
        problem = self.problem
        layers, devices = len(problem.work), len(problem.slowness)
        free = not (problem.latency.any() or np.ptp(problem.per_byte))
        jobs: dict[int, list[tuple[float, Any]]] = {}
        for n, variance, stop in cuts(problem.work, range(devices, layers + 1, devices)):
            jobs.setdefault(n, []).append((variance, stop))
        queues = [self._placed(found) for found in jobs.values()]
        while queues:
            for queue in list(queues):
                job = next(queue, None)
                if job is None:
                    queues.remove(queue)
                    continue
                for defer in (False,) if free else (False, True):
                    yield self.trial(*job, split=True, defer=defer)

    def _placed(self, found: list[tuple[float, Any]]) -> Iterator[tuple[Any, Any]]:
        """The cuts of one number of stages in turn, each with its next placement."""
        queues = [(stop, iter(placements(self.problem, stop, self.random))) for _, stop in found]
        for _ in range(64):
            for stop, queue in queues:
                device = next(queue, None)
                if device is not None:
                    yield stop, device

    def named(self) -> Iterator[Point]:
        """1F1B and interleaved 1F1B over uniform cuts of layers."""
        problem = self.problem
        layers, p = len(problem.work), len(problem.slowness)
        for name in ("1f1b", "interleaved"):
            shape = Shape(p, problem.num_microbatches, 1 if name == "1f1b" else layers // p)
            if shape.v < 1 or SCHEDULES[name].lacks(shape):
                continue
            stop = np.linspace(0, layers, p * shape.v + 1).round().astype(np.int64)[1:]
            device = np.array(SCHEDULES[name].placement(shape), dtype=np.int64)
            trial = self.trial(stop, device, split=False, defer=False)
            point = self.evaluate(trial._replace(order=order_of(SCHEDULES[name].orders(shape))))
            if point is not None:
                yield point

    def phase(self, point: Point, scale: float) -> str:
        """The phase that the bubbles ask for; `scale` times the lightest layer counts as equal."""
        first, last = point.edges()
        makespan = last.max()
        ends = first + (makespan - last)
        busy = point.busy()
        inside = makespan - ends - busy
        idle = ends + inside
        if np.ptp(idle) > scale * self.problem.work.min() * (1 + 1e-9):
            return "partition"
        return "placement" if ends.sum() > inside.sum() else "schedule"

    def tune(self, point: Point, scale: float) -> Point:
        """`point` after improving moves of the phases that the rule names, until it names none."""
        while self.left():
            phase = self.phase(point, scale)
            better = self._improved(point, phase)
            if better is None:
                return point
            self.phases[phase] += 1
            point = better
        return point

    def _improved(self, point: Point, phase: str) -> Point | None:
        for trial in MOVES[phase](self.problem, point, self.random):
            if not self.left():
                return None
            found = self.evaluate(trial)
            if found is not None and found.step < point.step * (1 - 1e-9):
                return found
        return None

    def kicked(self, point: Point) -> Point | None:
        """`point` with two random placement moves that keep the loads about even."""
        trial, problem = point.trial, self.problem
        sums = np.concatenate([[0.0], np.cumsum(problem.work)])
        cost = np.diff(sums[np.concatenate([[0], trial.stop])])
        heaviest = np.bincount(trial.device, cost).max()
        for _ in range(100):
            device = trial.device.copy()
            a, b = self.random.integers(len(device), size=2)
            device[a], device[b] = device[b], device[a]
            device[self.random.integers(len(device))] = self.random.integers(len(problem.slowness))
            loads = np.bincount(device, cost, len(problem.slowness))
            if loads.min() > 0 and loads.max() <= heaviest * (1 + SLACK):
                return self.evaluate(trial._replace(device=device, order=None))
        return None

    def run(self) -> list[Point]:
        """The best plans, the best first."""
        starts = self.starts()
        pool = [*starts[:TOP], *self.named()]
        found = sorted(pool, key=lambda point: point.step)
        scales = (1.0, float(self.problem.num_microbatches))
        for number, point in enumerate([*found, *found]):
            if not self.left():
                break
            found.append(self.tune(point, scales[number >= len(pool)]))
        while self.left() and found:
            found = sorted(found, key=lambda point: point.step)[:TOP]
            point = self.kicked(found[int(self.random.integers(len(found)))])
            if point is not None:
                found.append(self.tune(point, scales[int(self.random.integers(2))]))
        return sorted(found, key=lambda point: point.step)


def publish(
    profile: Profile, cluster: Cluster, num_microbatches: int, seconds: float, seed: int = 0
) -> Answer | None:
    """The published method's best plan after `seconds`; None where none of its plans fits."""
    generator = Generator(make_problem(profile, cluster, num_microbatches), seconds, seed)
    for point in generator.run():
        plan = plan_of(point, num_microbatches, profile)
        timeline = simulate_plan(plan, profile, cluster)
        pairs = zip(timeline.peak_bytes, cluster.devices, strict=True)
        if all(peak <= device.memory_bytes for peak, device in pairs):
            return Answer(plan, timeline.step, generator.evaluated, generator.phases)
    return None


def warm_up() -> None:
    """Have everything compiled, or read from the cache."""
    layer = LayerCost("", "", 1.0, 1.0, 1.0, 2.0)
    publish(Profile("", 1, (layer,) * 4), uniform(2), 2, 0.0)


def order_of(programs: Any) -> Order:
    """The arrays of the orders of a named schedule of fused backwards."""
    flat = [compute for order in programs for compute in order]
    offsets = np.cumsum([0, *map(len, programs)]).astype(np.int64)
    kinds = np.array([KINDS[compute.op] for compute in flat], dtype=np.int64)
    return Order(offsets, kinds, np.array([compute.stage for compute in flat], dtype=np.int64))


def plan_of(point: Point, num_microbatches: int, profile: Profile) -> Plan:
    """The plan that `point` stands for; counting gives the micro-batches."""
    trial, order = point.trial, point.order
    backward = Op.BACKWARD_INPUT if trial.split else Op.BACKWARD
    ops = (Op.FORWARD, backward, Op.BACKWARD_WEIGHT)
    starts = [0, *trial.stop[:-1].tolist()]
    zipped = zip(starts, trial.stop.tolist(), trial.device.tolist(), strict=True)
    counts = np.zeros((len(starts), 3), dtype=np.int64)
    programs = []
    for d in range(len(order.offsets) - 1):
        program = []
        for row in range(order.offsets[d], order.offsets[d + 1]):
            kind, stage = int(order.kind[row]), int(order.stage[row])
            program.append(Compute(ops[kind], stage, int(counts[stage, kind])))
            counts[stage, kind] += 1
        programs.append(tuple(program))
    return Plan(
        num_microbatches=num_microbatches,
        stages=tuple(Stage(*entry) for entry in zipped),
        programs=tuple(programs),
        schedule="published",
        model=profile.model,
        fingerprint=profile.fingerprint,
    )

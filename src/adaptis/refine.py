"""A measured step told to the profile: what its instructions took corrects what its layers cost.

A timeline knows stages, a profile layers. For each operation (F and R; B; I; W) and stage s, y_s is
the mean of its durations, seconds, the outermost tenth on either side left out, minus the
overhead of an instruction, over the weight of a micro-batch. Layers of one kind and equal sizes are
a class c, which takes a_sc seconds of stage s by the profile. Wanted are factors f_c with
sum_c a_sc f_c = y_s. There are fewer stages than classes as a rule, and times have noise, so the
factors are those of least

    sum_s ((sum_c a_sc f_c - y_s) / y_s)^2  +  CAUTION^2  sum_c (a_c / sum_c a_c) (f_c - 1)^2

with a_c the seconds of class c in all stages: the profile is changed no more than the
measurement asks for, and most where most time is spent. What is left of each stage's difference is
then shared out over its own layers in proportion, so that the mean of every instruction that was
measured is explained exactly.

B is scaled as I and W together where only these ran, and they as B where only it ran. Overheads,
the optimizer and all bytes stay as they were. Fused pairs are left out: their parts share one
time. Devices are taken as equal. Folding in the timelines of several plans, one after the other,
tells their layers apart.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from adaptis.comparison import workload_of
from adaptis.errors import InputError, PlanError
from adaptis.plan import load_plan
from adaptis.profile import load_profile, typical
from adaptis.program import OPS, Op
from adaptis.timeline import load_timeline

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from adaptis.plan import Plan
    from adaptis.profile import LayerCost, Profile
    from adaptis.timeline import Timeline

    Floats = NDArray[np.float64]
    Run = tuple[int, int]  # layers from the first to before the second

CAUTION = 0.02  # how far off durations are by themselves: noise of a stage's mean, relative
RAN_AS = {
    "forward": (Op.FORWARD, Op.RECOMPUTE),
    "backward": (Op.BACKWARD,),
    "backward_input": (Op.BACKWARD_INPUT,),
    "backward_weight": (Op.BACKWARD_WEIGHT,),
}


def refine(profile: Profile, plan: Plan, timeline: Timeline) -> Profile:
    """`profile` with the layers' seconds that explain `timeline`, a measured step under `plan`.

    Raises:
        PlanError: the plan is for another model.
        InputError: the timeline was not measured, is of another plan, or of a sharded head.
    """
    plan.fits(profile)
    _suits(plan, timeline)
    weight = workload_of(plan).weights[0]
    found: dict[str, Floats] = {}
    for name, ops in RAN_AS.items():
        overhead = getattr(profile.overheads, name) - profile.overheads.loop
        means = _means(plan, timeline, ops).items()
        wanted = {run: max(mean - overhead, 0.0) / weight for run, mean in means}
        if wanted:
            found[name] = _fitted(profile.layers, name, wanted)
    if not found:
        raise InputError("the timeline has no computation to learn from: a whole step is needed")
    return replace(
        profile,
        layers=tuple(
            _with_times(layer, {name: float(times[i]) for name, times in found.items()})
            for i, layer in enumerate(profile.layers)
        ),
        source=f"{profile.source}, refined by a measured step of {timeline.name}".lstrip(", "),
    )


def refined_file(profile: Path, timeline: Path, plan: Path | None) -> Profile:
    """The same of files; the plan is `plan.json` beside the timeline where none is given.

    Raises:
        Error: a file is not of its form, or they do not belong together.
    """
    if plan is None:
        plan = timeline.with_name("plan.json")
        if not plan.is_file():
            raise InputError(
                f"--refine {timeline}: there is no {plan} that says which layers its stages have; "
                f"give the plan that was run with --plan"
            )
    files = load_profile(profile), load_plan(plan), load_timeline(timeline)
    try:
        return refine(*files)
    except (InputError, PlanError) as error:
        raise type(error)(f"{timeline} with {plan}: {error}") from None


def _suits(plan: Plan, timeline: Timeline) -> None:
    if timeline.source != "measured":
        raise InputError(
            f"the timeline of {timeline.name} is {timeline.source}: only what was measured can "
            f"refine a profile; give a timeline of `adaptis train`"
        )
    if timeline.reductions or plan.head_reductions:
        raise InputError(
            "the head is sharded over all devices, in no stage: give a timeline of a plan without "
            "that"
        )
    same = plan.placement, plan.num_microbatches
    if same != (timeline.placement, timeline.num_microbatches):
        raise InputError(
            f"the timeline has {len(timeline.placement)} stages and {timeline.num_microbatches} "
            f"micro-batches, the plan {len(plan.stages)} and {plan.num_microbatches}, or they lie "
            f"on other devices; give the plan that was run"
        )


def _means(plan: Plan, timeline: Timeline, ops: tuple[Op, ...]) -> dict[Run, float]:
    """The trimmed mean of what `ops` took, seconds, by the run of layers that a stage holds."""
    alone = np.isin(timeline.op, [OPS.index(op) for op in ops])
    if timeline.partner is not None:
        alone &= timeline.partner < 0
    seconds: dict[Run, list[float]] = {}
    for row in np.flatnonzero(alone):
        stage = plan.stages[timeline.stage[row]]
        took = float(timeline.end[row] - timeline.start[row])
        seconds.setdefault((stage.start, stage.stop), []).append(took)
    result = {}
    for run, times in seconds.items():
        result[run] = typical(times)
    return result


def _fitted(layers: Sequence[LayerCost], name: str, wanted: Mapping[Run, float]) -> Floats:
    """(L,) the layers' seconds of the operation `name` that give each run the wanted seconds."""
    before = np.array([getattr(layer, name) for layer in layers])
    kinds = [(layer.kind, layer.parameter_bytes, layer.saved_bytes) for layer in layers]
    number = {kind: c for c, kind in enumerate(dict.fromkeys(kinds))}
    classes = np.array([number[kind] for kind in kinds])
    runs = [run for run in wanted if wanted[run] > 0 and before[slice(*run)].sum() > 0]
    times = before.copy()
    if runs:
        shares = np.zeros((len(runs), len(number)))  # a_sc
        for row, run in enumerate(runs):
            np.add.at(shares[row], classes[slice(*run)], before[slice(*run)])
        target = np.array([wanted[run] for run in runs])
        total = shares.sum(axis=0)
        caution = CAUTION * np.sqrt(total / total.sum())
        rows = np.vstack([shares / target[:, None], np.diag(caution)])
        missing = np.concatenate([1 - shares.sum(axis=1) / target, np.zeros(len(total))])
        factors = 1 + np.linalg.lstsq(rows, missing)[0]
        times *= np.maximum(factors, 0.0)[classes]
    for run, seconds in wanted.items():
        own = times[slice(*run)]  # a view
        share = next((part for part in (own, before[slice(*run)]) if part.any()), np.ones(len(own)))
        own[:] = share * (seconds / share.sum())
    return times


def _with_times(layer: LayerCost, found: dict[str, float]) -> LayerCost:
    """The layer at the seconds found; B and its halves keep their proportion where only one ran."""
    halves = layer.backward_input + layer.backward_weight
    split = "backward_input" in found and "backward_weight" in found
    if "backward" in found and not split and layer.backward:
        scale = found["backward"] / layer.backward
        found["backward_input"] = layer.backward_input * scale
        found["backward_weight"] = layer.backward_weight * scale
    elif "backward" not in found and split and halves:
        scale = (found["backward_input"] + found["backward_weight"]) / halves
        found["backward"] = layer.backward * scale
    return replace(layer, **found)  # pyrefly: ignore[bad-argument-type]

"""How many micro-batches: the same batch cut into fewer or more of them, each number searched."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adaptis.errors import InfeasibleError
from adaptis.search.tune import Stop, search
from adaptis.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from adaptis.cluster import Cluster
    from adaptis.profile import Profile
    from adaptis.search.tune import Progress, SearchResult

TRIED = 0.25  # of the time goes to all numbers alike, the rest to the best of them


def search_counts(
    profile: Profile,
    cluster: Cluster,
    counts: Sequence[int],
    stop: Stop,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> tuple[SearchResult, dict[int, float]]:
    """The best plan among `counts` of micro-batches, and the step that each number reached.

    With the largest number each micro-batch is the profile's; with half as many it has twice the
    weight. The plan's provenance has the weight; a step is inf where nothing fits. `options` are
    those of `search`.

    Raises:
        InfeasibleError: nothing fits with any number.
        PlanError: there is no head to shard.
    """
    began, largest = time.perf_counter(), max(counts)

    def searched(count: int, share: float) -> SearchResult:
        before = time.perf_counter() - began

        def later(state: Progress) -> None:
            if progress is not None:
                progress(replace(state, seconds=before + state.seconds))

        weight = largest / count
        part = Stop(stop.gap, stop.seconds * share, stop.evaluations * share)
        workload = Workload((weight,) * count)
        found = search(profile, cluster, count, part, seed, later, workload=workload, **options)
        provenance = found.plan.provenance | {"microbatch_weight": weight}
        return replace(found, plan=replace(found.plan, provenance=provenance))

    if len(counts) == 1:
        answer = searched(largest, 1.0)
        return answer, {largest: answer.timeline.step}
    reached: dict[int, float] = {}
    answers: list[SearchResult] = []
    for count in sorted(counts):
        try:
            found = searched(count, TRIED / len(counts))
        except InfeasibleError:
            if count == largest and not answers:  # the smallest micro-batches miss least
                raise
            reached[count] = math.inf
        else:
            reached[count] = found.timeline.step
            answers.append(found)
    best = min(answers, key=_step)
    best = min(best, searched(best.plan.num_microbatches, 1 - TRIED), key=_step)
    return best, reached | {best.plan.num_microbatches: _step(best)}


def _step(answer: SearchResult) -> float:
    return answer.timeline.step

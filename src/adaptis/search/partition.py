"""Contiguous cuts: the lightest heaviest stage by dynamic programming, and how frameworks cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from adaptis.errors import PlanError
from adaptis.kernels import compiled
from adaptis.search.polish import make_trace, retime

if TYPE_CHECKING:
    from adaptis.profile import Profile


def even_cut(profile: Profile, num_stages: int) -> list[int]:
    """Where stages end if blocks are dealt out evenly, the first stages getting what is left over.

    Raises:
        PlanError: there are fewer blocks than stages.
    """
    units = profile.units()
    if num_stages > len(units):
        raise PlanError(
            f"{profile.model} has {len(units)} blocks, too few for {num_stages} stages; "
            f"use fewer devices"
        )
    base, more = divmod(len(units), num_stages)
    ends = np.cumsum([base + (s < more) for s in range(num_stages)])
    return [units[end - 1][1] for end in ends.tolist()]


@compiled
def bottleneck_cut(work: Any, slowness: Any) -> Any:
    """Where stages end so that the slowest is as fast as can be.

    Stage s takes (work[stop] - work[start]) * slowness[s], of the (L + 1,) prefix sums `work`; one
    layer each at least, so len(slowness) <= L. In O(S L log L): the best first part grows and the
    rest shrinks with the border.
    """
    num_stages, num_layers = len(slowness), len(work) - 1
    least = np.full((num_stages + 1, num_layers + 1), np.inf)
    border = np.zeros((num_stages + 1, num_layers + 1), np.int64)
    least[0, 0] = 0.0
    for s in range(1, num_stages + 1):
        for stop in range(s, num_layers - (num_stages - s) + 1):
            low, high = s - 1, stop - 1
            while low < high:
                mid = (low + high) // 2
                if least[s - 1, mid] >= (work[stop] - work[mid]) * slowness[s - 1]:
                    high = mid
                else:
                    low = mid + 1
            for at in range(max(low - 1, s - 1), low + 1):
                cost = max(least[s - 1, at], (work[stop] - work[at]) * slowness[s - 1])
                if cost < least[s, stop]:
                    least[s, stop], border[s, stop] = cost, at
    stops, stop = np.empty(num_stages, np.int64), num_layers
    for s in range(num_stages, 0, -1):
        stops[s - 1] = stop
        stop = border[s, stop]
    return stops


@compiled
def climb(instance: Any, fixed: Any, reach: int, most: int) -> Any:
    """Improve the cut of `fixed` in place: a layer goes from stage to stage, up to `reach` apart.

    The order stays. Stops when no move helps, or after `most` replays; returns the step's seconds
    and the replays.
    """
    trace = make_trace(len(fixed.kind))
    cost, replays, better = retime(instance, fixed, trace), 1, True
    num_stages = len(fixed.stop)
    while better and replays < most:
        better = False
        for giver in range(num_stages):
            for taker in range(max(0, giver - reach), min(num_stages, giver + reach + 1)):
                if replays >= most or not _pass_on(fixed.stop, giver, taker):
                    continue
                trial = retime(instance, fixed, trace, cost)
                replays += 1
                if trial < cost:
                    cost, better = trial, True
                else:
                    _pass_on(fixed.stop, taker, giver)
    return cost, replays


@compiled
def _pass_on(stop: Any, giver: int, taker: int) -> bool:
    """Stage `taker` grows by a layer, `giver` shrinks by one; False if impossible."""
    size = stop[giver] - (stop[giver - 1] if giver > 0 else 0)
    if giver == taker or size < 2:
        return False
    if giver < taker:
        stop[giver:taker] -= 1
    else:
        stop[taker:giver] += 1
    return True

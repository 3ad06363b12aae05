"""How the gain over a uniform 1F1B divides between the decisions: the planner with some of them.

Placement, schedule and partition are tried in every combination, so that each one's share is its
Shapley value: what it adds, averaged over all orders of adding them. Recomputation and the sharded
head come on top of all three.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import TYPE_CHECKING, Any

from adaptis.errors import InfeasibleError
from adaptis.search.instance import can_shard
from adaptis.search.tune import search

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from adaptis.cluster import Cluster
    from adaptis.profile import Profile
    from adaptis.search.tune import Stop

FACTORS = ("placement", "schedule", "partition")
ON_TOP = ("recompute", "head")


@dataclass(frozen=True, slots=True)
class Ablation:
    """Seconds of a step by what was decided; the rest is as in a uniform 1F1B."""

    steps: Mapping[tuple[str, ...], float]  # inf: nothing fits

    @property
    def gained(self) -> float:
        """Seconds that all decisions save together."""
        return self.steps[()] - self._whole

    @property
    def _whole(self) -> float:
        return list(self.steps.values())[-1]

    def shares(self) -> dict[str, float]:
        """Seconds that each decision saves, which add up to `gained`; empty without a base.

        Where only some combinations fit, the seconds of those that do not are unknown.
        """
        if not all(map(math.isfinite, self.steps.values())):
            return {}
        result = dict.fromkeys(FACTORS, 0.0)
        orders = list(permutations(FACTORS))
        for order in orders:
            for k, name in enumerate(order):
                saved = self.steps[_sorted(order[:k])] - self.steps[_sorted(order[: k + 1])]
                result[name] += saved / len(orders)
        before = FACTORS
        for decided in list(self.steps)[2 ** len(FACTORS) :]:
            result[decided[-1]] = self.steps[before] - self.steps[decided]
            before = decided
        return result

    def lines(self) -> list[str]:
        """A table, and how the gain divides."""
        names = [", ".join(decided) or "nothing: uniform 1F1B" for decided in self.steps]
        width = max(map(len, names))
        lines = [f"{'decided':<{width}}     step ms  throughput"]
        for name, step in zip(names, self.steps.values(), strict=True):
            figures = f"{1e3 * step:12.1f}{self._whole / step:12.3f}" if step < math.inf else ""
            lines.append(f"{name:<{width}}{figures or '  does not fit'}")
        shares = self.shares()
        if not shares:
            return [*lines, "the gain cannot be divided: without some decisions nothing fits"]
        parts = ", ".join(f"{name} {1e3 * saved:.1f}" for name, saved in shares.items())
        return [*lines, f"{1e3 * self.gained:.1f} ms gained: {parts}"]

    def to_json(self) -> dict[str, Any]:
        """The figures; None where nothing fits."""
        rows = [
            {"decided": list(decided), "step_seconds": step if step < math.inf else None}
            for decided, step in self.steps.items()
        ]
        shares = self.shares()
        return {
            "ablation": rows,
            "gained_seconds": self.gained if shares else None,
            "gained_seconds_by_decision": shares,
        }


def ablation(
    profile: Profile,
    cluster: Cluster,
    num_microbatches: int,
    stop: Stop,
    seed: int = 0,
    say: Callable[[int, int], None] = lambda done, total: None,
) -> Ablation:
    """Plan once for each combination of decisions, each until `stop`.

    A plan of fewer decisions is one of more as well: no step is longer than that of a combination
    within it. `say` hears how many of all searches are done.

    Raises:
        InfeasibleError: nothing fits, whatever is decided.
    """
    steps: dict[tuple[str, ...], float] = {}
    rows = combinations_for(profile, cluster)
    for number, decided in enumerate(rows):
        say(number, len(rows))
        known = [step for other, step in steps.items() if set(other) < set(decided)]
        mode = "auto" if "head" in decided else "never"
        try:
            answer = search(
                profile, cluster, num_microbatches, stop, seed, decide=decided, shard_head=mode
            )
        except InfeasibleError:
            if number + 1 == len(rows) and not any(map(math.isfinite, known)):
                raise
            known.append(math.inf)
        else:
            known.append(answer.timeline.step)
        steps[decided] = min(known)
    return Ablation(steps)


def combinations_for(profile: Profile, cluster: Cluster) -> list[tuple[str, ...]]:
    """All of `FACTORS`, then with recomputation and the head, where those are a question here."""
    rows = [some for size in range(len(FACTORS) + 1) for some in combinations(FACTORS, size)]
    limited = any(device.memory_bytes < math.inf for device in cluster.devices)
    asked = {"recompute": limited, "head": can_shard(profile, cluster)}
    for name in ON_TOP:
        if asked[name]:
            rows.append((*rows[-1], name))
    return rows


def _sorted(decided: tuple[str, ...]) -> tuple[str, ...]:
    """In the order of `FACTORS`, as the keys of `steps` are."""
    return tuple(name for name in FACTORS if name in decided)

"""The planner: partition, placement and order together, beside what others do."""

from __future__ import annotations

from adaptis.bounds import Bound, Bounds, lower_bounds
from adaptis.search.baselines import BASELINES, fitted, interleaved_tuned
from adaptis.search.counts import search_counts
from adaptis.search.tune import Progress, SearchResult, Stop, search

__all__ = [
    "BASELINES",
    "Bound",
    "Bounds",
    "Progress",
    "SearchResult",
    "Stop",
    "fitted",
    "interleaved_tuned",
    "lower_bounds",
    "search",
    "search_counts",
]

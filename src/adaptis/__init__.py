"""AdaPtis: adaptive pipeline parallelism for training large models in PyTorch.

The tree is the explanation: read the modules in the order of `tests/test_tree.py`'s river. Names
that need torch are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptis.cluster import Cluster, Device, Link, load_cluster, uniform
    from adaptis.errors import Error
    from adaptis.execute.train import Result, train
    from adaptis.measure.huggingface import HuggingFaceModel
    from adaptis.measure.stage import Chain
    from adaptis.plan import Plan, Stage, load_plan, save_plan
    from adaptis.profile import LayerCost, Profile, load_profile
    from adaptis.schedules import SCHEDULES
    from adaptis.search import SearchResult, Stop
    from adaptis.search import search as find_plan
    from adaptis.simulate import simulate_plan
    from adaptis.timeline import Timeline

_WHERE = {
    "Chain": "measure.stage",
    "Cluster": "cluster",
    "Device": "cluster",
    "Error": "errors",
    "HuggingFaceModel": "measure.huggingface",
    "LayerCost": "profile",
    "Link": "cluster",
    "Plan": "plan",
    "Profile": "profile",
    "Result": "execute.train",
    "SCHEDULES": "schedules",
    "SearchResult": "search",
    "Stage": "plan",
    "Stop": "search",
    "Timeline": "timeline",
    "load_cluster": "cluster",
    "load_plan": "plan",
    "load_profile": "profile",
    "save_plan": "plan",
    "simulate_plan": "simulate",
    "train": "execute.train",
    "uniform": "cluster",
}

__all__ = [  # noqa: RUF022 - in the order of the river
    "Error",
    "Device",
    "Link",
    "Cluster",
    "uniform",
    "load_cluster",
    "LayerCost",
    "Profile",
    "load_profile",
    "Chain",
    "HuggingFaceModel",
    "SCHEDULES",
    "Plan",
    "Stage",
    "load_plan",
    "save_plan",
    "Timeline",
    "simulate_plan",
    "Stop",
    "SearchResult",
    "find_plan",
    "Result",
    "train",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "find_plan":  # `adaptis.search` is the package
        return import_module("adaptis.search").search
    if name not in _WHERE:
        raise AttributeError(f"module 'adaptis' has no attribute {name!r}")
    return getattr(import_module(f"adaptis.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

"""The plan file of SlackPipe: JSON, `slackpipe.plan.v1` and `.v2`.

Forwards and whole backwards only. What SlackPipe says about itself (predicted makespan, hashes of
its inputs) is kept in the plan's provenance, for readers.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from adaptis.errors import InputError
from adaptis.exchange.orders import Found, plan_of, stops_from_counts
from adaptis.files import Fields
from adaptis.program import Compute, Op

if TYPE_CHECKING:
    from adaptis.plan import Plan
    from adaptis.profile import Profile

V1, V2 = "slackpipe.plan.v1", "slackpipe.plan.v2"
_SAID = (
    "solver_status",
    "predicted_makespan",
    "forward_costs",
    "backward_costs",
    "model_manifest_hash",
    "cost_profile_hash",
    "cost_profile_version",
    "cost_model",
)
_CUTS = {V1: ("layer_split",), V2: ("stage_layer_ranges", "layer_cuts", "cuts")}


def read_plan(value: dict[str, Any], profile: Profile | None = None, where: str = "plan") -> Plan:
    """The plan in a JSON object of SlackPipe's.

    Raises:
        InputError: it is no such object.
        PlanError: the operations are incomplete, or contradict the placement.
        ProgramError: the workers wait for each other in a circle.
    """
    said = {key: value[key] for key in _SAID if key in value}
    top = Fields({key: item for key, item in value.items() if key not in _SAID}, where)
    version = top.take("schema_version", str, V1)
    if version not in _CUTS:
        raise InputError(f"{where}: 'schema_version' is {version!r}; {V1!r} or {V2!r} is needed")
    names = ("num_microbatches", "num_stages", "num_workers", "num_layers")
    microbatches, stages, workers, layers = (top.count(name, least=1) for name in names)
    name = _only(value, _CUTS[version], where)
    counts = _counts(name, top.take(name, list), stages, layers, where)
    placement = top.take("stage_to_worker", list)
    if len(placement) != stages or not all(type(w) is int and 0 <= w < workers for w in placement):
        raise InputError(
            f"{where}: 'stage_to_worker' must give one of {workers} workers to each of {stages} "
            f"stages"
        )
    name = _only(value, ("operations", "worker_operations"), where)
    rows = _rows(top.take(name, type(value[name])), name, workers, where)
    top.done()
    cut = stops_from_counts(counts, profile, where)
    plan = plan_of(rows, cut, where, profile, placement, {"imported": version, **said})
    if plan.num_microbatches != microbatches:
        raise InputError(
            f"{where}: 'num_microbatches' is {microbatches}, but the operations are of "
            f"{plan.num_microbatches}"
        )
    return plan


def _only(value: dict[str, Any], names: tuple[str, ...], where: str) -> str:
    """The one key of `names` that is there."""
    there = [name for name in names if name in value]
    if len(there) != 1:
        found = " and ".join(there) or "none"
        raise InputError(f"{where}: one of the keys {', '.join(names)} is needed, found {found}")
    return there[0]


def _counts(name: str, cuts: list[Any], stages: int, layers: int, where: str) -> list[int]:
    """How many layers each stage has, from numbers of layers, ranges or boundaries."""
    pairs: list[Any]
    if name == "stage_layer_ranges":
        pairs = cuts
    elif any(type(cut) is not int for cut in cuts):
        pairs = []
    else:
        if name == "layer_split":
            cuts = [sum(cuts[:i]) for i in range(len(cuts) + 1)]
        inner = cuts[1:-1] if cuts[:1] == [0] and cuts[-1:] == [layers] else cuts
        pairs = [list(pair) for pair in pairwise((0, *inner, layers))]
    expected = 0
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(n) is int for n in pair)):
            break
        if pair[0] != expected or pair[1] <= expected:
            break
        expected = pair[1]
    else:
        if len(pairs) == stages and expected == layers:
            return [stop - start for start, stop in pairs]
    raise InputError(
        f"{where}: {name!r} must cut {layers} layers into {stages} stages of at least one, in "
        f"order and without gaps"
    )


def _rows(operations: object, name: str, workers: int, where: str) -> list[list[Found]]:
    """Each worker's operations, from a list or from an object by the worker's number."""
    if isinstance(operations, dict):
        if set(operations) != {str(worker) for worker in range(workers)}:
            raise InputError(f"{where}: {name!r} must have a key for each of {workers} workers")
        operations = [operations[str(worker)] for worker in range(workers)]
    if not isinstance(operations, list) or len(operations) != workers:
        raise InputError(f"{where}: {name!r} must have a list for each of {workers} workers")
    rows = []
    for worker, row in enumerate(operations):
        if not isinstance(row, list):
            raise InputError(f"{where}: {name}[{worker}] must be a list of operations")
        rows.append([_operation(item, f"{name}[{worker}][{i}]", where)
                     for i, item in enumerate(row)])  # fmt: skip
    return rows


def _operation(item: object, at: str, where: str) -> Found:
    entry = Fields(item, f"{where}: {at}")
    kind = entry.take("kind", str)
    if kind not in ("F", "B"):
        raise InputError(f"{where}: {at}: 'kind' is {kind!r}; 'F' or 'B' is needed")
    compute = Compute(Op(kind), entry.count("stage"), entry.count("microbatch"))
    entry.done()
    return Found(at, compute)

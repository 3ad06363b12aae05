"""A plan's cut, for systems that take a cut and run an order of their own (or torch's CSV).

Their placement is fixed: Megatron-LM and torchtitan put stage i on rank i mod p, DeepSpeed has one
stage a rank. Plans that are placed in another way are refused.
"""

from __future__ import annotations

import json
from itertools import groupby
from typing import TYPE_CHECKING

from adaptis.errors import PlanError
from adaptis.exchange.torch_csv import write_orders
from adaptis.model import EMBEDDING, HEAD

if TYPE_CHECKING:
    from adaptis.plan import Plan
    from adaptis.profile import Profile

MTP = "mtp"  # the kind of a layer that predicts the token after the next
_LETTERS = {EMBEDDING: "E", MTP: "m", HEAD: "L"}  # of Megatron's layout; all others: t


def megatron(plan: Plan, profile: Profile) -> str:
    """The value of Megatron-LM's `--pipeline-model-parallel-layout`: `Et*3|t*4|t*3L`.

    Raises:
        PlanError: the plan is placed or cut in a way that a layout cannot say.
    """
    _looped(plan, "a layout of Megatron-LM")
    _ends(plan, profile, "a layout of Megatron-LM")
    letters = [_LETTERS.get(layer.kind, "t") for layer in profile.layers]
    last = len(plan.stages) - 1
    for s, stage in enumerate(plan.stages):
        if "m" in letters[stage.start : stage.stop] and plan.placement[s] != plan.placement[last]:
            raise PlanError(
                f"stage {s} holds an MTP layer, which Megatron-LM has on the last rank only"
            )
    stages = ("".join(letters[stage.start : stage.stop]) for stage in plan.stages)
    return "|".join(map(_repeated, stages)) + "\n"


def _repeated(text: str) -> str:
    """`ttt` as `t*3`."""
    runs = ((letter, len(list(run))) for letter, run in groupby(text))
    return "".join(f"{letter}*{count}" if count > 1 else letter for letter, count in runs)


def torchtitan(plan: Plan, profile: Profile, schedule: str = "schedule.csv") -> str:
    """The keys of torchtitan's section `parallelism`, as JSON; `schedule` names the CSV beside.

    Raises:
        PlanError: the plan is placed or cut in a way that torchtitan cannot run.
    """
    names = {EMBEDDING: ["tok_embeddings"], HEAD: ["norm", "lm_head"]}
    keys = {
        "pipeline_parallel_degree": plan.num_devices,
        "num_pp_microbatches": plan.num_microbatches,
        "module_fqns_per_model_part": _modules(plan, profile, names, "layers.", "torchtitan"),
        "pipeline_parallel_schedule_csv": schedule,
    }
    return json.dumps(keys, indent=1) + "\n"


def automodel(plan: Plan, profile: Profile, schedule: str = "schedule.csv") -> str:
    """The keys of NeMo Automodel's `PipelineConfig`, as JSON (which YAML holds).

    Raises:
        PlanError: the plan is placed or cut in a way that Automodel cannot run.
    """
    names = {EMBEDDING: ["model.embed_tokens"], HEAD: ["model.norm", "lm_head"]}
    modules = _modules(plan, profile, names, "model.layers.", "Automodel")
    keys = {
        "pp_schedule_csv": schedule,
        "module_fqns_per_model_part": [[*part, "model.rotary_emb"] for part in modules],
    }
    return json.dumps(keys, indent=1) + "\n"


def deepspeed(plan: Plan) -> str:
    """The boundaries that DeepSpeed keeps in `PipelineModule.parts`, as JSON.

    Raises:
        PlanError: the plan is not one stage a rank, in their order.
    """
    _contiguous(plan, "DeepSpeed")
    if plan.placement != tuple(range(plan.num_devices)):
        raise PlanError(
            f"DeepSpeed has stage i on rank i, but the stages are on {list(plan.placement)}"
        )
    return json.dumps([0, *(stage.stop for stage in plan.stages)]) + "\n"


def _contiguous(plan: Plan, reader: str) -> None:
    """Refuse what is no single chain of stages that hold all layers."""
    if plan.copies > 1 or plan.head_reductions:
        what = f"{plan.copies} copies" if plan.copies > 1 else "a head that all devices share"
        raise PlanError(f"{reader} has no word for {what}; export a plan without it")


def _looped(plan: Plan, reader: str) -> None:
    _contiguous(plan, reader)
    ranks = plan.num_devices
    for s, rank in enumerate(plan.placement):
        if rank != s % ranks:
            raise PlanError(
                f"{reader} puts stage {s} on rank {s} mod {ranks} = {s % ranks}, but the plan has "
                f"it on {rank}; export a plan that is placed in a loop"
            )
    if len(plan.stages) % ranks:
        raise PlanError(
            f"{reader} needs as many stages on each rank, found {len(plan.stages)} on {ranks}"
        )


def _ends(plan: Plan, profile: Profile, reader: str) -> None:
    """One embedding, first; one head, last."""
    plan.fits(profile)
    kinds = [layer.kind for layer in profile.layers]
    for kind, place in ((EMBEDDING, 0), (HEAD, len(kinds) - 1)):
        found = [i for i, other in enumerate(kinds) if other == kind]
        if found != [place]:
            raise PlanError(
                f"{reader} needs one layer of kind {kind!r}, layer {place}; {profile.model} has "
                f"it at {found}"
            )


def _modules(
    plan: Plan, profile: Profile, names: dict[str, list[str]], block: str, reader: str
) -> list[list[str]]:
    """The names of each stage's modules, the blocks numbered from 0."""
    write_orders(plan)  # torch runs the order: refuse what it cannot
    _looped(plan, reader)
    _ends(plan, profile, reader)
    modules, blocks = [], 0
    for layer in profile.layers:
        modules.append(names.get(layer.kind, [f"{block}{blocks}"]))
        blocks += layer.kind not in names
    return [
        [name for names in modules[stage.start : stage.stop] for name in names]
        for stage in plan.stages
    ]

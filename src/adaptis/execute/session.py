"""A model in training under one plan, as one rank sees it.

Every rank builds its own stages only. Parameters are known by their global names; a name that
several ranks hold is one parameter (tied embedding and head), whose gradients are summed in the
order of the ranks before each update.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from adaptis.check import check
from adaptis.errors import PlanError
from adaptis.execute.executor import Executor, describe, refuse_unknown
from adaptis.execute.transport import TorchTransport
from adaptis.lower import lower
from adaptis.measure.compute import StageCompute
from adaptis.program import Compute, Op, parts
from adaptis.timeline import Timeline, from_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor, nn

    from adaptis.execute.executor import Row
    from adaptis.execute.world import World
    from adaptis.measure.stage import Microbatch, StageModule, TorchModel
    from adaptis.plan import Plan

    Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

_SHARED_TAG = 1 << 30  # above every tag of the transport


@dataclass(frozen=True, slots=True)
class StepResult:
    """One step on this rank; times are seconds of the machine's monotonic clock."""

    loss: float  # of the whole batch, the same on every rank
    begin: float
    end: float  # the optimizer included
    rows: list[Row]


class Session:
    """One plan, running."""

    def __init__(
        self,
        world: World,
        model: TorchModel,
        plan: Plan,
        *,
        optimizer: Optimizer,
        seed: int = 0,
        key: int = 0,
    ) -> None:
        """Check `plan`, build this rank's stages and its optimizer.

        Raises:
            PlanError: the plan is for another number of devices or layers.
            ProgramError: it breaks a rule.
        """
        _suits(plan, model, world.size)
        self.plan, self.model, self.world = plan, model, world
        self.program = lower(plan)
        check(self.program)
        refuse_unknown(self.program)
        self.steps = 0
        self._key = key
        device = world.rank
        lines = [
            describe(self.program, device, i) for i in range(len(self.program.devices[device]))
        ]
        world.tell("program", key, lines)
        modules = {
            s: model.build(stage.start, stage.stop, seed=seed)
            for s, stage in enumerate(plan.stages)
            if stage.device == device
        }
        self.parameters = _joined(modules.values())
        self.buffers = {
            n: b for module in modules.values() for n, b in module.global_buffers().items()
        }
        split = {
            c.stage
            for work in plan.programs[device]
            for c in parts(work)
            if c.op is Op.BACKWARD_INPUT
        }
        self.stages = {
            s: StageCompute(
                model,
                module,
                last=s == len(plan.stages) - 1,
                split=s in split,
                recompute=plan.stages[s].recompute,
            )
            for s, module in modules.items()
        }
        trained = [p for p in self.parameters.values() if p.requires_grad]
        self.optimizer = optimizer(trained) if trained else None
        self.shared = self._find_shared()
        transport = TorchTransport(self.program.num_stages, plan.num_microbatches)
        self._transport = transport
        self._executor = Executor(self.program, device, self.stages, transport, world.progress)

    def _find_shared(self) -> list[tuple[str, list[int]]]:
        """The names that other ranks hold too, with all their holders."""
        holders: dict[str, list[int]] = {}
        for rank, names in enumerate(self.world.gather(json.dumps(sorted(self.parameters)))):
            for name in json.loads(names):
                holders.setdefault(name, []).append(rank)
        return [
            (n, ranks) for n, ranks in holders.items() if len(ranks) > 1 and n in self.parameters
        ]

    def step(
        self, batch: Sequence[Microbatch], watch: Callable[[], None] | None = None
    ) -> StepResult:
        """Train on one batch; `watch` is called after each computation.

        Raises:
            PlanError: the batch has another number of micro-batches than the plan.
        """
        if len(batch) != self.plan.num_microbatches:
            raise PlanError(
                f"the batch has {len(batch)} micro-batches, the plan is for "
                f"{self.plan.num_microbatches}; "
                f"plan again with --microbatches {len(batch)}"
            )
        weight = 1.0 / sum(self.model.weight(microbatch) for microbatch in batch)
        self._transport.begin([_signature(microbatch) for microbatch in batch])
        self.world.progress.begin(self._key, self.steps)
        begin = time.perf_counter()
        rows = self._executor.run(batch, weight, self._update, watch)
        end = time.perf_counter()
        self.world.progress.leave()
        self.steps += 1
        return StepResult(self.world.sum(self._loss()), begin, end, rows)

    def _loss(self) -> float:
        last = self.stages.get(len(self.plan.stages) - 1)
        if last is None:
            return 0.0
        total = sum(float(last.losses[m]) for m in range(self.plan.num_microbatches))
        last.reset()
        return total

    def _update(self) -> None:
        """STEP: sum shared gradients, step the optimizer, forget the gradients."""
        for index, (name, holders) in enumerate(self.shared):
            self._sum_shared(self.parameters[name], holders, _SHARED_TAG + index)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def _sum_shared(self, parameter: nn.Parameter, holders: list[int], tag: int) -> None:
        own = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        others = {rank: torch.empty_like(own) for rank in holders if rank != self.world.rank}
        sends = [dist.isend(own, rank, tag=tag) for rank in others]
        receives = [dist.irecv(tensor, rank, tag=tag) for rank, tensor in others.items()]
        for work in [*sends, *receives]:
            if work is not None:
                work.wait()
        terms = [own if rank == self.world.rank else others[rank] for rank in holders]
        total = terms[0].clone()
        for term in terms[1:]:
            total += term
        parameter.grad = total

    def timeline(self, result: StepResult, name: str) -> Timeline:
        """A step of all ranks as a timeline, the same on every rank; every rank calls this."""
        mine = {
            "begin": result.begin,
            "end": result.end,
            "rows": [[c.op.value, c.stage, c.microbatch, s, e] for c, s, e in result.rows],
        }
        parts = [json.loads(text) for text in self.world.gather(json.dumps(mine))]
        zero = min(part["begin"] for part in parts)
        rows = [
            [
                (Compute(Op(op), s, m), begin - zero, end - zero)
                for op, s, m, begin, end in part["rows"]
            ]
            for part in parts
        ]
        return from_rows(
            rows,
            name=name,
            source="measured",
            placement=self.plan.placement,
            num_microbatches=self.plan.num_microbatches,
            step=max(part["end"] for part in parts) - zero,
        )


def _suits(plan: Plan, model: TorchModel, size: int) -> None:
    if plan.num_devices != size:
        raise PlanError(
            f"the plan is for {plan.num_devices} devices, {size} are running; start as many "
            f"processes"
        )
    if plan.num_layers != len(model.layers):
        raise PlanError(
            f"the plan covers {plan.num_layers} "
            f"layers{f' of {plan.model}' if plan.model else ''}, but "
            f"{model.name} has {len(model.layers)}; make a plan for it with `adaptis plan`"
        )


def _signature(microbatch: Microbatch) -> object:
    """Micro-batches of equal signatures have equal shapes all the way."""
    return tuple(sorted((name, tuple(t.shape), str(t.dtype)) for name, t in microbatch.items()))


def _joined(modules: Iterable[StageModule]) -> dict[str, nn.Parameter]:
    """All parameters by global name; one that two stages of this rank hold becomes one object."""
    result: dict[str, nn.Parameter] = {}
    for module in modules:
        for name, parameter in module.global_parameters().items():
            if name in result:
                _replace(module, parameter, result[name])
            else:
                result[name] = parameter
    return result


def _replace(module: nn.Module, old: Tensor, new: nn.Parameter) -> None:
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter is old:
                setattr(part, name, new)

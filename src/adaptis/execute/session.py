"""A model in training under one plan, as one rank sees it.

Every rank builds its own stages only, and its rows of a sharded head. Parameters are known by
their global names; a name that several ranks hold is one parameter (tied embedding and head, copies
of a stage), whose gradients are summed before each update. Rows [a, b) of NAME are `NAME[a:b]`.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from adaptis.check import check
from adaptis.errors import PlanError
from adaptis.execute.device import clock_of, on_device
from adaptis.execute.evaluation import Evaluation
from adaptis.execute.executor import Executor, describe, links_of
from adaptis.execute.gradients import Gradients
from adaptis.execute.head import ShardedHead
from adaptis.execute.mesh import Mesh, groups
from adaptis.execute.offload import HostMemory
from adaptis.execute.transport import WireTransport
from adaptis.execute.wire import wire_of
from adaptis.lower import lower
from adaptis.measure.compute import StageCompute
from adaptis.measure.slices import cut
from adaptis.program import Compute, Op, Overlap, parts
from adaptis.timeline import Timeline, from_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from torch.distributed.device_mesh import DeviceMesh

    from adaptis.execute.executor import Row
    from adaptis.execute.mesh import Parallelize
    from adaptis.execute.world import World
    from adaptis.measure.stage import Microbatch, StageModule, TorchModel
    from adaptis.plan import Plan
    from adaptis.program import Program

    Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    Schedule = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


@dataclass(frozen=True, slots=True)
class StepResult:
    """One step on this rank; times are seconds of the machine's monotonic clock."""

    loss: float  # of the whole batch, the same on every rank
    begin: float
    end: float  # the optimizer included
    rows: list[Row]
    norm: float = 0.0  # of all gradients before they were clipped; 0 where they are not


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
        max_norm: float = 0.0,
        autocast: torch.dtype | None = None,
        schedule: Schedule | None = None,
        mesh: DeviceMesh | None = None,
        parallelize: Parallelize | None = None,
    ) -> None:
        """Check `plan`, build this rank's stages and its optimizer.

        Args:
            world: the ranks; each does the same.
            model: what is trained.
            plan: how.
            optimizer: makes the optimizer from this rank's parameters; under a mesh they may come
                in groups, as torch's optimizers take them.
            seed: of the initial weights.
            key: tells this program from others in the same run.
            max_norm: gradients are clipped to this global norm; 0: they are not.
            autocast: what products are computed in, where it is not the parameters' own type.
            schedule: makes, from the optimizer, what moves the learning rate after each step.
            mesh: of all ranks, with a dimension "pp" that the plan is for, and any of "dp", "fsdp"
                and "tp"; see `mesh`. None: all ranks are one pipeline.
            parallelize: cuts one layer over the "tp" dimension, which it is given too.

        Raises:
            PlanError: the plan is for another number of devices or layers, or does not go together
                with the mesh.
            ProgramError: it breaks a rule.
        """
        plan = _clipped(plan, max_norm)
        self.mesh = Mesh(world, mesh, parallelize)
        world = self.mesh.row
        if plan.replicas == 1:
            plan = replace(plan, replicas=self.mesh.data.size)
        _suits(plan, model, world.size)
        self.plan, self.model, self.world = plan, model, world
        self.program = lower(plan)
        check(self.program)
        self.steps = 0
        self._key, self._max_norm, self._norm = key, max_norm, 0.0
        self._autocast = autocast
        self._evaluation: Evaluation | None = None
        self._announce()
        modules = self._build_modules(seed)
        self.parameters = _joined(modules.values())
        self.buffers = {
            n: b for module in modules.values() for n, b in module.global_buffers().items()
        }
        self.stages = self._build_stages(modules, seed)
        self.head = self._build_head(seed)
        rows = self.head.rows if self.head else {}
        if self.head:
            self.parameters |= self.head.parameters
        self.mesh.share(self.program, modules, self.head.parameters.values() if self.head else ())
        trained = groups(p for p in self.parameters.values() if p.requires_grad)
        self.optimizer = optimizer(trained) if trained else None
        self.schedule = schedule(self.optimizer) if schedule and self.optimizer else None
        self._gradients = Gradients(self.mesh, self.parameters, rows)
        self._transport = self._build_transport()
        self._executor = Executor(
            self.program,
            world.rank,
            self.stages,
            self._transport,
            world.progress,
            host=HostMemory(),
            head=self.head,
            shared=self.mesh if mesh is not None else None,
            clock=clock_of(world.device),
        )

    def _build_modules(self, seed: int) -> dict[int, StageModule]:
        modules = {
            s: self.model.build(stage.start, stage.stop, seed=seed, device=self.world.device)
            for s, stage in enumerate(self.plan.stages)
            if stage.device == self.world.rank
        }
        _joined(modules.values())
        self.mesh.divide(modules)
        return modules

    def _announce(self) -> None:
        """Tell whoever watches what this rank is going to do."""
        program, rank = self.program, self.world.rank
        lines = [describe(program, rank, i) for i in range(len(program.devices[rank]))]
        predicted = self.plan.provenance.get("step_seconds")
        seconds = predicted if isinstance(predicted, int | float) else 0.0
        self.world.tell("program", self._key, lines, seconds)

    def _build_stages(self, modules: dict[int, StageModule], seed: int) -> dict[int, StageCompute]:
        plan, layout = self.plan, self.program.layout
        split = {
            c.stage
            for work in plan.programs[self.world.rank]
            for c in parts(work)
            if c.op is Op.BACKWARD_INPUT
        }
        return {
            s: StageCompute(
                self.model,
                module,
                last=layout.is_last(s) and not layout.reductions,
                split=s in split,
                recompute=plan.stages[s].recompute,
                seed=seed,
                autocast=self._autocast,
                first=self.mesh.data.rank * plan.num_microbatches,
                device=self.world.device,
                previous=layout.previous,
            )
            for s, module in modules.items()
        }

    def _build_head(self, seed: int) -> ShardedHead | None:
        reductions = self.program.layout.reductions
        if not reductions:
            return None
        return ShardedHead(
            self.model,
            self.world.rank,
            self.world.size,
            seed=seed,
            reductions=reductions,
            home=self.plan.placement[-1],
            held=self.parameters,
            autocast=self._autocast,
            new_group=self.world.new_group,
            device=self.world.device,
        )

    def _build_transport(self) -> WireTransport:
        wire = wire_of(self.world)
        wire.prepare(links_of(self.program))
        return WireTransport(
            self.program.num_stages, self.plan.num_microbatches, wire, self.world.device
        )

    def step(
        self, batch: Sequence[Microbatch], watch: Callable[[], None] | None = None
    ) -> StepResult:
        """Train on one batch; `watch` is called after each computation.

        Each replica of a mesh has a batch of its own, which all ranks of it are given. Where the
        plan has slices, a batch of whole sequences is cut into them.

        Raises:
            PlanError: the batch has another number of micro-batches than the plan.
        """
        batch = self._sliced(batch)
        weight = self._weight(batch)
        self._transport.begin([_signature(microbatch) for microbatch in batch])
        self.world.progress.begin(self._key, self.steps)
        self.mesh.begin()
        begin = time.perf_counter()
        here = [on_device(microbatch, self.world.device) for microbatch in batch]
        rows = self._executor.run(here, weight, self.steps, self._update, watch)
        end = time.perf_counter()
        self.world.progress.leave()
        self.steps += 1
        return StepResult(
            self.mesh.data.sum(self.world.sum(self._loss())), begin, end, rows, self._norm
        )

    def evaluate(self, batch: Sequence[Microbatch]) -> float:
        """The loss of a batch, auxiliary losses not counted; the same on every rank.

        The model is in evaluation mode, and nothing changes: no gradient, no buffer, no step.

        Raises:
            PlanError: the batch has another number of micro-batches than the plan.
        """
        batch = self._sliced(batch)
        weight = self._weight(batch)
        if self._evaluation is None:
            self._evaluation = Evaluation(
                self.world, self.program, self.stages, self.head, self._key
            )
        self.mesh.whole(on=True)
        here = [on_device(microbatch, self.world.device) for microbatch in batch]
        loss = self._evaluation.run(here, weight, self.steps, [_signature(m) for m in batch])
        self.mesh.whole(on=False)
        return self.mesh.data.sum(loss)

    def _sliced(self, batch: Sequence[Microbatch]) -> Sequence[Microbatch]:
        """As many micro-batches as the plan has, whole sequences cut into its slices."""
        plan = self.plan
        if plan.previous and len(batch) == plan.num_sequences:
            return cut(batch, plan.previous)
        if len(batch) == plan.num_microbatches:
            return batch
        if plan.previous:
            raise PlanError(
                f"the batch has {len(batch)} micro-batches, the plan is for {plan.num_sequences} "
                f"in {plan.num_microbatches} slices; give as many of either"
            )
        raise PlanError(
            f"the batch has {len(batch)} micro-batches, the plan is for {plan.num_microbatches}; "
            f"plan again with --microbatches {len(batch)}"
        )

    def _weight(self, batch: Sequence[Microbatch]) -> float:
        """What multiplies each summed loss."""
        return 1.0 / self.mesh.data.sum(sum(self.model.weight(m) for m in batch))

    def _loss(self) -> float:
        """This rank's part of the loss of the whole batch."""
        owners: list[StageCompute | ShardedHead] = [*self.stages.values()]
        owners += [self.head] if self.head else []
        total = 0.0
        for m in range(self.plan.num_microbatches):  # in the order of plain training
            total += sum(float(owner.losses[m]) for owner in owners if m in owner.losses)
        for owner in owners:
            owner.losses.clear()
        return total

    def _update(self) -> None:
        """STEP: settle the gradients, step the optimizer, forget them."""
        self.mesh.finish()
        self._gradients.settle()
        if self._max_norm:
            self._norm = self._gradients.clip(self._max_norm)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if self.schedule is not None:
            self.schedule.step()

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
        timeline = from_rows(
            rows,
            name=name,
            source="measured",
            placement=self.plan.placement,
            num_microbatches=self.plan.num_microbatches,
            step=max(part["end"] for part in parts) - zero,
        )
        layout = self.program.layout
        return replace(
            timeline,
            copies=layout.copies,
            reductions=layout.reductions,
            partner=_partners(self.program),
        )


def _clipped(plan: Plan, max_norm: float) -> Plan:
    """The plan with gradients clipped if there is a norm for it."""
    if max_norm < 0 or (plan.clipped and not max_norm):
        raise PlanError(
            f"gradients are to be clipped by a global norm of {max_norm:g}; give a 'max_norm' "
            f"above 0, or use a plan without clipping"
        )
    return replace(plan, clipped=max_norm > 0)


def _partners(program: Program) -> NDArray[np.int32] | None:
    """For each row of a timeline the other part of its fused pair; None: there are no pairs."""
    partner: list[int] = []
    for row in program.devices:
        for instruction in row:
            here = len(partner)
            if isinstance(instruction, Overlap):
                partner += [here + 1, here]
            elif isinstance(instruction, Compute):
                partner.append(-1)
    return np.array(partner, np.int32) if max(partner, default=-1) >= 0 else None


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

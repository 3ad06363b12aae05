"""The same training by `torch.distributed.pipelining`, for the benchmarks that run beside it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from adaptis.execute.session import Optimizer
    from adaptis.execute.world import World
    from adaptis.measure.stage import Microbatch, StageModule, TorchModel

CLASSES: dict[str, Any] = {
    "1f1b": schedules.Schedule1F1B,
    "interleaved": schedules.ScheduleInterleaved1F1B,
    "zb-v": schedules.ScheduleZBVZeroBubble,
}


class Pipeline:
    """One rank of a pipeline of torch's."""

    def __init__(
        self,
        world: World,
        model: TorchModel,
        modules: Mapping[int, nn.Module],
        name: str,
        count: int,
        microbatches: int,
        optimizer: Optimizer,
        tied: Sequence[nn.Parameter] = (),
    ) -> None:
        """Take the stages of this rank.

        Args:
            world: the ranks.
            model: what gives the loss.
            modules: stage -> what takes the input, or the previous stage's output, alone.
            name: of the schedule, one of `CLASSES`.
            count: how many stages there are on all ranks.
            microbatches: of a step.
            optimizer: makes the optimizer from the parameters.
            tied: parameters whose gradients are summed over all ranks before the update, which
                torch leaves to its users.
        """
        self._world, self._model, self._tied = world, model, tied
        self._first, self._last = 0 in modules, count - 1 in modules
        self._scale = 1.0
        cpu = torch.device("cpu")
        stages = [PipelineStage(module, s, count, cpu) for s, module in modules.items()]
        self.schedule = CLASSES[name](
            stages[0] if name == "1f1b" else stages,
            microbatches,
            loss_fn=self._loss,
            scale_grads=False,
        )
        held = [p for module in modules.values() for p in module.parameters()]
        self.parameters = list(dict.fromkeys(held))
        self._optimizer = optimizer(self.parameters)

    def _loss(self, output: Tensor, labels: Tensor) -> Tensor:
        return self._model.loss(output, {"labels": labels}) * self._scale

    def step(self, batch: Sequence[Microbatch]) -> float:
        """Train on one batch; its loss, on every rank."""
        self._scale = 1.0 / sum(self._model.weight(m) for m in batch)
        joined = {key: torch.cat([m[key] for m in batch]) for key in ("inputs", "labels")}
        losses: list[Tensor] = []
        more: dict[str, Any] = {"target": joined["labels"], "losses": losses} if self._last else {}
        given = [joined["inputs"]] if self._first else []
        self.schedule.step(*given, return_outputs=False, **more)
        for parameter in self._tied:
            dist.all_reduce(parameter.grad)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return self._world.sum(float(torch.stack(losses).detach().sum()) if losses else 0.0)

    def dumped(self) -> str:
        """The schedule that runs, as CSV."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "schedule.csv")
            self.schedule._dump_csv(str(path), format="compute_only")
            return path.read_text()


class Alone(nn.Module):
    """A stage of ours that is given nothing but its input."""

    def __init__(self, stage: StageModule, length: int) -> None:
        """`length` of the sequences: stages of Hugging Face models want to see token ids."""
        super().__init__()
        self.stage, self._length, self._first = stage, length, stage.start == 0

    def forward(self, value: Tensor) -> Any:
        """The stage's output."""
        if self._first:
            return self.stage(None, {"inputs": value})
        blank = torch.zeros(len(value), self._length, dtype=torch.long)
        return self.stage(value, {"inputs": blank})


def tied_parameters(world: World, stages: Mapping[int, StageModule]) -> list[nn.Parameter]:
    """Make one on each rank what several stages share; those that both ranks hold, by name."""
    own: dict[str, nn.Parameter] = {}
    for stage in stages.values():
        for name, parameter in stage.global_parameters().items():
            _become(stage, parameter, own.setdefault(name, parameter))
    names = [set(json.loads(text)) for text in world.gather(json.dumps(sorted(own)))]
    return [own[name] for name in sorted(set.intersection(*names))]


def _become(stage: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    for module in stage.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter is old and old is not new:
                setattr(module, name, new)

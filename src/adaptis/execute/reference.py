"""Plain training in one process: what every plan is measured against.

No stages, no wrappers, no schedule: the unmodified model, its forward, its loss, `backward`, the
optimizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptis.measure.random import drawing
from adaptis.measure.stage import collecting_losses

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor, nn

    from adaptis.execute.session import Optimizer
    from adaptis.measure.stage import Microbatch, TorchModel


class Reference:
    """One model, trained as anybody would."""

    def __init__(self, model: TorchModel, *, optimizer: Optimizer, seed: int = 0) -> None:
        self.module, self._run = plain(model, seed)
        self._model, self._seed, self._steps = model, seed, 0
        trained = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer: torch.optim.Optimizer = optimizer(trained)

    def step(self, batch: Sequence[Microbatch]) -> float:
        """Train on one batch; its loss."""
        weight = 1.0 / sum(self._model.weight(microbatch) for microbatch in batch)
        device = next(self.module.parameters()).device
        total = 0.0
        for m, microbatch in enumerate(batch):
            with drawing(self._seed, self._steps, 0, m, device), collecting_losses() as terms:
                loss = self._model.loss(self._run(microbatch), microbatch) * weight
            if terms:  # by their share of the tokens, as a stage adds them
                share = self._model.weight(microbatch) * weight
                loss = loss + sum(terms[1:], terms[0]) * share
            loss.backward()
            total += float(loss.detach())
        self._steps += 1
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total


def plain(model: TorchModel, seed: int) -> tuple[nn.Module, Callable[[Microbatch], Tensor]]:
    """The whole model with every cut's initial weights, and how its output is computed."""
    from adaptis.measure.huggingface import HuggingFaceModel

    if isinstance(model, HuggingFaceModel):
        whole = model.plain(seed)
        return (
            whole,
            lambda microbatch: whole(input_ids=microbatch["inputs"], use_cache=False).logits,
        )
    chain = model.build(0, len(model.layers), seed=seed)
    return chain, lambda microbatch: chain(None, microbatch)

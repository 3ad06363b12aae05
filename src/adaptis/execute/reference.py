"""Plain training in one process: what every plan is measured against.

No stages, no wrappers, no schedule: the unmodified model, its forward, its loss, `backward`, the
optimizer.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adaptis.execute.device import CPU, on_device
from adaptis.measure.random import drawing
from adaptis.measure.slices import slice_of, slicing
from adaptis.measure.stage import collecting_losses

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

    from adaptis.execute.session import Optimizer, Schedule
    from adaptis.measure.slices import Slice
    from adaptis.measure.stage import Microbatch, TorchModel


class Reference:
    """One model, trained as anybody would."""

    def __init__(
        self,
        model: TorchModel,
        *,
        optimizer: Optimizer,
        seed: int = 0,
        max_norm: float = 0.0,
        autocast: torch.dtype | None = None,
        schedule: Schedule | None = None,
        device: torch.device = CPU,
    ) -> None:
        """Build the whole model on `device`; the other arguments are those of `Session`."""
        self.module, self._run = plain(model, seed, device)
        self._model, self._seed, self._steps = model, seed, 0
        self._max_norm, self._autocast = max_norm, autocast
        self._trained = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer: torch.optim.Optimizer = optimizer(self._trained)
        self.schedule = schedule(self.optimizer) if schedule else None

    def step(self, batch: Sequence[Microbatch], previous: Sequence[int] = ()) -> float:
        """Train on one batch; its loss.

        Args:
            batch: the micro-batches.
            previous: the slice before each of them, -1 where a sequence begins; empty: each is a
                sequence by itself.
        """
        weight = 1.0 / sum(self._model.weight(microbatch) for microbatch in batch)
        device = next(self.module.parameters()).device
        total = 0.0
        places: dict[int, Slice | None] = {}
        losses: dict[int, Tensor] = {}  # of sequences that have not ended
        for m, microbatch in enumerate(on_device(one, device) for one in batch):
            place = places[m] = slice_of(m, previous, places, live=True)
            with slicing(place):
                loss = self._loss(m, microbatch, weight)
            total += float(loss.detach())
            if place is not None and previous[m] >= 0:
                loss = loss + losses.pop(previous[m])
                del places[previous[m]]
            if place is not None and place.after:
                losses[m] = loss
            else:
                loss.backward()
        self._steps += 1
        if self._max_norm:
            nn.utils.clip_grad_norm_(self._trained, self._max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.schedule is not None:
            self.schedule.step()
        return total

    def _loss(self, m: int, microbatch: Microbatch, weight: float) -> Tensor:
        """The share of micro-batch `m` in the loss of the step."""
        device = next(self.module.parameters()).device
        with (
            drawing(self._seed, self._steps, 0, m, device),
            collecting_losses() as terms,
            self._casting(device),
        ):
            loss = self._model.loss(self._run(microbatch), microbatch) * weight
        if terms:  # by their share of the tokens, as a stage adds them
            share = self._model.weight(microbatch) * weight
            loss = loss + sum(terms[1:], terms[0]) * share
        return loss

    @torch.no_grad()
    def evaluate(self, batch: Sequence[Microbatch], previous: Sequence[int] = ()) -> float:
        """The loss of a batch in evaluation mode; the arguments are those of `step`."""
        weight = 1.0 / sum(self._model.weight(microbatch) for microbatch in batch)
        device = next(self.module.parameters()).device
        here = [on_device(microbatch, device) for microbatch in batch]
        self.module.eval()
        losses, places = [], {}
        for m, microbatch in enumerate(here):
            place = places[m] = slice_of(m, previous, places, live=True)
            with self._casting(device), slicing(place):
                losses.append(self._model.loss(self._run(microbatch), microbatch) * weight)
        self.module.train()
        return sum(map(float, losses))

    def _casting(self, device: torch.device) -> AbstractContextManager[Any]:
        on = self._autocast is not None
        return torch.autocast(device.type, dtype=self._autocast, enabled=on)


def plain(
    model: TorchModel, seed: int, device: torch.device = CPU
) -> tuple[nn.Module, Callable[[Microbatch], Tensor]]:
    """The whole model with every cut's initial weights, and how its output is computed."""
    from adaptis.measure.huggingface import HuggingFaceModel

    if isinstance(model, HuggingFaceModel):
        whole = model.plain(seed, device)
        return whole, partial(model.logits, whole)
    chain = model.build(0, len(model.layers), seed=seed, device=device)
    return chain, lambda microbatch: chain(None, microbatch)

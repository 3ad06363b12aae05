"""The last layer, sharded over all devices: each computes some columns of the logits.

A plain linear layer followed by the summed cross-entropy. Device d holds rows [Vd/p, V(d + 1)/p) of
its weight A, and the same of its bias. For each token, with z = A x and over its own rows only, S
computes the largest logit m, the sum e of exp(z - m) and the label's logit where that is here. From
those of all devices follow the largest logit M and the sum E over the vocabulary, so the loss
log E + M - z[label], and its gradient for each logit, ``exp(z - M) / E - [this is the label]``: T
multiplies it by x for the weight's gradient. The gradient of x is the sum over devices of A's rows
times it. With two reductions T computes it; with one S does, before M and E are known, and each
device's part is scaled by ``exp(m - M) / E`` before the parts are added.

What devices do together runs on threads beside the computation, in the program's order, which is
the same on all of them: nobody waits but who reads a sum.

Shapes, as the ends of names: t tokens of a micro-batch, h hidden, v rows of this device's part,
d devices.

References: Yeung et al., "Balancing Pipeline Parallelism with Vocabulary Parallelism", MLSys 2025,
algorithms 1 (two reductions) and 2 (one).
"""

from __future__ import annotations

import queue
import threading
import weakref
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from adaptis.errors import InputError, PlanError
from adaptis.execute.device import CPU, for_network
from adaptis.execute.rows import Rows
from adaptis.measure.stage import IGNORED_LABEL
from adaptis.program import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from adaptis.measure.stage import Microbatch, TorchModel

    Waits = dict[Kind, Callable[[], Any]]  # for each value that a sum leaves: wait for it


@dataclass(frozen=True, slots=True)
class _Piece:
    """This device's rows, in a parameter of their own or in one that it holds whole."""

    parameter: nn.Parameter
    start: int
    stop: int

    def values(self) -> Tensor:
        return self.parameter.detach()[self.start : self.stop]

    def add_gradient(self, gradient: Tensor) -> None:
        parameter = self.parameter
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad[self.start : self.stop] += gradient


@dataclass(slots=True)
class _Saved:
    """What S keeps of one micro-batch."""

    hidden: Tensor  # the last stage's output, as it came
    exponentials_tv: Tensor
    largest_t: Tensor
    statistics_3t: Tensor  # largest, sum of exponentials, the label's logit or 0
    token: Tensor  # the tokens whose label is here,
    row: Tensor  # and its row
    counts_t: Tensor  # the weight of the loss, 0 where the label is ignored
    gradient_th: Tensor | None = None  # of x: unscaled and without labels, then what T computes
    sums: list[Tensor] = field(default_factory=list)  # M and E


class ShardedHead:
    """This device's part of the head."""

    def __init__(
        self,
        model: TorchModel,
        rank: int,
        size: int,
        *,
        seed: int,
        reductions: int,
        home: int,
        held: Mapping[str, nn.Parameter],
        autocast: torch.dtype | None = None,
        new_group: Callable[[], Any] = dist.new_group,
        device: torch.device = CPU,
    ) -> None:
        """Take this rank's rows; every rank does this, in the same order as all else together.

        Args:
            model: its last layer is the head.
            rank: this device.
            size: how many devices there are.
            seed: of the initial weights.
            reductions: 1 or 2 for each micro-batch.
            home: the device of the last stage, which needs the gradient and reports the loss.
            held: what this device's stages hold; the rows of a tied weight lie in there.
            autocast: what products are computed in, where it is not the weight's own type.
            new_group: makes a process group of the devices.
            device: where this one's part lies.

        Raises:
            PlanError: the last layer is no linear layer followed by cross-entropy.
        """
        self.losses: dict[int, Tensor] = {}  # micro-batch -> its share of the step's loss, at home
        self.parameters: dict[str, nn.Parameter] = {}  # this device's own, by the name of the rows
        self.rows: dict[str, Rows] = {}  # which rows of what they are
        self.training = True  # otherwise S computes the loss alone and leaves nothing for T
        layer, names = _linear(model, seed, device)
        self.num_rows = layer.out_features
        if self.num_rows < size:
            raise PlanError(
                f"a head of {self.num_rows} rows cannot be sharded over {size} devices; plan with "
                f"--shard-head never"
            )
        self._start = self.num_rows * rank // size
        self._stop = self.num_rows * (rank + 1) // size
        self._weight = self._piece(names[0], layer.weight, held)
        self._bias = self._piece(names[1], layer.bias, held) if layer.bias is not None else None
        # As torch does: float64 is never cast.
        self._type = layer.weight.dtype
        if autocast is not None and self._type is not torch.float64:
            self._type = autocast
        self._reductions, self._home, self._is_home = reductions, home, rank == home
        self._size = size
        self._saved: dict[int, _Saved] = {}
        # Each kind of sum has the same order on all devices, but not the two among each other.
        self._sums_s, self._sums_t = Lane(new_group(), device), Lane(new_group(), device)

    def _piece(self, name: str, whole: Tensor, held: Mapping[str, nn.Parameter]) -> _Piece:
        if name in held:
            return _Piece(held[name], self._start, self._stop)
        own = nn.Parameter(whole.detach()[self._start : self._stop].clone(), whole.requires_grad)
        rows = Rows(name, self._start, self._stop)
        self.parameters[str(rows)], self.rows[str(rows)] = own, rows
        return _Piece(own, 0, self._stop - self._start)

    def scores(self, m: int, hidden: Tensor, microbatch: Microbatch, weight: float) -> None:
        """S: logits and their share of the sums; with one reduction the unscaled gradient too."""
        weights_vh = self._weight.values().to(self._type)
        hidden_th = hidden.reshape(-1, hidden.shape[-1]).to(self._type)
        bias = None if self._bias is None else self._bias.values().to(self._type)
        logits_tv = functional.linear(hidden_th, weights_vh, bias)
        logits_tv = logits_tv.to(torch.promote_types(logits_tv.dtype, torch.float32))
        labels_t = self._labels(microbatch)
        token = ((labels_t >= self._start) & (labels_t < self._stop)).nonzero().squeeze(1)
        row = labels_t[token] - self._start
        largest_t = logits_tv.amax(1)
        here_t = torch.zeros_like(largest_t)
        here_t[token] = logits_tv[token, row]
        exponentials_tv = logits_tv.sub_(largest_t[:, None]).exp_()
        statistics_3t = torch.stack([largest_t, exponentials_tv.sum(1), here_t])
        counts_t = (labels_t != IGNORED_LABEL).to(largest_t.dtype) * weight
        saved = _Saved(hidden, exponentials_tv, largest_t, statistics_3t, token, row, counts_t)
        if self._reductions == 1 and self.training:
            saved.gradient_th = (exponentials_tv.to(self._type) @ weights_vh).to(hidden.dtype)
        self._saved[m] = saved

    def _labels(self, microbatch: Microbatch) -> Tensor:
        labels_t = microbatch["labels"].reshape(-1)
        wrong = (labels_t >= self.num_rows) | ((labels_t < 0) & (labels_t != IGNORED_LABEL))
        if bool(wrong.any()):
            raise InputError(
                f"a label is {int(labels_t[wrong][0])}; the head has {self.num_rows} rows, so "
                f"labels lie in [0, {self.num_rows}) or are {IGNORED_LABEL}"
            )
        return labels_t

    def sum_scores(self, m: int) -> Waits:
        """SUM_S: begin to add up what S left, on all devices."""
        saved = self._saved[m] if self.training else self._saved.pop(m)
        done = self._sums_s.submit(partial(self._sum_scores, m, saved))
        return {Kind.SUMS: done.result, Kind.INPUT_GRAD: done.result}

    def _sum_scores(self, m: int, saved: _Saved) -> Tensor | None:
        all_d3t = self._sums_s.gather(saved.statistics_3t, self._size)
        most_t = all_d3t[:, 0].amax(0)
        sum_t = (all_d3t[:, 1] * (all_d3t[:, 0] - most_t).exp()).sum(0)
        saved.sums = [self._sums_s.hand_over(most_t), self._sums_s.hand_over(sum_t)]
        if self._is_home:
            picked_t = all_d3t[:, 2].sum(0)
            loss = ((sum_t.log() + most_t - picked_t) * saved.counts_t).sum()
            self.losses[m] = self._sums_s.hand_over(loss)
        if self._reductions == 2 or not self.training:
            return None
        gradient_th = _present(saved.gradient_th)
        scale_t = ((saved.largest_t - most_t).exp() / sum_t * saved.counts_t).to(gradient_th.dtype)
        gradient_th = gradient_th.mul_(scale_t[:, None])
        counts = saved.counts_t[saved.token, None].to(gradient_th.dtype)
        gradient_th[saved.token] -= self._weight.values()[saved.row] * counts
        return self._at_home(gradient_th, saved, self._sums_s)

    def gradient(self, m: int, _: Any) -> None:
        """T: the weight's gradient, and with two reductions this device's part of the input's."""
        saved = self._saved[m] if self._reductions == 2 else self._saved.pop(m)
        most_t, sum_t = saved.sums
        scale_t = (saved.largest_t - most_t).exp() / sum_t * saved.counts_t
        gradient_tv = saved.exponentials_tv.mul_(scale_t[:, None])
        gradient_tv[saved.token, saved.row] -= saved.counts_t[saved.token]
        gradient_tv = gradient_tv.to(self._type)
        if self._weight.parameter.requires_grad:
            hidden_th = saved.hidden.reshape(-1, saved.hidden.shape[-1]).to(self._type)
            self._weight.add_gradient(gradient_tv.t().mm(hidden_th))
        if self._bias is not None and self._bias.parameter.requires_grad:
            self._bias.add_gradient(gradient_tv.sum(0))
        if self._reductions == 2:
            weights_vh = self._weight.values().to(self._type)
            saved.gradient_th = (gradient_tv @ weights_vh).to(saved.hidden.dtype)

    def sum_gradients(self, m: int) -> Waits:
        """SUM_t: begin to add up the input gradient that T left, on all devices."""
        saved = self._saved.pop(m)
        part_th = _present(saved.gradient_th)
        done = self._sums_t.submit(partial(self._at_home, part_th, saved, self._sums_t))
        return {Kind.INPUT_GRAD: done.result}

    def _at_home(self, part_th: Tensor, saved: _Saved, lane: Lane) -> Tensor:
        """The sum of all devices' parts, where the last stage is."""
        return lane.reduce(part_th, self._home).view(saved.hidden.shape)

    def finish(self) -> None:
        """Wait until all sums are done."""
        for lane in (self._sums_s, self._sums_t):
            lane.submit(lambda: None).result()

    def idle(self) -> bool:
        """Whether nothing is left over from a step."""
        return not self._saved

    def held(self) -> list[Tensor]:
        """What is kept from S to T."""
        kept = [
            (s.hidden, s.exponentials_tv, s.statistics_3t, s.counts_t, s.gradient_th)
            for s in self._saved.values()
        ]
        return [tensor for tensors in kept for tensor in tensors if tensor is not None]


class Lane:
    """A thread that runs what it is given one after the other, with a process group of its own.

    On a GPU it also has a stream of its own, begins after what the current stream was given before,
    and is done when the GPU is: `work` keeps until then what it reads.
    """

    def __init__(self, group: Any, device: torch.device = CPU) -> None:
        self._group = group
        self._home = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        # A daemon, and no pool: a rank that has failed must not wait for a sum that never comes.
        threading.Thread(target=_serve, args=(self._queue, device), daemon=True).start()
        weakref.finalize(self, self._queue.put, None)

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """Run `work` after all that was given before."""
        done: Future[Any] = Future()
        ready = None if self._home is None else self._home.record_event()
        self._queue.put((done, work, ready))
        return done

    def gather(self, tensor: Tensor, size: int) -> Tensor:
        """The tensors of all `size` devices, stacked; within `work`."""
        own = for_network(tensor, self._group)
        parts = [torch.empty_like(own) for _ in range(size)]
        dist.all_gather(parts, own, group=self._group)
        return torch.stack(parts).to(tensor.device)

    def reduce(self, tensor: Tensor, home: int) -> Tensor:
        """The sum of all devices' tensors, on `home`; within `work`, which loses its own."""
        own = for_network(tensor, self._group)
        dist.reduce(own, group_dst=home, group=self._group)
        return self.hand_over(own.to(tensor.device))

    def hand_over(self, tensor: Tensor) -> Tensor:
        """A tensor made in `work` for others, whose memory stays until they are done with it."""
        if self._home is not None:
            tensor.record_stream(self._home)
        return tensor


def _serve(tasks: queue.SimpleQueue[Any], device: torch.device) -> None:
    """Run tasks until there are no more; after one has failed all others fail as it did."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    failed: BaseException | None = None
    while (task := tasks.get()) is not None:
        done, work, ready = task
        try:
            if failed is not None:
                raise failed
            with torch.no_grad():
                done.set_result(work() if stream is None else _on(stream, ready, work))
        except BaseException as error:
            failed = error
            done.set_exception(error)
        del task, done, work  # and what they hold


def _on(stream: torch.cuda.Stream, ready: torch.cuda.Event, work: Callable[[], Any]) -> Any:
    """What `work` returns, once the GPU has done it on `stream`, after `ready`."""
    with torch.cuda.stream(stream):
        stream.wait_event(ready)
        result = work()
        stream.synchronize()
    return result


def _linear(model: TorchModel, seed: int, device: torch.device) -> tuple[nn.Linear, list[str]]:
    """The last layer of `model` as it is before any training, and the names of its parameters.

    Raises:
        PlanError: it is no linear layer followed by cross-entropy.
    """
    count = len(model.layers)
    module = model.build(count - 1, count, seed=seed, device=device)
    found = [part for part in module.modules() if any(True for _ in part.parameters(recurse=False))]
    names = {id(p): name for name, p in module.global_parameters().items()}
    if len(found) == 1 and isinstance(found[0], nn.Linear) and _computes(module, found[0], model):
        return found[0], [names[id(p)] for p in found[0].parameters()]
    raise PlanError(
        f"the plan shards the head of {model.name}, whose last layer is no linear layer followed "
        f"by the summed cross-entropy of its labels; plan with --shard-head never"
    )


def _computes(module: Any, layer: nn.Linear, model: TorchModel) -> bool:
    """Whether the layer and the loss do what the sums above rely on, tried on random numbers."""
    numbers = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 3, layer.in_features, generator=numbers).to(layer.weight)
    labels = torch.randint(layer.out_features, (2, 3), generator=numbers).to(hidden.device)
    labels[0, 0] = IGNORED_LABEL
    logits = functional.linear(hidden, layer.weight, layer.bias)
    expected = functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), reduction="sum"
    )
    microbatch = {"labels": labels}
    try:
        output = module(hidden, microbatch)
        loss = model.loss(output, microbatch)
    except Exception:
        return False
    return torch.equal(output, logits) and torch.allclose(loss.float(), expected, rtol=1e-5)


def _present(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise RuntimeError("the sum of a micro-batch comes before its S or T")
    return tensor

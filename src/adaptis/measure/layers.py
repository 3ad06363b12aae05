"""What each layer costs on this machine: a model and one micro-batch become a `Profile`.

Each distinct layer (by signature) is built once and timed with its real input, going round all of
them so that nothing sits warm in the cache as it never would in training. Per layer: F, fused B,
and I and W apart (their sum can exceed B: the split must pay for itself; what it makes F longer is
counted with I), bytes kept, bytes handed on, the optimizer's step.

A stage also costs something per instruction, whatever its layers (a Hugging Face forward builds
masks and rotary tables each time). It is found from a run of k layers: overhead = (sum of the
single times - time of the run) / (k - 1).

Where several processes will compute side by side, measure in as many at once: they share caches
and memory bandwidth.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

from adaptis.errors import InputError
from adaptis.measure.compute import StageCompute
from adaptis.measure.slices import Slice, slicing
from adaptis.measure.values import tensors_of
from adaptis.profile import LayerCost, Overheads, Profile, Shared, typical

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor, nn

    from adaptis.measure.stage import Microbatch, StageModule, TorchModel

    Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

LETTERS = ("F", "B", "I", "W")
PREPARING = "F for I and W"
RUN_LAYERS = 6  # at most so many consecutive layers to find the overhead of an instruction
WARMUP = 2


@dataclass(slots=True)
class _Subject:
    """Layers [start, stop) under measurement."""

    start: int
    stop: int
    compute: StageCompute
    module: StageModule
    inputs: Tensor | None
    gradient: Tensor | None = None
    output_bytes: int = 0
    saved_bytes: int = 0
    saved_weight_bytes: int = 0
    carried_bytes: int = 0
    update: float = 0.0
    seconds: dict[str, list[float]] = field(
        default_factory=lambda: {letter: [] for letter in (*LETTERS, PREPARING)}
    )

    def typical(self, letter: str, rounds: Sequence[int]) -> float:
        """Seconds in these rounds; I with what its preparation makes F longer."""

        def found(letter: str) -> float:
            return typical([self.seconds[letter][i] for i in rounds])

        longer = found(PREPARING) - found("F") if letter == "I" else 0.0
        return max(found(letter) + longer, 0.0)


class LayerMeter:
    """The layers of one model under measurement: rounds whenever it suits, then a profile."""

    def __init__(
        self,
        model: TorchModel,
        microbatch: Microbatch,
        *,
        optimizer: Optimizer,
        seed: int = 0,
        device: torch.device | str = "cpu",
        offset: float = 0.0,
    ) -> None:
        """Build every distinct layer of `model`, with the input that reaches it.

        Args:
            model: the chain.
            microbatch: an ordinary one; the profile's unit.
            optimizer: makes the optimizer whose step is timed.
            seed: of the initial weights.
            device: where to compute.
            offset: 0 to 1, where in the chain a round begins: processes that measure side by side
                should not all be at the same layer, for they will not be in training.
        """
        self._rounds = 0
        self._weight = 1.0 / model.weight(microbatch)
        microbatch = {name: tensor.to(device) for name, tensor in microbatch.items()}
        self._model, self._microbatch, self._seed, self._device = model, microbatch, seed, device
        self._singles, self._run = _subjects(model, microbatch, self._weight, seed, device)
        subjects = [*self._singles.values(), *([self._run] if self._run else [])]
        first = int(offset * len(subjects))
        self._subjects = subjects[first:] + subjects[:first]
        for _ in range(WARMUP):
            self.round(keep=False)
        for subject in self._singles.values():
            _sizes(subject, microbatch, self._weight)
            _update(subject, optimizer, device)

    def round(self, *, keep: bool = True) -> None:
        """Time each layer once: all F, then all B; all F, all I, all W.

        As in training, what a backward reads was computed a while ago and has left the caches.
        """
        self._rounds += 1
        halves = [self._fused, self._split]
        # Whichever comes second may find another machine: take turns.
        for half in halves[:: 1 if self._rounds % 2 else -1]:
            half(keep=keep)

    def _fused(self, *, keep: bool) -> None:
        for letter in ("F", "B"):
            self._pass(letter, keep=keep)

    def _split(self, *, keep: bool) -> None:
        for subject in self._subjects:
            subject.compute.split(on=True)
        for letter in (PREPARING, "I", "W"):
            self._pass(letter, keep=keep)
        for subject in self._subjects:
            subject.compute.split(on=False)

    def _pass(self, letter: str, *, keep: bool) -> None:
        """One operation on every subject; backwards go the other way round."""
        order = self._subjects if letter in ("F", PREPARING) else self._subjects[::-1]
        for subject in order:
            compute, gradient = subject.compute, subject.gradient
            forward = partial(compute.forward, 0, subject.inputs, self._microbatch, self._weight)
            calls = {
                "F": forward,
                PREPARING: forward,
                "B": partial(compute.backward, 0, gradient),
                "I": partial(compute.backward_input, 0, gradient),
                "W": partial(compute.backward_weight, 0),
            }
            seconds = _seconds(calls[letter], self._device)
            if keep:
                subject.seconds[letter].append(seconds)

    def forget(self) -> None:
        """Start the rounds anew."""
        for subject in self._subjects:
            for times in subject.seconds.values():
                times.clear()

    @property
    def kept(self) -> int:
        """How many rounds were kept since the start, or since `forget`."""
        return len(next(iter(self._singles.values())).seconds["F"])

    def profile(self, rounds: Sequence[int] | None = None) -> Profile:
        """The typical times of those rounds; None: of all that were kept."""
        model = self._model
        rounds = range(self.kept) if rounds is None else rounds
        overheads = _overheads(model, self._singles, self._run, rounds)
        return Profile(
            model=model.name,
            tokens_per_microbatch=max(1, round(model.weight(self._microbatch))),
            layers=tuple(
                _cost(model, i, self._singles, overheads, rounds) for i in range(len(model.layers))
            ),
            overheads=Overheads(
                **{_FIELDS[letter]: seconds for letter, seconds in overheads.items()}
            ),
            shared=_shared(model, self._seed),
            source=f"measured by adaptis: trimmed mean of {len(rounds)} rounds",
            machine=_machine(self._device),
        )


def _machine(device: torch.device | str) -> str:
    if torch.device(device).type == "cuda":
        device = torch.cuda.get_device_name(device)
    return f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {device}"


_FIELDS = {"F": "forward", "B": "backward", "I": "backward_input", "W": "backward_weight"}


def _key(model: TorchModel, index: int) -> str:
    layer = model.layers[index]
    return layer.signature or layer.name


def _subjects(
    model: TorchModel, microbatch: Microbatch, weight: float, seed: int, device: torch.device | str
) -> tuple[dict[str, _Subject], _Subject | None]:
    """Each distinct layer with its real input, and one run of consecutive layers."""
    count = len(model.layers)
    singles: dict[str, _Subject] = {}
    arriving: list[Tensor | None] = []
    hidden: Tensor | None = None
    for index in range(count):
        arriving.append(hidden)
        key = _key(model, index)
        if key not in singles:
            singles[key] = _subject(model, index, index + 1, hidden, seed, device)
        hidden = _output(singles[key], hidden, microbatch, weight)
    length = min(RUN_LAYERS, count - 2)
    if length < 2:
        return singles, None
    start = 1 + (count - 2 - length) // 2
    run = _subject(model, start, start + length, arriving[start], seed, device)
    _output(run, arriving[start], microbatch, weight)
    return singles, run


def _subject(
    model: TorchModel,
    start: int,
    stop: int,
    inputs: Tensor | None,
    seed: int,
    device: torch.device | str,
) -> _Subject:
    module = model.build(start, stop, seed=seed, device=device)
    compute = StageCompute(model, module, last=stop == len(model.layers), device=device)
    return _Subject(start, stop, compute, module, inputs)


def _output(
    subject: _Subject, inputs: Tensor | None, microbatch: Microbatch, weight: float
) -> Tensor | None:
    """The subject's output for `inputs`, which also makes the gradient that B will be given."""
    output = subject.compute.forward(0, inputs, microbatch, weight)
    if output is not None and subject.gradient is None:
        subject.gradient = torch.randn_like(output) * weight
        subject.output_bytes = output.untyped_storage().nbytes()
    subject.compute.backward(0, None if output is None else torch.zeros_like(output))
    return output


def _seconds(call: Callable[[], object], device: torch.device | str) -> float:
    """How long a call takes, until the device has done what it was given."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _sizes(subject: _Subject, microbatch: Microbatch, weight: float) -> None:
    """Bytes kept from F to B, and from I to W; each storage once, parameters not counted."""
    owned = {p.untyped_storage().data_ptr() for p in subject.module.parameters()}
    held: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            held[storage.data_ptr()] = storage
        return tensor

    subject.compute.split(on=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        subject.compute.forward(0, subject.inputs, microbatch, weight)
    subject.saved_bytes = sum(storage.nbytes() for storage in held.values())
    subject.compute.backward_input(0, subject.gradient)
    subject.saved_weight_bytes = subject.compute.pending_bytes(0)
    subject.compute.backward_weight(0)
    subject.compute.split(on=False)
    subject.carried_bytes = _carried(subject, microbatch, weight)


def _carried(subject: _Subject, microbatch: Microbatch, weight: float) -> int:
    """Bytes that the layers would leave for another slice; 0 where they refuse to be sliced."""
    place = Slice(after=0)
    try:
        with slicing(place):
            subject.compute.evaluate(subject.inputs, microbatch)
    except InputError:
        return 0
    left = [tensor for value in place.left.values() for tensor in tensors_of(value)]
    return sum(tensor.numel() * tensor.element_size() for tensor in left)


def _update(subject: _Subject, optimizer: Optimizer, device: torch.device | str) -> None:
    """Seconds of the optimizer's step; the second one, when its state exists."""
    parameters = [p for p in subject.module.parameters() if p.grad is not None]
    if not parameters:
        return
    instance = optimizer(parameters)
    times = [_seconds(instance.step, device) for _ in range(4)]
    subject.update = min(times[1:])


def _overheads(
    model: TorchModel, singles: dict[str, _Subject], run: _Subject | None, rounds: Sequence[int]
) -> dict[str, float]:
    """Seconds per instruction, by letter."""
    if run is None:
        return dict.fromkeys(LETTERS, 0.0)
    layers = [singles[_key(model, i)] for i in range(run.start, run.stop)]
    result = {}
    for letter in LETTERS:
        singly = [layer.typical(letter, rounds) for layer in layers]
        overhead = (sum(singly) - run.typical(letter, rounds)) / (len(layers) - 1)
        # An instruction cannot cost more than the cheapest layer does with it.
        result[letter] = min(max(overhead, 0.0), *singly)
    return result


def _cost(
    model: TorchModel,
    index: int,
    singles: dict[str, _Subject],
    overheads: dict[str, float],
    rounds: Sequence[int],
) -> LayerCost:
    layer, subject = model.layers[index], singles[_key(model, index)]
    seconds = {
        letter: max(subject.typical(letter, rounds) - overheads[letter], 0.0) for letter in LETTERS
    }
    parameters = subject.module.layer_parameters()[subject.start]
    size = sum(p.numel() * p.element_size() for p in parameters)
    trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    return LayerCost(
        name=layer.name,
        kind=layer.kind,
        forward=seconds["F"],
        backward_input=seconds["I"],
        backward_weight=seconds["W"],
        backward=seconds["B"],
        update=subject.update,
        parameter_bytes=size,
        state_bytes=size + 3 * trained,  # gradients and the two moments of Adam
        saved_bytes=subject.saved_bytes,
        saved_weight_bytes=subject.saved_weight_bytes,
        output_bytes=subject.output_bytes,
        carried_bytes=subject.carried_bytes,
    )


def _shared(model: TorchModel, seed: int) -> tuple[Shared, ...]:
    """The parameters that several layers list under one global name."""
    owners: dict[str, list[int]] = {}
    sizes: dict[str, int] = {}
    for index in (0, len(model.layers) - 1):
        for name, parameter in (
            model.build(index, index + 1, seed=seed, device="meta").global_parameters().items()
        ):
            owners.setdefault(name, []).append(index)
            sizes[name] = parameter.numel() * parameter.element_size()
    return tuple(
        Shared(tuple(layers), sizes[name])
        for name, layers in owners.items()
        if len(set(layers)) > 1
    )

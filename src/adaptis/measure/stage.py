"""What a model has to offer to be cut, measured and run: `TorchModel`, its stages, and `Chain`.

A model is an ordered chain of layers; a stage is any run of them, built without the others.
Parameters have global names that do not depend on the cut, and neither do their initial values.
This module knows nothing about where a model comes from (`huggingface` does), about plans, or about
other processes.

Shapes: B micro-batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import hashlib
import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from adaptis.errors import InputError
from adaptis.measure.random import begin_layer
from adaptis.model import EMBEDDING, HEAD, Layer

Microbatch = Mapping[str, Tensor]  # {"inputs": ids_BS, "labels": ids_BS}
Loss = Callable[[Tensor, Microbatch], Tensor]
IGNORED_LABEL = -100


class StageModule(nn.Module):
    """Consecutive layers [start, stop) of a model, as one module."""

    start: int
    stop: int

    @abstractmethod
    def forward(self, hidden: Any, microbatch: Microbatch) -> Any:
        """The stage's output from the previous stage's, which is None only where `start` is 0.

        Each is a tensor, or a tuple, list or dict of tensors. `random.begin_layer` is called before
        each layer, with its number in the chain.
        """

    @abstractmethod
    def global_parameters(self) -> dict[str, nn.Parameter]:
        """Each parameter once, by its global name; tied parameters share the name of the first."""

    @abstractmethod
    def global_buffers(self) -> dict[str, Tensor]:
        """The buffers that belong in a checkpoint, by global name."""

    def layer_modules(self) -> list[nn.Module]:
        """The layers, or where they are in pieces the parts of them, in their order."""
        return [self]

    @abstractmethod
    def layer_parameters(self) -> dict[int, list[nn.Parameter]]:
        """What each layer needs by itself; layers of one stage may share a tied parameter."""


class TorchModel(Protocol):
    """A model that can be built in parts."""

    name: str

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The chain, without building anything large."""
        ...

    def build(
        self, start: int, stop: int, *, seed: int, device: torch.device | str = "cpu"
    ) -> StageModule:
        """Layers [start, stop) with initial weights that depend on `seed` but not on the cut."""
        ...

    def loss(self, output: Any, microbatch: Microbatch) -> Tensor:
        """The loss of the last layer's output, summed over the tokens."""
        ...

    def weight(self, microbatch: Microbatch) -> float:
        """Over how many tokens `loss` sums."""
        ...


_losses: list[Tensor] | None = None  # where `auxiliary_loss` adds to; None: nobody asks


def auxiliary_loss(loss: Tensor) -> None:
    """Called in a layer's forward: add `loss`, a mean over the micro-batch's tokens, to the loss.

    It counts by the micro-batch's share of the tokens of the step, as the loss itself does, so that
    neither the cut nor the number of micro-batches matters.
    """
    if _losses is not None:  # in float32 at least: a cut must not change how the sum is rounded
        _losses.append(loss.to(torch.promote_types(loss.dtype, torch.float32)))


@contextmanager
def collecting_losses() -> Iterator[list[Tensor]]:
    """What `auxiliary_loss` is given meanwhile."""
    global _losses  # noqa: PLW0603 - layers are called by others' code, which hands nothing on
    outer, _losses = _losses, []
    try:
        yield _losses
    finally:
        _losses = outer


def cross_entropy(output: Tensor, microbatch: Microbatch) -> Tensor:
    """The summed token cross-entropy of logits_BSV, in float32, where the label is not -100."""
    labels = microbatch["labels"]
    logits = output.reshape(-1, output.shape[-1]).float()
    return functional.cross_entropy(
        logits, labels.reshape(-1), ignore_index=IGNORED_LABEL, reduction="sum"
    )


def num_tokens(microbatch: Microbatch) -> float:
    """How many labels count."""
    return float((microbatch["labels"] != IGNORED_LABEL).sum())


def check_range(start: int, stop: int, num_layers: int) -> None:
    """Refuse what is no run of layers.

    Raises:
        InputError: if [start, stop) is empty or leaves the chain.
    """
    if not 0 <= start < stop <= num_layers:
        raise InputError(
            f"layers [{start}, {stop}): a stage needs at least one layer within [0, {num_layers})"
        )


def digest(text: str) -> str:
    """A short id of a text, the same on every machine."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Draw numbers that depend on (`seed`, `name`) alone, apart from the caller's stream."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(int(digest(f"{seed}/{name}"), 16) >> 1)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def shapes(parameters: Mapping[str, Tensor]) -> str:
    """Names, shapes and types in one line, for signatures; frozen ones cost less."""
    return ", ".join(
        f"{name} {tuple(p.shape)} {p.dtype}{'' if p.requires_grad else ' frozen'}"
        for name, p in parameters.items()
    )


class Chain:
    """Any ordered list of modules, or of functions without arguments that make them, as a model.

    The first layer takes `microbatch["inputs"]`, each further one its predecessor's output: a
    tensor, or a tuple, list or dict of tensors. A layer whose forward has an argument named
    `microbatch` gets all of it too (masks, positions).
    Functions are called only where their layer is owned (and once on the meta device, to learn the
    shapes), so a chain may be larger than one process's memory. Modules are used as they are:
    building twice gives the same objects.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module | Callable[[], nn.Module]],
        loss: Loss = cross_entropy,
        *,
        name: str = "chain",
        kinds: Sequence[str] | None = None,
        tied: Mapping[tuple[int, str], tuple[int, str]] | None = None,
        weight: Callable[[Microbatch], float] = num_tokens,
    ) -> None:
        """Take the list; `tied` maps (layer, parameter) to the earlier one whose values it shares.

        Raises:
            InputError: if there is no layer, a kind too few, or a tie that names no parameter.
        """
        if not layers:
            raise InputError("a chain of no layers: at least one is needed")
        if kinds is not None and len(kinds) != len(layers):
            raise InputError(f"{len(kinds)} kinds for {len(layers)} layers: give one for each")
        self.name = name
        self._makers = tuple(layers)
        self._loss, self._weight = loss, weight
        self._tied = dict(tied or {})
        self._specimens = [_specimen(maker, index) for index, maker in enumerate(layers)]
        self._check_ties()
        self._layers = tuple(
            Layer(
                f"layers.{index}",
                kinds[index] if kinds else _kind(module, index, len(layers)),
                _signature(module),
            )
            for index, module in enumerate(self._specimens)
        )

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The chain."""
        return self._layers

    def build(
        self, start: int, stop: int, *, seed: int, device: torch.device | str = "cpu"
    ) -> StageModule:
        """Layers [start, stop) on `device`.

        Raises:
            InputError: if [start, stop) is no run of layers.
        """
        check_range(start, stop, len(self._makers))
        meta = torch.device(device).type == "meta"
        make = self._specimens.__getitem__ if meta else partial(self._make, seed=seed)
        modules = {index: make(index) for index in range(start, stop)}
        for (index, name), (source, source_name) in self._tied.items():
            if index in modules:
                origin = modules[source] if source in modules else make(source)
                _set_parameter(modules[index], name, origin.get_parameter(source_name))
        stage = _ChainStage(modules, self._tied)
        return stage if meta else stage.to(device)  # a given module stays real where it is

    def loss(self, output: Any, microbatch: Microbatch) -> Tensor:
        """The given loss of the last layer's output."""
        return self._loss(output, microbatch)

    def weight(self, microbatch: Microbatch) -> float:
        """Over how many tokens (or rows) the loss sums."""
        return self._weight(microbatch)

    def _make(self, index: int, seed: int) -> nn.Module:
        maker = self._makers[index]
        if isinstance(maker, nn.Module):
            return maker
        with seeded(seed, f"layers.{index}"):
            return maker()

    def _check_ties(self) -> None:
        for (index, name), (source, source_name) in self._tied.items():
            known = (
                0 <= source < index < len(self._makers) and (source, source_name) not in self._tied
            )
            if not known or (
                _shape(self._specimens[index], name) != _shape(self._specimens[source], source_name)
            ):
                raise InputError(
                    f"({index}, {name!r}) is tied to ({source}, {source_name!r}): both must be "
                    "parameters of one shape, the second in an earlier layer and not tied itself"
                )


class _ChainStage(StageModule):
    def __init__(
        self, modules: Mapping[int, nn.Module], tied: Mapping[tuple[int, str], tuple[int, str]]
    ) -> None:
        super().__init__()
        self.start, self.stop = min(modules), max(modules) + 1
        self._tied = tied
        self.layers = nn.ModuleDict({str(index): module for index, module in modules.items()})
        self._asking = {
            index for index, module in modules.items() if "microbatch" in _arguments(module)
        }

    def forward(self, hidden: Any, microbatch: Microbatch) -> Any:
        value = microbatch["inputs"] if hidden is None else hidden
        for index, layer in enumerate(self.layers.values(), self.start):
            begin_layer(index)
            value = layer(value, microbatch=microbatch) if index in self._asking else layer(value)
        return value

    def global_parameters(self) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for index, layer in self.layers.items():
            for name, parameter in layer.named_parameters():
                source, source_name = self._tied.get((int(index), name), (int(index), name))
                found[f"layers.{source}.{source_name}"] = parameter
        return found

    def global_buffers(self) -> dict[str, Tensor]:
        return {
            f"layers.{index}.{name}": buffer
            for index, layer in self.layers.items()
            for name, buffer in persistent_buffers(layer).items()
        }

    def layer_modules(self) -> list[nn.Module]:
        return list(self.layers.values())

    def layer_parameters(self) -> dict[int, list[nn.Parameter]]:
        return {int(index): list(layer.parameters()) for index, layer in self.layers.items()}


def _arguments(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(module.forward).parameters


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that `state_dict` holds, by name."""
    found: dict[str, Tensor] = {}
    for prefix, child in module.named_modules():
        for name, buffer in child.named_buffers(recurse=False):
            if name not in child._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def _specimen(maker: nn.Module | Callable[[], nn.Module], index: int) -> nn.Module:
    if isinstance(maker, nn.Module):
        return maker
    try:
        with torch.device("meta"), _Valueless():
            module: Any = maker()
    except Exception as error:
        raise InputError(
            f"layer {index} cannot be built on the meta device ({error}); give it as a module, "
            "or make its constructor free of values"
        ) from error
    if not isinstance(module, nn.Module):
        raise InputError(
            f"layer {index} makes a {type(module).__name__}, a torch.nn.Module is needed"
        )
    return module


class _Valueless(TorchFunctionMode):
    """Leaves initial values out: on the meta device torch loads its compiler to compute nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _kind(module: nn.Module, index: int, num_layers: int) -> str:
    if index == 0 and isinstance(module, nn.Embedding):
        return EMBEDDING
    if index == num_layers - 1 and isinstance(module, nn.Linear):
        return HEAD
    return type(module).__name__.lower()


def _signature(module: nn.Module) -> str:
    # Plain attributes count too: two layers may differ in nothing else, as in a number of repeats.
    plain = [
        f"{prefix}.{name}={value!r}"
        for prefix, child in module.named_modules()
        for name, value in sorted(vars(child).items())
        if not name.startswith("_") and isinstance(value, bool | int | float | str)
    ]
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    parameters = dict(module.named_parameters())
    text = "\n".join((kind, repr(module), shapes(parameters), *plain))
    return f"{type(module).__name__}-{digest(text)}"


def _shape(module: nn.Module, name: str) -> torch.Size | str:
    try:
        return module.get_parameter(name).shape
    except AttributeError:
        return f"{type(module).__name__} has no {name}"


def _set_parameter(module: nn.Module, name: str, value: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(path), leaf, value)

"""Causal language models of transformers, cut at any block without editing their classes.

Layer 0 is the input embedding, layers 1..L are the blocks, layer L+1 is the final norm with the
head. Every stage runs the model's own `forward` on the real token ids, so masks, rotary tables and
keyword arguments are rebuilt by the model's own code; blocks of other stages hand their input on,
and the hidden state is swapped at the stage's two borders ("boundary injection"). Models whose
blocks exchange more than the hidden state are refused.

Slices of a sequence hand on their keys and values in the form that transformers keeps them while it
generates, a `Cache`; so models whose every block keeps them there can be sliced, all others are
refused. Nothing here knows about plans or processes.
"""

from __future__ import annotations

import copy
import logging
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicLayer,
    PretrainedConfig,
    PreTrainedModel,
)

from adaptis.errors import InputError
from adaptis.measure.anatomy import (
    Anatomy,
    blocks_of,
    dissect,
    one_line,
    pack,
    probe,
    silent,
    split_call,
)
from adaptis.measure.random import begin_layer
from adaptis.measure.slices import carried, is_sliced
from adaptis.measure.stage import (
    Microbatch,
    StageModule,
    check_range,
    cross_entropy,
    num_tokens,
    persistent_buffers,
    seeded,
)
from adaptis.measure.weights import drop, materialise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from adaptis.model import Layer


class HuggingFaceModel:
    """Any causal language model of transformers, from its configuration, with random weights."""

    def __init__(
        self,
        config: PretrainedConfig | Mapping[str, Any],
        name: str = "",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Take a configuration, or the keys of a `config.json` (at least "model_type").

        Raises:
            InputError: if transformers knows no such model or refuses the configuration.
        """
        self._config = _configuration(config)
        self._dtype = dtype
        self.name = name or str(self._config.model_type)

    @property
    def config(self) -> PretrainedConfig:
        """The configuration; do not change it."""
        return self._config

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The chain, learned from a model on the meta device."""
        return self._anatomy.layers

    def build(
        self, start: int, stop: int, *, seed: int, device: torch.device | str = "cpu"
    ) -> StageModule:
        """Layers [start, stop) on `device`; the others exist only as empty shells.

        Raises:
            InputError: if [start, stop) is no run of layers, or the model cannot be cut.
        """
        check_range(start, stop, len(self.layers))
        model = _skeleton(self._config, self._dtype)
        if torch.device(device).type != "meta":
            materialise(model, self._anatomy, range(start, stop), seed)
        drop(model, self._anatomy, range(start, stop), torch.device(device))
        return _Stage(model, self._anatomy, start, stop).to(device)

    def plain(self, seed: int, device: torch.device | str = "cpu") -> PreTrainedModel:
        """The whole model as transformers has it, with the initial weights that the stages get."""
        model = _skeleton(self._config, self._dtype)
        materialise(model, self._anatomy, range(len(self.layers)), seed)
        nn.Module.to(model, device)
        return model

    def logits(self, whole: PreTrainedModel, microbatch: Microbatch) -> Tensor:
        """The output of a model that `plain` made; of a slice, behind those before it.

        Raises:
            InputError: if the micro-batch is a slice and the model cannot be sliced.
        """
        return _logits(whole, self._anatomy, microbatch)

    def loss(self, output: Tensor, microbatch: Microbatch) -> Tensor:
        """The summed cross-entropy of the logits; the labels are shifted already."""
        return cross_entropy(output, microbatch)

    def weight(self, microbatch: Microbatch) -> float:
        """How many labels count."""
        return num_tokens(microbatch)

    @cached_property
    def _anatomy(self) -> Anatomy:
        model = _skeleton(self._config, self._dtype)
        anatomy = dissect(model, self._dtype)
        materialise(model, anatomy, range(0), seed=0)
        drop(model, anatomy, range(0), torch.device("cpu"))
        return probe(model, anatomy)


class _CapturedError(Exception):
    """Leaves the model's forward with the output of a stage's last layer."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Block(DynamicLayer):
    """The keys and values of one block, with those of the slices before."""

    def __init__(self, block: nn.Module, seen: int) -> None:
        super().__init__()
        self._block, self._seen = block, seen

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = carried(self._block).append(key_states, value_states, dim=-2)
        return keys, values

    def get_seq_length(self) -> int:
        return self._seen


def _logits(model: PreTrainedModel, anatomy: Anatomy, microbatch: Microbatch) -> Tensor:
    """The model's own forward of a micro-batch, or of a slice behind those before it.

    Args:
        model: whole, or a stage of it.
        anatomy: of the whole model.
        microbatch: its "inputs" are the token ids.

    Raises:
        InputError: if a block of a sliced model keeps something else than keys and values.
    """
    tokens = microbatch["inputs"]
    if not is_sliced():
        return model(input_ids=tokens, use_cache=False).logits
    for layer in anatomy.layers[1:-1]:
        if "attention" not in layer.kind or "linear" in layer.kind:
            raise _unsliceable(model, layer)
    memory = carried(model)
    seen = 0 if memory.earlier is None else int(memory.earlier)
    memory.later = torch.tensor(seen + tokens.shape[1])
    cache = Cache(layers=[_Block(block, seen) for block in blocks_of(model, anatomy.blocks)])
    return model(input_ids=tokens, past_key_values=cache, use_cache=True).logits


def _unsliceable(model: PreTrainedModel, layer: Layer) -> InputError:
    return InputError(
        f"{model.config.model_type} cannot be trained in slices: {layer.name} ({layer.kind}) does "
        "not keep keys and values alone; use a plan without slices"
    )


class _Stage(StageModule):
    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, start: int, stop: int) -> None:
        super().__init__()
        self.model = model
        self.start, self.stop = start, stop
        self._anatomy = anatomy
        self._last_block = len(anatomy.layers) - 2
        self._received: Tensor | None = None
        for index, block in enumerate(blocks_of(model, anatomy.blocks)):
            block.forward = self._wrap(index + 1, block.forward)
        for name, module in model.named_modules():
            if start > anatomy.owner.get(name, start) == 0:
                module.forward = silent(module, anatomy.dtype)

    def forward(self, hidden: Tensor | None, microbatch: Microbatch) -> Tensor:
        self._received = hidden
        try:
            with _quiet():
                return _logits(self.model, self._anatomy, microbatch)
        except _CapturedError as captured:
            return captured.hidden
        finally:
            self._received = None

    def _wrap(self, layer: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        owned = self.start <= layer < self.stop
        inject_before = layer == self.start
        inject_after = layer == self._last_block == self.start - 1

        def call(*args: Any, **kwargs: Any) -> Any:
            hidden, args, kwargs = split_call(args, kwargs)
            if self.stop == 1:
                raise _CapturedError(hidden)
            if not owned:
                return pack(self._received if inject_after else hidden, self._anatomy.arity)
            begin_layer(layer)
            output = forward(self._received if inject_before else hidden, *args, **kwargs)
            if layer == self.stop - 1:
                raise _CapturedError(output[0] if isinstance(output, tuple) else output)
            if layer == self._last_block:
                begin_layer(layer + 1)
            return output

        return call

    def global_parameters(self) -> dict[str, nn.Parameter]:
        canonical = self._anatomy.canonical
        return {canonical[name]: parameter for name, parameter in self.model.named_parameters()}

    def global_buffers(self) -> dict[str, Tensor]:
        return {
            name: buffer
            for name, buffer in persistent_buffers(self.model).items()
            if self.start <= self._anatomy.owner.get(name.rpartition(".")[0], -1) < self.stop
        }

    def layer_modules(self) -> list[nn.Module]:
        owner = self._anatomy.owner
        names = [name for name, layer in owner.items() if self.start <= layer < self.stop]
        outer = [name for name in names if name.rpartition(".")[0] not in owner]
        return [self.model.get_submodule(name) for name in sorted(outer, key=owner.__getitem__)]

    def layer_parameters(self) -> dict[int, list[nn.Parameter]]:
        found: dict[int, dict[int, nn.Parameter]] = {i: {} for i in range(self.start, self.stop)}
        for name, module in self.model.named_modules():
            for parameter in module.parameters(recurse=False):
                found[self._anatomy.owner[name]][id(parameter)] = parameter
        return {layer: list(parameters.values()) for layer, parameters in found.items()}


def check_cut(model: HuggingFaceModel, seed: int = 0) -> None:
    """Run a tiny model cut at every layer and uncut, and compare the loss and all gradients.

    Raises:
        InputError: if they differ, or the cut model does not run.
    """
    vocabulary = int(model.config.get_text_config().vocab_size)
    with seeded(seed, "check_cut"):
        tokens = torch.randint(0, vocabulary, (2, 17))
    microbatch = {"inputs": tokens[:, :-1], "labels": tokens[:, 1:]}
    whole = model.plain(seed)
    expected = model.loss(whole(input_ids=microbatch["inputs"], use_cache=False).logits, microbatch)
    expected.backward()
    try:
        loss, gradients = _cut_everywhere(model, microbatch, seed)
    except Exception as error:
        raise InputError(
            f"{model.name} does not run when it is cut ({type(error).__name__}: {error}); "
            "its blocks exchange more than the hidden state, so keep it on one device"
        ) from error
    different = [] if torch.allclose(loss, expected, rtol=1e-6) else ["the loss"]
    for name, parameter in whole.named_parameters():
        if not _same(parameter.grad, gradients.get(name)):
            different.append(name)
    if different:
        raise InputError(
            f"{model.name} gives another result when it is cut ({different[0]} and "
            f"{len(different) - 1} more differ); its blocks exchange more than the hidden state, "
            "so keep it on one device"
        )


def _cut_everywhere(
    model: HuggingFaceModel, microbatch: Microbatch, seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    count = len(model.layers)
    stages = [model.build(layer, layer + 1, seed=seed) for layer in range(count)]
    received: list[Tensor | None] = [None]
    outputs: list[Tensor] = []
    for stage in stages:
        outputs.append(stage(received[-1], microbatch))
        received.append(outputs[-1].detach().requires_grad_())
    loss = model.loss(outputs[-1], microbatch)
    loss.backward()
    gradients: dict[str, Tensor] = {}
    for layer in reversed(range(count)):
        entry = received[layer + 1]
        if layer < count - 1 and entry is not None:
            outputs[layer].backward(entry.grad)
        for name, parameter in stages[layer].global_parameters().items():
            if parameter.grad is not None:
                shared = gradients.get(name)
                gradients[name] = parameter.grad if shared is None else shared + parameter.grad
    return loss.detach(), gradients


def _same(expected: Tensor | None, found: Tensor | None) -> bool:
    if expected is None or found is None:
        return expected is found
    scale = float(expected.abs().max()) + 1e-30
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-6 * scale)


def _configuration(config: PretrainedConfig | Mapping[str, Any]) -> PretrainedConfig:
    if isinstance(config, PretrainedConfig):
        return copy.deepcopy(config)
    keys = copy.deepcopy(dict(config))
    kind = keys.pop("model_type", None)
    if not isinstance(kind, str):
        raise InputError('a model configuration without "model_type": give one, such as "llama"')
    try:
        with _quiet():
            return AutoConfig.for_model(kind, **keys)
    except Exception as error:
        if isinstance(error, ValueError) and "Unrecognized model identifier" in str(error):
            raise InputError(
                f"transformers knows no model type {kind!r}; check its spelling"
            ) from None
        raise InputError(
            f"transformers refuses this configuration of {kind} ({one_line(error)}); correct it"
        ) from error


def _skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The whole model on the meta device."""
    for attention in ("sdpa", "eager"):
        try:
            with torch.device("meta"), _quiet():
                model = AutoModelForCausalLM.from_config(
                    copy.deepcopy(config), dtype=dtype, attn_implementation=attention
                )
        except Exception as error:
            if attention == "sdpa" and "scaled_dot_product_attention" in str(error):
                continue
            if "Unrecognized configuration class" in str(error):
                raise InputError(
                    f"{config.model_type} is no causal language model; choose one that is"
                ) from None
            raise InputError(
                f"transformers cannot build a {config.model_type} from this configuration "
                f"({one_line(error)}); correct it"
            ) from error
        return model.train()
    raise AssertionError("unreachable")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' advice about kernels and deprecated keys off the user's screen."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

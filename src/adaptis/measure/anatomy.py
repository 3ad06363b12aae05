"""Where the layers of a transformers model are, found without knowing its family.

The blocks are the largest list of modules. The rest is learned from one run of the model's own
loop with nothing in it: how many values a block returns, which parameters work before the blocks
and which after, and whether the blocks exchange more than the hidden state. Nothing here fills a
parameter (`weights` does) or runs a stage.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adaptis.errors import InputError
from adaptis.measure.stage import digest, shapes
from adaptis.model import EMBEDDING, HEAD, Layer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import PreTrainedModel

MAX_ARITY = 4  # the most values that a block of any model returns
_DECLARED = {"full_attention": "attention"}  # the words that transformers uses for our kinds


@dataclass(frozen=True)
class Anatomy:
    """Where a model's layers are; what `dissect` supposes until `probe` has looked."""

    blocks: str  # path of the list of blocks
    arity: int  # how many values a block returns; 0: a bare tensor
    owner: Mapping[str, int]  # module with parameters or inside a block -> layer
    canonical: Mapping[str, str]  # parameter name -> the name of the first it is tied to
    layers: tuple[Layer, ...]
    dtype: torch.dtype


def dissect(model: PreTrainedModel, dtype: torch.dtype) -> Anatomy:
    """What the modules of `model`, on the meta device, show by themselves.

    Raises:
        InputError: if it has no list of blocks or no embedding at one end.
    """
    path = _find_blocks(model)
    blocks = blocks_of(model, path)
    head = len(blocks) + 1
    owner = {
        f"{path}.{index}" + (f".{name}" if name else ""): index + 1
        for index, block in enumerate(blocks)
        for name, _ in block.named_modules()
    }
    before = True
    for name, module in model.named_modules():
        before = before and name != path
        if name not in owner and any(True for _ in module.parameters(recurse=False)):
            owner[name] = 0 if before else head
    canonical: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        canonical[name] = first.setdefault(id(parameter), name)
    return Anatomy(path, 0, owner, canonical, _layers(model, path, owner), dtype)


def probe(model: PreTrainedModel, anatomy: Anatomy) -> Anatomy:
    """Run the loop around the blocks of a model without parameters, with nothing in it.

    Finds how many values a block has to return (the right number is the one with which each block
    gets what its predecessor returned), and which parameters work before and which after them.

    Raises:
        InputError: if the blocks exchange more than the hidden state.
    """
    blocks = blocks_of(model, anatomy.blocks)
    ends = (0, len(blocks) + 1)
    holders = [
        name
        for name, layer in anatomy.owner.items()
        if layer in ends and not name.startswith(f"{anatomy.blocks}.")
    ]
    reason = ""
    for arity in range(MAX_ARITY + 1):
        trace = _Trace(arity, len(blocks))
        for index, block in enumerate(blocks):
            block.forward = trace.block(index)
        for name in holders:
            module = model.get_submodule(name)
            module.forward = trace.holder(name, silent(module, anatomy.dtype))
        # Whatever the model does with empty values after its last block is of no interest.
        try:
            model(input_ids=torch.zeros(3, 4, dtype=torch.long), use_cache=False)
        except Exception as error:
            trace.fault = trace.fault or one_line(error)
        if trace.done == len(blocks) and len(blocks) + 1 in trace.used.values():
            return replace(anatomy, arity=arity, owner={**anatomy.owner, **trace.used})
        reason = trace.carried or reason or trace.fault
    raise InputError(f"{model.config.model_type} cannot be cut between its blocks ({reason})")


class _Trace:
    """What one empty run shows."""

    def __init__(self, arity: int, num_blocks: int) -> None:
        self.used: dict[str, int] = {}
        self.done = 0
        self.carried = self.fault = ""
        self._arity, self._num_blocks = arity, num_blocks
        self._hidden: Tensor | None = None

    def block(self, index: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            hidden, rest, named = split_call(args, kwargs)
            if index != self.done or (index > 0 and hidden is not self._hidden):
                raise ValueError("the model's loop changes the hidden state between blocks")
            for value in (*rest, *named.values()):
                if isinstance(value, Tensor) and value.requires_grad:
                    self.carried = "its blocks take more than the hidden state with a gradient"
                    raise ValueError(self.carried)
            self._hidden = hidden
            self.done += 1
            return pack(hidden, self._arity)

        return call

    def holder(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.used.setdefault(name, self._num_blocks + 1 if self.done else 0)
            output = forward(*args, **kwargs)
            if isinstance(output, Tensor) and output.is_leaf and output.is_floating_point():
                return output.requires_grad_() * 1  # no leaf: some loops write into it
            return output

        return call


def _find_blocks(model: PreTrainedModel) -> str:
    """The largest list of modules that is in no other list and in no vision or audio tower."""
    lists: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{o}.") for o in lists):
            lists[name] = sum(p.numel() for p in module.parameters())
    text = {
        name: size for name, size in lists.items() if "visi" not in name and "audio" not in name
    }
    if not text:
        raise InputError(f"{model.config.model_type} has no list of blocks, so it cannot be cut")
    return max(text, key=lambda name: text[name])


def _layers(model: PreTrainedModel, path: str, owner: Mapping[str, int]) -> tuple[Layer, ...]:
    blocks = blocks_of(model, path)
    config: Any = model.config.get_text_config()
    if getattr(config, "num_kv_shared_layers", 0):
        raise InputError(
            f"{config.model_type} with num_kv_shared_layers > 0 cannot be cut: its later blocks "
            "read keys of earlier ones; set it to 0 or keep the model on one device"
        )
    declared = getattr(config, "layer_types", None)
    if not isinstance(declared, list) or len(declared) != len(blocks):
        declared = [""] * len(blocks)
    names = {id(module): name for name, module in model.named_modules()}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if ends[0] is None or ends[1] is None:
        raise InputError(
            f"{config.model_type} has no input or output embedding, so it cannot be cut"
        )
    outer: list[dict[str, Tensor]] = [{}, {}]
    for name, module in model.named_modules():
        if owner.get(name) in (0, len(blocks) + 1):
            parameters = module.named_parameters(prefix=name, recurse=False)
            outer[min(owner[name], 1)].update(parameters)
    layers = [Layer(names[id(ends[0])], EMBEDDING, _signature(EMBEDDING, ends[0], outer[0]))]
    for index, block in enumerate(blocks):
        kind = _kind(block, declared[index])
        signature = _signature(kind, block, dict(block.named_parameters()))
        layers.append(Layer(f"{path}.{index}", kind, signature))
    layers.append(Layer(names[id(ends[1])], HEAD, _signature(HEAD, ends[1], outer[1])))
    return tuple(layers)


def _signature(kind: str, module: nn.Module, parameters: Mapping[str, Tensor]) -> str:
    return f"{kind}-{digest(f'{type(module).__qualname__} {kind} {shapes(parameters)}')}"


def _kind(block: nn.Module, declared: str) -> str:
    inside = " ".join(f"{name} {type(m).__name__}" for name, m in block.named_modules()).lower()
    kind = _DECLARED.get(declared, declared)
    if kind in ("", "linear_attention") and "mamba" in inside:
        kind = "mamba"
    if not kind:
        kind = "attention" if "attention" in inside else type(block).__name__.lower()
    return f"{kind}+moe" if "experts" in inside and kind != "moe" else kind


def blocks_of(model: nn.Module, path: str) -> list[nn.Module]:
    """The blocks, in order."""
    return list(model.get_submodule(path).children())


def split_call(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """A block's hidden state apart from its other arguments."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {k: v for k, v in kwargs.items() if k != "hidden_states"}


def pack(hidden: Any, arity: int) -> Any:
    """What a block that does nothing returns, in the form that the loop around it unpacks."""
    return (hidden, *[None] * (arity - 1)) if arity else hidden


def silent(module: nn.Module, dtype: torch.dtype) -> Callable[..., Any]:
    """A forward with the shape of `module`'s, for where its output is thrown away."""

    def call(value: Tensor, *_: Any, **__: Any) -> Tensor:
        if isinstance(module, nn.Embedding):
            return torch.zeros(*value.shape, module.embedding_dim, dtype=dtype, device=value.device)
        if isinstance(module, nn.Linear):
            return value.new_zeros(*value.shape[:-1], module.out_features)
        return value

    return call


def one_line(error: Exception) -> str:
    """Somebody else's error, short enough for a sentence of ours."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"

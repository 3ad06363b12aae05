"""What each layer would cost on an accelerator that is not here: computed, never measured.

Each distinct layer runs once on fake tensors in bfloat16: shapes without memory. Its products are
counted, and the storages that autograd would keep. Seconds follow from a roofline, for the layer as
a whole: the larger of FLOP / (peak * efficiency) and of bytes moved / memory bandwidth.

What it leaves out: kernel launches, caches, and elementwise work, which it takes to hide under the
products. Attention counts as a fused causal kernel without a window; experts as grouped products;
a Mamba scan as transformers' plain code, which keeps far more than a fused one, and whose loop over
tokens (Mamba-1) takes half a minute here. Measure instead where there is a device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from adaptis.errors import InputError
from adaptis.measure.anatomy import one_line
from adaptis.model import EMBEDDING
from adaptis.profile import LayerCost, Profile, Shared

if TYPE_CHECKING:
    from collections.abc import Callable

    from adaptis.measure.stage import Microbatch, StageModule, TorchModel

WEIGHT_BYTES = 2  # bfloat16
STATE_BYTES = 18  # + float32: gradient 4, master weight 4, Adam's two moments 8
GRADIENT_TRAFFIC = 8  # a float32 gradient is read and written where it is accumulated
UPDATE_TRAFFIC = 30  # Adam reads all but the bf16 weight (16), writes all but the gradient (14)
ATTENTION_BACKWARD = 2.5  # fused: 5 products against 2, since the scores are computed once more


@dataclass(frozen=True, slots=True)
class Accelerator:
    """The three numbers of a roofline."""

    name: str
    flops: float  # FLOP per second, dense bfloat16, as published
    bandwidth: float  # byte per second, of its memory, as published
    efficiency: float = 0.5  # the share of `flops` that products reach: an assumption, not a datum


# From the vendors' data sheets, dense (half of the figures "with sparsity"), SXM or OAM modules.
ACCELERATORS = {
    accelerator.name: accelerator
    for accelerator in (
        Accelerator("a100", 312e12, 2.039e12),  # 80 GB
        Accelerator("h100", 989.4e12, 3.35e12),
        Accelerator("h200", 989.4e12, 4.8e12),
        Accelerator("b200", 2.25e15, 8.0e12),
        Accelerator("mi300x", 1307.4e12, 5.3e12),
    )
}


def analytic_profile(
    model: TorchModel, accelerator: Accelerator, sequence: int, batch_size: int
) -> Profile:
    """The profile of `model` in bfloat16 on `accelerator`, with no device and next to no memory.

    W has the weight gradients of linear layers, as in `compute`; all others are in I. A trained
    parameter has 18 bytes of state: weight 2 (bfloat16); gradient 4, master weight 4, Adam's two
    moments 8 (float32).

    Args:
        model: the chain; it takes token ids.
        accelerator: one of `ACCELERATORS`, or your own.
        sequence: tokens of one sequence.
        batch_size: sequences of one micro-batch, the profile's unit.

    Raises:
        InputError: a size below 1, or a layer does not run on tensors without values.
    """
    if sequence < 1 or batch_size < 1:
        raise InputError(f"{batch_size} sequences of {sequence} tokens: both must be at least 1")
    model = _in_bf16(model)
    counts = _count_layers(model, batch_size, sequence)
    return Profile(
        model=model.name,
        tokens_per_microbatch=sequence * batch_size,
        layers=tuple(_cost(model, i, count, accelerator) for i, count in enumerate(counts)),
        shared=_shared(counts),
        source=(
            "computed, not measured: roofline of bfloat16 products with efficiency "
            f"{accelerator.efficiency:g} and of memory traffic; {batch_size} x {sequence} tokens"
        ),
        machine=accelerator.name,
    )


@dataclass(slots=True)
class _Storages:
    """Storages, each once; they are held, since the id of a freed one is used again."""

    held: dict[int, torch.UntypedStorage] = field(default_factory=dict)

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.held[storage._cdata] = storage
        return tensor

    def num_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.held.values())


@dataclass(slots=True)
class _Count:
    """What one layer does in one forward; FLOP and bytes."""

    output_shape: torch.Size
    output_bytes: int
    input_bytes: int
    linear: int = 0  # FLOP of linear layers
    trained: int = 0  # the part of them whose weights have gradients
    attention: int = 0  # FLOP of fused attention
    other: int = 0  # FLOP of all other products: scans, experts, convolutions
    saved_bytes: int = 0
    operand_bytes: int = 0  # inputs and output gradients of trained linear layers
    linear_parameters: int = 0  # trained ones
    trained_parameters: int = 0
    parameters: int = 0
    global_parameters: dict[str, int] = field(default_factory=dict)  # name -> number of elements


class _Watch(TorchFunctionMode):
    """Counts linear layers, and attention as a fused causal kernel would do it on any device."""

    def __init__(self, kept: _Storages) -> None:
        super().__init__()
        self.linear = self.trained = self.attention = 0
        self.operands = _Storages()
        self.weights: dict[int, int] = {}  # trained, of linear layers: storage -> elements
        self._kept = kept

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        output = func(*args, **kwargs)
        if func is functional.linear:
            self._multiplied(output, *args, **kwargs)
        return output

    def _multiplied(
        self, output: Tensor, input: Tensor, weight: Tensor, *_: Any, **__: Any
    ) -> None:
        flops = 2 * output.numel() * weight.shape[-1]
        self.linear += flops
        if weight.requires_grad:
            self.trained += flops
            self.weights[weight.untyped_storage()._cdata] = weight.numel()
            self.operands.add(input)
            self.operands.add(torch.empty_like(output))  # its gradient

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        # What torch chooses for fake CPU tensors says nothing about another device: no kernel runs.
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        causal = 2 if query.shape[-2] == key.shape[-2] else 1
        width = query.shape[-1] + value.shape[-1]
        self.attention += 2 * query[..., 0].numel() * key.shape[-2] * width // causal
        for tensor in (query, key, value, output):
            self._kept.add(tensor)
        return output.requires_grad_(query.requires_grad)


def _grouped_flops(left: Any, right: Any, *_: Any, **__: Any) -> int:
    """FLOP of tokens x in, sorted by expert, times experts x in x out."""
    return 2 * left[0] * left[1] * right[-1]


_FORMULAS = {torch.ops.aten._grouped_mm: _grouped_flops}  # which torch's counter lacks


def _in_bf16(model: TorchModel) -> TorchModel:
    """A model of transformers is told its dtype when it is built; a chain is cast later."""
    config = getattr(model, "config", None)
    if config is None:
        return model
    from adaptis.measure.huggingface import HuggingFaceModel

    if isinstance(model, HuggingFaceModel):
        return HuggingFaceModel(config, model.name, torch.bfloat16)
    return model


def _count_layers(model: TorchModel, batch_size: int, sequence: int) -> list[_Count]:
    """The counts of each layer; equal signatures are run once, the two ends by themselves."""
    last = len(model.layers) - 1
    known: dict[tuple[str, bool, bool], _Count] = {}
    counts: list[_Count] = []
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tokens = torch.zeros(batch_size, sequence, dtype=torch.long)
    for index, layer in enumerate(model.layers):
        key = (layer.signature or layer.name, index == 0, index == last)
        if key not in known:
            stage = model.build(index, index + 1, seed=0, device="meta")
            shape = counts[-1].output_shape if counts else None
            try:
                with mode:
                    known[key] = _count(model, stage, shape, {"inputs": tokens, "labels": tokens})
            except Exception as error:
                raise InputError(
                    f"layer {index} of {model.name} ({layer.kind}) does not run on tensors without "
                    f"values ({one_line(error)}); measure this model on a device instead"
                ) from error
        counts.append(known[key])
    return counts


def _count(
    model: TorchModel, stage: StageModule, shape: torch.Size | None, microbatch: Microbatch
) -> _Count:
    """Run one layer, the loss with the last; inside a fake mode."""
    values = _fakes(stage)
    hidden = None
    if shape is not None:
        hidden = torch.empty(shape, dtype=torch.bfloat16).requires_grad_()
    kept = _Storages()
    with (
        FlopCounterMode(display=False, custom_mapping=_FORMULAS) as products,
        saved_tensors_hooks(kept.add, lambda tensor: tensor),
        _Watch(kept) as watch,
    ):
        output = functional_call(stage, values, (hidden, microbatch))
        last = stage.stop == len(model.layers)
        if last:
            output = model.loss(output, microbatch)
    for value in values.values():
        kept.held.pop(value.untyped_storage()._cdata, None)
    parameters = stage.layer_parameters()[stage.start]
    return _Count(
        output_shape=output.shape,
        output_bytes=0 if last else output.untyped_storage().nbytes(),
        input_bytes=0 if hidden is None else hidden.untyped_storage().nbytes(),
        linear=watch.linear,
        trained=watch.trained,
        attention=watch.attention,
        other=products.get_total_flops() - watch.linear,
        saved_bytes=kept.num_bytes(),
        operand_bytes=watch.operands.num_bytes(),
        linear_parameters=sum(watch.weights.values()),
        trained_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        parameters=sum(p.numel() for p in parameters),
        global_parameters={name: p.numel() for name, p in stage.global_parameters().items()},
    )


def _fakes(stage: nn.Module) -> dict[str, Tensor]:
    """Stand-ins for parameters, in bfloat16, and for buffers, as they are."""
    values: dict[str, Tensor] = {}
    for name, parameter in stage.named_parameters():
        dtype = torch.bfloat16 if parameter.is_floating_point() else parameter.dtype
        fake = torch.empty(parameter.shape, dtype=dtype)
        values[name] = fake.requires_grad_(parameter.requires_grad)
    for name, buffer in stage.named_buffers():
        values[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return values


def _cost(model: TorchModel, index: int, count: _Count, accelerator: Accelerator) -> LayerCost:
    layer = model.layers[index]
    # An embedding reads only the rows of its tokens, though its gradient is as large as its table.
    read = count.output_bytes if layer.kind == EMBEDDING else WEIGHT_BYTES * count.parameters
    moved = read + count.saved_bytes + count.input_bytes + count.output_bytes
    elsewhere = GRADIENT_TRAFFIC * (count.trained_parameters - count.linear_parameters)
    gradients = GRADIENT_TRAFFIC * count.linear_parameters
    inner = count.linear + 2 * count.other + ATTENTION_BACKWARD * count.attention

    def seconds(flops: float, num_bytes: float) -> float:
        peak = accelerator.flops * accelerator.efficiency
        return max(flops / peak, num_bytes / accelerator.bandwidth)

    forward = seconds(count.linear + count.attention + count.other, moved)
    backward_input = seconds(inner, moved + elsewhere)
    backward_weight = seconds(count.trained, count.operand_bytes + gradients)
    frozen = count.parameters - count.trained_parameters
    return LayerCost(
        name=layer.name,
        kind=layer.kind,
        forward=forward,
        backward_input=backward_input,
        backward_weight=backward_weight,
        backward=backward_input + backward_weight,
        update=UPDATE_TRAFFIC * count.trained_parameters / accelerator.bandwidth,
        parameter_bytes=WEIGHT_BYTES * count.parameters,
        state_bytes=STATE_BYTES * count.trained_parameters + WEIGHT_BYTES * frozen,
        saved_bytes=count.saved_bytes,
        saved_weight_bytes=count.operand_bytes,
        output_bytes=count.output_bytes,
    )


def _shared(counts: list[_Count]) -> tuple[Shared, ...]:
    """What both ends of the chain list under one global name: a tied embedding."""
    last = len(counts) - 1
    first = counts[0].global_parameters
    both = first.keys() & counts[last].global_parameters.keys() if last else ()
    return tuple(Shared((0, last), WEIGHT_BYTES * first[name]) for name in sorted(both))

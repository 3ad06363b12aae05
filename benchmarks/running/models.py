"""Layers and chains for the benchmarks that run real steps."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from adaptis.execute.data import TextBatches
from adaptis.measure.slices import carried
from adaptis.measure.stage import Chain
from adaptis.measure.zoo import load_preset, read_preset

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from adaptis.measure.stage import Microbatch, TorchModel

VOCABULARY, SEQUENCE = 2048, 128
MICROBATCHES = 8


@functools.cache
def looking_back(new: int, seen: int) -> Tensor:
    """What is added to the scores of the last `new` of `seen` tokens; one for all layers."""
    return torch.full((new, seen), -torch.inf).triu(seen - new + 1)


class Block(nn.Module):
    """Attention and a two-layer perceptron, each beside a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.mix(self.norms[0](x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        k, v = carried(self).append(k, v, dim=-2)  # behind those of earlier slices, if any
        new, seen = q.shape[-2], k.shape[-2]
        mask = None if new == seen else looking_back(new, seen)
        mixed = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norms[1](x))))


class Perceptron(nn.Module):
    """Two linear layers beside a residual, the middle `factor` times as wide."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, factor * width), nn.Linear(factor * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.relu(self.up(x)))


class Trivial(nn.Linear):
    """One product of two by two."""

    def __init__(self) -> None:
        super().__init__(2, 2, bias=False)


def squares(output: Tensor, microbatch: Microbatch) -> Tensor:
    """A loss summed over all numbers."""
    return (output - microbatch["labels"]).square().sum()


def numbers(microbatch: Microbatch) -> float:
    """How many `squares` sums over."""
    return float(microbatch["labels"].numel())


def attention_chain() -> Chain:
    """Equal blocks between an embedding and a head."""
    width = 192
    layers = [
        functools.partial(nn.Embedding, VOCABULARY, width),
        *[functools.partial(Block, width, 4)] * 8,
        functools.partial(nn.Linear, width, VOCABULARY),
    ]
    return Chain(layers, name="attention")


def uneven_chain() -> Chain:
    """Attention among perceptrons whose work grows along the chain."""
    width = 160
    layers = [
        functools.partial(nn.Embedding, VOCABULARY, width),
        *(
            functools.partial(Perceptron, width, 2 * i)
            if i % 3
            else functools.partial(Block, width, 4)
            for i in range(10)
        ),
        functools.partial(nn.Linear, width, VOCABULARY),
    ]
    return Chain(layers, name="uneven")


def random_tokens(step: int, count: int) -> list[Microbatch]:
    """Micro-batches of two sequences for the chains above."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCABULARY, (count, 2, 2, SEQUENCE), generator=generator)
    return [{"inputs": inputs, "labels": labels} for inputs, labels in ids]


CHAINS = {"attention": attention_chain, "uneven": uneven_chain}
MODELS = ("demo-hybrid", "demo-large-vocabulary", *CHAINS)


def model_of(name: str) -> TorchModel:
    """One of `MODELS`."""
    return CHAINS[name]() if name in CHAINS else load_preset(name)


def batches_of(name: str) -> Callable[[int], Sequence[Microbatch]]:
    """Its batches, by step."""
    if name in CHAINS:
        return functools.partial(random_tokens, count=MICROBATCHES)
    recipe = read_preset(name)
    return TextBatches(
        MICROBATCHES, recipe.batch_size, recipe.sequence, recipe.tokenizer, recipe.vocabulary
    )

"""Random numbers that do not depend on how a model is cut, ordered or recomputed.

Before each layer of a stage the generators are set to a start that depends on (seed, step, layer,
micro-batch) alone; afterwards the caller's own stream goes on as if nothing had been drawn. Setting
a generator costs about a microsecond, whether the layer draws or not, and nothing is kept from the
forward to its repetition.

Only torch's default generators are meant: of the processor, and of the stage's accelerator.
"""

from __future__ import annotations

import hashlib
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_ODD = 0x9E3779B97F4A7C15  # 2 ** 64 over the golden ratio: multiples of it lie far apart
_begin: Callable[[int], None] | None = None


def begin_layer(layer: int) -> None:
    """Called by a stage before each of its layers; outside `drawing` it does nothing."""
    if _begin is not None:
        _begin(layer)


@contextmanager
def drawing(
    seed: int, step: int, layer: int, microbatch: int, device: torch.device
) -> Iterator[None]:
    """Around the forward of a stage that begins at `layer`."""
    global _begin  # noqa: PLW0603 - layers are called by others' code, which hands nothing on
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        generators.append(torch.cuda.default_generators[index])
    states = [generator.get_state() for generator in generators]

    start = struct.pack("<3q", seed, step, microbatch)
    base = int.from_bytes(hashlib.blake2b(start, digest_size=7).digest(), "little")

    def begin(number: int) -> None:
        value = (base + number * _ODD) % (1 << 56)  # another for each layer, without another hash
        for generator in generators:
            generator.manual_seed(value)

    outer, _begin = _begin, begin
    begin(layer)
    try:
        yield
    finally:
        _begin = outer
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)

"""What is trained: an ordered chain of named layers.

This module knows nothing about tensors. `measure` knows how to build the layers; everything
between the profile and the program only needs their number, names and kinds.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

EMBEDDING, HEAD = "embedding", "head"


@dataclass(frozen=True, slots=True)
class Layer:
    """One link of the chain: the smallest piece that a stage can hold."""

    name: str  # global and unique, the same whatever the partition: "model.layers.3"
    kind: str  # "embedding", "attention", "mamba", "mlp", "moe", "head", ...
    signature: str = ""  # layers with equal signatures cost the same; empty: like no other


def fingerprint(layers: Iterable[tuple[str, str]]) -> str:
    """A short id of a chain of (name, kind), to tell plans for other models apart."""
    text = "\n".join(f"{name}\t{kind}" for name, kind in layers)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

"""What passes between layers and stages, as tensors: one, or a tuple, list or dict of several.

Several tensors cross a stage's border as a `Bundle`: the tensors in order, and their structure as a
text that the other side takes apart. Gradients come back for floating-point tensors alone, in the
same order.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from adaptis.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence


class Bundle(NamedTuple):
    """Several tensors that are one value."""

    structure: str  # JSON; a number is the tensor of that place
    tensors: tuple[Tensor, ...]


Value = Tensor | Bundle


def pack(value: Any) -> Value:
    """What a layer returned, for the way to another stage.

    Raises:
        InputError: if there is something else in it than tensors, tuples, lists, dicts and None.
    """
    if isinstance(value, Tensor):
        return value
    tensors: list[Tensor] = []
    structure = json.dumps(_describe(value, tensors))
    return Bundle(structure, tuple(tensors))


def unpack(value: Value) -> Any:
    """What the layer returned."""
    if isinstance(value, Tensor):
        return value
    return _restore(json.loads(value.structure), value.tensors)


def tensors_of(value: Value | None) -> tuple[Tensor, ...]:
    """All tensors of a value, in order."""
    if value is None:
        return ()
    return (value,) if isinstance(value, Tensor) else value.tensors


def replaced(value: Value, tensors: Sequence[Tensor]) -> Value:
    """The same structure of other tensors."""
    return tensors[0] if isinstance(value, Tensor) else Bundle(value.structure, tuple(tensors))


def entries(value: Value) -> Value:
    """The value as the beginning of a graph: each floating-point tensor wants a gradient."""
    leaves = [t.detach() for t in tensors_of(value)]
    return replaced(value, [t.requires_grad_(_has_gradient(t)) for t in leaves])


def plain_entries(value: Value) -> Value:
    """The entries for the layers: not as leaves where autocast is on.

    It casts a leaf once for all uses and so adds up their gradients in the lower precision, which
    it does not do with the same value inside a larger stage.
    """
    tensors = tensors_of(value)
    if not any(torch.is_autocast_enabled(t.device.type) for t in tensors):
        return value
    return replaced(value, [t.view_as(t) for t in tensors])


def gradients(value: Value) -> Value:
    """The gradients of `entries`, for the way back: zeros where a tensor was not used."""
    found = [
        torch.zeros_like(t) if t.grad is None else t.grad
        for t in tensors_of(value)
        if t.requires_grad
    ]
    if isinstance(value, Tensor) and found:
        return found[0]
    return Bundle(json.dumps({"tuple": list(range(len(found)))}), tuple(found))


def roots(value: Value, gradient: Value | None) -> list[tuple[Tensor, Tensor | None]]:
    """The tensors of an output that a backward begins at, each with its gradient."""
    given = [t for t in tensors_of(value) if _has_gradient(t)]
    pairs = zip(given, tensors_of(gradient), strict=True)
    return [(tensor, part) for tensor, part in pairs if tensor.requires_grad]


def _has_gradient(tensor: Tensor) -> bool:
    # A rule that both sides know beforehand, whether the output was made with a graph or without.
    return tensor.is_floating_point() or tensor.is_complex()


def _describe(value: Any, tensors: list[Tensor]) -> Any:
    match value:
        case Tensor():
            tensors.append(value)
            return len(tensors) - 1
        case None:
            return None
        case dict() if all(isinstance(key, str) for key in value):
            return {"dict": {key: _describe(part, tensors) for key, part in value.items()}}
        case list() | tuple() if type(value) in (list, tuple):
            return {type(value).__name__: [_describe(part, tensors) for part in value]}
        case _:
            raise InputError(
                f"a layer returns a {type(value).__name__}: between layers that may be cut apart "
                "pass tensors, or tuples, lists or dicts (with text keys) of tensors"
            )


def _restore(structure: Any, tensors: tuple[Tensor, ...]) -> Any:
    match structure:
        case int():
            return tensors[structure]
        case {"dict": parts}:
            return {key: _restore(part, tensors) for key, part in parts.items()}
        case {"list": parts}:
            return [_restore(part, tensors) for part in parts]
        case {"tuple": parts}:
            return tuple(_restore(part, tensors) for part in parts)
        case _:
            return None

"""Products of a value with a weight, as three formulas each: the product and its two gradients.

They are the expressions that torch's own backward evaluates, so that sums are the same to the last
bit. `PRODUCTS` tells by the called function which of its arguments is the weight; a call in a form
that is not handled here stays as it is.

Shapes: N rows, K inputs, M outputs, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def _same(value: Tensor) -> Tensor:
    return value


# (gradient, inputs, weight, whether there is a bias) -> gradients of the weight and the bias
Gradients = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of product."""

    forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]  # inputs, weight, bias
    input_gradient: Callable[[Tensor, Tensor, Tensor], Tensor]  # gradient, inputs, weight
    weight_gradients: Gradients
    prepare: Callable[[Tensor], Tensor] = _same  # inputs and gradient, as the two above take them


def _summed(gradient_of_weight: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Gradients:
    """Where the bias is added to each row."""

    def gradients(
        gradient: Tensor, inputs: Tensor, weight: Tensor, with_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        found = gradient_of_weight(gradient, inputs, weight)
        return found, gradient.sum(0) if with_bias else None

    return gradients


Call = tuple[Rule, Tensor, Tensor, Tensor | None]  # rule, inputs, weight, bias
IsWeight = Callable[[Any], bool]


def _rows(value: Tensor) -> Tensor:
    return value.reshape(-1, value.shape[-1])


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # Autograd folds a strided value into rows before the product; without a graph torch may not.
    if inputs.dim() <= 2 or inputs.is_contiguous():
        return functional.linear(inputs, weight, bias)
    output = _rows(inputs).mm(weight.t()).view(*inputs.shape[:-1], weight.shape[0])
    return output if bias is None else output.add_(bias)


LINEAR = Rule(
    _linear,
    lambda gradient, inputs, weight: gradient.mm(weight),
    _summed(lambda gradient, inputs, weight: gradient.t().mm(inputs)),
    _rows,
)


def _matrix_gradient(gradient: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
    """Of a weight_KM; laid out as the weight is."""
    if weight.stride(0) == 1 and weight.stride(1) == weight.shape[0]:
        return gradient.t().mm(inputs).t()
    return inputs.t().mm(gradient)


def _rows_times_matrix(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:
        return torch.addmm(bias, inputs, weight)
    return _rows(inputs).mm(weight).view(*inputs.shape[:-1], weight.shape[1])


_MATRIX = Rule(
    _rows_times_matrix,
    lambda gradient, inputs, weight: gradient.mm(weight.t()),
    _summed(_matrix_gradient),
    _rows,
)
_RIGHT = Rule(  # inputs_ENK weight_EKM
    lambda inputs, weight, bias: inputs.bmm(weight),
    lambda gradient, inputs, weight: gradient.bmm(weight.transpose(1, 2)),
    _summed(lambda gradient, inputs, weight: inputs.transpose(1, 2).bmm(gradient)),
)
_LEFT = Rule(  # weight_EMK inputs_EKN
    lambda inputs, weight, bias: weight.bmm(inputs),
    lambda gradient, inputs, weight: weight.transpose(1, 2).bmm(gradient),
    _summed(lambda gradient, inputs, weight: gradient.bmm(inputs.transpose(1, 2))),
)


def _plan_linear(
    is_weight: IsWeight, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Call | None:
    return (LINEAR, input, weight, bias) if is_weight(weight) else None


def _plan_product(is_weight: IsWeight, input: Tensor, other: Tensor) -> Call | None:
    if not isinstance(input, Tensor) or not isinstance(other, Tensor):
        return None
    if other.dim() == 2 and input.dim() >= 2 and is_weight(other):
        return _MATRIX, input, other, None
    if input.dim() == other.dim() == 3 and input.shape[0] == other.shape[0]:
        if is_weight(other):
            return _RIGHT, input, other, None
        if is_weight(input):
            return _LEFT, other, input, None
    return None


def _plan_bmm(is_weight: IsWeight, input: Tensor, mat2: Tensor) -> Call | None:
    return _plan_product(is_weight, input, mat2)


def _plan_addmm(is_weight: IsWeight, input: Tensor, mat1: Tensor, mat2: Tensor) -> Call | None:
    return (_MATRIX, mat1, mat2, input) if input.dim() == 1 and is_weight(mat2) else None


def _plan_einsum(is_weight: IsWeight, equation: str, *operands: Any) -> Call | None:
    """Two operands, each index once in each; no index is summed in one operand alone."""
    pair = operands[0] if len(operands) == 1 else operands
    text = equation.replace(" ", "") if isinstance(equation, str) else ""
    terms, arrow, result = text.partition("->")
    names = terms.split(",")
    if len(pair) != 2 or len(names) != 2 or not arrow or "." in text:
        return None
    sets = [set(name) for name in (*names, result)]
    if any(len(s) != len(name) for s, name in zip(sets, (*names, result), strict=True)):
        return None
    if not all(sets[i] <= sets[j] | sets[k] for i, j, k in ((0, 1, 2), (1, 0, 2))):
        return None
    which = 1 if is_weight(pair[1]) else 0
    if not is_weight(pair[which]):
        return None
    value, weight = names[1 - which], names[which]
    rule = Rule(
        lambda inputs, matrix, bias: torch.einsum(f"{value},{weight}->{result}", inputs, matrix),
        lambda gradient, inputs, matrix: torch.einsum(
            f"{result},{weight}->{value}", gradient, matrix
        ),
        _summed(
            lambda gradient, inputs, matrix: torch.einsum(
                f"{result},{value}->{weight}", gradient, inputs
            )
        ),
    )
    return rule, pair[1 - which], pair[which], None


def _plan_embedding(
    is_weight: IsWeight,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Call | None:
    if max_norm is not None or sparse or not is_weight(weight):
        return None
    count = weight.shape[0]
    padding = -1 if padding_idx is None else padding_idx % count
    rule = Rule(
        lambda ids, table, bias: functional.embedding(ids, table, padding_idx),
        lambda gradient, ids, table: ids,  # never asked for: numbers of rows have no gradient
        _summed(
            lambda gradient, ids, table: torch.ops.aten.embedding_dense_backward(
                gradient, ids, count, padding, scale_grad_by_freq
            )
        ),
    )
    return rule, input, weight, None


def _plan_convolution(
    dimensions: int,
    is_weight: IsWeight,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | str | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Call | None:
    if isinstance(padding, str) or input.dim() != dimensions + 2 or not is_weight(weight):
        return None
    stride, padding, dilation = (
        (value,) * dimensions if isinstance(value, int) else tuple(value)
        for value in (stride, padding, dilation)
    )

    def gradients(
        gradient: Tensor, inputs: Tensor, kernel: Tensor, which: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten.convolution_backward(
            gradient,
            inputs,
            kernel,
            [kernel.shape[0]],
            stride,
            padding,
            dilation,
            False,
            (0,) * dimensions,
            groups,
            which,
        )

    rule = Rule(
        lambda inputs, kernel, bias: torch.convolution(
            inputs, kernel, bias, stride, padding, dilation, False, (0,) * dimensions, groups
        ),
        lambda gradient, inputs, kernel: gradients(gradient, inputs, kernel, (True, False, False))[
            0
        ],
        lambda gradient, inputs, kernel, with_bias: gradients(
            gradient, inputs, kernel, (False, True, with_bias)
        )[1:],
    )
    return rule, input, weight, bias


def _plan_grouped(
    is_weight: IsWeight, mat_a: Tensor, mat_b: Tensor, *, offs: Tensor | None = None
) -> Call | None:
    """Rows_NK sorted by expert, with experts_EKM; `offs` holds where each expert's rows end."""
    if mat_a.dim() != 2 or mat_b.dim() != 3 or offs is None or not is_weight(mat_b):
        return None
    grouped = partial(torch._grouped_mm, offs=offs)

    def weight_gradient(gradient: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
        if weight.stride(1) == 1:  # laid out as the weight is
            return grouped(gradient.t(), inputs).transpose(1, 2)
        return grouped(inputs.t(), gradient)

    rule = Rule(
        lambda inputs, weight, bias: grouped(inputs, weight),
        lambda gradient, inputs, weight: grouped(gradient, weight.transpose(1, 2)),
        _summed(weight_gradient),
    )
    return rule, mat_a, mat_b, None


Plan = Callable[..., Call | None]
PRODUCTS: dict[Any, Plan] = {
    functional.linear: _plan_linear,
    functional.embedding: _plan_embedding,
    torch.addmm: _plan_addmm,
    torch.einsum: _plan_einsum,
    torch._grouped_mm: _plan_grouped,
    **{getattr(torch, f"conv{n}d"): partial(_plan_convolution, n) for n in (1, 2, 3)},
    **dict.fromkeys((torch.mm, torch.bmm, torch.Tensor.mm, torch.Tensor.bmm), _plan_bmm),
    **dict.fromkeys((torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__), _plan_product),
}
if hasattr(functional, "grouped_mm"):  # newer than the oldest torch that we run on
    PRODUCTS[functional.grouped_mm] = _plan_grouped

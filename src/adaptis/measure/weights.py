"""Initial values for the layers that a process owns, and nothing for the others.

A transformers model is built on the meta device; here its owned layers get real values from the
family's own initialisation, module by module, each under a seed of its name and on the CPU, so that
values depend neither on the cut nor on the device. What other stages own is taken away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import guard_torch_init_functions

from adaptis.errors import InputError
from adaptis.measure.stage import seeded

if TYPE_CHECKING:
    from adaptis.measure.anatomy import Anatomy


@torch.no_grad()
def materialise(model: PreTrainedModel, anatomy: Anatomy, owned: range, seed: int) -> None:
    """Give the owned layers, and all modules without parameters, real values on the CPU.

    Raises:
        InputError: if the family's initialisation leaves one of them empty.
    """
    real: dict[int, nn.Parameter] = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            if anatomy.owner.get(name) in owned and id(parameter) not in real:
                real[id(parameter)] = nn.Parameter(_empty(parameter), parameter.requires_grad)
    touched: list[str] = []
    for name, module in modules.items():
        mine = anatomy.owner.get(name, None)
        if mine is None or mine in owned:
            touched.append(name)
            for key, buffer in module.named_buffers(recurse=False):
                module._buffers[key] = _empty(buffer)
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in real:
                module._parameters[key] = real[id(parameter)]
                touched.append(name)
    _initialise(model, anatomy, list(dict.fromkeys(touched)), seed)


def drop(model: PreTrainedModel, anatomy: Anatomy, owned: range, device: torch.device) -> None:
    """Take the parameters and buffers of other stages' layers away.

    An empty tensor stays in a parameter's place: some families ask their embedding for its device.
    """
    for name, module in model.named_modules():
        if anatomy.owner.get(name) is None or anatomy.owner[name] in owned:
            continue
        for key, parameter in list(module.named_parameters(recurse=False)):
            del module._parameters[key]
            module.__dict__[key] = torch.empty(0, dtype=parameter.dtype, device=device)
        for key in list(module._buffers):
            module._buffers[key] = None


def _initialise(model: PreTrainedModel, anatomy: Anatomy, names: list[str], seed: int) -> None:
    """Run the family's own initialisation.

    Children go before their parents, which may rescale them, and tied copies before their sources,
    whose values count.
    """
    copies = {name.rpartition(".")[0] for name, first in anatomy.canonical.items() if name != first}
    backwards = names[::-1]
    order = sorted(backwards, key=lambda name: name not in copies)
    with guard_torch_init_functions():
        for name in order:
            module = model.get_submodule(name)
            with seeded(seed, name):
                _family(model, name)._init_weights(module)
    for name in names:
        module = model.get_submodule(name)
        values = (*module._parameters.items(), *module._buffers.items())
        for key, value in values:
            if value is not None and not value.is_meta and _is_empty(value):
                raise InputError(
                    f"{model.config.model_type}: transformers gives {name}.{key} no initial "
                    "value, so this model cannot start from its configuration; choose another"
                )


def _family(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The innermost model around a module: each part of a composite has its own way."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module = model.get_submodule(".".join(parts[:length]))
        if isinstance(module, PreTrainedModel):
            return module
    return model


def _empty(like: Tensor) -> Tensor:
    """Values that show when nobody has written them."""
    if like.is_floating_point() or like.is_complex():
        return torch.full(like.shape, float("nan"), dtype=like.dtype, device="cpu")
    if like.dtype == torch.bool:
        return torch.zeros(like.shape, dtype=like.dtype, device="cpu")
    return torch.full(like.shape, torch.iinfo(like.dtype).min, dtype=like.dtype, device="cpu")


def _is_empty(value: Tensor) -> bool:
    if value.is_floating_point() or value.is_complex():
        return bool(value.isnan().any())
    return value.dtype != torch.bool and bool((value == torch.iinfo(value.dtype).min).any())

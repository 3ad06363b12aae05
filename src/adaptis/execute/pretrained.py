"""Weights in and out of the folders that transformers' `save_pretrained` writes.

Such a folder holds safetensors, in one file or in several with an index, under names and in shapes
that may differ from those of the model's own parameters (one tensor an expert, say): transformers'
own rules turn one into the other, in both directions. Each rank reads the tensors of its stages
alone, a layer at a time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from adaptis.errors import InputError
from adaptis.execute.parts import part_of
from adaptis.execute.storage import Checkpoint, sync
from adaptis.files import Fields, read_json
from adaptis.measure.huggingface import HuggingFaceModel

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedModel

    from adaptis.execute.session import Session
    from adaptis.measure.stage import TorchModel

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "5GB"  # the most that one exported file holds


def load_pretrained(session: Session, folder: Path) -> list[str]:
    """Give the session the weights in `folder`; every rank calls this, before the first step.

    Returns:
        The names of tensors in the folder that the model has no use for.

    Raises:
        InputError: on every rank, if there are none, or they are of another model.
    """
    problem, unused = "", []
    try:
        unused = _load(session, folder)
    except InputError as error:
        problem = str(error)
    if problem := next((text for text in session.world.gather(problem) if text), ""):
        raise InputError(problem)
    return unused


def export_pretrained(path: Path, model: TorchModel, folder: Path) -> None:
    """Write the checkpoint at `path`, of `model`, as a new folder for `from_pretrained`.

    Raises:
        InputError: the checkpoint is damaged or of another model, or `folder` exists.
    """
    if folder.exists():
        raise InputError(f"{folder}: exists already; give a new folder")
    found = Checkpoint(path)
    found.verify()
    network, first = _empty(model)
    state = _state(found, network, first)
    network.load_state_dict(state, assign=True, strict=False)
    network.tie_weights()
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        with _silence():
            network.save_pretrained(temporary, max_shard_size=SHARD)
        for file in temporary.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        sync(temporary)
        temporary.rename(folder)
        sync(folder.absolute().parent)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _empty(model: TorchModel) -> tuple[PreTrainedModel, dict[str, str]]:
    """The whole model as transformers has it, without values.

    Also the names of its parameters and buffers as transformers knows them, each with the name
    that we have for it: that of the first parameter that it is tied to.

    Raises:
        InputError: it is not of transformers.
    """
    if not isinstance(model, HuggingFaceModel):
        raise InputError(
            f"{model.name} is no model of transformers; only their weights can be read and written"
        )
    stage: Any = model.build(0, len(model.layers), seed=0, device="meta")
    network: PreTrainedModel = stage.model
    ours = {id(parameter): name for name, parameter in stage.global_parameters().items()}
    parameters = network.named_parameters(remove_duplicate=False)
    names = {name: ours[id(parameter)] for name, parameter in parameters}
    return network, names | {name: name for name in stage.global_buffers()}


def _state(found: Checkpoint, network: nn.Module, first: Mapping[str, str]) -> dict[str, Tensor]:
    """The checkpoint's tensors by the names of transformers; they stay in the files until used."""
    wanted = {name: tensor for name, tensor in network.state_dict().items() if name in first}
    files: dict[Path, Any] = {}
    state: dict[str, Tensor] = {}
    kinds = {name: "buffer" for name, _ in network.named_buffers()}
    for name, like in wanted.items():
        key = f"{kinds.get(name, 'param')}/{first[name]}"
        part = found.tensors.get(key)
        if part is None or part.shape != tuple(like.shape):
            raise InputError(
                f"{found.path}: is of {found.model}: {first[name]} is missing or of another shape; "
                f"give the model that was trained"
            )
        file = files.setdefault(part.path, safe_open(part.path, "pt"))
        state[name] = file.get_tensor(key)
    return state


def _load(session: Session, folder: Path) -> list[str]:
    network, first = _empty(session.model)
    files = _located(folder)
    targets = {key: _target(key, network, rules) for rules in [_Rules(network)] for key in files}
    own: dict[str, Tensor] = {**session.parameters, **session.buffers}
    lacking = set(own)
    layers = [layer.name for layer in session.model.layers]
    groups: dict[str, dict[str, str]] = {}
    for key, target in targets.items():
        name = first.get(target)
        twice = name != target and name in targets.values()
        if name in own and not twice:
            layer = next((layer for layer in layers if target.startswith(f"{layer}.")), "")
            groups.setdefault(layer, {})[key] = target
    for keys in groups.values():
        lacking -= _load_some(network, first, {key: files[key] for key in keys}, own)
    if lacking:
        raise InputError(
            f"{folder}: lacks {min(lacking)} of {session.model.name}; give that model's weights"
        )
    return sorted(key for key, target in targets.items() if target not in first)


class _Rules:
    """How transformers renames and converts the tensors of a folder for one model."""

    def __init__(self, network: PreTrainedModel) -> None:
        self.all = get_model_conversion_mapping(network)
        self.renamings = [rule for rule in self.all if isinstance(rule, WeightRenaming)]
        self.converters = [rule for rule in self.all if isinstance(rule, WeightConverter)]
        self.prefix = network.base_model_prefix
        self.names = network.state_dict()


def _target(key: str, network: PreTrainedModel, rules: _Rules) -> str:
    """The parameter or buffer that the tensor `key` becomes, or the first of several."""
    name, _ = rename_source_key(key, rules.renamings, rules.converters, rules.prefix, rules.names)
    if name not in rules.names and key in rules.names:
        name, _ = rename_source_key(key, [], [], rules.prefix, rules.names)
    return name


@torch.no_grad()
def _load_some(
    network: PreTrainedModel,
    first: Mapping[str, str],
    files: Mapping[str, Path],
    own: Mapping[str, Tensor],
) -> set[str]:
    """Read these tensors, convert them and copy them into our own; the names that got values."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_silence())
        opened = {path: stack.enter_context(_opened(path)) for path in set(files.values())}
        slices = {key: opened[path].get_slice(key) for key, path in files.items()}
        settings = LoadStateDictConfig(weight_mapping=cast("Any", _Rules(network).all))
        info, _ = convert_and_load_state_dict_in_model(network, slices, settings)
    where = next(iter(files.values())).parent
    for name, found, wanted in sorted(info.mismatched_keys):
        raise InputError(
            f"{where}: {name} has shape {tuple(found)}, the model needs {tuple(wanted)}; give the "
            f"weights of that model"
        )
    for name in sorted(info.conversion_errors):
        raise InputError(
            f"{where}: {name} cannot be made from its tensors; give the weights of that model"
        )
    done = set()
    for name, value in network.state_dict(keep_vars=True).items():
        if not value.is_meta:
            if first[name] in own:
                own[first[name]].copy_(part_of(value, own[first[name]]))
                done.add(first[name])
            _forget(network, name, value)
    return done


def _forget(network: nn.Module, name: str, value: Tensor) -> None:
    """Give the memory of a value back."""
    path, _, key = name.rpartition(".")
    module = network.get_submodule(path)
    empty = torch.empty_like(value, device="meta")
    if isinstance(value, nn.Parameter):
        module._parameters[key] = nn.Parameter(empty, value.requires_grad)
    else:
        module._buffers[key] = empty


def _located(folder: Path) -> dict[str, Path]:
    """The file of every tensor, in the order in which transformers goes through them.

    Raises:
        InputError: the folder holds no safetensors.
    """
    if (folder / INDEX).is_file():
        fields = Fields(read_json(folder / INDEX, "index of weights"), str(folder / INDEX))
        entries = fields.take("weight_map", dict)
    elif (folder / FILE).is_file():
        with _opened(folder / FILE) as file:
            entries = dict.fromkeys(file.keys(), FILE)
    else:
        raise InputError(
            f"{folder}: holds no {FILE}, in one file or in several with an index; give a folder "
            f"that transformers' save_pretrained wrote"
        )
    for name in set(entries.values()):
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{folder / INDEX}: {name!r} is no name of a file beside it")
    return {key: folder / entries[key] for key in sorted(entries, key=dot_natural_key)}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with cast("Any", safe_open(path, "pt")) as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({error}); fetch or write it again") from None


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep transformers' advice and progress bars off the user's screen."""
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

"""Checkpoints: by global name, verified, never half written, loadable under another plan.

    run/checkpoints/step-000041/           rank-0.safetensors  rank-1.safetensors  MANIFEST.json

Each rank writes what it owns (a shared parameter belongs to its lowest holder) as `param/NAME`,
`buffer/NAME` and `optimizer/NAME/KEY`. The files go into a temporary folder; the manifest, with
the SHA-256 of the very bytes that were written, goes last; then one rename makes the checkpoint
exist. Loading verifies every file that it reads, and falls back to the newest checkpoint that is
whole. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from adaptis.errors import InputError
from adaptis.files import Fields, parse_json, read_json

if TYPE_CHECKING:
    from torch import Tensor

    from adaptis.execute.session import Session

FORMAT, VERSION = "adaptis-checkpoint", 1
MANIFEST = "MANIFEST.json"
KEEP = 2


def save(session: Session, folder: Path, *, seed: int) -> Path:
    """Save the state after the session's last step; every rank calls this.

    Raises:
        InputError: the folder cannot be written.
    """
    world = session.world
    target = folder / f"step-{session.steps:06d}"
    temporary = folder / f".step-{session.steps:06d}.tmp"
    error = ""
    entry: dict[str, Any] = {}
    if world.rank == 0:
        error = _guarded(lambda: _fresh(folder, temporary))
    if error := world.broadcast(error):
        raise InputError(f"{folder}: no checkpoint could be saved ({error})")

    def write() -> None:
        data = save_tensors(_owned(session))
        name = f"rank-{world.rank}.safetensors"
        _write(temporary / name, data)
        entry.update(name=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    error = _guarded(write)
    parts = [json.loads(text) for text in world.gather(json.dumps({"error": error, "file": entry}))]
    error = next((part["error"] for part in parts if part["error"]), "")
    if not error and world.rank == 0:
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "model": session.model.name,
            "step": session.steps,
            "seed": seed,
            "files": [part["file"] for part in parts],
        }
        error = _guarded(lambda: _publish(manifest, temporary, target, folder))
    if error := world.broadcast(error):
        raise InputError(f"{target}: the checkpoint could not be saved ({error})")
    return target


def _guarded(action: Any) -> str:
    """What went wrong, so that every rank can stop together."""
    try:
        action()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _fresh(folder: Path, temporary: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _publish(manifest: dict[str, Any], temporary: Path, target: Path, folder: Path) -> None:
    body = json.dumps(manifest, indent=1)
    sealed = {"sha256": hashlib.sha256(body.encode()).hexdigest(), "manifest": manifest}
    _write(temporary / MANIFEST, json.dumps(sealed, indent=1).encode())
    _sync(temporary)
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)
    _sync(folder)
    for old in sorted(folder.glob("step-*"))[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)


def _owned(session: Session) -> dict[str, Tensor]:
    """What this rank writes.

    Everything it holds, but shared parameters only at their lowest holder.
    """
    foreign = {name for name, holders in session.shared if holders[0] != session.world.rank}
    names = {id(p): name for name, p in session.parameters.items()}
    tensors = {f"param/{n}": p.detach() for n, p in session.parameters.items() if n not in foreign}
    tensors |= {f"buffer/{n}": b for n, b in session.buffers.items()}
    if session.optimizer is not None:
        for parameter, state in session.optimizer.state.items():
            name = names[id(parameter)]
            if name not in foreign:
                tensors |= {
                    f"optimizer/{name}/{key}": torch.as_tensor(value)
                    for key, value in state.items()
                }
    return {key: tensor.contiguous().clone() for key, tensor in tensors.items()}


def newest(folder: Path) -> Path:
    """The newest checkpoint in `folder` that is whole to the last bit.

    Raises:
        InputError: there is none, saying what is wrong with the newest.
    """
    candidates = (
        [folder] if (folder / MANIFEST).exists() else sorted(folder.glob("step-*"), reverse=True)
    )
    first = ""
    for candidate in candidates:
        try:
            _read_all(candidate, manifest(candidate).take("files", list))
        except InputError as error:
            first = first or str(error)
            continue
        return candidate
    raise InputError(first or f"{folder}: holds no checkpoint; train without --resume first")


def manifest(checkpoint: Path) -> Fields:
    """The verified manifest; files are checked by size here, by SHA-256 when read.

    Raises:
        InputError: it is damaged or incomplete.
    """
    sealed = Fields(
        read_json(checkpoint / MANIFEST, "checkpoint manifest"), str(checkpoint / MANIFEST)
    )
    body = sealed.take("manifest", dict)
    if hashlib.sha256(json.dumps(body, indent=1).encode()).hexdigest() != sealed.take(
        "sha256", str
    ):
        raise InputError(
            f"{checkpoint / MANIFEST}: is damaged: its SHA-256 differs; use another checkpoint"
        )
    fields = Fields(parse_json(json.dumps(body), str(checkpoint)), str(checkpoint / MANIFEST))
    fields.format(FORMAT, VERSION)
    for file in body["files"]:
        path = checkpoint / Path(file["name"]).name
        if not path.is_file() or path.stat().st_size != file["bytes"]:
            raise InputError(f"{path}: is missing or cut short; use another checkpoint")
    return fields


def load(session: Session, checkpoint: Path) -> None:
    """Continue from `checkpoint`, whatever plan it was saved under; every rank calls this.

    Raises:
        InputError: it is damaged, or of another model.
    """
    fields = manifest(checkpoint)
    model = fields.take("model", str)
    tensors = _read_all(checkpoint, fields.take("files", list))
    missing = sorted(n for n in session.parameters if f"param/{n}" not in tensors)
    if missing:
        raise InputError(
            f"{checkpoint}: is of {model} and lacks the parameter {missing[0]} of "
            f"{session.model.name}; "
            f"resume with the model that was saved"
        )
    with torch.no_grad():
        for name, parameter in session.parameters.items():
            _copy(parameter, tensors[f"param/{name}"], name, checkpoint)
        for name, buffer in session.buffers.items():
            _copy(buffer, tensors[f"buffer/{name}"], name, checkpoint)
    _load_optimizer(session, tensors)
    session.steps = fields.count("step")


def _copy(target: Tensor, source: Tensor, name: str, checkpoint: Path) -> None:
    if target.shape != source.shape:
        raise InputError(
            f"{checkpoint}: {name} has shape {tuple(source.shape)}, the model needs "
            f"{tuple(target.shape)}"
        )
    target.copy_(source)


def _read_all(checkpoint: Path, files: list[Any]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in files:
        path = checkpoint / Path(file["name"]).name
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != file["sha256"]:
            raise InputError(f"{path}: is damaged: its SHA-256 differs; use another checkpoint")
        tensors |= load_tensors(data)
    return tensors


def _load_optimizer(session: Session, tensors: dict[str, Tensor]) -> None:
    if session.optimizer is None:
        return
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer/"):
            name, _, item = key.removeprefix("optimizer/").rpartition("/")
            states.setdefault(name, {})[item] = tensor
    for name, parameter in session.parameters.items():
        if name in states:
            session.optimizer.state[parameter] = {
                key: value.clone() for key, value in states[name].items()
            }

"""Checkpoints of a session: by global name, saved while training goes on, loaded under any plan.

Each rank writes what it owns (a parameter of several ranks belongs to the lowest) as `param/NAME`,
`buffer/NAME` and `optimizer/NAME/KEY`, and reads what it needs. The step is also the position in
the data; numbers that are drawn while training belong to a rank (`random/RANK`) and go on where
there are as many ranks as before. How it lies on the disk is the business of `storage`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adaptis.errors import InputError
from adaptis.execute import learning
from adaptis.execute.parts import part_of, whole
from adaptis.execute.rows import Index, assemble, rows_of, value_of
from adaptis.execute.storage import (
    Checkpoint,
    candidates,
    newest,
    nothing,
    prepare,
    publish,
    write_tensors,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from adaptis.execute.session import Session
    from adaptis.execute.world import World

__all__ = ["Saver", "load", "newest", "resume", "save"]
NICENESS = 10  # of the writing thread: it has what training leaves of the core


class Saver:
    """Saves a session again and again; at most one checkpoint is on its way.

    Every rank calls the same methods at the same steps. A rank's part is done in a thread, which
    talks to no other rank: whether all are done, and whether all went well, the ranks ask each
    other in `poll` and `finish`. So an error is raised on all of them, at the same step.
    """

    def __init__(
        self, session: Session, folder: Path, *, seed: int, background: bool = True
    ) -> None:
        """Save into `folder`.

        Args:
            session: what is trained.
            folder: on a file system that all ranks see.
            seed: of the run, to be kept with it.
            background: write while training goes on, from a copy of the state, which needs that
                much memory; otherwise training waits and nothing is copied.
        """
        self._session, self._folder, self._seed = session, folder, seed
        self._background = background
        self._part: Future[str] | None = None  # of this rank, of the save on its way; JSON
        self._files: list[Any] = []  # every rank's, once all are written
        self._temporary = folder
        self._step = 0
        self.saved = ""  # the newest checkpoint that is complete

    def start(self) -> None:
        """Save the state after the session's last step; waits for the save before it.

        Replicas hold the same, and with what lies in parts put together so does every row of a
        mesh: the first one saves.

        Raises:
            InputError: that one failed, or the folder cannot be written.
        """
        self.finish()
        tensors, values = _owned(self._session, copy=self._background)
        if not self._session.mesh.is_first_row:
            return
        world, self._step = self._session.world, self._session.steps
        self._temporary = self._folder / f".step-{self._step:06d}.tmp"
        self._files = []
        here = _guarded(lambda: prepare(self._folder, self._temporary)) if world.rank == 0 else ""
        if error := world.broadcast(here):
            raise InputError(f"{self._folder}: no checkpoint could be saved ({error})")
        path = self._temporary / f"rank-{world.rank}.safetensors"

        def write() -> dict[str, Any]:
            return {"file": write_tensors(path, tensors), **values}

        self._begin(write)
        if not self._background:
            self.finish()

    def poll(self) -> None:
        """After a step: go on with the save if every rank has done its part.

        Raises:
            InputError: it failed.
        """
        if self._part is not None and not self._session.world.sum(float(not self._part.done())):
            self._advance()

    def finish(self) -> None:
        """Wait for the save that is on its way.

        Raises:
            InputError: it failed.
        """
        while self._part is not None:
            self._advance()

    def _begin(self, action: Callable[[], dict[str, Any]]) -> None:
        def part() -> str:
            results: list[str] = []
            error = _guarded(lambda: results.append(json.dumps({"error": "", **action()})))
            return json.dumps({"error": error}) if error else results[0]

        pool = ThreadPoolExecutor(1, "checkpoint", _yield_to_training)
        self._part = pool.submit(part)
        pool.shutdown(wait=False)  # after this part

    def _advance(self) -> None:
        """Wait for every rank's part; then begin the next one, or the save is over."""
        assert self._part is not None
        world = self._session.world
        parts = [json.loads(text) for text in world.gather(self._part.result())]
        self._part = None
        if error := next((part["error"] for part in parts if part["error"]), ""):
            if world.rank == 0:
                shutil.rmtree(self._temporary, ignore_errors=True)
            world.broadcast("")  # the first rank to raise ends the others: not before it is gone
            raise InputError(
                f"{self._folder}: the checkpoint of step {self._step} could not be saved ({error})"
            )
        if self._files:
            self.saved = parts[0]["path"]
            return
        self._files = [part["file"] for part in parts]
        kinds = [part["optimizer"] for part in parts if part["optimizer"]]
        manifest = {
            "model": self._session.model.name,
            "step": self._step,
            "seed": self._seed,
            "optimizer": kinds[0] if kinds else "",
            "values": {key: v for part in parts for key, v in part["values"].items()},
            "files": self._files,
        }

        def seal() -> dict[str, Any]:
            return {"path": str(publish(self._temporary, self._folder, manifest))}

        self._begin(seal if world.rank == 0 else dict)


def save(session: Session, folder: Path, *, seed: int) -> Path:
    """Save the state after the session's last step, while training waits; every rank calls this.

    Raises:
        InputError: the folder cannot be written.
    """
    saver = Saver(session, folder, seed=seed, background=False)
    saver.start()
    return Path(saver.saved)


def _yield_to_training() -> None:
    with contextlib.suppress(OSError):  # on Linux a thread has a niceness of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def _guarded(action: Callable[[], Any]) -> str:
    """What went wrong, so that every rank can stop together."""
    try:
        action()
    except OSError as error:
        return error.strerror or str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _owned(session: Session, *, copy: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What this rank writes: tensors, and what else is to be known of the optimizer.

    Of several rows of a mesh, the others help to put together what lies in parts.
    """
    mine, owners = session.world.rank, _owners(session)
    tensors = {f"param/{n}": p.detach() for n, p in session.parameters.items()}
    tensors |= {f"buffer/{n}": b for n, b in session.buffers.items()}
    tensors = {key: tensor for key, tensor in tensors.items() if owners.get(key) == mine}
    tensors[f"random/{mine}"] = torch.get_rng_state()
    values: dict[str, Any] = {}
    names = {id(p): name for name, p in session.parameters.items()}
    states = session.optimizer.state if session.optimizer is not None else {}
    for parameter, state in states.items():
        name = names[id(parameter)]
        if owners.get(f"param/{name}") == mine:
            for key, value in state.items():
                kept = tensors if isinstance(value, torch.Tensor) else values
                kept[f"optimizer/{name}/{key}"] = value
    if session.optimizer is not None:
        values |= learning.kept(session)
    kind = "" if session.optimizer is None else type(session.optimizer).__name__
    ready = {}
    for key, tensor in tensors.items():
        all_of_it = whole(tensor)
        if session.mesh.is_first_row:
            again = copy and all_of_it is tensor
            ready[key] = all_of_it.contiguous().to("cpu", copy=again)
    return ready, {"values": values, "optimizer": kind}


def _owners(session: Session) -> dict[str, int]:
    """Every parameter and buffer of the model, and the lowest rank that has it."""
    own = [f"param/{name}" for name in session.parameters]
    own += [f"buffer/{name}" for name in session.buffers]
    owners: dict[str, int] = {}
    for rank, text in enumerate(session.world.gather(json.dumps(own))):
        for name in json.loads(text):
            owners.setdefault(name, rank)
    # Rows of what some rank holds whole, tied to a sharded head, are saved with it.
    return {name: rank for name, rank in owners.items() if not _is_held(name, owners)}


def _is_held(name: str, owners: dict[str, int]) -> bool:
    whole = rows_of(name).name
    return whole != name and whole in owners


def resume(session: Session, folder: Path) -> tuple[Checkpoint, list[str]]:
    """Continue from the newest checkpoint in `folder` that is whole; every rank calls this.

    Returns:
        It, and what was wrong with each newer one.

    Raises:
        InputError: there is none, saying what is wrong with the newest.
    """
    world = session.world
    listed = [str(path) for path in candidates(folder)] if world.rank == 0 else []
    paths = json.loads(world.broadcast(json.dumps(listed)))
    problems: list[str] = []
    for path in paths:
        found, problem = None, ""
        try:
            found = load(session, Path(path))
        except InputError as error:
            problem = str(error)
        problem = next((text for text in world.gather(problem) if text), "")
        if found is not None and not problem:
            return found, problems
        problems.append(problem)
    raise InputError(problems[0] if problems else nothing(folder))


def load(session: Session, path: Path) -> Checkpoint:
    """Continue from the checkpoint at `path`, whatever plan it was saved under.

    Every rank calls this and reads, and verifies, what it needs itself.

    Raises:
        InputError: that is damaged, or of another model; the session is then not to be used.
    """
    names = _owners(session)
    found = Checkpoint(path)
    _same_model(session, found, names)
    with torch.no_grad():
        index = Index(name for name, _ in found.named("param"))
        for name, target in session.parameters.items():
            pieces = [(found.tensors[f"param/{key}"], a, b) for key, a, b in index.sources(name)]
            _copy(target, assemble(pieces, name), name, found.path)
        for name, target in session.buffers.items():
            _copy(target, found.tensors[f"buffer/{name}"].read(), name, found.path)
    _load_optimizer(session, found, index)
    _load_random(session.world, found)
    session.steps = found.step
    return found


def _same_model(session: Session, found: Checkpoint, names: dict[str, int]) -> None:
    saved = (name for name in found.tensors if name.startswith(("param/", "buffer/")))
    there = {rows_of(name).name for name in saved}
    here = {rows_of(name).name for name in names}
    for lacking, holder, other in (
        (here - there, found.path, session.model.name),
        (there - here, session.model.name, found.model),
    ):
        if lacking:
            kind, _, name = min(lacking).partition("/")
            kind = "parameter" if kind == "param" else kind
            raise InputError(
                f"{found.path}: is of {found.model}, {session.model.name} is trained: {holder} "
                f"lacks the {kind} {name} of {other}; resume with the model that was saved"
            )
    kind = "" if session.optimizer is None else type(session.optimizer).__name__
    if kind and found.optimizer and kind != found.optimizer:
        raise InputError(
            f"{found.path}: was saved with the optimizer {found.optimizer}, {kind} is used; "
            f"resume with {found.optimizer}"
        )


def _copy(target: Tensor, source: Tensor, name: str, path: Path) -> None:
    wanted = (target.dtype, tuple(target.shape))
    if wanted != (source.dtype, tuple(source.shape)):
        raise InputError(
            f"{path}: {name} is {source.dtype} of shape {tuple(source.shape)}, the model needs "
            f"{wanted[0]} of shape {wanted[1]}; resume with the model that was saved"
        )
    target.copy_(part_of(source, target))


def _load_optimizer(session: Session, found: Checkpoint, index: Index) -> None:
    if session.optimizer is None:
        return
    learning.restore(session, found)
    states: dict[str, dict[str, Any]] = {}
    entries: list[tuple[str, Any]] = [
        *found.named("optimizer"),
        *(
            (key.removeprefix("optimizer/"), value)
            for key, value in found.values.items()
            if key.startswith("optimizer/")
        ),
    ]
    for key, value in entries:
        name, _, item = key.rpartition("/")
        states.setdefault(name, {})[item] = value
    names = {id(parameter): name for name, parameter in session.parameters.items()}
    session.optimizer.state.clear()
    for group in session.optimizer.param_groups:
        everywhere = bool(group.get("fused") or group.get("capturable"))
        for parameter in group["params"]:
            name = names[id(parameter)]
            sources = [(states.get(saved, {}), a, b) for saved, a, b in index.sources(name)]
            state = {
                key: value_of([(held[key], a, b) for held, a, b in sources if key in held], name)
                for key in (sources[0][0] if sources else ())
            }
            if state:
                session.optimizer.state[parameter] = {
                    key: _placed(value, parameter, everywhere) for key, value in state.items()
                }


def _placed(value: Any, parameter: Tensor, everywhere: bool) -> Any:
    """A part of a parameter's state, where torch wants it: most counters stay on the CPU."""
    if not isinstance(value, torch.Tensor) or not (value.dim() or everywhere):
        return value
    return part_of(value.to(parameter.device), parameter)


def _load_random(world: World, found: Checkpoint) -> None:
    """The rank's stream of random numbers goes on, where the ranks are as many as before."""
    states = dict(found.named("random"))
    if len(states) == world.size:
        torch.set_rng_state(states[str(world.rank)].read())

"""Training under a plan: the ten-line use, and what `adaptis train` runs.

By itself on one machine (own processes, supervised), or as one of the ranks that `torchrun`
started. Where no plan is given, the ranks measure the model side by side and rank 0 plans before
the first step.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.distributed.device_mesh import init_device_mesh

from adaptis.cluster import cluster_to_json
from adaptis.errors import InputError
from adaptis.execute import checkpoint
from adaptis.execute.device import refuse_absent
from adaptis.execute.launch import launch
from adaptis.execute.prepare import Measured, Measurement
from adaptis.execute.session import Session
from adaptis.execute.world import World, launched, seated, under_torchrun
from adaptis.files import write_json
from adaptis.plan import Plan, load_plan, plan_from_json, plan_to_json, save_plan
from adaptis.profile import profile_to_json
from adaptis.search import Progress, Stop, search
from adaptis.timeline import timeline_to_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from multiprocessing.connection import Connection

    from torch.distributed.device_mesh import DeviceMesh

    from adaptis.execute.launch import Seat
    from adaptis.execute.mesh import Parallelize
    from adaptis.execute.session import Optimizer, Schedule
    from adaptis.measure.stage import Microbatch, TorchModel

ROUNDS = 9  # how often each layer is timed before the plan is made


def adamw(learning_rate: float = 1e-3) -> Optimizer:
    """AdamW, in the fused form: one pass over each parameter."""
    return functools.partial(torch.optim.AdamW, lr=learning_rate, fused=True)


def autocast_type(name: str) -> torch.dtype | None:
    """What `autocast` in a training file means; empty: nothing is cast."""
    return getattr(torch, name) if name else None


@dataclass(frozen=True, slots=True)
class Job:
    """One training run; must be picklable."""

    model: TorchModel | Callable[[], TorchModel]
    batches: Callable[[int], Sequence[Microbatch]]  # step -> the micro-batches of the whole step
    steps: int  # the run ends when so many have been made, those before a resume counted
    plan: Plan | None = None  # None: measure and plan first
    optimizer: Optimizer = field(default_factory=adamw)
    seed: int = 0
    search_seconds: float = 5.0
    max_norm: float = 0.0  # gradients are clipped to this global norm; 0: they are not
    folder: str = ""  # where plan, profile, timeline and checkpoints go; empty: nowhere
    save_every: int = 0  # steps; 0: at the end only
    resume: bool = False
    background: bool = True  # training goes on while a checkpoint is written
    weights: str = ""  # a folder of transformers' save_pretrained; empty: initial values
    autocast: torch.dtype | None = None  # what products are computed in; None: the weights' type
    schedule: Schedule | None = None  # makes what moves the learning rate from the optimizer
    evaluate_every: int = 0  # steps; 0: never
    held_out: Callable[[int], Sequence[Microbatch]] | None = None  # step -> what is evaluated then
    mesh: Mapping[str, int] | None = None  # dimension -> its size; None: one pipeline
    parallelize: Parallelize | None = None  # cuts a layer along "tp"

    @property
    def replicas(self) -> int:
        """How many pipelines there are, each with micro-batches of its own."""
        sizes = self.mesh or {}
        return sizes.get("dp", 1) * sizes.get("fsdp", 1)


@dataclass(frozen=True, slots=True)
class Result:
    """What a run gives back."""

    losses: list[float]  # one per step of this run
    step_seconds: list[float]
    plan: Plan
    checkpoint: str = ""  # the last one, empty where nothing was saved
    timeline: dict[str, Any] = field(default_factory=dict)  # of a typical step, as JSON
    profile: dict[str, Any] | None = None  # as JSON, where it was measured
    evaluations: dict[int, float] = field(default_factory=dict)  # steps made -> held-out loss


def train(
    model: TorchModel | Callable[[], TorchModel],
    batches: Callable[[int], Sequence[Microbatch]],
    *,
    devices: int = 2,
    device: str = "cpu",
    steps: int,
    plan: Plan | str | Path = "auto",
    optimizer: Optimizer | None = None,
    seed: int = 0,
    search_seconds: float = 5.0,
    max_norm: float = 0.0,
    folder: str | Path = "",
    save_every: int = 0,
    resume: bool = False,
    background: bool = True,
    weights: str | Path = "",
    autocast: torch.dtype | None = None,
    schedule: Schedule | None = None,
    evaluate_every: int = 0,
    held_out: Callable[[int], Sequence[Microbatch]] | None = None,
    mesh: Mapping[str, int] | None = None,
    parallelize: Parallelize | None = None,
    say: Callable[[str, dict[str, Any]], None] = lambda kind, data: None,
) -> Result:
    """Train `model` on `devices` processes, exactly as one process would.

    Under `torchrun` this process is one of its ranks and `devices` is not used. Otherwise new
    processes are started, so a script calls this below ``if __name__ == "__main__":``, with a
    model and functions that they can import.

    Args:
        model: a `Chain`, a `HuggingFaceModel`, or a function that makes one.
        batches: step to its micro-batches, each a dict of tensors; the same on every rank.
        devices: how many processes to start, where `torchrun` has not.
        device: "cpu", or "cuda": each process computes on a GPU, which several share where there
            are too few; not yet run on hardware.
        steps: how many steps the run has, those before a resume counted.
        plan: a `Plan`, the path of one, or "auto" to measure and search first.
        optimizer: makes the optimizer from the parameters of a rank; AdamW where none is given.
        seed: of the initial weights and of the search.
        search_seconds: how long to search for a plan.
        max_norm: all gradients together are clipped to this norm; 0: they are not.
        folder: for plan, profile, timeline and checkpoints.
        save_every: steps between checkpoints; 0 saves at the end only.
        resume: continue from the newest checkpoint in `folder` that is whole.
        background: write checkpoints while training goes on, from a copy of the state, which needs
            that much memory; otherwise training waits.
        weights: a folder that transformers' `save_pretrained` wrote, to start from.
        autocast: what products are computed in, such as torch.bfloat16, as torch.autocast does.
        schedule: makes a learning-rate scheduler of torch from an optimizer; it goes on after each
            step, and after a resume where it was.
        evaluate_every: steps between two evaluations of `held_out`; 0: none.
        held_out: step to micro-batches, as `batches`, that are evaluated and not trained on.
        mesh: sizes of the dimensions "pp" and any of "dp", "fsdp" and "tp", whose product is the
            number of processes. The plan is for "pp"; a step's micro-batches are those of replica
            0, then those of replica 1, and so on.
        parallelize: cuts one layer along "tp", whose part of the mesh it is given too.
        say: called with the progress.

    Raises:
        Error: one sentence about what was wrong; every process has ended by then.
    """
    chosen = (
        None if plan == "auto" else plan if isinstance(plan, Plan) else load_plan(cast("str", plan))
    )
    if steps < 1:
        raise InputError(f"{steps} steps: at least 1 is needed")
    if (evaluate_every > 0) != (held_out is not None):
        raise InputError("to evaluate, give both evaluate_every above 0 and held_out")
    folders = {"folder": str(folder), "weights": str(weights)}
    saving = {"save_every": save_every, "resume": resume, "background": background}
    made = optimizer or adamw()
    job = Job(
        model,
        batches,
        steps,
        chosen,
        made,
        seed,
        search_seconds,
        max_norm,
        **folders,
        **saving,
        autocast=autocast,
        schedule=schedule,
        evaluate_every=evaluate_every,
        held_out=held_out,
        mesh=mesh,
        parallelize=parallelize,
    )
    if under_torchrun():
        with launched(say, device) as world:
            return run(world, job)
    if devices < 1:
        raise InputError(f"{devices} devices: at least 1 is needed")
    refuse_absent(device)
    return launch(train_rank, devices, job, say=say, device=device)[0]


def train_rank(seat: Seat, connection: Connection, job: Job) -> Result | None:
    """A rank under our own supervisor."""
    with seated(seat, connection) as world:
        result = run(world, job)
        return result if world.rank == 0 else None


def run(world: World, job: Job) -> Result:
    """Plan where needed, train, save; every rank calls this and gets the same result."""
    world.phase("building the model")
    made = job.model
    model = cast(
        "TorchModel", made if hasattr(made, "layers") else cast("Callable[[], TorchModel]", made)()
    )
    mesh = _mesh(world, job)
    measured, plan = None, job.plan
    if plan is None:
        measured, plan = _plan(world, mesh, model, job)
    world.phase("building stages")
    session = Session(
        world,
        model,
        plan,
        optimizer=job.optimizer,
        seed=job.seed,
        max_norm=job.max_norm,
        autocast=job.autocast,
        schedule=job.schedule,
        mesh=mesh,
        parallelize=job.parallelize,
    )
    folder = Path(job.folder) if job.folder else None
    if job.resume:
        _resume(session, job)
    elif job.weights:
        _take_weights(session, job)
    if world.rank == 0 and folder:
        save_plan(session.plan, folder / "plan.json")
    world.say("start", step=session.steps, steps=job.steps, plan=plan_to_json(plan))
    saver = _saver(session, job)
    results, evaluations = [], {}
    world.phase("training")
    while session.steps < job.steps:
        result = session.step(_own(session, job.batches(session.steps)))
        results.append(result)
        seconds = result.end - result.begin
        world.say("step", step=session.steps, steps=job.steps, loss=result.loss, seconds=seconds)
        if job.held_out is not None and not session.steps % job.evaluate_every:
            loss = evaluations[session.steps] = session.evaluate(
                _own(session, job.held_out(session.steps))
            )
            world.say("evaluation", step=session.steps, loss=loss)
        if saver:
            saver.poll()
            due = job.save_every and not session.steps % job.save_every
            if due or session.steps == job.steps:
                world.phase("saving a checkpoint")
                saver.start()
                world.phase("training")
    if saver:
        world.phase("saving a checkpoint")
        saver.finish()
    found = _result(session, results, saver.saved if saver else "", measured)
    return replace(found, evaluations=evaluations)


def _take_weights(session: Session, job: Job) -> None:
    from adaptis.execute.pretrained import load_pretrained

    session.world.phase("loading weights")
    unused = load_pretrained(session, Path(job.weights))
    session.world.say("weights", folder=job.weights, unused=unused)


def _saver(session: Session, job: Job) -> checkpoint.Saver | None:
    if not job.folder:
        return None
    folder = Path(job.folder, "checkpoints")
    return checkpoint.Saver(session, folder, seed=job.seed, background=job.background)


def _mesh(world: World, job: Job) -> DeviceMesh | None:
    if job.mesh is None:
        return None
    sizes = " x ".join(f"{name} {size}" for name, size in job.mesh.items())
    if "pp" not in job.mesh:
        raise InputError(f"a mesh of {sizes} has no pipeline; give a size for 'pp', too")
    if prod(job.mesh.values()) != world.size:
        raise InputError(
            f"a mesh of {sizes} has {prod(job.mesh.values())} processes, {world.size} are running; "
            f"give sizes whose product is that, or start as many"
        )
    if job.plan is None and job.mesh.get("tp", 1) > 1:
        raise InputError(
            f"a mesh of {sizes}: layers are measured whole, which those cut along 'tp' are not; "
            f"give a plan"
        )
    return init_device_mesh(
        world.device.type, tuple(job.mesh.values()), mesh_dim_names=tuple(job.mesh)
    )


def _own(session: Session, batch: Sequence[Microbatch]) -> Sequence[Microbatch]:
    """This replica's part of the micro-batches of all."""
    data = session.mesh.data
    count, rest = divmod(len(batch), data.size)
    if rest:
        raise InputError(
            f"{len(batch)} micro-batches for {data.size} replicas; give as many for each"
        )
    return batch[data.rank * count : (data.rank + 1) * count]


def _plan(
    world: World, mesh: DeviceMesh | None, model: TorchModel, job: Job
) -> tuple[Measured, Plan]:
    """Every row measures, side by side as they will compute; the first one's figures count."""
    first = job.batches(0)
    count = len(first) // job.replicas
    measurement = Measurement(
        world if mesh is None else world.along(mesh["pp"]),
        model,
        first[0],
        optimizer=job.optimizer,
        num_microbatches=count,
        seed=job.seed,
    )
    measurement.rounds(ROUNDS)
    measured = measurement.result()
    world.say("profile", profile=profile_to_json(measured.profile))
    world.phase("planning" if world.rank == 0 else "waiting for the plan")
    text = None
    if world.rank == 0:
        stop = Stop(seconds=job.search_seconds)
        limit = job.search_seconds

        def progress(found: Progress) -> None:
            now = {"best": found.best, "gap": found.gap, "seconds": found.seconds, "limit": limit}
            world.say("planning", **now)

        with world.every_core():
            answer = search(
                measured.profile,
                measured.cluster,
                count,
                stop,
                seed=job.seed,
                progress=progress,
            )
        text = json.dumps(plan_to_json(answer.plan))
        if job.folder:
            write_json(Path(job.folder, "profile.json"), profile_to_json(measured.profile))
            write_json(Path(job.folder, "cluster.json"), cluster_to_json(measured.cluster))
    return measured, plan_from_json(json.loads(world.broadcast(text)))


def _resume(session: Session, job: Job) -> None:
    if not job.folder:
        raise InputError("to resume, say from where: a folder with checkpoints is needed")
    world = session.world
    world.phase("loading a checkpoint")
    inner = Path(job.folder, "checkpoints")
    found, problems = checkpoint.resume(session, inner if inner.is_dir() else Path(job.folder))
    if found.seed != job.seed:
        raise InputError(
            f"{found.path}: was saved by a run with seed {found.seed}, this one has seed "
            f"{job.seed}; resume with the seed {found.seed}"
        )
    world.say("resumed", step=session.steps, checkpoint=str(found.path), problems=problems)


def _result(session: Session, results: list[Any], saved: str, measured: Measured | None) -> Result:
    timeline: dict[str, Any] = {}
    if results:
        ordered = sorted(results[min(2, len(results) - 1) :], key=lambda r: r.end - r.begin)
        lengths = json.loads(
            session.world.broadcast(json.dumps([results.index(r) for r in ordered]))
        )
        typical = results[lengths[len(lengths) // 2]]
        timeline = timeline_to_json(session.timeline(typical, session.plan.schedule))
    return Result(
        losses=[result.loss for result in results],
        step_seconds=[result.end - result.begin for result in results],
        plan=session.plan,
        checkpoint=saved,
        timeline=timeline,
        profile=profile_to_json(measured.profile) if measured else None,
    )

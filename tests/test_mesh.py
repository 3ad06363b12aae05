"""A pipeline beside replicas, sharded parameters and tensor parallelism is still one process."""

import functools
import re
import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path
from types import SimpleNamespace

import mesh_ranks
import numpy as np
import pytest
import tiny
import torch
from test_execute_ops import head_plan
from test_transparency import CUTS, irregular, plan_of

from adaptis.errors import InputError, PlanError
from adaptis.execute.launch import launch
from adaptis.execute.mesh import Mesh, refuse_unlike
from adaptis.execute.reference import Reference
from adaptis.execute.train import Job, train
from adaptis.execute.train import _mesh as train_mesh
from adaptis.execute.train import _own as own_part
from adaptis.execute.world import World
from adaptis.measure.stage import Chain

model = mesh_ranks.model
tied = functools.partial(model, tied=True)
headed = functools.partial(tied, num_blocks=1)
FUSED = plan_of("1f1b", CUTS["1f1b"], 4)
SPLIT = plan_of("zb-h1", CUTS["zb-h1"], 4)
FOLDED = plan_of("zb-v", CUTS["zb-v"], 4)  # embedding and head on one device
MIXED = irregular(4)
HEAD = head_plan(4, 1)


def sharded(plan):
    return replace(plan, stages=tuple(replace(stage, sharded=True) for stage in plan.stages))


FAST = {
    "dp mixed": ({"dp": 2, "pp": 2}, tied, MIXED, {"uneven": True, "max_norm": 0.3}),
    "dp odd": ({"pp": 2, "dp": 2}, mesh_ranks.odd, SPLIT, {"uneven": True}),
    "fsdp fused": ({"pp": 2, "fsdp": 2}, tied, FUSED, {"max_norm": 0.3}),
    "fsdp split": ({"pp": 2, "fsdp": 2}, tied, FOLDED, {"uneven": True}),
    "tp split": ({"pp": 2, "tp": 2}, tied, SPLIT, {"uneven": True, "max_norm": 0.3}),
    "dp tp": ({"pp": 2, "dp": 2, "tp": 2}, tied, SPLIT, {"uneven": True, "max_norm": 0.3}),
}
SLOW = {
    "dp fused": ({"pp": 2, "dp": 2}, tied, FUSED, {"uneven": True}),
    "dp head": ({"pp": 2, "dp": 2}, headed, HEAD, {"uneven": True, "max_norm": 0.3}),
    "fsdp odd": ({"pp": 2, "fsdp": 2}, mesh_ranks.odd, SPLIT, {"uneven": True, "max_norm": 0.3}),
    "fsdp gathered often": ({"pp": 2, "fsdp": 2}, model, sharded(SPLIT), {"uneven": True}),
    "tp fused": ({"pp": 2, "tp": 2}, model, FUSED, {"max_norm": 0.3}),
    "tp transformers": ({"pp": 2, "tp": 2}, mesh_ranks.transformer, SPLIT, {"max_norm": 0.3}),
    "tp folded": ({"pp": 2, "tp": 2}, tied, FOLDED, {}),
    "fsdp tp": ({"pp": 2, "fsdp": 2, "tp": 2}, tied, FUSED, {"uneven": True, "max_norm": 0.3}),
    "dp fsdp": ({"pp": 2, "dp": 2, "fsdp": 2}, tied, FOLDED, {"uneven": True, "max_norm": 0.3}),
}
CASES = FAST | SLOW


def complete(case):
    sizes, make, plan, options = case
    replicas = sizes.get("dp", 1) * sizes.get("fsdp", 1)
    return sizes, make, plan, options | {"replicas": replicas}


@functools.cache
def trained(count, slow):
    """The results of all cases of `count` processes, from one start of them."""
    cases = {
        name: complete(case)
        for name, case in (SLOW if slow else FAST).items()
        if prod(case[0].values()) == count
    }
    ranks = launch(mesh_ranks.train_rank, count, list(cases.values()))
    return dict(zip(cases, zip(*ranks, strict=True), strict=True))


def expected(name):
    """The same in one process: losses, a loss without training, gradients, parameters."""
    _, make, plan, options = complete(CASES[name])
    gradients, max_norm = [], options.get("max_norm", 0.0)
    made = make()
    reference = Reference(made, optimizer=tiny.sgd, seed=mesh_ranks.SEED, max_norm=max_norm)
    module = reference.module
    named = (module.global_parameters if isinstance(made, Chain) else module.named_parameters)()
    named = dict(named)
    reference.optimizer.register_step_pre_hook(
        lambda *_: gradients.append(
            {n: p.grad.numpy().copy() for n, p in named.items() if p.grad is not None}
        )
    )

    def batch(step):
        parts = (mesh_ranks.batch(plan, r, step, options) for r in range(options["replicas"]))
        return [microbatch for part in parts for microbatch in part]

    losses = [reference.step(batch(step)) for step in range(mesh_ranks.STEPS)]
    loss = reference.evaluate(batch(mesh_ranks.STEPS))
    return losses, loss, gradients, {n: p.detach().numpy() for n, p in named.items()}


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)


NAMES = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", NAMES)
def test_a_mesh_trains_as_one_process(name):
    losses, loss, gradients, parameters = expected(name)
    ranks = trained(prod(CASES[name][0].values()), name in SLOW)[name]
    for found in ranks:
        close(found[0], losses)
        close(found[1], loss)
        for key, value in found[3].items():
            close(value, joined(parameters, key))
    for step, wanted in enumerate(gradients):
        for found in ranks:
            for key, value in found[2][step].items():
                close(value, joined(wanted, key))
        assert {k.split("[")[0] for found in ranks for k in found[2][step]} == wanted.keys()


def joined(whole, key):
    """A parameter, or rows of one: NAME[START:STOP]."""
    name, _, rows = key.partition("[")
    if not rows:
        return whole[name]
    start, stop = rows.rstrip("]").split(":")
    return whole[name][int(start) : int(stop)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        {"pp": 2, "dp": 2},
        {"pp": 2, "fsdp": 2},
        {"pp": 2, "tp": 2},
        {"pp": 2, "fsdp": 2, "tp": 2},
    ],
    ids=" ".join,
)
def test_one_row_saves_and_all_go_on_from_it_with_and_without_a_mesh(tmp_path, sizes):
    replicas = sizes.get("dp", 1) * sizes.get("fsdp", 1)
    rest = SPLIT, str(tmp_path), replicas
    ranks = launch(mesh_ranks.save_rank, prod(sizes.values()), sizes, tied, *rest)
    assert sum(saved != "." for saved, *_ in ranks) == 2
    losses = {loss for _, found, _ in ranks for loss in found}
    assert len(losses) == 1, "the first step after it, by who saved and by who loaded"
    saved = {}
    for _, _, state in ranks:
        for key, value in state.items():
            np.testing.assert_array_equal(saved.setdefault(key, value), value)
    for found in launch(mesh_ranks.load_rank, 2, tied, SPLIT, str(tmp_path)):
        for key, value in found.items():
            np.testing.assert_array_equal(value, saved[key])


@pytest.mark.slow
def test_training_takes_the_sizes_of_a_mesh():
    found = train(
        model,
        functools.partial(tiny.batches, 4),
        steps=2,
        devices=4,
        plan=SPLIT,
        mesh={"pp": 2, "tp": 2},
        parallelize=mesh_ranks.parallelize,
        optimizer=tiny.sgd,
        seed=3,
    )
    close(found.losses, tiny.train_plain(model, 4, 2)[0])


def test_a_mesh_that_does_not_suit_the_run_is_refused():
    job = Job(model, tiny.batches, 1, mesh={"pp": 2, "tp": 2})
    with pytest.raises(InputError, match="pp 2 x tp 2 has 4 processes, 1 are running"):
        train_mesh(world(), job)
    with pytest.raises(InputError, match="measured whole, which those cut along 'tp' are not"):
        train_mesh(replace(world(), size=4), job)
    with pytest.raises(InputError, match="a mesh of dp 2 has no pipeline"):
        train_mesh(world(), replace(job, mesh={"dp": 2}))
    session = SimpleNamespace(mesh=SimpleNamespace(data=SimpleNamespace(rank=1, size=2)))
    assert own_part(session, "abcdef") == "def"
    with pytest.raises(InputError, match="3 micro-batches for 2 replicas"):
        own_part(session, "abc")


@pytest.mark.slow
def test_the_example_of_the_page_runs(tmp_path):
    page = Path(__file__).parents[1] / "docs" / "compose.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    (tmp_path / "example.py").write_text(code)
    subprocess.run([sys.executable, "example.py"], cwd=tmp_path, check=True, timeout=300)


def world():
    return World(0, 1, None, None, ())


@pytest.mark.parametrize("names", [None, ("dp",), ("pp", "rows")])
def test_a_mesh_of_other_dimensions_is_refused(names):
    with pytest.raises(PlanError, match="name one 'pp' and the others among"):
        Mesh(world(), SimpleNamespace(mesh_dim_names=names))


def test_tensor_parallelism_needs_somebody_who_cuts_the_layers():
    with pytest.raises(PlanError, match="need each other"):
        Mesh(world(), SimpleNamespace(mesh_dim_names=("pp", "tp")))
    with pytest.raises(PlanError, match="need each other"):
        Mesh(world(), None, mesh_ranks.parallelize)


def test_layers_that_somebody_else_reduces_are_refused():
    class DistributedDataParallel(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, layer):
            torch.nn.Module.__init__(self)
            self.layer = layer

    stage = Chain([torch.nn.Linear(2, 2), DistributedDataParallel(torch.nn.Linear(2, 2))])
    with pytest.raises(PlanError, match=r"layers \[0, 2\) have a DistributedDataParallel in them"):
        Mesh(world(), None).divide({0: stage.build(0, 2, seed=0)})


def test_tied_parameters_are_cut_alike():
    refuse_unlike("a", ["", ""])
    with pytest.raises(PlanError, match="the tied parameter a is cut as whole and as rows"):
        refuse_unlike("a", ["rows", ""])

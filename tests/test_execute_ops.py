"""Every instruction of a program on real processes, against plain training in one process.

Fused pairs, copies to the host, a head sharded over all devices, clipped gradients, two copies of
the model: alone, and together in random plans. All of one number of processes share a launch.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import random_programs
import tiny
import tiny_ops
import torch
from random_plans import schedule_plan
from tiny_ops import NORM, STEPS, model_of
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from adaptis.errors import PlanError
from adaptis.execute.head import ShardedHead
from adaptis.execute.launch import launch
from adaptis.execute.offload import HostMemory
from adaptis.execute.session import Session
from adaptis.execute.transport import Buffers
from adaptis.lower import lower
from adaptis.measure.compute import StageCompute
from adaptis.measure.stage import Chain, cross_entropy
from adaptis.plan import Plan, Stage
from adaptis.program import Compute, Op, Overlap, parts
from adaptis.schedules import SCHEDULES
from adaptis.schedules.shape import Shape
from adaptis.timeline import timeline_from_json

pytestmark = pytest.mark.usefixtures("one_thread")


def random_case(seed, devices):
    """A random plan without slices and replicas, and a random model for it."""
    for attempt in itertools.count():
        plan = random_programs.make_any_plan(f"{seed}/{attempt}", devices, 6, 6)
        bare = not plan.previous and plan.replicas == 1
        if bare and plan.num_devices == devices and plan.num_layers > 1:
            break
    options = {"tied": seed % 3 == 0, "bias": seed % 2 == 0, "frozen": seed % 7 == 1}
    return plan, options


def head_plan(m, reductions, devices=2):
    """F through all stages, then S on all devices, one micro-batch ahead of the backward."""
    stages = tuple(Stage(d, d + 1, d) for d in range(devices))
    rows = [[] for _ in range(devices)]

    def everywhere(op, i):
        for row in rows:
            row.append(Compute(op, devices, i))

    def through(op, i):
        for s in range(devices):
            rows[s].append(Compute(op, s, i))

    for i in range(m + 1):
        if i < m:
            through(Op.FORWARD, i)
            everywhere(Op.SCORES, i)
        if i:
            everywhere(Op.SCORES_GRADIENT, i - 1)
            through(Op.BACKWARD, i - 1)
    return Plan(m, stages, tuple(map(tuple, rows)), head_reductions=reductions)


def cases(devices):
    """Name -> (plan, what the model is like)."""
    result = {f"random {seed}": random_case(seed, devices) for seed in range(14)}
    for reductions in (1, 2):
        plan = head_plan(4, reductions, devices)
        result |= {
            f"head, {reductions}": (plan, {}),
            f"head with bias, {reductions}": (plan, {"bias": True}),
            f"tied head, {reductions}": (plan, {"tied": True, "bias": True}),
            f"frozen head, {reductions}": (plan, {"frozen": True}),
            f"clipped tied head, {reductions}": (replace(plan, clipped=True), {"tied": True}),
        }
    for name, v in (("dualpipe-v", 2), ("dualpipe", 2), ("chimera", 2), ("bitpipe", 4)):
        if not SCHEDULES[name].lacks(Shape(devices, 8, v)):
            result[name] = (schedule_plan(name, devices, 8, v), {})
    plan = schedule_plan("1f1b", devices, 8)
    result["clipped"] = (replace(plan, clipped=True), {"tied": True})
    cuts = [(2 * d, 2 * d + 2, d) for d in range(devices)]
    plan = schedule_plan("gpipe", devices, 4)
    away = tuple(Stage(*cut, offload=True) for cut in cuts)
    result["offloaded"] = (replace(plan, stages=away), {"tied": True})
    return result


def train_plain(plan, options):
    """Losses, norms before clipping and final parameters of plain training."""
    model = model_of(plan.num_layers, **options)
    whole = model.build(0, plan.num_layers, seed=3)
    trained = [p for p in whole.parameters() if p.requires_grad]
    optimizer, losses, norms = tiny.sgd(trained), [], []
    for step in range(STEPS):
        batch = tiny.batches(plan.num_microbatches, step, uneven=True)
        weight = 1.0 / sum(model.weight(microbatch) for microbatch in batch)
        total = 0.0
        for microbatch in batch:
            loss = model.loss(whole(None, microbatch), microbatch) * weight
            loss.backward()
            total += float(loss.detach())
        if plan.clipped:
            norms.append(float(nn.utils.clip_grad_norm_(trained, NORM)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
    return losses, norms, {n: p.detach().numpy() for n, p in whole.global_parameters().items()}


def merged(parts):
    """The parameters of all ranks by global name; what several hold is the same on all."""
    result, rows = {}, {}
    for part in parts:
        for name, value in part["parameters"].items():
            if name.endswith("]"):
                whole, start, stop = split_name(name)
                assert stop - start == len(value)
                rows.setdefault(whole, {})[start] = value
            else:
                assert name not in result or np.array_equal(result[name], value), name
                result[name] = value
    for whole, pieces in rows.items():
        if whole in result:
            for start, value in pieces.items():
                same = result[whole][start : start + len(value)]
                np.testing.assert_allclose(value, same, rtol=0, atol=0)
        else:
            result[whole] = np.concatenate([pieces[start] for start in sorted(pieces)])
    return result


def split_name(name):
    whole, _, place = name.rpartition("[")
    start, stop = place.rstrip("]").split(":")
    return whole, int(start), int(stop)


@pytest.fixture(scope="module", params=[2, 3])
def trained(request):
    named = cases(request.param)
    return named, launch(tiny_ops.rank_of, request.param, named)


def test_every_instruction_trains_as_one_process(trained):
    named, ranks = trained
    for name, (plan, options) in named.items():
        parts = [rank[name] for rank in ranks]
        losses, norms, weights = train_plain(plan, options)
        parameters = merged(parts)
        assert parameters.keys() == weights.keys(), name
        for part in parts:
            np.testing.assert_allclose(part["losses"], losses, rtol=1e-12, err_msg=name)
            if plan.clipped:
                assert min(norms) > NORM
                np.testing.assert_allclose(part["norms"], norms, rtol=1e-12, err_msg=name)
            else:
                assert part["norms"] == [0.0] * STEPS
        for key, value in weights.items():
            message = f"{name}: {key}"
            np.testing.assert_allclose(parameters[key], value, 1e-12, 1e-13, err_msg=message)


def test_what_the_program_offloads_goes_to_the_host_and_nothing_else_does(trained):
    named, ranks = trained
    for name, (plan, _) in named.items():
        devices = lower(plan).devices
        for device, rank in enumerate(ranks):
            copies = [str(i) for i in devices[device] if "OFFLOAD" in str(i)]
            # The embedding alone keeps nothing but the micro-batch, which stays.
            copied = any(plan.stages[int(text[0])].stop > 1 for text in copies)
            assert (rank[name]["moved"] > 0) == copied, name
    assert any(rank["offloaded"]["moved"] for rank in ranks)


def test_a_measured_timeline_knows_the_pairs_that_were_fused(trained):
    named, ranks = trained
    fused = 0
    for name, (plan, _) in named.items():
        timeline = timeline_from_json(ranks[0][name]["timeline"])
        works = [work for row in plan.programs for work in row]
        pairs = [work for work in works if isinstance(work, Overlap)]
        fused += len(pairs)
        found = [] if timeline.partner is None else timeline.partner
        spans = [s for d in range(timeline.num_devices) for s in timeline.spans(d)]
        both = [(spans[i].compute, spans[j].compute) for i, j in enumerate(found) if j > i]
        assert both == [parts(pair) for pair in pairs], name
        for i, j in enumerate(found):
            assert j < i or spans[i].end <= spans[j].start
    assert fused


def test_receive_buffers_are_few_and_forgotten_with_their_shape(trained):
    """Of 16 micro-batches, one after the other, no more than are posted ahead or kept."""
    _, ranks = trained
    for rank in ranks:
        counts, _ = rank["transfer"]
        assert counts[1] <= 4 * (len(ranks) - 1)
        assert max(counts) <= 2 * counts[1], "both shapes, of the step before and of this one"


def test_a_bundle_arrives_as_it_was_and_another_form_is_refused(trained):
    _, ranks = trained
    (_, refused), *others = (rank["transfer"] for rank in ranks)
    assert "was announced for inputs of these shapes" in refused
    assert all(same is True for _, same in others)


def test_a_buffer_is_used_again_only_when_nobody_looks_into_it():
    buffers, shape = Buffers(torch.device("cpu")), (torch.float32, (4,))
    first = buffers.take(shape)
    view = first[1:3]
    address = first.data_ptr()
    del first
    second = buffers.take(shape)
    assert second.data_ptr() != address
    leaf = second.detach().requires_grad_()
    result = (leaf * leaf).sum()
    del second, leaf, view
    third = buffers.take(shape)
    assert third.data_ptr() == address
    assert buffers.take(shape).data_ptr() not in (address, result.data_ptr())
    assert buffers.count() == 3
    buffers.trim()
    buffers.trim()
    assert buffers.count() == 0


@pytest.mark.parametrize("split", [False, True])
def test_offloaded_activations_are_gone_until_they_are_back(split):
    model = model_of(6)
    results = []
    for away in (False, True):
        module = model.build(1, 4, seed=1)
        stage, host = StageCompute(model, module, last=False, split=split), HostMemory()
        hidden = torch.randn(2, 12, 16, dtype=torch.float64, generator=torch.manual_seed(0))
        gradient = torch.ones_like(hidden)
        kept = saved_storages(module, hidden)
        output = stage.forward(0, hidden, {}, 1.0)
        entered = StorageWeakRef(hidden.untyped_storage())
        del hidden, output
        if away:
            assert not entered.expired()
            host.offload(stage, 0)
            assert entered.expired()
            assert 0.9 * kept < host.num_bytes <= 1.1 * kept
            host.reload(stage, 0)
            assert host.num_bytes == 0
        if split:
            found = [stage.backward_input(0, gradient)]
            stage.backward_weight(0)
        else:
            found = [stage.backward(0, gradient)]
        results.append(found + [p.grad for p in module.parameters()])
    assert all(map(torch.equal, *results))


def saved_storages(module, hidden):
    """The bytes that autograd saves, each storage once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = module(hidden.detach().requires_grad_(), {})
    del output
    return sum(sizes.values())


def narrow_loss(logits, microbatch):
    return 0.5 * cross_entropy(logits, microbatch)


@pytest.mark.parametrize(
    ("layer", "loss"),
    [
        (lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32)), cross_entropy),
        (lambda: nn.Sequential(nn.Linear(8, 32), nn.Tanh()), cross_entropy),
        (lambda: nn.Linear(8, 32), narrow_loss),
    ],
)
def test_a_head_that_is_no_linear_layer_with_cross_entropy_is_refused(layer, loss):
    model = Chain([lambda: nn.Embedding(32, 8), layer], loss, name="odd")
    with pytest.raises(PlanError, match="whose last layer is no linear layer followed by"):
        ShardedHead(model, 0, 2, seed=0, reductions=1, home=1, held={})


def test_a_head_with_fewer_rows_than_devices_is_refused():
    model = Chain([lambda: nn.Embedding(3, 8), lambda: nn.Linear(8, 3)], name="narrow")
    with pytest.raises(PlanError, match="3 rows cannot be sharded over 4 devices"):
        ShardedHead(model, 0, 4, seed=0, reductions=1, home=1, held={})


def test_a_plan_that_clips_needs_a_norm():
    plan = replace(schedule_plan("1f1b", 2, 2), clipped=True)
    with pytest.raises(PlanError, match="give a 'max_norm' above 0"):
        Session(None, model_of(2), plan, optimizer=tiny.sgd)

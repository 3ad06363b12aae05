"""Programs in torch's own pipeline runtime: the rank function that the tests' processes import."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

from adaptis.execute.world import seated

WIDTH, ROWS = 5, 2


def stage_of(index):
    torch.manual_seed(index)
    layers = nn.Linear(WIDTH, 7), nn.Tanh(), nn.Linear(7, WIDTH, bias=False)
    return nn.Sequential(*layers).double()


def data(num_microbatches):
    torch.manual_seed(77)
    shape = (ROWS * num_microbatches, WIDTH)
    return torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)


def loss_of(output, target):
    return ((output - target) ** 2).sum()


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def plain(num_stages, num_microbatches):
    """Losses and gradients of one process that holds all stages."""
    model = nn.Sequential(*map(stage_of, range(num_stages)))
    pairs = zip(*(part.chunk(num_microbatches) for part in data(num_microbatches)), strict=True)
    losses = []
    for inputs, target in pairs:
        losses.append(loss_of(model(inputs), target))
        losses[-1].backward()
    for p in model.parameters():
        p.grad.div_(num_microbatches)  # as torch's runtime does
    return torch.stack(losses).detach(), [gradients(stage) for stage in model]


def torch_rank(seat, connection, cases):
    """For each case (CSV, format, placement, micro-batches): how far this rank is off."""
    with seated(seat, connection) as world, TemporaryDirectory() as folder:
        groups = {p: dist.new_group(range(p)) for p in range(1, world.size + 1)}
        path = Path(folder, "schedule.csv")
        return [_off(world.rank, groups, path, *case) for case in cases]


def _off(rank, groups, path, text, form, placement, count):
    path.write_text(text)
    group = groups[max(placement) + 1]
    mine = [s for s, home in enumerate(placement) if home == rank]
    if not mine:
        return 0.0
    modules = {s: stage_of(s) for s in mine}
    stages = [
        PipelineStage(modules[s], s, len(placement), torch.device("cpu"), group=group) for s in mine
    ]
    runtime = _PipelineScheduleRuntime(stages, count, loss_fn=loss_of)
    runtime._load_csv(str(path), format=form)
    inputs, target = data(count)
    last = len(placement) - 1
    losses = []
    more = {"target": target, "losses": losses} if last in mine else {}
    runtime.step(*([inputs] if 0 in mine else []), **more)
    expected_losses, expected = plain(len(placement), count)
    off = [
        (found - expected[s][name]).abs().max()
        for s in mine
        for name, found in gradients(modules[s]).items()
    ]
    if last in mine:
        off.append((torch.stack(losses).detach() - expected_losses).abs().max())
    return float(torch.stack(off).max())

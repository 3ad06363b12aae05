"""Random models, plans and options: `draw(number, devices)`, and how a rank trains them.

A draw follows from its two numbers alone, so that processes need to be told nothing else.
"""

import functools
import itertools
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import random_programs
import torch
from torch import nn
from torch.nn import functional

from adaptis.execute.session import Session
from adaptis.execute.world import seated
from adaptis.measure.slices import carried
from adaptis.measure.stage import Chain, auxiliary_loss
from adaptis.plan import named_plan
from adaptis.program import Op, parts
from adaptis.schedules import SCHEDULES
from adaptis.schedules.shape import Shape

WIDTH, VOCABULARY, LENGTH = 8, 16, 6
SEED, STEPS = 7, 2
NORM = 0.05  # small enough to clip most steps
SCHEDULED = ("1f1b", "interleaved", "zb-h1", "zb-v", "v-half", "hanayo", "breadth-first")
SLICED = ("terapipe", "seq1f1b", "slimpipe")
TWICE = ("dualpipe-v", "dualpipe")  # two copies of the model, or one folded in two


class Mixed(nn.Module):
    """Hands a dict on: a hidden state, a running sum, the tokens and a mask without gradients."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x, microbatch):
        if isinstance(x, torch.Tensor):
            x = {"hidden": x, "more": (x * 0.5, None, microbatch["inputs"])}
        hidden, (total, _, tokens) = x["hidden"], x["more"]
        mask = (tokens % 3 > 0).unsqueeze(-1)
        new = hidden + self.dropout(torch.tanh(self.linear(hidden))) * mask
        return {"hidden": new, "more": (total + new * 0.1, None, tokens)}


class Joined(nn.Module):
    def forward(self, x):
        return x if isinstance(x, torch.Tensor) else x["hidden"] + x["more"][0]


class Experts(nn.Module):
    """Two experts by a router that has a loss of its own."""

    def __init__(self):
        super().__init__()
        self.router = nn.Parameter(torch.randn(2, WIDTH) / 3)
        self.experts = nn.Parameter(torch.randn(2, WIDTH, WIDTH) / 3)

    def forward(self, x):
        chances = functional.linear(x, self.router).softmax(-1)
        auxiliary_loss(0.1 * chances.mean((0, 1)).square().sum())
        parts = [functional.linear(x, self.experts[i]) * chances[..., i : i + 1] for i in range(2)]
        return x + parts[0] + parts[1]


class Counted(nn.Module):
    """Reads and moves a buffer: a running mean that the output depends on."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean((0, 1)), alpha=0.1)
        return self.norm((x - self.mean).transpose(1, 2)).transpose(1, 2)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH, bias=False)

    def forward(self, x):
        return x + functional.dropout(self.down(torch.tanh(self.up(x))), 0.2, self.training)


class Convolved(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x):
        return x + torch.tanh(self.layer(x.transpose(1, 2))).transpose(1, 2)


class Attention(nn.Module):
    """One head, under the micro-batch's own mask."""

    def __init__(self):
        super().__init__()
        self.entry, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, microbatch):
        q, k, v = self.entry(x).chunk(3, -1)
        scores = (q @ k.transpose(1, 2)) / WIDTH**0.5
        scores = scores.masked_fill(~microbatch["mask"][:, None], -1e9)
        return x + self.out(scores.softmax(-1) @ v)


class Causal(nn.Module):
    """One head that looks back over all slices of its sequence."""

    dropped = 0.1

    def __init__(self):
        super().__init__()
        self.entry, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.entry(x).chunk(3, -1)
        k, v = carried(self).append(k, v, dim=1)
        new, all_ = q.shape[1], k.shape[1]
        mask = torch.ones(new, all_, dtype=torch.bool).tril(all_ - new)
        seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.out(functional.dropout(seen, self.dropped, self.training))


class Recurrent(nn.Module):
    """A state, and how often it has been there, from slice to slice."""

    def __init__(self):
        super().__init__()
        self.entry, self.decay = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        memory = carried(self, "state")
        before = memory.earlier or {"state": torch.zeros_like(x[:, 0]), "count": torch.tensor(0)}
        state, states = before["state"], []
        for token in self.entry(x).unbind(1):
            state = torch.sigmoid(self.decay) * state + torch.tanh(token)
            states.append(state)
        count = before["count"] + 1
        memory.later = {"state": state, "count": count}
        return x + torch.stack(states, 1) / count


class Placed(nn.Embedding):
    """Tokens, their positions, and an image for each sequence."""

    def __init__(self):
        super().__init__(VOCABULARY, WIDTH)
        self.image = nn.Linear(4, WIDTH)

    def forward(self, x, microbatch):
        place = torch.sin(microbatch["positions"] * 0.7).to(self.weight.dtype).unsqueeze(-1)
        image = self.image(microbatch["image"].to(self.weight.dtype))
        return super().forward(x) + place + image.unsqueeze(1)


class Twice(nn.Linear):
    """The next token, and by the same weight the one after it."""

    def forward(self, x):
        return super().forward(x), super().forward(torch.tanh(x).roll(1, 1))


def loss(output, microbatch):
    labels = microbatch["labels"]
    if isinstance(output, torch.Tensor):
        return entropy(output, labels)
    return entropy(output[0], labels) + 0.3 * entropy(output[1], labels.roll(-1, 1))


def entropy(logits, labels):
    return functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="sum"
    )


def made(kind, *sizes, dtype, trained=True, **options):
    return kind(*sizes, **options).to(dtype).requires_grad_(trained)


def draw(number, devices):
    """A model, a plan for it, and how it is trained."""
    rng = random.Random(f"{number}/{devices}")
    plan = scheduled(rng, devices) if rng.random() < 0.4 else free(rng, devices)
    autocast = torch.bfloat16 if rng.random() < 0.15 else None
    options = {
        "max_norm": NORM if plan.clipped else 0.0,
        "autocast": autocast,
        "schedule": halving if rng.random() < 0.3 else None,
    }
    dtype = torch.float64 if autocast is None else torch.float32
    return SimpleNamespace(
        plan=plan,
        make=functools.partial(model_of, rng.random(), plan, dtype),
        options=options,
        lengths=[rng.randint(3, LENGTH) for _ in range(STEPS)],
        uneven=rng.random() < 0.5,
        steps=STEPS if autocast is None else 1,  # a last bit may flip a rounding of the next step
    )


def halving(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


def free(rng, devices):
    """Any order that can run, without replicas; in some, micro-batches are slices of others."""
    while True:
        plan = random_programs.make_any_plan(rng.random(), devices, 5, 5)
        if plan.replicas == 1 and plan.num_devices == devices and plan.num_layers > 1:
            return plan


def scheduled(rng, devices):
    """A named schedule over stages of random sizes, some recomputed."""
    while True:
        name, v = rng.choice((*SCHEDULED, *TWICE, *SLICED)), rng.randint(1, 3)
        schedule = SCHEDULES[name]
        shape = Shape(devices, rng.randint(2, 6), v, rng.randint(1, 4) if schedule.sliced else 1)
        if schedule.lacks(shape):
            continue
        count = devices * v // schedule.copies
        stops = [*itertools.accumulate(rng.randint(1, 2) for _ in range(count))]
        if stops[-1] > 1:  # an embedding and a head
            break
    plan = named_plan(schedule, shape, stops)
    again = [rng.random() < 0.3 for _ in range(count)]
    stages = [replace(stage, recompute=again[s % count]) for s, stage in enumerate(plan.stages)]
    return replace(plan, stages=tuple(stages), clipped=rng.random() < 0.3)


def in_order(plan):
    """Whether each stage takes the micro-batches in their order, and there is one of it."""
    seen = {}
    for row in plan.programs:
        for c in (c for work in row for c in parts(work) if c.op is Op.FORWARD):
            seen.setdefault(c.stage, []).append(c.microbatch)
    return plan.copies == 1 and all(found == sorted(found) for found in seen.values())


def model_of(seed, plan, dtype):
    """A chain with as many layers as the plan has, of all kinds that suit the plan."""
    rng = random.Random(seed)
    count = plan.num_layers - 2
    kinds = [Experts, Plain, Convolved, Attention, Causal, Recurrent]
    if in_order(plan):  # else the moving values of a buffer depend on the order
        kinds += [Counted]
    layers = []
    while len(layers) < count:
        run = rng.randint(2, 4)
        if rng.random() < 0.3 and len(layers) + run <= count:
            layers += [Mixed] * (run - 1) + [Joined]
        else:
            layers.append(rng.choice(kinds))
    layers = [functools.partial(made, kind, dtype=dtype) for kind in layers]
    if layers and rng.random() < 0.4:
        which = rng.randrange(len(layers))
        layers[which] = functools.partial(layers[which], trained=False)
    first = rng.choice(((Placed,), (nn.Embedding, VOCABULARY, WIDTH)))
    head = nn.Linear if plan.head_reductions or rng.random() < 0.7 else Twice
    bias = rng.random() < 0.5
    ends = (
        functools.partial(made, *first, dtype=dtype),
        functools.partial(made, head, WIDTH, VOCABULARY, dtype=dtype, bias=bias),
    )
    tied = {(count + 1, "weight"): (0, "weight")} if rng.random() < 0.4 else None
    return Chain([ends[0], *layers, ends[1]], loss, name="drawn", tied=tied)


def batch_of(case, step):
    """The micro-batches of a step: each step has its own length, now and then each micro-batch."""
    rng = np.random.default_rng(step)
    found = []
    for m in range(case.plan.num_microbatches):
        length = case.lengths[step % STEPS] + (m % 2 if case.uneven else 0)
        tokens = torch.from_numpy(rng.integers(0, VOCABULARY, (2, length + 1)))
        labels = tokens[:, 1:].clone()
        labels[:, : int(rng.integers(0, length - 1))] = -100
        mask = torch.from_numpy(rng.random((2, length)) < 0.8)
        mask[:, 0] = True
        found.append(
            {
                "inputs": tokens[:, :-1],
                "labels": labels,
                "mask": mask,
                "positions": torch.arange(length).expand(2, length),
                "image": torch.from_numpy(rng.random((2, 4))),
            }
        )
    return found


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def rank_of(seat, connection, numbers, devices):
    """For each draw: the losses of its steps, those of evaluations between, and what is there."""
    with seated(seat, connection) as world:
        return [train(world, number, draw(number, devices)) for number in numbers]


def train(world, number, case):
    world.phase(f"in draw {number} of {world.size} devices")
    session = Session(
        world, case.make(), case.plan, optimizer=sgd, seed=SEED, key=number, **case.options
    )
    losses = []
    for step in range(case.steps):
        losses.append(session.step(batch_of(case, step)).loss)
        losses.append(session.evaluate(batch_of(case, step + 1)))
    owners = [*session.stages.values(), *([session.head] if session.head else [])]
    assert all(owner.idle() for owner in owners)
    assert not session._executor._values
    state = {**session.parameters, **session.buffers}
    return losses, {name: t.detach().numpy() for name, t in state.items()}

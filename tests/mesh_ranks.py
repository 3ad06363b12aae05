"""What each process of `test_mesh` does: two steps under a mesh, and what came out as a whole."""

import functools
import logging
from pathlib import Path

import tiny
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from adaptis.execute import checkpoint
from adaptis.execute.session import Session
from adaptis.execute.train import adamw
from adaptis.execute.world import seated
from adaptis.measure.stage import Chain, auxiliary_loss

STEPS, SEED = 2, 3


class Odd(nn.Module):
    """Dropout, an auxiliary loss, a scalar, and weights for some, no and any micro-batch."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.9))
        self.often = nn.Linear(tiny.WIDTH, tiny.WIDTH)
        self.rare = nn.Linear(tiny.WIDTH, tiny.WIDTH)
        self.never = nn.Linear(tiny.WIDTH, tiny.WIDTH)
        self.frozen = nn.Linear(tiny.WIDTH, tiny.WIDTH).requires_grad_(requires_grad=False)

    def forward(self, x, microbatch):
        layer = self.rare if int(microbatch["inputs"][0, 0]) % 4 == 0 else self.often
        auxiliary_loss(0.1 * x.square().mean())
        return (
            x + nn.functional.dropout(self.frozen(layer(x)).tanh(), 0.3, self.training) * self.scale
        )


def exact(output, microbatch):
    """The cross-entropy in float64: the usual one is in float32."""
    labels = microbatch["labels"].reshape(-1)
    return nn.functional.cross_entropy(output.flatten(0, 1), labels, reduction="sum")


def model(**options):
    made = tiny.chain(dtype=torch.float64, **options)
    made._loss = exact
    return made


def odd():
    layers = [nn.Embedding(tiny.VOCABULARY, tiny.WIDTH), *(Odd() for _ in range(4))]
    layers.append(nn.Linear(tiny.WIDTH, tiny.VOCABULARY))
    makers = [functools.partial(_double, type(layer)) for layer in layers]
    return Chain(makers, loss=exact, name="odd")


def transformer():
    from transformers import LlamaConfig

    from adaptis.measure.huggingface import HuggingFaceModel

    config = LlamaConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=tiny.WIDTH,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    made = HuggingFaceModel(config, dtype=torch.float64)
    made.loss = exact
    return made


def _double(kind):
    sizes = {
        nn.Embedding: (tiny.VOCABULARY, tiny.WIDTH),
        nn.Linear: (tiny.WIDTH, tiny.VOCABULARY),
        Odd: (),
    }
    return kind(*sizes[kind]).double()


def parallelize(layer, mesh):
    match layer:
        case tiny.Block():
            parallelize_module(layer, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        case nn.Module(mlp=nn.Module()):
            columns, rows = ColwiseParallel(), RowwiseParallel()
            parallelize_module(
                layer.mlp, mesh, {"gate_proj": columns, "up_proj": columns, "down_proj": rows}
            )
        case nn.Embedding():
            parallelize_module(layer, mesh, RowwiseParallel(input_layouts=Replicate()))
        case nn.Linear():
            parallelize_module(layer, mesh, ColwiseParallel(output_layouts=Replicate()))


def train_rank(seat, connection, cases):
    """For each case: losses, a loss without training, gradients and parameters, whole."""
    logging.disable(logging.WARNING)  # torch's, on how it puts a tensor together
    with seated(seat, connection) as world:
        return [train(world, *case) for case in cases]


def train(world, sizes, make, plan, options):
    gradients = []

    def optimizer(parameters):
        made = tiny.sgd(parameters)
        made.register_step_pre_hook(lambda *_: gradients.append(whole(session, gradient=True)))
        return made

    session = session_of(world, sizes, make, plan, optimizer, options.get("max_norm", 0.0))
    replica = session.mesh.data.rank
    losses = [session.step(batch(plan, replica, s, options)).loss for s in range(STEPS)]
    loss = session.evaluate(batch(plan, replica, STEPS, options))
    assert all(stage.idle() for stage in session.stages.values())
    return losses, loss, gradients, whole(session)


def session_of(world, sizes, make, plan, optimizer, max_norm=0.0):
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    cut = parallelize if "tp" in sizes else None
    options = {"max_norm": max_norm, "mesh": mesh, "parallelize": cut}
    return Session(world, make(), plan, optimizer=optimizer, seed=SEED, **options)


def batch(plan, replica, step, options):
    count = plan.num_microbatches
    every = tiny.batches(count * options["replicas"], step, options.get("uneven", False))
    return every[replica * count : (replica + 1) * count]


def whole(session, gradient=False):
    found = {}
    for name, parameter in session.parameters.items():
        value = parameter.grad if gradient else parameter.detach()
        if value is not None:
            value = value.full_tensor() if isinstance(value, DTensor) else value
            found[name] = value.numpy().copy()
    return found


def save_rank(seat, connection, sizes, make, plan, folder, replicas):
    """A checkpoint, from which all go on: its path, the losses of both ways, what was saved."""
    logging.disable(logging.WARNING)
    options = {"replicas": replicas, "uneven": True}
    with seated(seat, connection) as world:
        session = session_of(world, sizes, make, plan, adamw())
        replica = session.mesh.data.rank
        session.step(batch(plan, replica, 0, options))
        saved = checkpoint.save(session, Path(folder), seed=SEED)
        state = state_of(session)
        world.barrier()
        other = session_of(world, sizes, make, plan, adamw())
        checkpoint.load(other, checkpoint.newest(Path(folder)))
        losses = [s.step(batch(plan, replica, 1, options)).loss for s in (session, other)]
        return str(saved), losses, state


def load_rank(seat, connection, make, plan, folder):
    """What is loaded where there is no mesh."""
    with seated(seat, connection) as world:
        session = Session(world, make(), plan, optimizer=adamw(), seed=SEED + 1)
        checkpoint.load(session, checkpoint.newest(Path(folder)))
        return state_of(session)


def state_of(session):
    """Parameters and moments by name, whole."""
    found = {}
    for name, parameter in session.parameters.items():
        for key, value in {"": parameter, **session.optimizer.state[parameter]}.items():
            all_of_it = value.full_tensor() if isinstance(value, DTensor) else value
            found[f"{name}/{key}"] = all_of_it.detach().numpy().copy()
    return found

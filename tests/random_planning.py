"""Random planning problems, from loose memory to none that fits: `make_problem(seed)`.

Bytes are whole numbers, so that sums of them are exact. `tiny_problem(seed)` is small enough for
every plan there is to be tried.
"""

import math
import random

from adaptis.cluster import Cluster, Device, Link
from adaptis.profile import LayerCost, Overheads, Profile, Shared

SIZES = ("state_bytes", "saved_bytes", "saved_weight_bytes", "output_bytes")


def make_problem(seed, most_devices=8, most_layers=40, most_microbatches=32):
    """A profile, a cluster and a number of micro-batches."""
    rng = random.Random(seed)
    p, n = rng.randint(2, most_devices), rng.randint(2, most_layers)
    profile = _profile(rng, n)
    return profile, _cluster(rng, p, profile), rng.randint(1, most_microbatches)


def tiny_problem(seed):
    """Up to 4 layers on 2 devices, 2 or 3 micro-batches, little memory."""
    rng = random.Random(seed)
    profile = _profile(rng, rng.randint(1, 4))
    return profile, _cluster(rng, 2, profile, factors=(0.5, 1.2)), rng.randint(2, 3)


def _profile(rng, n):
    scale = {name: rng.choice((0, 10, 100, 1000)) for name in SIZES}
    layers = [_layer(rng, i, scale) for i in range(n)]
    if n > 2 and rng.random() < 0.5:  # a model with ends: much state, and a head that works much
        layers[0] = _heavy(layers[0], "embedding", rng.uniform(1, 8), 0.1)
        layers[-1] = _heavy(layers[-1], "head", rng.uniform(1, 8), rng.uniform(1, 6))
    shared = ()
    if rng.random() < 0.3:
        tied = tuple(sorted({0, n - 1, *rng.sample(range(n), min(n, rng.choice((0, 2))))}))
        size = min(layers[i].parameter_bytes for i in tied)
        shared = (Shared(tied, size, rng.random() / 4),) if len(tied) > 1 else ()
    overheads = Overheads(*(rng.choice((0.0, rng.random() / 4)) for _ in range(6)))
    if rng.random() < 0.5:
        overheads = Overheads()
    return Profile(f"random {n}", 128, tuple(layers), overheads, shared)


def _layer(rng, i, scale):
    """Uneven; now and then without any cost, or with an output larger than what is saved."""
    forward, half, weight = (rng.choice((1.0, rng.uniform(0, 3))) for _ in range(3))
    if rng.random() < 0.1:
        forward = half = weight = 0.0
    size = {name: rng.randint(0, scale[name]) for name in SIZES}
    if rng.random() < 0.7:  # else W needs other bytes than what F saved, maybe more
        size["saved_weight_bytes"] = min(size["saved_weight_bytes"], size["saved_bytes"])
    if rng.random() < 0.6:  # as in most models: what is saved holds what was handed in
        size["output_bytes"] = min(size["output_bytes"], size["saved_bytes"])
    return LayerCost(
        name=f"layer {i}",
        kind=rng.choice(("attention", "mlp")),
        forward=forward,
        backward_input=half,
        backward_weight=weight,
        backward=(half + weight) * rng.choice((1.0, 1.0, 0.9)),
        update=rng.choice((0.0, rng.random() / 4)),
        parameter_bytes=size["state_bytes"] // 4,
        workspace_bytes=rng.choice((0, 0, rng.randint(0, scale["saved_bytes"]))),
        **size,
    )


def _heavy(layer, kind, bytes_by, seconds_by):
    state = int(layer.state_bytes * bytes_by)
    return LayerCost(
        layer.name,
        kind,
        *(x * seconds_by for x in (layer.forward, layer.backward_input, layer.backward_weight)),
        backward=layer.backward * seconds_by,
        parameter_bytes=state // 4,
        state_bytes=state,
        saved_bytes=layer.saved_bytes,
        saved_weight_bytes=layer.saved_weight_bytes,
        output_bytes=layer.output_bytes,
    )


def _cluster(rng, p, profile, factors=(1.0, 3.0)):
    """Unlimited now and then, else so much memory that some problems have no plan."""
    state = sum(layer.state_bytes for layer in profile.layers)
    largest = max(
        layer.state_bytes + max(layer.saved_bytes, layer.saved_weight_bytes) + layer.workspace_bytes
        for layer in profile.layers
    )
    room = (state / p + largest + 1) * rng.uniform(*factors)
    memory, speed = [math.floor(room)] * p, [1.0] * p
    if rng.random() < 0.4:
        memory = [math.floor(room * rng.uniform(0.5, 1.5)) for _ in range(p)]
    if rng.random() < 0.1:
        memory = [math.inf] * p
    if rng.random() < 0.4:
        speed = [rng.choice((0.5, 1.0, 1.5)) for _ in range(p)]
    nodes = rng.randint(1, 2)
    devices = tuple(Device(speed[d], memory[d], d * nodes // p) for d in range(p))
    size = max(1, *(layer.output_bytes for layer in profile.layers))
    links = [Link(rng.choice((0.0, 0.05)), size / rng.choice((0.1, 0.5))) for _ in range(2)]
    if rng.random() < 0.4:
        links = [Link(), Link()]
    return Cluster(devices, *links)

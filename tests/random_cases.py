"""Random plans on random clusters, with costs of which every sum is exact: `make_case(seed)`.

All seconds and bytes are three times a power of two's multiple, and speeds and bandwidths powers
of two, so that even a third of them has no rounding: two simulators must agree to the last bit.
"""

import math
import random
from dataclasses import replace

from random_programs import make_any_plan

from adaptis.cluster import Cluster, Device, Link
from adaptis.profile import LayerCost, Overheads, Profile, Shared


def make_case(seed):
    """A plan, a profile, a cluster, and the weights of the micro-batches."""
    plan = make_any_plan(seed)
    rng = random.Random(seed + 1)
    profile = _profile(rng, plan.num_layers)
    cluster = _cluster(rng, plan.num_devices, profile)
    weights = [1.0] * plan.num_microbatches
    if rng.random() < 0.5:
        weights = [rng.choice((0.5, 1.0, 1.25, 3.0)) for _ in weights]
    return plan, profile, cluster, tuple(weights)


def _profile(rng, num_layers):
    def seconds():
        return 3 * rng.randint(0, 64) / 4096

    def size():
        return 24 * rng.randint(0, 40)

    layers = [
        LayerCost(
            name=f"layer {i}",
            kind="mlp",
            forward=seconds(),
            backward_input=seconds(),
            backward_weight=seconds(),
            backward=seconds(),
            update=rng.choice((0.0, seconds())),
            parameter_bytes=size(),
            state_bytes=4 * size(),
            saved_bytes=size(),
            saved_weight_bytes=size(),
            output_bytes=size(),
            overlapped=rng.choice((0.0, seconds())),
            carried_bytes=size(),
            workspace_bytes=size(),
        )
        for i in range(num_layers)
    ]
    shared = ()
    if num_layers > 1 and rng.random() < 0.5:
        pair, half = tuple(sorted(rng.sample(range(num_layers), 2))), size()
        for i in pair:
            layers[i] = replace(layers[i], parameter_bytes=2 * half, state_bytes=8 * half)
        shared = (Shared(pair, half, seconds()),)
    overheads = Overheads(*(rng.choice((0.0, seconds() / 4)) for _ in range(6)))
    tokens = 3 * rng.randint(1, 16)
    return Profile("random", tokens, tuple(layers), overheads=overheads, shared=shared)


def _cluster(rng, num_devices, profile):
    def link():
        some = Link(rng.choice((0.0, 3 / 4096, 3 / 64)), rng.choice((2.0**13, 2.0**15, 2.0**17)))
        return rng.choice((Link(), some, some))

    state = sum(layer.state_bytes for layer in profile.layers) // num_devices
    memory = rng.choice((math.inf, state + 24 * rng.randint(0, 400)))
    devices = tuple(
        Device(rng.choice((0.5, 1.0, 2.0)), memory, rng.randrange(2)) for _ in range(num_devices)
    )
    return Cluster(devices, link(), link(), link(), link(), overlap=rng.random() < 0.7)

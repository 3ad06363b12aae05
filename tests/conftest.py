"""Shared settings: where helpers that spawned processes import are, and hypothesis's profile."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
settings.register_profile(
    "ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ci")


ALONE = """
    checkpoint checkpoint_crashes checkpoint_head demo device execute_ops faults fidelity gpu
    gradients html launch mesh models_execute own_stages slices torch_runtime train transparency
    wire
"""


def pytest_collection_modifyitems(items):
    """Files whose tests start processes or look at the clock run one at a time, on all cores."""
    for item in items:
        if item.path.stem.removeprefix("test_") in ALONE.split() or "ranks" in item.fixturenames:
            item.add_marker("alone")


@pytest.fixture
def one_thread():
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

"""The backward in two halves against torch's own, on one module at a time."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from adaptis.measure.compute import StageCompute
from adaptis.measure.stage import Chain

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH = 8
BATCH = {"inputs": torch.zeros(0), "labels": torch.zeros(1, dtype=torch.long)}


class Function(nn.Module):
    """Parameters and what is done with them."""

    def __init__(self, function, *shapes):
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(*shape)) for shape in shapes])
        self.own = self.weights[0]

    def forward(self, x):
        return self.function(x, *self.weights)


class Moved(nn.Module):
    def __init__(self, layer, before, after):
        super().__init__()
        self.layer, self.before, self.after = layer, before, after

    def forward(self, x):
        return self.after(self.layer(self.before(x)))


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.inner = nn.Sequential(
            nn.Linear(WIDTH, 12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, WIDTH)
        )

    def forward(self, x):
        return x + checkpoint(self.inner, x, use_reentrant=self.reentrant)


class Twice(nn.Module):
    """One linear layer three times, and its weight once more by another way."""

    def __init__(self, direct):
        super().__init__()
        self.linear, self.direct = nn.Linear(WIDTH, WIDTH), direct

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.linear(x))
        return x * self.linear.weight.sum(0) if self.direct else x


class Experts(nn.Module):
    """Rows go to experts by turns; the last expert gets none."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(torch.randn(4, WIDTH, WIDTH) / 3)

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        if self.how == "loop":
            parts = [functional.linear(rows[i::3], self.weight[i]) for i in range(3)]
            return torch.cat(parts)
        if self.how == "gathered":
            which = torch.arange(len(rows)) % 3
            return torch.bmm(self.weight[which], rows.unsqueeze(-1)).squeeze(-1)
        ends = torch.tensor([4, 8, len(rows), len(rows)], dtype=torch.int32)
        weight = self.weight.transpose(1, 2) if self.how == "grouped, turned" else self.weight
        return torch._grouped_mm(rows, weight, offs=ends)


def flat(x):
    return x.reshape(-1, WIDTH)


CASES = {
    "linear": lambda: nn.Linear(WIDTH, 5),
    "linear without bias on strided values": lambda: Moved(
        nn.Linear(3, 5, bias=False), lambda x: x.transpose(1, 2), torch.tanh
    ),
    "linear on strided values": lambda: Moved(
        nn.Linear(3, 5), lambda x: x.transpose(1, 2), torch.tanh
    ),
    "conv1d": lambda: nn.Conv1d(3, 6, 3, padding=2, groups=3, padding_mode="circular"),
    "conv2d": lambda: Moved(
        nn.Conv2d(1, 4, (2, 3), stride=(1, 2)), lambda x: x.unsqueeze(1), torch.tanh
    ),
    "addmm": lambda: Function(lambda x, w, b: torch.addmm(b, flat(x), w), (WIDTH, 5), (5,)),
    "matmul with a turned weight": lambda: Function(lambda x, w: x @ w.T, (5, WIDTH)),
    "einsum": lambda: Function(lambda x, w: torch.einsum("bsd,hde->bhse", x, w), (2, WIDTH, 5)),
    "bmm": lambda: Function(torch.bmm, (4, WIDTH, 5)),
    "bmm from the left": lambda: Function(lambda x, w: torch.bmm(w, x), (4, 5, 3)),
    "experts in a loop": lambda: Experts("loop"),
    "experts gathered": lambda: Experts("gathered"),
    "experts grouped": lambda: Experts("grouped"),
    "experts grouped, turned": lambda: Experts("grouped, turned"),
    "checkpointed": lambda: Checkpointed(reentrant=False),
    "checkpointed, reentrant": lambda: Checkpointed(reentrant=True),
    "used thrice": lambda: Twice(direct=False),
    "used by another way too": lambda: Twice(direct=True),
    "attention of torch": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, 5)),
    "weight from the input": lambda: Function(
        lambda x, w: functional.linear(x, (flat(x).T @ flat(x)) * w), (WIDTH, WIDTH)
    ),
}
NEVER = {  # nothing waits for W
    "weight norm": False,
    "weight from the input": False,
    "used by another way too": False,
}


def values(dtype=torch.float32):
    torch.manual_seed(5)
    return torch.randn(4, 3, WIDTH, dtype=dtype)


def gradients_of(make, *, split, dtype=torch.float32, autocast=None, frozen=(), hook=None):
    """Gradients of the inputs and parameters, and the bytes that waited; two micro-batches."""
    torch.manual_seed(3)
    layer = make().to(dtype)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name not in frozen)
    if hook is not None:
        hook(layer)
    model = Chain([nn.Identity(), layer, nn.Identity()])
    compute = StageCompute(
        model, model.build(1, 2, seed=0), last=False, split=split, seed=1, autocast=autocast
    )
    found, waiting = [], 0
    for m in range(2):
        output = compute.forward(m, values(dtype) * (m + 1), BATCH, 1.0)
        torch.manual_seed(9)
        gradient = torch.randn_like(output)
        if split:
            found.append(compute.backward_input(m, gradient))
            waiting = compute.pending_bytes(m)
            compute.backward_weight(m)
        else:
            found.append(compute.backward(m, gradient))
    assert compute.idle()
    return found, {n: p.grad for n, p in layer.named_parameters()}, waiting


def assert_same(make, equal=torch.equal, **options):
    expected, weights, _ = gradients_of(make, split=False, **options)
    found, split_weights, waiting = gradients_of(make, split=True, **options)
    for one, other in zip(expected, found, strict=True):
        assert equal(one, other)
    for name, gradient in weights.items():
        other = split_weights[name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or equal(gradient, other), name
    return waiting


def close(one, other):
    return torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_a_sum_of_products_in_another_order_is_as_exact():
    assert assert_same(CASES["einsum"], close, dtype=torch.float64) > 0


@pytest.mark.parametrize("name", [name for name in CASES if name != "einsum"])
def test_two_halves_are_the_whole_to_the_last_bit(name):
    waiting = assert_same(CASES[name])
    assert (waiting > 0) == NEVER.get(name, True) or name == "checkpointed, reentrant"


@pytest.mark.parametrize("name", ["linear", "conv1d", "matmul with a turned weight"])
def test_under_autocast_too(name):
    assert assert_same(CASES[name], autocast=torch.bfloat16) > 0


def test_a_weight_used_often_under_autocast_is_cast_once():
    assert assert_same(CASES["used thrice"], autocast=torch.bfloat16) > 0


def test_bfloat16_weights_too():
    assert assert_same(CASES["linear"], dtype=torch.bfloat16) > 0


@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias")])
def test_frozen_parameters_get_nothing(frozen):
    waiting = assert_same(CASES["linear"], frozen=frozen)
    assert (waiting > 0) == ("weight" not in frozen)


@pytest.mark.parametrize("name", ["linear", "used thrice", "used by another way too"])
def test_hooks_of_a_weight_run_once_a_microbatch(name):
    seen = []

    def hook(layer):
        weight = next(p for n, p in layer.named_parameters() if n.endswith("weight"))
        weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        weight.register_hook(lambda gradient: gradient * 2)

    assert_same(CASES[name], hook=hook)
    assert len(seen) == 4  # two micro-batches, whole and split
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])


def test_nothing_reaches_a_waiting_weight_before_w():
    layer = nn.Linear(WIDTH, 5)
    model = Chain([nn.Identity(), layer, nn.Identity()])
    compute = StageCompute(model, model.build(1, 2, seed=0), last=False, split=True)
    output = compute.forward(0, values(), BATCH, 1.0)
    compute.backward_input(0, torch.ones_like(output))
    assert layer.weight.grad is None
    assert layer.bias.grad is None
    compute.backward_weight(0)
    assert layer.weight.grad is not None


def test_a_compiled_layer_has_its_whole_backward_in_i():
    assert assert_same(lambda: torch.compile(nn.Linear(WIDTH, 5), backend="aot_eager")) == 0


def test_tied_embedding_and_head_in_one_stage_wait_together():
    def tied():
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding = nn.Embedding(16, WIDTH, padding_idx=2)
                self.head = nn.Linear(WIDTH, 16, bias=False)
                self.head.weight = self.embedding.weight

            def forward(self, x):
                return self.head(self.embedding((x.abs() * 4).long().clamp(max=15)))

        return Tied()

    assert assert_same(tied) > 0


def test_outside_of_an_instruction_a_prepared_layer_is_plain():
    layer = nn.Linear(WIDTH, 5)
    model = Chain([nn.Identity(), layer])
    StageCompute(model, model.build(0, 2, seed=0), last=True, split=True)
    layer(values()).sum().backward()
    assert layer.weight.grad is not None


def test_a_convolution_keeps_only_its_operands_for_w():
    waiting = assert_same(CASES["conv1d"])
    inputs, output = 4 * 3 * (WIDTH + 4) * 4, 4 * 6 * (WIDTH + 2) * 4
    assert waiting == inputs + output

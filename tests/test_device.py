"""What of the way to a GPU can be shown without one: refusals, clocks, messages, their order."""

import time

import gpu_ranks
import pytest
import tiny
import torch

from adaptis.errors import Error, InputError
from adaptis.execute import device as devices
from adaptis.execute import world as worlds
from adaptis.execute.device import CPU, CudaClock, HostClock, clock_of, on_device, take_device
from adaptis.execute.launch import launch
from adaptis.execute.train import train
from adaptis.execute.wire import SharedWire, StagedWire

NAMES = ["tied", "zb-v", "dropout", "head, 1", "head, 2"]
absent = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def device_rank(seat, connection):
    with worlds.seated(seat, connection) as world:
        return str(world.device)


@pytest.fixture(scope="module")
def trained():
    return launch(gpu_ranks.train_rank, 2, NAMES, ("staged", "ordered"))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("way", ["staged", "ordered"])
@pytest.mark.parametrize("name", NAMES)
def test_messages_by_way_of_the_host_or_without_tags_train_as_one_process(name, way, trained):
    parts = [found[name, way] for _, _, found in trained]
    gpu_ranks.assert_same(parts, *gpu_ranks.cases()[name])
    for part in parts:
        gpu_ranks.assert_rows_lie_in_their_steps(part)


def test_what_is_sent_by_way_of_the_host_may_change_at_once():
    ends = [SharedWire(rank, 0.0) for rank in range(2)]
    assert all(end.meet([end.address for end in ends]) for end in ends)
    one, two = map(StagedWire, ends)
    there = torch.arange(6.0).view(2, 3).t()  # not contiguous
    expected, arriving = there.clone(), torch.zeros(3, 2)
    assert one.isend(there, 1, 0).is_completed()
    there.zero_()
    work = two.irecv(arriving, 0, 0)
    assert not arriving.any()
    work.wait()
    assert torch.equal(arriving, expected)


def test_the_clock_of_a_cpu_is_the_machine_s():
    clock = clock_of(CPU)
    assert type(clock) is HostClock
    assert clock.read is time.perf_counter
    rows = [("F", 1.0, 2.0)]
    assert clock.seconds(rows) is rows


class Event:
    """Of a GPU that takes 1 ms from one event to the next."""

    recorded = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.recorded += 1
        self.number = Event.recorded

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return float(other.number - self.number)


def test_events_become_times_of_the_machine_s_clock_within_the_step(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    now = iter([10.0, 10.0035])
    monkeypatch.setattr(devices.time, "perf_counter", lambda: next(now))
    clock = CudaClock(CPU)
    clock.begin()
    rows = [(name, clock.read(), clock.read()) for name in ("F", "B")]
    (_, a, b), (_, c, d) = clock.seconds(rows)
    assert [a, b, c, d] == pytest.approx([10.001, 10.002, 10.003, 10.0035])
    assert d == 10.0035  # never after the step


@absent
def test_a_gpu_that_is_not_there_is_refused_in_one_sentence(monkeypatch):
    with pytest.raises(
        InputError, match=r"^the device 'cuda' was asked for, but torch .* finds no GPU"
    ) as found:
        train(tiny.chain, tiny.batches, steps=1, device="cuda")
    assert "\n" not in str(found.value)
    with pytest.raises(InputError, match="finds no GPU"):
        take_device("cuda", 0)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(InputError, match="finds no GPU"), worlds.launched(print, "cuda"):
        pass


@absent
def test_a_rank_that_finds_no_gpu_ends_the_run_with_the_status_of_bad_input():
    with pytest.raises(Error, match=r"^the device 'cuda' was asked for") as found:
        launch(device_rank, 2, device="cuda")
    assert found.value.exit_status == InputError.exit_status


def test_an_unknown_device_is_named():
    with pytest.raises(InputError, match="'tpu' is not known; give one of cpu, cuda"):
        take_device("tpu", 0)


def test_on_the_cpu_a_micro_batch_stays_as_it_is():
    batch = {"inputs": torch.ones(2)}
    assert on_device(batch, take_device("cpu", 3)) is batch


class Store(dict):
    set = dict.__setitem__


@pytest.mark.parametrize(("held", "name"), [("ab", "cpu:gloo,cuda:nccl"), ("aa", "gloo")])
def test_ranks_with_a_gpu_each_are_joined_by_nccl_and_no_others(held, name, monkeypatch):
    store = Store({f"gpu/{rank}": uuid for rank, uuid in enumerate(held)})
    own = type("Properties", (), {"uuid": held[1]})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: own)
    assert devices.backend_of(torch.device("cuda", 0), store, 1, 2) == name
    assert devices.backend_of(CPU, {}, 1, 2) == "gloo"

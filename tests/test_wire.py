"""Messages between the processes of one machine: what is sent is what arrives, in its order."""

import random
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from adaptis.errors import RankError
from adaptis.execute import wire as wires
from adaptis.execute.launch import launch
from adaptis.execute.wire import SharedWire, TorchWire, wire_of
from adaptis.execute.world import seated


def ends(count, patience=0.0):
    """That many ends, all in this process."""
    found = [SharedWire(rank, patience) for rank in range(count)]
    addresses = [end.address for end in found]
    assert all(end.meet(addresses) for end in found)
    return found


def like(tensor):
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def open_files():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def received(end, tensor, source, tag):
    result = like(tensor)
    end.irecv(result, source, tag).wait()
    return result


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 7), (300, 700)])
def test_a_tensor_arrives_as_it_was_sent(dtype, shape):
    one, two = ends(2)
    there = (torch.randn(shape) * 3).to(dtype)
    assert one.isend(there, 1, 7).is_completed()
    assert torch.equal(received(two, there, 0, 7), there)


def test_messages_are_told_apart_by_sender_and_tag_and_keep_their_order():
    draw = random.Random(0)
    three = ends(3)
    sent = []
    for number in range(300):
        source, tag = draw.randrange(2), draw.randrange(4)
        content = torch.full((draw.choice((1, 50, 3000)),), float(number))
        three[source].isend(content, 2, tag)
        sent.append((source, tag, content))
    keys = [(source, tag) for source, tag, _ in sent]
    for source, tag in draw.sample(keys, len(keys)):
        first = next(k for k, entry in enumerate(sent) if entry[:2] == (source, tag))
        _, _, content = sent.pop(first)
        assert torch.equal(received(three[2], content, source, tag), content)


def test_the_sender_may_change_what_it_has_sent():
    one, two = ends(2)
    there = torch.ones(5)
    one.isend(there, 1, 0).wait()
    there.zero_()
    assert torch.equal(received(two, there, 0, 0), torch.ones(5))


def test_a_result_of_a_collective_is_waited_for():
    one, two = ends(2)
    there = torch.arange(6.0).view(2, 3)
    one.isend(AsyncCollectiveTensor(there), 1, 0)
    assert torch.equal(received(two, there, 0, 0), there)


def test_there_are_no_more_slots_than_messages_on_their_way():
    one, two = ends(2)
    for count in (1, 3, 2, 3):
        for _ in range(20):
            for tag in range(count):
                one.isend(torch.full((2000,), float(tag)), 1, tag)
            for tag in range(count):
                assert received(two, torch.empty(2000), 0, tag)[0] == tag
    assert sum(map(len, one._slots.values())) == 3


def test_memory_grows_under_messages_that_lie_in_it():
    one, two = ends(2)
    there = [torch.full((10**k,), float(k)) for k in range(7)]
    for tag, tensor in enumerate(there):
        one.isend(tensor, 1, tag)
    assert all(torch.equal(received(two, t, 0, tag), t) for tag, t in enumerate(there))


def test_a_message_of_another_size_is_refused():
    one, two = ends(2)
    one.isend(torch.ones(3), 1, 0)
    with pytest.raises(RankError, match="12 bytes, 16 were expected"):
        received(two, torch.ones(4), 0, 0)


@pytest.mark.parametrize("patience", [0.0, 0.02, 10.0])
def test_a_rank_waits_whether_it_sleeps_or_looks(patience):
    one, two = ends(2, patience)
    there = torch.arange(4.0)

    def later():
        time.sleep(0.1)
        one.isend(there, 1, 0)

    thread = threading.Thread(target=later)
    thread.start()
    assert torch.equal(received(two, there, 0, 0), there)
    thread.join()


def test_nothing_stays_open():
    before = open_files()
    both = ends(2)
    both[0].isend(torch.ones(3), 1, 0)
    received(both[1], torch.ones(3), 0, 0)
    assert open_files() > before
    del both
    assert open_files() == before


def rank_of(seat, connection, machine):
    """Around a ring, by whatever wire there is; `machine` instead of what tells machines apart."""
    with seated(seat, connection) as world:
        if machine is not None:
            wires._machine = lambda: machine[world.rank]
        wire = wire_of(world)
        assert wire_of(world) is wire
        total = torch.tensor(0)
        for hop in range(1, world.size):
            arriving = torch.empty_like(total)
            work = wire.irecv(arriving, (world.rank - hop) % world.size, hop)
            sending = wire.isend(torch.tensor(world.rank), (world.rank + hop) % world.size, hop)
            work.wait()
            sending.wait()
            total += arriving
        return type(wire).__name__, int(total) + world.rank


def test_ranks_of_one_machine_share_memory():
    assert launch(rank_of, 3, None) == [("SharedWire", 3)] * 3


@pytest.mark.parametrize("machine", [["", "", ""], ["one", "one", "two"]])
def test_ranks_that_cannot_share_memory_use_the_network(machine):
    assert launch(rank_of, 3, machine) == [(TorchWire.__name__, 3)] * 3


def test_without_permission_there_is_no_way():
    one = SharedWire(0, 0.0)
    assert not one.meet([(1 << 22, 3, 4)])

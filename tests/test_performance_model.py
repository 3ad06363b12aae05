"""The performance model by hand: a few instructions each, the numbers derived beside them."""

from dataclasses import replace

import pytest
from random_plans import schedule_plan, uniform_profile

from adaptis.check import check
from adaptis.cluster import Cluster, Device, Link, uniform
from adaptis.costs import price
from adaptis.notation import parse_order, parse_program
from adaptis.plan import Plan, Stage
from adaptis.profile import Shared
from adaptis.simulate import simulate, simulate_plan
from adaptis.workload import Workload

TWO = (Device(), Device())


def make(stages, *orders, microbatches, **more):
    """A plan; the layers of `stages` are one each."""
    parsed = tuple(parse_order(order.split(), "") for order in orders)
    return Plan(microbatches, tuple(stages), parsed, **more)


def stage(layer, device=0, **more):
    return Stage(layer, layer + 1, device, **more)


def spans(timeline, device):
    return {str(s.compute): (s.start, s.end) for s in timeline.spans(device)}


def priced(profile, **more):
    """`profile` with other layers."""
    return replace(profile, layers=tuple(replace(layer, **more) for layer in profile.layers))


def with_ends(profile, send, receive):
    return replace(profile, overheads=replace(profile.overheads, send=send, receive=receive))


def test_without_overlap_both_ends_are_busy_with_a_transfer():
    profile = with_ends(uniform_profile(2, output_bytes=100), 0.25, 0.125)
    cluster = Cluster(TWO, Link(0.5, 100.0), overlap=False)  # a transfer takes 1.5
    timeline = simulate_plan(schedule_plan("gpipe", 2, 2), profile, cluster)
    # 0F0 to 1, send to 1.25, transfer to 2.75; 0F1 to 3.75, send to 4, transfer to 5.5.
    # 1F0 begins 1.5 + 0.125 after the start of the transfer, 1F1 that much after 4: 1F0 ended 3.875
    # 1B0 6.625 to 8.625, send to 8.875, transfer to 10.375; 1B1 to 12.375, send to 12.625.
    # 0B0 begins 1.625 after 8.875; it ends at 12.5, so 0B1 begins 1.625 after 12.625.
    assert spans(timeline, 0) == {
        "0F0": (0, 1),
        "0F1": (2.75, 3.75),
        "0B0": (10.5, 12.5),
        "0B1": (14.25, 16.25),
    }
    assert spans(timeline, 1) == {
        "1F0": (2.875, 3.875),
        "1F1": (5.625, 6.625),
        "1B0": (6.625, 8.625),
        "1B1": (10.375, 12.375),
    }


def test_a_transfer_waits_for_the_one_before_it_on_its_link():
    profile = with_ends(uniform_profile(2, output_bytes=300), 0.25, 0.5)
    cluster = Cluster(TWO, Link(0.5, 100.0))  # 3 on the link, then 0.5
    timeline = simulate_plan(schedule_plan("gpipe", 2, 2), profile, cluster)
    # 0F0 to 1, sent at 1.25, on the link to 4.25, there at 4.75, taken at 5.25.
    # 0F1 from 1.25 to 2.25, sent at 2.5, on the link from 4.25 to 7.25, there at 7.75, taken 8.25.
    assert spans(timeline, 1)["1F0"] == (5.25, 6.25)
    assert spans(timeline, 1)["1F1"] == (8.25, 9.25)
    assert timeline.bubbles()[1]["transfer"] == 2  # all of the gap: the value was written at 2.25


@pytest.mark.parametrize(("hidden", "both"), [(0.75, 2.25), (10.0, 2.0), (0.0, 3.0)])
def test_a_fused_pair_hides_seconds_but_takes_as_long_as_its_longer_part(hidden, both):
    plan = make([stage(0)], "0F0 (0F1;0B0)OVERLAP_F_B 0B1", microbatches=2)
    timeline = simulate_plan(plan, uniform_profile(1, overlapped=hidden), uniform(1))
    assert spans(timeline, 0) == {
        "0F0": (0, 1),
        "0F1": (1, 1 + both / 3),  # F and B share the time as 1 and 2
        "0B0": (1 + both / 3, pytest.approx(1 + both)),
        "0B1": (pytest.approx(1 + both), pytest.approx(3 + both)),
    }


@pytest.mark.parametrize("pair", ["(0F1;0B0)OVERLAP_F_B", "(0B0;0F1)OVERLAP_F_B"])
def test_a_fused_pair_holds_what_both_parts_hold(pair):
    plan = make([stage(0)], f"0F0 {pair} 0B1", microbatches=2)
    assert simulate_plan(plan, uniform_profile(1), uniform(1)).peak_bytes == (2,)


def test_a_heavy_pair_hides_more():
    plan = make([stage(0)], "0F0 (0F1;0B0)OVERLAP_F_B 0B1", microbatches=2)
    profile = uniform_profile(1, overlapped=0.75)
    timeline = simulate_plan(plan, profile, uniform(1), Workload((2.0, 2.0)))
    assert timeline.makespan == pytest.approx(2 * (1 + 2.25 + 2))


def test_an_activation_that_comes_back_late_delays_its_backward():
    profile = priced(uniform_profile(1), saved_bytes=100)
    plan = replace(schedule_plan("gpipe", 1, 4), stages=(stage(0, offload=True),))
    # Copies take 2 and 0.5 more. OFFLOAD 1-3, 3-5, 5-7, 7-9, in the host's memory 0.5 later.
    # RELOAD of 0 stands before 0F2, of 1 before 0F3, of 2 before 0B0, of 3 before 0B1:
    # 3.5-5.5, 5.5-7.5, 7.5-9.5, 9.5-11.5, back 0.5 later.
    slow = simulate_plan(plan, profile, Cluster((Device(),), host=Link(0.5, 50.0)))
    assert [slow.start[i] for i in (4, 5, 6, 7)] == [6, 8, 10, 12]
    assert slow.peak_bytes == (400,)  # at 3.5: three there, and the first is coming back
    # At once: at 2, 0 is back and F2 begins; at 3, 1 is back, 2 gone and F3 begins.
    fast = simulate_plan(plan, profile, uniform(1))
    assert [fast.start[i] for i in (4, 5, 6, 7)] == [4, 6, 8, 10]
    assert fast.peak_bytes == (300,)


def test_parameters_are_gathered_ahead_of_a_run_and_forgotten_after_it():
    profile = priced(uniform_profile(2), parameter_bytes=100, saved_bytes=0, saved_weight_bytes=0)
    order = "0F0 0F1 0F2 1F0 1F1 1F2 1B0 1B1 1B2 0B0 0B1 0B2"
    plan = make([stage(0), stage(1, sharded=True)], order, microbatches=3, replicas=2)
    # One round of two replicas: 0.25 + 50 / 20 = 2.75, from the end of 0F0 on, two ahead of 1F0.
    cluster = Cluster((Device(),), between_replicas=Link(0.25, 20.0))
    timeline = simulate_plan(plan, profile, cluster)
    assert spans(timeline, 0)["1F0"] == (3.75, 4.75)
    times, held = timeline.memory[0]
    assert sorted(zip(times[held == 100], held[held == 100], strict=True))[0] == (1, 100)
    assert held[times > 12.75].max() == 0  # 1B2 ends: 4.75 + 2 + 6
    # The reduction of stage 0, two rounds, begins with the end of 0B2: 12.75 + 6.
    assert timeline.step == 18.75 + 5.5


def test_a_reduction_in_the_cool_down_costs_nothing():
    profile = priced(uniform_profile(2), parameter_bytes=100)
    plan = replace(schedule_plan("1f1b", 2, 1), replicas=2)
    # Two rounds: 2 (0.25 + 50 / 100) = 1.5. Device 1: 4 to 5.5; device 0: 6 to 7.5.
    cluster = Cluster(TWO, between_replicas=Link(0.25, 100.0))
    assert simulate_plan(plan, profile, cluster).step == 7.5
    nothing = replace(profile.layers[0], parameter_bytes=0)  # the latencies remain: 6 to 6.5
    profile = replace(profile, layers=(nothing, profile.layers[1]))
    assert simulate_plan(plan, profile, cluster).step == 6.5


def test_a_reduction_between_copies_waits_for_the_last_gradient_of_each():
    profile = priced(uniform_profile(1), parameter_bytes=100)
    order = "0F0 0B0", "1F1 1F3 1B1 1B3"
    plan = make([stage(0), stage(0, 1)], order[0] + " 0F2 0B2", order[1], microbatches=4)
    # Both copies end at 6; then both ways over the link: 2 (0.5 + 100 / 100).
    assert simulate_plan(plan, profile, uniform(2, link=Link(0.5, 100.0))).step == 9


def test_what_is_gathered_does_not_wait_for_a_reduction_between_copies():
    # The reduction of stage 1, after 1B0, waits for 3B1; the gather for 3F1 comes after it.
    stages = [stage(0), stage(1, sharded=True), stage(0), stage(1, sharded=True)]
    plan = make(stages, "0F0 1F0 1B0 0B0 2F1 3F1 3B1 2B1", microbatches=2, replicas=2)
    assert simulate_plan(plan, uniform_profile(2), uniform(1)).makespan == 12


def test_the_slowest_link_may_be_one_within_a_node():
    devices = Device(), Device(), Device(node=1)
    cluster = Cluster(devices, Link(0.5), Link(0.25))
    plan = replace(schedule_plan("1f1b", 3, 1), clipped=True)
    timeline = simulate_plan(plan, uniform_profile(3), cluster)
    assert timeline.step == timeline.makespan + 2 * 0.5


def test_a_shared_parameter_in_a_sharded_stage_is_held_in_part_and_once():
    profile = priced(uniform_profile(2), parameter_bytes=100, state_bytes=400, saved_bytes=0)
    profile = replace(profile, shared=(Shared((0, 1), 100),))
    stages = [Stage(0, 2, 0, sharded=True)]
    plan = make(stages, "0F0 0B0", microbatches=1, replicas=4)
    timeline = simulate_plan(plan, profile, uniform(1))
    assert timeline.memory[0][1][0] == 100  # a quarter of the one that both layers share


HEAD = Cluster(TWO, Link(0.25, 100.0))


def head_plan(reductions, memory=False):
    profile = uniform_profile(3, output_bytes=100)
    profile = replace(profile, tokens_per_microbatch=25)  # sums of 200 bytes
    profile = priced(profile, saved_bytes=2) if memory else profile
    orders = "0F0 2S0 2T0 0B0", "1F0 2S0 2T0 1B0"
    plan = make([stage(0), stage(1, 1)], *orders, microbatches=1, head_reductions=reductions)
    return simulate_plan(plan, profile, HEAD)


def test_a_sharded_head_with_one_reduction():
    timeline = head_plan(1)
    # 1F0 begins 1 + 1.25 and ends 3.25; handed to device 0 in 0.25 + 1: 4.5. S is (F + I) / 2 = 1.
    # The sum of 200 + 100 bytes from 5.5: 2 (0.25 + 1.5) = 3.5. T is W / 2; the gradient is there.
    # 1B0 ends 11.5, and its gradient comes 1.25 later.
    assert spans(timeline, 0) == {
        "0F0": (0, 1),
        "2S0": (4.5, 5.5),
        "2T0": (9, 9.5),
        "0B0": (12.75, 14.75),
    }
    assert spans(timeline, 1)["2S0"] == (3.25, 4.25)
    assert spans(timeline, 1)["1B0"] == (9.5, 11.5)


def test_a_sharded_head_with_two_reductions():
    timeline = head_plan(2)
    # S is F / 2 and ends at 5; the sum of 200 bytes takes 2 (0.25 + 1) = 2.5: 7.5.
    # T is (I + W) / 2 = 1; the sum of 100 bytes takes 2 (0.25 + 0.5) = 1.5: 10.
    assert spans(timeline, 0) == {
        "0F0": (0, 1),
        "2S0": (4.5, 5),
        "2T0": (7.5, 8.5),
        "0B0": (13.25, 15.25),
    }
    assert spans(timeline, 1)["1B0"] == (10, 12)


@pytest.mark.parametrize("reductions", [1, 2])
def test_a_sharded_head_holds_its_input_and_its_part(reductions):
    # Device 0: 2 of F; from S to T the input of 100 and half of the head's 2; and the gradient that
    # 0B0 reads, whose receive is posted before S. Device 1: the output of 0F0 goes with 1F0.
    assert head_plan(reductions, memory=True).peak_bytes == (2 + 101 + 100, 2 + 101)


def test_the_copy_of_a_heads_input_is_held_from_the_posting_of_its_take_until_t():
    # 0F0 takes 2 and the copy, whose TAKE stands before it; S 1 and the gradient that comes for
    # 0B0. T gives back 1 and the copy, 0B0 the rest.
    held = head_plan(1, memory=True).memory[0][1]
    assert held.tolist() == [0, 102, 102, 203, 203, 203, 102, 102, 0]


def test_the_input_of_a_sharded_head_is_handed_out_as_soon_as_it_is_there():
    program = parse_program(
        "stages 0 1; microbatches 2; reductions 1\n"
        "device 0 | 0F0 0SEND_F0 0F1 0SEND_F1 2TAKE_F0 2S0 2SUM_S0 2TAKE_F1 2S1 2SUM_S1"
        " 0RECV_B0 0B0 2T0 0RECV_B1 0B1 2T1 STEP\n"
        "device 1 | 1RECV_F0 1F0 2SHARE_F0 2S0 2SUM_S0 1RECV_F1 1F1 2SHARE_F1 2S1 2SUM_S1"
        " 1B0 1SEND_B0 2T0 1B1 1SEND_B1 2T1 STEP\n"
    )
    check(program)
    plan = Plan(2, (stage(0), stage(1, 1)), ((), ()), head_reductions=1)
    costs = price(plan, uniform_profile(3, output_bytes=100), HEAD)
    timeline = simulate(program, costs, Workload((1.0, 4.0)))
    # 1F0 ends at 3.25, its output is on device 0 at 4.5, where 0F1 runs from 1 to 5.
    assert spans(timeline, 1)["1F0"] == (2.25, 3.25)
    assert spans(timeline, 0)["2S0"] == (5.0, 6.0)


def test_each_device_sums_its_part_of_a_sharded_head_over_the_replicas():
    profile = uniform_profile(3)
    head = replace(profile.layers[2], parameter_bytes=400)
    profile = replace(profile, layers=(*profile.layers[:2], head))
    orders = "0F0 2S0 0B0 2T0", "1F0 2S0 1B0 2T0"
    stages = [stage(0), stage(1, 1)]
    plan = make(stages, *orders, microbatches=1, head_reductions=1, replicas=2)
    cluster = Cluster(TWO, between_replicas=Link(0.0, 100.0))
    timeline = simulate_plan(plan, profile, cluster)
    # F 0-1, 1-2; S to 3; 1B0 to 5; 0B0 to 7, T to 7.5; two rounds of 200 / 2 bytes.
    assert timeline.makespan == 7.5
    assert timeline.step == 7.5 + 2


def test_a_pass_of_a_sharded_head_hides_nothing_in_a_fused_pair():
    orders = "0F0 2S0 (2T0;0B0)OVERLAP_F_B", "1F0 2S0 1B0 2T0"
    plan = make([stage(0), stage(1, 1)], *orders, microbatches=1, head_reductions=1)
    timeline = simulate_plan(plan, uniform_profile(3, overlapped=1.0), uniform(2))
    # F 0-1, 1-2; S to 3; 1B0 to 5; then 0.5 + 2.
    assert timeline.makespan == 7.5


def test_a_tied_embedding_is_summed_with_all_parts_of_a_sharded_head():
    plan = make([stage(0), stage(1, 1)], "0F0 2S0 2T0 0B0", "1F0 2S0 2T0 1B0", microbatches=1)
    plan = replace(plan, head_reductions=1)
    profile = replace(uniform_profile(3), shared=(Shared((0, 2), 50),))
    timeline = simulate_plan(plan, profile, HEAD)
    assert timeline.step == timeline.makespan + 2 * (0.25 + 0.5)


@pytest.mark.parametrize(
    ("recompute", "weights", "curve"),
    [
        (False, (1, 1), [0, 1, 1, 2, 2, 12, 11, 11, 0]),
        (False, (2, 1), [0, 2, 2, 3, 3, 23, 22, 22, 0]),  # gradients of the heavy slice's keys
        # The keys and values of slice 0 live on from its F; those of slice 1 nobody needs.
        (True, (1, 1), [0, 10, 10, 10, 10, 11, 11, 21, 20, 21, 21, 21, 0]),
    ],
)
def test_a_slice_holds_the_gradients_for_the_slice_before(recompute, weights, curve):
    profile = uniform_profile(1, carried_bytes=10)
    stages = [stage(0, recompute=recompute)]
    plan = make(stages, "0F0 0F1 0B1 0B0", microbatches=2, previous=(-1, 0))
    timeline = simulate_plan(plan, profile, uniform(1), Workload(weights))
    assert timeline.memory[0][1].tolist() == curve


def test_a_clipped_step_agrees_on_the_norm_first():
    plan = replace(schedule_plan("1f1b", 2, 1), clipped=True)
    timeline = simulate_plan(plan, uniform_profile(2, update=0.25), uniform(2, link=Link(0.5)))
    # 0F0 to 1, 1F0 1.5 to 2.5, 1B0 to 4.5, 0B0 5 to 7; the norm twice 0.5; the optimizer.
    assert timeline.step == 7 + 1 + 0.25


@pytest.mark.parametrize(("limit", "memory", "imbalance"), [(2, 2, 1), (3, 0, 3)])
def test_idle_time_that_one_more_activation_would_fill_is_held_back_by_memory(
    limit, memory, imbalance
):
    timeline = simulate_plan(schedule_plan("1f1b", 2, 3), uniform_profile(2), uniform(2, limit))
    # 0F0 0-1, 0F1 1-2, 1F0 1-2, 1B0 2-4: device 0 waits from 2 to 4, and 0F2 could run.
    # 0B0 4-6, 0F2 6-7, 0B1 7-9, 1B2 ends at 10: it waits from 9 to 10, and no forward is left.
    assert timeline.bubbles()[0] == {
        "warm-up": 0,
        "transfer": 0,
        "memory": memory,
        "imbalance": imbalance,
        "cool-down": 0,
    }


def test_a_moment_held_back_by_memory_is_counted_once():
    stages = [stage(0), stage(1, 1), stage(2)]
    orders = "0F0 0F1 2F0 2B0 2F1 2B1 0B0 0B1", "1F0 1B0 1F1 1B1"
    plan = make(stages, *orders, microbatches=2)
    profile = uniform_profile(3, output_bytes=2)
    cluster = Cluster((Device(), Device(memory_bytes=0.5)), Link(0.0, 1.0))
    # 0F0 0-1, there 3: 1F0 3-4; there 6: 2F0 6-7, 2B0 7-9, there 11: 1B0 11-13.
    # 0F1 1-2, on the link 3-5: 1F1 is there from 5 on but has no room; the gradient that 1B0 waits
    # for is on its way from 9 on. 1F1 13-14, on the link 15-17 behind the gradient of 1B0:
    # 2F1 17-18, 2B1 18-20, there 22: 1B1.
    bubbles = simulate_plan(plan, profile, cluster).bubbles()[1]
    assert bubbles["memory"] == 11 - 5
    assert bubbles["transfer"] == 22 - 20
    assert bubbles["imbalance"] == (5 - 4) + (20 - 14)

"""Quotas in worked numbers; a lane against a sorted list."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jchameleon.runtime.policy.lanes import Entry, Lane, least_tokens, split_tokens
from jchameleon.runtime.policy.request import Request


def entry_of(seq, cost_tokens=10):
    request = Request(request_id=f"r{seq}", prompt_tokens=1, max_tokens=1)
    entry = Entry(request, seq, chunks=1, adapter_pages=0)
    entry.cost_tokens = cost_tokens
    return entry


def lane_of(*seqs):
    lane = Lane(upper_wrs=1.0, least_tokens=0.0)
    for seq in seqs:
        lane.add(entry_of(seq))
    return lane


def drained(lane):
    seqs = []
    while len(lane):
        head = lane.head()
        seqs.append(head.seq)
        lane.remove(head)
    return seqs


def test_least_tokens_matches_worked_numbers():
    # 100 * 2 * (1/5 + 0.3)
    assert least_tokens(
        largest_tokens=100, service_s=2.0, arrivals_per_s=0.3, slo_s=5.0
    ) == pytest.approx(100.0)


def test_least_tokens_make_an_mm1_queue_answer_within_the_slo():
    largest, service_s, arrivals_per_s, slo_s = 300, 1.5, 4.0, 2.5
    tokens = least_tokens(
        largest_tokens=largest,
        service_s=service_s,
        arrivals_per_s=arrivals_per_s,
        slo_s=slo_s,
    )
    ends_per_s = (tokens / largest) / service_s
    assert 1 / (ends_per_s - arrivals_per_s) == pytest.approx(slo_s)


def test_what_is_left_is_split_in_proportion_to_the_minima():
    # 100 and 300 are asked for; of the other 400, 100 and 300 more.
    assert split_tokens(800, [100.0, 300.0]) == [200, 600]


def test_minima_above_the_total_are_scaled_down():
    assert split_tokens(120, [100.0, 300.0]) == [30, 90]


def test_a_lane_without_traffic_gets_nothing():
    assert split_tokens(90, [0.0, 10.0, 20.0]) == [0, 30, 60]


def test_lanes_without_any_traffic_share_equally():
    assert split_tokens(10, [0.0, 0.0, 0.0]) == [3, 4, 3]
    assert split_tokens(7, [0.0]) == [7]


@given(
    st.integers(0, 10**7),
    st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e9)), min_size=1, max_size=16),
)
def test_quotas_add_up_to_the_total(total, least):
    quotas = split_tokens(total, least)
    assert sum(quotas) == total
    assert min(quotas) >= 0
    if any(least):
        for quota, minimum in zip(quotas, least, strict=True):
            assert abs(quota - total * (minimum / sum(least))) <= 1 + 1e-6
            assert minimum or not quota


def test_a_lane_is_served_in_order_of_arrival():
    assert drained(lane_of(1, 4, 7)) == [1, 4, 7]


@pytest.mark.parametrize("seq", [0, 2, 5, 9])
def test_who_returns_waits_before_all_that_arrived_later(seq):
    assert drained(lane_of(1, 4, 7, seq)) == sorted([1, 4, 7, seq])


def test_behind_head_looks_at_a_few_in_order():
    lane = lane_of(*range(12))
    lane.remove(lane.behind_head(2)[1])
    assert [entry.seq for entry in lane.behind_head(4)] == [1, 3, 4, 5]
    assert [entry.seq for entry in lane_of(3).behind_head(4)] == []


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30))))
def test_a_lane_agrees_with_a_sorted_list(steps):
    lane, entries = lane_of(), {}
    for adds, number in steps:
        if adds and number not in entries:
            entries[number] = entry_of(number)
            lane.add(entries[number])
        elif not adds and entries:
            lane.remove(entries.pop(sorted(entries)[number % len(entries)]))
        waiting = sorted(entries)
        assert len(lane) == len(waiting)
        if waiting:
            assert lane.head().seq == waiting[0]
        assert [entry.seq for entry in lane.behind_head(3)] == waiting[1:4]


def test_charges_come_back():
    lane = lane_of()
    lane.quota_tokens = 25
    small, large = entry_of(1, 10), entry_of(2, 20)
    lane.charge(small)
    lane.charge(large)
    assert (lane.used_tokens, lane.left_tokens, lane.running) == (30, -5, 2)
    lane.refund(large)
    lane.refund(small)
    assert (lane.used_tokens, lane.left_tokens, lane.running) == (0, 25, 0)


def test_links_between_passer_and_passed_are_cut_from_both_sides():
    head, first, second = entry_of(1), entry_of(2), entry_of(3)
    for passer in (first, second):
        passer.passed = head
        head.passers[passer.seq] = passer
    first.unlink()
    assert (first.passed, list(head.passers)) == (None, [3])
    head.unlink()
    assert (second.passed, head.passers) == (None, {})

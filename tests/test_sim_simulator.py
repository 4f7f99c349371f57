"""The virtual clock against computations by hand, and what no run may break."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_world import COST, LINK, adapters_of, drawn, simulator_of

from jchameleon.errors import ConfigError, SimulationError
from jchameleon.runtime.policy.log import PlanLogWriter
from jchameleon.runtime.policy.presets import load_policy, policy_preset_names
from jchameleon.runtime.policy.replay import replay
from jchameleon.sim.linear import LinearCost
from jchameleon.sim.link import LinkConfig

# Every prompt step takes 1 s, every decode step 0.5 s, a page 1 s on the link.
EASY = LinearCost(prefill_s=1.0, decode_s=0.5)
SLOW_LINK = LinkConfig(bytes_per_s=1000, latency_s=0.5)


def times_of(result):
    samples = result.samples
    return samples.ttft_s.tolist(), samples.e2e_s.tolist()


def gaps_of(result):
    return np.repeat(*result.samples.gaps).tolist()


def test_times_are_those_computed_by_hand():
    simulator, _ = simulator_of(
        adapters_of(a=8), cost=EASY, link=SLOW_LINK, max_running=2
    )
    requests = [
        drawn(0.0, "a", 32, 3),  # its 2 pages arrive at 2.5
        drawn(0.1, None, 16, 2),  # prompt until 1.1, decode until 1.6: ends
        drawn(2.0, "a", 16, 1),  # waits for the copy; both prompts until 3.5: ends
    ]
    result = simulator.run(requests, max_tokens=8)
    ttft_s, e2e_s = times_of(result)
    # By the order of their ends; the first has decoded until 4.0 and 4.5.
    assert ttft_s == pytest.approx([1.0, 1.5, 3.5])
    assert e2e_s == pytest.approx([1.5, 1.5, 4.5])
    assert gaps_of(result) == pytest.approx([0.5, 0.5, 0.5])
    assert (result.arrived, result.finished, result.failed) == (3, 3, 0)
    assert (result.end_s, result.steps) == (pytest.approx(4.5), 5)
    assert result.link_busy_s == pytest.approx(2.0)
    books = result.books
    assert (books.loads, books.hits, books.misses) == (1, 0, 2)


def test_copies_share_the_link_in_order_and_stall_the_engine():
    link = LinkConfig(bytes_per_s=1000, latency_s=0.5, stall=0.2)
    simulator, _ = simulator_of(adapters_of(a=8, b=16), cost=EASY, link=link)
    requests = [
        # Both copies start at 0: 2 s and 4 s on the link, 0.2 * (2.5 + 4.5) s of stall.
        drawn(0.0, "a", 16, 1),
        drawn(0.0, "b", 16, 1),
        drawn(1.0, None, 16, 1),  # found at 1.4, after the stall
    ]
    ttft_s, _ = times_of(simulator.run(requests, max_tokens=8))
    # The base model until 2.4; a arrives at 2.5, b at 2 + 4 + 0.5.
    assert ttft_s == pytest.approx([1.4, 3.5, 7.5])


def test_a_stall_lengthens_the_step_that_it_begins_with():
    link = LinkConfig(bytes_per_s=1000, latency_s=0.5, stall=0.2)
    simulator, _ = simulator_of(adapters_of(a=8), cost=EASY, link=link)
    requests = [drawn(0.0, None, 16, 1), drawn(0.0, "a", 16, 1)]
    ttft_s, _ = times_of(simulator.run(requests, max_tokens=8))
    assert ttft_s == pytest.approx([1.5, 3.5])


def test_a_prompt_in_chunks_pays_for_each_and_decodes_in_between():
    simulator, _ = simulator_of(
        cost=EASY, max_running=2, max_batch_tokens=34, num_pages=66
    )
    # 64 tokens in two chunks of 32, the second beside a decode row of the other.
    requests = [drawn(0.0, None, 32, 3), drawn(0.5, None, 64, 1)]
    result = simulator.run(requests, max_tokens=8)
    # At 1.0 the first token; 1.0-2.5 chunk and decode; 2.5-4.0 the same again.
    ttft_s, e2e_s = times_of(result)
    assert sorted(ttft_s) == pytest.approx([1.0, 3.5])
    assert sorted(e2e_s) == pytest.approx([3.5, 4.0])
    assert gaps_of(result) == pytest.approx([1.5, 1.5])


@pytest.mark.parametrize("seed", range(5))
def test_one_row_waits_as_in_lindleys_recursion(seed):
    rng = random.Random(seed)
    simulator, _ = simulator_of(max_running=1, num_pages=34)
    requests, at_s = [], 0.0
    for _ in range(200):
        at_s += rng.expovariate(1.5)
        requests.append(drawn(at_s, None, rng.randint(1, 90), rng.randint(1, 20)))
    result = simulator.run(requests, max_tokens=20)
    free_s, ttft_s, e2e_s = 0.0, [], []
    for one in requests:
        first_s = max(free_s, one.at_s) + 0.02 + 1e-3 * one.prompt_tokens
        free_s = first_s + (one.output_tokens - 1) * 0.031
        ttft_s.append(first_s - one.at_s)
        e2e_s.append(free_s - one.at_s)
    assert times_of(result) == (pytest.approx(ttft_s), pytest.approx(e2e_s))


def test_warm_cache_is_full_before_the_first_request_and_counts_nothing():
    simulator, planner = simulator_of(adapters_of(a=8, b=8, c=64), num_pages=40)
    simulator.warm_up(19)
    assert planner.books().resident_pages == 4  # c, of 16 pages, is one too many
    result = simulator.run([drawn(0.0, "b", 16, 1)], max_tokens=2)
    assert result.start_s == pytest.approx(2 * 0.002 + 0.01)
    assert (result.books.hits, result.books.loads, result.link_busy_s) == (1, 0, 0.0)
    assert result.samples.ttft_s == pytest.approx([0.036])


def test_requests_before_skip_s_leave_no_times():
    simulator, _ = simulator_of(cost=EASY)
    requests = [drawn(0.0, None, 16, 3), drawn(1.0, None, 16, 2)]
    result = simulator.run(requests, max_tokens=4, skip_s=0.5)
    assert (result.finished, result.samples.ended) == (2, 1)
    # Its prompt runs from 1.0 to 2.5, beside a decode row.
    assert result.samples.ttft_s == pytest.approx([1.5])
    assert gaps_of(result) == pytest.approx([0.5])


def test_requests_are_taken_in_as_they_come():
    """A million of them must not lie in memory."""
    asked = []

    def coming():
        for index in range(50):
            asked.append(index * 1.0)
            yield drawn(index * 1.0, None, 16, 2)

    latest = []

    def observe(now_s, events, plan):
        latest.append(asked[-1] - now_s)

    simulator, _ = simulator_of(observe=observe)
    result = simulator.run(coming(), max_tokens=4)
    assert result.finished == 50
    assert max(latest) <= 1.0
    assert not simulator._live


def test_a_request_that_never_fits_fails_and_the_rest_goes_on():
    simulator, _ = simulator_of(num_pages=12)
    requests = [drawn(0.0, None, 500, 2), drawn(0.0, None, 16, 2)]
    result = simulator.run(requests, max_tokens=4)
    assert (result.finished, result.failed, result.samples.failed) == (1, 1, 1)


def test_unknown_adapter_is_an_error():
    simulator, _ = simulator_of(adapters_of(a=8))
    with pytest.raises(ConfigError, match="names the adapter 'b'"):
        simulator.run([drawn(0.0, "b", 16, 2)], max_tokens=4)


class StartsNobody:
    """An admission policy that does not do its work."""

    def admit(self, view):
        """Let everyone wait."""


def test_a_policy_that_starts_nobody_ends_the_run():
    policy = {"preset": "fifo-lru", "admission": {"name": f"{__name__}:StartsNobody"}}
    simulator, _ = simulator_of(policy=policy)
    with pytest.raises(SimulationError, match="1 requests are open and nothing ran"):
        simulator.run([drawn(0.0, None, 16, 2)], max_tokens=4)


WORKLOADS = st.lists(
    st.tuples(
        st.floats(0.0, 0.3),  # since the last one
        st.sampled_from([None, "a", "b", "c", "d", "e"]),
        st.integers(1, 120),
        st.integers(1, 40),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=60)
@given(
    workload=WORKLOADS,
    preset=st.sampled_from(policy_preset_names()),
    stall=st.sampled_from([0.0, 3.0]),
    warm=st.booleans(),
)
def test_every_request_ends_and_memory_never_exceeds_the_pool(
    workload, preset, stall, warm
):
    adapters = adapters_of(a=8, b=8, c=16, d=32, e=64)
    held = {}  # request -> tokens
    simulator, planner = simulator_of(
        adapters,
        policy=preset,
        num_pages=36,
        link=LinkConfig(bytes_per_s=1e5, latency_s=0.01, stall=stall),
        observe=lambda now_s, events, plan: note(now_s, events, plan),
    )
    times = []

    def note(now_s, events, plan):
        planner.check()
        times.append(now_s)
        for event in events:
            for request_id, tokens in getattr(event, "produced", ()):
                held[request_id] = held.get(request_id, 0) + tokens

    if warm:
        simulator.warm_up(16)
    requests, at_s = [], 0.0
    for gap_s, adapter, prompt_tokens, output_tokens in workload:
        at_s += gap_s
        requests.append(drawn(at_s, adapter, prompt_tokens, output_tokens))
    result = simulator.run(requests, max_tokens=40)
    assert result.arrived == result.finished == len(requests)
    assert [held[str(i)] for i in range(len(requests))] == [
        one.output_tokens for one in requests
    ]
    assert times == sorted(times)
    books = planner.books()
    assert (books.waiting, books.running, books.kv_pages) == (0, 0, 0)
    # No token comes sooner than its prompt and its decode steps take.
    least_s = [0.02 + 0.031 * (one.output_tokens - 1) for one in requests]
    assert sorted(result.samples.e2e_s) >= sorted(least_s)
    gaps_s = gaps_of(result)
    assert len(gaps_s) == sum(one.output_tokens - 1 for one in requests)
    # From the first token to the last, however often a request was squashed.
    between_s = result.samples.e2e_s - result.samples.ttft_s
    assert sum(gaps_s) == pytest.approx(between_s.sum())


def test_a_squashed_request_has_one_long_gap():
    # Outputs of one token teach the predictor to expect one, and then two of 40 grow
    # until the 14 pages hold only one of them.
    simulator, _ = simulator_of(policy="chameleon-nosched", num_pages=16)
    requests = [drawn(0.1 * i, None, 16, 1) for i in range(10)]
    requests += [drawn(2.0, None, 100, 40), drawn(2.0, None, 100, 40)]
    result = simulator.run(requests, max_tokens=60)
    assert result.books.squashes == 1
    times = result.samples.e2e_s - result.samples.ttft_s
    gaps_s = sorted(gaps_of(result))
    assert len(gaps_s) == 2 * 39
    assert sum(gaps_s) == pytest.approx(times.sum())
    # It waits for the other to end; its prompt and output run again.
    assert gaps_s[-1] > 10 * gaps_s[-3]


def test_a_run_that_is_logged_replays(tmp_path):
    """The plans are the planner's own: a log of its events gives them again."""
    path = tmp_path / "plans.gz"
    policy = load_policy("chameleon")
    simulator, planner = simulator_of(
        adapters_of(a=8, b=64),
        policy="chameleon",
        observe=lambda *iteration: log.append(*iteration),
    )
    log = PlanLogWriter(path, planner.config, policy)
    rng = random.Random(0)
    requests = [
        drawn(0.02 * i, rng.choice("ab"), rng.randint(1, 90), rng.randint(1, 20))
        for i in range(100)
    ]
    simulator.run(requests, max_tokens=20)
    log.close()
    report = replay(path)
    assert report.first_difference is None
    assert report.iterations > 100


def test_work_of_a_step_is_what_its_cost_is_asked_for():
    seen = []

    class Spy:
        def step_s(self, work):
            seen.append(work)
            return COST.step_s(work)

    simulator, _ = simulator_of(
        adapters_of(a=64), cost=Spy(), link=LINK, max_batch_tokens=40
    )
    simulator.run([drawn(0.0, "a", 50, 3)], max_tokens=4)
    prompts = [
        (w.prefill_tokens, w.prefill_lora_tokens, w.prefill_token_ranks)
        for w in seen
        if w.prefill_tokens
    ]
    assert prompts == [(32, 32, 32 * 64), (18, 18, 18 * 64)]
    assert [w.prefill_tile_tokens for w in seen[:2]] == [32, 32]
    # Token i attends to itself and the i before it.
    assert [w.prefill_pairs for w in seen[:2]] == [
        sum(range(1, 33)),
        sum(range(33, 51)),
    ]
    decodes = [w for w in seen if w.decode_rows]
    assert [w.decode_kv_tokens for w in decodes] == [51, 52]
    assert all((w.decode_lora_rows, w.decode_ranks) == (1, 64) for w in decodes)
    seen.clear()
    base, _ = simulator_of(cost=Spy())
    base.run([drawn(0.0, None, 50, 2)], max_tokens=4)
    assert [(w.prefill_lora_tokens, w.decode_lora_rows) for w in seen] == [(0, 0)] * 2
    assert [w.decode_rows for w in seen] == [0, 1]

"""Plans for requests: a driver plays the engine, keeping books of pages and tokens."""

import dataclasses
import heapq

import pytest
from planner_driver import CONFIG, Driver, planner_of, request_of

from jchameleon.errors import ConfigError
from jchameleon.runtime.policy.events import (
    AdapterRegistered,
    Arrival,
    Cancel,
    StepDone,
)
from jchameleon.runtime.policy.line import PriorityLine
from jchameleon.runtime.policy.plan import Plan, PrefillChunk
from jchameleon.runtime.policy.predictor import MaxTokens


def test_one_base_request_runs_from_prompt_to_last_token():
    driver = Driver(planner_of())
    driver.arrive(request_of("r", prompt_tokens=20, max_tokens=3))
    plan = driver.tick()
    assert plan == Plan(
        admitted=("r",),
        kv_pages=(("r", (2, 3)),),
        prefill=(PrefillChunk("r", 0, 20),),
    )
    assert driver.tick() == Plan(decode=("r",))
    assert driver.tick() == Plan(decode=("r",))
    assert driver.tick() == Plan()
    assert driver.outcome == {"r": "finished"}
    assert driver.planner.books().free_pages == 32


@pytest.mark.parametrize(
    ("prompt_tokens", "max_tokens", "pages"),
    [(1, 1, 1), (16, 1, 1), (16, 2, 2), (17, 1, 2), (10, 7, 1), (10, 8, 2)],
)
def test_kv_pages_cover_all_but_the_last_token(prompt_tokens, max_tokens, pages):
    driver = Driver(planner_of())
    driver.arrive(request_of("r", prompt_tokens, max_tokens))
    assert len(driver.tick().kv_pages[0][1]) == pages


def test_pages_return_in_the_plan_that_sees_the_end():
    driver = Driver(planner_of())
    driver.arrive(request_of("a", prompt_tokens=16 * 32, max_tokens=1))
    driver.arrive(request_of("b", prompt_tokens=16 * 32, max_tokens=1))
    assert driver.tick().admitted == ("a",)
    driver.cancel("a")
    plan = driver.tick()
    assert plan.admitted == ("b",)
    for _ in range(7):
        driver.tick()
    driver.arrive(request_of("c", prompt_tokens=16 * 32, max_tokens=1))
    assert driver.outcome["b"] == "finished"
    assert driver.tick().admitted == ("c",)


def test_cancel_of_unknown_waiting_and_ended_request():
    driver = Driver(planner_of(dataclasses.replace(CONFIG, max_running=1)))
    driver.cancel("never-seen")
    driver.register("a", num_pages=2)
    driver.arrive(request_of("runs"))
    driver.arrive(request_of("waits", adapter_uid="a"))
    driver.tick()
    assert driver.planner.adapter_stats("a").queued == 1
    driver.cancel("waits")
    driver.cancel("waits")
    driver.drain(20)
    driver.cancel("runs")
    assert driver.tick() == Plan()
    assert driver.planner.adapter_stats("a").queued == 0
    assert driver.outcome == {"waits": "cancelled", "runs": "finished"}
    assert driver.planner.books().free_pages == 32


def test_step_report_that_crosses_a_cancel_is_ignored():
    planner = planner_of()
    planner.plan(0.0, [Arrival(request_of("r"))])
    plan = planner.plan(0.1, [Cancel("r"), StepDone(0.1, (("r", 1),), ("r",))])
    planner.check()
    assert plan == Plan()


def test_long_prompt_never_delays_decode_rows():
    config = dataclasses.replace(CONFIG, num_pages=400)
    driver = Driver(planner_of(config))
    for i in range(5):
        driver.arrive(request_of(f"d{i}", prompt_tokens=4, max_tokens=200))
    for _ in range(3):  # two tiles, and so two prompts, a plan
        driver.tick()
    driver.arrive(request_of("long", prompt_tokens=4000, max_tokens=2))
    driver.arrive(request_of("after", prompt_tokens=4, max_tokens=2))
    chunks = []
    while driver.prefilled.get("long") != 4000:
        plan = driver.tick()
        assert plan.decode[:5] == ("d0", "d1", "d2", "d3", "d4")
        chunks += plan.prefill
    # 72 - 5 decode rows leave two tiles of 32.
    assert [chunk.length for chunk in chunks[:62]] == [64] * 62
    assert chunks[62] == PrefillChunk("long", 3968, 32)
    assert chunks[63:] == [PrefillChunk("after", 0, 4)]


def test_budget_left_by_a_short_last_chunk_goes_to_the_next_in_whole_tiles():
    config = dataclasses.replace(CONFIG, max_batch_tokens=100)
    driver = Driver(planner_of(config))
    driver.arrive(request_of("a", prompt_tokens=33, max_tokens=1))
    driver.arrive(request_of("b", prompt_tokens=40, max_tokens=1))
    # 33 tokens fill two of the three tiles; the rest of the second stays empty.
    assert driver.tick().prefill == (
        PrefillChunk("a", 0, 33),
        PrefillChunk("b", 0, 32),
    )
    assert driver.tick().prefill == (PrefillChunk("b", 32, 8),)


def test_row_is_not_decoded_beyond_its_pages_when_its_end_comes_late():
    planner = planner_of()
    planner.plan(0.0, [Arrival(request_of("r", max_tokens=3))])
    decodes = [planner.plan(0.1, []).decode for _ in range(5)]
    assert decodes == [("r",), ("r",), (), (), ()]


def test_duplicate_request_id_raises_until_the_first_ended():
    planner = planner_of(dataclasses.replace(CONFIG, max_running=1))
    planner.plan(0.0, [Arrival(request_of("runs")), Arrival(request_of("waits"))])
    for request_id in ("runs", "waits"):
        with pytest.raises(ValueError, match=f"'{request_id}' waits or runs already"):
            planner.plan(0.1, [Arrival(request_of(request_id))])
    planner.plan(0.2, [Cancel("waits"), Arrival(request_of("waits"))])
    planner.check()


def test_arrival_with_unregistered_adapter_raises():
    with pytest.raises(ValueError, match="'x' was never registered"):
        planner_of().plan(0.0, [Arrival(request_of("r", adapter_uid="x"))])


def test_request_that_can_never_fit_fails_at_arrival_and_blocks_nobody():
    planner = planner_of()
    assert planner.can_ever_fit(16 * 24, 1, 8) is None
    reason = planner.can_ever_fit(16 * 24, 2, 8)
    assert "need 25 KV pages and the adapter 8, the pool has 32" in reason
    events = [
        AdapterRegistered("a", 8, 8),
        Arrival(request_of("huge", 16 * 24, 2, "a")),
        Arrival(request_of("small")),
    ]
    plan = planner.plan(0.0, events)
    assert plan.failed == (("huge", reason, "capacity"),)
    assert plan.admitted == ("small",)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_pages", 2, "num_pages=2 must be above 2"),
        ("block_tokens", 0, "block_tokens=0 must be a positive integer"),
        ("max_running", True, "max_running=True must be a positive integer"),
        ("max_batch_tokens", 39, r"must be at least .* = 40"),
        ("max_loads_in_flight", -1, "max_loads_in_flight=-1 must be"),
        ("prefill_tile_tokens", 1.5, "prefill_tile_tokens=1.5 must be"),
    ],
)
def test_config_out_of_range_refused(field, value, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG, **{field: value})


@pytest.mark.parametrize("field", ["prompt_tokens", "max_tokens"])
def test_request_without_tokens_refused(field):
    with pytest.raises(ValueError, match=f"{field}=0 must be at least 1"):
        request_of("r", **{field: 0})


class Recorder(MaxTokens):
    """A predictor that remembers what it was told."""

    def __init__(self):
        self.seen = []

    def observe(self, request, produced_tokens):
        self.seen.append((request.request_id, produced_tokens))


def test_predictor_observes_what_finished_requests_produced():
    recorder = Recorder()
    driver = Driver(planner_of(predictor=recorder))
    driver.arrive(request_of("stops", max_tokens=9), length=4)
    driver.arrive(request_of("full", max_tokens=6))
    driver.arrive(request_of("cancelled", max_tokens=9))
    driver.tick()
    driver.cancel("cancelled")
    driver.drain(20)
    driver.tick()
    assert recorder.seen == [("stops", 4), ("full", 6)]


class ShortestFirst:
    """Shortest prediction first, from its own queue fed by arrivals and ends."""

    def __init__(self):
        self.heap = []
        self.gone = set()

    def admit(self, view):
        for request in view.arrived:
            self.gone.discard(request.request_id)
            key = (view.predicted_tokens(request), request.request_id)
            heapq.heappush(self.heap, (*key, request))
        self.gone.update(request.request_id for request in view.ended)
        while self.heap:
            request = self.heap[0][-1]
            if request.request_id in self.gone:
                heapq.heappop(self.heap)
            elif view.try_admit(request):
                heapq.heappop(self.heap)
            else:
                return


def test_own_admission_policy_orders_without_scanning_the_line():
    config = dataclasses.replace(CONFIG, max_running=1)
    driver = Driver(planner_of(config, admission=ShortestFirst()))
    for request_id, tokens in (("long", 9), ("short", 2), ("gone", 1), ("mid", 5)):
        driver.arrive(request_of(request_id, max_tokens=tokens))
    driver.cancel("gone")
    driver.drain(50)
    finished = [r for r, outcome in driver.outcome.items() if outcome == "finished"]
    assert finished == ["short", "mid", "long"]


class TwicePerTurn:
    """Look at the line twice and report what it held, admitting every other one."""

    def __init__(self):
        self.seen = []

    def admit(self, view):
        for index, request in enumerate(view.waiting):
            if index % 2 == 0:
                assert view.try_admit(request)
                with pytest.raises(ValueError, match="does not wait"):
                    view.try_admit(request)
        waiting = [request.request_id for request in view.waiting]
        running = [request.request_id for request in view.running]
        self.seen.append((waiting, running))


def test_view_shows_admissions_of_the_same_turn():
    policy = TwicePerTurn()
    driver = Driver(planner_of(admission=policy))
    for i in range(5):
        driver.arrive(request_of(f"r{i}"))
    driver.tick()
    assert policy.seen == [(["r1", "r3"], ["r0", "r2", "r4"])]


def test_work_per_plan_does_not_grow_with_the_line():
    """Count steps through the line instead of timing them: one look at the head."""
    looked = []

    class Watched(PriorityLine):
        def values(self):
            for row in super().values():
                looked.append(row.request.request_id)
                yield row

    planner = planner_of(dataclasses.replace(CONFIG, num_pages=12))
    events = [Arrival(request_of(f"r{i}", max_tokens=50)) for i in range(3_000)]
    assert planner.plan(0.0, events).admitted == ("r0", "r1")
    watched = Watched()
    for request_id in planner._waiting:
        watched.add(request_id, planner._waiting.get(request_id), 0)
    planner._waiting = watched
    planner.plan(0.1, [Cancel("r2"), Cancel("r2000")])
    assert looked == ["r3"]

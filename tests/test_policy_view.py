"""What the planner's view tells an admission policy, through the real planner."""

import dataclasses
import math

import pytest
from admission_engine import request_of as expecting
from planner_driver import CONFIG, Driver, planner_of, request_of

from jchameleon.runtime.policy.admission import Fifo
from jchameleon.runtime.policy.chameleon import Chameleon
from jchameleon.runtime.policy.predictor import Oracle
from jchameleon.runtime.policy.prefetch import NoPrefetch, Queued

PREDICTED = dataclasses.replace(CONFIG, kv_reserve="predicted")


class Asks(Fifo):
    """FIFO for requests whose id does not begin with "no"; asks what a test wants."""

    def __init__(self):
        self.ask = lambda view: None
        self.answer = None

    def admit(self, view):
        for request in view.waiting:
            if not request.request_id.startswith("no"):
                view.try_admit(request)
        self.answer = self.ask(view)


def asking_driver(config=CONFIG, **adapters):
    policy = Asks()
    driver = Driver(planner_of(config, admission=policy))
    for uid, num_pages in adapters.items():
        driver.register(uid, num_pages)
    return driver, policy


def one(requests, request_id):
    return next(r for r in requests if r.request_id == request_id)


def ask(driver, policy, question):
    """Return the answer of the next plan's view."""
    policy.ask = question
    driver.tick()
    return policy.answer


def missing(*without):
    def question(view):
        running = [one(view.running, name) for name in without]
        return view.missing_pages(one(view.waiting, "no"), running)

    return question


def test_missing_pages_counts_kv_adapter_and_who_would_stop():
    # 32 pages: two rows of 5 and their adapter of 6 leave 16.
    driver, policy = asking_driver(a=6, b=10)
    driver.arrive(request_of("r1", 60, 21, "a"))
    driver.arrive(request_of("r2", 60, 21, "a"))
    driver.tick()
    driver.tick()
    driver.arrive(request_of("no", 16 * 9, 1, "b"))  # 9 and 10
    assert ask(driver, policy, missing()) == 3
    assert ask(driver, policy, missing("r1")) == 0
    driver.cancel("no")
    driver.arrive(request_of("no", 16 * 19, 1, "b"))  # 19 and 10
    assert ask(driver, policy, missing()) == 13
    assert ask(driver, policy, missing("r1")) == 8, "r2 keeps the adapter"
    assert ask(driver, policy, missing("r1", "r2")) == 0  # 5, 5, and 6


def test_missing_pages_counts_no_adapter_that_the_request_itself_needs():
    driver, policy = asking_driver(a=20)
    driver.arrive(request_of("r", 60, 21, "a"))
    driver.tick()
    driver.tick()
    driver.arrive(request_of("no", 16 * 12, 1, "a"))
    # 32 - 20 - 5 = 7 are left; without r 12 are, for the adapter stays.
    assert ask(driver, policy, missing()) == 5
    assert ask(driver, policy, missing("r")) == 0


def test_missing_pages_counts_no_copy_that_is_under_way():
    driver, policy = asking_driver(a=20)
    driver.load_steps = lambda uid: 5
    driver.arrive(request_of("r", 60, 21, "a"))
    driver.arrive(request_of("no", 16 * 12, 1))
    assert ask(driver, policy, missing("r")) == 0
    driver.cancel("no")
    driver.arrive(request_of("no", 16 * 14, 1))
    assert ask(driver, policy, missing("r")) == 2
    for _ in range(5):
        driver.tick()
    assert ask(driver, policy, missing("r")) == 0


def test_pinned_adapter_is_never_counted_as_freed():
    driver, policy = asking_driver(a=20)
    driver.pin("a")
    driver.arrive(request_of("r", 60, 21, "a"))
    driver.tick()
    driver.tick()
    driver.arrive(request_of("no", 16 * 12, 1))
    assert ask(driver, policy, missing("r")) == 0
    driver.cancel("no")
    driver.arrive(request_of("no", 16 * 12, 1, "a"))
    assert ask(driver, policy, missing()) == 5


def waits(pages):
    return lambda view: view.wait_for_pages_s(pages)


def test_wait_for_pages_follows_predicted_ends_and_shared_adapters():
    driver, policy = asking_driver(a=4)
    for name, max_tokens in (("short", 11), ("long", 21)):
        driver.arrive(request_of(name, 20, max_tokens, "a"))
    driver.tick()  # loads
    driver.tick()  # both prompts
    step_s = driver.planner._estimator.step_s
    # 2 and 3 pages; the adapter falls idle with the later of the two.
    found = [ask(driver, policy, waits(pages)) for pages in (0, 1, 2, 3, 9, 10)]
    decode_s = step_s(prefill_tokens=0, decode_rows=2)
    left = {"short": 11 - driver.produced["short"] + 1, "long": 0}
    assert found[0] == 0.0
    # Each question is a step later than the one before.
    assert found[1] == pytest.approx((left["short"] + 4) * decode_s, rel=0.2)
    assert found[2] < found[1]
    assert found[3] > found[2] and found[4] < found[3], "the later end, a step closer"
    assert found[5] == math.inf


def test_wait_for_pages_counts_a_prompt_that_is_still_to_run():
    driver, policy = asking_driver()
    driver.arrive(request_of("r", 300, 5))
    driver.tick()
    with_prompt = ask(driver, policy, waits(1))
    while driver.prefilled["r"] < 300:
        driver.tick()
    without = ask(driver, policy, waits(1))
    estimator = driver.planner._estimator
    prefill_s = estimator.run_s(prefill_tokens=200, output_tokens=1)
    assert with_prompt > without + 0.5 * prefill_s


def test_wait_for_pages_counts_a_copy_ahead_that_nobody_waits_for():
    driver = Driver(planner_of(admission=Asks(), prefetch=Queued()))
    policy = driver.planner._admission
    driver.register("a", 8)
    driver.load_steps = lambda uid: 10
    driver.arrive(request_of("no", 20, 5, "a"))
    driver.tick()
    assert driver.loading
    found = ask(driver, policy, waits(8))
    assert found == pytest.approx(driver.planner._estimator.load_s(8))
    assert ask(driver, policy, waits(9)) == math.inf


def crowded(*, passer_uid, passer_most=60):
    """Two hogs hold 16 of 32 pages, for 48 tokens that they are charged; a head with
    an adapter of 22 pages waits, and somebody small behind it passes."""
    planner = planner_of(PREDICTED, admission=Chameleon(), predictor=Oracle())
    driver = Driver(planner)
    driver.register("big", 22, 64)
    driver.register("tiny", 2)
    driver.arrive(expecting("warm", 20, 2, "tiny"))
    driver.drain(20)
    for name in ("hog1", "hog2"):
        driver.arrive(expecting(name, 20, 4, most=400))
    for _ in range(100):
        driver.tick()
    driver.arrive(expecting("head", 20, 5, "big"))
    driver.arrive(expecting("passer", 14, 3, passer_uid, most=passer_most))
    return driver


@pytest.mark.parametrize("steps", range(1, 14))
def test_passer_is_squashed_in_any_step_also_when_it_grows_in_it(steps):
    driver = crowded(passer_uid="tiny")
    for _ in range(steps):
        driver.tick()
    assert driver.planner.books().bypasses == 1
    driver.cancel("hog1")
    for plan in [driver.tick() for _ in range(3)]:
        if ("passer", "bypass") in plan.squashed:
            assert "head" in plan.admitted, "squashed in vain"
    driver.drain(800)


def test_passer_is_not_squashed_for_pages_that_a_copy_keeps():
    driver = crowded(passer_uid="tiny")
    driver.load_steps = lambda uid: 4
    for plan in [driver.tick() for _ in range(12)]:
        assert not plan.squashed or "head" in plan.admitted
    driver.drain(2_000)


def test_prefetch_leaves_pages_to_rows_that_may_outgrow_theirs():
    def run(prefetch):
        driver = Driver(
            planner_of(
                dataclasses.replace(PREDICTED, max_running=2),
                predictor=Oracle(),
                prefetch=prefetch,
            )
        )
        for uid in ("a", "b", "c"):
            driver.register(uid, 13)
        driver.arrive(expecting("r1", 60, 5, most=120))
        driver.arrive(expecting("r2", 60, 5, most=120))
        for uid in ("a", "b", "c"):
            driver.arrive(expecting(f"waits for {uid}", 20, 5, uid))
        for _ in range(40):
            driver.tick()
        return driver

    driver = run(Queued())
    assert not driver.squashes and not run(NoPrefetch()).squashes
    assert driver.planner.books().loads >= 1, "what is idle is used"


def test_prefetch_leaves_a_place_on_the_link_to_who_is_admitted_next():
    driver = Driver(
        planner_of(
            dataclasses.replace(CONFIG, max_loads_in_flight=2), prefetch=Everything()
        )
    )
    for uid in ("a", "b", "c"):
        driver.register(uid, 2)
    driver.load_steps = lambda uid: 30
    driver.tick()
    driver.arrive(expecting("r", 20, 5, "c"))
    assert [load.uid for load in driver.tick().loads] == ["c"]


class Everything:
    """Want all adapters."""

    def candidates(self, view):
        return ["a", "b", "c"]


def test_prefetch_loads_nothing_else_while_somebody_lacks_pages():
    planner = planner_of(admission=Fifo(), prefetch=Everything())
    driver = Driver(planner)
    for uid in ("a", "b", "c"):
        driver.register(uid, 4)
    driver.arrive(expecting("r", 16 * 24, 9, most=9))  # 25 of 32 pages
    driver.arrive(expecting("head", 16 * 10, 9, "b"))
    plans = [driver.tick() for _ in range(4)]
    loads = [load.uid for plan in plans for load in plan.loads]
    assert loads == ["b"]
    driver.drain(100)


def test_prefetched_adapter_that_is_dropped_unused_is_not_loaded_again():
    class DropsAll:
        def score(self, table):
            return table.last_used_s

        def expired(self, table):
            return table.num_pages > 0

    driver = Driver(planner_of(eviction=DropsAll(), prefetch=Everything()))
    driver.register("a", 4)
    for uid in ("b", "c"):
        driver.register(uid, 40)
    for _ in range(20):
        driver.tick()
    assert driver.planner.adapter_stats("a").loads == 1
    driver.arrive(expecting("r", 20, 5, "a"))
    driver.drain(30)
    assert driver.outcome == {"r": "finished"}


def test_request_that_ends_as_it_outgrows_is_not_reported_as_outgrown():
    class Watch(Fifo):
        def admit(self, view):
            super().admit(view)
            assert all(view.produced_tokens(r) for r in view.outgrown)

    config = dataclasses.replace(PREDICTED, max_running=8)
    driver = Driver(planner_of(config, admission=Watch(), predictor=Oracle()))
    driver.arrive(expecting("r", 20, 3, most=30), length=4)
    driver.drain(20)
    assert driver.outcome == {"r": "finished"}


def test_youngest_of_several_is_squashed_not_the_next():
    config = dataclasses.replace(PREDICTED, num_pages=10)
    driver = Driver(planner_of(config, predictor=Oracle()))
    for name in ("old", "mid", "young"):
        driver.arrive(expecting(name, 30, 1, most=60))  # 2 of 8 pages each
    squashed = []
    while not squashed:
        squashed += driver.tick().squashed
    # "old" needed a fourth page first: "mid" is younger too.
    assert squashed == [("young", "growth")] and len(driver.kv["old"]) == 4
    driver.drain(400)


def test_loads_are_timed_from_when_the_link_was_free():
    space = planner_of()._space
    for uid, now_s in (("a", 1.0), ("b", 1.5)):
        space.note_load(uid, now_s)
    assert space.load_done("a", 3.0) == 1.0
    assert space.load_done("b", 7.0) == 3.0, "it waited for the first"
    space.note_load("c", 9.0)
    assert space.load_done("c", 10.0) == 9.0


@pytest.mark.parametrize("recharge", [True, False])
def test_charge_of_a_row_that_outgrows_moves_to_the_next_lane_if_asked(recharge):
    policy = Chameleon(
        recharge=recharge,
        lanes="static",
        max_lanes=2,
        first_refresh_s=0.0,
        min_samples=2,
    )
    driver = Driver(planner_of(PREDICTED, admission=policy, predictor=Oracle()))
    driver.arrive(expecting("large", 100, 50))
    driver.arrive(expecting("small", 10, 2, most=30))
    driver.tick()
    # Sizes 1 and 0.4 * 10 / 100 + 0.6 * 2 / 50; each is charged prompt and prediction.
    assert [lane.used_tokens for lane in policy.lanes()] == [12, 150]
    while driver.produced["small"] < 3:
        driver.tick()
    driver.tick()
    expected = [0, 150 + 10 + 4] if recharge else [12, 150]
    assert [lane.used_tokens for lane in policy.lanes()] == expected
    driver.drain(100)
    driver.tick()
    assert [lane.used_tokens for lane in policy.lanes()] == [0, 0]

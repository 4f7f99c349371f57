"""Predicted lengths: rows that outgrow their pages, and who makes room for them."""

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_driver import CONFIG, Driver, planner_of, request_of

from jchameleon.errors import ConfigError, PolicyError
from jchameleon.runtime.policy.limits import PlannerConfig

PREDICTED = dataclasses.replace(CONFIG, kv_reserve="predicted")


class Expect:
    """Predict the same for everyone."""

    def __init__(self, tokens):
        self.tokens = tokens

    def predict(self, request):
        return min(self.tokens, request.max_tokens)

    def observe(self, request, produced_tokens):
        pass


def pool_of(usable_pages, **changes):
    return dataclasses.replace(PREDICTED, num_pages=usable_pages + 2, **changes)


def driver_of(config, *, predicted, **policies):
    return Driver(planner_of(config, predictor=Expect(predicted), **policies))


def ticks(driver, count):
    return [driver.tick() for _ in range(count)]


@pytest.mark.parametrize(
    ("prompt_tokens", "predicted", "pages"), [(16, 1, 1), (16, 2, 2), (17, 16, 2)]
)
def test_admission_reserves_prompt_and_prediction(prompt_tokens, predicted, pages):
    driver = driver_of(PREDICTED, predicted=predicted)
    driver.arrive(request_of("r", prompt_tokens, max_tokens=200))
    (_, held) = driver.tick().kv_pages[0]
    assert len(held) == pages


def test_row_that_outgrows_takes_a_free_page_when_it_needs_one_and_no_sooner():
    driver = driver_of(PREDICTED, predicted=2)
    # Prompt and output so far fill page k when 16 k tokens have KV entries; the token
    # after that needs page k + 1.
    driver.arrive(request_of("r", 14, max_tokens=40))
    plans = ticks(driver, 40)
    grown = [index for index, plan in enumerate(plans) if plan.grown]
    # Step i runs the token at position 13 + i, so it needs ceil((14 + i) / 16) pages.
    assert grown == [3, 19, 35]
    assert all(len(plans[index].grown[0][1]) == 1 for index in grown)
    assert driver.planner.books().grown_pages == 3
    assert driver.outcome == {"r": "finished"}


def test_growth_evicts_an_idle_adapter_rather_than_squash():
    driver = driver_of(pool_of(4), predicted=1)
    driver.register("a", 2)
    driver.arrive(request_of("first", 16, max_tokens=1, adapter_uid="a"))
    driver.drain(10)
    assert "a" in driver.resident
    driver.arrive(request_of("r", 16, max_tokens=48))
    evicted = [uid for plan in ticks(driver, 60) for uid in plan.evicted]
    assert evicted == ["a"]
    assert driver.outcome["r"] == "finished" and not driver.squashes


def test_youngest_row_is_squashed_and_finishes_later_with_all_its_tokens():
    driver = driver_of(pool_of(4), predicted=1)
    for name in ("old", "mid", "young"):
        driver.arrive(request_of(name, 16, max_tokens=33))
    first = driver.tick()
    assert first.admitted == ("old", "mid", "young")
    second = driver.tick()  # each needs its second page, one is free
    assert second.squashed == (("young", "growth"),)
    assert [request_id for request_id, _ in second.grown] == ["old", "mid"]
    # It had produced one token: that token is part of what it runs again.
    driver.drain(200)
    again = [c for p in ticks(driver, 1) for c in p.prefill]
    assert not again and set(driver.outcome.values()) == {"finished"}
    assert driver.produced == {"old": 33, "mid": 33, "young": 33}
    books = driver.planner.books()
    assert books.growth_squashes == books.squashes == sum(driver.squashes.values())


def test_squashed_row_runs_prompt_and_output_again_and_waits_at_the_head():
    driver = driver_of(pool_of(3), predicted=1)
    driver.arrive(request_of("old", 16, max_tokens=18))
    driver.arrive(request_of("young", 16, max_tokens=18))
    driver.tick()
    driver.arrive(request_of("later", 16, max_tokens=1))
    plan = driver.tick()
    assert plan.grown[0][0] == "old" and not plan.squashed  # the third page
    assert plan.decode == ("old",), "young has no page, and nobody is younger"
    assert driver.planner.books().stalls == 1
    plans = ticks(driver, 16)
    squashed = [index for index, plan in enumerate(plans) if plan.squashed]
    assert len(squashed) == 1 and plans[squashed[0]].squashed == (("young", "growth"),)
    driver.drain(60)
    admitted = [name for plan in plans for name in plan.admitted]
    assert not admitted or admitted[0] == "young", "ahead of those that came later"
    assert set(driver.outcome.values()) == {"finished"}
    assert driver.produced["young"] == 18


def test_row_squashed_too_often_reserves_all_and_is_left_alone():
    config = pool_of(5, max_squashes=1)
    driver = driver_of(config, predicted=1)
    for name in ("old", "young"):
        driver.arrive(request_of(name, 16, max_tokens=50))
    while not driver.squashes:
        driver.tick()
    held = []
    while len(driver.outcome) < 2:
        plan = driver.tick()
        held += [len(pages) for name, pages in plan.kv_pages if name == "young"]
    assert held == [-(-(16 + 50 - 1) // 16)]
    assert driver.squashes == {"young": 1}


def test_nobody_is_squashed_where_squashes_are_forbidden():
    driver = driver_of(pool_of(6, max_squashes=0), predicted=1)
    for name in ("a", "b", "c"):
        driver.arrive(request_of(name, 16, max_tokens=40))
    driver.drain(200)
    assert not driver.squashes and set(driver.outcome.values()) == {"finished"}


def test_prediction_is_doubled_when_outgrown_and_shown_to_policies():
    seen = []

    class Watch:
        def admit(self, view):
            for request in view.waiting:
                view.try_admit(request)
            for request in view.outgrown:
                tokens = view.predicted_tokens(request)
                seen.append((view.produced_tokens(request), tokens))

    driver = driver_of(PREDICTED, predicted=3, admission=Watch())
    driver.arrive(request_of("r", 5, max_tokens=20))
    driver.drain(40)
    assert seen == [(4, 6), (7, 12), (13, 20)]


@pytest.mark.parametrize("answer", [0, 21, -1, 2.5])
def test_prediction_outside_its_range_names_the_policy(answer):
    class Wild:
        def predict(self, request):
            return answer

        def observe(self, request, produced_tokens):
            pass

    driver = Driver(planner_of(predictor=Wild()))
    driver.arrive(request_of("r", max_tokens=20))
    with pytest.raises(PolicyError, match=r"predictor policy .*Wild predicted"):
        driver.tick()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_reserve": "some"}, "kv_reserve='some' must be"),
        ({"max_squashes": -1}, "max_squashes=-1 must be"),
        ({"max_squashes": True}, "max_squashes=True must be"),
    ],
)
def test_limits_out_of_range_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        PlannerConfig(**{**dataclasses.asdict(CONFIG), **changes})


def random_run(seed, *, usable_pages, predicted, max_squashes):
    """Random arrivals, cancels, failures and lengths; everyone must end."""
    rng = random.Random(seed)
    config = pool_of(usable_pages, max_squashes=max_squashes)
    driver = driver_of(config, predicted=predicted)
    driver.load_steps = lambda uid: 1 + len(driver.log) % 3
    driver.fails = lambda uid: uid == "bad"
    for index, uid in enumerate(("a", "b", "bad")):
        driver.register(uid, 2 + index)
    for step in range(60):
        if rng.random() < 0.5:
            most = 16 * (usable_pages - 4) - 16
            max_tokens = rng.randint(1, min(100, most - 1))
            request = request_of(
                f"r{step}",
                rng.randint(1, most - max_tokens),
                max_tokens,
                rng.choice([None, None, "a", "b", "bad"]),
            )
            driver.arrive(request, length=rng.randint(1, request.max_tokens))
        if rng.random() < 0.05 and driver.requests:
            driver.cancel(rng.choice(sorted(driver.requests)))
        driver.tick()
    driver.drain(20_000)
    return driver


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    usable_pages=st.integers(8, 30),
    predicted=st.integers(1, 40),
    max_squashes=st.integers(0, 3),
)
def test_everyone_ends_and_books_balance_whatever_was_predicted(
    seed, usable_pages, predicted, max_squashes
):
    driver = random_run(
        seed,
        usable_pages=usable_pages,
        predicted=predicted,
        max_squashes=max_squashes,
    )
    for request_id, outcome in driver.outcome.items():
        if outcome == "finished":
            assert driver.produced[request_id] == driver.lengths[request_id]


def test_random_runs_reach_growth_squashes_and_stalls():
    drivers = [
        random_run(seed, usable_pages=10, predicted=3, max_squashes=2)
        for seed in range(8)
    ]
    books = [driver.planner.books() for driver in drivers]
    assert sum(b.grown_pages for b in books) > 20
    assert sum(b.growth_squashes for b in books) > 5
    assert sum(b.stalls for b in books) > 5

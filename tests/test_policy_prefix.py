"""The prefix cache by worked examples: what is shared, when, and what makes room."""

import dataclasses
import time

import pytest
from planner_driver import CONFIG, Driver, Text, planner_of, request_of

from jchameleon.runtime.policy.events import Arrival, Cancel, StepDone
from jchameleon.runtime.policy.eviction import Drop
from jchameleon.runtime.policy.pool import PagePool
from jchameleon.runtime.policy.prefix import PrefixCache
from jchameleon.runtime.policy.request import Request
from jchameleon.runtime.policy.rows import Row

BASE = (None, None)
BLOCK = 16


def text_of(*parts, output=4, space=BASE):
    """Return a text of (letter, tokens) parts."""
    prompt = [f"{letter}{i}" for letter, count in parts for i in range(count)]
    return Text(space, prompt, [f"out{i}" for i in range(output)])


def driver_of(**changes):
    policies = {k: changes.pop(k) for k in list(changes) if not hasattr(CONFIG, k)}
    return Driver(planner_of(dataclasses.replace(CONFIG, **changes), **policies))


def ran(driver, request_id):
    """Return (start, length) of all chunks of a request."""
    return [
        (chunk.start, chunk.length)
        for plan in driver.plans
        for chunk in plan.prefill
        if chunk.request_id == request_id
    ]


def run_one(driver, name, text, **fields):
    driver.arrive_text(name, text, **fields)
    driver.drain(100)


def test_second_request_takes_the_pages_of_its_leading_blocks_and_runs_the_rest():
    driver = driver_of()
    run_one(driver, "a", text_of(("s", 40), ("a", 10)))
    pages = driver.plans[0].kv_pages[0][1]
    driver.arrive_text("b", text_of(("s", 40), ("b", 20)))
    plan = driver.tick()
    assert plan.cached == (("b", 32),)
    ((_, taken),) = plan.kv_pages
    assert taken[:2] == pages[:2] and len(taken) == 4
    driver.drain(100)
    assert ran(driver, "b") == [(32, 28)]
    books = driver.planner.books()
    # Three blocks of a (53 of its tokens have KV entries), b has two and two of them.
    assert books.cached_pages == 3 + 1
    assert (books.prefix_hit_tokens, books.prefix_queried_tokens) == (32, 110)


@pytest.mark.parametrize(
    ("prompt_tokens", "cached"), [(31, 16), (32, 16), (33, 32), (48, 32), (49, 48)]
)
def test_last_token_of_a_prompt_always_runs(prompt_tokens, cached):
    driver = driver_of()
    run_one(driver, "a", text_of(("s", 64)))
    run_one(driver, "b", text_of(("s", prompt_tokens)))
    assert driver.cached == {"b": cached}
    assert ran(driver, "b") == [(cached, prompt_tokens - cached)]


def test_other_salt_or_adapter_shares_nothing_though_it_says_the_same():
    driver = driver_of()
    driver.register("x", 2)
    driver.register("y", 2)
    spaces = [BASE, (None, "salt"), ("x", None), ("x", "salt"), ("y", None)]
    for i, space in enumerate(spaces * 2):
        run_one(driver, f"r{i}", text_of(("s", 40), space=space))
    assert driver.cached == {f"r{i}": 32 for i in range(5, 10)}


def test_equal_keys_of_two_adapters_are_two_blocks():
    driver = driver_of()
    driver.register("x", 2)
    for name, uid in {"a": None, "b": "x", "c": None, "d": "x"}.items():
        request = request_of(name, 40, 2, adapter_uid=uid)
        driver.arrive(dataclasses.replace(request, block_keys=("one", "two")))
        driver.drain(100)
    assert driver.cached == {"c": 32, "d": 32}
    for uid in (None, "x"):
        assert driver.planner._space.prefix.keys(uid) == {"one", "two"}


def test_request_without_keys_neither_reads_the_cache_nor_fills_it():
    driver = driver_of()
    run_one(driver, "a", text_of(("s", 40)))
    driver.arrive(request_of("b", 40, 20))
    driver.drain(100)
    assert ran(driver, "b") == [(0, 40)]
    books = driver.planner.books()
    assert (books.cached_pages, books.prefix_queried_tokens) == (2, 40)


def test_block_is_found_only_when_the_step_that_fills_it_is_done():
    driver = driver_of(max_batch_tokens=40)
    driver.arrive_text("a", text_of(("s", 64)))
    driver.tick()  # runs 32 tokens of it
    driver.arrive_text("b", text_of(("s", 64), ("b", 8)))
    plan = driver.tick()  # its first two blocks are done, the others under way
    assert plan.cached == (("b", 32),)
    assert [c.request_id for c in plan.prefill] == ["a"]


def test_requests_that_begin_alike_at_once_run_it_once():
    driver = driver_of()
    for name in "abcd":
        driver.arrive_text(name, text_of(("s", 48), (name, 10)))
    driver.drain(100)
    assert ran(driver, "a") == [(0, 58)]
    for name in "bcd":
        assert ran(driver, name) == [(48, 10)]
    assert driver.cached == dict.fromkeys("bcd", 48)
    # All three blocks were swapped, so their own pages for them were given back.
    swapped = [one for plan in driver.plans for one in plan.swapped]
    shared = driver.plans[0].kv_pages[0][1][:3]
    assert swapped == [(name, 0, shared) for name in "bcd"]


def test_who_waits_for_a_block_goes_on_when_its_writer_is_gone():
    driver = driver_of(max_batch_tokens=40)
    driver.arrive_text("a", text_of(("s", 64)))
    driver.arrive_text("b", text_of(("s", 64), ("b", 8)))
    plan = driver.tick()
    assert [c.request_id for c in plan.prefill] == ["a"]
    driver.cancel("a")
    plan = driver.tick()
    # What the step had filled stays.
    assert plan.cached == (("b", 32),)
    assert [(c.request_id, c.start) for c in plan.prefill] == [("b", 32)]
    driver.drain(100)


def test_unlike_prompts_do_not_wait_for_each_other():
    driver = driver_of(max_batch_tokens=200)
    driver.arrive_text("a", text_of(("a", 40)))
    driver.arrive_text("b", text_of(("b", 40)))
    driver.arrive_text("c", text_of(("a", 8)))  # no full block: nothing to wait for
    plan = driver.tick()
    assert [c.request_id for c in plan.prefill] == ["a", "b", "c"]


def test_block_filled_twice_is_kept_once_and_the_second_page_is_given_back():
    driver = driver_of()
    # The last block of both prompts holds the last token, so both must run it.
    for name in "ab":
        driver.arrive_text(name, text_of(("s", 32), output=20))
    driver.drain(100)
    assert driver.planner.books().cached_pages == 3
    swapped = [one for plan in driver.plans for one in plan.swapped]
    # The first block by waiting, the second and the first of the output by finding
    # that another was first.
    assert [(name, block) for name, block, _ in swapped] == [
        ("b", 0),
        ("b", 1),
        ("b", 2),
    ]


def test_next_turn_of_a_chat_finds_prompt_and_answer():
    driver = driver_of()
    first = text_of(("q", 20), output=30)
    run_one(driver, "one", first)
    second = Text(BASE, [*first.tokens, "and", "then"], ["x"])
    run_one(driver, "two", second)
    assert driver.cached == {"two": 48}  # of 49 with KV entries
    assert ran(driver, "two") == [(48, 4)]


def test_squashed_row_finds_its_own_blocks_again():
    driver = driver_of(num_pages=10, kv_reserve="predicted", predictor=Short())
    driver.arrive_text("old", text_of(("a", 30), output=60))
    driver.arrive_text("young", text_of(("b", 30), output=60))
    driver.drain(200)
    assert driver.squashes == {"young": 1}
    starts = [start for start, _ in ran(driver, "young")]
    assert starts[0] == 0 and starts[-1] >= 16
    assert driver.produced == {"old": 60, "young": 60}


class Short:
    """Predicts four tokens for everyone."""

    def predict(self, request):
        return min(4, request.max_tokens)

    def observe(self, request, produced_tokens):
        pass


def test_idle_blocks_are_evicted_leaf_first_least_recently_used_first():
    driver = driver_of(num_pages=2 + 8)
    first, second = text_of(("a", 49)), text_of(("b", 49))
    run_one(driver, "a", first)
    run_one(driver, "b", second)
    run_one(driver, "a2", first)
    prefix = driver.planner._space.prefix
    assert driver.planner.books().cached_pages == 6
    # Five pages, of which two are free: three blocks go, b's, the last one first.
    driver.arrive(request_of("big", 70, 8))
    driver.tick()
    a = {first.key(i, BLOCK) for i in range(3)}
    assert prefix.keys(None) == a
    driver.drain(100)
    driver.arrive(request_of("bigger", 88, 8))  # six: two blocks of a go
    driver.drain(100)
    assert prefix.keys(None) == {first.key(0, BLOCK), first.key(1, BLOCK)}
    assert driver.planner.books().evicted_blocks == 4


def test_blocks_in_use_are_not_evicted_and_do_not_count_as_spare():
    driver = driver_of(num_pages=2 + 8)
    text = text_of(("a", 48), ("x", 1), output=16)  # 4 pages
    run_one(driver, "a", text)
    driver.arrive_text("user", text)
    assert driver.tick().cached == (("user", 48),)
    driver.arrive(request_of("five", 70, 8))
    assert driver.tick().admitted == ()  # four are free
    driver.arrive(request_of("four", 60, 5))
    driver.cancel("five")
    assert driver.tick().admitted == ("four",)
    assert driver.planner._space.prefix.keys(None)


def test_request_is_admitted_by_exactly_the_pages_that_it_lacks():
    # 8 pages; one runs on 4, of which 3 are cached: who begins with these needs 1 more
    # page each and gets it; who does not, does not.
    driver = driver_of(num_pages=2 + 6)
    text = text_of(("a", 48), ("x", 1), output=14)
    driver.arrive_text("a", text)
    driver.tick()
    for name in "bc":
        driver.arrive_text(name, text_of(("a", 48), (name, 1), output=14))
    assert driver.tick().admitted == ("b", "c")
    books = driver.planner.books()
    assert (books.kv_pages, books.free_pages) == (6, 0)
    driver.arrive_text("d", text_of(("a", 48), ("d", 1), output=14))
    assert driver.tick().admitted == ()


def test_blocks_of_an_adapter_that_left_the_device_serve_after_its_reload():
    driver = driver_of(eviction=Drop())
    driver.register("x", 16)
    text = text_of(("s", 40), space=("x", None))
    run_one(driver, "a", text)
    assert driver.resident == {}
    run_one(driver, "b", text)
    assert driver.cached == {"b": 32}
    assert [len(plan.loads) for plan in driver.plans].count(1) == 2


def test_blocks_never_stay_when_lack_of_pages_drives_their_adapter_out():
    # Whoever uses a block uses its adapter, so none is newer than that.
    driver = driver_of(num_pages=2 + 20)
    driver.register("x", 16)
    run_one(driver, "a", text_of(("s", 40), space=("x", None)))
    driver.arrive(request_of("b", 100, 2))
    driver.drain(100)
    assert driver.resident == {}
    assert driver.planner._space.prefix.keys("x") == frozenset()


def test_forgotten_adapter_leaves_nothing_behind_and_others_alone():
    driver = driver_of()
    driver.register("x", 2)
    mine, other = (text_of(("s", 40), space=(uid, None)) for uid in ("x", None))
    run_one(driver, "a", mine)
    run_one(driver, "b", other)
    prefix = driver.planner._space.prefix
    assert prefix.forget("x") == 2 and prefix.forget("x") == 0
    driver.planner.check()
    assert driver.planner.books().cached_pages == 2
    run_one(driver, "c", mine)
    run_one(driver, "d", other)
    assert driver.cached == {"d": 32}


def test_forget_while_a_request_holds_blocks_frees_them_at_its_end():
    driver = driver_of()
    text = text_of(("s", 40), output=40)
    run_one(driver, "a", text)
    driver.arrive_text("b", text)
    driver.tick()
    driver.planner._space.prefix.forget(None)
    driver.planner.check()
    driver.arrive_text("c", text)
    driver.drain(100)
    assert driver.cached == {"b": 32}
    driver.planner.check()
    # c alone has filled blocks since; b's, on forgotten ones, were not taken in.
    assert driver.planner.books().cached_pages == 4
    run_one(driver, "d", text)
    assert driver.cached == {"b": 32, "d": 32}


def test_logits_that_are_not_finite_drop_what_their_adapter_has_cached():
    driver = driver_of()
    driver.register("x", 2)
    texts = {uid: text_of(("s", 40), space=(uid, None)) for uid in ("x", None)}
    for uid, text in texts.items():
        run_one(driver, f"first-{uid}", text)
    driver.spoils = lambda request_id: request_id == "bad"
    run_one(driver, "bad", texts["x"])
    prefix = driver.planner._space.prefix
    assert prefix.keys("x") == frozenset() and len(prefix.keys(None)) == 2
    for uid, text in texts.items():
        run_one(driver, f"last-{uid}", text)
    assert driver.cached == {"bad": 32, "last-None": 32}


def test_swap_for_a_request_that_leaves_in_the_same_plan_is_not_reported():
    driver = driver_of()
    for name in "ab":
        driver.arrive_text(name, text_of(("s", 48), (name, 4)))
    driver.tick()
    driver.cancel("b")
    plan = driver.tick()
    assert plan.swapped == plan.cached == ()


def test_keys_beyond_the_prompt_are_refused():
    request = dataclasses.replace(request_of("r", 31, 1), block_keys=("a", "b"))
    with pytest.raises(ValueError, match="request_id='r' has keys beyond its prompt"):
        planner_of().plan(0.0, [Arrival(request)])


def test_report_on_a_request_that_is_gone_changes_nothing():
    planner = planner_of()
    planner.plan(0.0, [Arrival(request_of("r"))])
    event = StepDone(0.1, (), (), (("r", "key"), ("x", "key")), ("r", "x"))
    planner.plan(0.1, [Cancel("r"), event])
    planner.check()
    assert planner.books().cached_pages == 0


def test_evicting_a_block_takes_no_longer_among_100_times_as_many():
    times = []
    for blocks in (1_000, 100_000):
        pool = PagePool(2 + blocks)
        cache = PrefixCache(pool)
        pool.reserve("all", blocks)
        for chain in range(blocks // 100):
            keys = tuple(f"{chain}-{i}" for i in range(100))
            request = Request(request_id="r", prompt_tokens=1601, max_tokens=1)
            row = Row(request, None, 0, 1, 0, keys)
            cache.add(row, pool.shelve("all", 100))
            cache.let_go(row, float(chain))
        best_s = float("inf")
        for _ in range(5):
            start_s = time.perf_counter()
            for _ in range(100):
                cache.evict()
            best_s = min(best_s, time.perf_counter() - start_s)
        times.append(best_s)
    # The table itself is larger than the processor's caches: some slack.
    assert times[1] < 10 * times[0], times
    assert times[1] / 100 < 50e-6, times

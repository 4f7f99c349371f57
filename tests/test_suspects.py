"""Who is run apart after steps that failed, and how soon the one to blame is found."""

import math

import pytest

from jchameleon.runtime.policy.plan import Plan, PrefillChunk
from jchameleon.runtime.suspects import PROBATION_STEPS, Suspects, ids_of


def decode_of(ids):
    return Plan(decode=tuple(ids))


def run_once(suspects, plan, live, fails):
    """Run a plan up to the first step that fails; return who is blamed, or None."""
    seen = []
    for step in suspects.steps(plan, live):
        seen += sorted(ids_of(step))
        if fails(ids_of(step)):
            return suspects.failed(step)
        suspects.passed(step)
    assert sorted(seen) == sorted(ids_of(plan) & set(live)), "each exactly once"
    return None


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 33, 256])
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_single_culprit_is_found_in_a_logarithm_of_failures(count, place):
    ids = [f"r{i}" for i in range(count)]
    culprit = ids[int(place * (count - 1))]
    suspects, failures, live = Suspects(), 0, dict.fromkeys(ids)
    found = None
    while found is None:
        failures += 1
        found = run_once(suspects, decode_of(ids), live, lambda step: culprit in step)
    assert found == culprit
    assert failures <= 2 + math.ceil(math.log2(count))


def test_first_of_its_group_to_run_is_not_blamed_for_one_more_failure():
    suspects = Suspects()
    suspects.failed(decode_of(["a", "b", "c"]))
    alone = Plan(prefill=(PrefillChunk("a", 0, 5),))
    assert suspects.failed(alone) is None
    assert suspects.failed(alone) == "a"


def test_first_failure_is_tried_again_in_one_step_and_newcomers_run_apart():
    suspects = Suspects()
    first = decode_of(["a", "b", "c"])
    assert list(suspects.steps(first, first.decode)) == [first]
    assert suspects.failed(first) is None
    plan = Plan(prefill=(PrefillChunk("new", 0, 5),), decode=("a", "b", "c"))
    steps = list(suspects.steps(plan, {"a", "b", "c", "new"}))
    assert [ids_of(step) for step in steps] == [{"new"}, {"a", "b", "c"}]
    assert steps[0].prefill == plan.prefill and steps[1] == first


def test_suspicion_ends_after_enough_decode_steps_and_not_while_prompts_run():
    suspects = Suspects()
    pair = decode_of(["a", "b"])
    suspects.failed(pair)
    chunk = Plan(prefill=(PrefillChunk("a", 0, 5),), decode=("b",))
    for _ in range(2 * PROBATION_STEPS):
        run_once(suspects, chunk, pair.decode, lambda step: False)
    for _ in range(PROBATION_STEPS):
        assert suspects._groups
        run_once(suspects, pair, pair.decode, lambda step: False)
    assert not suspects._groups


def test_those_that_ended_are_neither_run_nor_kept():
    suspects = Suspects()
    suspects.failed(decode_of(["a", "b"]))
    live = {"a": None, "b": None}
    for step in suspects.steps(decode_of(["a", "b", "c"]), live | {"c": None}):
        if "c" in step.decode:
            del live["b"]
    # "b" ended while the step of the others ran.
    live = {"a": None, "c": None, "b": None}
    ran = []
    for step in suspects.steps(decode_of(["a", "b", "c"]), live):
        ran += step.decode
        live.pop("b", None)
    assert ran == ["c", "a"]
    list(suspects.steps(decode_of(["c"]), {"c"}))
    assert not suspects._groups

"""Chameleon's bypass: who passes a head without room, and who is squashed for it.

Pages are reserved for max_tokens, so they are scarcer than tokens.
"""

import pytest
from admission_engine import Engine, Times, books, request_of

from jchameleon.runtime.policy.chameleon import Chameleon

ADAPTERS = {"big": (64, 12), "tiny": (8, 1), "mid": (16, 3)}


def blocked_head(run_s=5.0, resident=("tiny",), **options):
    """20 pages: hogs hold 6 and 4, tiny 1; head lacks 3 for its absent adapter."""
    policy = Chameleon(**options)
    engine = Engine(pages=20, adapters=ADAPTERS, run_s=lambda *_: run_s)
    engine.resident = list(resident)
    engine.left_s = {"hog1": 10.0, "hog2": 20.0}
    hogs = [request_of("hog1", 5, 1, most=55), request_of("hog2", 5, 1, most=35)]
    head = request_of("head", 5, 1, "big")
    assert engine.step(policy, *hogs, head) == ["hog1", "hog2"]
    return policy, engine


def passer(request_id, adapter="tiny", most=30):
    return request_of(request_id, 5, 1, adapter, most=most)


def test_a_short_request_with_a_resident_adapter_passes_a_head_without_room():
    policy, engine = blocked_head()
    assert engine.missing_pages(engine.waiting_by_id["head"]) == 3
    assert engine.step(policy, passer("r2")) == ["r2"]
    assert engine.passed == [("r2", "head")]


def test_a_small_absent_adapter_may_pass_too_and_its_load_counts():
    policy, engine = blocked_head(resident=())
    loads = []
    engine.estimator = Times(lambda prompt, output, load: loads.append(load) or 5.0)
    assert engine.step(policy, passer("r2", "mid")) == ["r2"]
    assert loads == [3]


@pytest.mark.parametrize(("run_s", "passes"), [(9.9, True), (10.0, False)])
def test_nobody_passes_who_would_still_run_when_the_head_could_start(run_s, passes):
    policy, engine = blocked_head(run_s=run_s)
    # The 3 pages are free when the first hog ends, in 10 s.
    assert engine.step(policy, passer("r2")) == (["r2"] if passes else [])


def test_nobody_passes_when_bypass_is_off():
    policy, engine = blocked_head(bypass=False)
    assert engine.step(policy, passer("r2")) == []


def test_nobody_passes_a_head_that_lacks_pages_for_its_tokens_alone():
    policy, engine = blocked_head(resident=("tiny",))
    engine.step(policy, end=["head"])
    engine.step(policy, passer("long", "tiny", most=120), passer("r2"))
    assert engine.running_ids == ["hog1", "hog2"]


def test_nobody_passes_a_head_that_lacks_tokens():
    policy, engine = blocked_head()
    engine.predicted["head2"] = 100
    engine.step(policy, end=["head"])
    head2 = request_of("head2", 1, 1, "big")
    assert engine.step(policy, head2, passer("r2")) == []


def test_nobody_passes_without_tokens_or_pages_of_its_own():
    policy, engine = blocked_head()
    engine.predicted["dear"] = 500
    assert engine.step(policy, passer("dear"), passer("wide", most=115)) == []
    # Those behind them may.
    assert engine.step(policy, passer("r2")) == ["r2"]


def test_nobody_passes_twice_after_a_squash():
    policy, engine = blocked_head()
    engine.squash_counts["r2"] = 1
    assert engine.step(policy, passer("r2")) == []


def test_a_bypass_looks_at_eight_requests_behind_the_head():
    policy, engine = blocked_head()
    wide = [passer(f"w{i}", most=115) for i in range(8)]
    assert engine.step(policy, *wide, passer("r2")) == []
    assert engine.step(policy, end=["w3"]) == ["r2"]


def test_several_pass_while_the_test_holds():
    policy, engine = blocked_head()
    engine.left_s |= {"r2": 5.0, "r3": 5.0, "r4": 5.0}
    assert engine.step(policy, *[passer(f"r{i}", most=5) for i in (2, 3, 4)]) == [
        "r2",
        "r3",
        "r4",
    ]
    # With 4, 5 and 6 pages short the first hog is still who decides.
    assert [pair[1] for pair in engine.passed] == ["head"] * 3


def test_who_passes_changes_the_wait_for_those_behind():
    policy, engine = blocked_head()
    times = {5: 5.0, 6: 15.0}
    engine.estimator = Times(lambda prompt, output, load: times[prompt])
    engine.left_s |= {"r2": 30.0, "r3": 30.0}
    long = request_of("r3", 6, 1, "tiny")
    # Without the pages of r2, which runs for long after all, 8 are short: the second
    # hog decides, in 20 s.
    assert engine.step(policy, passer("r2"), long) == ["r2", "r3"]


def test_a_head_overtaken_too_often_is_not_passed():
    policy, engine = blocked_head(max_overtaken=1)
    engine.left_s["r2"] = 5.0
    assert engine.step(policy, passer("r2", most=5), passer("r3", most=5)) == ["r2"]
    assert engine.step(policy, passer("r4", most=5)) == []
    assert engine.overtaken["head"] == 1


def test_a_request_of_another_lane_is_no_bypass():
    policy, engine = blocked_head(min_samples=4, first_refresh_s=1.0)
    engine.step(policy, passer("r2"), now_s=1.0)
    assert engine.passed == []
    assert "r2" in engine.running_ids


def test_who_passed_is_squashed_when_its_pages_let_the_head_run():
    policy, engine = blocked_head()
    engine.left_s["r2"] = 5.0
    engine.step(policy, passer("r2"), passer("after", most=120))
    # hog1 ends early. The head lacks 2 pages; r2 holds 4 and its adapter 1.
    assert engine.step(policy, end=["hog1"]) == ["head"]
    assert engine.squashed == ["r2"]
    assert books(policy) == [(2, 2, 6 + 126)]
    # It waits where it was: before all that arrived later, and passes nobody again.
    assert engine.step(policy, passer("r3", most=5)) == []
    assert engine.step(policy, end=["hog2"]) == ["r2"]


def test_nobody_is_squashed_when_it_would_not_be_enough():
    policy, engine = blocked_head()
    engine.left_s["r2"] = 5.0
    engine.step(policy, passer("r2"))
    # hog2 ends, and the head lacks 4 of the 5 pages of r2 ...
    engine.pages -= 2  # ... then 6
    assert engine.step(policy, end=["hog2"]) == []
    assert engine.squashed == []


def test_as_few_as_needed_are_squashed_the_youngest_first():
    policy, engine = blocked_head()
    engine.left_s |= {f"r{i}": 5.0 for i in range(2, 6)}
    passers = [passer(f"r{i}", most=5) for i in range(2, 6)]
    assert len(engine.step(policy, *passers)) == 4
    # 4 + 4 + 1 pages are used and 13 needed: 2 short once hog1 has ended.
    assert engine.step(policy, end=["hog1"]) == ["head"]
    assert engine.squashed == ["r5", "r4"]
    assert set(engine.running_ids) == {"hog2", "r2", "r3", "head"}


def test_who_passed_is_squashed_when_the_head_lacks_only_its_tokens():
    policy, engine = blocked_head()
    engine.predicted["r2"] = 100
    engine.left_s["r2"] = 5.0
    # 200 - 12 - 115 leaves the head, of 126, without tokens.
    engine.step(policy, passer("r2"))
    assert books(policy) == [(1, 3, 127)]
    assert engine.step(policy, end=["hog1", "hog2"]) == ["head"]
    assert engine.squashed == ["r2"]


def test_an_overdue_head_has_those_that_passed_it_squashed():
    policy, engine = blocked_head(max_overtaken=1)
    engine.left_s["r2"] = 5.0
    engine.step(policy, passer("r2"))
    assert engine.step(policy, end=["hog1"]) == ["head"]
    assert engine.squashed == ["r2"]


def test_an_engine_that_squashes_nobody_keeps_who_passed():
    policy, engine = blocked_head()
    engine.max_squashes = 0
    engine.left_s["r2"] = 5.0
    engine.step(policy, passer("r2"))
    assert engine.step(policy, end=["hog1"]) == []
    assert engine.step(policy, end=["r2"]) == ["head"]


def test_who_passed_a_head_that_is_gone_is_not_squashed_for_the_next():
    policy, engine = blocked_head()
    engine.left_s["r2"] = 5.0
    engine.step(policy, passer("r2"))
    next_head = request_of("head2", 5, 1, "big")
    assert engine.step(policy, next_head, end=["head", "hog1"]) == []
    assert engine.squashed == []

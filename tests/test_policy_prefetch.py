"""Prefetch for queued requests: order, repeats, and how far it looks."""

import types

import pytest

from jchameleon.errors import ConfigError
from jchameleon.runtime.policy.prefetch import NoPrefetch, Queued
from jchameleon.runtime.policy.request import Request


def line(*uids):
    """A view whose waiting requests name `uids`; counts those that were looked at."""
    view = types.SimpleNamespace(now_s=0.0, looked_at=0)

    def waiting():
        for number, uid in enumerate(uids):
            view.looked_at += 1
            yield Request(
                request_id=str(number), prompt_tokens=1, max_tokens=1, adapter_uid=uid
            )

    view.waiting = waiting()
    return view


def test_no_prefetch_names_nothing_and_looks_at_nothing():
    view = line("a", "b")
    assert list(NoPrefetch().candidates(view)) == []
    assert view.looked_at == 0


def test_queued_names_each_adapter_once_in_line_order():
    view = line("c", None, "a", "c", "b", "a", None)
    assert list(Queued().candidates(view)) == ["c", "a", "b"]


def test_queued_on_an_empty_line_names_nothing():
    assert list(Queued().candidates(line())) == []


@pytest.mark.parametrize(
    ("lookahead_requests", "uids", "looked_at"),
    [(1, ["a"], 1), (3, ["a", "b"], 3), (4, ["a", "b", "c"], 4), (9, list("abcd"), 5)],
)
def test_queued_looks_no_farther_than_told(lookahead_requests, uids, looked_at):
    view = line("a", None, "b", "c", "d")
    policy = Queued(lookahead_requests=lookahead_requests)
    assert list(policy.candidates(view)) == uids
    assert view.looked_at == looked_at


def test_queued_default_looks_at_64_requests():
    view = line(*(f"a{number}" for number in range(100)))
    assert len(list(Queued().candidates(view))) == view.looked_at == 64


def test_queued_looks_only_as_far_as_it_is_asked():
    view = line("a", "a", "b", "c")
    named = iter(Queued().candidates(view))
    assert view.looked_at == 0
    assert next(named) == "a" and view.looked_at == 1
    assert next(named) == "b" and view.looked_at == 3


@pytest.mark.parametrize("lookahead_requests", [0, -1, 2.0, True, "8"])
def test_queued_with_a_bad_lookahead_is_refused(lookahead_requests):
    with pytest.raises(ConfigError, match="lookahead_requests=.* positive integer"):
        Queued(lookahead_requests=lookahead_requests)

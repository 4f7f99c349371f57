"""Keys of KV blocks: equal exactly where adapter, salt and all tokens before are."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jchameleon.errors import InvalidRequestError
from jchameleon.runtime.block_keys import BlockKeys, check_cache_salt, next_key
from jchameleon.runtime.live import LiveRequest
from jchameleon.runtime.outbox import Outbox
from jchameleon.runtime.submission import Submission
from jchameleon.sampling import SamplingParams


def keys_of(tokens, uid=None, salt=None, block_tokens=4):
    prompt = np.array(tokens, np.int32)
    return BlockKeys.of(prompt, adapter_uid=uid, salt=salt, block_tokens=block_tokens)


@given(st.data())
def test_keys_are_equal_exactly_where_everything_before_is(data):
    uids = salts = st.sampled_from([None, "None", "null", "a", 'a", "b'])
    tokens = st.lists(st.integers(0, 1), min_size=4, max_size=20)
    asked = data.draw(st.lists(st.tuples(uids, salts, tokens), min_size=2, max_size=8))
    blocks = {}
    for uid, salt, prompt in asked:
        found = keys_of(prompt, uid, salt)
        assert len(found.keys) == len(prompt) // 4
        for i, key in enumerate(found.keys):
            content = (uid, salt, tuple(prompt[: 4 * i + 4]))
            blocks.setdefault(content, set()).add(key)
    assert all(len(keys) == 1 for keys in blocks.values())
    assert len({next(iter(keys)) for keys in blocks.values()}) == len(blocks)


def test_keys_do_not_depend_on_how_a_prompt_lies_in_memory():
    prompt = np.arange(64, dtype=np.int32)
    strided = np.arange(0, 192, dtype=np.int32)[::3] // 3
    for other in (strided, prompt.astype(">i4"), prompt.astype(np.int64)):
        assert keys_of(other).keys == keys_of(prompt).keys


NO_END = {"tokenizer": None, "eos_token_ids": frozenset()}


def test_keys_of_output_are_those_that_a_prompt_of_it_all_has():
    prompt, output = list(range(10)), list(range(100, 131))
    sampling = SamplingParams(max_tokens=len(output), ignore_eos=True)
    for block_tokens in (1, 2, 4, 8, 16):
        submission = Submission(
            request_id="r",
            prompt=np.array(prompt, np.int32),
            sampling=sampling,
            adapter_uid="a",
            arrival_s=0.0,
            outbox=Outbox(),
            block_keys=keys_of(prompt, "a", "s", block_tokens),
        )
        live = LiveRequest(submission, seed=(0, 0), **NO_END)
        found = list(submission.request().block_keys)
        for step, token in enumerate(output):
            found.append(live.filled_key())
            live.add(token, 0.0)
            if step % 7 == 6:
                # Squashed: all tokens run again, and the last draws another one.
                live.squash(0.0)
        found = [key for key in found if key is not None]
        # The last token is never run.
        whole = keys_of([*prompt, *output[:-1]], "a", "s", block_tokens)
        assert tuple(found) == whole.keys
        without = dataclasses.replace(submission, block_keys=None)
        assert without.request().block_keys == ()
        live = LiveRequest(without, seed=(0, 0), **NO_END)
        for token in output:
            assert live.filled_key() is None
            live.add(token, 0.0)


def test_next_key_follows_from_the_last_whether_there_is_a_block_or_not():
    tokens = np.arange(8, dtype=np.int32)
    short, long = keys_of(tokens[:3]), keys_of(tokens)
    assert short.keys == () and short.last == short.root == long.root
    assert next_key(short.last, tokens[:4]) == long.keys[0]
    assert next_key(long.keys[0], tokens[4:]) == long.last == long.keys[1]


@pytest.mark.parametrize("salt", ["", 0, b"x", "x" * 257])
def test_salt_that_is_no_short_text_is_refused(salt):
    with pytest.raises(InvalidRequestError, match="cache_salt="):
        check_cache_salt(salt)


def test_any_text_is_a_salt():
    for salt in (None, "x", "\udcff", "\0", "é" * 256):
        check_cache_salt(salt)
    salts = [None, "None", "null", "\udcff", "\0"]
    roots = [keys_of([], salt=salt).root for salt in salts]
    assert all(a != b for a, b in itertools.combinations(roots, 2))

"""The lists of the GPU's LoRA kernels against what each token must find in them."""

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jchameleon.pallas.gpu_lora_work import (
    DECODE,
    PREFILL,
    build_gpu_lora_work,
    work_sizes,
)


@st.composite
def steps(draw):
    """Return (token_adapter, chunks of each adapter, prefill, max_chunks)."""
    prefill = draw(st.booleans())
    max_chunks = draw(st.integers(1, 32))
    chunks = draw(st.lists(st.integers(1, max_chunks), min_size=1, max_size=40))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    if not prefill:
        num_tokens = draw(st.integers(1, 80))
        owner = rng.integers(-1, len(chunks), num_tokens)
        if draw(st.booleans()):
            owner = np.sort(owner)
        return owner.astype(np.int32), chunks, prefill, max_chunks
    requests = []
    for _ in range(draw(st.integers(1, 10))):
        count = int(rng.integers(1, 200))
        owner, padding = rng.integers(-1, len(chunks)), -count % 32
        requests += [np.full(count, owner), np.full(padding, rng.choice([-1, owner]))]
    return np.concatenate(requests).astype(np.int32), chunks, prefill, max_chunks


@given(steps())
def test_lists_hold_every_chunk_of_every_token_once(step):
    token_adapter, chunks, prefill, max_chunks = step
    ends = np.cumsum([0, *chunks])
    pages = [
        2 + np.arange(start * 3, end * 3, dtype=np.int32).reshape(-1, 3)
        for start, end in zip(ends, ends[1:], strict=False)
    ]
    work = build_gpu_lora_work(
        token_adapter, pages, prefill=prefill, max_chunks=max_chunks, pages_per_chunk=3
    )
    sizes = work_sizes(len(token_adapter), prefill=prefill, max_chunks=max_chunks)
    num_blocks, num_items, num_chunks = sizes
    assert work["items"].shape == (4, num_items)
    assert work["blocks"].shape == (4, num_blocks)
    assert work["pages"].shape == (num_chunks, 3)
    assert work.pop("prefill") is prefill
    assert {array.dtype for array in work.values()} == {np.dtype(np.int32)}
    cut = PREFILL if prefill else DECODE
    by_items = [[] for _ in token_adapter]
    by_blocks = [[] for _ in token_adapter]
    for row, first, end, group in work["items"].T[: work["counts"][0]].tolist():
        assert first < end <= first + cut.block_rows
        own = work["pages"][row : row + cut.group_chunks]
        assert len(own) == cut.group_chunks
        for token in range(first, end):
            # Groups of a token come in order, each to its own place of h.
            assert group == len(by_items[token])
            by_items[token].append(own.tolist())
    for row, first, end, groups in work["blocks"].T[: work["counts"][1]].tolist():
        for token in range(first, end):
            own = work["pages"][row : row + groups * cut.group_chunks]
            by_blocks[token].append(own.tolist())
    for token, adapter in enumerate(token_adapter.tolist()):
        if adapter < 0:
            assert not by_items[token] and not by_blocks[token]
            continue
        expected = pages[adapter].tolist()
        expected += [[0] * 3] * (-len(expected) % cut.group_chunks)
        assert sum(by_items[token], []) == expected
        assert by_blocks[token] == [expected]


@pytest.mark.parametrize("prefill", [False, True])
def test_most_demanding_step_fills_the_lists(prefill):
    run = 32 if prefill else 1
    token_adapter = np.repeat(np.arange(6, dtype=np.int32), run)
    pages = [np.full((5, 2), 2 + i, np.int32) for i in range(6)]
    sizes = {"max_chunks": 5, "pages_per_chunk": 2, "prefill": prefill}
    work = build_gpu_lora_work(token_adapter, pages, **sizes)
    blocks, items, _ = work_sizes(6 * run, prefill=prefill, max_chunks=5)
    assert work["counts"].tolist() == [items, blocks]


def test_lists_that_do_not_fit_are_refused():
    pages = [np.full((3, 2), 2, np.int32)]
    build_one = functools.partial(
        build_gpu_lora_work, prefill=False, max_chunks=3, pages_per_chunk=2
    )
    zero = np.zeros(4, np.int32)
    for bad, rule in [
        ({"token_adapter": zero + 1}, "token_adapter holds 1..1, which must be within"),
        ({"token_adapter": zero - 2}, "token_adapter holds -2..-2"),
        ({"max_chunks": 2}, "adapters of 3..3 chunks must have 1..max_chunks=2"),
        ({"max_chunks": 0}, "max_chunks=0 must be at least 1"),
        ({"pages_per_chunk": 3}, "chunks of .2,. pages, not pages_per_chunk=3"),
        ({"token_adapter": zero[:0]}, "num_tokens=0"),
    ]:
        given_one = {"token_adapter": zero, "adapter_pages": pages, **bad}
        with pytest.raises(ValueError, match=rule):
            build_one(**given_one)
    holes = np.where(np.arange(32) % 2, 0, -1).astype(np.int32)
    with pytest.raises(ValueError, match="16 row blocks of 16 runs exceed 1 of"):
        build_one(holes, pages, prefill=True)

"""Every line once, in an order that is bounded; ids that are there twice."""

import json

import numpy as np
import pytest
from batch_rig import plain, write_lines
from hypothesis import given
from hypothesis import strategies as st

from jchameleon.batch.index import build_index
from jchameleon.batch.order import Feed, Reorder
from jchameleon.batch.source import open_source
from jchameleon.errors import BatchError, BatchStoppedError


def index_of(path, adapters=(), max_line_bytes=1000):
    """Return an index; the file stays open for as long as it is used."""
    source = open_source(path)
    index = build_index(source.__enter__(), adapters, max_line_bytes=max_line_bytes)
    index.keep = source
    return index


def keys(index):
    return [index.line(i).key for i in range(len(index))]


# Pieces of lines: keys, blanks, junk.
LINE = st.one_of(
    st.integers(0, 60).map(lambda i: json.dumps({"custom_id": f"é{i}"}).encode()),
    st.sampled_from([b"", b"  ", b"\r", b"junk", b"\xff", b"x" * 1001, b"y" * 5000]),
    st.binary(max_size=20).filter(lambda raw: b"\n" not in raw),
)


@given(st.lists(LINE, max_size=60), st.booleans(), st.booleans())
def test_index_has_every_line_once_by_its_key(tmp_path_factory, lines, ends, bom):
    path = tmp_path_factory.mktemp("index") / "in"
    data = b"\n".join(lines) + (b"\n" if ends else b"")
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + data)
    if not bom and data.startswith(b"\xef\xbb\xbf"):
        return
    expected = []
    for number, raw in enumerate(lines, 1):
        if raw.strip() or len(raw) > 1000:
            try:
                assert len(raw) <= 1000
                expected.append(json.loads(raw)["custom_id"])
            except (AssertionError, ValueError, TypeError, KeyError):
                expected.append(f"line-{number}")
    if len(set(expected)) < len(expected):
        with pytest.raises(BatchError, match="it must be there once"):
            index_of(path)
        return
    index = index_of(path)
    assert keys(index) == expected
    assert [index.find(key) for key in expected] == list(range(len(expected)))
    assert index.find("no such") is index.find("\ud800") is None


def test_line_of_exactly_the_longest_length_is_read(tmp_path):
    line = json.dumps({"custom_id": "a", "prompt": "x"})
    for end in (b"\n", b""):
        path = tmp_path / "in"
        path.write_bytes(line.encode() + end)
        assert keys(index_of(path, max_line_bytes=len(line))) == ["a"]
        assert keys(index_of(path, max_line_bytes=len(line) - 1)) == ["line-1"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([plain("a"), "", plain("b"), plain("a")], "'a' is on lines 1 and 4"),
        ([plain(k) for k in "xabcba"], "'b' is on lines 3 and 5"),
        ([plain("line-2"), "junk"], "'line-2' is on lines 1 and 2"),
        ([plain("a"), {"custom_id": "a"}], "'a' is on lines 1 and 2"),
    ],
)
def test_id_that_is_there_twice_is_named_with_both_lines(lines, message, tmp_path):
    with pytest.raises(BatchError) as caught:
        index_of(write_lines(tmp_path / "in", lines))
    assert message in str(caught.value)


@pytest.mark.parametrize("change", [(b'"b"', b'"c"'), (b'"Hello"', b'"Help!"')])
def test_input_that_changes_under_a_run_stops_it(change, tmp_path):
    lines = [plain("a", prompt="Hi"), plain("b", prompt="Hello")]
    path = write_lines(tmp_path / "in", lines)
    index = index_of(path)
    before = path.read_bytes()
    path.write_bytes(before.replace(*change))
    assert path.read_bytes() != before
    assert index.line(0).key == "a"
    with pytest.raises(BatchStoppedError, match="line 2 of the input has changed"):
        index.line(1)


def test_adapters_have_numbers_and_unknown_names_none(tmp_path):
    names = ["two", "one", None, "other", "two"]
    lines = [plain(str(i), adapter_id=name) for i, name in enumerate(names)]
    index = index_of(write_lines(tmp_path / "in", lines), ["one", "two"])
    assert index.adapters.tolist() == [1, 0, -1, -1, 1]


def test_index_takes_less_than_64_bytes_a_line(tmp_path):
    count = 5000
    path = write_lines(tmp_path / "in", [plain(f"id {i}") for i in range(count)])
    index = index_of(path)
    arrays = [v for v in vars(index).values() if isinstance(v, np.ndarray)]
    assert len(arrays) == 9
    assert sum(array.nbytes for array in arrays) < 64 * count


SEEN = st.lists(
    st.tuples(st.integers(-1, 4), st.booleans()), max_size=80
)  # adapter, done


@given(SEEN, st.integers(1, 30))
def test_feed_hands_out_every_line_once_within_its_window(lines, window_lines):
    adapters = np.array([adapter for adapter, _ in lines], np.int32)
    done = np.array([is_done for _, is_done in lines], bool)
    feed = Feed(adapters, done, window_lines=window_lines)
    order = list(iter(feed.take, None))
    todo = np.flatnonzero(~done).tolist()
    assert sorted(order) == todo
    place = {position: i for i, position in enumerate(todo)}
    for turn, position in enumerate(order):
        assert abs(place[position] - turn) < window_lines
        assert place[position] // window_lines == turn // window_lines
    if window_lines == 1:
        assert order == todo
    for start in range(0, len(order), window_lines):
        names = [int(adapters[i]) for i in order[start : start + window_lines]]
        changes = sum(a != b for a, b in zip(names, names[1:], strict=False))
        assert changes == len(set(names)) - 1, "an adapter comes twice in a window"


def test_feed_begins_a_window_with_the_adapter_of_the_last(tmp_path):
    adapters = np.array([0, 1, 0, 1, 2, 1, 0, 2], np.int32)
    feed = Feed(adapters, np.zeros(8, bool), window_lines=4)
    assert list(iter(feed.take, None)) == [0, 2, 1, 3, 5, 4, 7, 6]


@given(SEEN, st.integers(1, 30), st.integers(1, 10), st.integers(1, 8), st.data())
def test_ordered_rows_come_in_order_and_few_are_held(
    lines, window_lines, max_rows, most_open, data
):
    """The runner's rule by hand: while the buffer is full only the head may begin."""
    adapters = np.array([adapter for adapter, _ in lines], np.int32)
    done = np.array([is_done for _, is_done in lines], bool)
    feed = Feed(adapters, done, window_lines=window_lines)
    reorder = Reorder(done, max_rows=max_rows, max_bytes=10**9)
    running, written = [], []
    while True:
        while len(running) < most_open:
            if reorder.is_full:
                taken = feed.take_this(reorder.head)
                position = reorder.head if taken else None
            else:
                position = feed.take()
            if position is None:
                break
            running.append(position)
        if not running:
            break
        ended = running.pop(data.draw(st.integers(0, len(running) - 1)))
        written += reorder.add(ended, b"%d" % ended)
        assert len(reorder) < max_rows + most_open
        assert reorder.held_bytes == sum(map(len, reorder._held.values()))
    todo = np.flatnonzero(~done).tolist()
    assert written == [(position, b"%d" % position) for position in todo]
    assert len(reorder) == reorder.held_bytes == 0


def test_held_bytes_fill_the_buffer_too():
    reorder = Reorder(np.zeros(4, bool), max_rows=100, max_bytes=10)
    assert not list(reorder.add(2, b"x" * 9)) and not reorder.is_full
    assert not list(reorder.add(3, b"x")) and reorder.is_full
    assert [p for p, _ in reorder.add(0, b"x")] == [0] and reorder.head == 1

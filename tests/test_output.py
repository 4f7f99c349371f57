"""Tokens to text: streamed text is final, and stop strings are found as in plain text.

The reference here is a search in the whole decoded text, which knows no tokens.
"""

import codecs
import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jchameleon.errors import InvalidRequestError
from jchameleon.models.tokenizer import byte_tokenizer
from jchameleon.runtime.output import OutputText


class ByteStream:
    """Strict UTF-8 with replacement characters, by Python's own decoder."""

    def __init__(self, pieces):
        self.pieces = pieces
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id):
        return self.decoder.decode(self.pieces[token_id])

    def flush(self):
        return self.decoder.decode(b"", final=True)


class PieceTokenizer:
    """A tokenizer whose token i is the byte string `pieces[i]`."""

    def __init__(self, pieces):
        self.pieces = pieces

    def stream(self):
        return ByteStream(self.pieces)


def searched(text, stops):
    """Return `text` before the stop string that ends first, or None without one.

    Of several that end at the same character, the longest counts.
    """
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - max(map(len, hits))]
    return None


def cut(data, places):
    """Cut bytes at the given places."""
    edges = sorted({0, len(data), *(p for p in places if p < len(data))})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def run(tokenizer, token_ids, stops, *, takes):
    """Feed tokens; return the final text, what was streamed, and the stop's token.

    takes: whether to call take() after token i is takes[i % len(takes)].
    """
    output = OutputText(tokenizer, tuple(stops))
    streamed = []
    stopped_at = None
    for index, token_id in enumerate(token_ids):
        hit = output.push(token_id)
        if hit and stopped_at is None:
            stopped_at = index
        assert output.stopped == hit == (stopped_at is not None)
        if takes[index % len(takes)]:
            streamed.append(output.take())
            assert output.text.startswith("".join(streamed))
    streamed.append(output.close())
    return output.text, "".join(streamed), stopped_at


# Few letters, so that stop strings overlap with themselves and each other; characters
# of two, three and four bytes, so that tokens end inside them.
ALPHABET = "aab\n\u00e9\u20ac\U0001f98e"
TEXTS = st.text(alphabet=ALPHABET, max_size=40)
STOPS = st.lists(st.text(alphabet=ALPHABET, min_size=1, max_size=6), max_size=4)
PLACES = st.sets(st.integers(1, 160), max_size=60)
TAKES = st.lists(st.booleans(), min_size=1, max_size=5)


@settings(max_examples=1000)
@given(text=TEXTS, stops=STOPS, places=PLACES, takes=TAKES)
@example(text="aaab", stops=["aab"], places={1, 2, 3}, takes=[True])
@example(text="abab\u20ac", stops=["ab\u20ac", "b\u20ac"], places={5}, takes=[True])
def test_text_however_cut_into_tokens_is_what_a_search_finds(
    text, stops, places, takes
):
    pieces = cut(text.encode(), places)
    tokenizer = PieceTokenizer(pieces)
    final, streamed, stopped_at = run(tokenizer, range(len(pieces)), stops, takes=takes)
    expected = searched(text, stops)
    assert final == streamed == (text if expected is None else expected)
    # The stop is seen with the very token that completes it.
    first = next(
        (
            i
            for i in range(len(pieces))
            if searched(b"".join(pieces[: i + 1]).decode(errors="ignore"), stops)
            is not None
        ),
        None,
    )
    assert stopped_at == first


@settings(max_examples=500)
@given(
    text=TEXTS,
    stops=STOPS,
    places=PLACES,
    first_token=st.integers(0, 20),
    include_stop=st.booleans(),
)
@example(text="aaaa", stops=["aa"], places={1, 2, 3}, first_token=2, include_stop=True)
def test_stop_string_counts_from_a_token_on_and_stays_if_asked(
    text, stops, places, first_token, include_stop
):
    """What a token before that one completes is plain text, however it goes on."""
    pieces = cut(text.encode(), places)
    ends = list(itertools.accumulate(map(len, pieces)))
    expected = text
    for end in range(1, len(text) + 1):
        num_bytes = len(text[:end].encode())
        token = next(i for i, total in enumerate(ends) if total >= num_bytes)
        hits = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if hits and token >= first_token:
            expected = text[: end if include_stop else end - max(hits)]
            break
    output = OutputText(PieceTokenizer(pieces), tuple(stops), include_stop=include_stop)
    streamed = ""
    for index in range(len(pieces)):
        if output.push(index, may_stop=index >= first_token):
            break
        streamed += output.take()
        assert expected.startswith(streamed)
    assert streamed + output.close() == output.text == expected


@given(data=st.binary(max_size=40), places=PLACES, takes=TAKES)
def test_arbitrary_bytes_stream_as_they_decode_at_once(data, places, takes):
    pieces = cut(data, places)
    tokenizer = PieceTokenizer(pieces)
    final, streamed, _ = run(tokenizer, range(len(pieces)), [], takes=takes)
    assert final == streamed == data.decode("utf-8", "replace")


@given(text=TEXTS, stops=STOPS, places=PLACES)
def test_take_holds_back_only_what_may_begin_a_stop_string(text, stops, places):
    pieces = cut(text.encode(), places)
    output = OutputText(PieceTokenizer(pieces), tuple(stops))
    streamed = ""
    for index in range(len(pieces)):
        if output.push(index):
            return
        streamed += output.take()
        held = output.text[len(streamed) :]
        assert held == "" or any(s.startswith(held) and s != held for s in stops)
        assert not any(
            s.startswith(output.text[-n:])
            for s in stops
            for n in range(len(held) + 1, min(len(s), len(output.text) + 1))
        )


@settings(max_examples=300)
@given(
    ids=st.lists(
        st.integers(0, 258) | st.sampled_from(b"aab\xe2\x82\xac"), max_size=60
    ),
    stops=st.lists(
        st.text(alphabet="ab\u20ac\ufffd", min_size=1, max_size=3), max_size=3
    ),
    takes=TAKES,
)
def test_random_tokens_of_a_real_tokenizer_read_as_its_decoded_text(ids, stops, takes):
    tokenizer = byte_tokenizer()
    final, streamed, _ = run(tokenizer, ids, stops, takes=takes)
    decoded = tokenizer.decode(ids)
    expected = searched(decoded, stops)
    assert final == streamed == (decoded if expected is None else expected)


@settings(max_examples=500)
@given(
    stop=st.text(alphabet="ab", min_size=4, max_size=10),
    prefix_chars=st.lists(st.integers(1, 10), max_size=12),
)
@example(stop="aabaaab", prefix_chars=[6, 5, 7])
def test_self_overlapping_stop_string_is_found_where_it_is(stop, prefix_chars):
    # Prefixes of the stop string in a row come close to it again and again.
    text = "".join(stop[:n] for n in prefix_chars)
    tokenizer = PieceTokenizer([char.encode() for char in text])
    final, streamed, _ = run(tokenizer, range(len(text)), [stop], takes=[True])
    expected = searched(text, [stop])
    assert final == streamed == (text if expected is None else expected)


def test_stop_string_that_only_the_end_completes_is_found():
    output = OutputText(PieceTokenizer([b"ab\xe2\x82"]), ("b\ufffd",))
    assert output.push(0) is False
    assert output.take() == "a"
    assert output.close() == ""
    assert output.text == "a" and output.stopped


def test_stop_string_inside_one_token_cuts_the_text_before_it():
    output = OutputText(PieceTokenizer([b"one ENDtwo"]), ("END",))
    assert output.push(0) is True
    assert output.text == "one "
    assert output.take() == "one "
    assert output.close() == ""


def test_prefix_of_a_stop_string_is_held_until_it_is_decided():
    output = OutputText(PieceTokenizer([b"x\n", b"\n", b"U", b"no"]), ("\n\nUser",))
    takes = []
    for token_id in range(4):
        assert output.push(token_id) is False
        takes.append(output.take())
    assert takes == ["x", "", "", "\n\nUno"]


def test_held_text_comes_out_at_the_end():
    output = OutputText(PieceTokenizer([b"a EN"]), ("END",))
    output.push(0)
    assert output.take() == "a "
    assert output.close() == "EN"
    assert output.text == "a EN"


def test_first_complete_stop_string_wins_over_an_earlier_beginning():
    output = OutputText(PieceTokenizer([b"abcd"]), ("abcd", "bc"))
    assert output.push(0)
    assert output.text == "a"


def test_longest_of_stop_strings_that_end_together_is_cut():
    output = OutputText(PieceTokenizer([b"x", b"a", b"b"]), ("b", "ab"))
    assert [output.push(i) for i in range(3)] == [False, False, True]
    assert output.text == "x"


def test_tokens_after_a_stop_string_are_dropped():
    output = OutputText(PieceTokenizer([b"a#", b"more"]), ("#",))
    assert output.push(0) and output.push(1)
    assert output.text == "a" and output.close() == "a"


def test_half_a_character_is_never_streamed():
    lizard = "\U0001f98e".encode()
    output = OutputText(PieceTokenizer([lizard[:1], lizard[1:3], lizard[3:]]), ())
    takes = []
    for token_id in range(3):
        output.push(token_id)
        takes.append(output.take())
    assert takes == ["", "", "\U0001f98e"]


def test_incomplete_character_at_the_end_becomes_the_replacement_character():
    output = OutputText(PieceTokenizer([b"a\xe2\x82"]), ())
    output.push(0)
    assert output.take() == "a"
    assert output.close() == "\ufffd"
    assert output.text == "a\ufffd"


def test_without_a_tokenizer_the_text_is_empty():
    output = OutputText(None, ())
    assert output.push(5) is False
    assert (output.take(), output.close(), output.text) == ("", "", "")


def test_stop_string_without_a_tokenizer_is_refused():
    with pytest.raises(InvalidRequestError, match="needs a tokenizer"):
        OutputText(None, ("x",))


def test_long_repetitive_text_costs_linear_time():
    # A search of every suffix against every stop string would take minutes.
    stops = tuple("a" * 255 + chr(ord("b") + i) for i in range(16))
    output = OutputText(PieceTokenizer([b"a" * 64]), stops)
    for _ in range(200):
        assert output.push(0) is False
        output.take()
    assert len(output.text) == 200 * 64
    assert len(output.close()) == 255

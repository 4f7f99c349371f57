"""The table of decode rows against a dictionary of single rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jchameleon.runtime.decode_rows import DecodeTable
from jchameleon.runtime.drawing import RowSampling

MAX_ROWS, MAX_BLOCKS = 4, 3


def draw_sampling(data):
    return RowSampling(
        temperature=data.draw(st.sampled_from([0.0, 0.5])),
        top_k=data.draw(st.integers(0, 9)),
        top_p=0.5,
        min_p=0.25,
        seed=(data.draw(st.integers(0, 2**32 - 1)), 7),
        position=0,
        edits=data.draw(st.sampled_from([None, "edits"])),
        logprobs=data.draw(st.sampled_from([None, 2])),
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rows_are_those_of_the_requests_that_have_places(data):
    table = DecodeTable(MAX_ROWS, MAX_BLOCKS)
    model = {}
    for step in range(data.draw(st.integers(1, 12))):
        if len(model) < MAX_ROWS and data.draw(st.booleans()):
            sampling = draw_sampling(data)
            uid = data.draw(st.sampled_from([None, "a", "b"]))
            place = table.take(sampling, adapter_uid=uid)
            assert place not in model
            assert not table.pages[place].any(), "pages of who had the place before"
            table.pages[place] = pages = [step + 1] * MAX_BLOCKS
            table.set_last(place, 10 + step, 20 + step)
            model[place] = [sampling, uid, pages, 10 + step, 20 + step]
        elif model:
            place = data.draw(st.sampled_from(sorted(model)))
            one = model[place]
            if one[0].edits is not None and data.draw(st.booleans()):
                table.drop_edits(place)
                one[0] = one[0]._replace(edits=None)
            elif data.draw(st.booleans()):
                table.set_last(place, 100 + step, one[4] + 1)
                one[3:] = [100 + step, one[4] + 1]
            else:
                table.release(place)
                del model[place]
        assert table.free_places == MAX_ROWS - len(model)
        if not model:
            continue
        places = data.draw(st.permutations(sorted(model)))
        rows = table.rows(np.array(places))
        wanted = [model[place] for place in places]
        assert rows.adapter_uids == [one[1] for one in wanted]
        assert rows.pages.tolist() == [list(one[2]) for one in wanted]
        assert rows.tokens.tolist() == [one[3] for one in wanted]
        assert rows.num_tokens.tolist() == [one[4] for one in wanted]
        fields = rows.sampling.fields
        assert fields["position"].tolist() == [one[4] for one in wanted]
        for name in ("temperature", "top_k", "top_p", "min_p"):
            assert fields[name].tolist() == [getattr(one[0], name) for one in wanted]
        assert fields["seed"].tolist() == [list(one[0].seed) for one in wanted]
        for name in ("edits", "logprobs"):
            assert getattr(rows.sampling, name) == {
                i: getattr(one[0], name)
                for i, one in enumerate(wanted)
                if getattr(one[0], name) is not None
            }
        assert not rows.sampling.silent


def test_rows_do_not_change_with_the_table():
    table = DecodeTable(MAX_ROWS, MAX_BLOCKS)
    how = RowSampling(0.0, 0, 1.0, 0.0, (1, 2), 0, None, None)
    place = table.take(how, adapter_uid="a")
    table.set_last(place, 5, 6)
    rows = table.rows(np.array([place]))
    table.set_last(place, 7, 8)
    table.pages[place] = 9
    table.release(place)
    assert rows.tokens.tolist() == [5] and rows.num_tokens.tolist() == [6]
    assert not rows.pages.any() and rows.adapter_uids == ["a"]


def test_more_requests_than_places():
    table = DecodeTable(1, 1)
    how = RowSampling(0.0, 0, 1.0, 0.0, (1, 2), 0, None, None)
    table.take(how, adapter_uid=None)
    with pytest.raises(IndexError):
        table.take(how, adapter_uid=None)

"""What a line of a batch may be, and what becomes of one that is something else."""

import json
import re
import sys
from pathlib import Path

import pytest

from jchameleon.batch.fields import OTHER_FIELDS, SAMPLING_FIELDS
from jchameleon.batch.lines import fallback_key, open_line, request_of, seed_of
from jchameleon.batch.rows import FAULT_STATUS
from jchameleon.errors import InvalidRequestError
from jchameleon.sampling import SamplingParams

DEFAULTS = SamplingParams(max_tokens=64, temperature=0.0)


def request(table, defaults=DEFAULTS, seed=0):
    line = open_line(json.dumps(table).encode(), 7)
    return request_of(line, defaults, seed)


def plain(**fields):
    return request({"custom_id": "a", "prompt": "x", **fields})


def body(url="/v1/completions", **fields):
    fields = {"model": "m", **fields}
    return request({"custom_id": "a", "url": url, "body": fields})


# Lines without a key of their own.
UNREADABLE = {
    "empty object": (b"{}", "custom_id is missing"),
    "no JSON": (b"hello", "not JSON"),
    "cut off": (b'{"custom_id": "a", "prompt": "x', "not JSON"),
    "two objects": (b'{"custom_id": "a"} {"custom_id": "b"}', "not JSON"),
    "bare return between objects": (b'{"custom_id": "a"}\r{"custom_id": "b"}', "JSON"),
    "array": (b'["a"]', "not a JSON object"),
    "text": (b'"a"', "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "NUL": (b"\0" * 20, "not JSON"),
    "bad UTF-8": (b'{"custom_id": "a", "prompt": "\xff"}', "not UTF-8 at byte 30"),
    "UTF-16": ('{"custom_id": "a"}'.encode("utf-16"), "not UTF-8 at byte 0"),
    "BOM inside": (b'\xef\xbb\xbf{"custom_id": "a"}', "BOM"),
    "NaN": (b'{"custom_id": "a", "prompt": "x", "temperature": NaN}', "has NaN"),
    "infinity": (b'{"custom_id": "a", "seed": -Infinity}', "has -Infinity"),
    "huge integer": (b'{"custom_id": "a", "seed": ' + b"9" * 5000 + b"}", "not JSON"),
    "key twice": (b'{"custom_id": "a", "prompt": "x", "prompt": "y"}', "key twice"),
    "inner key twice": (b'{"custom_id": "a", "body": {"n": 1, "n": 2}}', "key twice"),
    "nested": (b'{"custom_id": "a", "x": ' + b"[" * 64 + b"]" * 64 + b"}", "deeper"),
    "deeply nested": (b'{"custom_id": "a", "x": ' + b"[" * 99_999, "deeper than 64"),
    "id missing": (b'{"prompt": "x"}', "custom_id is missing"),
    "id null": (b'{"custom_id": null}', "custom_id is missing"),
    "id number": (b'{"custom_id": 5, "prompt": "x"}', "custom_id=5 must be a string"),
    "id list": (b'{"custom_id": ["a"]}', "custom_id=['a'] must be a string"),
    "id empty": (b'{"custom_id": ""}', "custom_id has 0 characters"),
    "id too long": (b'{"custom_id": "' + b"a" * 513 + b'"}', "has 513 characters"),
    "id half a pair": (b'{"custom_id": "\\ud83d"}', "half of a surrogate pair"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_line_without_a_usable_id_has_its_number_for_a_key(case):
    raw, message = UNREADABLE[case]
    line = open_line(raw, 12)
    assert (line.key, line.adapter) == ("line-12", None)
    with pytest.raises(InvalidRequestError, match="^[^\n]{1,300}$") as caught:
        request_of(line, DEFAULTS, 0)
    assert message in str(caught.value)


def test_key_of_a_nested_line_does_not_depend_on_the_stack():
    raw = b'{"custom_id": "a", "x": ' + b"[" * 300 + b"]" * 300 + b"}"

    def below(depth):
        return open_line(raw, 1) if depth == 0 else below(depth - 1)

    assert below(1).key == below(sys.getrecursionlimit() - 200).key == "line-1"


# Lines with a key whose content is refused.
REFUSED = {
    "prompt with half a pair": ({"prompt": "\ud83d"}, "half of a surrogate pair"),
    "no prompt": ({}, "prompt=None must be"),
    "prompt number": ({"prompt": 3}, "prompt=3 must be one string"),
    "prompt of two": ({"prompt": ["a", "b"]}, "prompt=['a', 'b'] must be one"),
    "prompt of mixed": ({"prompt": [1, "b"]}, "must be one string or one list"),
    "prompt of booleans": ({"prompt": [True, 2]}, "must be one string or one list"),
    "both prompts": ({"prompt": "a", "prompt_token_ids": [1]}, "must not both"),
    "ids text": ({"prompt_token_ids": "a"}, "prompt_token_ids='a' must be a list"),
    "ids fractions": ({"prompt_token_ids": [1.5]}, "must be a list of token ids"),
    "prompt and messages": ({"prompt": "a", "messages": []}, "must not both"),
    "messages empty": ({"messages": []}, "messages=[] must be a list"),
    "messages text": ({"messages": "hi"}, "messages='hi' must be a list"),
    "message text": ({"messages": ["hi"]}, "messages[0]='hi' must be an object"),
    "no role": ({"messages": [{"content": "x"}]}, "messages[0].role=None"),
    "content parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
        "messages[0].content=",
    ),
    "adapter number": ({"prompt": "a", "adapter_id": 3}, "adapter_id=3 must be"),
    "stream": ({"prompt": "a", "stream": True}, "stream=True is not supported"),
    "stream 0": ({"prompt": "a", "stream": 0}, "stream=0 is not supported"),
    "tools": ({"prompt": "a", "tools": [{}]}, "tools=[{}] is not supported"),
    "echo": ({"prompt": "a", "echo": True}, "echo=True is not supported"),
    "best of": ({"prompt": "a", "best_of": 3}, "best_of=3 is not supported"),
    "form": (
        {"prompt": "a", "response_format": {"type": "json_object"}},
        "response_format={'type': 'json_object'} is not supported",
    ),
    "unknown": ({"prompt": "a", "temprature": 1}, "did you mean 'temperature'"),
    "unknown null": ({"prompt": "a", "foo": None}, "unknown field 'foo'"),
    "model in the plain form": ({"prompt": "a", "model": "x"}, "unknown field 'model'"),
    "temperature": ({"prompt": "a", "temperature": -1}, "temperature=-1"),
    "infinite": ({"prompt": "a", "temperature": 1e999}, "temperature=inf"),
    "temperature text": ({"prompt": "a", "temperature": "1"}, "temperature='1'"),
    "max_tokens": ({"prompt": "a", "max_tokens": 0}, "max_tokens=0"),
    "max_tokens real": ({"prompt": "a", "max_tokens": 1.0}, "max_tokens=1.0"),
    "max_tokens true": ({"prompt": "a", "max_tokens": True}, "max_tokens=True"),
    "both limits": (
        {"prompt": "a", "max_tokens": 1, "max_completion_tokens": 1},
        "must not both be given",
    ),
    "seed": ({"prompt": "a", "seed": 2**32}, "seed=4294967296"),
    "n greedy": ({"prompt": "a", "n": 2, "temperature": 0}, "n=2 must be 1"),
    "n huge": ({"prompt": "a", "n": 10**6}, "n=1000000 must be from 1 to 64"),
    "stops": ({"prompt": "a", "stop": [3]}, "stop has 3"),
    "stop ids": ({"prompt": "a", "stop_token_ids": "12"}, "must be a list"),
    "bias": ({"prompt": "a", "logit_bias": [1]}, "must map token ids"),
    "bias key": ({"prompt": "a", "logit_bias": {"x": 1}}, "'x', no token id"),
    "bias twice": ({"prompt": "a", "logit_bias": {"5": 1, "05": 2}}, "'05', no token"),
    "bias value": ({"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias[5]=101"),
    "logprobs": ({"prompt": "a", "logprobs": 21}, "logprobs=21"),
    "logprobs true": ({"prompt": "a", "logprobs": True}, "logprobs=True"),
    "top_logprobs": ({"prompt": "a", "top_logprobs": 2}, "a field of chats"),
    "return ids": ({"prompt": "a", "return_token_ids": 1}, "must be true or false"),
    "salt": ({"prompt": "a", "cache_salt": 1}, "cache_salt=1 must be a string"),
    "user": ({"prompt": "a", "user": 1}, "user=1 must be a string"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_line_with_a_field_that_is_refused_keeps_its_key(case):
    table, message = REFUSED[case]
    raw = json.dumps({"custom_id": "a", **table}).replace("Infinity", "1e999")
    line = open_line(raw.encode(), 7)
    assert line.key == "a"
    with pytest.raises(InvalidRequestError) as caught:
        request_of(line, DEFAULTS, 0)
    assert message in str(caught.value)


ENVELOPES = {
    "body missing": ({"url": "/v1/completions"}, "body=None must be an object"),
    "body text": (
        {"url": "/v1/completions", "body": "x"},
        "body='x' must be an object",
    ),
    "url missing": ({"body": {"model": "m", "prompt": "x"}}, "url=None must be one of"),
    "url other": ({"url": "/v1/embeddings", "body": {}}, "'/v1/embeddings' must be"),
    "url list": ({"url": ["/v1/completions"], "body": {}}, "must be one of"),
    "method": ({"method": "GET", "url": "/v1/completions", "body": {}}, "'POST'"),
    "more": ({"url": "/v1/completions", "body": {}, "n": 1}, "unknown field 'n'"),
    "no model": ({"url": "/v1/completions", "body": {"prompt": "x"}}, "body.model"),
    "model number": (
        {"url": "/v1/completions", "body": {"model": 3, "prompt": "x"}},
        "model=3 must be a string",
    ),
    "adapter_id": (
        {"url": "/v1/completions", "body": {"model": "m", "adapter_id": "x"}},
        "unknown field 'adapter_id'",
    ),
    "messages in a completion": (
        {"url": "/v1/completions", "body": {"model": "m", "messages": []}},
        "unknown field 'messages'",
    ),
    "prompt in a chat": (
        {"url": "/v1/chat/completions", "body": {"model": "m", "prompt": "x"}},
        "unknown field 'prompt'",
    ),
    "chat logprobs": (
        {
            "url": "/v1/chat/completions",
            "body": {"model": "m", "messages": [], "logprobs": 2},
        },
        "logprobs=2 must be true or false",
    ),
    "chat top without logprobs": (
        {
            "url": "/v1/chat/completions",
            "body": {"model": "m", "messages": [], "top_logprobs": 2},
        },
        "top_logprobs=2 must come with logprobs=true",
    ),
}


@pytest.mark.parametrize("case", ENVELOPES)
def test_envelope_that_is_wrong_is_refused_by_field(case):
    table, message = ENVELOPES[case]
    line = open_line(json.dumps({"custom_id": "a", **table}).encode(), 7)
    assert line.key == "a"
    with pytest.raises(InvalidRequestError) as caught:
        request_of(line, DEFAULTS, 0)
    assert message in str(caught.value)


def test_every_sampling_field_arrives_under_its_apis_name():
    fields = {
        "n": 3,
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.2,
        "seed": 4,
        "stop": ("end",),
        "stop_token_ids": (3, 4),
        "ignore_eos": True,
        "prompt_logprobs": 1,
        "priority": -1,
        "truncate_prompt_tokens": 8,
        "time_limit_s": 2.5,
        "expected_tokens": 7,
    }
    given = {
        **fields,
        "stop": "end",
        "stop_token_ids": [3, 4],
        "logit_bias": {"7": 1.5, "3": -2},
        "include_stop_str_in_output": True,
        "logprobs": 2,
    }
    expected = SamplingParams(
        **fields, logit_bias={3: -2.0, 7: 1.5}, include_stop=True, logprobs=2
    )
    assert plain(**given).sampling == expected
    assert body(prompt="x", **given).sampling == expected
    messages = [{"role": "user", "content": "x"}]
    chat = {**given, "logprobs": True, "top_logprobs": 2, "messages": messages}
    chat["max_completion_tokens"] = chat.pop("max_tokens")
    assert body("/v1/chat/completions", **chat).sampling == expected
    chat_line = request({"custom_id": "a", **chat})
    assert chat_line.sampling == expected and chat_line.messages == messages


def test_field_that_asks_for_what_is_done_anyway_is_taken():
    nothing = {
        "stream": False,
        "stream_options": None,
        "tools": None,
        "echo": False,
        "response_format": {"type": "text"},
        "tool_choice": "none",
        "temperature": None,
        "logprobs": None,
        "stop": None,
        "logit_bias": None,
        "user": "someone",
    }
    assert body(prompt="x", **nothing).sampling == DEFAULTS
    assert plain(top_k=-1).sampling == DEFAULTS


def test_prompts_of_every_form():
    assert plain().prompt == "x"
    assert body(prompt=[5, 6]).prompt == [5, 6]
    assert body(prompt=["x"]).prompt == "x"
    assert body(prompt=[[5, 6]]).prompt == [5, 6]
    assert request({"custom_id": "a", "prompt_token_ids": [1]}).prompt == [1]


def test_names_of_models_and_adapters():
    assert (plain().name, plain().may_be_base) == (None, False)
    assert (plain(adapter_id="z").name, body(prompt="x").name) == ("z", "m")
    assert body(prompt="x").may_be_base
    for table in ({"adapter_id": "z"}, {"body": {"model": "z"}}):
        line = open_line(json.dumps({"custom_id": "a", **table}).encode(), 1)
        assert line.adapter == "z"


def test_seed_of_a_sampled_line_follows_from_run_and_id_alone():
    table = {"custom_id": "a", "prompt": "x", "temperature": 1}
    seeds = {
        (key, run): request({**table, "custom_id": key}, seed=run).sampling.seed
        for key in "abc"
        for run in (0, 1)
    }
    assert len(set(seeds.values())) == 6
    assert seeds["a", 1] == seed_of("a", 1) == request(table, seed=1).sampling.seed
    assert request({**table, "seed": 3}).sampling.seed == 3
    assert plain().sampling.seed is None, "a greedy line needs none"


def test_whitespace_around_a_line_is_no_fault():
    line = open_line(b' \t{"custom_id": "a", "prompt": "x"} \r', 1)
    assert (line.key, line.fault) == ("a", None)


def test_fallback_key_is_made_of_the_number():
    assert fallback_key(3) == "line-3"


# The documentation.

DOCS = (Path(__file__).parent.parent / "docs" / "batch.md").read_text("utf-8")


def test_documented_lines_are_taken():
    [block] = re.findall(r"```json\n((?:.*\n)*?)```", DOCS.split("## Rows")[0])
    lines = [open_line(raw.encode(), 1) for raw in block.splitlines()]
    requests = [request_of(line, DEFAULTS, 0) for line in lines]
    assert [line.key for line in lines] == [*"12345"]
    assert [one.is_chat for one in requests] == [False, True, False, False, True]


def test_documented_fields_are_those_there_are():
    table = DOCS.split("| field | |")[1].split("\n\n")[0]
    named = [name for row in table.splitlines() for name in row.split("|")[1:2]]
    fields = set(re.findall(r"`(\w+)`", " ".join(named)))
    fields |= {"top_logprobs"} & set(re.findall(r"`(\w+)`", table))
    assert fields == {*SAMPLING_FIELDS, *OTHER_FIELDS}


def test_documented_status_codes_are_those_there_are():
    table = DOCS.split("| status | code | |")[1].split("\n\n")[0]
    pairs = set()
    for row in table.splitlines()[2:]:
        _, status, codes, *_ = row.split("|")
        pairs |= {(code, int(status)) for code in re.findall(r"`(\w+)`", codes)}
    faults = {(str(fault), status) for fault, status in FAULT_STATUS.items()}
    own = {("invalid_request", 400), ("model_not_found", 404)}
    assert pairs == faults | own

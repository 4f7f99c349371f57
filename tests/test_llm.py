"""The front door: arguments, bad input before any work, names, stops, streams."""

import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from random_adapters import write_random_adapter

from jchameleon.config import ModelConfig
from jchameleon.errors import (
    AdapterConflictError,
    AdapterError,
    CapacityError,
    ConfigError,
    InvalidRequestError,
    JChameleonError,
    UnknownAdapterError,
    UnknownModelError,
)
from jchameleon.llm import LLM
from jchameleon.models.loader import load_model
from jchameleon.runtime.outbox import Outbox
from jchameleon.runtime.submission import RequestRules
from jchameleon.sampling import SamplingParams

TINY = ModelConfig.preset("tiny")
SMALL = {"max_running": 4, "max_batch_tokens": 64, "max_model_len": 512}
GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def adapter_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / "first"
    write_random_adapter(
        path, TINY, rank=8, targets=("q", "v"), seed=0, dtype="float32"
    )
    return path


@pytest.fixture(scope="module")
def llm(adapter_dir):
    with LLM(model="tiny", adapters={"first": adapter_dir}, **SMALL) as llm:
        yield llm


def test_prompt_forms_strings_ids_and_single_are_the_same_request(llm):
    ids = llm.tokenizer.encode("abc")
    one = llm.generate("abc", sampling=GREEDY)
    many = llm.generate(["abc", ids], sampling=GREEDY)
    single = llm.generate(ids, sampling=GREEDY)
    tokens = {o.token_ids for o in [*one, *many, *single]}
    assert len(tokens) == 1
    assert [o.prompt_token_ids for o in many] == [tuple(ids)] * 2
    assert llm.generate([]) == []


def test_output_fields_are_complete(llm):
    [base, adapted] = llm.generate(
        ["abc", "abc"], adapters=[None, "first"], sampling=GREEDY
    )
    assert base.adapter is None
    assert base.timing.adapter_cache_hit is None
    assert adapted.adapter == "first"
    assert adapted.request_id != base.request_id
    assert len(adapted.token_ids) == 20
    assert base.token_ids != adapted.token_ids
    timing = adapted.timing
    assert 0 <= timing.queue_s <= timing.ttft_s <= timing.total_s
    assert adapted.text == llm.tokenizer.decode(list(adapted.token_ids))
    again = llm.generate("abc", adapters="first", sampling=GREEDY)[0]
    assert again.timing.adapter_cache_hit is True
    assert again.timing.adapter_load_s == 0.0


def test_stream_concatenates_to_generate(llm):
    prompts, names = ["abc", "hello", "x"], ["first", None, "first"]
    sampling = SamplingParams(max_tokens=30, temperature=1.0, seed=4, ignore_eos=True)
    outputs = llm.generate(prompts, names, sampling)
    text, tokens, ends = [""] * 3, [()] * 3, [None] * 3
    for delta in llm.stream(prompts, names, sampling):
        assert ends[delta.index] is None, "nothing follows the last delta"
        text[delta.index] += delta.text
        tokens[delta.index] += delta.token_ids
        ends[delta.index] = delta.finish_reason
    assert text == [o.text for o in outputs]
    assert tokens == [o.token_ids for o in outputs]
    assert ends == [o.finish_reason for o in outputs]


def test_stop_token_ids_end_the_reply_and_are_included(llm):
    tokens = llm.generate("abc", sampling=GREEDY)[0].token_ids
    stop = tokens[5]
    cut = tokens.index(stop)
    sampling = SamplingParams(
        max_tokens=20, temperature=0.0, ignore_eos=True, stop_token_ids=(stop,)
    )
    [output] = llm.generate("abc", sampling=sampling)
    assert output.finish_reason == "stop"
    assert output.token_ids == tokens[: cut + 1]


def test_stop_string_cuts_the_text_and_ends_the_reply():
    with LLM(model="tiny", **SMALL) as llm:
        drawn = SamplingParams(max_tokens=120, temperature=1.0, seed=1, ignore_eos=True)
        whole = llm.generate("abc", sampling=drawn)[0]
        # Two whole characters in a row that come up mid-reply.
        stop = next(
            whole.text[i : i + 2]
            for i in range(10, len(whole.text) - 2)
            if "\ufffd" not in whole.text[i : i + 2]
        )
        sampling = SamplingParams(
            max_tokens=120, temperature=1.0, seed=1, ignore_eos=True, stop=stop
        )
        [output] = llm.generate("abc", sampling=sampling)
        assert output.finish_reason == "stop"
        assert output.text == whole.text[: whole.text.index(stop)]
        assert output.token_ids == whole.token_ids[: len(output.token_ids)]
        assert len(output.token_ids) < 120


def test_eos_ends_the_reply_unless_ignored(llm):
    eos = llm.model_config.eos_token_ids[0]
    for seed in range(200):
        sampling = SamplingParams(
            max_tokens=100, temperature=2.0, seed=seed, ignore_eos=True
        )
        tokens = llm.generate("q", sampling=sampling)[0].token_ids
        if eos in tokens[:-1]:
            break
    else:
        pytest.fail("no reply drew the end token")
    sampling = SamplingParams(max_tokens=100, temperature=2.0, seed=seed)
    [output] = llm.generate("q", sampling=sampling)
    assert output.finish_reason == "stop"
    assert output.token_ids == tokens[: tokens.index(eos) + 1]


def test_seed_none_varies_and_a_seed_repeats(llm):
    free = SamplingParams(max_tokens=16, temperature=1.0, ignore_eos=True)
    fixed = SamplingParams(max_tokens=16, temperature=1.0, seed=7, ignore_eos=True)
    drawn = [o.token_ids for o in llm.generate(["abc"] * 4, sampling=free)]
    assert len(set(drawn)) == 4
    same = [o.token_ids for o in llm.generate(["abc"] * 4, sampling=fixed)]
    assert len(set(same)) == 1


BAD_CALLS = {
    "unknown adapter": (
        {"prompts": "a", "adapters": "nobody"},
        UnknownAdapterError,
        "unknown adapter 'nobody'; registered are: first",
    ),
    "empty text": ({"prompts": ""}, InvalidRequestError, "prompt is empty"),
    "empty ids": ({"prompts": [[]]}, InvalidRequestError, "prompt is empty"),
    "id past the vocabulary": (
        {"prompts": [[1, 259]]},
        InvalidRequestError,
        "token id 259, outside the vocabulary of 259",
    ),
    "negative id": ({"prompts": [[-1]]}, InvalidRequestError, "token id -1"),
    "huge id": ({"prompts": [[2**32 - 1]]}, InvalidRequestError, "4294967295"),
    "enormous id": ({"prompts": [[10**5000]]}, InvalidRequestError, "vocabulary"),
    "bool id": ({"prompts": [[1, True]]}, InvalidRequestError, "True"),
    "prompt too long": (
        {"prompts": [[1] * 513]},
        InvalidRequestError,
        "exceeds max_model_len=512",
    ),
    "prompt and output too long": (
        {"prompts": [[1] * 400], "sampling": SamplingParams(max_tokens=113)},
        InvalidRequestError,
        r"400 tokens \+ max_tokens=113 = 513 exceeds max_model_len=512",
    ),
    "stop id past the vocabulary": (
        {"prompts": "a", "sampling": SamplingParams(stop_token_ids=(259,))},
        InvalidRequestError,
        "259",
    ),
    "adapters of another length": (
        {"prompts": ["a", "b"], "adapters": ["first"]},
        InvalidRequestError,
        "adapters has 1 entries for 2 prompts",
    ),
    "sampling of another length": (
        {"prompts": ["a"], "sampling": [GREEDY, GREEDY]},
        InvalidRequestError,
        "sampling has 2 entries for 1 prompts",
    ),
    "sampling of a wrong type": (
        {"prompts": ["a"], "sampling": {"max_tokens": 3}},
        InvalidRequestError,
        "sampling=",
    ),
    "adapter of a wrong type": (
        {"prompts": ["a"], "adapters": [3]},
        InvalidRequestError,
        "adapters has 3",
    ),
    "prompts of a wrong type": ({"prompts": 3}, InvalidRequestError, "int"),
    "prompt of a wrong type": ({"prompts": [3.5]}, InvalidRequestError, "3.5"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call_is_refused_before_any_work(llm, name):
    arguments, kind, message = BAD_CALLS[name]
    steps = len(llm.step_records)
    for method in (llm.generate, llm.stream):
        with pytest.raises(kind, match=message) as caught:
            method(**arguments)
        assert isinstance(caught.value, JChameleonError)
        assert "\n" not in str(caught.value)
    assert len(llm.step_records) == steps


def test_one_bad_prompt_refuses_the_call_and_disturbs_nobody_in_flight(llm):
    expected = llm.generate("abc", adapters="first", sampling=GREEDY)[0].token_ids
    stream = llm.stream("abc", adapters="first", sampling=GREEDY)
    got = next(stream).token_ids
    for arguments, kind, message in BAD_CALLS.values():
        with pytest.raises(kind, match=message):
            llm.generate(**arguments)
    for delta in stream:
        got += delta.token_ids
    assert got == expected
    assert llm.stats().running == 0


@pytest.mark.parametrize("field", ["temperature", "top_p"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, "x", None])
def test_bad_sampling_value_names_field(field, value):
    with pytest.raises(InvalidRequestError, match=field):
        SamplingParams(**{field: value})


def test_unknown_model_lists_presets():
    with pytest.raises(UnknownModelError, match="smollm2-135m"):
        LLM(model="no-such-model")


def test_unknown_option_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'max_running'"):
        LLM(model="tiny", max_runing=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 9000}, "max_model_len=9000 exceeds the model's context"),
        ({"pool_bytes": 8192}, "pool_bytes=8192 must hold at least 3 pages"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"policy": {"preset": "lru", "eviction": {"name": "mru"}}}, "eviction='mru'"),
        ({"lora_targets": ("q", "x")}, "lora_targets has 'x'"),
        ({"lora_targets": 5}, "lora_targets=5"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": "x"}, "seed='x'"),
        ({"policy": 5}, "policy=5"),
        ({"pool_bytes": 2**60}, "exceeds this machine's memory"),
    ],
)
def test_bad_option_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LLM(model="tiny", **(SMALL | options))


@pytest.mark.parametrize(
    ("adapters", "message"), [(["a"], "adapters="), ({"a": None}, "path None")]
)
def test_adapters_of_a_wrong_type_are_refused(adapters, message):
    with pytest.raises(JChameleonError, match=message):
        LLM(model="tiny", adapters=adapters, **SMALL)


def test_stop_without_a_tokenizer_is_refused_by_the_engine():
    rules = RequestRules(
        vocab_size=10, max_model_len=64, has_tokenizer=False, block_tokens=None
    )
    with pytest.raises(InvalidRequestError, match="needs a tokenizer"):
        rules.accept(
            "x",
            [1],
            SamplingParams(stop="a"),
            adapter_uid=None,
            outbox=Outbox(),
            lease=None,
            cache_salt=None,
            prefix_cache=False,
        )


def test_call_larger_than_the_queue_runs_in_order(adapter_dir):
    options = SMALL | {"max_waiting": 2}
    with LLM(model="tiny", adapters={"first": adapter_dir}, **options) as llm:
        prompts = [[i + 1] for i in range(40)]
        outputs = llm.generate(prompts, adapters="first", sampling=GREEDY)
        assert [list(o.prompt_token_ids) for o in outputs] == prompts
        assert {o.finish_reason for o in outputs} == {"length"}
        alone = llm.generate([prompts[30]], adapters="first", sampling=GREEDY)[0]
        assert outputs[30].token_ids == alone.token_ids


def test_two_processes_may_check_the_cache_folder_at_once(tmp_path):
    code = """
import jax
from jchameleon.runtime.setup import use_compilation_cache
for _ in range(300):
    jax.config.update("jax_compilation_cache_dir", None)
    use_compilation_cache()
"""
    env = os.environ | {"JCHAMELEON_HOME": str(tmp_path)}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    both = [subprocess.Popen([sys.executable, "-c", code], env=env) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert list((tmp_path / "xla").iterdir()) == []


def test_unwritable_home_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JCHAMELEON_HOME", str(tmp_path / "file" / "home"))
    import jax

    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        with pytest.raises(ConfigError, match="JCHAMELEON_HOME") as caught:
            LLM(model="tiny", **SMALL)
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
    assert "\n" not in str(caught.value)


def test_adapters_are_added_while_running_and_names_are_kept(
    llm, tmp_path, adapter_dir
):
    write_random_adapter(
        tmp_path / "second", TINY, rank=16, targets=("q", "v"), seed=2, dtype="float32"
    )
    stream = llm.stream("abc", adapters="first", sampling=GREEDY)
    next(stream)
    info = llm.register_adapter("second", tmp_path / "second")
    assert (info.rank, info.targets, info.tier) == (16, ("q", "v"), "host")
    assert llm.register_adapter("second", tmp_path / "second").uid == info.uid
    known = len(llm._engine.adapters)
    write_random_adapter(
        tmp_path / "third", TINY, rank=8, targets=("q",), seed=5, dtype="float32"
    )
    with pytest.raises(AdapterConflictError, match="'second' is taken by content"):
        llm.register_adapter("second", tmp_path / "third")
    assert len(llm._engine.adapters) == known, "what was refused is not kept"
    llm.register_adapter("alias", adapter_dir)  # the same content under two names
    list(stream)
    outputs = llm.generate(
        ["abc"] * 3, adapters=["first", "second", "alias"], sampling=GREEDY
    )
    assert outputs[0].token_ids == outputs[2].token_ids
    assert outputs[0].token_ids != outputs[1].token_ids
    infos = {i.name: i for i in llm.list_adapters()}
    assert infos["second"].tier == "device"
    assert infos["alias"].uid == infos["first"].uid
    assert infos["second"].misses == 1


def test_adapter_beyond_the_targets_is_refused(llm, tmp_path):
    write_random_adapter(
        tmp_path / "mlp", TINY, rank=4, targets=("q", "up"), seed=3, dtype="float32"
    )
    with pytest.raises(AdapterError, match="up"):
        llm.register_adapter("mlp", tmp_path / "mlp")
    with pytest.raises(UnknownAdapterError):
        llm.generate("a", adapters="mlp")


def test_targets_follow_the_adapters_given_at_start(tmp_path):
    write_random_adapter(
        tmp_path / "mlp", TINY, rank=4, targets=("up",), seed=3, dtype="float32"
    )
    with LLM(model="tiny", adapters={"mlp": tmp_path / "mlp"}, **SMALL) as llm:
        base, mlp = llm.generate(["a", "a"], adapters=[None, "mlp"], sampling=GREEDY)
        assert base.token_ids != mlp.token_ids


def test_adapter_for_another_model_is_refused_at_start(tmp_path):
    other = ModelConfig.from_dict(
        {
            "name": "other",
            "vocab_size": 259,
            "hidden_size": 128,
            "intermediate_size": 128,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 32,
        }
    )
    write_random_adapter(
        tmp_path / "other", other, rank=8, targets=("q",), seed=0, dtype="float32"
    )
    with pytest.raises(AdapterError, match="128"):
        LLM(model="tiny", adapters={"other": tmp_path / "other"}, **SMALL)


def test_rank_above_the_limit_is_refused(tmp_path):
    write_random_adapter(
        tmp_path / "big", TINY, rank=40, targets=("q",), seed=0, dtype="float32"
    )
    with pytest.raises(AdapterError, match="40"):
        LLM(model="tiny", adapters={"b": tmp_path / "big"}, max_lora_rank=32, **SMALL)


def test_adapter_larger_than_the_pool_is_refused_before_compiling(adapter_dir):
    started_s = time.monotonic()
    with pytest.raises(CapacityError, match="rank 8 takes 4 pages, .* pool has 4"):
        LLM(model="tiny", adapters={"a": adapter_dir}, pool_bytes=6 * 8192, **SMALL)
    assert time.monotonic() - started_s < 5


def test_bfloat16_runs(adapter_dir):
    with LLM(
        model="tiny", adapters={"first": adapter_dir}, dtype="bfloat16", **SMALL
    ) as llm:
        base, first = llm.generate(
            ["abc", "abc"], adapters=[None, "first"], sampling=GREEDY
        )
        assert base.token_ids != first.token_ids
        alone = llm.generate("abc", adapters="first", sampling=GREEDY)[0]
        assert np.mean(np.array(alone.token_ids) == np.array(first.token_ids)) > 0.5


def test_chat_without_a_template_is_refused(llm):
    assert not llm.has_chat_template
    for talk in (llm.chat, llm.chat_tokens, llm.chat_prompt):
        with pytest.raises(InvalidRequestError, match="'tiny' has no chat template"):
            talk("Hi")


def test_loaded_model_is_taken_as_it_is_and_only_in_its_dtype():
    loaded = load_model("tiny", dtype="float32")
    with LLM(loaded, max_running=1, max_batch_tokens=64, max_model_len=64) as llm:
        assert llm.model_config == loaded.config
        [output] = llm.generate([[1, 2, 3]])
        assert output.finish_reason == "length"
    with pytest.raises(ConfigError, match="loaded as float32; dtype='bfloat16' must"):
        LLM(loaded, dtype="bfloat16")

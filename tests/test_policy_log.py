"""Plan logs: what goes in comes out, damage is named, and replays find differences."""

import dataclasses
import gzip
import json
import math
import re
import typing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_traffic import CONFIG, FIFO, record

from jchameleon.errors import ConfigError
from jchameleon.runtime.policy.events import (
    AdapterRegistered,
    Arrival,
    Event,
    StepDone,
)
from jchameleon.runtime.policy.limits import PlannerConfig
from jchameleon.runtime.policy.log import (
    PlanLogWriter,
    decode,
    encode,
    read_plan_log,
)
from jchameleon.runtime.policy.plan import Plan
from jchameleon.runtime.policy.presets import (
    load_policy,
    policy_preset_names,
)
from jchameleon.runtime.policy.replay import ReplayReport, replay
from jchameleon.runtime.policy.request import Request

POSITIVE = st.integers(1, 10**9)
REQUESTS = st.builds(
    Request, prompt_tokens=POSITIVE, max_tokens=POSITIVE, expected_tokens=st.none()
) | st.builds(
    Request, prompt_tokens=POSITIVE, max_tokens=st.just(9), expected_tokens=st.just(9)
)
CHECKED = {
    Arrival: st.builds(Arrival, REQUESTS),
    AdapterRegistered: st.builds(AdapterRegistered, rank=POSITIVE, num_pages=POSITIVE),
}
EVENTS = st.one_of(
    *(CHECKED.get(cls, st.from_type(cls)) for cls in typing.get_args(Event))
)
PLANS = st.from_type(Plan)

HEADER = {
    "format": "jchameleon-plan-log",
    "version": 3,
    "planner": dataclasses.asdict(CONFIG),
    "policy": {"source": "by hand", **FIFO},
}
# Version 3 as it is on disk: a change that cannot read this needs another version.
BY_HAND = [
    '[0.1,[{"is":"AdapterRegistered","uid":"a","rank":8,"num_pages":3},'
    '{"is":"Arrival","request":{"is":"Request","request_id":"r","prompt_tokens":5,'
    '"max_tokens":2,"adapter_uid":"a","block_keys":["k"]}}],{"is":"Plan","admitted":["r"],'
    '"kv_pages":[["r",[2,3]]],"loads":[{"is":"Load","uid":"a","pages":[4,5,6]}]}]',
    '[0.2,[{"is":"LoadDone","uid":"a"}],'
    '{"is":"Plan","prefill":[{"is":"PrefillChunk","request_id":"r","start":0,'
    '"length":5}]}]',
    '[0.30000000000000004,[{"is":"StepDone","duration_s":0.1,"produced":[["r",1]]}],'
    '{"is":"Plan","decode":["r"]}]',
    '[0.4,[{"is":"StepDone","duration_s":1e-05,"produced":[["r",1]],'
    '"finished":["r"],"spoiled":["r"]},{"is":"Cancel","request_id":"x"},'
    '{"is":"AdapterPinned","uid":"a","pinned":false}],{"is":"Plan"}]',
]


def packed(content):
    """Compress without a time in it: some are parameters, and so in names of tests."""
    return gzip.compress(content, mtime=0)


def write_lines(path, lines, header=HEADER):
    text = "".join(f"{line}\n" for line in [json.dumps(header), *lines])
    path.write_bytes(packed(text.encode()))
    return path


def lines_of(path):
    """Return a log's lines without the header."""
    return gzip.decompress(path.read_bytes()).decode().splitlines()[1:]


def changed(header=HEADER, **parts):
    return {**header, **parts}


@given(value=st.lists(EVENTS, max_size=5).map(tuple) | PLANS)
@settings(max_examples=150, deadline=None)
def test_codec_gives_back_every_event_and_plan_to_the_last_bit(value):
    # The repr tells types, -0.0 from 0.0, and one NaN equals the other.
    assert repr(decode(encode(value))) == repr(value)
    assert "\n" not in encode(value)


@pytest.mark.parametrize(
    "number", [0.1 + 0.2, 5e-324, -0.0, 0.0, 0, 2**80, 1.0, True, math.inf, math.nan]
)
def test_codec_keeps_numbers_exactly(number):
    value = StepDone(number, (("r", number), ("\udcff\n\u2028", number)))
    assert repr(decode(encode(value))) == repr(value)
    # Where it equals the default, too.
    request = Request(request_id="r", prompt_tokens=1, max_tokens=1, arrival_s=number)
    assert repr(decode(encode(request))) == repr(request)


def test_codec_takes_the_numbers_of_numpy():
    plan = Plan(lanes=(("r", np.int64(2), np.float64(0.1)), ("s", 1, np.float32(0.5))))
    assert repr(decode(encode(plan)).lanes) == "(('r', 2, 0.1), ('s', 1, 0.5))"


@pytest.mark.parametrize("value", [{1, 2}, np.zeros(3), CONFIG])
def test_codec_refuses_what_it_could_not_give_back(value):
    with pytest.raises(TypeError, match=f"cannot hold {type(value).__name__}"):
        encode(Plan(admitted=(value,)))


def test_log_by_hand_is_read_and_replayed(tmp_path):
    path = write_lines(tmp_path / "log", BY_HAND)
    assert [encode(list(iteration)) for iteration in read_plan_log(path)] == BY_HAND
    assert replay(path) == ReplayReport(
        policy="by hand",
        iterations=4,
        events=7,
        admitted=1,
        failed=0,
        hits=0,
        loads=1,
        evictions=0,
        squashes=0,
        bypasses=0,
        first_difference=None,
        cut_off=False,
    )


def test_log_gives_back_run_planner_and_policies(tmp_path):
    iterations = record(tmp_path / "log", "chameleon", seed=1, steps=50)
    log = read_plan_log(tmp_path / "log")
    assert log.policy == load_policy("chameleon")
    assert log.planner == dataclasses.replace(
        CONFIG,
        kv_reserve=log.policy.kv_reserve,
        max_squashes=log.policy.max_squashes,
    )
    assert list(log) == iterations
    assert not log.cut_off


def test_planner_limits_come_back_whatever_they_are(tmp_path):
    limits = {
        field.name: getattr(CONFIG, field.name) + 1
        for field in dataclasses.fields(PlannerConfig)
        if type(getattr(CONFIG, field.name)) is int
    }
    config = PlannerConfig(**limits, kv_reserve="predicted")
    PlanLogWriter(tmp_path / "log", config, load_policy(FIFO)).close()
    assert read_plan_log(tmp_path / "log").planner == config


def test_equal_runs_make_equal_files_and_replace_old_ones(tmp_path):
    record(tmp_path / "a", seed=2, steps=20)
    record(tmp_path / "b", seed=3, steps=40)
    record(tmp_path / "b", seed=2, steps=20)
    content = (tmp_path / "a").read_bytes()
    assert content == (tmp_path / "b").read_bytes()
    # Neither name nor time of the file (RFC 1952, section 2.3).
    assert content[:8] == b"\x1f\x8b\x08" + bytes(5)


def test_lines_reach_the_file_once_a_second_of_their_own_clock(tmp_path):
    path = tmp_path / "log"
    writer = PlanLogWriter(path, CONFIG, load_policy(FIFO))
    readable = []
    for now_s in (50.0, 50.4, 50.9, 51.0, 51.1, 60.0):
        writer.append(now_s, [], Plan())
        log = read_plan_log(path)
        readable.append([at for at, _, _ in log])
        assert log.cut_off
    assert [len(times) for times in readable] == [1, 1, 1, 4, 4, 6]
    writer.close()
    writer.close()
    log = read_plan_log(path)
    assert len(list(log)) == 6 and not log.cut_off


def test_log_cut_anywhere_is_read_up_to_its_last_whole_line(tmp_path):
    whole = record(tmp_path / "log", seed=4, steps=8)
    content = (tmp_path / "log").read_bytes()
    cut = tmp_path / "cut"
    most, opened = 0, False
    for size in range(len(content)):
        cut.write_bytes(content[:size])
        try:
            log = read_plan_log(cut)
        except ConfigError:
            assert not opened
            continue
        opened = True
        got = list(log)
        assert log.cut_off
        assert len(got) >= most
        most = len(got)
        assert got == whole[:most]
        if size % 50 == 0:
            report = replay(cut)
            assert (report.iterations, report.cut_off) == (most, True)
            assert report.first_difference is None
    # At the end only the checksum lacks.
    assert most == len(whole)


def test_flipped_byte_is_named_or_harmless(tmp_path):
    whole = record(tmp_path / "log", seed=5, steps=6)
    content = (tmp_path / "log").read_bytes()
    path = tmp_path / "flipped"
    named = 0
    for at in range(0, len(content), 3):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x20]) + content[at + 1 :])
        try:
            log = read_plan_log(path)
            got = list(log)
        except ConfigError as error:
            assert repr(str(path)) in str(error)
            named += 1
        else:
            assert got == whole or log.cut_off
    assert named > 0.3 * len(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no header"),
        (b"not gzip", r"line 1: Not a gzipped file"),
        (packed(b""), "holds no header"),
        (packed(b"plain text\n"), r"line 1: Expecting value"),
        (packed(b"[1]\n"), "line 1: must be an object with format 'jcham"),
        (packed(b'{"format": "x"}\n'), "line 1: must be an object with format"),
        (packed(b"\xff\n"), "line 1: 'utf-8' codec"),
        (packed(b"[" * 100_000 + b"\n"), "line 1: .*recursion"),
    ],
)
def test_file_that_is_no_log_is_refused(content, message, tmp_path):
    path = tmp_path / "log"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_plan_log(path)
    assert repr(str(path)) in str(caught.value)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (changed(version=1), "line 1: version=1 must be 3"),
        (changed(version=None), "line 1: version=None must be 3"),
        (changed(planner=None), "line 1: planner must be an object"),
        (changed(policy="fifo"), "line 1: policy must be an object"),
        (changed(planner={"num_page": 9}), "'num_page'.*did you mean 'num_pages'"),
        (changed(planner={"num_pages": 9}), "line 1: .*missing"),
        (
            changed(planner={**HEADER["planner"], "num_pages": 0}),
            "line 1: num_pages=0 must be",
        ),
        (changed(policy={"admission": {"name": "fifo"}}), "line 1: .*eviction"),
    ],
)
def test_header_that_builds_no_planner_is_refused(header, message, tmp_path):
    path = write_lines(tmp_path / "log", BY_HAND, header)
    with pytest.raises(ConfigError, match=message):
        read_plan_log(path)


def test_policy_that_is_not_there_is_refused_by_the_replay(tmp_path):
    policy = {**HEADER["policy"], "eviction": {"name": "no.such:Policy"}}
    path = write_lines(tmp_path / "log", BY_HAND, changed(policy=policy))
    with pytest.raises(ConfigError, match="eviction='no.such:Policy'"):
        replay(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "Expecting value"),
        ("{}", "is=None is none of"),
        ("3", "unpack"),
        ('[1.0,[],{"is":"Plan"},0]', "unpack"),
        ('["1",[],{"is":"Plan"}]', r"must be \[now_s, \[events\], plan\]"),
        ('[true,[],{"is":"Plan"}]', r"must be \[now_s"),
        ('[1.0,{"is":"Plan"},{"is":"Plan"}]', r"must be \[now_s"),
        ('[1.0,[{"is":"Plan"}],{"is":"Plan"}]', r"Plan\(.* where one of Arrival, "),
        ('[1.0,[7],{"is":"Plan"}]', "has 7 where one of"),
        ('[1.0,[],{"is":"Cancel","request_id":"r"}]', "where one of Plan goes"),
        ('[1.0,[],{"is":"Plan","bogus":1}]', "bogus"),
        ('[1.0,[],{"is":"Plan","decode":7}]', "Plan.decode must be a list"),
        ('[1.0,[],{"is":["Plan"]}]', "unhashable"),
        ('[1.0,[{"is":"Cancel"}],{"is":"Plan"}]', "request_id"),
        (
            '[1.0,[{"is":"AdapterRegistered","uid":"a","rank":0,"num_pages":1}],'
            '{"is":"Plan"}]',
            "rank=0 must be at least 1",
        ),
    ],
)
def test_damaged_line_is_named_after_those_before_it(line, message, tmp_path):
    path = write_lines(tmp_path / "log", [*BY_HAND[:2], line])
    log = read_plan_log(path)
    iterations = iter(log)
    next(iterations)
    next(iterations)
    with pytest.raises(ConfigError, match=f"line 4: .*{message}"):
        next(iterations)


def test_paths_that_cannot_be_opened_are_named(tmp_path):
    with pytest.raises(ConfigError, match="none/log' cannot be written: No such"):
        PlanLogWriter(tmp_path / "none" / "log", CONFIG, load_policy(FIFO))
    with pytest.raises(ConfigError, match="none' cannot be read: No such file"):
        read_plan_log(tmp_path / "none")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_plan_log(tmp_path)


def test_policy_options_that_no_file_holds_are_refused(tmp_path):
    policy = load_policy({**FIFO, "prefetch": {"name": "none", "way": object()}})
    with pytest.raises(ConfigError, match="cannot hold policy table: .*object"):
        PlanLogWriter(tmp_path / "log", CONFIG, policy)
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("policy", policy_preset_names())
def test_replay_of_every_preset_is_identical(policy, tmp_path):
    for seed in range(2):
        iterations = record(tmp_path / "log", policy, seed=seed)
        report = replay(tmp_path / "log")
        assert report.first_difference is None
        plans = [plan for _, _, plan in iterations]
        assert report == ReplayReport(
            policy=policy,
            iterations=len(iterations),
            events=sum(len(events) for _, events, _ in iterations),
            admitted=sum(len(plan.admitted) for plan in plans),
            failed=sum(len(plan.failed) for plan in plans),
            hits=sum(len(plan.hits) for plan in plans),
            loads=sum(len(plan.loads) for plan in plans),
            evictions=sum(len(plan.evicted) for plan in plans),
            squashes=sum(len(plan.squashed) for plan in plans),
            bypasses=sum(len(plan.bypasses) for plan in plans),
            first_difference=None,
            cut_off=False,
        )


def test_recorded_runs_reach_every_field_of_plans(tmp_path):
    """Replays that are identical are worth something only if much happens in them."""
    counts = dict.fromkeys((field.name for field in dataclasses.fields(Plan)), 0)
    for seed in range(8):
        for policy in ("chameleon", "chameleon-nocache", "s-lora"):
            for _, _, plan in record(tmp_path / "log", policy, seed=seed):
                for name in counts:
                    counts[name] += len(getattr(plan, name))
    assert min(counts.values()) > 3, counts


@given(seed=st.integers(0, 2**32), at=st.integers(0, 59), data=st.data())
@settings(max_examples=25, deadline=None)
def test_changed_plan_is_found_where_it_was_changed(seed, at, data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "changed-plan-log"
    _, _, plan = record(path, seed=seed, steps=60)[at]
    # Names and values follow from the first field that is changed.
    name = data.draw(st.sampled_from(["evicted", "admitted", "hits", "decode"]))
    items = getattr(plan, name)
    index = data.draw(st.integers(0, len(items)))
    if index < len(items):
        where, had = f"{name}[{index}]", repr(items[index])
        items = (*items[:index], "other", *items[index + 1 :])
        has = "'other'"
    else:
        where, had, has = f"{name}[{index}:]", "()", "('other',)"
        items = (*items, "other")
    lines = lines_of(path)
    now_s, events, _ = decode(lines[at])
    lines[at] = encode([now_s, events, dataclasses.replace(plan, **{name: items})])
    report = replay(write_lines(path, lines))
    assert report.first_difference == (
        f"iteration {at + 1}: plan.{where}: the log has {has}, the replay {had}"
    )
    assert report.iterations == at + 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"pages":[4,5,6]', '"pages":[4,7,6]', "loads[0].pages[1]: the log has 7,"),
        ('"pages":[4,5,6]', '"pages":[4,5]', "loads[0].pages[2:]: the log has (),"),
        ('"pages":[4,5,6]', '"pages":[4,5.0,6]', "loads[0].pages[1]: the log has 5.0,"),
        ('"length":5', '"length":4', "prefill[0].length: the log has 4, the replay 5"),
        ('"start":0', '"start":-0.0', "prefill[0].start: the log has -0.0, the repl"),
        ('["r",[2,3]]', '["r",2]', "kv_pages[0][1]: the log has 2, the replay (2, 3)"),
        (
            '"decode":["r"]',
            '"lanes":[["r",0,NaN]]',
            "lanes[0:]: the log has (('r', 0, ",
        ),
    ],
)
def test_difference_names_the_part_that_differs(old, new, message, tmp_path):
    assert old in "".join(BY_HAND)
    lines = [line.replace(old, new) for line in BY_HAND]
    report = replay(write_lines(tmp_path / "log", lines))
    assert f": plan.{message}" in report.first_difference
    assert report.first_difference.startswith(f"iteration {report.iterations}: ")


def test_own_policy_that_reports_no_number_is_replayed(tmp_path):
    policy = {**FIFO, "admission": {"name": "plan_traffic:Sizeless"}}
    record(tmp_path / "log", policy, seed=7)
    assert re.search(r'"lanes":\[\["r\d+",0,NaN\]', "".join(lines_of(tmp_path / "log")))
    assert replay(tmp_path / "log").first_difference is None


def test_events_that_the_planner_refuses_are_a_difference(tmp_path):
    lines = [*BY_HAND[:2], BY_HAND[0].replace("0.1", "0.3", 1)]
    report = replay(write_lines(tmp_path / "log", lines))
    assert report.first_difference.startswith("iteration 3: the replay raised Value")
    assert "'r' waits or runs already" in report.first_difference


def test_other_limits_or_policies_are_found(tmp_path):
    record(tmp_path / "log", seed=6)
    lines = lines_of(tmp_path / "log")
    planner = {**HEADER["planner"], "num_pages": CONFIG.num_pages - 1}
    policy = {**HEADER["policy"], "eviction": {"name": "drop"}}
    assert replay(write_lines(tmp_path / "log", lines)).first_difference is None
    for part in ({"planner": planner}, {"policy": policy}):
        path = write_lines(tmp_path / "log", lines, changed(**part))
        assert replay(path).first_difference is not None

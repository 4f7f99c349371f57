"""Profiles: what they hold, and what is wrong with one, by name, value and rule."""

import dataclasses
import statistics
import tomllib

import numpy as np
import pytest

from jchameleon.errors import ConfigError, PolicyError
from jchameleon.resources import configs_dir
from jchameleon.sim import Load, find_load, load_profile, parse_rates, simulate
from jchameleon.sim.cost import StepWork
from jchameleon.sim.linear import LinearCost
from jchameleon.sim.samples import Samples, percentile
from jchameleon.workload.generator import Length

PROFILE = configs_dir() / "paper" / "a40-llama-7b.toml"

TINY = """
model = "tiny"
slo_s = 0.5
skip_s = 1.0
[cost]
kind = "linear"
prefill_s = 0.01
prefill_token_s = 1e-4
decode_s = 0.02
[engine]
policy = "fifo-lru"
pool_bytes = 1_000_000
max_running = 8
max_batch_tokens = 128
link_bytes_per_s = 1e7
[adapters]
count = 4
ranks = [8, 16]
[workload]
duration_s = 20.0
input_len = "16:64"
output_len = "2:20"
max_model_len = 128
max_tokens = 20
[variants.warm]
warm_cache = true
cost.decode_s = 0.03
"""


@pytest.fixture
def profile_of(tmp_path):
    """Return what writes `TINY` with a part replaced, and reads it."""

    def read(replace="", by="", variant=None):
        assert replace in TINY
        path = tmp_path / "tiny.toml"
        path.write_text(TINY.replace(replace, by, 1))
        return load_profile(path, variant)

    return read


def test_shipped_profile_and_its_variants_are_as_the_table_says():
    table = tomllib.loads(PROFILE.read_text())
    assert list(table["variants"]) == ["m2", "m3w", "m4w"]
    found = {}
    for name in (None, *table["variants"]):
        profile = load_profile(PROFILE, name)
        kv_tokens = profile.num_pages * profile.engine.kv_block_tokens
        found[name] = (kv_tokens, profile.link.stall, profile.warm_cache)
    assert found == {
        None: (56_000, 0.0, False),
        "m2": (56_000, 4.5, False),
        "m3w": (56_000, 16.0, True),
        "m4w": (24_000, 4.5, True),
    }


def test_variant_stands_in_place_of_what_the_file_says(profile_of):
    profile = profile_of(variant="warm")
    assert profile.warm_cache and profile.cost.decode_s == 0.03
    assert profile.cost.prefill_s == 0.01
    assert not profile_of().warm_cache


@pytest.mark.parametrize(
    "line, by, message",
    [
        ('model = "tiny"', 'model = "tyni"', "unknown model preset 'tyni'"),
        ('model = "tiny"', "", "model=None must be a name"),
        ("slo_s = 0.5", "slo_s = 0", "slo_s=0 must be a finite number, above 0"),
        ("slo_s = 0.5", "slo = 0.5", "unknown key 'slo'; did you mean 'slo_s'"),
        ("skip_s = 1.0", "skip_s = 20", "skip_s=20 must be below workload.duration_s"),
        ('kind = "linear"', 'kind = "magic"', "cost.prefill_s goes with"),
        ("decode_s = 0.02", "decode_s = -1", "cost decode_s=-1 must be a finite"),
        ("decode_s = 0.02", "decod_s = 1", "unknown key 'decod_s' in LinearCost"),
        ("pool_bytes = 1_000_000", "", "engine.pool_bytes must be given"),
        ("pool_bytes = 1_000_000", "pool_bytes = 9000", "must hold .* pages"),
        ("link_bytes_per_s = 1e7", "", "engine.link_bytes_per_s must be given"),
        ("link_bytes_per_s = 1e7", "link_bytes = 1", "unknown key 'link_bytes'"),
        ("count = 4", "count = 3", "adapters.count=3 must be a multiple of the 2"),
        ("ranks = [8, 16]", "ranks = [0]", r"adapters.ranks=\[0\] must be positive"),
        ("duration_s = 20.0", "", "num_requests must be given"),
        ("duration_s = 20.0", 'duration_s = "x"', "workload: "),
        ('"16:64"', '"64:16"', "length='64:16' must be"),
        ("max_tokens = 20", "", "workload.max_tokens=None must be from 1"),
        ("max_tokens = 20", "max_tokens = 20\nseed = 1", "workload.seed is chosen by"),
        ("[adapters]", "[link]\nstall = -1\n[adapters]", "link stall=-1 must be"),
        ("[adapters]", "[link]\nlatency_s = 1\n[adapters]", "link has only stall"),
        ("[adapters]", "link = 3\n[adapters]", "unknown key 'link' in EngineConfig"),
    ],
)
def test_wrong_profile_is_an_error_that_names_field_value_and_rule(
    profile_of, line, by, message
):
    with pytest.raises((ConfigError, LookupError), match=message):
        profile_of(line, by)


PROGRAMS = 'kind = "programs"\ndecode_programs_s = { 1 = 0.01 }'


@pytest.mark.parametrize(
    "cost, message",
    [
        ('kind = "paper"\ngpu = "a40"', "is of model 'llama-7b' on gpu 'a40', not of"),
        ('kind = "roofline"\ngpu = "a41"', "gpu='a41' is unknown; did you mean 'a40'"),
        ('kind = "magic"', "cost.kind='magic' must be 'paper', 'roofline', 'linear'"),
        ('kind = "programs"', "cost prefill_programs_s must hold at least one size"),
        (f"{PROGRAMS}\nprefill_programs_s = 3", "cost.prefill_programs_s=3 must be a"),
        (f"{PROGRAMS}\nprefill_programs_s = {{ a = 1 }}", "has the size 'a', which"),
        (f"{PROGRAMS}\nprefill_programs_s = {{ 0 = 1 }}", "has the size 0, which"),
        (f"{PROGRAMS}\nprefill_programs_s = {{ 32 = -1 }}", "programs_s.32=-1 must be"),
        (f"{PROGRAMS}\ndecode = 1", "unknown key 'decode' in LinearCost"),
    ],
)
def test_wrong_cost_is_an_error(profile_of, cost, message):
    old = TINY[TINY.index('kind = "linear"') : TINY.index("[engine]")]
    with pytest.raises(ConfigError, match=message):
        profile_of(old, cost + "\n")


def test_unknown_variant_and_file_are_errors(profile_of, tmp_path):
    with pytest.raises(ConfigError, match="variant='wram' .*did you mean 'warm'"):
        profile_of(variant="wram")
    with pytest.raises(ConfigError, match="cannot read config"):
        load_profile(tmp_path / "none.toml")


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_wrong_rate_is_an_error(rate):
    with pytest.raises(ConfigError, match="rate=.* must be a finite number above 0"):
        Load(rate_rps=rate)


def test_wrong_seed_policy_and_duration_are_errors(profile_of):
    with pytest.raises(ConfigError, match="seed=-1 must be"):
        Load(rate_rps=1.0, seed=-1)
    profile = profile_of()
    with pytest.raises(ConfigError, match="policy='chamelon' is no preset"):
        simulate(profile, Load(rate_rps=1.0, policy="chamelon"))
    for duration_s in (0.5, float("inf")):
        with pytest.raises(ConfigError, match="skip_s=1.0 must be below"):
            simulate(profile, Load(rate_rps=1.0, duration_s=duration_s))


class Raises:
    """An eviction policy with a fault."""

    def score(self, table):
        """Raise."""
        raise KeyError("nothing")


def test_a_policy_that_raises_is_named(profile_of):
    policy = {"preset": "fifo-lru", "eviction": {"name": f"{__name__}:Raises"}}
    profile = profile_of("pool_bytes = 1_000_000", "pool_bytes = 240_000")
    with pytest.raises(PolicyError, match="Raises"):
        simulate(profile, Load(rate_rps=20.0, policy=policy))


def test_report_counts_what_happened(profile_of):
    report = simulate(profile_of(), Load(rate_rps=5.0, seed=1))
    requests, cache = report["requests"], report["cache"]
    assert (
        requests["arrived"] == requests["finished"] == cache["hits"] + cache["misses"]
    )
    assert requests["counted"] < requests["arrived"]
    assert cache["loads"] == 4 and cache["hit_rate"] > 0.9
    assert report["not_exercised"] == ["evictions", "bypasses", "squashes"]
    assert sum(r["requests"] for r in report["by_rank"].values()) == requests["counted"]
    assert set(report["by_rank"]) == {"8", "16"}
    assert report["slo_attainment"] == 1.0
    assert report["throughput_rps"] == pytest.approx(5.0, rel=0.3)
    assert report["settings"]["cache_at_start"] == "cold"
    # A decode step alone between two tokens, at the least.
    assert report["tbt_s"]["p50"] >= 0.02 - 1e-9


def test_percentiles_are_values_that_came():
    rng = np.random.default_rng(0)
    values, counts = rng.random(50), rng.integers(1, 9, 50)
    flat = np.repeat(values, counts)
    for percent in (0.0, 1.0, 50.0, 90.0, 99.0, 100.0):
        expected = np.percentile(flat, percent, method="inverted_cdf")
        assert percentile(values, percent, counts) == expected
        assert percentile(flat, percent) == expected
        alone = np.percentile(values, percent, method="inverted_cdf")
        assert percentile(values, percent) == alone
    assert percentile(np.array([]), 50) is None
    assert len(Samples().ttft_s) == 0


def test_sweep_finds_the_rate_that_queueing_theory_says(profile_of):
    # One row and prompts of 0.1 s and a single token: at most 10 requests/s, and P99
    # of an M/D/1 queue's wait exceeds 0.4 s well before that.
    old = TINY[TINY.index("prefill_s") : TINY.index("[engine]")]
    profile = profile_of(old, "prefill_s = 0.1\n")
    profile = dataclasses.replace(
        profile,
        engine=dataclasses.replace(profile.engine, max_running=1),
        workload=dataclasses.replace(
            profile.workload,
            output_len=Length(low=1, high=1),
            duration_s=60.0,
        ),
    )
    rates = parse_rates("1:11:1")
    report = find_load(profile, Load(rate_rps=1.0), rates_rps=rates, num_seeds=5)
    assert 5.0 <= report["mean_rps"] <= 10.0
    found = [row["over_slo_rps"] for row in report["seeds"]]
    assert len(set(found)) > 1
    # 2.776 is Student's t of 4 degrees of freedom at 97.5 %, from any table of it.
    half_rps = 2.776 * statistics.stdev(found) / 5**0.5
    assert report["half_width_95_rps"] == pytest.approx(half_rps, rel=1e-3)
    for row in report["seeds"]:
        p99s = [run["ttft_p99_s"] for run in row["runs"]]
        assert all(p99_s <= 0.5 for p99_s in p99s[:-1]) and p99s[-1] > 0.5
        assert row["over_slo_rps"] == row["runs"][-1]["rate_rps"]


def test_sweep_says_which_limit_it_hit(profile_of):
    profile = profile_of()
    low = find_load(profile, Load(rate_rps=1.0), rates_rps=(0.5, 1.0), num_seeds=2)
    assert low["mean_rps"] is None
    assert [row["limit"] for row in low["seeds"]] == [
        "the highest rate keeps the SLO"
    ] * 2
    high = find_load(profile, Load(rate_rps=1.0), rates_rps=(500.0,), num_seeds=1)
    assert high["seeds"][0]["limit"] == "the lowest rate exceeds the SLO"
    assert high["mean_rps"] is None
    with pytest.raises(ConfigError, match="seeds=0 must be at least 1"):
        find_load(profile, Load(rate_rps=1.0), rates_rps=(1.0,), num_seeds=0)


@pytest.mark.parametrize(
    "text", ["1:2", "2:1:1", "0:1:1", "1:2:0", "a:b:c", "1:9:1e-9"]
)
def test_wrong_sweep_is_an_error(text):
    with pytest.raises(ConfigError, match="must be LOW:HIGH:STEP"):
        parse_rates(text)


def test_rates_of_a_sweep_include_both_ends():
    assert parse_rates("6:7:0.25") == (6.0, 6.25, 6.5, 6.75, 7.0)
    assert parse_rates("0.1:0.3:0.1") == (0.1, 0.2, 0.3)


def test_cost_of_a_step_that_does_nothing_is_nothing():
    cost = LinearCost(prefill_s=1.0, decode_s=1.0)
    assert cost.step_s(StepWork()) == 0.0
    both = StepWork(prefill_tokens=1, decode_rows=1)
    assert cost.step_s(both) == 2.0


def test_cost_by_programs_takes_the_smallest_that_holds_the_work(profile_of):
    old = TINY[TINY.index('kind = "linear"') : TINY.index("[engine]")]
    table = """kind = "programs"
decode_row_s = 0.001
prefill_programs_s = { 64 = 0.03, 32 = 0.02 }
decode_programs_s = { 1 = 0.01, 4 = 0.05 }

"""
    cost = profile_of(old, table).cost

    def prompt(tokens):
        tiles = -(-tokens // 32) * 32
        return StepWork(prefill_tokens=tokens, prefill_tile_tokens=tiles)

    assert cost.step_s(StepWork()) == 0.0
    times_s = [cost.step_s(prompt(tokens)) for tokens in (1, 32, 33, 64, 128)]
    assert times_s == pytest.approx([0.02, 0.02, 0.03, 0.03, 0.06])
    times_s = [cost.step_s(StepWork(decode_rows=rows)) for rows in (1, 2, 4, 8)]
    assert times_s == pytest.approx([0.011, 0.052, 0.054, 0.108])
    both = StepWork(prefill_tokens=40, prefill_tile_tokens=64, decode_rows=3)
    assert cost.step_s(both) == pytest.approx(0.083)
    assert cost.scaled(0.5).step_s(both) == pytest.approx(0.0415)

"""What this machine makes of the set-up: link, SLO, time constants and saturation."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from exp_rig import Job, Outcome, Rig
from exp_workload import Lengths, Request, Trace, choose_stop, scaled

from jchameleon.runtime.policy.presets import load_policy
from jchameleon.sampling import SamplingParams

PLAIN = "fifo-lru"
"""The preset of runs that calibrate or give the reference: nothing but an engine."""

PLAIN_DROP = {"preset": PLAIN, "eviction": {"name": "drop"}}
"""The same where every isolated request finds its adapter gone."""

FIFO = "s-lora"
"""The preset that defines saturation, and that all others are compared with."""

LOAD_SHARE = 0.175
"""Share of an isolated TTFT that the load of a largest adapter takes (Chameleon,
section 3: rank 128)."""

SLO_FACTOR = 5.0
"""SLO over the mean time of an isolated request (Chameleon, section 5.1)."""

PAPER_ISOLATED_S = 1.0
"""That mean in the paper, where the SLO is 5 s."""

REFRESH_S = 300.0
"""Between two derivations of lanes (Chameleon, section 4.3), on the paper's time scale.

A run is shorter than that, so its lanes are derived once: see `MIN_SAMPLES`.
"""

MIN_SAMPLES = 16
"""Lanes are derived when the warm-up ends, but from no fewer requests (our choice)."""

CLOSE_SHARE = 0.005
"""The link is not tuned any further once the share is so near."""

REPEATS = 9
ISOLATED_REQUESTS = 20
SLACK_TOKENS = 16
CLOSED_RUNS = 3
FULL_SHARE = 0.85
"""Of a closed run; after it the batch runs empty and the rate says less."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Everything that was measured once and then held for all runs.

    Attributes:
      prompt_tokens: of the isolated requests that define the link.
      own_load_share: of their TTFT, a rank-128 load without an emulated link.
      load_share: the same with the link; what it was set to reach is `LOAD_SHARE`.
      median_load_share: the same for a prompt of the workload's median length.
      ttft_resident_s, ttft_cold_s: medians that `load_share` comes from.
      isolated_s: mean time of an isolated request that loads its adapter.
      saturation_rps: of preset `FIFO`, all requests at once; median of a few runs.
    """

    prompt_tokens: int
    own_load_share: float
    load_share: float
    median_load_share: float
    ttft_resident_s: float
    ttft_cold_s: float
    link_bytes_per_s: float
    load_bytes: int
    isolated_s: float
    saturation_rps: float

    @property
    def slo_s(self) -> float:
        """Bound on P99 TTFT."""
        return SLO_FACTOR * self.isolated_s

    @property
    def time_scale(self) -> float:
        """Seconds here for a second of the paper's set-up."""
        return self.isolated_s / PAPER_ISOLATED_S

    def policy(self, preset: str, *, warm_requests: int) -> dict[str, Any]:
        """Return a preset with its time constants on this machine's scale."""
        table: dict[str, Any] = {"preset": preset}
        if load_policy(preset).admission.name == "chameleon":
            table["admission"] = {
                "slo_s": self.slo_s,
                "refresh_s": REFRESH_S * self.time_scale,
                "first_refresh_s": 0.0,
                "min_samples": max(warm_requests, MIN_SAMPLES),
            }
        return table


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """How a request runs undisturbed.

    Attributes:
      tokens: its output, with the stop token last.
    """

    tokens: tuple[int, ...]

    def job(self, request: Request, rig: Rig, *, max_tokens: int, at_s: float) -> Job:
        """Return the request as the experiment asks it: who runs it learns its length
        only when the stop token comes."""
        return Job(
            request_id=request.request_id,
            prompt=request.prompt(rig.vocab_size),
            sampling=SamplingParams(
                max_tokens=max_tokens,
                seed=request.seed,
                ignore_eos=True,
                stop_token_ids=(self.tokens[-1],),
                expected_tokens=len(self.tokens),
            ),
            adapter=request.adapter,
            at_s=at_s,
        )

    def first_difference(self, tokens: Sequence[int]) -> int | None:
        """Return the position of the first token that differs, None for the same."""
        if tuple(tokens) == self.tokens:
            return None
        pairs = zip(tokens, self.tokens, strict=False)
        shorter = min(len(tokens), len(self.tokens))
        return next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)


def references(rig: Rig, trace: Trace, *, max_tokens: int) -> list[Reference]:
    """Run every request of a trace undisturbed and choose what stops it.

    Each has pages for all that it may produce, so nothing is squashed or recomputed.

    Raises:
      RuntimeError: a request failed, or was disturbed after all.
    """
    jobs = [
        Job(
            request_id=request.request_id,
            prompt=request.prompt(rig.vocab_size),
            sampling=SamplingParams(
                max_tokens=min(request.output_tokens + SLACK_TOKENS, max_tokens),
                seed=request.seed,
                ignore_eos=True,
            ),
            adapter=request.adapter,
        )
        for request in trace
    ]
    with rig.session(PLAIN, None) as session:
        outcomes = session.play(jobs)
        books = session.books()
    if books.squashes:
        raise RuntimeError(f"{books.squashes} squashes in a run that should have none")
    found = []
    for request, done in zip(trace, outcomes, strict=True):
        check(done)
        length = choose_stop(done.tokens, request.output_tokens)
        found.append(Reference(tokens=done.tokens[:length]))
    return found


def check(done: Outcome) -> Outcome:
    """Return an outcome; RuntimeError where the request failed."""
    if done.failed:
        raise RuntimeError(f"a request ended as {done.finish_reason}: {done.error}")
    return done


def calibrate_rig(
    rig: Rig,
    trace: Trace,
    lengths: Lengths,
    largest: Sequence[str],
    *,
    scale: float,
    max_tokens: int,
    max_model_len: int,
) -> Calibration:
    """Measure everything of `Calibration`, on a trace that no run uses.

    Args:
      largest: the adapters of the largest rank.
    """
    median_tokens = min(scaled(lengths.median_prompt, scale), max_model_len - 1)
    link = set_link(rig, largest, median_tokens, max_model_len)
    bytes_per_s = link["link_bytes_per_s"]
    jobs = [
        reference.job(request, rig, max_tokens=max_tokens, at_s=0.0)
        for request, reference in zip(
            trace, references(rig, trace, max_tokens=max_tokens), strict=True
        )
    ]
    with rig.session(PLAIN_DROP, bytes_per_s) as session:
        isolated_s = statistics.fmean(
            check(session.play([job])[0]).timing.total_s
            for job in jobs[:ISOLATED_REQUESTS]
        )
    rates_rps = [closed_rps(rig, jobs, bytes_per_s) for _ in range(CLOSED_RUNS)]
    return Calibration(
        **link, isolated_s=isolated_s, saturation_rps=statistics.median(rates_rps)
    )


def set_link(
    rig: Rig, largest: Sequence[str], median_tokens: int, max_model_len: int
) -> dict[str, Any]:
    """Find the bandwidth at which a load takes its share of an isolated TTFT.

    That of the shortest of 1, 2 and 4 median prompts for which the machine's own cost
    of a load leaves room for a link (our choice). What a load costs beside the link
    (staging, commit) counts too, so the link is tuned until the whole is right.

    Returns:
      The fields of `Calibration` that it settles.
    """
    load_bytes = rig.device_bytes(largest[0])
    for factor in (1, 2, 4):
        if factor > 1 and factor * median_tokens >= max_model_len:
            break
        prompt_tokens = factor * median_tokens
        own = isolated_ttft(rig, largest, prompt_tokens, None)
        if own.load_share <= LOAD_SHARE:
            break
    link_s = own.resident_s * LOAD_SHARE / (1 - LOAD_SHARE)
    tried: list[tuple[float, Isolated]] = []
    for _ in range(4):
        found = isolated_ttft(rig, largest, prompt_tokens, load_bytes / link_s)
        tried.append((load_bytes / link_s, found))
        if abs(found.load_share - LOAD_SHARE) < CLOSE_SHARE:
            break
        wanted_s = found.resident_s * LOAD_SHARE / (1 - LOAD_SHARE)
        link_s = max(link_s / 2, link_s + wanted_s - found.load_s)
    bytes_per_s, isolated = min(
        tried, key=lambda one: abs(one[1].load_share - LOAD_SHARE)
    )
    at_median = isolated
    if prompt_tokens != median_tokens:
        at_median = isolated_ttft(rig, largest, median_tokens, bytes_per_s)
    return {
        "prompt_tokens": prompt_tokens,
        "own_load_share": own.load_share,
        "load_share": isolated.load_share,
        "median_load_share": at_median.load_share,
        "ttft_resident_s": isolated.resident_s,
        "ttft_cold_s": isolated.cold_s,
        "link_bytes_per_s": bytes_per_s,
        "load_bytes": load_bytes,
    }


def closed_rps(rig: Rig, jobs: Sequence[Job], link_bytes_per_s: float) -> float:
    """Return how many requests end a second when all are there from the start."""
    with rig.session(FIFO, link_bytes_per_s) as session:
        ends_s = sorted(check(done).token_s[-1] for done in session.play(jobs))
    full = max(1, int(FULL_SHARE * len(ends_s)))
    return full / ends_s[full - 1]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Isolated:
    """Median TTFT of isolated requests, adapter on the device or to be loaded."""

    resident_s: float
    cold_s: float

    @property
    def load_s(self) -> float:
        """What the load adds."""
        return self.cold_s - self.resident_s

    @property
    def load_share(self) -> float:
        """What the load adds, as a share of the whole."""
        return self.load_s / self.cold_s


def isolated_ttft(
    rig: Rig,
    adapters: Sequence[str],
    prompt_tokens: int,
    link_bytes_per_s: float | None,
) -> Isolated:
    """Measure TTFT with resident and with absent adapters, in turn.

    Args:
      adapters: of one rank, more than the pool holds. The first is asked for in every
        other request and so stays; the others are gone when their turn comes again.
    """
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, rig.vocab_size, prompt_tokens).tolist()
    sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    ttft_s: dict[bool | None, list[float]] = {True: [], False: []}
    with rig.session(PLAIN, link_bytes_per_s) as session:
        for turn in range(2 * REPEATS + 2):
            name = adapters[1 + turn // 2 % (len(adapters) - 1)]
            job = Job(
                request_id="isolated",
                prompt=prompt,
                sampling=sampling,
                adapter=adapters[0] if turn % 2 else name,
            )
            done = check(session.play([job])[0])
            if turn > 1:  # the first of each kind warm up
                hit = done.timing.adapter_cache_hit
                assert hit is bool(turn % 2), "the pool holds more than it should"
                ttft_s[hit].append(done.token_s[0])
    return Isolated(
        resident_s=statistics.median(ttft_s[True]),
        cold_s=statistics.median(ttft_s[False]),
    )

"""Figures 2, 3 and 10: requests on an idle engine, and the admission example."""

from collections.abc import Sequence
from typing import Any

from paper_figures import RANKS, Figure, Scale, Seen, check, panel
from paper_verdicts import Claim

from jchameleon.config import EngineConfig
from jchameleon.runtime.policy.build import build_planner
from jchameleon.runtime.policy.events import Event
from jchameleon.runtime.policy.plan import Plan
from jchameleon.sim import Load, Profile, load_profile
from jchameleon.sim.linear import LinearCost
from jchameleon.sim.link import LinkConfig
from jchameleon.sim.report import settings
from jchameleon.sim.simulator import SimAdapter, Simulator
from jchameleon.workload.generator import Drawn

Built = tuple[list[dict[str, Any]], list[dict[str, Any]]]

MEDIUM_TOKENS = 256
"""Of figure 2's "medium" request: an inference, see `jchameleon.sim.linear`."""

TTFT_MS = (74.0, 78.0, 88.0, 107.0, 144.0)
"""Figure 2, by rank."""

PROMPTS = (250, 500, 1000, 1500, 2000)
APART_S = 100.0


def _profile(scale: Scale, variant: str) -> Profile:
    return load_profile(scale.world.profile, None if variant == "default" else variant)


def _ttft_ms(profile: Profile, requests: Sequence[tuple[str | None, int]]) -> list:
    """Return TTFTs of (adapter, prompt tokens), one after the other, cache cold."""
    engine = EngineConfig(
        policy="fifo-lru",
        max_running=profile.engine.max_running,
        max_batch_tokens=profile.engine.max_batch_tokens,
        kv_block_tokens=profile.engine.kv_block_tokens,
    )
    simulator = Simulator(
        build_planner(engine, profile.num_pages),
        profile.cost,
        profile.link,
        profile.sim_adapters(),
        page_bytes=profile.page_bytes,
    )
    drawn = [
        Drawn(APART_S * index, adapter, None, tokens, 1)
        for index, (adapter, tokens) in enumerate(requests)
    ]
    result = simulator.run(drawn, max_tokens=1)
    return (1e3 * result.samples.ttft_s).tolist()


def _settings(scale: Scale, profile: Profile) -> dict[str, Any]:
    return settings(profile, profile.engine, Load(rate_rps=1.0))


def _build_2(seen: Seen) -> Built:
    panels, checks = [], []
    for variant in seen.scale.variants:
        profile = _profile(seen.scale, variant)
        base: list[tuple[str | None, int]] = [(None, MEDIUM_TOKENS)]
        twice = [
            (f"r{rank}-0", MEDIUM_TOKENS) for rank in RANKS for _ in ("cold", "there")
        ]
        bare_ms, *rest = _ttft_ms(profile, base + twice)
        cold, resident = rest[::2], rest[1::2]
        chart = {
            "kind": "bars",
            "title": f"TTFT of {MEDIUM_TOKENS} tokens and its parts, ms, {variant}",
            "up": "ms",
            "groups": [f"rank {rank}" for rank in RANKS],
            "series": {
                "paper, TTFT": list(TTFT_MS),
                "TTFT": cold,
                "base": [bare_ms for _ in RANKS],
                "adapter compute": [ms - bare_ms for ms in resident],
                "load": [a - b for a, b in zip(cold, resident, strict=True)],
            },
        }
        panels.append(panel(variant, _settings(seen.scale, profile), chart))
        for rank, paper, ours in zip(RANKS, TTFT_MS, cold, strict=True):
            what = f"TTFT, rank {rank}"
            claim = Claim(row="", what=what, paper=paper, unit="ms")
            checks.append(check(variant, claim, [ours]))
        for what, paper, part in (
            ("load, rank 128, share of TTFT", 17.5, cold[-1] - resident[-1]),
            ("load and compute, rank 128, share of TTFT", 60.0, cold[-1] - bare_ms),
        ):
            claim = Claim(row="", what=what, paper=paper, unit="%")
            checks.append(check(variant, claim, [100 * part / cold[-1]]))
    return panels, checks


def _build_3(seen: Seen) -> Built:
    panels, checks = [], []
    for variant in seen.scale.variants:
        profile = _profile(seen.scale, variant)
        series = {}
        for rank in RANKS:
            asked = [(f"r{rank}-0", tokens) for tokens in (1, *PROMPTS)]
            _, *found = _ttft_ms(profile, asked)
            series[f"rank {rank}"] = [
                [tokens, ms] for tokens, ms in zip(PROMPTS, found, strict=True)
            ]
        chart = {
            "kind": "lines",
            "title": f"TTFT, adapter resident, ms, {variant}",
            "across": "prompt tokens",
            "up": "ms",
            "series": series,
        }
        panels.append(panel(variant, _settings(seen.scale, profile), chart))
        what = "TTFT of 2,000 tokens, rank 128, read off the plot"
        claim = Claim(row="", what=what, paper=800.0, unit="ms")
        checks.append(check(variant, claim, [series["rank 128"][-1][1]]))
    return panels, checks


SIZES = ("small", "medium", "large")
_TOKENS = {"small": 80, "medium": 160, "large": 320}
_SEEN = {"small": 48, "medium": 16, "large": 4}
_ADAPTER_PAGES, _BLOCK_TOKENS, _POOL_PAGES = 10, 16, 178
_BURST_S = 400.0


def admitted(burst: Sequence[str]) -> list[dict[str, int]]:
    """Return what Chameleon admits at once of a burst: by size, then by lane.

    Requests of three sizes come one by one first, so many of each that lanes for them
    get quotas of three small, two medium and one large request, and little more: they
    cost 320, 480 and 800 tokens, the adapter that all share included.
    """
    policy = {
        "preset": "chameleon",
        "admission": {
            "max_lanes": 3,
            "slo_s": 1e6,
            "first_refresh_s": 4.0 * (sum(_SEEN.values()) - 1),
            "refresh_s": 1e6,
        },
        "predictor": {"name": "oracle"},
    }
    engine = EngineConfig(
        policy=policy, max_running=64, max_batch_tokens=4096, kv_block_tokens=16
    )
    before = [size for size in SIZES for _ in range(_SEEN[size])][::-1]
    sizes = [*before, *burst]
    requests = [
        Drawn(
            min(4.0 * index, _BURST_S) if index < len(before) else _BURST_S,
            "shared",
            None,
            _TOKENS[size],
            _TOKENS[size],
        )
        for index, size in enumerate(sizes)
    ]
    chosen: list[tuple[int, int]] = []

    def observe(now_s: float, events: tuple[Event, ...], plan: Plan) -> None:
        mine = [(int(one), lane) for one, lane, _ in plan.lanes]
        mine = [(index, lane) for index, lane in mine if index >= len(before)]
        if mine and not chosen:
            chosen.extend(mine)

    Simulator(
        build_planner(engine, _POOL_PAGES),
        LinearCost(prefill_s=0.01, decode_s=0.01),
        LinkConfig(bytes_per_s=1e9),
        [SimAdapter(uid="shared", rank=8, num_pages=_ADAPTER_PAGES)],
        page_bytes=1000,
        observe=observe,
    ).run(requests, max_tokens=None)
    found = [sizes[index] for index, _ in chosen]
    return [
        {size: found.count(size) for size in SIZES},
        {size: sum(lane == i for _, lane in chosen) for i, size in enumerate(SIZES)},
    ]


EXAMPLES = {
    "a": (["large", "medium", "medium", *["small"] * 4], (3, 2, 1)),
    "b": (["large", "large", "medium", *["small"] * 4], (4, 1, 1)),
}
"""Figure 10: who waits, and how many of each size start."""


def _build_10(seen: Seen) -> Built:
    charts, checks = [], []
    for name, (burst, paper) in EXAMPLES.items():
        by_size, _ = admitted(burst)
        charts.append(
            {
                "kind": "bars",
                "title": f"Admitted at once, example {name}",
                "up": "requests",
                "groups": list(SIZES),
                "series": {
                    "waiting": [burst.count(size) for size in SIZES],
                    "paper": list(paper),
                    "admitted": [by_size[size] for size in SIZES],
                },
            }
        )
        for size, count in zip(SIZES, paper, strict=True):
            what = f"example {name}: {size} requests admitted"
            claim = Claim(row="", what=what, paper=float(count), unit="requests")
            checks.append(check("default", claim, [float(by_size[size])]))
    profile = _profile(seen.scale, "default")
    own = {
        **_settings(seen.scale, profile),
        "profile": "an example of its own",
        "cost_kind": "linear",
    }
    return [panel("default", own, *charts)], checks


FIGURES = (
    Figure(
        number="2",
        title="TTFT of one request by rank",
        shows="An idle engine; 256 tokens is our reading of a medium request. Costs "
        "are fitted to this figure, so it says that the simulator adds them up.",
        cells=lambda scale: [],
        build=_build_2,
    ),
    Figure(
        number="3",
        title="TTFT over prompt tokens",
        shows="An idle engine, the adapter resident.",
        cells=lambda scale: [],
        build=_build_3,
    ),
    Figure(
        number="10",
        title="Admission example",
        shows="Lanes for small, medium and large whose quotas suffice for 3, 2 and 1; "
        "in (b) medium has one request, and its spare tokens admit the fourth small "
        "one and do not suffice for a second large one. Settings of its own.",
        cells=lambda scale: [],
        build=_build_10,
    ),
)

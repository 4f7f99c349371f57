"""How near the simulator comes to the real engine, here, on one model.

Two kinds of runs of the engine take turns, so that a machine that drifts drifts for
both: those that the cost model is fitted to, and those that it is checked on, of other
seeds, loads and arrivals. Every round repeats the checked ones, which says how far the
engine is from itself. Then each is simulated: same requests, same policy, same pool,
same emulated link. Printed are both figures, their ratio and how it stands to the bars;
the JSON has all of it.

    python tools/validate_twin.py --json twin.json                # half an hour, idle
    python tools/validate_twin.py --model tiny                    # minutes
    python tools/validate_twin.py --quick                         # a tiny case
"""

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from exp_policies import write_adapters
from exp_rig import Job, Outcome, Rig
from fit_cost_model import Log, fit_link, fit_logs, read_log
from twin_bars import cells_of, judge

from jchameleon.config import ATTENTION_PROJECTIONS, EngineConfig, ModelConfig
from jchameleon.runtime.policy.build import build_planner
from jchameleon.sampling import SamplingParams
from jchameleon.sim.fitted import Fit
from jchameleon.sim.link import LinkConfig
from jchameleon.sim.profile import AdapterMix
from jchameleon.sim.simulator import SimAdapter, Simulator
from jchameleon.workload.generator import Drawn, Length, Planned, Popularity, Workload

FIT_SEED = 1000
"""First seed of the runs that are fitted to; that of checked ones is 0."""


@dataclasses.dataclass(frozen=True, slots=True)
class Traffic:
    """How requests come, and whom they ask for.

    Attributes:
      load: share of saturation: of the rate at which requests end when all are there
        at once.
    """

    process: str
    load: float
    popularity: str = "power:1"

    def __str__(self) -> str:
        return f"{self.process} {self.popularity} {self.load:g}"


FITTED = (
    Traffic("poisson", 0.5),
    Traffic("poisson", 0.9),
    Traffic("gamma:1.5", 0.6, "uniform"),
)
CHECKED = (
    Traffic("poisson", 0.4),
    Traffic("poisson", 0.7),
    Traffic("gamma:2", 0.5, "uniform"),
)

FIGURES = ("ttft_s", "tbt_s", "e2e_s")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is run.

    Attributes:
      requests: of each run.
      rounds: a fitted and a checked run of each preset and traffic in each.
      pool_pages: fewer than all adapters take.
    """

    model: str = "smollm2-135m"
    presets: tuple[str, ...] = ("s-lora", "chameleon-nosched", "chameleon")
    requests: int = 50
    rounds: int = 3
    adapters: int = 20
    pool_pages: int = 400
    max_running: int = 16
    max_batch_tokens: int = 256
    link_bytes_per_s: float = 1e9
    input_len: str = "lognormal:96:0.641:400"
    output_len: str = "lognormal:16:0.724:100"

    def workload(self, traffic: Traffic, saturation_rps: float, seed: int) -> Workload:
        """Return the requests of one run."""
        return Workload(
            process=traffic.process,
            rate_rps=traffic.load * saturation_rps,
            num_requests=self.requests,
            input_len=Length.parse(self.input_len),
            output_len=Length.parse(self.output_len),
            popularity=Popularity.parse(traffic.popularity),
            seed=seed,
            max_model_len=1024,
        )


TINY = {
    "model": "tiny",
    "requests": 200,
    "max_running": 32,
    "max_batch_tokens": 512,
    "link_bytes_per_s": 2e8,
    "input_len": "lognormal:255:0.641:1000",
    "output_len": "lognormal:32:0.724:250",
}

QUICK = {
    **TINY,
    "presets": ("s-lora",),
    "requests": 40,
    "rounds": 1,
    "adapters": 5,
    "pool_pages": 300,
    "max_running": 4,
    "max_batch_tokens": 64,
    "input_len": "16:64",
    "output_len": "4:16",
}


class Twin:
    """An engine, and all that its simulation needs."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._settings = settings
        self._folder = folder
        model = ModelConfig.preset(settings.model)
        self.ranks = AdapterMix(count=settings.adapters).names()
        named = {str(name): int(rank or 0) for name, rank in self.ranks.items()}
        self._options: dict[str, Any] = {
            "max_model_len": 1024,
            "max_running": settings.max_running,
            "max_batch_tokens": settings.max_batch_tokens,
            "lora_targets": ATTENTION_PROJECTIONS,
            "prefix_cache": False,
            "pool_bytes": settings.pool_pages * page_bytes(model),
        }
        self.page_bytes = page_bytes(model)
        self._rig = Rig(
            settings.model,
            write_adapters(folder, model, named, "float32"),
            self._options,
        )
        self._adapters = [
            SimAdapter(
                uid=name,
                rank=rank,
                num_pages=self._rig.device_bytes(name) // self.page_bytes,
            )
            for name, rank in named.items()
        ]

    def play(
        self, preset: str, planned: Sequence[Planned]
    ) -> tuple[list[Outcome], Mapping[str, int], Log]:
        """Run requests on the engine; return outcomes, counters and the plan log."""
        path = self._folder / "plans.gz"
        with self._rig.session(
            preset, self._settings.link_bytes_per_s, path
        ) as session:
            outcomes = session.play(list(jobs(planned)))
            books = session.books()
        for one in outcomes:
            if one.failed:
                raise RuntimeError(f"a request ended as {one.finish_reason}")
        return outcomes, counters(books), read_log(path)

    def simulate(
        self, preset: str, planned: Sequence[Planned], fit: Fit, link: LinkConfig
    ) -> tuple[dict[str, Any], Mapping[str, int]]:
        """Simulate the same requests."""
        engine = EngineConfig.from_dict({**self._options, "policy": preset})
        simulator = Simulator(
            build_planner(engine, self._rig.pool_pages + 2),
            fit.cost,
            link,
            self._adapters,
            page_bytes=self.page_bytes,
        )
        drawn = (
            Drawn(p.at_s, p.adapter, p.rank, len(p.prompt), p.output_tokens)
            for p in planned
        )
        result = simulator.run(drawn, max_tokens=None)
        samples = result.samples
        figures = summary(
            samples.last_s, samples.ttft_s, np.repeat(*samples.gaps), samples.e2e_s
        )
        return figures, counters(result.books)

    def saturation_rps(self) -> float:
        """Return the rate at which requests end when all are there from the start."""
        at_once = Traffic("poisson", math.inf)
        planned = self._settings.workload(at_once, 1.0, FIT_SEED - 1).plan(self.ranks)
        outcomes, *_ = self.play("s-lora", planned)
        return len(outcomes) / max(one.token_s[-1] for one in outcomes)


def page_bytes(model: ModelConfig) -> int:
    """Return the bytes of a float32 page in all layers."""
    return model.kv_elems * EngineConfig().kv_block_tokens * 4 * model.num_layers


def jobs(planned: Sequence[Planned]) -> Iterator[Job]:
    """Yield requests that run to their length, whatever they say."""
    for index, one in enumerate(planned):
        yield Job(
            request_id=str(index),
            prompt=one.prompt,
            sampling=SamplingParams(
                max_tokens=one.output_tokens,
                temperature=0.0,
                ignore_eos=True,
                expected_tokens=one.output_tokens,
            ),
            adapter=one.adapter,
            at_s=one.at_s,
        )


def counters(books: Any) -> dict[str, int]:
    """Return the planner's totals that a simulation must come near to."""
    names = ("hits", "misses", "loads", "evictions", "squashes")
    return {name: getattr(books, name) for name in names}


def summary(
    last_s: float,
    ttft_s: np.ndarray,  # f64[requests]
    gaps_s: np.ndarray,  # f64[tokens - requests]
    e2e_s: np.ndarray,  # f64[requests]
) -> dict[str, float]:
    """Return P50 and P99 of each, and requests per second until the last end."""
    values = dict(zip(FIGURES, (ttft_s, gaps_s, e2e_s), strict=True))
    throughput = {"throughput_rps": len(ttft_s) / last_s}
    return throughput | {
        f"{name}_p{percent}": float(np.percentile(values[name], percent))
        for name, percent in itertools.product(FIGURES, (50, 99))
    }


def measured(
    planned: Sequence[Planned], outcomes: Sequence[Outcome]
) -> dict[str, float]:
    """Return the figures of a run of the engine."""
    return summary(
        max(p.at_s + o.token_s[-1] for p, o in zip(planned, outcomes, strict=True)),
        np.array([one.token_s[0] for one in outcomes]),
        np.array([gap for one in outcomes for gap in one.gaps_s]),
        np.array([one.token_s[-1] for one in outcomes]),
    )


def validate(settings: Settings, folder: Path) -> dict[str, Any]:
    """Run, fit, simulate and compare."""
    twin = Twin(settings, folder)
    saturation_rps = twin.saturation_rps()
    log(f"saturation: {saturation_rps:.1f} requests/s")
    fitted_to: list[Log] = []
    checked: list[dict[str, Any]] = []
    for number in range(settings.rounds):
        for preset in settings.presets:
            for fitted, traffic in zip(FITTED, CHECKED, strict=True):
                other = settings.workload(fitted, saturation_rps, FIT_SEED + number)
                fitted_to.append(twin.play(preset, other.plan(twin.ranks))[-1])
                workload = settings.workload(traffic, saturation_rps, 0)
                planned = workload.plan(twin.ranks)
                outcomes, books, plans = twin.play(preset, planned)
                checked.append(
                    {
                        "preset": preset,
                        "traffic": str(traffic),
                        "round": number,
                        "engine": measured(planned, outcomes),
                        "engine_books": books,
                        "planned": planned,
                        "steps": list(plans.steps()),
                    }
                )
                log(f"round {number + 1} of {settings.rounds}: {preset}, {traffic}")
    fit = fit_logs(fitted_to)
    link = fit_link(
        fitted_to,
        fit,
        page_bytes=twin.page_bytes,
        bytes_per_s=settings.link_bytes_per_s,
    )
    errors: list[float] = []
    for run in checked:
        run["twin"], run["twin_books"] = twin.simulate(
            run["preset"], run.pop("planned"), fit, link
        )
        errors += [
            abs(fit.cost.step_s(step.work) / step.period_s - 1)
            for step in run.pop("steps")
            if not any(step.load_pages)
        ]
    return {
        "settings": dataclasses.asdict(settings),
        "saturation_rps": saturation_rps,
        "fit": dataclasses.asdict(fit),
        "link": dataclasses.asdict(link),
        "checked_steps": {
            "count": len(errors),
            "median_error": statistics.median(errors),
            "p90_error": float(np.percentile(errors, 90)),
        },
        "runs": checked,
        "checks": judge(checked),
    }


def print_report(report: Mapping[str, Any]) -> None:
    """Print the medians over rounds of both, and the median of their ratios."""
    steps, fit = report["checked_steps"], report["fit"]
    print(
        f"steps: median error {fit['median_error']:.1%} of {fit['samples']} that were "
        f"fitted to, {steps['median_error']:.1%} (P90 {steps['p90_error']:.1%}) of "
        f"{steps['count']} others\n"
    )
    names = [f"{figure}_p{percent}" for figure in FIGURES for percent in (50, 99)]
    heads = [name.replace("_s_p", " P") for name in names]
    print(
        "engine/twin ms and twin/engine [range]\n"
        f"{'preset':20}{'traffic':24}" + "".join(f"{head:>34}" for head in heads)
    )
    cells = cells_of(report["runs"])
    for (preset, traffic), runs in cells.items():
        line = f"{preset:20}{traffic:24}"
        for name in names:
            ratios = [run["twin"][name] / run["engine"][name] for run in runs]
            both = (
                1e3 * statistics.median(run[who][name] for run in runs)
                for who in ("engine", "twin")
            )
            text = "/".join(f"{value:.3g}" for value in both)
            text += f" {statistics.median(ratios):.2f}"
            text += f" [{min(ratios):.2f}-{max(ratios):.2f}]"
            line += f"{text:>34}"
        print(line)
    print("\ncounters, engine/twin, all runs")
    for (preset, traffic), runs in cells.items():
        totals = {
            who: {name: sum(run[who][name] for run in runs) for name in runs[0][who]}
            for who in ("engine_books", "twin_books")
        }
        parts = (
            f"{name} {totals['engine_books'][name]}/{totals['twin_books'][name]}"
            for name in totals["engine_books"]
        )
        print(f"{preset:20}{traffic:24}" + ", ".join(parts))
    print(
        "\nhow far the twin is off; the bar, or the engine's repeats if further apart"
    )
    for one in report["checks"]:
        print(
            f"{'ok  ' if one['ok'] else 'MISS'} {one['preset']:20}{one['traffic']:24}"
            f"{one['figure']:16}{one['off']:.3f} (bar {one['bar']:g}, engine "
            f"{one['engine_apart']:.3f})"
        )


def log(text: str) -> None:
    """Tell who waits how far it is."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("smollm2-135m", "tiny"))
    parser.add_argument("--preset", action="append", help="may be repeated")
    parser.add_argument("--requests", type=int, help="of each run")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true", help="a tiny case")
    parser.add_argument("--json", type=Path, help="write the report here")
    args = parser.parse_args()
    values: dict[str, Any] = dict(TINY) if args.model == "tiny" else {}
    if args.quick:
        if args.model not in (None, "tiny"):
            parser.error(f"--quick runs the tiny model, not --model {args.model}")
        values = dict(QUICK)
    if args.preset:
        values["presets"] = tuple(args.preset)
    for name in ("requests", "rounds"):
        if getattr(args, name) is not None:
            values[name] = getattr(args, name)
    with tempfile.TemporaryDirectory() as folder:
        report = validate(Settings(**values), Path(folder))
    print_report(report)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

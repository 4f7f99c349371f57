"""Fit the simulator's cost model to an engine's plan logs.

Prints tables of a profile for `jchameleon simulate`, and how well they tell the very
steps that they were fitted to; tools/validate_twin.py says how well they tell others.

    jchameleon generate ... --plan-log plans.gz        # or LLM(plan_log=...), or serve
    python tools/fit_cost_model.py plans.gz --link-bytes-per-s 20e9 --page-bytes 8388608
"""

import argparse
import dataclasses
import itertools
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from jchameleon.errors import JChameleonError
from jchameleon.runtime.policy.limits import PlannerConfig
from jchameleon.runtime.policy.log import read_plan_log
from jchameleon.sim.fitted import (
    Fit,
    Iteration,
    StepSample,
    fit_cost,
    load_latency_s,
    step_samples,
)
from jchameleon.sim.link import LinkConfig


@dataclasses.dataclass(frozen=True, slots=True)
class Log:
    """A plan log in memory."""

    limits: PlannerConfig
    iterations: list[Iteration]

    def steps(self) -> Iterator[StepSample]:
        """Yield what ran."""
        return step_samples(self.iterations, self.limits)


def read_log(path: Path) -> Log:
    """Return a plan log; ConfigError where it cannot be read."""
    log = read_plan_log(path)
    return Log(log.planner, list(log))


def fit_logs(logs: Sequence[Log]) -> Fit:
    """Return the fit of all steps of some logs.

    Raises:
      ConfigError: they have too few steps.
    """
    return fit_cost(itertools.chain.from_iterable(log.steps() for log in logs))


def fit_link(
    logs: Sequence[Log],
    fit: Fit,
    *,
    page_bytes: int,
    bytes_per_s: float,
) -> LinkConfig:
    """Return the link of known bandwidth, with what copies cost beside it."""
    page_s = page_bytes / bytes_per_s
    loads = [load for log in logs for *_, plan in log.iterations for load in plan.loads]
    if not loads:
        return LinkConfig(bytes_per_s=bytes_per_s)
    latency_s = load_latency_s([log.iterations for log in logs], page_s=page_s)
    pages = statistics.fmean(len(load.pages) for load in loads)
    # A stall is a share of the whole copy, latency included.
    stall = fit.load_page_s * pages / (page_s * pages + latency_s)
    return LinkConfig(bytes_per_s=bytes_per_s, latency_s=latency_s, stall=stall)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("logs", type=Path, nargs="+", metavar="LOG")
    parser.add_argument(
        "--link-bytes-per-s", type=float, help="of the link, for its stall"
    )
    parser.add_argument("--page-bytes", type=int, help="of a page in all layers")
    args = parser.parse_args()
    if (args.link_bytes_per_s is None) != (args.page_bytes is None):
        parser.error("--link-bytes-per-s and --page-bytes go together")
    try:
        logs = [read_log(path) for path in args.logs]
        fit = fit_logs(logs)
    except JChameleonError as error:
        sys.exit(f"fit_cost_model: {error}")
    print(
        f"# {fit.samples} steps, told with a median error of {fit.median_error:.1%}, "
        f"P90 {fit.p90_error:.1%}"
    )
    print('[cost]\nkind = "programs"')
    for name, value in dataclasses.asdict(fit.cost.work).items():
        if value:
            print(f"{name} = {value:.6g}")
    for name in ("prefill_programs_s", "decode_programs_s"):
        sizes = getattr(fit.cost, name).items()
        inside = ", ".join(f"{size} = {value:.6g}" for size, value in sizes)
        print(f"{name} = {{ {inside} }}")
    if args.page_bytes is not None:
        link = fit_link(
            logs, fit, page_bytes=args.page_bytes, bytes_per_s=args.link_bytes_per_s
        )
        print(f"\n[link]\nstall = {link.stall:.4g}")
        print(
            f"\n[engine]\nlink_bytes_per_s = {link.bytes_per_s:.6g}\n"
            f"link_latency_s = {link.latency_s:.4g}"
        )


if __name__ == "__main__":
    main()

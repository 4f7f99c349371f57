"""What an experiment found: its settings, its calibration and every run's figures."""

import dataclasses
import json
import math
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_machine import describe_machine, versions
from exp_calibration import Calibration, Reference
from exp_rig import Outcome

from jchameleon import __version__
from jchameleon.runtime.policy.plan import Books

PACKAGES = ("numpy", "jax", "jaxlib", "flax")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What all runs of one results file share.

    Attributes:
      trace: file that lengths come from; None for synthetic ones.
      max_model_len: None takes 99 of 100 prompts and the longest output.
      adapter_dtype: of the files.
      pool_share: pages of the pool over those of all adapters.
      warm_share: of the requests, not counted.
      threads: cores that everything is held to.
    """

    model: str
    trace: str | None
    scale: float
    num_requests: int
    max_model_len: int | None = None
    num_adapters: int = 100
    max_running: int = 32
    max_batch_tokens: int = 512
    dtype: str = "float32"
    adapter_dtype: str = "bfloat16"
    pool_share: float = 0.25
    warm_share: float = 0.15
    threads: int = 2


class Results:
    """Everything found so far, as it stands in a JSON file."""

    def __init__(self, path: Path | None, settings: Settings):
        """Read what an earlier command left.

        Raises:
          ValueError: it was run with other settings.
        """
        self._path = path
        self.state: dict[str, Any] = {
            "settings": dataclasses.asdict(settings),
            "commands": [],
            "machine": describe_machine(),
            "versions": {"jchameleon": __version__, **versions(PACKAGES)},
            "workload": {},
            "calibration": None,
            "references": {},
            "policies": {},
            "runs": [],
        }
        if path is not None and path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            for name, value in self.state["settings"].items():
                if found["settings"].get(name) != value:
                    raise ValueError(
                        f"{path} was made with {name}={found['settings'].get(name)!r}, "
                        f"not {value!r}: use the same settings or another file"
                    )
            self.state = found

    def note_command(self) -> None:
        """Note the command line that is about to add something."""
        self.state["commands"].append(shlex.join(["python", *sys.argv]))

    def save(self) -> None:
        """Write the file, whole or not at all."""
        if self._path is None:
            return
        new = self._path.with_name(self._path.name + ".new")
        new.write_text(json.dumps(self.state) + "\n", encoding="utf-8")
        os.replace(new, self._path)

    @property
    def calibration(self) -> Calibration | None:
        """What was measured before the first run."""
        found = self.state["calibration"]
        return None if found is None else Calibration(**found)

    def done(self, preset: str, load: float, seed: int) -> bool:
        """Return whether this run is there."""
        return any(
            (run["preset"], run["load"], run["seed"]) == (preset, load, seed)
            for run in self.state["runs"]
        )


def totals(books: Books) -> dict[str, Any]:
    """Return the engine's counters over a whole run, and its lanes at the end."""
    names = (
        "hits",
        "misses",
        "loads",
        "load_failures",
        "evictions",
        "bypasses",
        "squashes",
        "growth_squashes",
        "grown_pages",
        "stalls",
    )
    lanes = [dataclasses.asdict(lane) for lane in books.lanes]
    for lane in lanes:
        if math.isinf(lane["upper_wrs"]):
            lane["upper_wrs"] = None  # JSON has no infinity
    return {**{name: getattr(books, name) for name in names}, "lanes": lanes}


def count_warm(num_requests: int, warm_share: float) -> int:
    """Return how many requests at the start of a run only warm it up."""
    return math.ceil(warm_share * num_requests)


def figures(
    outcomes: Sequence[Outcome], found: Sequence[Reference], *, warm_share: float
) -> dict[str, Any]:
    """Return what a run shows of its requests; times of the counted ones.

    All requests are compared with their references, those that warm up included.
    """
    counted = outcomes[count_warm(len(outcomes), warm_share) :]
    ended = [done for done in counted if not done.failed]
    failed = [done for done in outcomes if done.failed]
    gaps_s = [gap for done in ended for gap in done.gaps_s]
    differences = [
        (index, one.first_difference(done.tokens))
        for index, (done, one) in enumerate(zip(outcomes, found, strict=True))
        if not done.failed
    ]
    different = [[index, at] for index, at in differences if at is not None]
    return {
        "counted": len(counted),
        "failed": len(failed),
        "first_error": failed[0].error if failed else None,
        "late_max_s": max(done.late_s for done in outcomes),
        "ttft_s": rounded(done.token_s[0] for done in ended),
        "e2e_s": rounded(done.token_s[-1] for done in ended),
        "queue_s": rounded(done.timing.queue_s for done in ended),
        "load_s": rounded(done.timing.adapter_load_s for done in ended),
        "tbt_p50_s": percentile(gaps_s, 50),
        "tbt_p99_s": percentile(gaps_s, 99),
        "mismatches": len(different),
        "first_differences": different,
    }


def rounded(seconds: Iterator[float]) -> list[float]:
    """Return times to the microsecond."""
    return [round(value, 6) for value in seconds]


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile, interpolated linearly; NaN of nothing."""
    return float(np.percentile(values, percent)) if len(values) else math.nan

"""Cells: single simulations that figures are made of, each kept as a file of its own.

A cell's file is named by a hash of all that its result depends on: its settings, the
trace, the profile and the sources of simulator, policies and workload. So a run that
was interrupted goes on where it was, and a result of other code is never taken for one
of this.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from paper_records import Records, isolated_s

import jchameleon
from jchameleon.config import ModelConfig
from jchameleon.errors import ConfigError
from jchameleon.sim import Load, Profile, find_load, load_profile
from jchameleon.sim.report import build_report
from jchameleon.sim.roofline import load_gpu, roofline_cost
from jchameleon.sim.run import run_once, settle
from jchameleon.workload.arrivals import Trace, read_trace
from jchameleon.workload.generator import Popularity

SOURCES = ("sim", "workload", "runtime/policy", "lora/layout.py", "config.py")
"""Of the package: what a simulation's result comes from."""

SLO_TIMES = 5.0
"""SLO = 5 x the mean time of a request on an idle system (Chameleon, section 5.1)."""

SLO_SAMPLES = 2000
PAPER_MEMORY_BYTES = 48e9
"""Of the A40 that the profile's pool belongs to."""

# Ends of the output-length classes of `NoisyOracle`; policies see scaled lengths.
CUTS_TOKENS = (42, 141, 294, 503)

POLICIES: dict[str, Any] = {
    name: name
    for name in (
        "s-lora",
        "chameleon-nocache",
        "chameleon-nosched",
        "chameleon",
        "sjf",
        "lru",
        "fairshare",
        "gdsf",
        "histogram",
        "adaptive",
    )
}
POLICIES["static lanes"] = {
    "preset": "chameleon",
    "source": "chameleon, 4 static equal lanes",
    "admission": {"lanes": "static"},
}
POLICIES["exact lengths"] = {
    "preset": "chameleon",
    "source": "chameleon, exact lengths",
    "predictor": {"name": "oracle"},
}
ACCURACIES = (0.6, 0.8, 1.0)
for accuracy in ACCURACIES:
    POLICIES[f"accuracy {accuracy:.0%}"] = {
        "preset": "chameleon",
        "source": f"chameleon, {accuracy:.0%} of length classes right",
        "predictor": {
            "name": "noisy-oracle",
            "accuracy": accuracy,
            "within_one": max(0.93, accuracy),
        },
    }
"""By the names that figures use."""

POPULARITIES = {
    "U-U": Popularity(),
    "U-P": Popularity.parse("power:1"),
    "P-P": Popularity.parse("power:1:1"),
}
"""Of ranks and of the adapters of a rank: uniform or by a power law."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """What all cells of a run share.

    Attributes:
      trace: a file to draw lengths from; None is the profile's own law.
      duration_s: of arrivals.
    """

    profile: Path
    trace: Path | None
    duration_s: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One simulation, or one scan of rates with one seed.

    Attributes:
      variant: of the profile; "default" is the profile as it is.
      policy: one of `POLICIES`.
      rate_rps: of a simulation; 0 where `rates_rps` are scanned for the SLO instead.
      changes: (name, value) of what differs from the profile; see `changed`.
    """

    variant: str
    policy: str
    seed: int
    rate_rps: float = 0.0
    rates_rps: tuple[float, ...] = ()
    changes: tuple[tuple[str, Any], ...] = ()


def changed(profile: Profile, changes: Sequence[tuple[str, Any]]) -> Profile:
    """Return a profile with some of it replaced.

    Names: "adapters" (their number), "ranks", "popularity" (one of `POPULARITIES`),
    "length_scale" (factor on the profile's), "max_batch_tokens", "device" (GPU, model,
    bytes of memory).
    """
    replace = dataclasses.replace
    for name, value in changes:
        if name == "adapters":
            adapters = replace(profile.adapters, count=value)
            profile = replace(profile, adapters=adapters)
        elif name == "ranks":
            adapters = replace(profile.adapters, ranks=tuple(value))
            profile = replace(profile, adapters=adapters)
        elif name == "popularity":
            workload = replace(profile.workload, popularity=POPULARITIES[value])
            profile = replace(profile, workload=workload)
        elif name == "length_scale":
            scale = profile.workload.length_scale * value
            workload = replace(profile.workload, length_scale=scale)
            profile = replace(profile, workload=workload)
        elif name == "max_batch_tokens":
            engine = replace(profile.engine, max_batch_tokens=value)
            profile = replace(profile, engine=engine)
        elif name == "device":
            profile = _on_device(profile, *value)
        else:
            raise ConfigError(f"change={name!r} is unknown")
    return profile


def _on_device(
    profile: Profile, gpu: str, model_name: str, memory_bytes: float
) -> Profile:
    """Return the profile for another GPU and model, with costs by roofline.

    What the A40's memory has beside weights and pool is kept free here as well.
    """
    model = ModelConfig.preset(model_name)
    kept = PAPER_MEMORY_BYTES - weight_bytes(profile.model)
    kept -= profile.engine.pool_bytes or 0
    pool_bytes = int(memory_bytes - weight_bytes(model) - kept)
    targets = profile.layout.targets
    profile = dataclasses.replace(
        profile,
        name=f"{profile.name} on {gpu}, {model_name}, {memory_bytes / 1e9:g} GB",
        model=model,
        cost_kind="roofline",
        cost=roofline_cost(model, load_gpu(gpu), targets),
        engine=dataclasses.replace(profile.engine, pool_bytes=pool_bytes),
    )
    return profile


def weight_bytes(model: ModelConfig) -> float:
    """Return what a model's weights take in bfloat16, norms aside."""
    names = ("q", "k", "v", "o", "gate", "up", "down")
    shapes = [model.projection_shape(name) for name in names]
    layer = sum(d_in * d_out for d_in, d_out in shapes)
    return 2.0 * (model.num_layers * layer + 2 * model.vocab_size * model.hidden_size)


def slo_s(profile: Profile, trace: Trace | None) -> float:
    """Return `SLO_TIMES` the mean time of the workload's requests when alone."""
    load = Load(rate_rps=1.0, trace=trace)
    settled, _ = settle(profile, load)
    workload = dataclasses.replace(
        settled.workload, num_requests=SLO_SAMPLES, duration_s=None
    )
    alone_s = [
        isolated_s(
            profile,
            prompt_tokens=one.prompt_tokens,
            output_tokens=min(one.output_tokens, profile.max_tokens),
            rank=one.rank or 0,
        )
        for one in workload.draw(profile.adapters.names(), trace)
    ]
    return SLO_TIMES * float(np.mean(alone_s))


def policy_of(name: str, profile: Profile, *, slo: float | None) -> Any:
    """Return a policy as `LLM` takes it, fitted to a profile's lengths and SLO."""
    policy = POLICIES[name]
    if isinstance(policy, Mapping) and "noisy-oracle" in str(policy):
        scale = profile.workload.length_scale
        cuts = [max(1, round(scale * cut)) for cut in CUTS_TOKENS]
        policy = {**policy, "predictor": {**policy["predictor"], "cuts": cuts}}
    if slo is not None and name == "chameleon":
        policy = {"preset": name, "source": name, "admission": {"slo_s": slo}}
    return policy


def run_cell(world: World, cell: Cell) -> dict[str, Any]:
    """Simulate one cell.

    Raises:
      ConfigError: profile, trace or settings are wrong.
    """
    variant = None if cell.variant == "default" else cell.variant
    profile = changed(load_profile(world.profile, variant), cell.changes)
    trace = None if world.trace is None else _trace(world.trace)
    slo = None
    if profile.cost_kind == "roofline":
        slo = slo_s(profile, trace)
        profile = dataclasses.replace(profile, slo_s=slo)
    load = Load(
        policy=policy_of(cell.policy, profile, slo=slo),
        rate_rps=cell.rate_rps or cell.rates_rps[0],
        seed=cell.seed,
        trace=trace,
        duration_s=world.duration_s,
    )
    if cell.rates_rps:
        found = find_load(profile, load, rates_rps=cell.rates_rps, num_seeds=1)
        return {"scan": found["seeds"][0], "settings": found["settings"]}
    settled, engine = settle(profile, load)
    records = Records(settled)
    result = run_once(settled, engine, load, records)
    report = build_report(settled, engine, load, result)
    report["lanes"] = len(result.books.lanes)
    report["figures"] = records.figures(result.start_s)
    return report


@functools.cache
def _trace(path: Path) -> Trace:
    return read_trace(path)


@functools.cache
def fingerprint(world: World) -> str:
    """Return a hash of the files that every result depends on."""
    root = Path(jchameleon.__file__).parent
    paths = [Path(__file__), Path(__file__).with_name("paper_records.py")]
    for name in SOURCES:
        path = root / name
        paths += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for path in (*paths, world.profile, *([world.trace] if world.trace else [])):
        try:
            digest.update(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


class Store:
    """Results on disk, by cell."""

    def __init__(self, folder: Path, world: World) -> None:
        """Make the folder if there is none.

        Raises:
          ConfigError: it cannot be made, or a file cannot be read.
        """
        self.world = world
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make {folder}: {error.strerror}") from error
        self._fingerprint = fingerprint(world)

    def path(self, cell: Cell) -> Path:
        """Return where a cell's result is, or will be."""
        facts = [self._fingerprint, self.world.duration_s, dataclasses.asdict(cell)]
        text = json.dumps(facts, sort_keys=True)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def load(self, cell: Cell) -> dict[str, Any] | None:
        """Return a cell's result; None where there is none, or half of one."""
        try:
            kept = json.loads(self.path(cell).read_text("utf-8"))
            return kept["result"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, cell: Cell, result: Mapping[str, Any]) -> None:
        """Keep a result; a file is there whole or not at all.

        Raises:
          ConfigError: it cannot be written.
        """
        path = self.path(cell)
        kept = {"cell": dataclasses.asdict(cell), "result": result}
        try:
            with tempfile.NamedTemporaryFile(
                "w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8"
            ) as file:
                json.dump(kept, file)
            os.replace(file.name, path)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def run_cells(
    store: Store, cells: Iterable[Cell], *, processes: int = 2
) -> dict[Cell, dict[str, Any]]:
    """Return the result of every cell; those that the store has are not run again.

    Raises:
      ConfigError: as `run_cell`.
      KeyboardInterrupt: as it came; what was finished by then is kept.
    """
    wanted = list(dict.fromkeys(cells))
    results = {cell: kept for cell in wanted if (kept := store.load(cell)) is not None}
    left = [cell for cell in wanted if cell not in results]
    begin_s = shown_s = time.monotonic()
    for done, (cell, result) in enumerate(_ran(store.world, left, processes), 1):
        store.save(cell, result)
        results[cell] = result
        now_s = time.monotonic()
        if now_s - shown_s > 10 or done == len(left):
            shown_s = now_s
            print(
                f"{done} of {len(left)} cells in {now_s - begin_s:.0f} s, "
                f"{len(wanted) - len(left)} were there",
                file=sys.stderr,
                flush=True,
            )
    # As JSON has them, whether they were run or read.
    return {cell: json.loads(json.dumps(results[cell])) for cell in wanted}


def _ran(
    world: World, cells: Sequence[Cell], processes: int
) -> Iterable[tuple[Cell, dict[str, Any]]]:
    if processes == 1 or len(cells) < 2:
        for cell in cells:
            yield cell, run_cell(world, cell)
        return
    # Spawned: what a thread of this process holds is not inherited.
    with concurrent.futures.ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), _ignore_interrupts
    ) as pool:
        futures = {pool.submit(run_cell, world, cell): cell for cell in cells}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _ignore_interrupts() -> None:
    """Let the parent alone see Ctrl-C: it ends when running cells are done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def geometric(low: float, high: float, ratio: float) -> tuple[float, ...]:
    """Return rates from `low` to `high`, each `ratio` times the one before."""
    count = math.floor(math.log(high / low) / math.log(ratio) + 1e-9) + 1
    return tuple(round(low * ratio**i, 3) for i in range(count))

"""One run: a profile, a policy, a load and a seed make a report."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from jchameleon.config import EngineConfig
from jchameleon.runtime.policy.build import build_planner
from jchameleon.runtime.policy.planner import Planner
from jchameleon.sim.cost import CostModel
from jchameleon.sim.load import Load
from jchameleon.sim.profile import Profile
from jchameleon.sim.report import build_report
from jchameleon.sim.simulator import Observer, SimResult, Simulator
from jchameleon.workload.arrivals import Trace
from jchameleon.workload.generator import Drawn, Length


def simulate(profile: Profile, load: Load) -> dict[str, Any]:
    """Run one load to its end and return its report, plain values for JSON.

    The same arguments give the same report, to the last bit.

    Raises:
      ConfigError: the load or its policy is wrong.
      PolicyError, SimulationError: the policy does not do its work.
    """
    profile, engine = settle(profile, load)
    return build_report(profile, engine, load, run_once(profile, engine, load))


def settle(profile: Profile, load: Load) -> tuple[Profile, EngineConfig]:
    """Return the profile and the engine's configuration that a load makes of them."""
    workload = dataclasses.replace(
        profile.workload, rate_rps=load.rate_rps, seed=load.seed
    )
    if load.trace is not None:
        of_trace = Length(of_trace=True)
        workload = dataclasses.replace(
            workload, input_len=of_trace, output_len=of_trace, trace_order="drawn"
        )
    if load.duration_s is not None:
        workload = dataclasses.replace(workload, duration_s=load.duration_s)
    if load.process is not None:
        workload = dataclasses.replace(workload, process=load.process)
    engine = profile.engine
    if load.policy is not None:
        engine = dataclasses.replace(engine, policy=load.policy)
    return dataclasses.replace(profile, workload=workload), engine


def run_once(
    profile: Profile,
    engine: EngineConfig,
    load: Load,
    observe: Observer | None = None,
    *,
    planner: Planner | None = None,
    cost: CostModel | None = None,
    drawn: Iterable[Drawn] | None = None,
) -> SimResult:
    """Run what `settle` returned.

    Args:
      planner: a new one to run, in place of one that is built here.
      cost: in place of the profile's.
      drawn: requests by arrival, in place of those of the workload.
    """
    simulator = Simulator(
        planner or build_planner(engine, profile.num_pages),
        cost or profile.cost,
        profile.link,
        profile.sim_adapters(),
        page_bytes=profile.page_bytes,
        observe=observe,
    )
    if profile.warm_cache:
        simulator.warm_up(profile.num_pages - profile.largest_request_pages)
    return simulator.run(
        requests(profile, load.trace) if drawn is None else drawn,
        max_tokens=profile.max_tokens,
        skip_s=profile.skip_s,
    )


def requests(profile: Profile, trace: Trace | None) -> Iterator[Drawn]:
    """Return the requests of a run, as they come."""
    return profile.workload.draw(profile.adapters.names(), trace)

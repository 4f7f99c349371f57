"""Small worlds for the simulator's tests."""

from jchameleon.config import EngineConfig
from jchameleon.runtime.policy.build import build_planner
from jchameleon.sim.linear import LinearCost
from jchameleon.sim.link import LinkConfig
from jchameleon.sim.simulator import SimAdapter, Simulator
from jchameleon.workload.generator import Drawn

COST = LinearCost(
    prefill_s=0.02,
    prefill_token_s=1e-3,
    decode_s=0.03,
    decode_row_s=1e-3,
    decode_rank_s=1e-5,
)
LINK = LinkConfig(bytes_per_s=1e6, latency_s=0.01)


def adapters_of(**ranks):
    """Return adapters that take two pages for each 8 ranks."""
    return [
        SimAdapter(uid=uid, rank=rank, num_pages=rank // 4)
        for uid, rank in ranks.items()
    ]


def simulator_of(
    adapters=(),
    *,
    policy="fifo-lru",
    cost=COST,
    link=LINK,
    num_pages=66,
    max_running=8,
    max_batch_tokens=128,
    page_bytes=1000,
    **options,
):
    """Return a simulator and its planner."""
    engine = EngineConfig(
        policy=policy, max_running=max_running, max_batch_tokens=max_batch_tokens
    )
    planner = build_planner(engine, num_pages)
    simulator = Simulator(
        planner, cost, link, adapters, page_bytes=page_bytes, **options
    )
    return simulator, planner


def drawn(at_s, adapter, prompt_tokens, output_tokens):
    """Return a request; its rank is looked up by the simulator."""
    return Drawn(at_s, adapter, None, prompt_tokens, output_tokens)

"""A planner as an engine's configuration asks for it."""

from jchameleon.config import PREFILL_TILE_TOKENS, EngineConfig
from jchameleon.runtime.policy.limits import PlannerConfig
from jchameleon.runtime.policy.planner import Planner
from jchameleon.runtime.policy.presets import build_policies, load_policy


def build_planner(config: EngineConfig, num_pages: int) -> Planner:
    """Return a planner with the configured policies.

    Raises:
      ConfigError: there are no such policies, or one refuses its options.
    """
    policy = load_policy(config.policy)
    policies = build_policies(policy)
    return Planner(
        PlannerConfig(
            num_pages=num_pages,
            block_tokens=config.kv_block_tokens,
            max_running=config.max_running,
            max_batch_tokens=config.max_batch_tokens,
            max_loads_in_flight=config.max_loads_in_flight,
            prefill_tile_tokens=PREFILL_TILE_TOKENS,
            kv_reserve=policy.kv_reserve,
            max_squashes=policy.max_squashes,
        ),
        **policies,
    )

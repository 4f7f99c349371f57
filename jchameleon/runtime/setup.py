"""Put an engine together: what is configured, what the model allows, what fits."""

import tempfile
from collections.abc import Iterable, Sequence

import jax

from jchameleon.config import (
    ATTENTION_PROJECTIONS,
    PROJECTIONS,
    EngineConfig,
    ModelConfig,
    default_max_model_len,
)
from jchameleon.errors import ConfigError
from jchameleon.lora.adapter import AdapterCard
from jchameleon.lora.layout import ChunkLayout
from jchameleon.models.embedded import home_dir
from jchameleon.models.llama import Llama
from jchameleon.models.loader import LoadedModel
from jchameleon.models.params import numpy_dtype
from jchameleon.pallas.operations import (
    choose_operations,
    keep_compiled,
)
from jchameleon.runtime.adapters import check_fits
from jchameleon.runtime.engine import Engine
from jchameleon.runtime.engine_adapters import AdapterListener
from jchameleon.runtime.executor import Executor
from jchameleon.runtime.policy.build import build_planner
from jchameleon.runtime.policy.log import PlanLogWriter
from jchameleon.runtime.policy.planner import Planner
from jchameleon.runtime.policy.presets import load_policy
from jchameleon.runtime.programs import ModelParams
from jchameleon.runtime.sizing import (
    PROVISIONAL_PAGES,
    check_memory,
    measure_num_pages,
    memory_stats,
    page_elems,
    resolve_num_pages,
)
from jchameleon.runtime.staging import Staging
from jchameleon.runtime.xla_env import prepare


def build_executor(
    loaded: LoadedModel, config: EngineConfig, adapters: Sequence[AdapterCard]
) -> tuple[Executor, Planner, PlanLogWriter | None]:
    """Return a warmed-up executor, a planner for its pool and the plan log asked for.

    Args:
      loaded: the model on the host.
      config: limits and policies.
      adapters: those known at start; they widen the LoRA targets where the config
        leaves them open.

    Raises:
      ConfigError: the configuration contradicts the model or itself.
      AdapterError: an adapter touches projections outside the configured targets.
      CapacityError: an adapter can never fit in the pool.
    All before any device work, but for what depends on memory that the device reports.
    """
    prepare()
    model = loaded.config
    max_model_len = resolve_max_model_len(config, model)
    layout = chunk_layout(model, config, adapters)
    device = jax.devices()[0]
    use_compilation_cache()
    ops = choose_operations(
        config.backend,
        platform=jax.default_backend(),
        dtype=numpy_dtype(config.dtype),
        model=model,
        capability=getattr(device, "compute_capability", None),
        device_kind=device.device_kind,
    )

    def new_executor(params: ModelParams, num_pages: int) -> Executor:
        return Executor(
            params,
            model,
            config,
            layout,
            num_pages=num_pages,
            max_model_len=max_model_len,
            ops=ops,
        )

    params = None
    if config.pool_bytes is None and memory_stats(device) is not None:
        # What is free is known when the parameters are there.
        params = _place_params(loaded)
        num_pages = measure_num_pages(new_executor(params, PROVISIONAL_PAGES))
    else:
        num_pages = resolve_num_pages(config, model, layout, max_model_len)
    planner = build_planner(config, num_pages)
    for adapter in adapters:
        check_fits(adapter, layout, planner)
    log = None
    if config.plan_log is not None:
        policy = load_policy(config.policy)
        log = PlanLogWriter(config.plan_log, planner.config, policy)
    try:
        executor = new_executor(params or _place_params(loaded), num_pages)
        executor.warm_up()
        check_memory(executor)
        executor.place_pool()
    except BaseException:
        if log is not None:
            log.close()
        raise
    return executor, planner, log


def start_engine(
    loaded: LoadedModel,
    config: EngineConfig,
    executor: Executor,
    planner: Planner,
    log: PlanLogWriter | None,
    staging: Staging,
    listener: AdapterListener | None = None,
) -> Engine:
    """Return a running engine, whose adapters come to the device by `staging`."""
    eos = frozenset(loaded.config.eos_token_ids)
    if loaded.tokenizer is not None:
        eos |= frozenset(loaded.tokenizer.eos_token_ids)
    return Engine(
        executor,
        planner,
        config,
        log=log,
        staging=staging,
        listener=listener,
        tokenizer=loaded.tokenizer,
        eos_token_ids=eos,
    )


def use_compilation_cache() -> None:
    """Keep compiled programs under `home_dir()`, unless the caller set a folder.

    Raises:
      ConfigError: the folder cannot be written.
    """
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    folder = home_dir() / "xla"
    try:
        # Programs are code: nobody else may write here.
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"cannot write the compilation cache {folder}: {error}; set "
            "JCHAMELEON_HOME to a writable folder"
        ) from error
    keep_compiled(home_dir() / "numba")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def resolve_max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    """Return the longest prompt + output; ConfigError where the model allows less."""
    if config.max_model_len is None:
        return default_max_model_len(model)
    if config.max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len={config.max_model_len} exceeds the model's context of "
            f"{model.max_position_embeddings}"
        )
    if config.max_model_len > model.max_exact_tokens:
        raise ConfigError(
            f"max_model_len={config.max_model_len} exceeds the model's sliding window "
            f"of {model.sliding_window} tokens; attention beyond it is not supported"
        )
    return config.max_model_len


def chunk_layout(
    model: ModelConfig, config: EngineConfig, adapters: Iterable[AdapterCard]
) -> ChunkLayout:
    """Return the layout for the configured targets, or for those of `adapters`."""
    targets = config.lora_targets
    if targets is None:
        touched = set(ATTENTION_PROJECTIONS).union(*(a.targets for a in adapters))
        targets = tuple(p for p in PROJECTIONS if p in touched)
    return ChunkLayout(model, targets, page_elems(config, model))


def _place_params(loaded: LoadedModel) -> ModelParams:
    """Put a loaded parameter tree on the default device.

    On a CPU the arrays share the tree's memory where it is aligned, so nobody may write
    to the tree any more.
    """
    placed = jax.device_put(loaded.params, jax.devices()[0], may_alias=True)
    return ModelParams.from_model(Llama(loaded.config, placed))

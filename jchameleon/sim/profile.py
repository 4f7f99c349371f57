"""What is simulated: a TOML file of model, costs, engine, adapters and workload.

`[engine]` is what `LLM` and `serve` take; docs/simulator.md shows a whole file.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jchameleon.config import (
    ATTENTION_PROJECTIONS,
    RESERVED_PAGES,
    EngineConfig,
    ModelConfig,
    check_keys,
    is_number,
    load_toml,
    nearest,
)
from jchameleon.errors import ConfigError
from jchameleon.lora.layout import ChunkLayout
from jchameleon.sim.linear import LinearCost, paper_cost
from jchameleon.sim.link import LinkConfig
from jchameleon.sim.programs import ProgramCost
from jchameleon.sim.roofline import load_gpu, roofline_cost
from jchameleon.sim.simulator import SimAdapter
from jchameleon.workload.generator import Length, Popularity, Workload

COST_KINDS = ("paper", "roofline", "linear", "programs")
_ITEM_BYTES = {"bfloat16": 2, "float32": 4}
_PARSERS: dict[str, Callable[[str], Any]] = {
    "input_len": Length.parse,
    "output_len": Length.parse,
    "popularity": Popularity.parse,
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdapterMix:
    """The adapters of a run: equally many of each rank.

    Attributes:
      count: of all; a multiple of the number of ranks.
    """

    count: int = 100
    ranks: tuple[int, ...] = (8, 16, 32, 64, 128)

    def __post_init__(self) -> None:
        if not self.ranks or any(type(r) is not int or r < 1 for r in self.ranks):
            raise ConfigError(
                f"adapters.ranks={list(self.ranks)} must be positive integers"
            )
        if type(self.count) is not int or self.count < 1:
            raise ConfigError(f"adapters.count={self.count!r} must be at least 1")
        if self.count % len(self.ranks):
            raise ConfigError(
                f"adapters.count={self.count} must be a multiple of the "
                f"{len(self.ranks)} ranks"
            )

    def names(self) -> dict[str | None, int | None]:
        """Return name -> rank, the most popular of every rank first."""
        each = range(self.count // len(self.ranks))
        return {f"r{rank}-{k}": rank for k in each for rank in self.ranks}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """One set-up, without policy, rate and seed.

    Attributes:
      name: of the file and the variant.
      cost_kind: where step durations come from, one of `COST_KINDS`.
      workload: `duration_s` of arrivals; rate and seed are those of a run.
      max_tokens: limit that every request names; policies that predict do not see how
        long its output really is.
      slo_s: bound on the time to first token.
      skip_s: requests that arrive earlier do not count.
      warm_cache: adapters are loaded before the first request, as many as leave room
        for the largest request.
    """

    name: str
    model: ModelConfig
    cost_kind: str
    cost: LinearCost | ProgramCost
    link: LinkConfig
    engine: EngineConfig
    adapters: AdapterMix
    workload: Workload
    max_tokens: int
    slo_s: float = 5.0
    skip_s: float = 0.0
    warm_cache: bool = False

    def __post_init__(self) -> None:
        for name, least in (("slo_s", 1e-9), ("skip_s", 0.0)):
            value = getattr(self, name)
            if not (is_number(value) and value >= least):
                raise ConfigError(
                    f"{name}={value!r} must be a finite number, "
                    + ("above 0" if least else "0 or above")
                )
        duration_s = self.workload.duration_s
        if duration_s is None or not is_number(duration_s) or self.skip_s >= duration_s:
            raise ConfigError(
                f"skip_s={self.skip_s} must be below workload.duration_s={duration_s}, "
                "a finite number"
            )
        if type(self.warm_cache) is not bool:
            raise ConfigError(f"warm_cache={self.warm_cache!r} must be true or false")
        most = self.workload.max_model_len
        if type(self.max_tokens) is not int or not 1 <= self.max_tokens < most:
            raise ConfigError(
                f"workload.max_tokens={self.max_tokens!r} must be from 1 to below "
                f"max_model_len={most}"
            )
        if self.num_pages <= RESERVED_PAGES + self.largest_request_pages:
            raise ConfigError(
                f"engine.pool_bytes={self.engine.pool_bytes} must hold "
                f"{self.largest_request_pages} pages of {self.page_bytes} bytes for "
                f"the largest request and {RESERVED_PAGES} more"
            )

    @property
    def layout(self) -> ChunkLayout:
        """How adapters lie in pages."""
        page_elems = self.model.kv_elems * self.engine.kv_block_tokens
        targets = self.engine.lora_targets or ATTENTION_PROJECTIONS
        return ChunkLayout(self.model, targets, page_elems)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page in all layers."""
        item_bytes = _ITEM_BYTES[self.engine.dtype]
        return self.layout.page_elems * item_bytes * self.model.num_layers

    @property
    def num_pages(self) -> int:
        """Pages of the pool, the reserved ones included."""
        assert self.engine.pool_bytes is not None
        return self.engine.pool_bytes // self.page_bytes

    @property
    def usable_pages(self) -> int:
        """Pages of the pool that can be handed out."""
        return self.num_pages - RESERVED_PAGES

    @property
    def largest_request_pages(self) -> int:
        """Pages of the longest request and the largest adapter."""
        blocks = -(-self.workload.max_model_len // self.engine.kv_block_tokens)
        return blocks + self.layout.num_pages(max(self.adapters.ranks))

    def sim_adapters(self) -> list[SimAdapter]:
        """Return the adapters, the most popular of every rank first."""
        layout = self.layout
        return [
            SimAdapter(uid=str(uid), rank=rank, num_pages=layout.num_pages(rank))
            for uid, rank in self.adapters.names().items()
            if rank is not None
        ]


def load_profile(path: str | Path, variant: str | None = None) -> Profile:
    """Read a profile.

    Args:
      variant: a table below `[variants]`; what it sets stands in place of the file's.

    Raises:
      ConfigError: the file cannot be read, or a field is wrong or unknown; names it.
    """
    path = Path(path)
    table = load_toml(path)
    variants = _table(table, "variants")
    name = path.stem
    if variant is not None:
        if variant not in variants:
            raise ConfigError(
                f"variant={variant!r} is not in {path}{nearest(variant, variants)}; "
                f"it has {', '.join(variants) or 'none'}"
            )
        table = _merged(table, _table(variants, variant))
        name = f"{name} {variant}"
    try:
        return _profile(name, table)
    except ConfigError as error:
        raise ConfigError(f"profile {path}: {error}") from error


def _profile(name: str, table: Mapping[str, Any]) -> Profile:
    tables = ("cost", "link", "engine", "adapters", "workload")
    own = ("slo_s", "skip_s", "warm_cache")
    known = ("model", "variants", *tables, *own)
    for key in table:
        if key not in known:
            raise ConfigError(f"unknown key {key!r}{nearest(key, known)}")
    model = ModelConfig.preset(_text(table, "model"))
    engine = EngineConfig.from_dict(_table(table, "engine"))
    if engine.pool_bytes is None:
        raise ConfigError("engine.pool_bytes must be given: no device says its memory")
    if engine.link_bytes_per_s is None:
        raise ConfigError("engine.link_bytes_per_s must be given: copies take time")
    link = _table(table, "link")
    check_keys(LinkConfig, link)
    if set(link) - {"stall"}:
        raise ConfigError("link has only stall: engine has the link_ fields")
    adapters = dict(_table(table, "adapters"))
    check_keys(AdapterMix, adapters)
    if isinstance(adapters.get("ranks"), list):
        adapters["ranks"] = tuple(adapters["ranks"])
    workload = dict(_table(table, "workload"))
    max_tokens = workload.pop("max_tokens", None)
    kind, cost = _cost(_table(table, "cost"), model, engine)
    return Profile(
        name=name,
        model=model,
        cost_kind=kind,
        cost=cost,
        link=LinkConfig(
            bytes_per_s=engine.link_bytes_per_s,
            latency_s=engine.link_latency_s,
            **link,
        ),
        engine=engine,
        adapters=AdapterMix(**adapters),
        workload=_workload(workload),
        max_tokens=max_tokens,
        **{key: table[key] for key in own if key in table},
    )


def _cost(
    table: Mapping[str, Any], model: ModelConfig, engine: EngineConfig
) -> tuple[str, LinearCost | ProgramCost]:
    values = dict(table)
    kind = values.pop("kind", None)
    if kind == "linear":
        check_keys(LinearCost, values)
        return kind, LinearCost(**values)
    if kind == "programs":
        return kind, _program_cost(values)
    gpu = values.pop("gpu", None)
    if values:
        raise ConfigError(
            f"cost.{next(iter(values))} goes with cost.kind='linear' or 'programs', "
            f"not {kind!r}"
        )
    if kind == "roofline":
        targets = engine.lora_targets or ATTENTION_PROJECTIONS
        return kind, roofline_cost(model, load_gpu(str(gpu)), targets)
    if kind != "paper":
        raise ConfigError(
            f"cost.kind={kind!r} must be {', '.join(map(repr, COST_KINDS))}"
        )
    if model.name != "llama-7b" or gpu != "a40":
        raise ConfigError(
            f"cost.kind='paper' is of model 'llama-7b' on gpu 'a40', not of "
            f"{model.name!r} on {gpu!r}; 'roofline' knows others"
        )
    return kind, paper_cost()


def _program_cost(values: dict[str, Any]) -> ProgramCost:
    programs: dict[str, Any] = {}
    for name in ("prefill_programs_s", "decode_programs_s"):
        table = _table(values, name, "cost.")
        values.pop(name, None)
        # TOML's keys are texts; what is no number is told by the class.
        programs[name] = {
            int(size) if size.isdecimal() else size: value
            for size, value in table.items()
        }
    check_keys(LinearCost, values)
    return ProgramCost(work=LinearCost(**values), **programs)


def _workload(values: dict[str, Any]) -> Workload:
    check_keys(Workload, values)
    for key in ("rate_rps", "seed"):
        if key in values:
            raise ConfigError(f"workload.{key} is chosen by run, not by profile")
    for key, parse in _PARSERS.items():
        if key in values:
            values[key] = parse(str(values[key]))
    try:
        return Workload(**{"num_requests": None, **values})
    except TypeError as error:  # a text where a number goes
        raise ConfigError(f"workload: {error}") from error


def _table(table: Mapping[str, Any], key: str, above: str = "") -> Mapping[str, Any]:
    value = table.get(key, {})
    if not isinstance(value, Mapping):
        raise ConfigError(f"{above}{key}={value!r} must be a table")
    return value


def _text(table: Mapping[str, Any], key: str) -> str:
    value = table.get(key)
    if not isinstance(value, str):
        raise ConfigError(f"{key}={value!r} must be a name")
    return value


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `over`, tables within tables."""
    both = dict(base)
    for key, value in over.items():
        inside = both.get(key)
        if isinstance(inside, Mapping) and isinstance(value, Mapping):
            value = _merged(inside, value)
        both[key] = value
    return both

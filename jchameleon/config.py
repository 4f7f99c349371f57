"""Frozen configuration: the model's shape and the engine's limits.

Nothing here imports jax, so policies, the simulator and the command line can read
configurations in milliseconds.
"""

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from jchameleon.errors import ConfigError, UnknownModelError
from jchameleon.families import check_family
from jchameleon.resources import configs_dir

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
"""LoRA targets by short name, in the order in which a layer applies them."""

ATTENTION_PROJECTIONS = ("q", "k", "v", "o")

MOST_LAYERS = 10_000
"""No model has so many; a file that claims more is damaged or hostile."""

PREFILL_TILE_TOKENS = 32
"""Prompt chunks of a packed prefill start at multiples of this (one request a tile)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pre-training context.

    kind "linear" divides every frequency by `factor`; kind "llama3" keeps high
    frequencies, divides low ones by `factor` and blends between (Llama 3.1 release,
    `apply_scaling`).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ConfigError(
                f"rope_scaling.kind={self.kind!r} must be 'linear' or 'llama3'"
            )
        if not self.factor >= 1.0 or math.isinf(self.factor):
            raise ConfigError(f"rope_scaling.factor={self.factor} must be >= 1")
        if self.kind == "llama3" and not (
            0 < self.low_freq_factor < self.high_freq_factor
        ):
            raise ConfigError(
                "rope_scaling needs 0 < low_freq_factor < high_freq_factor, got "
                f"{self.low_freq_factor} and {self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shape of a Llama decoder or of one of its variants.

    Attributes:
      family: one of `families.FAMILIES`: how Hugging Face calls the computation.
      vocab_size: rows of the embedding table.
      hidden_size: model width D.
      intermediate_size: MLP width F.
      num_layers: decoder layers L.
      num_heads: query heads H.
      num_kv_heads: key/value heads KVH; divides num_heads (GQA).
      head_dim: width of a head; even (RoPE rotates halves).
      rope_theta: base of the rotary frequencies.
      max_position_embeddings: context length in tokens.
      tie_embeddings: the output head is the embedding table.
      qkv_bias, o_bias: these projections add a bias.
      qk_norm: queries and keys are normed per head, before RoPE.
      sliding_window: tokens that a token of `sliding_layers` attends to, itself
        included; None where no layer slides.
      sliding_layers: indices of the layers that slide, ascending.
      bos_token_id: prepended by the tokenizer where the checkpoint says so, or None.
      eos_token_ids: any of them ends a reply.
    """

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    tie_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    family: str = "llama"
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, field)
            if not isinstance(value, int) or value <= 0:
                raise ConfigError(f"{field}={value!r} must be a positive integer")
        if self.num_layers > MOST_LAYERS:
            raise ConfigError(
                f"num_layers={self.num_layers} must be at most {MOST_LAYERS}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads={self.num_heads} must be a multiple of "
                f"num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} must be even")
        if not self.rope_theta > 0:
            raise ConfigError(f"rope_theta={self.rope_theta} must be positive")
        for token_id in (*self.eos_token_ids, self.bos_token_id):
            if token_id is not None and not 0 <= token_id < self.vocab_size:
                raise ConfigError(
                    f"special token id {token_id} is outside the vocabulary of "
                    f"{self.vocab_size}"
                )
        check_family(self)

    @property
    def max_exact_tokens(self) -> int:
        """Longest text that the engine computes as the model does, in tokens.

        Attention here is to all earlier tokens; within a window that is the same.
        """
        if self.sliding_window is None:
            return self.max_position_embeddings
        return min(self.max_position_embeddings, self.sliding_window)

    @property
    def q_dim(self) -> int:
        """Output features of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Output features of the key projection, and of the value projection."""
        return self.num_kv_heads * self.head_dim

    @property
    def kv_elems(self) -> int:
        """Elements of a token's key and value in one layer."""
        return 2 * self.kv_dim

    def projection_shape(self, projection: str) -> tuple[int, int]:
        """Return (d_in, d_out) of one of `PROJECTIONS`."""
        d, f = self.hidden_size, self.intermediate_size
        return {
            "q": (d, self.q_dim),
            "k": (d, self.kv_dim),
            "v": (d, self.kv_dim),
            "o": (self.q_dim, d),
            "gate": (d, f),
            "up": (d, f),
            "down": (f, d),
        }[projection]

    @classmethod
    def preset(cls, name: str) -> Self:
        """Return the preset `name` from `configs/models/`.

        Raises:
          UnknownModelError: there is no such preset; the message lists those there are.
        """
        path = configs_dir() / "models" / f"{name}.toml"
        if name not in preset_names():
            raise UnknownModelError(
                f"unknown model preset {name!r}; presets are "
                + ", ".join(preset_names())
            )
        table = load_toml(path)
        table.pop("source", None)
        return cls.from_dict({"name": name, **table})

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Self:
        """Build from a plain table; an unknown key names the nearest field."""
        check_keys(cls, table)
        values = dict(table)
        if isinstance(values.get("rope_scaling"), Mapping):
            check_keys(RopeScaling, values["rope_scaling"])
            values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
        for field in ("eos_token_ids", "sliding_layers"):
            if field in values:
                values[field] = tuple(values[field])
        return cls(**values)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Limits and policies of one engine.

    Attributes:
      dtype: of parameters, pool and activations.
      backend: of the device operations: "cpu" (loops compiled by numba; float32 on a
        CPU), "pallas" (kernels for NVIDIA GPUs; interpreted, and slow, on a CPU), "xla"
        (any device) or "auto", what is written for the device where it serves.
      max_model_len: longest prompt + output in tokens; None takes the model's
        context or sliding window, at most 4,096.
      max_running: requests decoding at once (rows of the largest decode program).
      max_waiting: requests queued beyond those; one more is refused.
      max_batch_tokens: tokens of one iteration, prompt chunks and decode rows together.
      kv_block_tokens: tokens of a KV block; one page holds one block.
      pool_bytes: device bytes for KV blocks and adapters together; None takes what a
        GPU has left, or 1 GiB on a CPU, more where one request needs it; less in both
        cases where so much can never be used.
      lora_targets: projections that adapters may touch, fixed at start; None takes
        q, k, v, o and whatever else the adapters given at start touch. An empty list
        leaves LoRA out of the programs, and every adapter is refused.
      max_lora_rank: adapters above are refused.
      max_loads_in_flight: adapter loads under way at once. A GPU keeps room for so many
        of `max_lora_rank` on their way.
      host_cache_bytes: host memory that keeps adapter weights; those used longest ago
        are read from disk again. An adapter larger than this is loaded, but not kept.
        Beside a GPU they are pinned, packed as the pool holds them.
      link_bytes_per_s: bandwidth of an emulated link that all adapter loads share, for
        machines whose device memory is host memory; None emulates nothing.
      link_latency_s: seconds that the emulated link adds to every load.
      policy: how requests and adapters are scheduled: a preset of `configs/policies/`,
        a path that ends in .toml, or a table (docs/policies.md). The default keeps
        arrival order: lanes have not paid on this engine yet (docs/experiments.md).
      prefix_cache: keep the KV blocks of requests that ended, while their pages are not
        needed, for requests for the same adapter that begin with the same tokens.
      plan_log: file that records events and plans for a replay; None records nothing.
      seed: seeds requests that bring none.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    backend: Literal["auto", "cpu", "pallas", "xla"] = "auto"
    max_model_len: int | None = None
    max_running: int = 64
    max_waiting: int = 100_000
    max_batch_tokens: int = 512
    kv_block_tokens: int = 16
    pool_bytes: int | None = None
    lora_targets: tuple[str, ...] | None = None
    max_lora_rank: int = 256
    max_loads_in_flight: int = 4
    host_cache_bytes: int = 4 << 30
    link_bytes_per_s: float | None = None
    link_latency_s: float = 0.0
    policy: str | Path | Mapping[str, Any] = "chameleon-nosched"
    prefix_cache: bool = True
    plan_log: str | Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype={self.dtype!r} must be 'float32' or 'bfloat16'")
        if self.backend not in ("auto", "cpu", "pallas", "xla"):
            raise ConfigError(
                f"backend={self.backend!r} must be 'auto', 'cpu', 'pallas' or 'xla'"
            )
        for field in (
            "max_running",
            "max_waiting",
            "max_batch_tokens",
            "kv_block_tokens",
            "max_lora_rank",
            "max_loads_in_flight",
            "host_cache_bytes",
        ):
            value = getattr(self, field)
            if type(value) is not int or value <= 0:
                raise ConfigError(f"{field}={value!r} must be a positive integer")
        for field in ("max_model_len", "pool_bytes"):
            value = getattr(self, field)
            if value is not None and (type(value) is not int or value <= 0):
                raise ConfigError(f"{field}={value!r} must be a positive integer")
        if self.kv_block_tokens & (self.kv_block_tokens - 1):
            raise ConfigError(
                f"kv_block_tokens={self.kv_block_tokens} must be a power of two"
            )
        least = self.max_running + PREFILL_TILE_TOKENS
        if self.max_batch_tokens < least:
            raise ConfigError(
                f"max_batch_tokens={self.max_batch_tokens} must be at least "
                f"max_running + {PREFILL_TILE_TOKENS} = {least}, or prompts could "
                "never advance while all rows decode"
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"seed={self.seed!r} must be an integer")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} must not be negative")
        self._check_link()
        if type(self.prefix_cache) is not bool:
            raise ConfigError(
                f"prefix_cache={self.prefix_cache!r} must be true or false"
            )
        if isinstance(self.policy, Mapping):
            # The caller's table may change later; this configuration must not.
            object.__setattr__(self, "policy", plain_table(self.policy))
        elif not isinstance(self.policy, str | Path):
            raise ConfigError(
                f"policy={self.policy!r} must be the name of a preset, the path of a "
                ".toml file or a table"
            )
        if not isinstance(self.plan_log, str | Path | None) or self.plan_log == "":
            raise ConfigError(f"plan_log={self.plan_log!r} must be the path of a file")
        targets = self.lora_targets
        if targets is not None and not isinstance(targets, tuple):
            raise ConfigError(f"lora_targets={targets!r} must be a list of projections")
        for target in targets or ():
            if target not in PROJECTIONS:
                raise ConfigError(
                    f"lora_targets has {target!r}; must be among "
                    + ", ".join(PROJECTIONS)
                )

    def _check_link(self) -> None:
        """Refuse an emulated link that is no link."""
        bandwidth, latency = self.link_bytes_per_s, self.link_latency_s
        if bandwidth is not None and not (is_number(bandwidth) and bandwidth > 0):
            raise ConfigError(
                f"link_bytes_per_s={bandwidth!r} must be a positive, finite number"
            )
        if not (is_number(latency) and latency >= 0):
            raise ConfigError(
                f"link_latency_s={latency!r} must be a finite number, 0 or above"
            )
        if latency > 0 and bandwidth is None:
            raise ConfigError(
                f"link_latency_s={latency!r} must come with link_bytes_per_s, or no "
                "link is emulated"
            )

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Self:
        """Build from a plain table; an unknown key names the nearest field."""
        check_keys(cls, table)
        values = dict(table)
        if isinstance(values.get("lora_targets"), list):
            values["lora_targets"] = tuple(values["lora_targets"])
        return cls(**values)


NULL_PAGE = 0
"""Page that is all zeros and never written; padding of page lists points here."""

TRASH_PAGE = 1
"""Page that takes what padding tokens write; never read."""

RESERVED_PAGES = 2
"""Pages that the pool never hands out: the two above."""


def check_keys(cls: type, table: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key of `table` that is no field of dataclass `cls`."""
    fields = [f.name for f in dataclasses.fields(cls)]
    for key in table:
        if key not in fields:
            raise ConfigError(
                f"unknown key {key!r} in {cls.__name__}{nearest(key, fields)}"
            )


def nearest(name: object, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" with the most similar known name, or ""."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def is_number(value: object) -> bool:
    """Return whether `value` is an int or float below 1e100 in size, and no bool.

    Beyond that nothing is meant, and sums and inverses of such values overflow.
    """
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) < 1e100
    )


def plain_table(table: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return a copy made of dicts and lists as far as mappings and sequences nest.

    Raises:
      ConfigError: it nests deeper than 20 levels, as one that holds itself does.
    """

    def plain(value: Any, depth: int) -> Any:
        if depth > 20:
            raise ConfigError("a table must not nest deeper than 20 levels")
        if isinstance(value, Mapping):
            return {key: plain(one, depth + 1) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [plain(one, depth + 1) for one in value]
        return value

    return plain(table, 0)


def load_toml(path: Path) -> dict[str, Any]:
    """Read one TOML file.

    Raises:
      ConfigError: unreadable or not TOML; names the file.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    # ValueError: a path with a null character, bytes that are not UTF-8, no TOML.
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read config {str(path)!r}: {error}") from error


def preset_names() -> list[str]:
    """Return the names of the model presets that ship with the package, sorted."""
    return sorted(path.stem for path in (configs_dir() / "models").glob("*.toml"))


def default_max_model_len(model: ModelConfig) -> int:
    """Return the context an engine offers when none is configured, in tokens."""
    return min(model.max_exact_tokens, 4096)

from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "jax_version", "model", "device", "backend", "dtype", "vocab_size", "max_model_len", "max_running", "max_lora_rank", "lora_targets", "has_tokenizer", "has_chat_template", "dynamic_adapters", "pool_bytes", "policy", "max_waiting_requests", "max_waiting_tokens")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    JAX_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_FIELD_NUMBER: _ClassVar[int]
    MAX_LORA_RANK_FIELD_NUMBER: _ClassVar[int]
    LORA_TARGETS_FIELD_NUMBER: _ClassVar[int]
    HAS_TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    HAS_CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    DYNAMIC_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    POOL_BYTES_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    MAX_WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    version: str
    jax_version: str
    model: str
    device: str
    backend: str
    dtype: str
    vocab_size: int
    max_model_len: int
    max_running: int
    max_lora_rank: int
    lora_targets: _containers.RepeatedScalarFieldContainer[str]
    has_tokenizer: bool
    has_chat_template: bool
    dynamic_adapters: bool
    pool_bytes: int
    policy: str
    max_waiting_requests: int
    max_waiting_tokens: int
    def __init__(self, version: _Optional[str] = ..., jax_version: _Optional[str] = ..., model: _Optional[str] = ..., device: _Optional[str] = ..., backend: _Optional[str] = ..., dtype: _Optional[str] = ..., vocab_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., max_running: _Optional[int] = ..., max_lora_rank: _Optional[int] = ..., lora_targets: _Optional[_Iterable[str]] = ..., has_tokenizer: _Optional[bool] = ..., has_chat_template: _Optional[bool] = ..., dynamic_adapters: _Optional[bool] = ..., pool_bytes: _Optional[int] = ..., policy: _Optional[str] = ..., max_waiting_requests: _Optional[int] = ..., max_waiting_tokens: _Optional[int] = ...) -> None: ...

class GetStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatsResponse(_message.Message):
    __slots__ = ("cache", "queues", "kv", "engine")
    CACHE_FIELD_NUMBER: _ClassVar[int]
    QUEUES_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    cache: CacheStats
    queues: _containers.RepeatedCompositeFieldContainer[QueueStats]
    kv: KvStats
    engine: EngineStats
    def __init__(self, cache: _Optional[_Union[CacheStats, _Mapping]] = ..., queues: _Optional[_Iterable[_Union[QueueStats, _Mapping]]] = ..., kv: _Optional[_Union[KvStats, _Mapping]] = ..., engine: _Optional[_Union[EngineStats, _Mapping]] = ...) -> None: ...

class CacheStats(_message.Message):
    __slots__ = ("capacity_bytes", "used_bytes", "pinned_bytes", "idle_bytes", "hits", "misses", "loads", "evictions", "load_failures", "host_bytes", "host_hits", "disk_reads")
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PINNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    IDLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FAILURES_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOST_HITS_FIELD_NUMBER: _ClassVar[int]
    DISK_READS_FIELD_NUMBER: _ClassVar[int]
    capacity_bytes: int
    used_bytes: int
    pinned_bytes: int
    idle_bytes: int
    hits: int
    misses: int
    loads: int
    evictions: int
    load_failures: int
    host_bytes: int
    host_hits: int
    disk_reads: int
    def __init__(self, capacity_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., pinned_bytes: _Optional[int] = ..., idle_bytes: _Optional[int] = ..., hits: _Optional[int] = ..., misses: _Optional[int] = ..., loads: _Optional[int] = ..., evictions: _Optional[int] = ..., load_failures: _Optional[int] = ..., host_bytes: _Optional[int] = ..., host_hits: _Optional[int] = ..., disk_reads: _Optional[int] = ...) -> None: ...

class QueueStats(_message.Message):
    __slots__ = ("index", "wrs_min", "wrs_max", "quota_tokens", "used_tokens", "waiting", "running")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    WRS_MIN_FIELD_NUMBER: _ClassVar[int]
    WRS_MAX_FIELD_NUMBER: _ClassVar[int]
    QUOTA_TOKENS_FIELD_NUMBER: _ClassVar[int]
    USED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    index: int
    wrs_min: float
    wrs_max: float
    quota_tokens: int
    used_tokens: int
    waiting: int
    running: int
    def __init__(self, index: _Optional[int] = ..., wrs_min: _Optional[float] = ..., wrs_max: _Optional[float] = ..., quota_tokens: _Optional[int] = ..., used_tokens: _Optional[int] = ..., waiting: _Optional[int] = ..., running: _Optional[int] = ...) -> None: ...

class KvStats(_message.Message):
    __slots__ = ("used_bytes", "cached_bytes", "prefix_queried_tokens", "prefix_hit_tokens")
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    CACHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PREFIX_QUERIED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    used_bytes: int
    cached_bytes: int
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    def __init__(self, used_bytes: _Optional[int] = ..., cached_bytes: _Optional[int] = ..., prefix_queried_tokens: _Optional[int] = ..., prefix_hit_tokens: _Optional[int] = ...) -> None: ...

class EngineStats(_message.Message):
    __slots__ = ("last_progress_age_seconds", "waiting", "running", "preemptions", "bypasses", "programs", "compiles_after_warm_up")
    LAST_PROGRESS_AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    BYPASSES_FIELD_NUMBER: _ClassVar[int]
    PROGRAMS_FIELD_NUMBER: _ClassVar[int]
    COMPILES_AFTER_WARM_UP_FIELD_NUMBER: _ClassVar[int]
    last_progress_age_seconds: float
    waiting: int
    running: int
    preemptions: int
    bypasses: int
    programs: int
    compiles_after_warm_up: int
    def __init__(self, last_progress_age_seconds: _Optional[float] = ..., waiting: _Optional[int] = ..., running: _Optional[int] = ..., preemptions: _Optional[int] = ..., bypasses: _Optional[int] = ..., programs: _Optional[int] = ..., compiles_after_warm_up: _Optional[int] = ...) -> None: ...

class AbortRequestsRequest(_message.Message):
    __slots__ = ("request_ids",)
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    request_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, request_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class AbortRequestsResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

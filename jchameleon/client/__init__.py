"""Python clients of the gRPC server; they need gRPC and protobuf, and no jax.

`Client` blocks, `AsyncClient` is for asyncio; both have the same methods and return the
same frozen values. Whatever the server refuses is a `CallError`.
"""

from jchameleon.client.asynchronous import AsyncClient
from jchameleon.client.blocking import Client
from jchameleon.client.connection import Tls
from jchameleon.client.errors import CallError
from jchameleon.client.retry import RetryPolicy
from jchameleon.client.values import (
    Adapter,
    CacheStats,
    Completion,
    EngineStats,
    Generation,
    KvStats,
    Piece,
    QueueStats,
    ServerInfo,
    ServerStats,
    Timing,
    Tokens,
    Usage,
)

__all__ = [
    "Adapter",
    "AsyncClient",
    "CacheStats",
    "CallError",
    "Client",
    "Completion",
    "EngineStats",
    "Generation",
    "KvStats",
    "Piece",
    "QueueStats",
    "RetryPolicy",
    "ServerInfo",
    "ServerStats",
    "Timing",
    "Tls",
    "Tokens",
    "Usage",
]

"""Policies by name: those that ship here, and your own as "package.module:Class"."""

import importlib
from typing import Any

from jchameleon.errors import ConfigError
from jchameleon.runtime.policy.admission import AdmissionPolicy, Fifo
from jchameleon.runtime.policy.eviction import EvictionPolicy, Lru
from jchameleon.runtime.policy.predictor import LengthPredictor, MaxTokens
from jchameleon.runtime.policy.prefetch import NoPrefetch, PrefetchPolicy

_PROTOCOLS: dict[str, type] = {
    "admission": AdmissionPolicy,
    "eviction": EvictionPolicy,
    "predictor": LengthPredictor,
    "prefetch": PrefetchPolicy,
}

_SHIPPED: dict[str, dict[str, type]] = {
    "admission": {"fifo": Fifo},
    "eviction": {"lru": Lru},
    "predictor": {"max_tokens": MaxTokens},
    "prefetch": {"none": NoPrefetch},
}


def policy_names(kind: str) -> list[str]:
    """Return the short names of one kind: "admission", "eviction", ..., sorted."""
    return sorted(_SHIPPED[kind])


def policy_class(kind: str, name: str) -> type:
    """Return the class that `name` stands for among policies of `kind`.

    Raises:
      ConfigError: unknown short name, a path that cannot be imported, or a class
        without a method of the protocol; names what is wrong.
    """
    if name in _SHIPPED[kind]:
        return _SHIPPED[kind][name]
    if ":" not in name:
        raise ConfigError(
            f"{kind}={name!r} is no policy; known are {', '.join(policy_names(kind))}, "
            "or name your own as 'package.module:Class'"
        )
    found = _imported(kind, name)
    if not isinstance(found, type):
        raise ConfigError(f"{kind}={name!r} must be a class, not {found!r}")
    for method in vars(_PROTOCOLS[kind]):
        if method.startswith("_"):
            continue
        if not callable(getattr(found, method, None)):
            raise ConfigError(f"{kind}={name!r} lacks the method {method}()")
    return found


def create_policy(kind: str, name: str) -> Any:
    """Return a new policy of `kind`, built without arguments.

    Raises:
      ConfigError: as `policy_class`, or the constructor refused.
    """
    found = policy_class(kind, name)
    try:
        return found()
    except Exception as error:
        raise ConfigError(f"{kind}={name!r} cannot be built: {error}") from error


def _imported(kind: str, name: str) -> object:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything when imported
        raise ConfigError(
            f"{kind}={name!r}: cannot import {module_name!r}: {error}"
        ) from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise ConfigError(
            f"{kind}={name!r}: module {module_name!r} has no {attribute!r}"
        ) from None

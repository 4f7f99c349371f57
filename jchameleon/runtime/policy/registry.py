"""Policies by name: those that ship here, and your own as "package.module:Class"."""

import importlib
import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jchameleon.config import nearest
from jchameleon.errors import ConfigError
from jchameleon.runtime.policy.admission import AdmissionPolicy
from jchameleon.runtime.policy.eviction import EvictionPolicy
from jchameleon.runtime.policy.predictor import LengthPredictor
from jchameleon.runtime.policy.prefetch import PrefetchPolicy

_PROTOCOLS: dict[str, type] = {
    "admission": AdmissionPolicy,
    "eviction": EvictionPolicy,
    "predictor": LengthPredictor,
    "prefetch": PrefetchPolicy,
}

POLICY_KINDS = tuple(_PROTOCOLS)
"""What a policy decides; each kind is a protocol of its own."""

# Short name -> module of this package and class; imported when first asked for.
_SHIPPED: dict[str, dict[str, str]] = {
    "admission": {
        "fifo": "admission:Fifo",
        "paced": "paced:Paced",
        "chameleon": "chameleon:Chameleon",
        "sjf": "sjf:ShortestJobFirst",
        "s-lora": "slora:SLora",
        "vtc": "vtc:Vtc",
    },
    "eviction": {
        "lru": "eviction:Lru",
        "chameleon": "eviction:ChameleonScore",
        "fairshare": "eviction:FairShare",
        "gdsf": "eviction:Gdsf",
        "drop": "eviction:Drop",
    },
    "predictor": {
        "max_tokens": "predictor:MaxTokens",
        "oracle": "predictor:Oracle",
        "noisy-oracle": "predictor:NoisyOracle",
        "quantile": "predictor:Quantile",
    },
    "prefetch": {
        "none": "prefetch:NoPrefetch",
        "queued": "prefetch:Queued",
        "histogram": "histogram:Histogram",
    },
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
    path = _SHIPPED[kind].get(name)
    if path is not None:
        path = f"{__package__}.{path}"
    elif ":" in name:
        path = name
    else:
        known = policy_names(kind)
        raise ConfigError(
            f"{kind}={name!r} is no policy{nearest(name, known)}; known are "
            f"{', '.join(known)}, or name your own as 'package.module:Class'"
        )
    found = _imported(kind, name, path)
    if not isinstance(found, type):
        raise ConfigError(f"{kind}={name!r} must be a class, not {found!r}")
    for method in vars(_PROTOCOLS[kind]):
        if method.startswith("_"):
            continue
        if not callable(getattr(found, method, None)):
            raise ConfigError(f"{kind}={name!r} lacks the method {method}()")
    return found


def create_policy(
    kind: str, name: str, options: Mapping[str, Any] = MappingProxyType({})
) -> Any:
    """Return a new policy of `kind`, built with `options` as keyword arguments.

    Raises:
      ConfigError: as `policy_class`; an option that the constructor does not know, or
        one that it needs and does not get; or the constructor refused.
    """
    found = policy_class(kind, name)
    _check_options(kind, name, found, options)
    try:
        return found(**options)
    except ConfigError as error:
        raise ConfigError(f"{kind}={name!r}: {error}") from error
    except Exception as error:
        raise ConfigError(
            f"{kind}={name!r} cannot be built: {_one_line(error)}"
        ) from error


def _check_options(
    kind: str, name: str, found: type, options: Mapping[str, Any]
) -> None:
    """Compare options with the constructor's parameters."""
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):  # a constructor that Python cannot look into
        return
    by_name = {
        one.name: one
        for one in parameters
        if one.kind in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD)
    }
    if not any(one.kind is one.VAR_KEYWORD for one in parameters):
        for option in options:
            if option not in by_name:
                known = (
                    f"options are {', '.join(by_name)}" if by_name else "it has none"
                )
                raise ConfigError(
                    f"{kind}={name!r} has no option {option!r}"
                    f"{nearest(option, by_name)}; {known}"
                )
    for option, one in by_name.items():
        if one.default is one.empty and option not in options:
            raise ConfigError(f"{kind}={name!r} needs the option {option!r}")


def _imported(kind: str, name: str, path: str) -> object:
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    # A user's module may raise anything when imported, and even try to exit.
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{kind}={name!r}: cannot import {module_name!r}: {_one_line(error)}"
        ) from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise ConfigError(
            f"{kind}={name!r}: module {module_name!r} has no {attribute!r}"
        ) from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__

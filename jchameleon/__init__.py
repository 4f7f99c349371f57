"""One base model, many LoRA adapters, one batch.

Names are imported on first use, so that `import jchameleon` costs milliseconds and
policies, the simulator and most of the command line run where jax is not wanted.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jchameleon import errors as errors
    from jchameleon.llm import LLM as LLM
    from jchameleon.outputs import CompletionOutput as CompletionOutput
    from jchameleon.outputs import RequestDelta as RequestDelta
    from jchameleon.outputs import RequestOutput as RequestOutput
    from jchameleon.sampling import SamplingParams as SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CompletionOutput",
    "RequestDelta",
    "RequestOutput",
    "SamplingParams",
    "__version__",
    "errors",
]

_HOMES = {
    "LLM": "jchameleon.llm",
    "CompletionOutput": "jchameleon.outputs",
    "RequestDelta": "jchameleon.outputs",
    "RequestOutput": "jchameleon.outputs",
    "SamplingParams": "jchameleon.sampling",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("jchameleon.errors")
    if name not in _HOMES:
        raise AttributeError(f"module 'jchameleon' has no attribute {name!r}")
    if name == "LLM":
        # Before jax is imported, and never for those who want no jax.
        importlib.import_module("jchameleon.runtime.xla_env").prepare()
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

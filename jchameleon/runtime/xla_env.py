"""What XLA reads from the environment when jax first looks for devices.

Only where a plugin for NVIDIA GPUs is installed: jax keys its compilation cache by the
text of `XLA_FLAGS`, so on a CPU a flag would change nothing but cost a cold start.
No jax here: `prepare` is to run before it is imported.
"""

import importlib.util
import logging
import os
import pkgutil
import re
import sys

logger = logging.getLogger(__name__)

MEM_FRACTION = "0.92"
"""Share of the GPU's memory that XLA takes; jax's own default is 0.75.

The rest is for what XLA does not manage: the CUDA context, cuBLAS, CUDA graphs.
"""

SKIPPED_PASS = "rematerialization"
"""Weights and pool fill most of the memory, and this pass would compute values twice to
save memory that a step does not need."""

_SKIP_FLAG = "--xla_disable_hlo_passes"


def prepare() -> None:
    """Set what is not set yet; what the user set is kept, or extended.

    Once jax has looked for devices that has no effect any more: then one warning names
    what is missing. Calling it again is no change.
    """
    if not (_has_cuda_plugin() and _may_use_gpu()):
        return
    wanted = {}
    # jaxlib refuses both names at once, and the user may have set the old one.
    if not any(
        os.environ.get(name)
        for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    ):
        wanted["XLA_CLIENT_MEM_FRACTION"] = MEM_FRACTION
    flags = os.environ.get("XLA_FLAGS", "")
    if flags.strip() and not flags.lstrip().startswith("-"):
        # XLA takes it for the name of a file of flags.
        _warn_once(f"XLA_FLAGS={flags!r} names a file: add {_SKIP_FLAG} there")
    elif merge_flags(flags) != flags:
        wanted["XLA_FLAGS"] = merge_flags(flags)
    if not wanted:
        return
    if _backend_is_up():
        missing = " ".join(f"{name}={value!r}" for name, value in wanted.items())
        _warn_once(
            f"jax has looked for devices already, without {missing}: use the LLM class "
            "first, or set that yourself"
        )
        return
    os.environ.update(wanted)


def merge_flags(flags: str) -> str:
    """Return the text of `XLA_FLAGS` that also leaves out `SKIPPED_PASS`."""
    lists = re.findall(rf"(?<!\S){_SKIP_FLAG}=(\S*)", flags)
    if any(SKIPPED_PASS in re.split(r"[,\"']", passes) for passes in lists):
        return flags
    # XLA adds up the lists of a flag that is there twice.
    return f"{flags} {_SKIP_FLAG}={SKIPPED_PASS}".lstrip()


def _has_cuda_plugin() -> bool:
    """Return whether jax would find a plugin named xla_cuda12, or of another CUDA."""
    spec = importlib.util.find_spec("jax_plugins")
    if spec is None or spec.submodule_search_locations is None:
        return False
    modules = pkgutil.iter_modules(spec.submodule_search_locations)
    return any(module.name.startswith("xla_cuda") for module in modules)


def _may_use_gpu() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return not platforms or bool({"cuda", "gpu"} & set(platforms.split(",")))


def _backend_is_up() -> bool:
    # jax has no public name for this; without it, prepare() is taken to be in time.
    bridge = sys.modules.get("jax._src.xla_bridge")
    up = getattr(bridge, "backends_are_initialized", None)
    return up is not None and up()


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning(message)

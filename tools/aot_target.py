"""A GPU that is not there: its description, and a device to compile for.

XLA compiles for the multiprocessor that a text of `configs/gpu/` describes; no driver
and no device is needed, only the wheels of `WHEELS` beside jax. Nothing runs.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from jchameleon.runtime.xla_env import merge_flags

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("pallas", "xla")
TARGETS = ("a40", "a100", "h100")

WHEELS = {
    "jax_cuda12_plugin": "jax-cuda12-plugin",
    "jax_plugins.xla_cuda12": "jax-cuda12-pjrt",
    "nvidia.cuda_nvcc": "nvidia-cuda-nvcc-cu12",
}
"""Modules that a compile for an absent GPU needs, with their wheels."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A GPU as a compiler and a bound see it; `core` is one multiprocessor.

    Attributes:
      text: a `stream_executor.GpuTargetConfigProto`.
      capability: "8.6".
    """

    name: str
    text: str
    capability: str
    cores: int
    registers_per_core: int
    threads_per_core: int
    shared_bytes_per_core: int
    shared_bytes_per_block: int
    blocks_per_core: int
    memory_bytes: int
    bandwidth_bytes_per_s: float
    bf16_flops_per_s: float


def read_target(name: str) -> Target:
    """Return one of `TARGETS` from `configs/gpu/`.

    Raises:
      ValueError: there is no such target, or its text lacks a figure.
    """
    if name not in TARGETS:
        raise ValueError(f"target={name!r} must be one of {', '.join(TARGETS)}")
    folder = ROOT / "configs" / "gpu"
    text = (folder / f"{name}.txtpb").read_text("utf-8")
    peaks = tomllib.loads((folder / "peaks.toml").read_text("utf-8"))[name]

    def figure(field: str) -> int:
        found = re.search(rf"^\s*{field}: (\d+)$", text, re.MULTILINE)
        if found is None:
            raise ValueError(f"configs/gpu/{name}.txtpb has no {field}")
        return int(found[1])

    major = re.search(
        r"cuda_compute_capability \{ major: (\d+)(?: minor: (\d+))?", text
    )
    if major is None:
        raise ValueError(f"configs/gpu/{name}.txtpb has no cuda_compute_capability")
    return Target(
        name=name,
        text=text,
        capability=f"{major[1]}.{major[2] or 0}",
        cores=figure("core_count"),
        registers_per_core=figure("registers_per_core_limit"),
        threads_per_core=figure("threads_per_core_limit"),
        shared_bytes_per_core=figure("shared_memory_per_core"),
        shared_bytes_per_block=figure("shared_memory_per_block_optin"),
        blocks_per_core=peaks["blocks_per_core_limit"],
        memory_bytes=figure("device_memory_size"),
        bandwidth_bytes_per_s=float(figure("memory_bandwidth")),
        bf16_flops_per_s=peaks["bf16_flops_per_s"],
    )


def find_target(kind: str, capability: str) -> tuple[Target | None, str]:
    """Return the target that a GPU is, or is like, and how that was found.

    By name ("NVIDIA A40"), else by compute capability ("9.0": an H200 counts as H100,
    with less bandwidth than it has); none where there is none of either.
    """
    words = kind.lower().replace("-", " ").split()
    for name in TARGETS:
        if name in words:
            return read_target(name), f"{name} by name"
    for name in TARGETS:
        target = read_target(name)
        if target.capability == capability:
            return target, f"{name} by compute capability alone"
    return None, "none known"


def missing_wheels() -> str | None:
    """Return a line that says what to install, or None if all is here."""
    missing = [wheel for module, wheel in WHEELS.items() if not _installed(module)]
    if not missing:
        return None
    version = importlib.metadata.version("jax")
    wanted = " ".join(
        f"{wheel}=={version}" if wheel.startswith("jax") else wheel for wheel in missing
    )
    return f"compiling for a GPU needs more wheels: pip install --no-deps {wanted}"


def prepare(dump_dir: Path) -> None:
    """Set what XLA reads when jax is first imported; it dumps under `dump_dir`.

    Without autotuning, which needs the device, and otherwise with an engine's flags.

    Raises:
      RuntimeError: jax has been imported already.
    """
    if "jax" in sys.modules:
        raise RuntimeError("call prepare() before jax is imported")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no driver to ask
    os.environ["JAX_PLATFORMS"] = "cpu,cuda"
    # C++ logs that there is no GPU, once per library.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    own = f"--xla_gpu_autotune_level=0 --xla_dump_to={dump_dir}"
    os.environ["XLA_FLAGS"] = merge_flags(f"{os.environ.get('XLA_FLAGS', '')} {own}")


def open_device(target: Target) -> Any:
    """Return a `jax.Device` to compile for; call `prepare` before."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=target.text, topology="1x1x1"
    )
    return topology.devices[0]


def ptxas_path() -> Path:
    """Return the assembler of the nvcc wheel."""
    spec = importlib.util.find_spec("nvidia.cuda_nvcc")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / "bin" / "ptxas"


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False

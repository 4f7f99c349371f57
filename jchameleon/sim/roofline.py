"""Step durations for GPUs and models that nobody has measured for us."""

import dataclasses
import re
import tomllib

from jchameleon.config import PROJECTIONS, ModelConfig, nearest
from jchameleon.errors import ConfigError
from jchameleon.resources import configs_dir
from jchameleon.sim.linear import LinearCost


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """What of a GPU's peak figures an engine reaches.

    Attributes:
      compute: of the peak operations, by prompts.
      bandwidth: of the memory's peak bandwidth, by decode.
      lora: of the peak operations, by prompts in adapters.
      link: of the peak bandwidth from host to device, by copies of adapters.
      host: times of what depends on the host and not on the GPU, over `paper_cost`'s.
    """

    compute: float = 0.5
    bandwidth: float = 0.8
    lora: float = 0.01
    link: float = 0.6
    host: float = 1.0


SHARES = {
    "pessimistic": Shares(compute=0.3, bandwidth=0.6, lora=0.005, link=0.34, host=1.5),
    "nominal": Shares(),
    "optimistic": Shares(compute=0.7, bandwidth=0.92, lora=0.05, link=0.8, host=0.5),
}
"""Nominal is Llama-7B on an A40 by the Chameleon paper (`paper_cost`): 0.18 ms a token
on 150 TFLOP/s, 25 ms for 13.5 GB on 696 GB/s, 1.51 us a token and rank for 2.1 MFLOP.
Pessimistic is the link: the paper's 10.7 GB/s are 0.34 of 31.5. All else is chosen, not
measured; good kernels reach the upper shares of compute and bandwidth."""

PREFILL_S = 12e-3
LORA_S = 9.3e-3
DECODE_LORA_S = 2e-3
DECODE_ROW_S = 0.12e-3
"""What depends on the host and not on the GPU, as in `paper_cost`."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """Figures of a GPU's data sheet: peaks, and its memory.

    Attributes:
      link_bytes_per_s: from the host to its memory.
    """

    bf16_flops_per_s: float
    bandwidth_bytes_per_s: float
    memory_bytes: int
    link_bytes_per_s: float


def gpu_names() -> list[str]:
    """Return the GPUs whose peaks are known, sorted."""
    return sorted(_peaks())


def load_gpu(name: str) -> Gpu:
    """Return a GPU of `configs/gpu/`.

    Raises:
      ConfigError: there is none of this name.
    """
    peaks = _peaks()
    if name not in peaks:
        raise ConfigError(
            f"gpu={name!r} is unknown{nearest(name, peaks)}; known are "
            + ", ".join(sorted(peaks))
        )
    text = (configs_dir() / "gpu" / f"{name}.txtpb").read_text("utf-8")

    def figure(field: str) -> int:
        found = re.search(rf"^\s*{field}: (\d+)$", text, re.MULTILINE)
        assert found is not None, f"{name}.txtpb names its {field}"
        return int(found[1])

    return Gpu(
        bf16_flops_per_s=peaks[name]["bf16_flops_per_s"],
        bandwidth_bytes_per_s=float(figure("memory_bandwidth")),
        memory_bytes=figure("device_memory_size"),
        link_bytes_per_s=peaks[name]["link_bytes_per_s"],
    )


def roofline_cost(
    model: ModelConfig,
    gpu: Gpu,
    targets: tuple[str, ...],
    shares: Shares = SHARES["nominal"],
) -> LinearCost:
    """Return the cost of a bfloat16 model: shares of the GPU's peaks.

    Prompts are bound by operations (two for a weight and token), decode by the bytes of
    weights, keys, values and adapters. The shares come from one GPU and one model and
    are a guess for all others; measure where you can (tools/fit_cost_model.py).

    Args:
      targets: projections that adapters touch.
      shares: of the peaks; its `link` is not of steps.
    """
    shapes = {p: model.projection_shape(p) for p in PROJECTIONS}
    layer = sum(d_in * d_out for d_in, d_out in shapes.values())
    weights = model.num_layers * layer + model.vocab_size * model.hidden_size
    rank_weights = model.num_layers * sum(sum(shapes[target]) for target in targets)
    flops_per_s = gpu.bf16_flops_per_s
    bytes_per_s = shares.bandwidth * gpu.bandwidth_bytes_per_s
    attention = 4 * model.num_layers * model.q_dim  # operations of a pair of tokens
    return LinearCost(
        prefill_s=shares.host * PREFILL_S,
        prefill_lora_s=shares.host * LORA_S,
        prefill_token_s=2 * weights / (shares.compute * flops_per_s),
        prefill_token_rank_s=2 * rank_weights / (shares.lora * flops_per_s),
        prefill_pair_s=attention / (shares.compute * flops_per_s),
        decode_s=2 * weights / bytes_per_s,
        decode_lora_s=shares.host * DECODE_LORA_S,
        decode_row_s=shares.host * DECODE_ROW_S,
        decode_kv_token_s=2 * model.num_layers * model.kv_elems / bytes_per_s,
        decode_rank_s=2 * rank_weights / bytes_per_s,
    )


def _peaks() -> dict[str, dict[str, float]]:
    text = (configs_dir() / "gpu" / "peaks.toml").read_text("utf-8")
    return tomllib.loads(text)

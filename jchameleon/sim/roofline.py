"""Step durations for GPUs and models that nobody has measured for us."""

import dataclasses
import re
import tomllib

from jchameleon.config import PROJECTIONS, ModelConfig, nearest
from jchameleon.errors import ConfigError
from jchameleon.resources import configs_dir
from jchameleon.sim.linear import LinearCost

COMPUTE_SHARE = 0.5
"""Of the peak operations that prompts reach: 0.18 ms a token of a 7B model on 150
TFLOP/s (`paper_cost`)."""

BANDWIDTH_SHARE = 0.8
"""Of the peak bandwidth that decode reaches: 25 ms for 13.5 GB on 696 GB/s."""

LORA_SHARE = 0.01
"""Of the peak operations that prompts reach in adapters of the paper's system: 1.51 us
a token and rank for 2.1 MFLOP."""

PREFILL_S = 12e-3
LORA_S = 9.3e-3
DECODE_LORA_S = 2e-3
DECODE_ROW_S = 0.12e-3
"""What depends on the host and not on the GPU, as in `paper_cost`."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """Peak figures of a GPU's data sheet."""

    bf16_flops_per_s: float
    bandwidth_bytes_per_s: float


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
    bandwidth = re.search(r"^\s*memory_bandwidth: (\d+)$", text, re.MULTILINE)
    assert bandwidth is not None, f"{name}.txtpb names its bandwidth"
    return Gpu(
        bf16_flops_per_s=peaks[name]["bf16_flops_per_s"],
        bandwidth_bytes_per_s=float(bandwidth[1]),
    )


def roofline_cost(model: ModelConfig, gpu: Gpu, targets: tuple[str, ...]) -> LinearCost:
    """Return the cost of a bfloat16 model: shares of the GPU's peaks.

    Prompts are bound by operations (two for a weight and token), decode by the bytes of
    weights, keys, values and adapters. The shares come from one GPU and one model and
    are a guess for all others; measure where you can (tools/fit_cost_model.py).

    Args:
      targets: projections that adapters touch.
    """
    shapes = {p: model.projection_shape(p) for p in PROJECTIONS}
    layer = sum(d_in * d_out for d_in, d_out in shapes.values())
    weights = model.num_layers * layer + model.vocab_size * model.hidden_size
    rank_weights = model.num_layers * sum(sum(shapes[target]) for target in targets)
    flops_per_s = gpu.bf16_flops_per_s
    bytes_per_s = BANDWIDTH_SHARE * gpu.bandwidth_bytes_per_s
    attention = 4 * model.num_layers * model.q_dim  # operations of a pair of tokens
    return LinearCost(
        prefill_s=PREFILL_S,
        prefill_lora_s=LORA_S,
        prefill_token_s=2 * weights / (COMPUTE_SHARE * flops_per_s),
        prefill_token_rank_s=2 * rank_weights / (LORA_SHARE * flops_per_s),
        prefill_pair_s=attention / (COMPUTE_SHARE * flops_per_s),
        decode_s=2 * weights / bytes_per_s,
        decode_lora_s=DECODE_LORA_S,
        decode_row_s=DECODE_ROW_S,
        decode_kv_token_s=2 * model.num_layers * model.kv_elems / bytes_per_s,
        decode_rank_s=2 * rank_weights / bytes_per_s,
    )


def _peaks() -> dict[str, dict[str, float]]:
    text = (configs_dir() / "gpu" / "peaks.toml").read_text("utf-8")
    return tomllib.loads(text)

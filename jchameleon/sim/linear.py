"""Step durations as a sum of terms: published, measured or fitted coefficients."""

import dataclasses

from jchameleon.config import is_number
from jchameleon.errors import ConfigError
from jchameleon.sim.cost import StepWork


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LinearCost:
    """Seconds for each thing that a step works on; all are 0 unless given.

    A step with prompts and decode rows costs both: the engine runs one program after
    the other. A prompt cut into chunks pays `prefill_s` for each.

    Attributes:
      prefill_s: a step with any prompt chunk.
      prefill_lora_s: one of them through an adapter.
      prefill_token_s: each prompt token.
      prefill_token_rank_s: each prompt token and rank of its adapter.
      prefill_pair_s: each pair of a prompt token and one that it attends to.
      decode_s: a step with any decode row.
      decode_lora_s: one of them through an adapter.
      decode_row_s: each row.
      decode_kv_token_s: each token that a row attends to.
      decode_rank_s: each rank of a row's adapter.
    """

    prefill_s: float = 0.0
    prefill_lora_s: float = 0.0
    prefill_token_s: float = 0.0
    prefill_token_rank_s: float = 0.0
    prefill_pair_s: float = 0.0
    decode_s: float = 0.0
    decode_lora_s: float = 0.0
    decode_row_s: float = 0.0
    decode_kv_token_s: float = 0.0
    decode_rank_s: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (is_number(value) and value >= 0):
                raise ConfigError(
                    f"cost {field.name}={value!r} must be a finite number, 0 or above"
                )

    def step_s(self, work: StepWork) -> float:
        """Return the duration of one iteration, in seconds."""
        total_s = 0.0
        if work.prefill_tokens:
            total_s += (
                self.prefill_s
                + self.prefill_token_s * work.prefill_tokens
                + self.prefill_token_rank_s * work.prefill_token_ranks
                + self.prefill_pair_s * work.prefill_pairs
            )
            if work.prefill_lora_tokens:
                total_s += self.prefill_lora_s
        if work.decode_rows:
            total_s += (
                self.decode_s
                + self.decode_row_s * work.decode_rows
                + self.decode_kv_token_s * work.decode_kv_tokens
                + self.decode_rank_s * work.decode_ranks
            )
            if work.decode_lora_rows:
                total_s += self.decode_lora_s
        return total_s

    def scaled(self, factor: float) -> "LinearCost":
        """Return the cost of an engine that takes `factor` times as long."""
        values = dataclasses.asdict(self).items()
        return LinearCost(**{name: factor * value for name, value in values})


def features(work: StepWork) -> tuple[float, ...]:
    """Return what each coefficient of `LinearCost` is multiplied with, in its order."""
    return (
        float(work.prefill_tokens > 0),
        float(work.prefill_lora_tokens > 0),
        work.prefill_tokens,
        work.prefill_token_ranks,
        work.prefill_pairs,
        float(work.decode_rows > 0),
        float(work.decode_lora_rows > 0),
        work.decode_rows,
        work.decode_kv_tokens,
        work.decode_ranks,
    )


def paper_cost() -> LinearCost:
    """Return Llama-7B on one A40, as Chameleon's figures have it.

    Iliakopoulou et al., MICRO '25. Figure 2 gives the TTFT of one "medium" request by
    rank, 74, 78, 88, 107 and 144 ms for 8 to 128, and its parts at rank 128: 40 % base,
    17.5 % load, the rest LoRA. Medium is 256 tokens (our inference: 2,000 tokens of
    rank 128 then take 0.77 s, where figure 3 has about 0.8). So base = 58 ms = 12 +
    256 * 0.18 and LoRA = 61 ms; the slope over ranks, 0.583 ms, less the load's 0.196
    is 256 * 1.51e-3, and 9.3 ms of LoRA do not depend on the rank. How base falls into
    12 and 256 * 0.18 is judgement.

    Decode: 25 ms are the weights at some 80 % of 696 GB/s, and 0.9e-3 ms a token its
    0.5 MiB of keys and values likewise. What rows, ranks and LoRA itself add (0.12 ms,
    4e-3 ms, 2 ms) is judgement: the paper says nothing of it.
    """
    return LinearCost(
        prefill_s=12e-3,
        prefill_lora_s=9.3e-3,
        prefill_token_s=0.18e-3,
        prefill_token_rank_s=1.51e-6,
        decode_s=25e-3,
        decode_lora_s=2e-3,
        decode_row_s=0.12e-3,
        decode_kv_token_s=0.9e-6,
        decode_rank_s=4e-6,
    )

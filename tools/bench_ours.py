"""Our engine as the offline benches run it."""

import time
from collections.abc import Mapping
from pathlib import Path

from bench_workload import Case, Sample, Settings
from random_adapters import write_random_adapter

from jchameleon import LLM, SamplingParams
from jchameleon.config import ModelConfig


class Ours:
    """Two engines, so that base rows with and without adapters run in turn."""

    def __init__(
        self,
        settings: Settings,
        adapters: Mapping[str, Path],
        folder: Path,
        *,
        plain: bool = True,
    ):
        """Start both, or without `plain` the second alone.

        Args:
          folder: takes the adapters of cold cases.
        """
        options = {
            "dtype": settings.dtype,
            "lora_targets": settings.targets,
            # Cases run the same prompts, and peers run each token of them.
            "prefix_cache": False,
            **settings.engine,
        }
        self._settings = settings
        self._folder = folder
        self._num_cold = 0
        # Programs without LoRA, the most that rows of the base model can hope for.
        self._plain = None
        if plain:
            self._plain = LLM(settings.model, **{**options, "lora_targets": ()})
        self._llm = LLM(settings.model, adapters=adapters, **options)

    def run(
        self, case: Case, prompts: list[list[int]], *, output_tokens: int
    ) -> Sample:
        """Make the case's adapters resident, or new where it is cold, and time it."""
        llm = self._plain if case.system == "plain" else self._llm
        assert llm is not None, "no plain engine was asked for"
        names = case.names(len(prompts))
        if case.cold:
            names = self._add_new_adapters(case)
        elif case.adapters:
            once = SamplingParams(max_tokens=1, temperature=0.0)
            llm.generate([[0]] * len(prompts), adapters=names, sampling=once)
        sampling = SamplingParams(
            max_tokens=output_tokens, temperature=0.0, ignore_eos=True
        )
        start_s = time.monotonic()
        outs = llm.generate(prompts, adapters=names, sampling=sampling)
        wall_s = time.monotonic() - start_s
        ttft_s = [out.timing.ttft_s for out in outs if out.timing.ttft_s is not None]
        if any(len(out.token_ids) != output_tokens for out in outs):
            raise RuntimeError(f"{case.label}: {[out.error for out in outs]}")
        records = [r for r in llm.step_records if r.start_s >= start_s]
        decodes = [r for r in records if not r.prefill]
        widest = max((len(r.decode) for r in decodes), default=0)
        return Sample(
            wall_s=wall_s,
            ttft_s=ttft_s,
            decode_step_s=[r.duration_s for r in decodes if len(r.decode) == widest],
            prefill_s=sum(r.duration_s for r in records if r.prefill),
            misses=sum(out.timing.adapter_cache_hit is False for out in outs),
            tokens=[out.token_ids for out in outs],
        )

    def close(self) -> None:
        """Stop the engines."""
        if self._plain is not None:
            self._plain.close()
        self._llm.close()

    def _add_new_adapters(self, case: Case) -> list[str | None]:
        """Register adapters whose content the engine has never seen."""
        self._num_cold += 1
        paths = write_adapters(
            self._settings,
            self._llm.model_config,
            {f"{n}-{self._num_cold}": rank for n, rank in case.adapters.items()},
            self._folder,
            seed=self._settings.seed + 10_000 * self._num_cold,
        )
        for name, path in paths.items():
            self._llm.register_adapter(name, path)
        return list(paths)


def write_adapters(
    settings: Settings,
    model: ModelConfig,
    ranks: Mapping[str, int],
    folder: Path,
    *,
    seed: int,
) -> dict[str, Path]:
    """Write one random adapter per name and return their directories."""
    return {
        name: write_random_adapter(
            folder / name, model, rank=rank, targets=settings.targets, seed=seed + i
        )
        for i, (name, rank) in enumerate(ranks.items())
    }

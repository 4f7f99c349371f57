"""transformers + PEFT on our loaded weights, run as their users run them."""

import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from bench_workload import Case, Sample, Settings

from jchameleon.config import ModelConfig
from jchameleon.models.loader import LoadedModel
from jchameleon.models.params import tensor_views

PACKAGES = ("torch", "transformers", "peft")


def missing_packages() -> list[str]:
    """Return those of `PACKAGES` that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


class Peers:
    """A plain model, and one with all adapters loaded into PEFT layers."""

    def __init__(
        self, settings: Settings, loaded: LoadedModel, adapters: Mapping[str, Path]
    ):
        """Copy f32 weights into both models and load the adapters."""
        # Not needed by anything else here, and seconds to import.
        import peft
        import torch
        import transformers

        torch.set_num_threads(settings.threads)
        transformers.logging.set_verbosity_error()
        self._torch, self._transformers = torch, transformers
        dtype = getattr(torch, settings.dtype)
        self._base = self._build(loaded).to(dtype).eval()
        model: Any = self._build(loaded).to(dtype)
        for name, path in adapters.items():
            if isinstance(model, peft.PeftModel):
                model.load_adapter(path, adapter_name=name)
            else:  # replaces layers of the model that it is given
                model = peft.PeftModel.from_pretrained(model, path, adapter_name=name)
        self._peft = model.eval()

    def run(
        self, case: Case, prompts: list[list[int]], *, output_tokens: int
    ) -> Sample:
        """Time one `generate` over one batch, every row with its own adapter."""
        torch = self._torch
        stamps_s: list[float] = []

        def stamp(tokens: Any, scores: Any, **kwargs: Any) -> Any:
            del scores, kwargs
            stamps_s.append(time.monotonic())
            return torch.zeros(len(tokens), dtype=torch.bool)

        model, options = self._base, {}
        if case.adapters:
            model, options = self._peft, {"adapter_names": case.names(len(prompts))}
        tokens = torch.tensor(prompts)
        config = self._transformers.GenerationConfig(
            do_sample=False,
            max_new_tokens=output_tokens,
            use_cache=True,
            pad_token_id=0,
            eos_token_id=None,
        )
        start_s = time.monotonic()
        outs = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            generation_config=config,
            stopping_criteria=[stamp],
            **options,
        )
        wall_s = time.monotonic() - start_s
        outputs = [tuple(row) for row in outs[:, tokens.shape[1] :].tolist()]
        if any(len(output) != output_tokens for output in outputs):
            raise RuntimeError(f"{case.label}: outputs of {[*map(len, outputs)]}")
        return Sample(
            wall_s=wall_s,
            ttft_s=[stamps_s[0] - start_s] * len(prompts),
            decode_step_s=np.diff(stamps_s).tolist(),
            prefill_s=stamps_s[0] - start_s,
            misses=0,
            tokens=outputs,
        )

    def _build(self, loaded: LoadedModel) -> Any:
        transformers, config = self._transformers, loaded.config
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                rms_norm_eps=config.rms_norm_eps,
                max_position_embeddings=config.max_position_embeddings,
                tie_word_embeddings=config.tie_embeddings,
                rope_parameters=rope_parameters(config),
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        views = tensor_views(config, loaded.params)
        weights = {name: self._torch.from_numpy(view) for name, view in views.items()}
        if config.tie_embeddings:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        model.load_state_dict(weights)
        return model


def rope_parameters(config: ModelConfig) -> dict[str, Any]:
    """Return the `rope_parameters` of transformers' LlamaConfig."""
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    parameters: dict[str, Any] = {
        "rope_type": scaling.kind,
        "rope_theta": config.rope_theta,
        "factor": scaling.factor,
    }
    if scaling.kind == "llama3":
        parameters["low_freq_factor"] = scaling.low_freq_factor
        parameters["high_freq_factor"] = scaling.high_freq_factor
        parameters["original_max_position_embeddings"] = scaling.original_max_position
    return parameters

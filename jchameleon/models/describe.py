"""What a model is and costs, from its small files; weights are not read."""

import dataclasses
from pathlib import Path
from typing import Any

from jchameleon.config import EngineConfig, default_max_model_len
from jchameleon.lora.layout import CHUNK_RANK, ChunkLayout
from jchameleon.models.files import PARAMS_DIR
from jchameleon.models.loader import ModelCard, holds_orbax, load_model_card
from jchameleon.models.params import num_parameters, numpy_dtype


def describe_model(
    name_or_path: str, *, dtype: str, targets: tuple[str, ...]
) -> dict[str, Any]:
    """Return the facts of a model as JSON types.

    Args:
      dtype: of parameters, KV cache and adapters, for the sizes in bytes.
      targets: projections that adapters touch, likewise.

    Raises:
      JChameleonError: as `load_model` and `ChunkLayout` do, as far as the weights are
        not concerned.
    """
    itemsize = numpy_dtype(dtype).itemsize
    card = load_model_card(name_or_path)
    config, tokenizer = card.config, card.tokenizer
    block_tokens = EngineConfig().kv_block_tokens
    layout = ChunkLayout(config, targets, config.kv_elems * block_tokens)
    page_bytes = layout.page_elems * config.num_layers * itemsize
    rank_elems = sum(sum(config.projection_shape(p)) for p in layout.targets)
    parameters = num_parameters(config)
    return {
        "model": config.name,
        "family": config.family,
        "source": card.source,
        "weights_bytes": _weights_bytes(card),
        "parameters": parameters,
        "parameter_bytes": parameters * itemsize,
        "dtype": dtype,
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "qkv_bias": config.qkv_bias,
        "o_bias": config.o_bias,
        "qk_norm": config.qk_norm,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling and dataclasses.asdict(config.rope_scaling),
        "context_tokens": config.max_position_embeddings,
        "sliding_window_tokens": config.sliding_window,
        "default_max_model_len": default_max_model_len(config),
        "vocabulary": config.vocab_size,
        "tied_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_ids": list(config.eos_token_ids),
        "tokenizer": None
        if tokenizer is None
        else {"tokens": tokenizer.vocab_size, "adds_bos": tokenizer.adds_bos},
        "chat_template": card.chat_template is not None,
        "kv_bytes_per_token": config.kv_elems * config.num_layers * itemsize,
        "page_bytes": page_bytes,
        "lora_targets": list(layout.targets),
        "adapter_bytes_per_rank": rank_elems * config.num_layers * itemsize,
        f"adapter_pool_bytes_per_{CHUNK_RANK}_ranks": (
            layout.pages_per_chunk * page_bytes
        ),
    }


def _weights_bytes(card: ModelCard) -> int | None:
    """Return the bytes of the files that hold the weights, None where there are none.

    A GGUF file is counted whole.
    """
    source = Path(card.source)
    if source.is_file():
        return source.stat().st_size
    if not source.is_dir():
        return None
    files = (
        (source / PARAMS_DIR).rglob("*")
        if holds_orbax(source)
        else source.glob("*.safetensors")
    )
    return sum(path.stat().st_size for path in files if path.is_file())

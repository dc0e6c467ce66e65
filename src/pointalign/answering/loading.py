"""Which model answers: find it by its name, say what is fetched, load it once for answering, and say what it is."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import tqdm
from transformers.utils import logging as transformers_logging

from pointalign.answering.answerer import Answerer
from pointalign.data.files.source import readable
from pointalign.device import native_bf16
from pointalign.errors import CheckpointError, ConfigError
from pointalign.models.checkpoint import find_checkpoint, local_checkpoint, resolve_model
from pointalign.models.language_model import EMBEDDED, cast_weights, hub_is_off, resolve_language_model
from pointalign.models.pointalign import PointAlignForConditionalGeneration
from pointalign.models.processing import load_processor
from pointalign.progress import say

# What transformers fetches of a language model's repository.
LANGUAGE_MODEL_FILES = ["*.safetensors", "*.json"]


def fetch_model(name: str) -> Path:
    """The local folder of a model; what has to be fetched from the Hub first, and how big it is, is said before.

    The language model that the folder refers to is announced too, and fetched when the model is loaded.

    Raises:
        CheckpointError: when there is no such model, or it is not a PointAlign model.
    """
    if local_checkpoint(name) is None:
        _announce_download(name, None)
    folder = find_checkpoint(name)
    config = _read_config(folder)
    if (language_model := config.get("language_model")) is not None:
        resolved = resolve_language_model(language_model)
        if not Path(resolved).is_dir():
            embedded = EMBEDDED.get(language_model)
            _announce_download(resolved, LANGUAGE_MODEL_FILES, f"; `{embedded.install}` has it too" if embedded else "")
    return folder


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {str(error).splitlines()[0]}; copy the checkpoint again") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "pointalign":
        raise CheckpointError(
            f"{folder} holds a model of type {kind!r}, not pointalign; give a folder that `pointalign train` or "
            "`pointalign import-checkpoint` wrote"
        )
    return config


def _announce_download(repository: str, patterns: list[str] | None, instead: str = "") -> None:
    if hub_is_off():
        return
    try:
        files = snapshot_download(repository, dry_run=True, allow_patterns=patterns, tqdm_class=_NoBar)
    except (OSError, ValueError):
        # Nothing can be fetched of what cannot be reached or does not exist: it is here already, or loading it says so.
        return
    sizes = [file.file_size or 0 for file in files if file.will_download]
    if sizes:
        say(
            f"fetching {repository} from the Hub: {len(sizes)} files, {readable(sum(sizes))}; they are kept for next time"
            + instead
        )


class _NoBar(tqdm):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


def load_answerer(
    model: str | Path | None = None, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> Answerer:
    """Load a model and its processor for answering: adapters merged, in evaluation mode, on one device.

    Args:
        model: as in `resolve_model`.
        device: where to compute; the accelerator if there is one, else the CPU, when None.
        dtype: of the language model; bf16 where the device multiplies it natively, else float32, when None. Point encoder
            and connector stay in float32.

    Raises:
        PointAlignError: when the model cannot be found or loaded, or device or dtype are unknown.
    """
    wanted = resolve_model(model)
    chosen = choose_device(device)
    numbers = choose_dtype(dtype, chosen)
    folder = fetch_model(wanted)
    with quiet_transformers():
        processor = load_processor(str(folder))
        loaded = PointAlignForConditionalGeneration.from_pretrained(folder, merged=True)
    language_model = _read_config(folder).get("language_model")
    cast_weights(loaded.language_model, numbers)
    loaded.to(chosen)  # pyright: ignore[reportArgumentType]
    weights = list(loaded.parameters())
    size = readable(sum(weight.numel() * weight.element_size() for weight in weights))
    count = sum(weight.numel() for weight in weights) / 1e6
    told = (
        f"model {wanted}: {count:,.1f} million weights, {size}, language model in {short_dtype(numbers)}, on {chosen}"
    )
    come_from = f"from {folder.resolve()}" + (f", its language model from {language_model}" if language_model else "")
    say(f"{told}; {come_from}")
    return Answerer(loaded, processor, wanted)


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device to compute on.

    Raises:
        ConfigError: when it is unknown or not there.
    """
    if device is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"cannot compute on device {str(device)!r}: {reason}; name another, or none") from error
    return chosen


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The numbers of a language model: those named, else bfloat16 where the device multiplies it natively, else float32.

    Raises:
        ConfigError: when they are unknown.
    """
    if dtype is None:
        return torch.bfloat16 if native_bf16(device) else torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"unknown dtype {dtype!r}; give float32, bfloat16 or float16")
    return found


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep what transformers says while it loads from people who did not ask; its errors still come through."""
    verbosity, bar_was_on = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar_was_on:
            transformers_logging.enable_progress_bar()


def short_dtype(dtype: torch.dtype) -> str:
    """A dtype's name: "bfloat16"."""
    return str(dtype).removeprefix("torch.")

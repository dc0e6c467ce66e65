"""How a model becomes a folder and a folder a model: own weights, adapters, and the language model by reference."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from pointalign.errors import CheckpointError, ConfigError
from pointalign.models.folding import fold_adapter
from pointalign.models.language_model import COMPILED, load_language_model, uncompiled
from pointalign.models.quantization import adopt, kept_whole, language_model_weights, quantization_config
from pointalign.storage import written_file

ADAPTED_PARTS = ("language_model", "connector.qformer")
WEIGHTS_FILE, ADAPTER_FILE, ONE_FILE = "model.safetensors", "adapter_model.safetensors", "1000GB"
# Weights of these may be infinite or no number.
NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What says where on the Hub a checkpoint is, and how it is fetched.
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
ASSETS = Path(__file__).parent.parent / "assets"
# The models that come with the package; the first is used where none is named.
BUNDLED_MODELS = ("household-135m", "household-135m-pretrain")
MODEL_VARIABLE = "POINTALIGN_MODEL"


def is_adapted(module: Any) -> bool:
    """Whether a module is peft's wrapper around another; told without importing peft, which takes seconds."""
    return isinstance(module, getattr(sys.modules.get("peft"), "PeftModel", ()))


def adapter_folder(part: str) -> str:
    """Name of the folder that holds a part's LoRA, as peft saves it."""
    return f"{part.rpartition('.')[2]}_adapter"


def plain_state_dict(model: nn.Module, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The model's own weights under the names of a model without adapters; guests and adapters are left out.

    Args:
        model: whose they are.
        given: its whole state where that was gathered already.

    Raises:
        ConfigError: when there is an adapter that would be saved nowhere.
    """
    whole = model.state_dict() if given is None else given
    adapted = tuple(f"{part}." for part in ADAPTED_PARTS if is_adapted(_part(model, part)))
    state = {}
    for name, tensor in {_uncompiled_name(name): tensor for name, tensor in whole.items()}.items():
        if name.startswith("alignment_regularizer."):
            continue
        if is_adapters(name):
            if not name.startswith(adapted):
                raise ConfigError(
                    f"{name} is of an adapter that no folder would hold; put it on by "
                    "model.language_model = peft.get_peft_model(model.language_model, ...)"
                )
            continue
        for wrapping in (".base_model.model.", ".base_layer.", ".original_module."):
            name = name.replace(wrapping, ".")
        state[name] = tensor
    return state


def _uncompiled_name(name: str) -> str:
    """A weight's name in the model that was not compiled, or of which no block was."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


def is_adapters(name: str) -> bool:
    """Whether a weight, by its name in an adapted model, is the adapter's and not the model's own."""
    return ".lora_" in name or ".modules_to_save." in name


def save_own_weights(
    model: Any,
    folder: Path,
    self_contained: bool,
    save: Callable[..., None],
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    **kwargs: Any,
) -> None:
    """Write config, own weights and adapters; see `PointAlignForConditionalGeneration.save_pretrained`."""
    state = plain_state_dict(model, state_dict)
    reference = model.config.language_model
    if self_contained:
        model.config.language_model = None
        if model.config.quantize is not None:
            # What was quantised is quantised again when it is read, so the weights stay as they came.
            state = {name: tensor for name, tensor in state.items() if not name.startswith("language_model.")}
            state.update(_weights_as_they_came(model, reference or model.weights_folder))
        elif model.rounded_from is not None:
            came = _weights_as_they_came(model, model.rounded_from)
            names = (name for name, tensor in state.items() if tensor.dtype == torch.bfloat16)
            rounded = [name for name in names if name.startswith("language_model.")]
            # A head that is the embedding is in no file of its own.
            own = state if state_dict is None else plain_state_dict(model)
            places = {name: own[name].data_ptr() for name in rounded}
            restored = {places[name]: came[name] for name in rounded if name in came}
            state.update({name: restored[place] for name, place in places.items() if place in restored})
    elif reference is None:
        raise ConfigError(
            "config.language_model does not say where the language model is, so its weights cannot be left out"
        )
    else:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("language_model.")}
        kwargs["max_shard_size"] = ONE_FILE
    try:
        save(folder, state_dict=state, is_main_process=is_main_process, **kwargs)
    finally:
        model.config.language_model = reference
    for part in ADAPTED_PARTS:
        module = _part(model, part)
        if is_adapted(module) and is_main_process:
            # peft would add embedding and head wherever the vocabulary has grown; they are the language model's own.
            given = None if state_dict is None else _part_of(state_dict, part)
            module.save_pretrained(str(folder / adapter_folder(part)), save_embedding_layers=False, state_dict=given)
            _drop_compiled_names(folder / adapter_folder(part) / ADAPTER_FILE)


def _weights_as_they_came(model: Any, source: str | Path) -> dict[str, Tensor]:
    """The language model's weights before they were quantised or rounded, by their names in a folder that holds them.

    Args:
        model: whose they are.
        source: the model's own folder (a path) or the language model's name.
    """
    if isinstance(source, Path):
        return language_model_weights(source)
    language_model = load_language_model(source)
    fit_embeddings(language_model, model.config.text_config.vocab_size)
    return {f"language_model.{name}": tensor for name, tensor in language_model.state_dict().items()}


def _part(model: nn.Module, name: str) -> Any:
    module: Any = model
    for attribute in name.split("."):
        module = uncompiled(getattr(module, attribute, None))
    return module


def _part_of(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """What a state holds of a part, as the part names it: without what compiling put before and around the part."""
    found = {}
    for name, tensor in state.items():
        left = name.split(".")
        for attribute in (*part.split("."), ""):
            while left[0] == COMPILED:
                left.pop(0)
            if attribute and left.pop(0) != attribute:
                break
        else:
            found[".".join(left)] = tensor
    return found


def _drop_compiled_names(file: Path) -> None:
    """Write an adapter's file as that of a model of which no block was compiled."""
    with safe_open(file, "pt") as opened:
        names, metadata = list(opened.keys()), opened.metadata()
    if any(name != _uncompiled_name(name) for name in names):
        state = {_uncompiled_name(name): tensor for name, tensor in load_file(file).items()}
        with written_file(file) as temporary:
            save_file(state, temporary, metadata)


def resolve_model(name: str | Path | None = None) -> str:
    """The folder, bundled model or Hub id that is meant.

    Args:
        name: a folder that `save_pretrained` wrote, a training run's folder, a bundled model's name or a Hub id; when None,
            what $POINTALIGN_MODEL says, else the first bundled model.
    """
    wanted = str(name or os.environ.get(MODEL_VARIABLE) or BUNDLED_MODELS[0])
    trained = Path(wanted) / "model"
    if (trained / "config.json").is_file() and not (Path(wanted) / "config.json").is_file():
        return str(trained)
    return wanted


def local_checkpoint(name: str) -> Path | None:
    """The folder of a checkpoint that is on this machine; None for anything else, which may be a Hub id.

    Raises:
        CheckpointError: for a folder without a checkpoint, or a bundled model that the installation lacks.
    """
    folder = Path(name)
    if (folder / "config.json").is_file():
        return folder
    if name in BUNDLED_MODELS:
        if (ASSETS / name / "config.json").is_file():
            return ASSETS / name
        raise CheckpointError(f"this installation lacks the bundled model {name}; install pointalign again")
    if folder.is_dir():
        raise CheckpointError(f"{folder} holds no config.json; give a folder that save_pretrained wrote")
    return None


def find_checkpoint(name: str, **hub: Any) -> Path:
    """The local folder of a checkpoint: a folder as it is, a bundled model's, anything else from the Hub.

    Args:
        name: see `resolve_model`.
        hub: of `HUB_OPTIONS`, as in `huggingface_hub.snapshot_download`.

    Raises:
        CheckpointError: when there is none of them.
    """
    if (folder := local_checkpoint(name)) is not None:
        return folder
    try:
        return Path(snapshot_download(name, **hub))
    except (OSError, ValueError, HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        known = ", ".join(BUNDLED_MODELS)
        raise CheckpointError(
            f"found no checkpoint {name!r}: give an existing folder, a reachable Hub id, or one of {known}"
        ) from error


def shared_folder(folder: Path) -> Path:
    """The folder that holds a checkpoint's own weights and its processor: itself, or the one that its config.json names.

    Raises:
        CheckpointError: when that one is not there.
    """
    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("shared_with")
    except (OSError, ValueError, AttributeError):
        return folder  # whoever reads the configuration tells what is wrong with it
    if named is None:
        return folder
    shared = folder / str(named)
    if not (shared / WEIGHTS_FILE).is_file():
        raise CheckpointError(f"{folder} shares the weights of {shared}, which is not there; copy both folders")
    return shared


def load_weights_file(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: when it is missing or truncated.
    """
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; copy the checkpoint again") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({error}); copy it again") from error


def load_into(module: nn.Module, state: dict[str, Tensor], source: Path, ignore: str = "\0") -> None:
    """Load a state dict that must fit exactly.

    Args:
        module: what to load into.
        state: names and tensors.
        source: named in errors.
        ignore: prefix of names that the state may lack.

    Raises:
        CheckpointError: when names or shapes differ.
    """
    try:
        result = module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{source} does not fit this model: {str(error).splitlines()[-1].strip()}") from error
    missing = [name for name in result.missing_keys if not name.startswith(ignore)]
    if missing or result.unexpected_keys:
        raise CheckpointError(
            f"{source} does not fit this model: missing {missing[:3] or 'nothing'}, left over "
            f"{result.unexpected_keys[:3] or 'nothing'}; load it with the configuration it was saved with"
        )


def load_own_weights(
    cls: Any, name: str, args: tuple, is_trainable: bool, merged: bool, load: Callable[..., Any], kwargs: dict[str, Any]
) -> Any:
    """Read what `save_own_weights` wrote; see `PointAlignForConditionalGeneration.from_pretrained`."""
    hub = {option: kwargs.pop(option) for option in HUB_OPTIONS if option in kwargs}
    told_of, given = kwargs.pop("output_loading_info", False), kwargs.pop("generation_config", None)
    folder = find_checkpoint(name, **hub)
    saved = _saved_generation_config(folder)
    generation_config = saved if given is None else given
    try:
        config = kwargs.pop("config", None) or cls.config_class.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {folder / 'config.json'}: {str(error).splitlines()[0]}; copy the checkpoint again"
        ) from error
    config.quantize = kwargs.pop("quantize", None) or config.quantize
    if config.language_model is None:
        if config.quantize is not None:
            kwargs["quantization_config"] = quantization_config(config.quantize, kept_whole(cls, config))
        try:
            model, report = load(folder, *args, config=config, output_loading_info=True, **kwargs)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(
                f"cannot load {folder}: {str(error).splitlines()[0]}; copy the checkpoint again"
            ) from error
        # transformers fills what is missing with random weights and says so in a warning only.
        missing, left_over = sorted(report["missing_keys"])[:3], sorted(report["unexpected_keys"])[:3]
        if missing or left_over:
            raise CheckpointError(
                f"{folder} does not fit its config.json: missing {missing or 'nothing'}, left over "
                f"{left_over or 'nothing'}; copy the checkpoint again"
            )
        if config.quantize is not None:
            adopt(model, model.language_model)
        model.weights_folder = folder
    else:
        hub.pop("revision", None)  # of this checkpoint, not of its language model
        language_model = load_language_model(config.language_model, quantize=config.quantize, **hub, **kwargs)
        fit_embeddings(language_model, config.text_config.vocab_size)
        model = cls(config, language_model=language_model)
        weight = language_model.get_input_embeddings().weight
        for part in (model.point_encoder, model.connector):
            part.to(
                device=weight.device,
                dtype=kwargs.get("dtype") if isinstance(kwargs.get("dtype"), torch.dtype) else None,
            )
        weights = shared_folder(folder) / WEIGHTS_FILE
        load_into(model, load_weights_file(weights), weights, ignore="language_model.")
        config.shared_with = None
        report = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    if generation_config is not None:
        model.generation_config = generation_config
    for part in ADAPTED_PARTS:
        path = folder / adapter_folder(part)
        if path.is_dir() and not (merged and _folded(model, part, path)):
            attach_adapter(model, part, path, is_trainable)
    if merged:
        model.merge_adapters()
    return (model.eval(), report) if told_of else model.eval()


def _saved_generation_config(folder: Path) -> GenerationConfig | None:
    """What a checkpoint says of answers, if it does; a broken one transformers would replace by its own without a word."""
    file = folder / GENERATION_CONFIG_NAME
    try:
        return GenerationConfig.from_pretrained(folder) if file.is_file() else None
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"cannot read {file}: {str(error).splitlines()[0]}; copy the checkpoint again") from error


def _folded(model: Any, part: str, path: Path) -> bool:
    """Fold a saved LoRA into a part of the model; tells whether that could be done without peft."""
    if part == "language_model" and model.config.quantize is not None:
        return False  # see `merge_adapters`
    try:
        settings = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        state = load_file(path / ADAPTER_FILE)
    except (OSError, ValueError, SafetensorError):
        return False  # peft says what is missing or broken
    if not fold_adapter(_part(model, part), settings, state):
        return False
    if part == "language_model":
        model.config.language_model = model.weights_folder = None
    return True


def attach_adapter(model: nn.Module, part: str, path: Path, is_trainable: bool) -> None:
    """Put a saved LoRA around a part of the model.

    Raises:
        CheckpointError: when the adapter is truncated or does not fit.
    """
    from peft import PeftModel

    module = _part(model, part)
    try:
        adapted = PeftModel.from_pretrained(module, str(path), is_trainable=is_trainable)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"cannot load the adapter {path}: {str(error).splitlines()[0]}; copy it again") from error
    # Of the name that others know the part by, peft would ask the Hub for its vocabulary whenever it is saved.
    adapted.peft_config["default"].base_model_name_or_path = getattr(module, "name_or_path", None)
    parent, _, attribute = part.rpartition(".")
    setattr(_part(model, parent) if parent else model, attribute, adapted)


def merge_adapters(model: Any) -> bool:
    """Fold adapters into the parts they adapt; tells whether the language model's was.

    A quantised language model keeps its own: folded in, it would be rounded to a few bits.
    """
    parts = ADAPTED_PARTS if model.config.quantize is None else ADAPTED_PARTS[1:]
    adapted = [part for part in parts if is_adapted(_part(model, part))]
    for part in adapted:
        parent, _, attribute = part.rpartition(".")
        setattr(_part(model, parent) if parent else model, attribute, _part(model, part).merge_and_unload())
    return "language_model" in adapted


def check_weights(model: nn.Module, name: str) -> None:
    """Refuse a model of which nothing that is measured would mean anything.

    Args:
        model: whose weights are looked at.
        name: told in errors.

    Raises:
        CheckpointError: when a weight is not finite.
    """
    for parameter, weight in model.named_parameters():
        if weight.dtype in NUMBERS and not weight.is_meta and not weight.isfinite().all():
            raise CheckpointError(
                f"{name} has weights that are no finite numbers ({parameter}); train or import it again"
            )


def fit_embeddings(language_model: Any, rows: int) -> None:
    """Grow the token embedding to a number of rows; the new rows are zero, so that they are the same every time."""
    old = language_model.get_input_embeddings().weight.shape[0]
    if rows <= old:
        return
    language_model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        language_model.get_input_embeddings().weight[old:] = 0
        head = language_model.get_output_embeddings()
        head.weight[old:] = 0
        if getattr(head, "bias", None) is not None:
            head.bias[old:] = 0

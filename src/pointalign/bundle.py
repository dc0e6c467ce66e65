"""From training runs to a model that is small enough to ship: matrices in bfloat16, shared parts once, a model card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pointalign.errors import CheckpointError
from pointalign.model_card import model_card, result_files
from pointalign.models.checkpoint import ADAPTED_PARTS, WEIGHTS_FILE, adapter_folder, load_weights_file
from pointalign.models.language_model import EMBEDDED
from pointalign.progress import say
from pointalign.run_folder import RunFolder
from pointalign.runs import PROJECTOR_FILE
from pointalign.storage import lie_in_each_other, write_text, written_folder

ADAPTER = adapter_folder("language_model")
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
# What a model's folder holds besides weights, as far as it is there.
TEXT_FILES = (
    "generation_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)

BUNDLE_FILES = {
    "README.md",
    "config.json",
    *TEXT_FILES,
    WEIGHTS_FILE,
    PROJECTOR_FILE,
    f"{ADAPTER}/{ADAPTER_CONFIG}",
    f"{ADAPTER}/{ADAPTER_WEIGHTS}",
}


def compact(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as they are shipped: matrices in bfloat16, as they are multiplied on most accelerators.

    Vectors (norms, biases, batch norm's running statistics) and integers stay: they weigh little, and rounding them shifts
    every feature. `from_pretrained` turns all of it back into the model's own numbers.
    """
    return {
        name: tensor.to(torch.bfloat16) if tensor.is_floating_point() and tensor.ndim >= 2 else tensor
        for name, tensor in state.items()
    }


def bundle(run: Path, out: Path, start: Path | None = None, evaluations: Sequence[Path] = ()) -> dict[str, Any]:
    """Make a folder that `from_pretrained` loads of a training run's model, and beside it one of the model it started from.

    The same runs give the same bytes.

    Args:
        run: of a fine-tune that trained the language model's LoRA.
        out: the folder to write; the start is written beside it, as `{out}-pretrain`.
        start: the run that it started from, which must have the same point encoder and connector; None leaves it out.
        evaluations: whose numbers the card tells: the model's, then those of what it is compared with; the run's own when
            none is named.

    Returns:
        The folders, and the bytes of all their files and of the largest.

    Raises:
        CheckpointError: when a run holds no such model, the two have other weights before the language model, an evaluation
            holds no results, or a folder to write holds something else, lies in a run or cannot be written. What was
            there is then left as it was.
    """
    if out.name in ("", ".."):
        out = Path(os.path.abspath(out))
        if not out.name:
            raise CheckpointError(f"cannot write {out}: it has no name; name a folder")
    model, beside = RunFolder(run).model, out.with_name(f"{out.name}-pretrain")
    _check_model(model)
    if start is not None:
        _check_start(RunFolder(start).model, model)
    for folder in (out, beside) if start is not None else (out,):
        _check_place(folder, [run] if start is None else [run, start])
    if start is None and _read_json(beside / "config.json", {}).get("shared_with") == f"../{out.name}":
        raise CheckpointError(
            f"{beside} shares the weights of the model that lies in {out}; give its run as --start, or delete it first"
        )
    for folder in evaluations:
        if not result_files(folder):
            raise CheckpointError(f"{folder} holds no results; give a folder that `pointalign evaluate` wrote")
    if Path(named := _read_json(model / "config.json")["language_model"] or "").is_dir():
        say(
            f"the bundle refers to the language model's folder {named}, which others do not have; for them write the model "
            "with `save_pretrained(FOLDER, self_contained=True)`"
        )
    with written_folder(out) as folder:
        _write_shared(model, folder)
        _write_adapter(model, folder)
        card = model_card(out.name, RunFolder(run), evaluations or [run / "evaluation"])
        write_text(folder / "README.md", card)
    folders = [out]
    if start is not None:
        folders.append(beside)
        with written_folder(beside) as folder:
            _write_config(RunFolder(start).model, folder, shared_with=f"../{out.name}")
            _write_adapter(RunFolder(start).model, folder)
    sizes = [file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file()]
    return {"out": [str(folder) for folder in folders], "bytes": sum(sizes), "largest_file": max(sizes)}


def _check_model(model: Path) -> None:
    needed = (
        "config.json",
        "tokenizer.json",
        WEIGHTS_FILE,
        f"{ADAPTER}/{ADAPTER_WEIGHTS}",
        f"{ADAPTER}/{ADAPTER_CONFIG}",
    )
    for file in (model / name for name in needed):
        if not file.is_file():
            raise CheckpointError(
                f"{file} is missing; give the folder of a finished run that trains language_model_lora"
            )
    for part in ADAPTED_PARTS:
        if adapter_folder(part) != ADAPTER and (model / adapter_folder(part)).is_dir():
            raise CheckpointError(
                f"{model / adapter_folder(part)} is a LoRA that a bundle has no place for; share the model's folder as it is"
            )


def _check_start(start: Path, model: Path) -> None:
    _check_model(start)
    before, after = (load_weights_file(folder / WEIGHTS_FILE) for folder in (start, model))
    if before.keys() != after.keys() or not all(torch.equal(before[name], after[name]) for name in before):
        raise CheckpointError(
            f"{start} and {model} have other weights before the language model; give the run that the fine-tune started from"
        )


def _check_place(out: Path, runs: Sequence[Path]) -> None:
    """See that nothing is lost when a folder takes this place: it is free, empty or holds an earlier bundle."""
    for run in runs:
        if lie_in_each_other(out, run):
            raise CheckpointError(f"{out} and the run {run} lie in each other; name another --out")
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; name a folder as --out")
    other = sorted({str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()} - BUNDLE_FILES)
    if other:
        raise CheckpointError(f"{out} holds {other[0]}, which is of no bundle; name another --out, or empty it first")


def _read_json(file: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a file of JSON holds, or what stands for it where it is missing."""
    if missing is not None and not file.is_file():
        return missing
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is broken ({error}); copy it again") from error


def _write_shared(model: Path, folder: Path) -> None:
    for name in TEXT_FILES:
        if (model / name).is_file():
            shutil.copyfile(model / name, folder / name)
    _write_config(model, folder)
    tokenizer = _read_json(folder / "tokenizer.json")
    # Without the indentation, half the size.
    write_text(folder / "tokenizer.json", json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")))
    for name in (WEIGHTS_FILE, PROJECTOR_FILE):
        if (model / name).is_file():
            _write_weights(model / name, folder / name)


def _write_config(model: Path, folder: Path, **changes: str) -> None:
    config = {**_read_json(model / "config.json"), **changes}
    for part in config.values():
        if isinstance(part, dict):  # where a part was loaded from is a folder of this machine
            part.pop("_name_or_path", None)
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def _write_adapter(model: Path, folder: Path) -> None:
    """The LoRA as peft saves it, with the language model by the name that others know it by."""
    config = _read_json(model / ADAPTER / ADAPTER_CONFIG)
    name = _read_json(model / "config.json")["language_model"]
    config["base_model_name_or_path"] = EMBEDDED[name].hub_id if name in EMBEDDED else name
    for key in ("target_modules", "modules_to_save"):  # sets to peft, whose order changes from run to run
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    write_text(folder / ADAPTER / ADAPTER_CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    _write_weights(model / ADAPTER / ADAPTER_WEIGHTS, folder / ADAPTER / ADAPTER_WEIGHTS)


def _write_weights(source: Path, target: Path) -> None:
    save_file(compact(load_weights_file(source)), target, metadata={"format": "pt"})

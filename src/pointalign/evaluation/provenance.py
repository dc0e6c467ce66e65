"""What a result came from: hashes of model and prompts, versions, machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pointalign.device import machine_name
from pointalign.models.checkpoint import ADAPTED_PARTS, adapter_folder, find_checkpoint, shared_folder
from pointalign.models.language_model import resolve_language_model
from pointalign.run_folder import PACKAGES, git_commit

READ_AT_ONCE = 1 << 22
# What answering reads of a model's folder: not its documentation, nor what only training needs.
READ_ENDINGS = (".json", ".safetensors", ".bin", ".jinja", ".model", ".txt")
NOT_READ = ("alignment_projector.safetensors",)
HASH_LENGTH = 16


def model_fingerprint(name: str) -> str:
    """Hash of all files that answering reads of a model, and of the language model where its configuration names one.

    Args:
        name: folder or Hub id of a model that can be loaded.
    """
    digest = hashlib.sha256()
    folder = find_checkpoint(name)
    _add_folder(digest, folder)
    if (shared := shared_folder(folder)) != folder:
        _add_folder(digest, shared)
    language_model = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("language_model")
    if language_model is not None:
        resolved = Path(resolve_language_model(language_model))
        if resolved.is_dir():
            _add_folder(digest, resolved)
        else:
            digest.update(language_model.encode())
    return digest.hexdigest()[:HASH_LENGTH]


def folder_fingerprint(folder: Path) -> str:
    """Hash of all files of a model's folder that answering reads: the same wherever and whenever it was copied to."""
    digest = hashlib.sha256()
    _add_folder(digest, folder)
    return digest.hexdigest()[:HASH_LENGTH]


def _add_folder(digest: Any, folder: Path) -> None:
    # A run's or evaluation's own folder may lie in a model's.
    parts = [folder / adapter_folder(part) for part in ADAPTED_PARTS]
    for path in sorted(path for place in (folder, *parts) if place.is_dir() for path in place.iterdir()):
        if path.suffix in READ_ENDINGS and path.name not in NOT_READ and path.is_file():
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while piece := file.read(READ_AT_ONCE):
                    digest.update(piece)


def prompt_hash(processor: Any, question: str, answer_start: str = "") -> str:
    """Hash of the whole prompt with its placeholders, and of how the answer begins where that is given."""
    messages = [{"role": "user", "content": [{"type": "point_cloud"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(messages, tokenize=False) + answer_start
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_LENGTH]


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    """Versions and machine of an evaluation."""
    versions: dict[str, str | None] = {}
    for package in (*PACKAGES, "sentence-transformers", "scipy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "git_commit": git_commit(Path(__file__).parent),
        "device": machine_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": processes,
    }

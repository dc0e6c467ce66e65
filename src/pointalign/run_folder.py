"""A run's folder: the resolved recipe, what it ran on, metrics as JSON lines, checkpoints to go on from, figures."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from pointalign.config import Recipe, load_recipe, to_yaml
from pointalign.errors import ConfigError
from pointalign.storage import taken_lock, write_text

# Settings that say how the work is done and told of, not what is trained.
HOW = ("fsdp", "workers", "compile", "cuda_graphs", "logging_steps", "save_steps", "report_to")
PACKAGES = ("pointalign", "torch", "transformers", "peft", "accelerate", "safetensors", "numpy")


class RunFolder:
    """Paths and files of one training run.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe_file = self.path / "recipe.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"

    def claimed(self) -> AbstractContextManager[Any]:
        """While this lasts, no other process with the same cache folder, where the lock lies, trains in this folder.

        Raises:
            DataError: when another one does, or the cache cannot be written.
        """
        return taken_lock(self.metrics_file)

    def open(self, recipe: Recipe, resume: bool) -> None:
        """Prepare the folder for a run, or for going on with one.

        Raises:
            ConfigError: when the folder holds another run, when there is nothing to resume, or when it cannot be written.
        """
        started = self.recipe_file.is_file() and self.has_begun()
        if started and not resume:
            raise ConfigError(f"{self.path} holds a run already; add --resume to go on with it, or name another --out")
        if started:
            self._check_same(recipe)
            return
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_text(self.path / "environment.json", json.dumps(environment(recipe), indent=2) + "\n")
            write_text(self.recipe_file, to_yaml(recipe))
        except OSError as error:
            raise ConfigError(
                f"cannot write {self.path}: {error.strerror}; free some space or name another --out"
            ) from error

    def has_begun(self) -> bool:
        """Whether there is anything to go on with; a run that failed before its first step leaves nothing."""
        left = any(self.checkpoints.iterdir()) if self.checkpoints.is_dir() else False
        return left or self.model.exists() or self.metrics_file.is_file()

    def _check_same(self, recipe: Recipe) -> None:
        if changed := self.changed_settings(recipe):
            raise ConfigError(
                f"{self.path} was started with another recipe ({'; '.join(changed[:4])}); resume with the same settings "
                "or name another --out"
            )

    def changed_settings(self, recipe: Recipe) -> list[str]:
        """Settings of another recipe that differ from the run's; how the work is done is no part of what is trained.

        Raises:
            ConfigError: when the run's recipe cannot be read.
        """
        how = {name: getattr(recipe, name) for name in HOW}
        started = replace(load_recipe(self.recipe_file), **how)
        return _differences(asdict(started), asdict(recipe))

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written whole; its state file is written last."""
        numbered = sorted(
            self.checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True
        )
        for path in numbered:
            try:
                json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            return path
        return None

    def forget_metrics_after(self, step: int) -> None:
        """Drop metric lines of steps that will be run again."""
        if self.metrics_file.is_file():
            kept = [line for line in self.metrics() if line["step"] <= step]
            write_text(self.metrics_file, "".join(json.dumps(line) + "\n" for line in kept))

    def add_metrics(self, values: dict[str, Any]) -> None:
        """Append one line."""
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All whole lines; one that was being written when the run was killed is left out."""
        if not self.metrics_file.is_file():
            return []
        lines = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
        return lines


def git_commit(folder: Path) -> str | None:
    """The commit of the source tree, with "+changes" where files differ from it; None outside a checkout."""
    try:
        commit = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(folder), "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changed else "")


def environment(recipe: Recipe) -> dict[str, Any]:
    """What a run ran on: versions, commit, seed, machine."""
    import torch

    from pointalign.device import machine_name

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "seed": recipe.seed,
        "versions": {**versions, "torch": torch.__version__},
        "python": platform.python_version(),
        "git_commit": git_commit(Path(__file__).parent),
        "device": machine_name(),
        "threads": torch.get_num_threads(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _differences(was: Any, now: Any, name: str = "") -> list[str]:
    """Where two recipes' values differ, each by its dotted name."""
    if was == now:
        return []
    if isinstance(was, dict) and isinstance(now, dict) and was.keys() == now.keys():
        pairs = [(key, was[key], now[key]) for key in was]
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        pairs = list(zip(range(len(was)), was, now, strict=True))
    else:
        return [f"{name}: {was} there, {now} now"]
    return [
        line for key, *values in pairs for line in _differences(*values, name=f"{name}.{key}" if name else str(key))
    ]

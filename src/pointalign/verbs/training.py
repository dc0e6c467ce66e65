"""Verbs that make models: train, sweep, quickstart, bundle, import-checkpoint, and the recipes they follow."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pointalign.config import Recipe, recipe_head, recipe_names


@dataclass
class Train:
    """Run a training recipe; every setting of the recipe can be overridden."""

    recipe: tyro.conf.Positional[str]
    """A recipe that comes with the package, or a YAML file."""
    out: Path | None = None
    """The run's folder; runs/NAME when not given."""
    resume: bool = False
    """Go on with the run in that folder."""
    settings: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)

    def run(self) -> dict[str, Any]:
        from pointalign.runs import train

        return train(self.settings, self.out or Path("runs") / self.settings.name, self.resume)


@dataclass
class Sweep:
    """Train and measure several arms of a recipe with several seeds, and tell their paired differences in one table."""

    file: tyro.conf.Positional[Path]
    """The sweep in YAML: base (a recipe), arms (by name what each changes), seeds; see docs/sweeps.md."""
    out: Path | None = None
    """Folder for the runs and the table, runs/ and the file's name when not given; run again, it goes on."""
    only: list[str] = field(default_factory=list)
    """These runs alone, as ARM or ARM/seed-N; all of the sweep's when not given."""

    def run(self) -> dict[str, Any]:
        from pointalign.sweep.run import run_sweep

        return run_sweep(self.file, self.out or Path("runs") / self.file.stem, self.only)


@dataclass
class Quickstart:
    """Fine-tune a real model twice on the bundled objects, with and without alignment, and compare the two."""

    out: Path = Path("runs/demo")
    """Its folder; one that was stopped goes on where it was."""
    fast: bool = False
    """A few steps and objects only, to see that everything runs."""

    def run(self) -> dict[str, Any]:
        from pointalign.quickstart import run_quickstart

        return run_quickstart(self.out, self.fast)


@dataclass
class Bundle:
    """Make a small folder of a run's model to give to others: bfloat16 matrices, and a model card with its measured numbers."""

    run_folder: tyro.conf.Positional[Path]
    """The run: a fine-tune that trained the language model's LoRA."""
    out: Path
    """Folder to write."""
    start: Path | None = None
    """The run that it started from: its LoRA is written to a folder beside, OUT-pretrain, which shares all other weights."""
    evaluation: tyro.conf.UseAppendAction[list[Path]] = field(default_factory=list)
    """Folder of `pointalign evaluate` whose numbers the card tells, the model's first, then others' to compare with; the run's
    own when not given."""

    def run(self) -> dict[str, Any]:
        from pointalign.bundle import bundle

        return bundle(self.run_folder, self.out, self.start, self.evaluation)


@dataclass
class ImportCheckpoint:
    """Turn a published checkpoint into a folder that `from_pretrained` loads."""

    family: tyro.conf.Positional[Literal["minigpt-3d", "pointllm"]]
    """minigpt-3d (PointAlign's checkpoints too) or pointllm."""
    sources: tyro.conf.Positional[list[str]]
    """Files in the order they are applied, or PointLLM's one folder."""
    out: Path
    """Folder to write."""
    language_model: str | None = None
    """Folder or Hub id of Phi-2, or its configuration when the files hold all weights; minigpt-3d needs it."""
    qformer: str | None = None
    """Folder or configuration of the Q-Former."""
    tokenizer: str | None = None
    """Folder or Hub id of the tokenizer; the language model's when not given."""
    num_groups: int = 512
    """Local groups of each cloud."""
    group_size: int = 32
    """Points of each group."""
    point_encoder_heads: int = 6
    """Heads of the point encoder."""
    lora_alpha: int = 16
    """Scale of the language model's LoRA over its rank."""
    num_points: int = 8192
    """Points of each cloud."""
    allow_missing: list[str] = field(default_factory=list)
    """Names, beginnings or patterns of tensors that may be missing."""
    merge: bool = False
    """Add the LoRA to the weights instead of keeping it as adapters."""

    def run(self) -> dict[str, Any]:
        from pointalign.importers.command import import_checkpoint

        report = import_checkpoint(**vars(self))
        for line in report.lines():
            print(line, file=sys.stderr)
        return {"out": str(self.out), **report.summary()}


@dataclass
class Recipes:
    """List the recipes that come with the package, tell what one reproduces and needs, or count what it trains."""

    name: tyro.conf.Positional[str | None] = None
    """One recipe; all when not given."""
    count: bool = False
    """Count the weights of the recipe's model at full size, part by part; nothing is loaded but sizes."""
    page: Path | None = None
    """A page whose tables of all recipes are rewritten (docs/recipes.md)."""

    def run(self) -> dict[str, Any]:
        if self.page is not None or self.count:
            return self._count()
        if self.name is not None:
            lines = recipe_head(self.name)
            print("\n".join(lines), file=sys.stderr)
            return {"recipe": self.name, "head": lines}
        for name in recipe_names():
            print(f"{name:32} {recipe_head(name)[0]}", file=sys.stderr)
        return {"recipes": recipe_names()}

    def _count(self) -> dict[str, Any]:
        from pointalign import recipe_table

        if self.page is not None:
            recipe_table.rewrite_page(self.page)
            return {"page": str(self.page)}
        return recipe_table.tell_counts() if self.name is None else recipe_table.tell_count(self.name)

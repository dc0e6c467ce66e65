"""What `pointalign import-checkpoint` does: read a published checkpoint, write an ordinary folder, tell what happened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pointalign.errors import ConfigError
from pointalign.importers.assembly import check_place, export
from pointalign.importers.minigpt3d import load_minigpt3d
from pointalign.importers.pointllm import load_pointllm
from pointalign.importers.tensors import ImportReport


def import_checkpoint(
    family: Literal["minigpt-3d", "pointllm"],
    sources: Sequence[str],
    out: str | Path,
    language_model: str | None = None,
    qformer: str | None = None,
    tokenizer: str | None = None,
    **options: Any,
) -> ImportReport:
    """Import a published checkpoint into a folder that `from_pretrained` loads.

    Args:
        family: "minigpt-3d" (PointAlign's checkpoints too) or "pointllm".
        sources: files in the order they are applied, or PointLLM's one folder.
        out: the folder to write; the alignment projector goes into `alignment_projector.safetensors` there.
        language_model: as in `import_minigpt3d`, which needs it.
        qformer: as in `import_minigpt3d`.
        tokenizer: as in `import_minigpt3d`.
        options: `num_groups`, `group_size`, `point_encoder_heads`, `lora_alpha`, `num_points`, `allow_missing` and
            `merge`, as in `import_minigpt3d`.

    Returns:
        What was loaded, missing and left over: `lines()` for people, `summary()` for programs.

    Raises:
        ConfigError: for options that do not belong to the family, and numbers that no model has.
        CheckpointError: as `import_minigpt3d` and `import_pointllm`, and when the folder cannot be written or holds
            something else, which is seen before anything is read.
    """
    for name in ("num_groups", "group_size", "point_encoder_heads", "lora_alpha", "num_points"):
        if (value := options.get(name, 1)) < 1:
            raise ConfigError(f"{name} is {value}; give a number that is at least 1")
    if "num_points" in options and options["num_points"] < max(
        options.get("num_groups", 1), options.get("group_size", 1)
    ):
        raise ConfigError(
            f"num_points is {options['num_points']}, fewer than the groups or the points of one; give the checkpoint's number"
        )
    check_place(Path(out), [*sources, *(name for name in (language_model, qformer, tokenizer) if name)])
    if family == "minigpt-3d":
        if language_model is None:
            raise ConfigError("minigpt-3d needs --language-model: a folder or Hub id of Phi-2, or its configuration")
        imported = load_minigpt3d(sources, language_model, qformer, tokenizer, **options)
    elif family == "pointllm":
        if len(sources) != 1 or language_model or qformer or tokenizer:
            raise ConfigError(
                "pointllm takes one folder, which holds its language model and tokenizer, and nothing else"
            )
        imported = load_pointllm(sources[0], **options)
    else:
        raise ConfigError(f"unknown family {family!r}; choose minigpt-3d or pointllm")
    export(imported, out)
    return imported.report

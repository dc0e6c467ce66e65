"""What `pointalign import-checkpoint` does: read a published checkpoint, write an ordinary folder, tell what happened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pointalign.errors import ConfigError
from pointalign.importers.assembly import export
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
    num_groups: int = 512,
    group_size: int = 32,
    point_encoder_heads: int = 6,
    lora_alpha: int = 16,
    num_points: int = 8192,
    allow_missing: Sequence[str] = (),
    merge: bool = False,
) -> ImportReport:
    """Import a published checkpoint into a folder that `from_pretrained` loads.

    Args:
        family: "minigpt-3d" (PointAlign's checkpoints too) or "pointllm".
        sources: files in the order they are applied, or PointLLM's one folder.
        out: the folder to write; the alignment projector goes into `alignment_projector.safetensors` there.
        language_model: as in `import_minigpt3d`, which needs it.
        qformer: as in `import_minigpt3d`.
        tokenizer: as in `import_minigpt3d`.
        num_groups: local groups of each cloud.
        group_size: points of each group.
        point_encoder_heads: heads of the point encoder.
        lora_alpha: scale of the language model's LoRA over its rank.
        num_points: points of each cloud.
        allow_missing: names, beginnings or patterns of our names that may be missing from the files.
        merge: add the LoRA to the weights instead of keeping it as adapters.

    Returns:
        What was loaded, missing and left over: `lines()` for people, `summary()` for programs.

    Raises:
        ConfigError: for options that do not belong to the family.
        CheckpointError: as `import_minigpt3d` and `import_pointllm`, and when the folder cannot be written.
    """
    shared = {
        "num_groups": num_groups,
        "group_size": group_size,
        "point_encoder_heads": point_encoder_heads,
        "lora_alpha": lora_alpha,
        "num_points": num_points,
        "allow_missing": allow_missing,
        "merge": merge,
    }
    if family == "minigpt-3d":
        if language_model is None:
            raise ConfigError("minigpt-3d needs --language-model: a folder or Hub id of Phi-2, or its configuration")
        imported = load_minigpt3d(sources, language_model, qformer, tokenizer, **shared)
    elif family == "pointllm":
        if len(sources) != 1 or language_model or qformer or tokenizer:
            raise ConfigError(
                "pointllm takes one folder, which holds its language model and tokenizer, and nothing else"
            )
        imported = load_pointllm(sources[0], **shared)
    else:
        raise ConfigError(f"unknown family {family!r}; choose minigpt-3d or pointllm")
    export(imported, out)
    return imported.report

"""SimCSE sentence embeddings, which sentence-transformers would pool in another way than the model was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

from pointalign.errors import CheckpointError

SIMCSE = "princeton-nlp/sup-simcse-roberta-large"


def is_simcse(name: str) -> bool:
    """Whether an embedder is a SimCSE model, by its name."""
    return "simcse" in name.lower()


@lru_cache(maxsize=1)
def _load(name: str) -> tuple[Any, Any]:
    try:
        return AutoModel.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"cannot load embedder {name!r}: {reason}; give a folder, or make the Hub reachable"
        ) from error


@torch.inference_mode()
def embed_simcse(sentences: Sequence[str], name: str = SIMCSE, batch_size: int = 64) -> np.ndarray:
    """Embed sentences as unit vectors: the pooler's output at the first token.

    Args:
        sentences: n texts.
        name: Hub id or folder of a SimCSE model.
        batch_size: texts at a time.

    Returns:
        (n, D) float32; the dot product of two rows is their cosine similarity.

    Raises:
        CheckpointError: when the model cannot be loaded.

    Source: SimCSE (Gao et al. 2021, arXiv 2104.08821), section 6.3: the MLP over [CLS] of the supervised models.
    """
    model, tokenizer = _load(name)
    rows = []
    for start in range(0, len(sentences), batch_size):
        batch = tokenizer(
            list(sentences[start : start + batch_size]),
            padding=True,
            truncation=True,
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        )
        rows.append(F.normalize(model(**batch).pooler_output, dim=-1))
    return torch.cat(rows).numpy()

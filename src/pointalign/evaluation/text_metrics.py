"""How alike captions and references are in words and meaning, and what the captions look like as such."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import numpy as np

from pointalign.errors import CheckpointError, DataError, MissingDependencyError
from pointalign.evaluation.simcse import SIMCSE, embed_simcse, is_simcse
from pointalign.evaluation.statistics import summarize
from pointalign.sentence_embedding import MINILM, embed_sentences

SENTENCE_BERT = "sentence-transformers/all-mpnet-base-v2"
# The field's models by the name of its measure; no other model's numbers compare with published ones.
FIELD_EMBEDDERS = {SENTENCE_BERT: "sentence-bert", SIMCSE: "simcse"}
BLEU_ORDERS = (1, 2, 3, 4)
ROUGE_NAMES = {"rouge-1": "rouge1", "rouge-2": "rouge2", "rouge-l": "rougeL"}
JUDGE_EXTRA = 'run `pip install "pointalign[judge]"`'
WORDNET = "WordNet is not installed or is broken; run `python -m nltk.downloader wordnet`"
# A label such as "a chair" is whole without a full stop; a caption of more words is not.
LABEL_WORDS = 6
SENTENCE_ENDS = (".", "!", "?", "\u2026")
CLOSERS = "\"')]*`\u201d\u2019"


def caption_metrics(
    answers: Sequence[str], references: Sequence[str], embedders: Sequence[str] = tuple(FIELD_EMBEDDERS)
) -> dict[str, Any]:
    """Measure captions against references.

    Args:
        answers: n captions.
        references: n texts.
        embedders: models of sentence embeddings, see `embed_sentences`; by default the field's two. Where these cannot be
            loaded, `all-MiniLM-L6-v2` can be named as a stand-in.

    Returns:
        `n`; `metrics` by name: `sentence-bert`, `simcse` or `similarity MODEL`, `bleu-1` to `bleu-4`, `rouge-1`, `rouge-2`,
        `rouge-l`, `meteor`, `meteor-without-wordnet`. Each is 0 to 100 and has `mean`, `interval`, `per_object`, `how` and
        `comparable`, whether it is the field's own measure; BLEU also `corpus`. A metric that cannot be had has only
        `absent`, the reason. Also `length` in words (`mean`, `shortest`, `longest`), and the numbers of `distinct`,
        `empty` and `truncated` answers, see `is_truncated`.

    Raises:
        DataError: when there is nothing to measure, or not one reference for each answer.
    """
    if len(answers) != len(references) or not answers:
        raise DataError(
            f"{len(answers)} answers for {len(references)} references; give one of each per object, at least one"
        )
    answers = [answer.strip() for answer in answers]
    found: dict[str, Any] = {}
    for embedder in embedders:
        found[measure_name(embedder)] = _or_absent(lambda name=embedder: similarity(answers, references, name))
    for metric in (_bleu, _rouge, _meteor):
        found |= metric(answers, references)
    lengths = [len(answer.split()) for answer in answers]
    return {
        "n": len(answers),
        "metrics": found,
        "length": {"mean": float(np.mean(lengths)), "shortest": min(lengths), "longest": max(lengths)},
        "distinct": len(set(answers)),
        "empty": answers.count(""),
        "truncated": sum(map(is_truncated, answers)),
    }


def is_truncated(answer: str) -> bool:
    """Whether a text of more than six words ends without the end of a sentence, as a caption that was cut off does."""
    return len(answer.split()) > LABEL_WORDS and not answer.rstrip(CLOSERS + " \n").endswith(SENTENCE_ENDS)


def measure_name(embedder: str) -> str:
    """What a similarity by this model is called; only the field's models give the field's measures."""
    return FIELD_EMBEDDERS.get(embedder, f"similarity {embedder}")


def similarity(answers: Sequence[str], references: Sequence[str], embedder: str) -> dict[str, Any]:
    """Cosine, times 100, of each answer's embedding with its reference's; 0 for an empty answer.

    Raises:
        CheckpointError: when the embedder cannot be loaded.

    Source: Sentence-BERT and SimCSE scores of PointLLM (arXiv 2308.16911).
    """
    vectors = _embed([*answers, *references], embedder)
    cosines = 100 * (vectors[: len(answers)] * vectors[len(answers) :]).sum(axis=1)
    values = [float(value) if answer else 0.0 for value, answer in zip(cosines, answers, strict=True)]
    measured = _measured(values, f"cosine of {embedder} embeddings", comparable=embedder in FIELD_EMBEDDERS)
    return {**measured, "embedder": embedder}


def _embed(texts: Sequence[str], embedder: str) -> np.ndarray:
    try:
        return embed_simcse(texts, embedder) if is_simcse(embedder) else embed_sentences(texts, embedder)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; or name {MINILM} as a stand-in, whose numbers compare with no paper's"
        ) from error


def _measured(values: Sequence[float], how: str, comparable: bool = False) -> dict[str, Any]:
    summary = summarize(values)
    return {
        "mean": summary["mean"],
        "n": summary["n"],
        "interval": summary["interval"],
        "comparable": comparable,
        "how": how,
        "per_object": list(values),
    }


def _percent(share: Any) -> float:
    return 100 * float(share)


def _or_absent(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the measure gives, or why it cannot be had."""
    try:
        return measure()
    except (CheckpointError, MissingDependencyError) as error:
        return {"absent": str(error)}


def _words(texts: Sequence[str]) -> list[list[str]]:
    """Words and punctuation in lower case."""
    from nltk.tokenize import wordpunct_tokenize

    return [wordpunct_tokenize(text.lower()) for text in texts]


def _bleu(answers: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """BLEU-1 to 4 of each answer, smoothed (a count of 0 becomes 0.1), and of the whole corpus.

    Source: Papineni et al. 2002; smoothing 1 of Chen and Cherry 2014.
    """
    try:
        from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu, sentence_bleu
    except ImportError:
        return {f"bleu-{order}": {"absent": f"nltk is not installed; {JUDGE_EXTRA}"} for order in BLEU_ORDERS}
    smoothing = SmoothingFunction().method1
    said, wanted = _words(answers), [[words] for words in _words(references)]
    how = f"nltk {metadata.version('nltk')}, lower case, words and punctuation, smoothing 1"
    found = {}
    for order in BLEU_ORDERS:
        options: dict[str, Any] = {"weights": (1 / order,) * order, "smoothing_function": smoothing}
        pairs = zip(wanted, said, strict=True)
        values = [_percent(sentence_bleu(*pair, **options)) for pair in pairs]
        corpus = _percent(corpus_bleu(wanted, said, **options))
        found[f"bleu-{order}"] = {**_measured(values, how), "corpus": corpus}
    return found


def _rouge(answers: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L, without stemming.

    Source: Lin 2004, by Google's rouge-score.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        return {name: {"absent": f"rouge-score is not installed; {JUDGE_EXTRA}"} for name in ROUGE_NAMES}
    scorer = RougeScorer(list(ROUGE_NAMES.values()), use_stemmer=False)
    scores = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    how = f"rouge-score {metadata.version('rouge-score')}, F-measure, no stemming"
    return {name: _measured([100 * score[key].fmeasure for score in scores], how) for name, key in ROUGE_NAMES.items()}


class _NoSynonyms:
    """Stands for WordNet where METEOR is to match equal words and stems alone."""

    def synsets(self, word: str) -> list[Any]:
        return []


def _meteor(answers: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """METEOR with WordNet's synonyms, and with equal words and stems alone, which needs no data.

    Source: Banerjee and Lavie 2005, by nltk.
    """
    try:
        from nltk.corpus import wordnet
        from nltk.translate.meteor_score import meteor_score
    except ImportError:
        absent = {"absent": f"nltk is not installed; {JUDGE_EXTRA}"}
        return {"meteor": absent, "meteor-without-wordnet": absent}
    pairs = list(zip(_words(references), _words(answers), strict=True))

    def measure(synonyms: Any, how: str) -> dict[str, Any]:
        values = [_percent(meteor_score([wanted], said, wordnet=synonyms)) for wanted, said in pairs]
        return _measured(values, f"nltk {metadata.version('nltk')}, lower case, words and punctuation, {how}")

    found = {"meteor-without-wordnet": measure(_NoSynonyms(), "no synonyms")}
    try:
        wordnet.ensure_loaded()
    except (LookupError, OSError):
        return {"meteor": {"absent": WORDNET}, **found}
    return {"meteor": measure(wordnet, "WordNet's synonyms"), **found}

"""The `embedding` judge: the class or caption whose sentence embedding lies nearest to the answer's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pointalign.evaluation.judging.label_sets import class_verdict, plain_name, reference_text, refuse_task, synonyms_of
from pointalign.evaluation.judging.prompts import unasked_verdict
from pointalign.evaluation.records import Answer, Task, Verdict
from pointalign.sentence_embedding import MINILM, embed_sentences

ANSWERS_AT_ONCE = 64


def _names(task: Task) -> list[tuple[str, str]]:
    """Names and their class. One that holds another class's name, such as "sofa bed", lies near both and is left out."""
    synonyms = synonyms_of(task)
    words = {label: set(plain_name(label).split()) for label in task.labels}
    found = [(label, label) for label in task.labels]
    for label in task.labels:
        others = [held for other, held in words.items() if other != label]
        for name in synonyms.get(plain_name(label), ()):
            if not any(held <= set(name.split()) for held in others):
                found.append((name, label))
    return found


class EmbeddingJudge:
    """Closed set: the class one of whose names is nearest. Captioning: cosine with the reference, times 100, 0 when negative.

    Where two kinds of object begin to differ no threshold of a cosine tells, so open vocabulary is refused.

    Args:
        embedder: see `embed_sentences`.
    """

    def __init__(self, embedder: str = MINILM) -> None:
        self.embedder = embedder

    @property
    def name(self) -> str:
        """Judge and embedder; numbers of other embedders do not compare."""
        return f"embedding {self.embedder}"

    def __call__(
        self, task: Task, answers: Sequence[Answer], advance: Callable[[int], None] = lambda count: None
    ) -> list[Verdict]:
        """One verdict per answer; an empty answer has no class and scores 0.

        Raises:
            ConfigError: for open vocabulary.
            CheckpointError: when the embedder cannot be loaded.
            DataError: when an answer's truth is not one of the classes, or is not a caption.
        """
        if task.kind == "open-vocabulary":
            raise refuse_task("embedding", task, "llm or hf")
        judge_batch = self._captions if task.kind == "captioning" else self._classes(task)
        verdicts: list[Verdict] = []
        for start in range(0, len(answers), ANSWERS_AT_ONCE):
            batch = answers[start : start + ANSWERS_AT_ONCE]
            spoken = [answer for answer in batch if answer.model_output.strip()]
            judged = iter(judge_batch(spoken) if spoken else [])
            verdicts += [
                next(judged) if answer.model_output.strip() else unasked_verdict(task, answer) for answer in batch
            ]
            advance(len(batch))
        return verdicts

    def _classes(self, task: Task) -> Callable[[Sequence[Answer]], list[Verdict]]:
        names = _names(task)
        vectors = embed_sentences([name for name, _ in names], self.embedder)

        def judge(batch: Sequence[Answer]) -> list[Verdict]:
            similarities = embed_sentences([answer.model_output for answer in batch], self.embedder) @ vectors.T
            nearest = similarities.argmax(axis=1)
            return [class_verdict(task, answer, names[index][1]) for answer, index in zip(batch, nearest, strict=True)]

        return judge

    def _captions(self, batch: Sequence[Answer]) -> list[Verdict]:
        said = embed_sentences([answer.model_output for answer in batch], self.embedder)
        references = embed_sentences([reference_text(answer) for answer in batch], self.embedder)
        scores = 100 * np.clip((said * references).sum(axis=1), 0, 1)
        return [
            Verdict(answer.object_id, True, score=float(score)) for answer, score in zip(batch, scores, strict=True)
        ]

"""What is asked: the bundled objects' closed-set classification, free-form answer and caption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pointalign.data.household import HouseholdObject, household_classes
from pointalign.data.household_phrases import CATEGORY_QUESTIONS
from pointalign.data.household_text import reference_caption
from pointalign.evaluation.answers import generate_answers
from pointalign.evaluation.judges import label_log_likelihoods
from pointalign.evaluation.metrics import caption_similarity, majority_rate, summarize

ANSWER_QUESTION = "What is this?"
CAPTION_QUESTION = "Caption this 3D model in detail."
CLASS_QUESTION = CATEGORY_QUESTIONS[0]
CLASS_STEM = "It belongs to the class:"
MAX_ANSWER_TOKENS = 40
MAX_CAPTION_TOKENS = 60
SCORING_BATCH = 10
ANSWERING_BATCH = 50


@dataclass
class ObjectResult:
    """One object's truth and what the model made of it.

    Args:
        object_id: which object.
        label: its class.
        predicted: the most probable class.
        log_likelihood: of that class's text, per token.
        answer: free-form, verbatim.
        caption: free-form, verbatim.
        reference: the caption it is held against.
        caption_similarity: cosine of sentence embeddings times 100.
    """

    object_id: str
    label: str
    predicted: str
    log_likelihood: float
    answer: str
    caption: str
    reference: str
    caption_similarity: float

    @property
    def correct(self) -> bool:
        """Whether the class is right."""
        return self.predicted == self.label


def evaluate_household(
    model: Any, processor: Any, objects: Sequence[HouseholdObject], advance: Callable[[int], None] = lambda count: None
) -> list[ObjectResult]:
    """Classify, question and caption bundled objects.

    Args:
        model: in evaluation mode.
        processor: its processor.
        objects: usually `load_household("test")`.
        advance: called with the number of objects done, three times for each.

    Returns:
        One result per object, in order.
    """
    classes = household_classes()
    labels = [f" {name}" for name in classes]
    clouds = [thing.points for thing in objects]
    predicted, scores = [], []
    for start in range(0, len(clouds), SCORING_BATCH):
        batch = clouds[start : start + SCORING_BATCH]
        best = label_log_likelihoods(model, processor, batch, CLASS_QUESTION, CLASS_STEM, labels).max(dim=1)
        predicted += [classes[index] for index in best.indices.tolist()]
        scores += best.values.tolist()
        advance(len(batch))
    answers, captions = (
        generate_answers(model, processor, clouds, question, length, ANSWERING_BATCH, advance)
        for question, length in ((ANSWER_QUESTION, MAX_ANSWER_TOKENS), (CAPTION_QUESTION, MAX_CAPTION_TOKENS))
    )
    references = [reference_caption(thing) for thing in objects]
    similarities = caption_similarity(captions, references)
    return [
        ObjectResult(thing.id, thing.label, *values)
        for thing, *values in zip(objects, predicted, scores, answers, captions, references, similarities, strict=True)
    ]


def summarize_results(results: Sequence[ObjectResult]) -> dict[str, Any]:
    """Accuracy and caption similarity with n and intervals, the majority rate, and every object's result."""
    accuracy = summarize([float(result.correct) for result in results])
    return {
        "accuracy": accuracy["mean"],
        "n": accuracy["n"],
        "interval": accuracy["interval"],
        "majority_rate": majority_rate([result.label for result in results]),
        "caption_similarity": summarize([result.caption_similarity for result in results]),
        "distinct_answers": len({result.answer for result in results}),
        "distinct_captions": len({result.caption for result in results}),
        "objects": [{**asdict(result), "correct": result.correct} for result in results],
    }

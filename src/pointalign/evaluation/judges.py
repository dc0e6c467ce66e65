"""The judge `likelihood`, which reads no answer: the model itself says how probable each label's text is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pointalign.data.sources import read_clouds
from pointalign.errors import DataError
from pointalign.evaluation.benchmarks import Benchmark, Question
from pointalign.evaluation.ledger import Ledger
from pointalign.evaluation.records import Answer, Task, Verdict

CLASS_STEM = "It belongs to the class:"
# Ends a label's text, so that "table" does not stand for every label that begins so.
CLASS_END = "."
# Tokens whose keys and values are held at once, over clouds, labels and prompt: some 7 GB with the published models.
TOKENS_AT_ONCE = 20_000


@torch.inference_mode()
def label_log_likelihoods(
    model: Any, processor: Any, clouds: Sequence[Any], question: str, stem: str, labels: Sequence[str]
) -> Tensor:
    """Log-probability of each label's text as the model's answer about each cloud.

    Summed over the text's tokens, not averaged: the mean takes labels of two tokens for three times as many objects as
    there are, because "ware" behind "kitchen" costs nothing (docs/LOG.md, 2026-11-25).

    The prompt, the cloud and the stem are computed once; all labels share their key-value cache.

    Args:
        model: a `PointAlignForConditionalGeneration` in evaluation mode.
        processor: its processor.
        clouds: B clouds, (N, 3) or (N, 6).
        question: what is asked about each cloud.
        stem: how the answer begins, the same for all labels; may be empty.
        labels: what may follow, see `class_texts`.

    Returns:
        (B, labels) float32: log-probability of the label's text, but for the tokens that all labels begin with.

    Raises:
        DataError: without labels.
    """
    if not labels:
        raise DataError("there are no labels to score; name at least one")
    content = [{"type": "point_cloud"}, {"type": "text", "text": question}]
    prompt = processor.encode([{"role": "user", "content": content}], add_generation_prompt=True)["input_ids"]
    joined = [_ids(processor, stem + label) for label in labels]
    shared = _shared_length(joined)
    prompt, tails = prompt + joined[0][:shared], [ids[shared:] for ids in joined]
    device = model.get_input_embeddings().weight.device
    points = torch.stack([processor.prepare_points(cloud) for cloud in clouds]).to(device)
    input_ids = torch.tensor([prompt] * len(clouds), device=device)
    prefix = model(input_ids=input_ids, point_clouds=points, logits_to_keep=1, use_cache=True)
    first = prefix.logits[:, -1].float().log_softmax(dim=-1)
    total = first[:, [tail[0] for tail in tails]]
    if max(map(len, tails)) > 1:
        at_once = max(1, TOKENS_AT_ONCE // input_ids.numel())
        later = []
        for start in range(0, len(tails), at_once):
            # Scoring widens the cache to the labels at hand.
            cache = copy.deepcopy(prefix.past_key_values) if len(tails) > at_once else prefix.past_key_values
            later.append(_later_tokens(model, processor, cache, input_ids.shape, tails[start : start + at_once]))
        total = total + torch.cat(later, dim=1)
    return total.cpu()


def class_texts(labels: Sequence[str]) -> list[str]:
    """What follows `CLASS_STEM` for each label."""
    return [f" {label}{CLASS_END}" for label in labels]


def _ids(processor: Any, text: str) -> list[int]:
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def _shared_length(sequences: Sequence[Sequence[int]]) -> int:
    """How many first tokens all sequences have in common, leaving at least one of each."""
    length = 0
    while length < min(map(len, sequences)) - 1 and len({ids[length] for ids in sequences}) == 1:
        length += 1
    return length


def _later_tokens(model: Any, processor: Any, cache: Any, prompt_shape: torch.Size, tails: list[list[int]]) -> Tensor:
    """Summed log-probability of each tail's tokens after its first, (B, labels), from the prompts' cache."""
    batch, prompt_length = prompt_shape
    device = model.get_input_embeddings().weight.device
    if max(map(len, tails)) == 1:
        return torch.zeros(batch, len(tails), device=device)
    fed = processor.pad([tail[:-1] for tail in tails], side="right", value=0).to(device)
    wanted = processor.pad([tail[1:] for tail in tails], side="right", value=-100).to(device)
    mask = F.pad((wanted != -100).long(), (prompt_length, 0), value=1)
    cache.batch_repeat_interleave(len(tails))
    logits = model(
        input_ids=fed.repeat(batch, 1), attention_mask=mask.repeat(batch, 1), past_key_values=cache, use_cache=True
    ).logits
    losses = F.cross_entropy(logits.float().transpose(1, 2), wanted.repeat(batch, 1), reduction="none")
    return -losses.sum(dim=1).view(batch, len(tails))


def score_question(
    model: Any,
    processor: Any,
    benchmark: Benchmark,
    question: Question,
    ledger: Ledger,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Fill a ledger with this process's share of the labels' log-likelihoods under one question of a benchmark.

    Args:
        model: in evaluation mode.
        processor: its processor.
        benchmark: a closed set.
        question: its `class_text`, else its text, is what the model is asked.
        ledger: keeps the scores; rows hold `log_likelihoods`, one per label.
        advance: called with the number of objects done.

    Raises:
        DataError: when the model gives something that is no number.
    """
    text, labels = question.class_text or question.text, benchmark.task.labels

    def compute(number: int, object_ids: Sequence[str]) -> list[dict[str, Any]]:
        clouds = read_clouds(benchmark.clouds, object_ids)
        scores = label_log_likelihoods(model, processor, clouds, text, CLASS_STEM, class_texts(labels))
        if len(bad := (~scores.isfinite()).any(dim=1).nonzero()):
            raise DataError(
                f"the likelihoods of {object_ids[int(bad[0])]} are no finite numbers, so the model's weights are not; train or "
                "import it again"
            )
        return [{"log_likelihoods": row} for row in scores.tolist()]

    ledger.fill(
        [item.object_id for item in benchmark.items], scoring_batch(processor, benchmark, question), compute, advance
    )


def scoring_batch(processor: Any, benchmark: Benchmark, question: Question) -> int:
    """Clouds at a time when a benchmark's labels are scored."""
    prompt = len(_ids(processor, (question.class_text or question.text) + CLASS_STEM)) + processor.num_point_tokens
    return max(1, min(benchmark.batch_size, TOKENS_AT_ONCE // (prompt * len(benchmark.task.labels))))


class LikelihoodJudge:
    """Reads the class of each object from the labels' log-likelihoods.

    Args:
        scores: by object id, one number per label of the task.
    """

    name = "likelihood"

    def __init__(self, scores: Mapping[str, Sequence[float]]) -> None:
        self.scores = scores

    def __call__(
        self, task: Task, answers: Sequence[Answer], advance: Callable[[int], None] = lambda count: None
    ) -> list[Verdict]:
        """The most probable label of each object; what was answered plays no part.

        Raises:
            DataError: for a task without labels, or an object that was not scored.
        """
        if task.kind != "closed-set":
            raise DataError(f"the judge likelihood needs a closed set of labels, not {task.kind}; choose another judge")
        verdicts = []
        for answer in answers:
            if answer.object_id not in self.scores:
                raise DataError(f"the labels of {answer.object_id} were not scored; run the same command again")
            scores = self.scores[answer.object_id]
            predicted = task.labels[max(range(len(scores)), key=scores.__getitem__)]
            verdicts.append(Verdict(answer.object_id, True, predicted == answer.label_name, predicted=predicted))
        advance(len(answers))
        return verdicts

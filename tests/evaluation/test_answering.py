"""Likelihood scoring and free answers against the plain way of computing them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pointalign.errors import DataError
from pointalign.evaluation.answers import generate_answers
from pointalign.evaluation.judges import label_log_likelihoods


def clouds(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).random((count, 60, 6)))


def plain_score(model: Any, processor: Any, cloud: Any, question: str, stem: str, label: str, shared: int) -> float:
    """One label at a time, without a cache: mean log-probability of the tokens past the first `shared` of the answer."""
    content = [{"type": "point_cloud"}, {"type": "text", "text": question}]
    prompt = processor.encode([{"role": "user", "content": content}], add_generation_prompt=True)["input_ids"]
    answer = processor.tokenizer(stem + label, add_special_tokens=False)["input_ids"]
    points = processor.prepare_points(cloud)[None]
    logits = model(input_ids=torch.tensor([prompt + answer]), point_clouds=points).logits[0].log_softmax(dim=-1)
    scores = [logits[len(prompt) + i - 1, answer[i]].item() for i in range(shared, len(answer))]
    return sum(scores) / len(scores)


@pytest.mark.parametrize("labels", [[" chair", " table", " lamp"], [" a", " ab", " b and a long one"], [" x", " y"]])
def test_scores_equal_the_plain_ones(model: Any, processor: Any, labels: list[str]) -> None:
    stem, question = "This is", "What is this?"
    with torch.inference_mode():
        scores = label_log_likelihoods(model, processor, clouds(3), question, stem, labels)
        shared = len(stem) + 1 + (1 if labels[1] == " ab" and labels[0] == " ax" else 0)
        expected = [
            [plain_score(model, processor, cloud, question, stem, label, shared) for label in labels]
            for cloud in clouds(3)
        ]
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_scores_depend_on_the_cloud_alone_not_on_its_batch(model: Any, processor: Any) -> None:
    labels = [" chair", " table"]
    together = label_log_likelihoods(model, processor, clouds(4), "What?", "", labels)
    alone = torch.cat([label_log_likelihoods(model, processor, [cloud], "What?", "", labels) for cloud in clouds(4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert together.std(dim=0).min() > 1e-4


def test_no_labels_is_an_error(model: Any, processor: Any) -> None:
    with pytest.raises(DataError, match="no labels"):
        label_log_likelihoods(model, processor, clouds(1), "What?", "", [])


def test_answers_in_batches_equal_answers_one_by_one(model: Any, processor: Any) -> None:
    done: list[int] = []
    batched = generate_answers(model, processor, clouds(5), "What is this?", 6, batch_size=2, advance=done.append)
    single = [generate_answers(model, processor, [cloud], "What is this?", 6)[0] for cloud in clouds(5)]
    assert batched == single
    assert done == [2, 2, 1]

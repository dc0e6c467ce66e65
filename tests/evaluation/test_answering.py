"""Likelihood scoring and free answers against the plain way of computing them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pointalign.errors import DataError
from pointalign.evaluation import judges
from pointalign.evaluation.answers import generate_answers, generate_batch, objects_together
from pointalign.evaluation.judges import LikelihoodJudge, label_log_likelihoods, score_question
from pointalign.evaluation.ledger import Ledger
from pointalign.evaluation.opening import open_benchmark
from pointalign.evaluation.records import Answer, Task


def clouds(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).random((count, 60, 6)))


def plain_score(model: Any, processor: Any, cloud: Any, question: str, stem: str, label: str, shared: int) -> float:
    """One label at a time, without a cache: log-probability of the tokens past the first `shared` of the answer."""
    content = [{"type": "point_cloud"}, {"type": "text", "text": question}]
    prompt = processor.encode([{"role": "user", "content": content}], add_generation_prompt=True)["input_ids"]
    answer = processor.tokenizer(stem + label, add_special_tokens=False)["input_ids"]
    points = processor.prepare_points(cloud)[None]
    logits = model(input_ids=torch.tensor([prompt + answer]), point_clouds=points).logits[0].log_softmax(dim=-1)
    return sum(logits[len(prompt) + i - 1, answer[i]].item() for i in range(shared, len(answer)))


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


@pytest.mark.parametrize("at_once", [1, 150, 400])
def test_many_labels_are_scored_in_pieces(
    at_once: int, model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = [" a", " ab", " b and a long one", " c", " dd"]
    whole = label_log_likelihoods(model, processor, clouds(2), "What?", "It is", labels)
    monkeypatch.setattr(judges, "TOKENS_AT_ONCE", at_once)
    pieces = label_log_likelihoods(model, processor, clouds(2), "What?", "It is", labels)
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)


def test_the_likelihood_judge_takes_the_most_probable_label_and_reads_no_answer() -> None:
    task = Task("closed-set", ("chair", "lamp", "sofa"))
    answers = [Answer("a", 2, "It is a chair.", "sofa"), Answer("b", 0, "", "chair")]
    judge = LikelihoodJudge({"a": [-3.0, -2.0, -1.0], "b": [-3.0, -2.0, -2.5]})
    done: list[int] = []
    verdicts = judge(task, answers, done.append)
    assert [(v.predicted, v.correct, v.valid) for v in verdicts] == [("sofa", True, True), ("lamp", False, True)]
    assert done == [2]
    with pytest.raises(DataError, match="the labels of c were not scored"):
        judge(task, [Answer("c", 0, "", "chair")])
    with pytest.raises(DataError, match="needs a closed set of labels, not captioning"):
        judge(Task("captioning"), answers)


def test_no_labels_is_an_error(model: Any, processor: Any) -> None:
    with pytest.raises(DataError, match="no labels"):
        label_log_likelihoods(model, processor, clouds(1), "What?", "", [])


def test_answers_in_batches_equal_answers_one_by_one(model: Any, processor: Any) -> None:
    done: list[int] = []
    batched = generate_answers(model, processor, clouds(5), "What is this?", 6, batch_size=2, advance=done.append)
    single = [generate_answers(model, processor, [cloud], "What is this?", 6)[0] for cloud in clouds(5)]
    assert batched == single
    assert done == [2, 2, 1]


def test_an_answer_that_reaches_the_longest_length_is_truncated(model: Any, processor: Any) -> None:
    said = generate_batch(model, processor, clouds(2), "What is this?", max_new_tokens=5)
    assert [(one.tokens, one.truncated) for one in said] == [(5, True)] * 2


def test_pieces_are_the_same_for_any_number_of_processes_and_never_too_few(model: Any) -> None:
    greedy = {"do_sample": False, "max_new_tokens": 5}

    def together(objects: int, batch: int, **generation: Any) -> int:
        return objects_together(model, SimpleNamespace(items=range(objects)), batch, {**greedy, **generation})  # pyright: ignore[reportArgumentType]

    assert [together(count, 15) for count in (10, 200, 360, 2468)] == [15, 15, 45, 60]
    assert together(2468, 15, num_beams=2) == 15


def test_likelihoods_that_are_no_numbers_are_not_kept(model: Any, processor: Any, tmp_path: Path) -> None:
    benchmark = replace(open_benchmark("household-classification", limit=2), batch_size=1)
    ledger = Ledger(tmp_path, "scores", {})
    model.get_output_embeddings().weight.data.fill_(torch.nan)
    with pytest.raises(
        DataError, match="are no finite numbers, so the model's weights are not; train or import it again"
    ):
        score_question(model, processor, benchmark, benchmark.questions[0], ledger)
    assert not ledger.rows()

"""What a model answers: free-form text about many clouds, batched, kept object by object, written in the field's format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pointalign.answering.generation import Generated, generate_from
from pointalign.answering.refill import can_refill
from pointalign.data.sources import read_clouds
from pointalign.errors import DataError
from pointalign.evaluation.benchmarks import Benchmark, Question
from pointalign.evaluation.ledger import Ledger
from pointalign.evaluation.records import Answer, AnswersFile

# Batches whose answers make room for one another as they end; more of them fill the last rows better, and lose more to a kill.
BATCHES_TOGETHER = 4
# So many pieces are left at least, for the processes of a large machine to share.
FEWEST_PIECES = 8


def objects_together(model: Any, benchmark: Benchmark, batch_size: int, generation: Mapping[str, Any]) -> int:
    """How many objects are answered in one go, `batch_size` rows at a time; the same however many processes there are.

    Args:
        model: in evaluation mode.
        benchmark: the objects.
        batch_size: clouds at a time.
        generation: arguments of `generate`.
    """
    if not can_refill(model, generation):
        return batch_size
    return batch_size * max(1, min(BATCHES_TOGETHER, len(benchmark.items) // (batch_size * FEWEST_PIECES)))


def generate_batch(
    model: Any, processor: Any, clouds: Sequence[Any], question: str, rows: int | None = None, **generation: Any
) -> list[Generated]:
    """Ask one question about each cloud of a batch.

    Args:
        model: a `PointAlignForConditionalGeneration` in evaluation mode.
        processor: its processor.
        clouds: (N, 3) or (N, 6) each.
        question: the same for all.
        rows: answers written at a time, see `generate_from`.
        generation: arguments of `generate`; greedy, and stopped at the end of the turn, by default.

    Raises:
        DataError: for a bad cloud.
    """
    messages = [{"role": "user", "content": [{"type": "point_cloud"}, {"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template([messages] * len(clouds), points=list(clouds))
    return generate_from(model, processor, inputs, {"do_sample": False, **generation}, rows)


def generate_answers(
    model: Any,
    processor: Any,
    clouds: Sequence[Any],
    question: str,
    max_new_tokens: int = 100,
    batch_size: int = 20,
    advance: Callable[[int], None] = lambda count: None,
    **generation: Any,
) -> list[str]:
    """Ask one question about each of any number of clouds; arguments as `generate_batch`.

    Args:
        model: a `PointAlignForConditionalGeneration` in evaluation mode.
        processor: its processor.
        clouds: (N, 3) or (N, 6) each.
        question: the same for all.
        max_new_tokens: longest answer in tokens.
        batch_size: clouds at a time.
        advance: called with the number of clouds done.
        generation: further arguments of `generate`.

    Returns:
        One answer per cloud.
    """
    answers: list[str] = []
    for start in range(0, len(clouds), batch_size):
        batch = clouds[start : start + batch_size]
        said = generate_batch(model, processor, batch, question, max_new_tokens=max_new_tokens, **generation)
        answers += [one.text for one in said]
        advance(len(batch))
    return answers


def answer_question(
    model: Any,
    processor: Any,
    benchmark: Benchmark,
    question: Question,
    ledger: Ledger,
    batch_size: int,
    seed: int,
    generation: Mapping[str, Any],
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Fill a ledger with this process's share of the answers to one question of a benchmark.

    Args:
        model: in evaluation mode.
        processor: its processor.
        benchmark: the objects.
        question: what is asked about each.
        ledger: keeps the answers; rows hold `model_output`, `tokens` and `truncated`.
        batch_size: clouds at a time.
        seed: of sampling, where `generation` samples; each batch has its own, so that stopping changes no answer.
        generation: arguments of `generate`, `max_new_tokens` and `do_sample` among them.
        advance: called with the number of objects done.
    """

    def compute(number: int, object_ids: Sequence[str]) -> list[dict[str, Any]]:
        clouds = read_clouds(benchmark.clouds, object_ids)
        with torch.random.fork_rng(enabled=generation["do_sample"]):
            if generation["do_sample"]:
                torch.manual_seed(seed + number)
            said = generate_batch(model, processor, clouds, question.text, batch_size, **generation)
        return [{"model_output": text, "tokens": tokens, "truncated": cut} for text, tokens, cut in said]

    together = objects_together(model, benchmark, batch_size, generation)
    ledger.fill([item.object_id for item in benchmark.items], together, compute, advance)


def collect_answers(benchmark: Benchmark, question: Question, ledger: Ledger, path: Path) -> AnswersFile:
    """Write all answers to one question as the field's evaluators read them.

    Raises:
        DataError: when answers are missing.
    """
    rows = ledger.rows()
    missing = [item.object_id for item in benchmark.items if item.object_id not in rows]
    if missing:
        raise DataError(
            f"{ledger.folder} lacks the answers about {len(missing)} of {len(benchmark.items)} objects (first: {missing[0]}); "
            "run the same command again"
        )
    answers = AnswersFile(
        question.text,
        tuple(
            Answer(item.object_id, item.ground_truth, rows[item.object_id]["model_output"], item.label_name)
            for item in benchmark.items
        ),
    )
    answers.write(path)
    return answers

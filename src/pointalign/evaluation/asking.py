"""Asking one model: settings, the loaded model, and its answers about the objects of a benchmark, kept as they come."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pointalign.answering.loading import load_answerer
from pointalign.errors import ConfigError
from pointalign.evaluation.answers import answer_question, collect_answers, objects_together
from pointalign.evaluation.benchmarks import Benchmark, Question
from pointalign.evaluation.judges import CLASS_END, CLASS_STEM, LikelihoodJudge, score_question, scoring_batch
from pointalign.evaluation.ledger import Ledger
from pointalign.evaluation.opening import Sources
from pointalign.evaluation.plan import Planned
from pointalign.evaluation.processes import Processes, evaluation_device
from pointalign.evaluation.provenance import model_fingerprint, prompt_hash
from pointalign.evaluation.records import AnswersFile
from pointalign.models.checkpoint import check_weights
from pointalign.progress import progress
from pointalign.released import RELEASED_GENERATION, with_released_prompt


@dataclass(frozen=True)
class EvaluationSettings:
    """What is evaluated, and how.

    Args:
        benchmarks: see `make_plan`; the household objects when empty.
        judge: who scores; each benchmark's own when None.
        judge_options: of `build_judge`.
        sources: where data are that are not bundled.
        limit: only so many objects of each benchmark, the first ones.
        batch_size: clouds at a time; each benchmark's own when None.
        max_new_tokens: longest answer; each benchmark's own when None.
        seed: of sampling, where answers are sampled, and of the classes that stand in for answers without one.
        as_released: the released code's evaluation prompt and generation.
        embedders: models of sentence embeddings for captions; each benchmark's own when empty.
        base_language_model: what `language-retention` compares with, where the model does not tell.
    """

    benchmarks: tuple[str, ...] = ()
    judge: str | None = None
    judge_options: dict[str, Any] = field(default_factory=dict)
    sources: Sources = field(default_factory=Sources)
    limit: int | None = None
    batch_size: int | None = None
    max_new_tokens: int | None = None
    seed: int = 0
    as_released: bool = False
    embedders: tuple[str, ...] = ()
    base_language_model: str | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value} leaves nothing to do; give 1 or more")

    def generation(self, benchmark: Benchmark) -> dict[str, Any]:
        """Arguments of `generate` for a benchmark."""
        options = RELEASED_GENERATION if self.as_released else {"do_sample": False}
        return {**options, "max_new_tokens": self.max_new_tokens or benchmark.max_new_tokens}

    def batch(self, benchmark: Benchmark) -> int:
        """Clouds at a time for a benchmark."""
        return self.batch_size or benchmark.batch_size


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to answer, and what tells it from others.

    Args:
        model: adapters merged, in evaluation mode, on its device.
        processor: its processor.
        name: as the user gave it.
        fingerprint: hash of its files.
    """

    model: Any
    processor: Any
    name: str
    fingerprint: str

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> str:
        """What the language model computes in."""
        return str(self.model.get_input_embeddings().weight.dtype).removeprefix("torch.")


def load_model(name: str | Path, as_released: bool = False) -> LoadedModel:
    """Load a model for answering, as `load_answerer` does.

    Raises:
        PointAlignError: when it cannot be loaded, its weights are no numbers, or the released prompt is not its own.
    """
    answerer = load_answerer(name, evaluation_device())
    check_weights(answerer.model, answerer.name)
    processor = with_released_prompt(answerer.processor) if as_released else answerer.processor
    return LoadedModel(answerer.model, processor, answerer.name, model_fingerprint(answerer.name))


class RawAnswers:
    """What a model says about the objects of one benchmark: kept as it comes, then judged.

    Args:
        loaded: the model.
        planned: the benchmark and its judge.
        out: folder of the evaluation.
        settings: how the model is asked.
        processes: this process among others.

    Raises:
        DataError: when the folder holds answers of another model, prompt or way of generating.
    """

    def __init__(
        self, loaded: LoadedModel, planned: Planned, out: Path, settings: EvaluationSettings, processes: Processes
    ) -> None:
        self.model_name, self.benchmark, self.judge_name = loaded.name, planned.benchmark, planned.judge
        self.settings, self.processes = settings, processes
        self.folder = out / planned.benchmark.name
        self.answers = {question.key: self._answers_ledger(loaded, question) for question in self.benchmark.questions}
        self.scores = {
            question.key: self._scores_ledger(loaded, question)
            for question in self.benchmark.questions
            if self.judge_name == LikelihoodJudge.name
        }

    def _ledger(self, loaded: LoadedModel, name: str, **settings: Any) -> Ledger:
        common = {"model": loaded.fingerprint, "clouds": self.benchmark.fingerprint, "dtype": loaded.dtype}
        return Ledger(self.folder / "raw", name, {**common, **settings}, self.processes)

    def _answers_ledger(self, loaded: LoadedModel, question: Question) -> Ledger:
        generation = self.settings.generation(self.benchmark)
        return self._ledger(
            loaded,
            f"answers-{question.key}",
            prompt=prompt_hash(loaded.processor, question.text),
            generation=generation,
            batch_size=self.settings.batch(self.benchmark),
            seed=self.settings.seed if generation["do_sample"] else None,
        )

    def _scores_ledger(self, loaded: LoadedModel, question: Question) -> Ledger:
        return self._ledger(
            loaded,
            f"likelihoods-{question.key}",
            prompt=prompt_hash(loaded.processor, question.class_text or question.text, CLASS_STEM + CLASS_END),
            labels=self.benchmark.task.labels,
        )

    def fill(self, loaded: Any) -> None:
        """Ask the model what is missing of this process's share."""
        benchmark, model, processor = self.benchmark, loaded.model, loaded.processor
        generation, batch = self.settings.generation(benchmark), self.settings.batch(benchmark)
        for question in benchmark.questions:
            ledger = self.answers[question.key]
            together = objects_together(model, benchmark, batch, generation)
            total = ledger.share(len(benchmark.items), together)
            with progress(f"{benchmark.name}: answers ({question.key})", total) as advance:
                seed = self.settings.seed
                answer_question(model, processor, benchmark, question, ledger, batch, seed, generation, advance)
            if (ledger := self.scores.get(question.key)) is not None:
                size = scoring_batch(processor, benchmark, question)
                total = ledger.share(len(benchmark.items), size)
                with progress(f"{benchmark.name}: likelihoods ({question.key})", total) as advance:
                    score_question(model, processor, benchmark, question, ledger, advance)

    def collect(self) -> dict[str, AnswersFile]:
        """All answers by question, written in the field's format.

        Raises:
            DataError: when answers are missing.
        """
        return {
            question.key: collect_answers(
                self.benchmark, question, self.answers[question.key], self.folder / f"answers-{question.key}.json"
            )
            for question in self.benchmark.questions
        }

    def provenance(self) -> dict[str, Any]:
        """What the answers came from."""
        return {
            "source": self.benchmark.source,
            "limit": self.settings.limit,
            "seed": self.settings.seed,
            "as_released": self.settings.as_released,
            "answers": {key: ledger.settings for key, ledger in self.answers.items()},
            "likelihoods": {key: ledger.settings for key, ledger in self.scores.items()},
        }

"""Baselines in an evaluation: they answer the household benchmarks in a model's place, from the bundled training objects."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pointalign.data.household import HOUSEHOLD_FILE, household_classes
from pointalign.data.household_split import household_sides
from pointalign.data.household_text import label_phrases
from pointalign.errors import ConfigError
from pointalign.evaluation.asking import EvaluationSettings, RawAnswers
from pointalign.evaluation.baselines import BASELINES, Prediction
from pointalign.evaluation.judges import LikelihoodJudge
from pointalign.evaluation.ledger import Ledger
from pointalign.evaluation.opening import household_name
from pointalign.evaluation.plan import RETENTION, Plan, Planned
from pointalign.evaluation.processes import Processes
from pointalign.progress import progress

PREFIX = "baseline:"
HOUSEHOLD = ("household-classification", "household-captioning")
ANSWERS, SCORES = "answers", "likelihoods"


def baseline_name(model: str | Path) -> str | None:
    """The baseline that a model's name means, or None for a model.

    Raises:
        ConfigError: for a baseline that does not exist.
    """
    if not str(model).startswith(PREFIX):
        return None
    name = str(model).removeprefix(PREFIX)
    if name not in BASELINES:
        raise ConfigError(
            f"there is no baseline {name!r}; known are {', '.join(PREFIX + known for known in BASELINES)}"
        )
    return name


def check_baseline(model: str | Path, plan: Plan, settings: EvaluationSettings) -> None:
    """See that a baseline, where one is meant, can answer what is planned; a lenient plan loses what it cannot.

    Raises:
        ConfigError: when it cannot, or does not exist.
    """
    if baseline_name(model) is None:
        return
    if settings.as_released:
        raise ConfigError(f"{model} has no prompt, so leave --as-released out")
    answered = {household_name(name, settings.sources) for name in HOUSEHOLD}
    planned = [one.benchmark.name for one in plan.planned] + ([RETENTION] if plan.retention else [])
    for name in (name for name in planned if name not in answered):
        reason = f"{model} learns from the bundled training objects, so it can answer {' and '.join(HOUSEHOLD)} only"
        if not plan.lenient:
            raise ConfigError(f"{reason}; leave {name} out")
        plan.skipped[name] = reason
    plan.retention = False
    plan.planned = [one for one in plan.planned if one.benchmark.name in answered]


class BaselineAnswers(RawAnswers):
    """What a baseline says about the objects of one benchmark, kept as a model's answers are.

    Args:
        name: of `BASELINES`.
        planned: the benchmark and its judge.
        out: folder of the evaluation.
        settings: of the evaluation; a baseline generates nothing, so batch and length play no part.
        processes: this process among others; the first one does the work.

    Raises:
        DataError: when the folder holds answers of another model.
    """

    def __init__(
        self, name: str, planned: Planned, out: Path, settings: EvaluationSettings, processes: Processes
    ) -> None:
        self.name, self.model_name = name, PREFIX + name
        self.benchmark, self.judge_name = planned.benchmark, planned.judge
        self.settings, self.processes = settings, processes
        self.folder = out / planned.benchmark.name
        made_by = {
            "model": self.model_name,
            "clouds": self.benchmark.fingerprint,
            "training_objects": hashlib.sha256(HOUSEHOLD_FILE.read_bytes()).hexdigest()[:16],
            "scikit_learn": metadata.version("scikit-learn"),
        }
        by_scores = self.judge_name == LikelihoodJudge.name
        self.answers, self.scores = (
            {
                question.key: Ledger(self.folder / "raw", f"{kind}-{question.key}", made_by, processes)
                for question in self.benchmark.questions
                if kind == ANSWERS or by_scores
            }
            for kind in (ANSWERS, SCORES)
        )

    def fill(self, loaded: Any = None) -> None:
        """Predict what is missing; `loaded` is not used."""
        wanted = [item.object_id for item in self.benchmark.items]
        ledgers = [*self.answers.values(), *self.scores.values()]
        if not self.processes.is_first or all(ledger.rows().keys() >= set(wanted) for ledger in ledgers):
            return
        found = _predict(self.name, self.settings.sources.held_out, tuple(wanted))
        for ledger in self.answers.values():
            ledger.fill(wanted, len(wanted), lambda number, ids: [self._answer(one) for one in found])
        for ledger in self.scores.values():
            ledger.fill(wanted, len(wanted), lambda number, ids: [{"log_likelihoods": one.scores} for one in found])

    def _answer(self, prediction: Prediction) -> dict[str, Any]:
        """A caption as it is; a class in the words of the training answers."""
        text, labels = prediction.caption, self.benchmark.task.labels
        if labels:
            best = labels[max(range(len(labels)), key=prediction.scores.__getitem__)]
            text = f"This is {label_phrases().get(best, f'a {best}')}."
        return {"model_output": text, "tokens": 0, "truncated": False}


@lru_cache(maxsize=1)
def _predict(name: str, held_out: str, object_ids: tuple[str, ...]) -> list[Prediction]:
    """Of held-out objects, once for all benchmarks about them."""
    known, asked = household_sides(held_out)
    by_id = {thing.id: thing for thing in asked}
    objects = [by_id[object_id] for object_id in object_ids]
    with progress(PREFIX + name, len(objects)) as advance:
        return BASELINES[name](known, objects, household_classes(), advance)

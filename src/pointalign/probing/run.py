"""`pointalign probe`: how much class and geometry each layer of one or several models still holds, with intervals."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pointalign.answering.loading import quiet_transformers
from pointalign.data.household import HouseholdObject, load_household
from pointalign.data.sources import HouseholdClouds
from pointalign.errors import ConfigError
from pointalign.evaluation.asking import load_model
from pointalign.evaluation.benchmarks import INSTRUCTION
from pointalign.evaluation.provenance import environment
from pointalign.probing.features import LayerFeatures, extract_features
from pointalign.probing.figure import draw_probe
from pointalign.probing.probes import (
    Outcome,
    linear_class,
    linear_decoding,
    nearest_class,
    outcome_difference,
    standardized,
)
from pointalign.probing.similarity import (
    NEIGHBORS,
    Neighborhood,
    calibrated_cknna,
    cknna_difference,
    neighborhood,
)
from pointalign.probing.targets import Targets, make_targets
from pointalign.progress import progress, say
from pointalign.storage import write_text

GROUP, CKNNA = "group_r2", "cknna"
PROBE_FILE, FIGURE_FILE = "probe.json", "probe.png"


def probe(
    models: Sequence[str],
    out: str | Path,
    k: int = 1,
    folds: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """Probe every layer of models on the household objects; what was read of a model before is not read again.

    Args:
        models: folders or Hub ids; with two of equal depth, the second's difference from the first is told too.
        out: folder for `probe.json` and `probe.png`.
        k: neighbours of the nearest-neighbour classifier.
        folds: parts of a cross-validation over all 820 objects; None fits on the 720 training objects and scores on the 100
            held-out ones.
        limit: only so many objects of each split, the first ones.
        batch_size: clouds at a time.
        seed: of resampling and permutations.

    Returns:
        `n` scored objects, `k`, each model's `best` layer by measure, with two of equal depth `layers_that_differ`, and the
        files' names.

    Raises:
        PointAlignError: when a model cannot be loaded or read, or the settings do not fit the objects.
    """
    names = short_names(models)
    objects, targets = _choose_objects(k, folds, limit, batch_size)
    probed = [
        _probe_model(model, name, objects, targets, k, batch_size) for model, name in zip(models, names, strict=True)
    ]
    result = {
        "models": {name: _measures(one, seed) for name, one in zip(names, probed, strict=True)},
        "n": len(targets.scored),
        "k": k,
        "cknna_neighbors": _neighbors(targets),
        "scored_on": "held-out objects" if folds is None else f"{folds} folds over all objects",
        "question": INSTRUCTION,
        "majority": {"class": _majority(targets.classes, targets), "color": _majority(targets.colors, targets)},
        "seed": seed,
        "point_encoder": {
            name: {measure: _told(outcome, seed) for measure, outcome in one.of_encoder.items()}
            for name, one in zip(names, probed, strict=True)
        },
        "provenance": {
            name: {"model": model, **one.provenance} for name, model, one in zip(names, models, probed, strict=True)
        },
        "difference": _differences(probed, seed),
    }
    folder = Path(out)
    draw_probe(result, folder / FIGURE_FILE)
    write_text(folder / PROBE_FILE, json.dumps(result, indent=1) + "\n")
    return _summary(result, folder)


@dataclass(frozen=True)
class ProbedModel:
    """What the probes found in one model.

    Args:
        layers: of each layer the outcomes by measure.
        of_encoder: the outcomes of the same probes on the point encoder's features.
        spaces: of each layer who is near whom among the scored objects.
        encoder_space: who is near whom in the point encoder's features.
        provenance: the model's fingerprint, its precision and the machine.
    """

    layers: list[dict[str, Outcome]]
    of_encoder: dict[str, Outcome]
    spaces: list[Neighborhood]
    encoder_space: Neighborhood
    provenance: dict[str, Any]


def _choose_objects(
    k: int, folds: int | None, limit: int | None, batch_size: int
) -> tuple[list[HouseholdObject], Targets]:
    if k < 1 or batch_size < 1:
        raise ConfigError(f"--k and --batch-size are 1 or more; got {k} and {batch_size}")
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit} leaves no object; give 1 or more")
    objects = [thing for split in ("train", "test") for thing in load_household(split)[:limit]]
    targets = make_targets(objects, folds)
    if k > min(len(fitted) for fitted, _ in targets.folds):
        raise ConfigError(f"--k {k} is more than the objects that the probe is fitted on; give a smaller one")
    return objects, targets


def _neighbors(targets: Targets) -> int:
    return min(NEIGHBORS, len(targets.scored) - 1)


def _probe_model(
    model: str, name: str, objects: Sequence[HouseholdObject], targets: Targets, k: int, batch_size: int
) -> ProbedModel:
    with quiet_transformers():
        loaded = load_model(model)
        clouds = HouseholdClouds(list(objects))
        features = extract_features(loaded, clouds, [thing.id for thing in objects], batch_size)
    machine = environment(loaded.device, 1)
    provenance = {"fingerprint": loaded.fingerprint, "dtype": loaded.dtype, "environment": machine}
    del loaded  # the features are all that is needed
    layers, spaces = [], []
    with progress(f"probing {name}", features.depth + 1) as advance:
        for layer in range(features.depth + 1):
            layers.append(_probe_layer(features, layer, targets, k))
            spaces.append(_space(features.means[:, layer], targets))
            advance(1)
    of_encoder = _probe(features.point_features, targets, k)
    return ProbedModel(layers, of_encoder, spaces, _space(features.point_features, targets), provenance)


def _space(features: np.ndarray, targets: Targets) -> Neighborhood:
    """Who is near whom among the scored objects, by their standardised features."""
    scored = features[targets.scored]
    return neighborhood(standardized(scored, scored)[0], _neighbors(targets))


def short_names(models: Sequence[str]) -> list[str]:
    """What tells models apart: their paths without the parts that all begin or end with.

    Raises:
        ConfigError: when one is named twice.
    """
    found: dict[str, str] = {}
    for model in models:
        place = os.path.realpath(model) if os.path.exists(model) else model
        if place in found:
            raise ConfigError(f"{found[place]} is named twice; name different models")
        found[place] = model
    parts = [list(Path(model).parts) for model in models]
    if len(models) > 1:
        for end in (0, -1):
            while min(map(len, parts)) > 1 and len({part[end] for part in parts}) == 1:
                for part in parts:
                    part.pop(end)
    return ["/".join(part).replace("//", "/") for part in parts]


def _probe(features: np.ndarray, targets: Targets, k: int) -> dict[str, Outcome]:
    return {
        "knn_class": nearest_class(features, targets.classes, targets.folds, k),
        "linear_class": linear_class(features, targets.classes, targets.folds),
        "linear_color": linear_class(features, targets.colors, targets.folds),
        "box_r2": linear_decoding(features, targets.box, targets.folds),
        "heights_r2": linear_decoding(features, targets.heights, targets.folds),
    }


def _probe_layer(features: LayerFeatures, layer: int, targets: Targets, k: int) -> dict[str, Outcome]:
    found = _probe(features.means[:, layer], targets, k)
    if features.centers.shape[1]:
        found[GROUP] = linear_decoding(features.tokens[:, layer], features.centers, targets.folds)
    return found


def _measures(probed: ProbedModel, seed: int) -> dict[str, list[dict[str, Any]]]:
    """By measure, one entry per layer."""
    found = {
        measure: [{"layer": layer, **_told(one[measure], seed)} for layer, one in enumerate(probed.layers)]
        for measure in probed.layers[0]
    }
    found[CKNNA] = [
        {"layer": layer, **calibrated_cknna(space, probed.encoder_space, seed)}
        for layer, space in enumerate(probed.spaces)
    ]
    return found


def _told(outcome: Outcome, seed: int) -> dict[str, Any]:
    return {"value": outcome.value, "interval": outcome.interval(seed)}


def _majority(labels: np.ndarray, targets: Targets) -> float:
    """Accuracy of always answering the most frequent label of the fitted objects."""
    right = [
        labels[scored] == Counter(labels[fitted].tolist()).most_common(1)[0][0] for fitted, scored in targets.folds
    ]
    return float(np.concatenate(right).mean())


def _same_targets(first: Outcome, second: Outcome) -> bool:
    """Whether there was the same to be lost: where points are grouped otherwise, other places are to be told."""
    return np.array_equal(first.possible, second.possible)


def _differences(probed: Sequence[ProbedModel], seed: int) -> dict[str, list[dict[str, Any]]] | None:
    """Second model minus first, layer by layer; None unless there are two of one depth."""
    if len(probed) != 2 or len(probed[0].layers) != len(probed[1].layers):
        return None
    first, second = probed
    found: dict[str, list[dict[str, Any]]] = {
        measure: [
            {"layer": layer, **outcome_difference(before[measure], after[measure], seed)}
            for layer, (before, after) in enumerate(zip(first.layers, second.layers, strict=True))
        ]
        for measure in first.layers[0]
        if measure in second.layers[0] and _same_targets(first.layers[0][measure], second.layers[0][measure])
    }
    for measure in (first.layers[0].keys() & second.layers[0].keys()) - found.keys():
        say(f"the models are scored against different targets by {measure}, so theirs is not compared")
    if np.array_equal(first.encoder_space.kernel, second.encoder_space.kernel):
        found[CKNNA] = [
            {"layer": layer, **cknna_difference(before, after, first.encoder_space, seed)}
            for layer, (before, after) in enumerate(zip(first.spaces, second.spaces, strict=True))
        ]
    else:
        say("the models have different point encoders, so their CKNNA is not compared")
    return found


def _summary(result: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    best = {
        name: {
            measure: max(rows, key=lambda row: row["calibrated" if measure == CKNNA else "value"])
            for measure, rows in measures.items()
        }
        for name, measures in result["models"].items()
    }
    told = {key: result[key] for key in ("n", "k", "scored_on", "majority")}
    if result["difference"] is not None:
        told["layers_that_differ"] = {
            measure: [row["layer"] for row in rows if not row["inside_noise"]]
            for measure, rows in result["difference"].items()
        }
    return {**told, "best": best, "figure": str(folder / FIGURE_FILE), "results": str(folder / PROBE_FILE)}

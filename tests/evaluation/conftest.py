"""A tiny saved model, a user's own data and the field's files, all made here."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pointalign.models.processing import PointAlignProcessor

LABELS = ("chair", "lamp", "table")
OWN_OBJECTS = 7


def save_model(folder: Path, model: Any, tokenizer: Any) -> Path:
    """A model's folder with its processor."""
    model.save_pretrained(folder)
    PointAlignProcessor(
        tokenizer, num_points=48, num_point_tokens=model.config.num_point_tokens, min_points=8
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, build_model: Any, build_tokenizer: Any) -> Path:
    """A saved model of random weights, not to be written to."""
    return save_model(tmp_path_factory.mktemp("tiny") / "model", build_model(), build_tokenizer())


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory, build_model: Any, build_tokenizer: Any) -> Path:
    """The same with other weights."""
    return save_model(tmp_path_factory.mktemp("other") / "model", build_model(seed=1), build_tokenizer())


def write_clouds(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in names:
        np.save(folder / f"{name}_8192.npy", rng.random((60, 6)).astype(np.float32))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with clouds/, truth.csv (labels and captions) and classes.txt."""
    names = [f"o{number}" for number in range(OWN_OBJECTS)]
    write_clouds(tmp_path / "own" / "clouds", names)
    rows = [
        f'{name},{LABELS[number % 3]},"A {LABELS[number % 3]}, number {number}."' for number, name in enumerate(names)
    ]
    (tmp_path / "own" / "truth.csv").write_text("\n".join(["object_id,label,caption", *rows]) + "\n")
    (tmp_path / "own" / "classes.txt").write_text("\n".join(LABELS) + "\n")
    return tmp_path / "own"


def instruction(object_id: str, caption: str) -> dict[str, Any]:
    said = [
        {"from": "human", "value": "<point>\nCaption this 3D model in detail."},
        {"from": "gpt", "value": caption},
    ]
    return {"object_id": object_id, "conversations": said}


@pytest.fixture
def field_data(tmp_path: Path) -> Path:
    """The field's layout in small: four held-out Objaverse objects, of which two are the "200", and five of ModelNet40."""
    data = tmp_path / "data"
    ids = ["aa", "bb", "cc", "dd"]
    write_clouds(data / "objaverse_data", ids)
    (data / "anno_data").mkdir()
    entries = [instruction(name, f"The object {name}.") for name in [*ids, "trained-on"]]
    annotations = {
        "PointLLM_brief_description_val_200_GT.json": entries[:2],
        "PointLLM_brief_description_660K.json": entries[::-1],
    }
    for name, content in annotations.items():
        (data / "anno_data" / name).write_text(json.dumps(content))
    (data / "anno_data" / "val_object_ids_3000.txt").write_text("\n".join(ids) + "\n")
    (data / "modelnet40_data").mkdir()
    rng = np.random.default_rng(1)
    clouds = [rng.random((60, 6)).astype(np.float32) for _ in range(5)]
    with (data / "modelnet40_data" / "modelnet40_test_8192pts_fps.dat").open("wb") as file:
        pickle.dump((clouds, [np.array([label], dtype=np.int32) for label in (0, 8, 8, 39, 19)]), file)
    return data


@pytest.fixture
def result_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a classification result with given right and wrong answers, as `evaluate` would."""

    def write(name: str, right: list[bool | None], **changes: Any) -> Path:
        rows = [
            {
                "object_id": f"o{index}",
                "question": "I",
                "ground_truth": index % 2,
                "model_output": f"{name} says {index}",
                "label": ("chair", "lamp")[index % 2],
                "predicted": "chair",
                "right": good,
            }
            for index, good in enumerate(right)
        ]
        result = {
            "benchmark": "own-classification",
            "task": "closed-set",
            "judge": "match",
            "model": name,
            "questions": {"I": {"prompt": "What is this?"}},
            "objects": rows,
        }
        path = tmp_path / name / "results.json"
        path.parent.mkdir()
        path.write_text(json.dumps({**result, **changes}))
        return path

    return write

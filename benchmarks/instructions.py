"""From 660K instruction entries on disk to the first training batch: seconds and peak memory of the whole process.

    python benchmarks/instructions.py                     # 660K + 70K entries, a folder of 660K (linked, tiny) clouds
    python benchmarks/instructions.py --reader objects    # the same entries read into Python objects, as before
    python benchmarks/instructions.py --entries 20000     # smaller

The files are made up, in the published format and of about the published lengths. Everything that a run does before its
first step is done: checking every entry, types, fraction, clouds, mixture, token ids. It ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from measuring import peak_memory

from pointalign.config import DataSet, DataSettings, Recipe
from pointalign.data.conversations import Collator, ConversationDataset, parse_conversation
from pointalign.data.sources import open_training_data
from pointalign.models.chat_text import choose_point_token
from pointalign.models.language_model import load_tokenizer
from pointalign.models.processing import PointAlignProcessor
from pointalign.training import mixture

WORDS = [
    "a",
    "small",
    "wooden",
    "chair",
    "with",
    "four",
    "legs",
    "and",
    "red",
    "café,",
    "which",
    "may",
    "be",
    "in",
    "game",
]
# Words of a question, and of an answer of each type; our guess at the published data.
QUESTION_WORDS = 9
ANSWER_WORDS = {"simple_description": 35, "detailed_description": 150, "single_round": 35, "multi_round": 30}
NUM_POINTS = 8
LINKS = 60_000


def entries(count: int, types: Sequence[str], objects: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Made-up conversations, the types in turn."""
    draw = random.Random(0)
    for index in range(count):
        kind = types[index % len(types)]
        turns = []
        for turn in range(3 if kind == "multi_round" else 1):
            mark = "" if turn else "<point>\n"
            turns += [
                {"from": "human", "value": mark + " ".join(draw.choices(WORDS, k=QUESTION_WORDS)) + "?"},
                {"from": "gpt", "value": " ".join(draw.choices(WORDS, k=ANSWER_WORDS[kind]))},
            ]
        named = {} if kind == "simple_description" else {"conversation_type": kind}
        yield {"object_id": objects[index % len(objects)], **named, "conversations": turns}


def write_list(path: Path, items: Iterator[dict[str, Any]]) -> None:
    """A JSON list, written entry by entry."""
    with path.open("w", encoding="utf-8") as file:
        for index, item in enumerate(items):
            file.write((", " if index else "[") + json.dumps(item, ensure_ascii=False))
        file.write("]")


def make_files(folder: Path, count: int) -> None:
    """Instruction files, and one link to a tiny cloud per object: as many names as there, none of their bytes."""
    draw = random.Random(1)
    objects = [f"{draw.getrandbits(128):032x}" for _ in range(count)]
    write_list(folder / "brief.json", entries(count, ["simple_description"], objects))
    complex_types = ["detailed_description", "single_round", "multi_round"]
    write_list(folder / "complex.json", entries(count * 7 // 66, complex_types, objects))
    clouds = folder / "clouds"
    clouds.mkdir()
    original = clouds
    for index, object_id in enumerate(objects):
        path = clouds / f"{object_id}_8192.npy"
        if index % LINKS:
            os.link(original, path)
        else:
            original = path
            np.save(path, np.linspace(0, 1, NUM_POINTS * 6, dtype=np.float32).reshape(NUM_POINTS, 6))


class Points:
    """Clouds as tensors, as `ConversationDataset` takes them."""

    def __init__(self, clouds: Any, processor: PointAlignProcessor) -> None:
        self.clouds, self.processor = clouds, processor

    def __getitem__(self, object_id: str) -> dict[str, Any]:
        return {"point_clouds": self.processor.prepare_points(self.clouds[object_id])}


def open_lazily(folder: Path) -> dict[str, Any]:
    """What a run does before its first step."""
    kinds = (["simple_description"], ["detailed_description"], ["single_round"], ["multi_round"])
    settings = DataSettings(
        source=str(folder / "clouds"),
        instructions=[str(folder / "brief.json"), str(folder / "complex.json")],
        sets=[DataSet(types=types, batch_size=8) for types in kinds],
        fraction=0.9,
    )
    start = time.perf_counter()
    clouds, conversations = open_training_data(settings)
    opened = time.perf_counter()
    tokenizer = load_tokenizer("smollm2-135m")
    token = choose_point_token(tokenizer, len(tokenizer))
    processor = PointAlignProcessor(
        tokenizer, num_points=NUM_POINTS, num_point_tokens=32, min_points=4, point_token=token
    )
    dataset = ConversationDataset(conversations, processor, Points(clouds, processor), 512)
    sampler = mixture(dataset, Recipe(data=settings))(10_000, 0, 1)
    batch = Collator(processor)([dataset[index] for index in next(iter(sampler))])
    ready, busy = time.perf_counter(), time.process_time()
    draw = random.Random(2)
    numbers = [draw.randrange(len(conversations)) for _ in range(5000)]
    for number in numbers:
        conversations[number]
    read = time.perf_counter()
    for _ in chain.from_iterable(sampler):
        pass
    return {
        "kept": len(conversations),
        "open_seconds": round(opened - start, 2),
        "first_batch_seconds": round(ready - opened, 2),
        "cpu_seconds": round(busy, 2),
        "first_batch": list(batch["input_ids"].shape),
        "read_microseconds": round((read - ready) / len(numbers) * 1e6, 1),
        "batches_10000_seconds": round(time.perf_counter() - read, 2),
    }


def open_whole(folder: Path) -> dict[str, Any]:
    """The files as lists of Python objects."""
    start = time.perf_counter()
    kept = [
        parse_conversation(item, f"{name}, entry {index}")
        for name in ("brief.json", "complex.json")
        for index, item in enumerate(json.loads((folder / name).read_text(encoding="utf-8")))
    ]
    return {"kept": len(kept), "open_seconds": round(time.perf_counter() - start, 2)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure once; one line of JSON on stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=660_000, help="of the brief file; the other has 7 to its 66")
    parser.add_argument("--reader", choices=["places", "objects"], default="places", help="ours, or lists of objects")
    parser.add_argument("--folder", type=Path, help="where the made-up files are kept for the next time")
    options = parser.parse_args(arguments)
    imported = time.process_time()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)) / str(options.entries)
        if not folder.is_dir():
            folder.mkdir(parents=True)
            make_files(folder, options.entries)
        values = (open_lazily if options.reader == "places" else open_whole)(folder)
        size = sum((folder / name).stat().st_size for name in ("brief.json", "complex.json"))
    total = options.entries + options.entries * 7 // 66
    opening = values["open_seconds"]
    result = {
        "benchmark": "instructions",
        "reader": options.reader,
        "entries": total,
        "megabytes": round(size / 1e6),
        "import_seconds": round(imported, 2),
        **values,
        "seconds": round(imported + opening + values.get("first_batch_seconds", 0), 2),
        "entries_per_second": round(total / opening),
        "peak_megabytes": round(peak_memory("cpu") / 2**20),
        "machine": f"{os.cpu_count()} x {platform.machine()}, Python {platform.python_version()}",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

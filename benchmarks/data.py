"""Training samples per second of the data path: from files on disk to a padded batch, ours against the published way.

    python benchmarks/data.py                      # household sizes, 64 objects with 4 conversations each
    python benchmarks/data.py --size paper         # clouds of 8,192 points, features of the published sizes
    python benchmarks/data.py --procedure ours     # or published: one alone
    python benchmarks/data.py --growth             # 1, 4, 16 times the objects: samples/s, seconds to open, memory

Data are made up, in the published formats. Ours is what `pointalign train` reads: conversations that stay on disk, kept token
ids, and the frozen half's features from the memory-mapped cache, which is filled before with made-up numbers
(`benchmarks/encode.py` measures what computing them costs). The published way holds the whole instruction file as Python
objects, and for every sample loads the object's .npy file, normalises it and turns the words into ids.

Each is a process of its own; they take turns. The first pass over the data is timed as well as later ones. Ids and labels of
the first batch are held against each other (exit 1 when they differ). It ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from instructions import entries, write_list
from measuring import PROCEDURES, Worker, own_output, peak_memory, quartiles
from torch import Tensor
from true_size import byte_tokenizer

from pointalign.config import DataSet, DataSettings, Recipe
from pointalign.data.conversations import CONVERSATION_TYPES, Collator, ConversationDataset, parse_conversation
from pointalign.data.features import FeatureCache
from pointalign.data.sources import open_training_data
from pointalign.geometry import normalize_point_cloud
from pointalign.models.processing import PointAlignProcessor
from pointalign.run_folder import environment

# Points of a cloud, tokens of it, their width, and the alignment target's.
SIZES = {"household": (1024, 8, 576, 192), "paper": (8192, 32, 2560, 768), "tiny": (64, 4, 16, 12)}
OBJECTS, BATCH, ROUNDS = 64, 8, 12
GROWTH = (1, 4, 16)
MAX_LENGTH = 4096

Batch = dict[str, Any]


def make_data(folder: Path, size: str, objects: int) -> None:
    """Clouds, instructions and a full cache of features."""
    points, tokens, width, target = SIZES[size]
    draw = np.random.default_rng(0)
    names = [f"{number:032x}" for number in range(objects)]
    (folder / "clouds").mkdir()
    for name in names:
        np.save(folder / "clouds" / f"{name}_8192.npy", draw.random((points, 6), dtype=np.float32))
    write_list(folder / "instructions.json", entries(4 * objects, _types(objects), names))

    def made_up(batch: list[str]) -> dict[str, Tensor]:
        values = draw.random((len(batch), tokens, width + target), dtype=np.float32)
        point_tokens, qformer_output = torch.from_numpy(values).split([width, target], dim=-1)
        return {"point_tokens": point_tokens, "qformer_output": qformer_output}

    FeatureCache(folder / "features", names, {}).fill(made_up, 16, lambda done: None)


def _types(objects: int) -> list[str]:
    """One type after the other for all objects, so that each object has one of each."""
    return [kind for kind in CONVERSATION_TYPES for _ in range(objects)]


def processor_of(size: str) -> PointAlignProcessor:
    """With a token per byte, so that nothing is downloaded."""
    points, tokens, *_ = SIZES[size]
    return PointAlignProcessor(
        byte_tokenizer(), num_points=points, num_point_tokens=tokens, min_points=4, point_token="<point>"
    )


def open_ours(folder: Path, processor: PointAlignProcessor) -> tuple[int, Callable[[Sequence[int]], Batch]]:
    """How many samples there are, and the way from their numbers to a batch."""
    settings = DataSettings(
        source=str(folder / "clouds"),
        instructions=[str(folder / "instructions.json")],
        sets=[DataSet(types=list(CONVERSATION_TYPES), batch_size=BATCH)],
    )
    _, conversations = open_training_data(settings)
    cache = FeatureCache(folder / "features", conversations.object_ids, {})
    dataset = ConversationDataset(conversations, processor, cache, MAX_LENGTH)
    collate = Collator(processor)
    return len(dataset), lambda numbers: collate([dataset[number] for number in numbers])


def open_published(folder: Path, processor: PointAlignProcessor) -> tuple[int, Callable[[Sequence[int]], Batch]]:
    """The same written out plainly."""
    items = json.loads((folder / "instructions.json").read_text(encoding="utf-8"))

    def batch(numbers: Sequence[int]) -> Batch:
        samples, clouds = [], []
        for number in numbers:
            conversation = parse_conversation(items[number], f"entry {number}")
            cloud = np.load(folder / "clouds" / f"{conversation.object_id}_8192.npy")
            clouds.append(normalize_point_cloud(torch.from_numpy(cloud)))
            samples.append(processor.encode(conversation.messages))
        longest = max(len(sample["input_ids"]) for sample in samples)
        ids = torch.full((len(samples), longest), processor.tokenizer.pad_token_id)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, sample in enumerate(samples):
            length = len(sample["input_ids"])
            ids[row, :length], labels[row, :length] = torch.tensor(sample["input_ids"]), torch.tensor(sample["labels"])
            mask[row, :length] = 1
        return {"input_ids": ids, "labels": labels, "attention_mask": mask, "point_clouds": torch.stack(clouds)}

    return len(items), batch


def work(options: argparse.Namespace) -> None:
    """One procedure in this process: a round for every line on stdin; the data go round and round in a drawn order."""
    told, folder = own_output(), Path(options.folder)
    if options.worker == "make":  # apart, so that the memory of those who read begins low
        make_data(folder, options.size, options.objects)
        print(json.dumps({}), file=told, flush=True)
        return
    processor = processor_of(options.size)
    before, start = peak_memory("cpu"), time.perf_counter()
    count, batch = (open_ours if options.worker == "ours" else open_published)(folder, processor)
    first = batch(range(BATCH))
    opened = time.perf_counter() - start
    digest = hashlib.sha256(b"".join(first[name].numpy().tobytes() for name in ("input_ids", "labels"))).hexdigest()
    print(json.dumps({"open_seconds": round(opened, 3), "digest": digest}), file=told, flush=True)
    order = random.Random(0).sample(range(count), count)
    while sys.stdin.readline():
        start, busy = time.perf_counter(), time.process_time()
        for first_one in range(0, count, BATCH):
            batch(order[first_one : first_one + BATCH])
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        more = (peak_memory("cpu") - before) / 2**20
        print(json.dumps({"rate": count / seconds, "cpu": busy / count, "more": round(more)}), file=told, flush=True)


def compare(options: argparse.Namespace, times: int) -> dict[str, Any]:
    """Run the procedures in turn on so many times the data.

    Raises:
        SystemExit: when their first batches differ.
    """
    names = PROCEDURES if options.procedure == "both" else (options.procedure,)
    result: dict[str, Any] = {"objects": OBJECTS * times, "samples": 4 * OBJECTS * times}
    with tempfile.TemporaryDirectory() as temporary:
        given = ["--size", options.size, "--folder", temporary, "--objects", str(OBJECTS * times)]
        Worker(__file__, "make", given).hear()
        workers = [Worker(__file__, name, given) for name in names]
        opened = [worker.hear() for worker in workers]
        if len({told["digest"] for told in opened}) > 1:
            raise SystemExit("the procedures make other ids or labels of the same conversations")
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(options.rounds):
            for worker in workers:
                worker.go()
                rounds[worker.procedure].append(worker.hear())
        for worker, told in zip(workers, opened, strict=True):
            worker.process.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]
            worker.process.wait()
            result[worker.procedure] = summary(rounds[worker.procedure], told["open_seconds"])
    if len(names) == 2:
        ours, published = (result[name] for name in PROCEDURES)
        result["speedup"] = round(ours["samples_per_second"] / published["samples_per_second"], 2)
        result["speedup_in_cpu_seconds"] = round(published["cpu_milliseconds"] / ours["cpu_milliseconds"], 2)
        result["memory_ratio"] = round(ours["more_megabytes"] / max(published["more_megabytes"], 1), 3)
    return result


def summary(rounds: Sequence[dict[str, float]], opened: float) -> dict[str, Any]:
    """Samples per second: of the first pass, and median and quartiles of all; the processor's time for a sample."""
    rates = [told["rate"] for told in rounds]
    return {
        "samples_per_second": round(statistics.median(rates), 1),
        "quartiles": quartiles(rates, 1),
        "first_pass": round(rates[0], 1),
        "cpu_milliseconds": round(statistics.median(told["cpu"] for told in rounds) * 1e3, 4),
        "open_seconds": opened,
        "more_megabytes": rounds[-1]["more"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure once; one line of JSON on stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--procedure", choices=["both", *PROCEDURES], default="both")
    parser.add_argument("--size", choices=list(SIZES), default="household")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="passes over the data")
    parser.add_argument("--growth", action="store_true", help="a table for 1, 4 and 16 times the data instead")
    parser.add_argument("--worker", choices=["make", *PROCEDURES], help=argparse.SUPPRESS)
    parser.add_argument("--objects", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        work(options)
        return
    if options.growth:
        table = []
        for times in GROWTH:
            table.append({"times": times, **compare(options, times)})
            print(table[-1], file=sys.stderr)
        result: dict[str, Any] = {"benchmark": "data_growth", "size": options.size, "growth": table}
    else:
        result = {"benchmark": "data", "size": options.size, **compare(options, 1)}
    told = environment(Recipe())
    print(json.dumps({**result, **{name: told[name] for name in ("device", "threads", "versions")}}))


if __name__ == "__main__":
    main()

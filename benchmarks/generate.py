"""Answers per second: our way of answering against the published procedure written out plainly.

    python benchmarks/generate.py                                  # household objects, the default model
    python benchmarks/generate.py --model runs/demo/aligned/model  # another model; --procedure ours|published for one alone
    python benchmarks/generate.py --size paper --objects 5536      # random weights of the paper's sizes, on a GPU
    python benchmarks/generate.py --size tiny                      # the same path at a tiny size, in seconds
    python benchmarks/generate.py --size paper --static            # ours in batches, cache of fixed size, compiled on a GPU
    python benchmarks/generate.py --growth --max-new-tokens 64     # 1, 4, 16 times the rows and the longest answer
    python benchmarks/generate.py --quality                        # both procedures' captions against the references

Each procedure is a process of its own with the same weights; they take turns, so that a busy machine slows both. The
published one answers 15 objects at a time with 2 beams and sampling (temperature 0.2, top-p 0.7), knows no end symbol, so that
every answer runs to its limit, and computes cloud and prompt anew for every batch; on a CPU in float32, on a GPU in bfloat16.
Ours takes the most probable token, ends at the end symbol, and gives the row of an answer that has ended to the next object.

After the first round, which warms up, our answers are held against one object at a time through transformers' own greedy loop:
in float32 they must be the same (exit 1 if not), in bfloat16, where rounding depends on the batch, the share that is the same
is told.
It ends in one line of JSON; `agreement` compares our answers with the published procedure's, cut at their end symbol.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measuring import PROCEDURES, Worker, device_name, own_output, peak_memory, quartiles, synchronize
from torch import Tensor
from train_step import prepare

from pointalign.answering.answerer import Answerer
from pointalign.answering.generation import end_symbols, generate_from
from pointalign.answering.loading import load_answerer
from pointalign.answering.refill import can_refill, refilled_ids
from pointalign.config import Recipe
from pointalign.data.household import load_household
from pointalign.data.household_text import reference_caption
from pointalign.device import native_bf16
from pointalign.errors import CheckpointError
from pointalign.evaluation.benchmarks import CAPTION
from pointalign.evaluation.statistics import paired_difference, summarize
from pointalign.evaluation.text_metrics import measure_name, similarity
from pointalign.models.language_model import cast_weights
from pointalign.options import Decoding
from pointalign.progress import progress
from pointalign.released import RELEASED_GENERATION
from pointalign.run_folder import environment
from pointalign.runs import quiet
from pointalign.sentence_embedding import MINILM

PUBLISHED_BATCH = 15
# Objects of a round, rows of ours, longest answer, rounds. Source of 100 and 150: PointAlign (arXiv 2603.00412).
DEFAULTS = {"household": (60, 60, 150, 3), "paper": (1536, 512, 100, 3), "tiny": (9, 4, 12, 2)}
NUM_LABELS = 40
GROWTH = (1, 4, 16)
PRECISION_KEYS = {"ours": "precision", "published": "published_precision"}
KEPT = ("labels_in_answers", "same_as_one_by_one")


class Made(NamedTuple):
    """What a procedure answers with and about."""

    answerer: Answerer
    clouds: list[Tensor]


def open_model(options: argparse.Namespace, bf16: bool) -> Made:
    """The model of a size, adapters merged, and as many clouds as there are objects to answer about."""
    generator = torch.Generator().manual_seed(0)
    if options.size == "household":
        answerer = household_model(options.model, bf16)
        found = [answerer.prepare(thing.points) for thing in load_household("test")]
        return Made(answerer, [found[number % len(found)] for number in range(options.objects)])
    with tempfile.TemporaryDirectory() as temporary:
        _, model, processor = prepare(options.size, Path(temporary), 2, not bf16)
    model.merge_adapters()
    # LoRA and norms were in float32, to be trained.
    cast_weights(model.language_model, torch.bfloat16 if bf16 else torch.float32)
    answerer = Answerer(model.eval().to(device_name()), processor, options.size)
    clouds = torch.rand(options.objects, processor.num_points, 6, generator=generator)
    return Made(answerer, [answerer.prepare(cloud) for cloud in clouds])


def household_model(name: str | None, bf16: bool) -> Answerer:
    """The model named, the default one, or where there is none an untrained one around SmolLM2."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    try:
        return load_answerer(name, device_name(), dtype)
    except CheckpointError:
        if name is not None:
            raise
    with tempfile.TemporaryDirectory() as temporary:
        _, model, processor = prepare("household", Path(temporary), 2, True)
    model.merge_adapters()
    cast_weights(model.language_model, dtype)
    return Answerer(model.eval(), processor, "untrained")


def answer_ours(made: Made, options: argparse.Namespace) -> list[list[int]]:
    """Our answers, as evaluation makes them; ids up to the end symbol."""
    if options.static:
        return answer_static(made, options)
    answerer = made.answerer
    inputs = answerer.inputs([[about()]] * len(made.clouds), made.clouds)
    moved = {name: tensor.to(answerer.device) for name, tensor in inputs.items()}
    if not can_refill(answerer.model, {"max_new_tokens": options.max_new_tokens}):
        raise SystemExit("this model's answers cannot make room for one another; name another --model")
    ends = end_symbols(answerer.model, answerer.processor)
    return refilled_ids(answerer.model, moved, options.rows, options.max_new_tokens, ends)


def answer_static(made: Made, options: argparse.Namespace) -> list[list[int]]:
    """Batch by batch through transformers' loop with a cache of fixed size, whose step it compiles on a GPU."""
    answers: list[list[int]] = []
    for start in range(0, len(made.clouds), options.rows):
        # The last batch has as many rows as the others, or it would be compiled anew.
        batch = (made.clouds[start:] + made.clouds)[: options.rows]
        inputs = made.answerer.inputs([[about()]] * len(batch), batch)
        moved = {name: tensor.to(made.answerer.device) for name, tensor in inputs.items()}
        ids = made.answerer.model.generate(
            **moved, do_sample=False, max_new_tokens=options.max_new_tokens, cache_implementation="static"
        )
        answers += ids[:, moved["input_ids"].shape[1] :].tolist()
    return answers[: len(made.clouds)]


@torch.inference_mode()
def answer_published(made: Made, options: argparse.Namespace) -> list[list[int]]:
    """The published procedure's answers about the first batch; ids up to the limit."""
    answerer = made.answerer
    clouds = made.clouds[:PUBLISHED_BATCH]
    inputs = answerer.inputs([[about()]] * len(clouds), clouds)
    moved = {name: tensor.to(answerer.device) for name, tensor in inputs.items()}
    torch.manual_seed(0)
    ids = answerer.model.generate(**moved, **RELEASED_GENERATION, max_new_tokens=options.max_new_tokens)
    return ids[:, moved["input_ids"].shape[1] :].tolist()


WAYS: dict[str, Callable[[Made, argparse.Namespace], list[list[int]]]] = {
    "ours": answer_ours,
    "published": answer_published,
}


def about() -> dict[str, Any]:
    """The message that shows an object and asks for a caption."""
    return {"role": "user", "content": [{"type": "point_cloud"}, {"type": "text", "text": CAPTION}]}


def timed(act: Callable[[], Any], repeats: int = 3) -> tuple[float, float]:
    """Median seconds by the clock and on the processor."""
    taken, busy = [], []
    for _ in range(repeats):
        synchronize()
        start, used = time.perf_counter(), time.process_time()
        act()
        synchronize()
        taken.append(time.perf_counter() - start)
        busy.append(time.process_time() - used)
    return statistics.median(taken), statistics.median(busy)


def share_the_same(made: Made, answers: list[list[int]], options: argparse.Namespace) -> float:
    """How many of the first answers are those of transformers' greedy loop, one object at a time.

    Raises:
        SystemExit: when one is not, in float32.
    """
    answerer = made.answerer
    count = min(options.checked, len(made.clouds))
    plain = []
    for cloud in made.clouds[:count]:
        inputs = answerer.inputs([[about()]], [cloud])
        given = {"do_sample": False, "max_new_tokens": options.max_new_tokens}
        plain += generate_from(answerer.model, answerer.processor, inputs, given)
    texts = decoded(made, answers[:count])
    same = sum(text == one.text for text, one in zip(texts, plain, strict=True)) / count
    if same < 1 and answerer.model.get_input_embeddings().weight.dtype == torch.float32:
        raise SystemExit(f"only {same:.0%} of our answers are those of transformers' greedy loop, in float32")
    return same


def decoded(made: Made, answers: Sequence[Sequence[int]]) -> list[str]:
    """Texts of answers, each up to its end symbol."""
    cut = [ended(made, row) for row in answers]
    return [text.strip() for text in made.answerer.processor.batch_decode(cut, skip_special_tokens=True)]


def ended(made: Made, row: Sequence[int]) -> Sequence[int]:
    """An answer's ids up to its end symbol."""
    ends = end_symbols(made.answerer.model, made.answerer.processor)
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]


def both_seconds(name: str, taken: tuple[float, float]) -> dict[str, float]:
    """What `timed` tells, by name."""
    return {f"{name}_seconds": round(taken[0], 4), f"{name}_cpu_seconds": round(taken[1], 4)}


def steady(taken: tuple[float, float]) -> float:
    """What a busy machine changes less: seconds on the processor, where it does the work; on a GPU by the clock."""
    return taken[0 if torch.cuda.is_available() else 1]


def single_costs(made: Made, options: argparse.Namespace) -> dict[str, float]:
    """Seconds about one object: to the first token, for an answer, and for scoring 40 labels."""
    answerer, cloud = made.answerer, made.clouds[:1]
    labels = [f"{kind} {thing}" for kind in ("small", "large") for thing in range(NUM_LABELS // 2)]
    decoding = Decoding(max_new_tokens=options.max_new_tokens)
    first = timed(lambda: answerer.ask(cloud, CAPTION, Decoding(max_new_tokens=1)))
    whole = timed(lambda: answerer.ask(cloud, CAPTION, decoding))
    scored = timed(lambda: answerer.probabilities(cloud, labels))
    return {
        **both_seconds("first_token", first),
        **both_seconds("one_answer", whole),
        **both_seconds("labels", scored),
        "labels_in_answers": round(steady(scored) / steady(whole), 3),
    }


def first_published(made: Made) -> dict[str, float]:
    """Seconds to the first token of the published procedure about one object."""
    one = Made(made.answerer, made.clouds[:1])
    return both_seconds("first_token", timed(lambda: answer_published(one, argparse.Namespace(max_new_tokens=1))))


def work(options: argparse.Namespace) -> None:
    """One procedure in this process, a round for every line on stdin."""
    told = own_output()
    quiet()
    bf16 = uses_bf16(options)
    made = open_model(options, bf16)
    answers: list[list[int]] = []

    def say(**values: Any) -> None:
        print(json.dumps(values), file=told, flush=True)
        sys.stdin.readline()

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    end: dict[str, Any] = {}
    for number in range(options.rounds + 1):  # the first one warms up
        start, busy = time.perf_counter(), time.process_time()
        answers = WAYS[options.worker](made, options)
        synchronize()
        seconds, cpu = time.perf_counter() - start, time.process_time() - busy
        if number == 0 and options.worker == "ours":
            end["same_as_one_by_one"] = share_the_same(made, answers, options)
        say(seconds=seconds, cpu=cpu)
    end |= {"peak": peak_memory(device_name()), "answers": decoded(made, answers)}
    # The published procedure writes on behind the end symbol; of ours a row of `--static` is filled up there.
    end["tokens"] = sum(len(row if options.worker == "published" else ended(made, row)) for row in answers)
    end |= single_costs(made, options) if options.worker == "ours" else first_published(made)
    say(**end, precision=precision_name(bf16), **environment(Recipe()))


def precision_name(bf16: bool) -> str:
    """As the results tell it."""
    return "bf16" if bf16 else "fp32"


def uses_bf16(options: argparse.Namespace) -> bool:
    """Whether the language model of a worker computes in bfloat16."""
    if options.worker == "published":
        return torch.cuda.is_available()
    return options.precision == "bf16" or (options.precision == "auto" and native_bf16())


def compare(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Run the procedures in turn; medians, memory, agreement."""
    names = PROCEDURES if options.procedure == "both" else (options.procedure,)
    workers = [Worker(__file__, name, arguments) for name in names]
    for number in range(options.rounds + 1):
        for worker in workers:
            taken = worker.hear()
            if number:
                worker.seconds.append(taken["seconds"])
                worker.busy.append(taken["cpu"])
            if number < options.rounds:
                worker.go()
    ends = []
    for worker in workers:
        worker.go()
        ends.append(worker.hear())
        worker.go()
        worker.process.wait()
    result: dict[str, Any] = {"benchmark": "generate", "size": options.size}
    result |= {"max_new_tokens": options.max_new_tokens, "rounds": options.rounds}
    for worker, end in zip(workers, ends, strict=True):
        result[worker.procedure] = numbers_of(worker, end)
    if len(workers) == 2:
        ours, published = (result[name] for name in PROCEDURES)
        result |= {
            "speedup": round(ours["answers_per_second"] / published["answers_per_second"], 2),
            "speedup_in_cpu_seconds": round(
                published["cpu_seconds_per_answer"] / max(ours["cpu_seconds_per_answer"], 1e-9), 2
            ),
            "memory_ratio": round(ours["peak_megabytes"] / published["peak_megabytes"], 3),
            "agreement": agreement(*(end["answers"] for end in ends)),
        }
    return result | {name: ends[0][name] for name in ("device", "threads", "versions")}


def numbers_of(worker: Worker, end: dict[str, Any]) -> dict[str, Any]:
    """One procedure's part of the result."""
    count = len(end["answers"])
    rates = [count / seconds for seconds in worker.seconds]
    return {
        "objects": count,
        "precision": end["precision"],
        "answers_per_second": round(statistics.median(rates), 4),
        "quartiles": quartiles(rates),
        "tokens_per_second": round(end["tokens"] / statistics.median(worker.seconds), 2),
        "tokens_per_answer": round(end["tokens"] / count, 1),
        "cpu_seconds_per_answer": round(statistics.median(worker.busy) / count, 5),
        "peak_megabytes": round(end["peak"] / 2**20),
        **{name: value for name, value in end.items() if name.endswith("_seconds") or name in KEPT},
    }


def agreement(ours: list[str], published: list[str]) -> dict[str, float]:
    """Share of the same answers, and how many words two answers have in common in the same order, in the mean."""
    pairs = list(zip(ours, published, strict=False))
    words = [SequenceMatcher(None, one.split(), two.split(), autojunk=False).ratio() for one, two in pairs]
    return {
        "objects": len(pairs),
        "same": round(sum(one == two for one, two in pairs) / len(pairs), 3),
        "words_in_common": round(statistics.mean(words), 3),
    }


def quality(options: argparse.Namespace) -> dict[str, Any]:
    """Similarity x 100 of both procedures' captions to those of the held-out objects, and its paired difference."""
    quiet()
    things = load_household("test")[: options.objects]
    references, scores, texts, precisions = [reference_caption(thing) for thing in things], {}, {}, {}
    for name in PROCEDURES:
        options.worker = name
        made = open_model(options, bf16 := uses_bf16(options))
        precisions[PRECISION_KEYS[name]] = precision_name(bf16)
        together = options.rows if name == "ours" else PUBLISHED_BATCH
        answers: list[list[int]] = []
        with progress(f"captions: {name}", len(things)) as advance:
            for start in range(0, len(things), together):
                part = made.clouds[start : start + together]
                answers += WAYS[name](Made(made.answerer, part), options)
                advance(len(part))
        texts[name] = decoded(made, answers)
        scores[name] = similarity(texts[name], references, MINILM)["per_object"]
    told: dict[str, Any] = {"benchmark": "generate_quality", "size": options.size, "measure": measure_name(MINILM)}
    told |= {name: summarize(values) for name, values in scores.items()}
    told["ours_minus_published"] = paired_difference(scores["published"], scores["ours"])
    where = environment(Recipe())
    told["agreement"] = agreement(texts["ours"], texts["published"])
    return told | precisions | {name: where[name] for name in ("device", "threads", "versions")}


def growth(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of our answers with 1, 4 and 16 times the rows, and the longest answer; no answer ends earlier.

    Each `exponent` is the slope between 1 and 16 times on logarithmic axes: 1 is linear.
    """
    quiet()
    options.objects = GROWTH[-1]
    made = open_model(options, bf16 := uses_bf16(options))
    answerer, length = made.answerer, options.max_new_tokens // GROWTH[-1] or 1

    def seconds(rows: int, longest: int) -> float:
        inputs = answerer.inputs([[about()]] * rows, made.clouds[:rows])
        moved = {name: tensor.to(answerer.device) for name, tensor in inputs.items()}
        return steady(timed(lambda: refilled_ids(answerer.model, moved, rows, longest, set()), options.rounds))

    seconds(1, 2)
    told: dict[str, Any] = {"benchmark": "generate_growth", "size": options.size, "precision": precision_name(bf16)}
    for name, taken in (
        ("batch", [seconds(times, length * 4) for times in GROWTH]),
        ("answer_length", [seconds(2, length * times) for times in GROWTH]),
    ):
        told[name] = {
            "times": list(GROWTH),
            "seconds": [round(value, 4) for value in taken],
            "exponent": round(math.log(taken[-1] / taken[0]) / math.log(GROWTH[-1]), 3),
        }
    where = environment(Recipe())
    return told | {name: where[name] for name in ("device", "threads", "versions")}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure once; one line of JSON on stdout."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--procedure", choices=["both", *PROCEDURES], default="both")
    parser.add_argument("--size", choices=list(DEFAULTS), default="household")
    parser.add_argument("--model", help="of size household; the default model, else an untrained one, when not given")
    parser.add_argument("--objects", type=int, help="that ours answers in a round")
    parser.add_argument("--rows", type=int, help="answers that ours writes at a time")
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--rounds", type=int, help="that are timed")
    parser.add_argument("--checked", type=int, default=4, help="answers held against transformers' greedy loop")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="of our path")
    parser.add_argument("--static", action="store_true", help="ours through transformers' static cache")
    parser.add_argument("--growth", action="store_true", help="measure growth instead")
    parser.add_argument("--quality", action="store_true", help="measure captions instead, about all held-out objects")
    parser.add_argument("--worker", choices=PROCEDURES, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.quality and options.size != "household":
        parser.error("--quality needs --size household: random weights have none")
    if options.quality and options.objects is None:
        options.objects = len(load_household("test"))
    for name, value in zip(("objects", "rows", "max_new_tokens", "rounds"), DEFAULTS[options.size], strict=True):
        chosen = getattr(options, name) if getattr(options, name) is not None else value
        if chosen < 1:
            parser.error(f"--{name.replace('_', '-')} is 1 or more")
        setattr(options, name, chosen)
    if options.worker:
        work(options)
        return
    if options.quality:
        print(json.dumps(quality(options)))
        return
    print(json.dumps(growth(options) if options.growth else compare(options, given)))


if __name__ == "__main__":
    main()

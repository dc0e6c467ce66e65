"""From a cold process to the first answer, part by part: import, from_pretrained, first token; and `pointalign caption FILE`.

    python benchmarks/load.py                                  # the default model, else an untrained one around SmolLM2
    python benchmarks/load.py --model runs/demo/aligned/model --file examples/chair.glb
    python benchmarks/load.py --size tiny --rounds 1           # a tiny model, in seconds

Every round is a new process each for the parts and for the command; `seconds` are by the clock, `cpu` on the processor, which a
busy machine changes less. Files are in the system's page cache by then, and the language model is ready; `first_ever` is a
command whose cache folder is empty, so that it makes the language model ready first.
There is nothing published to compare with: the released code has no such command.
It ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHAIR = Path(__file__).resolve().parents[1] / "examples" / "chair.glb"
PARTS = ("import_pointalign", "import_torch", "import_answering", "from_pretrained", "first_token", "answer")
# What is aimed at on two cores, in seconds.
TARGETS = {"import_pointalign": 0.5, "caption": 15.0}


def work(model: str, file: str, longest: int) -> None:
    """The parts in this process; one line of JSON with the seconds of each by the clock and on the processor."""
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    laps: dict[str, tuple[float, float]] = {}
    last = time.perf_counter(), time.process_time()

    def lap(name: str) -> None:
        nonlocal last
        now = time.perf_counter(), time.process_time()
        laps[name] = round(now[0] - last[0], 4), round(now[1] - last[1], 4)
        last = now

    import pointalign

    lap("import_pointalign")
    import torch

    lap("import_torch")
    from pointalign.answering.answerer import CAPTION_QUESTION
    from pointalign.answering.loading import load_answerer
    from pointalign.options import Decoding

    lap("import_answering")
    answerer = load_answerer(model)
    lap("from_pretrained")
    cloud = answerer.prepare(pointalign.load_point_cloud(file, n_points=answerer.processor.num_points))
    answerer.ask([cloud], CAPTION_QUESTION, Decoding(max_new_tokens=1))
    lap("first_token")
    (said,) = answerer.ask([cloud], CAPTION_QUESTION, Decoding(max_new_tokens=longest))
    lap("answer")
    from measuring import peak_memory  # imports torch, whose time is told above

    end = {"laps": laps, "tokens": said.tokens, "peak": peak_memory("cpu"), "threads": torch.get_num_threads()}
    precision = "bf16" if answerer.model.get_input_embeddings().weight.dtype == torch.bfloat16 else "fp32"
    print(json.dumps({**end, "precision": precision}), file=told)


def caption(model: str, file: str, longest: int, cache: str | None = None) -> tuple[float, float]:
    """Seconds of `pointalign caption FILE` in a process of its own, by the clock and on the processor.

    Args:
        model: see `find_model`.
        file: a 3D file.
        longest: answer, in tokens.
        cache: folder of what is kept between commands; the usual one when None.

    Raises:
        SystemExit: when the command fails.
    """
    command = [sys.executable, "-m", "pointalign", "caption", file, "--model", model]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    around = {**os.environ, "POINTALIGN_CACHE": cache} if cache else None
    done = subprocess.run([*command, "--max-new-tokens", str(longest)], capture_output=True, text=True, env=around)
    taken, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"pointalign caption failed:\n{done.stderr[-4000:]}")
    return taken, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def parts(arguments: Sequence[str]) -> dict[str, Any]:
    """What `work` tells, from a process of its own.

    Raises:
        SystemExit: when it fails.
    """
    done = subprocess.run([sys.executable, __file__, *arguments, "--worker"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"loading failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def find_model(size: str, name: str | None, folder: Path) -> str:
    """The model named, the default one, or one that is made and saved for this."""
    from pointalign.errors import CheckpointError
    from pointalign.models.checkpoint import local_checkpoint, resolve_model

    if size == "household":
        found = resolve_model(name)
        try:
            local_checkpoint(found)
            return found
        except CheckpointError:
            if name is not None:
                raise
    from train_step import prepare

    _, model, processor = prepare(size, folder, 2, True)
    model.eval().save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return str(folder / "model")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds; medians and quartiles by part."""
    # Here and not above: the processes that are measured must not begin with torch.
    from measuring import quartiles

    from pointalign.config import Recipe
    from pointalign.run_folder import environment
    from pointalign.runs import quiet

    quiet()
    with tempfile.TemporaryDirectory() as temporary:
        model = find_model(options.size, options.model, Path(temporary))
        given = (model, str(options.file), options.max_new_tokens)
        arguments = ["--model", model, "--file", given[1], "--max-new-tokens", str(options.max_new_tokens)]
        first_ever = caption(*given, cache=str(Path(temporary) / "empty"))
        parts(arguments)  # whose files are in the page cache from now on, and its language model ready
        rounds = [(parts(arguments), caption(*given)) for _ in range(options.rounds)]
    told: dict[str, Any] = {}
    laps = {name: [seen["laps"][name] for seen, _ in rounds] for name in PARTS}
    for name, values in {**laps, "caption": [whole for _, whole in rounds]}.items():
        seconds, busy = zip(*values, strict=True)
        told[name] = {
            "seconds": round(statistics.median(seconds), 3),
            "quartiles": quartiles(seconds, 3),
            "cpu": round(statistics.median(busy), 3),
        }
        if name in TARGETS:
            told[name]["target"] = TARGETS[name]
    last, where = rounds[-1][0], environment(Recipe())
    return {
        "benchmark": "load",
        "size": options.size,
        "rounds": options.rounds,
        "ours": {
            **told,
            "first_ever": dict(zip(("seconds", "cpu"), first_ever, strict=True)),
            "answer_tokens": last["tokens"],
            "peak_megabytes": round(last["peak"] / 2**20),
        },
        "precision": last["precision"],
        "device": where["device"],
        "threads": last["threads"],
        "versions": where["versions"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure once; one line of JSON on stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["household", "tiny"], default="household")
    parser.add_argument("--model", help="the default model, else an untrained one, when not given")
    parser.add_argument("--file", type=Path, default=CHAIR, help="a 3D file")
    parser.add_argument(
        "--max-new-tokens", type=int, default=150, help="longest answer; the command's own, when not given"
    )
    parser.add_argument("--rounds", type=int, default=3, help="that are counted")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds is 1 or more")
    if options.worker:
        work(options.model, str(options.file), options.max_new_tokens)
        return
    print(json.dumps(measure(options)))


if __name__ == "__main__":
    main()

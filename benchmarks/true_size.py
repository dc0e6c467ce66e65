"""Memory and time of a few steps of a recipe at its true size: random weights, random clouds and words, bf16.

    python benchmarks/true_size.py                      # every recipe of another cost; one line of JSON each
    python benchmarks/true_size.py pointalign --steps 5
    python benchmarks/true_size.py pointalign --tiny    # the same path at a tiny size, on any machine, in seconds

Nothing is downloaded or read. The run goes through the trainer, the feature cache and the data files as any other one.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import peak_memory
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedTokenizerFast

from pointalign.config import Recipe, load_recipe, recipe_names
from pointalign.full_size import PUBLISHED, PublishedModel, count_weights, starting_model
from pointalign.importers.minigpt3d import build_processor
from pointalign.models.phi import PhiVariantConfig
from pointalign.models.pointalign import PointAlignConfig
from pointalign.parts import prepare_parts
from pointalign.recipe_table import sums
from pointalign.run_folder import RunFolder, environment
from pointalign.runs import cast_frozen, quiet, train_language

DEFAULT = (
    *(f"minigpt-3d-stage-{number}" for number in (1, 2, 3, 4)),
    "pointalign",
    "pointalign-baseline",
    "pointalign-target-projector",
    "frozen-language-model",
)
NUM_OBJECTS = 40
# Tokens of a question, and of all answers of one conversation, so that a step of stage PointAlign has some 1,100 tokens, 163
# a conversation: our guess at the published data. A token is a byte here, so what surrounds a question takes 30 of them in
# place of 12.
QUESTION_TOKENS = 20
ANSWER_TOKENS = {"simple_description": 15, "detailed_description": 110, "single_round": 25, "multi_round": 120}


def tiny_config() -> PointAlignConfig:
    """The published model's shape, tiny, with enough decoder blocks for every recipe's alignment."""
    text = PhiVariantConfig(
        vocab_size=260,
        hidden_size=64,  # so that 4-bit matrices, in blocks of 64, can be tried as well
        intermediate_size=64,
        num_hidden_layers=28,
        num_attention_heads=2,
        pad_token_id=256,
        bos_token_id=257,
        eos_token_id=258,
    )
    encoder = {
        "num_groups": 8,
        "group_size": 6,
        "group_hidden_sizes": (8, 12, 16),
        "group_width": 10,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    qformer = {
        "vocab_size": 1,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "encoder_hidden_size": 18,
    }
    connector = {"hidden_sizes": (20,), "num_query_tokens": 5, "projection_size": 28, "qformer_config": qformer}
    return PointAlignConfig(
        point_encoder_config=encoder, connector_config=connector, text_config=text, point_token_id=259
    )


TINY = {start: PublishedModel(tiny_config, model.adapters) for start, model in PUBLISHED.items()}


def byte_tokenizer() -> Any:
    """One token per byte, and the special ones: ids do not depend on any file."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.add_special_tokens([AddedToken(name, special=True) for name in ("<pad>", "<s>", "</s>", "<point>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def write_data(folder: Path, num_points: int) -> list[str]:
    """Random clouds, and one conversation of each type about each; the instruction files."""
    rng, words = np.random.default_rng(0), random.Random(0)
    (folder / "clouds").mkdir()
    entries = []
    for number in range(NUM_OBJECTS):
        np.save(folder / "clouds" / f"object{number}_8192.npy", rng.random((num_points, 6), dtype=np.float32))
        for kind, tokens in ANSWER_TOKENS.items():
            rounds = 3 if kind == "multi_round" else 1
            turns = []
            for turn in range(rounds):
                mark = "" if turn else "<point>\n"
                turns.append({"from": "human", "value": mark + _letters(words, QUESTION_TOKENS)})
                turns.append({"from": "gpt", "value": _letters(words, tokens // rounds)})
            entries.append({"object_id": f"object{number}", "conversation_type": kind, "conversations": turns})
    (folder / "instructions.json").write_text(json.dumps(entries), encoding="utf-8")
    return [str(folder / "instructions.json")]


def _letters(words: random.Random, count: int) -> str:
    return "".join(words.choices("abcdefgh ", k=count))


class StepClock:
    """The time after every optimiser step; on a GPU as the device tells it, so that nothing waits for it.

    Attributes:
        busy: seconds of this process on processors, after every step; a busy machine changes their differences less.
    """

    def __init__(self) -> None:
        self.times: list[Any] = []
        self.busy: list[float] = []
        self._hook = register_optimizer_step_post_hook(self._step)

    def _step(self, *arguments: Any) -> None:
        self.busy.append(time.process_time())
        if torch.cuda.is_available():
            self.times.append(torch.cuda.Event(enable_timing=True))
            self.times[-1].record()
        else:
            self.times.append(time.perf_counter())

    def stop(self) -> list[float]:
        """Seconds of each step but the first, which also warms up."""
        self._hook.remove()
        pairs = zip(self.times, self.times[1:], strict=False)
        if not torch.cuda.is_available():
            return [after - before for before, after in pairs]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairs]


def measure(name: str, steps: int, tiny: bool) -> dict[str, Any]:
    """Run a recipe for a few steps.

    Args:
        name: of a bundled recipe that starts from a published model or from what another one writes.
        steps: optimiser steps, 2 or more.
        tiny: at a tiny size.

    Returns:
        `seconds_per_step` (median of all but the first), `peak_memory_gib` (the device's while training; on a CPU the
        process's), numbers of weights, device and versions.
    """
    quiet()
    recipe = load_recipe(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["POINTALIGN_CACHE"] = str(folder / "cache")
        recipe.optimizer.max_steps, recipe.optimizer.warmup_steps = steps, 1
        recipe.precision, recipe.logging_steps, recipe.report_to = "bf16", 1, []
        num_points = 64 if tiny else 8192
        recipe.data.source, recipe.data.instructions = str(folder / "clouds"), write_data(folder, num_points)
        model, processor = build(recipe, num_points, tiny, device)
        weights = sums(count_weights(model))
        clock = StepClock()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run = RunFolder(folder / "run")
        run.open(recipe, resume=False)
        _, regularizer = train_language(recipe, run, model, processor)
        projector = 0 if regularizer is None else sum(p.numel() for p in regularizer.parameters())
        told = environment(recipe)
        return {
            "benchmark": "true_size",
            "recipe": name,
            "tiny": tiny,
            "steps": steps,
            "seconds_per_step": round(statistics.median(clock.stop()), 4),
            "peak_memory_gib": round(peak_memory(device) / 2**30, 3),
            "weights": weights.total + projector,
            "trained": weights.trained + projector,
            "precision": recipe.precision,
            "device": told["device"],
            "threads": told["threads"],
            "versions": told["versions"],
        }


def build(recipe: Recipe, num_points: int, tiny: bool, device: str) -> tuple[Any, Any]:
    """The recipe's model as it is when training begins, and a processor that fits it."""
    with torch.device(device):
        model = starting_model(recipe, TINY if tiny else PUBLISHED)
        prepare_parts(model, recipe)
    processor = build_processor(model.config, byte_tokenizer(), "<point>", num_points)
    model.config.point_token_id = processor.point_token_id
    cast_frozen(model)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return model, processor


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the recipes that are named; one line of JSON on stdout for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    published = [name for name in recipe_names() if not name.startswith("household-")]
    parser.add_argument(
        "recipes", nargs="*", choices=published, help="bundled recipes; the default ones when none is named"
    )
    parser.add_argument("--steps", type=int, default=2, help="optimiser steps, 2 or more")
    parser.add_argument("--tiny", action="store_true", help="at a tiny size")
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error("--steps is 2 or more: the first step warms up and is not timed")
    for name in options.recipes or DEFAULT:
        print(json.dumps(measure(name, options.steps, options.tiny)), flush=True)


if __name__ == "__main__":
    main()

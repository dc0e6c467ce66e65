"""Did fine-tuning hurt the language model? The fine-tuned one against its base, on text without any point cloud."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel

from pointalign.answering.generation import generate_from
from pointalign.errors import ConfigError
from pointalign.evaluation.statistics import bootstrap_ratio, summarize_share
from pointalign.models.checkpoint import fit_embeddings
from pointalign.models.language_model import load_language_model

LONGEST_REPLY = 40
PROMPTS_AT_ONCE = 12
COMMENT = "#"


@dataclass(frozen=True)
class Reading:
    """How a language model reads the passages and answers the prompts.

    Args:
        losses: per passage, the summed negative log-probability of its tokens but the first, in nats.
        tokens: per passage, how many tokens that is.
        guesses: per passage, the most probable token at each of them.
        replies: per prompt, the greedy answer.
    """

    losses: tuple[float, ...]
    tokens: tuple[int, ...]
    guesses: tuple[tuple[int, ...], ...]
    replies: tuple[str, ...]

    @property
    def perplexity(self) -> float:
        """exp of the mean loss per token over all passages."""
        return math.exp(sum(self.losses) / sum(self.tokens))


def retention_passages() -> list[str]:
    """The bundled text: 21 passages of plain English on everyday matters, written for this project."""
    return "\n".join(_lines("passages.txt", keep_blank=True)).strip().split("\n\n")


def retention_prompts() -> list[str]:
    """The bundled questions that need no point cloud."""
    return _lines("prompts.txt", keep_blank=False)


def _lines(name: str, keep_blank: bool) -> list[str]:
    text = (resources.files("pointalign") / "assets" / "retention" / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if not line.startswith(COMMENT) and (line.strip() or keep_blank)]


@contextmanager
def base_language_model(model: Any, name: str | None = None) -> Iterator[None]:
    """The model with the language model that fine-tuning started from, as long as the block lasts.

    Args:
        model: a `PointAlignForConditionalGeneration`, its adapters not merged.
        name: the language model to take; where not given, the model's own without its adapters (trained norms, which the
            adapters hold, included), or the one that its configuration names.

    Raises:
        ConfigError: when the model tells of no base.
        CheckpointError: when the named language model cannot be loaded.
    """
    tuned = model.language_model
    if name is None and isinstance(tuned, PeftModel):
        with tuned.disable_adapter():
            yield
        return
    name = name or model.config.language_model
    if name is None:
        raise ConfigError(
            "this model holds its language model's weights itself and has no adapter, so nothing tells what it was before; "
            "name its base with --base-language-model"
        )
    weight = model.get_input_embeddings().weight
    base: Any = load_language_model(name)
    fit_embeddings(base, model.config.text_config.vocab_size)
    model.language_model = base.to(weight.device, weight.dtype).eval()
    try:
        yield
    finally:
        model.language_model = tuned


@torch.inference_mode()
def read_texts(
    model: Any,
    processor: Any,
    passages: Sequence[str],
    prompts: Sequence[str],
    advance: Callable[[int], None] = lambda count: None,
) -> Reading:
    """Score every passage and answer every prompt, greedily.

    Args:
        model: in evaluation mode.
        processor: its processor.
        passages: scored one by one, each from its beginning.
        prompts: asked in the model's chat format, without a cloud.
        advance: called with the number of passages and prompts done.
    """
    losses, tokens, guesses, replies = [], [], [], []
    for passage in passages:
        ids = torch.tensor(
            [processor.tokenizer(passage)["input_ids"]], device=model.get_input_embeddings().weight.device
        )
        logits = model.language_model(input_ids=ids).logits[0, :-1].float()
        losses.append(float(F.cross_entropy(logits, ids[0, 1:], reduction="sum")))
        tokens.append(ids.shape[1] - 1)
        guesses.append(tuple(logits.argmax(dim=-1).tolist()))
        advance(1)
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        batch = prompts[start : start + PROMPTS_AT_ONCE]
        inputs = processor.apply_chat_template([[{"role": "user", "content": prompt}] for prompt in batch])
        said = generate_from(model, processor, inputs, {"do_sample": False, "max_new_tokens": LONGEST_REPLY})
        replies += [one.text for one in said]
        advance(len(batch))
    return Reading(tuple(losses), tuple(tokens), tuple(guesses), tuple(replies))


def compare_readings(base: Reading, tuned: Reading, prompts: Sequence[str]) -> dict[str, Any]:
    """How far two language models are from one another on the same texts.

    Args:
        base: of the language model before fine-tuning.
        tuned: of the fine-tuned one.
        prompts: what both were asked.

    Returns:
        `perplexity` of both; `perplexity_ratio`, fine-tuned over base, above 1 where fine-tuning hurt, with its `interval`
        by a paired bootstrap over passages and `inside_noise`; `n` passages and `tokens`; `same_next_token`, the share of
        tokens at which both find the same one most probable; `same_replies`, the share of prompts with word for word
        the same answer, with n and Wilson interval; `same_beginning`, the mean share of the answers' words that are the
        same from the first word on; and `replies`.
    """
    differences = [after - before for before, after in zip(base.losses, tuned.losses, strict=True)]
    low, high = (math.exp(end) for end in bootstrap_ratio(differences, base.tokens))
    same = [a == b for one, two in zip(base.guesses, tuned.guesses, strict=True) for a, b in zip(one, two, strict=True)]
    pairs = list(zip(base.replies, tuned.replies, strict=True))
    return {
        "n": len(base.losses),
        "tokens": sum(base.tokens),
        "perplexity": {"base": base.perplexity, "fine_tuned": tuned.perplexity},
        "perplexity_ratio": tuned.perplexity / base.perplexity,
        "interval": [low, high],
        "inside_noise": low <= 1 <= high,
        "same_next_token": float(np.mean(same)),
        "same_replies": summarize_share([one == two for one, two in pairs]),
        "same_beginning": float(np.mean([_shared_beginning(one, two) for one, two in pairs])),
        "replies": [
            {"prompt": prompt, "base": one, "fine_tuned": two}
            for prompt, (one, two) in zip(prompts, pairs, strict=True)
        ],
    }


def _shared_beginning(first: str, second: str) -> float:
    """Share of the longer text's words that both have in common from the first word on; 1 for two empty texts."""
    one, two = first.split(), second.split()
    shared = next(
        (index for index, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two))
    )
    return shared / max(len(one), len(two), 1) if one or two else 1.0

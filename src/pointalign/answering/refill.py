"""Greedy answers to many prompts: a row whose answer has ended makes room for the next prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from pointalign.answering.cache import roomy_cache
from pointalign.models.language_model import takes

# Settings of `generate` that change nothing in a greedy answer, or that are honoured here. With any other one
# transformers' own loop answers.
UNDERSTOOD = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "max_length", "max_new_tokens"),
    *("do_sample", "temperature", "top_k", "top_p", "transformers_version", "_from_model_config"),
    *("use_cache", "output_attentions", "output_hidden_states"),
}
# Rows that may idle, as a share of all, before the cache is copied without them.
IDLE_SHARE = 0.25


def can_refill(model: Any, options: Mapping[str, Any]) -> bool:
    """Whether `refilled_ids` gives what `generate` would.

    Args:
        model: a `PointAlignForConditionalGeneration`.
        options: arguments of `generate`; one of them is `max_new_tokens`.
    """
    if options.keys() - {"do_sample"} != {"max_new_tokens"} or options.get("do_sample"):
        return False
    if not model.generation_config.to_diff_dict().keys() <= UNDERSTOOD:
        return False
    layers = DynamicCache(config=model.config.text_config).layers
    is_plain = bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
    return is_plain and takes(model.language_model, "position_ids")


class _Rows:
    """Answers that are being written.

    Args:
        numbers: which prompt each row answers.
        cache: keys and values of every row.
        mask: (rows, columns of the cache), 0 where a row has nothing.
        tokens: (rows, 1), the last token of each, which the cache does not hold yet.

    Attributes:
        idle: rows whose answer has ended; what they are fed is masked, so that their positions stay within the context.
    """

    def __init__(self, numbers: list[int], cache: Any, mask: Tensor, tokens: Tensor) -> None:
        self.numbers, self.cache, self.mask, self.tokens = numbers, cache, mask, tokens
        self.idle: list[int] = []

    def keep(self, rows: list[int]) -> None:
        """Go on with some rows alone, and without the columns that none of them has."""
        kept = torch.tensor(rows, device=self.mask.device)
        mask = self.mask[kept]
        start = int(mask.any(dim=0).int().argmax())
        self.numbers, self.mask, self.tokens = [self.numbers[row] for row in rows], mask[:, start:], self.tokens[kept]
        self.idle = []
        for layer in self.cache.layers:
            layer.replace(layer.keys[kept, :, start:], layer.values[kept, :, start:])

    def join(self, other: _Rows) -> None:
        """Take further rows in; the shorter cache is padded on the left."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        ours, theirs = width - self.mask.shape[1], width - other.mask.shape[1]
        self.numbers = self.numbers + other.numbers
        self.mask = torch.cat([F.pad(self.mask, (ours, 0)), F.pad(other.mask, (theirs, 0))])
        self.tokens = torch.cat([self.tokens, other.tokens])
        for layer, new in zip(self.cache.layers, other.cache.layers, strict=True):
            layer.replace(
                torch.cat([F.pad(layer.keys, (0, 0, ours, 0)), F.pad(new.keys, (0, 0, theirs, 0))]),
                torch.cat([F.pad(layer.values, (0, 0, ours, 0)), F.pad(new.values, (0, 0, theirs, 0))]),
            )
            new.replace(new.keys.new_empty(0), new.values.new_empty(0))  # nobody reads them again


class _Prompts:
    """The prompts of a call; what they begin with in common is computed once.

    Args:
        model: as in `refilled_ids`.
        inputs: as in `refilled_ids`, on the model's device.
        rows: clouds encoded at a time.
    """

    def __init__(self, model: Any, inputs: Mapping[str, Tensor], rows: int) -> None:
        self.model = model
        masks = inputs["attention_mask"].bool()
        self.ids = [ids[mask] for ids, mask in zip(inputs["input_ids"], masks, strict=True)]
        clouds = inputs.get("point_clouds")
        pieces = () if clouds is None else clouds.split(rows)
        self.point_tokens = [tokens for piece in pieces for tokens in model.encode_points(piece).point_tokens]
        shown = [int((ids == model.config.point_token_id).sum()) // model.config.num_point_tokens for ids in self.ids]
        self.first_cloud = [sum(shown[:number]) for number in range(len(shown) + 1)]
        self.prefix = self._computed_prefix()

    def _computed_prefix(self) -> Any:
        """Keys and values of what all prompts begin with, up to the first point token."""
        shortest = min(map(len, self.ids))
        begin = torch.stack([ids[: shortest - 1] for ids in self.ids])
        shared = (begin == begin[0]).all(dim=0) & (begin[0] != self.model.config.point_token_id)
        length = int(shared.int().cumprod(dim=0).sum())
        if not length or len(self.ids) == 1:
            return None
        cache = roomy_cache(self.model.config.text_config)
        self.model(
            input_ids=begin[:1, :length], point_tokens=None, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        return cache

    def __len__(self) -> int:
        return len(self.ids)

    def begun(self, numbers: list[int]) -> tuple[Any, Tensor, Tensor]:
        """Cache and mask of the prompts' common beginning, and the embeddings of the rest, padded on the left.

        Args:
            numbers: of prompts.

        Returns:
            The cache; (rows, columns) the mask with the rest; (rows, longest rest, D_llm).
        """
        cache = roomy_cache(self.model.config.text_config)
        known = 0 if self.prefix is None else self.prefix.get_seq_length()
        if self.prefix is not None:
            for index, layer in enumerate(self.prefix.layers):
                shape = (len(numbers), -1, -1, -1)
                cache.update(layer.keys.expand(shape), layer.values.expand(shape), index)
        rests = [self.ids[number][known:] for number in numbers]
        longest = max(map(len, rests))
        ids = torch.stack([F.pad(rest, (longest - len(rest), 0)) for rest in rests])
        there = torch.stack([F.pad(torch.ones_like(rest), (longest - len(rest), 0)) for rest in rests])
        ids = ids.masked_fill(there == 0, self.model.config.filler_token_id)
        places = [range(self.first_cloud[number], self.first_cloud[number + 1]) for number in numbers]
        shown = [self.point_tokens[place] for span in places for place in span]
        embeds = self.model.embed_inputs(ids, torch.stack(shown) if shown else None)
        return cache, F.pad(there, (known, 0), value=1), embeds


@torch.inference_mode()
def refilled_ids(
    model: Any, inputs: Mapping[str, Tensor], rows: int, max_new_tokens: int, ends: set[int]
) -> list[list[int]]:
    """Greedy answers to any number of prompts, some rows at a time.

    The longest prompts come first. Each answer is what `generate` gives it alone, up to the rounding that other shapes of
    matrices bring.

    Args:
        model: a `PointAlignForConditionalGeneration` for which `can_refill` holds.
        inputs: `input_ids` and `attention_mask` (B, L), and `point_clouds` if there are any, on the model's device.
        rows: answers that are written at a time.
        max_new_tokens: longest answer.
        ends: ids at which an answer ends.

    Returns:
        The ids of each answer, its end symbol included, in the order of the prompts.
    """
    prompts = _Prompts(model, inputs, rows)
    waiting = sorted(range(len(prompts)), key=lambda number: len(prompts.ids[number]))
    written: list[list[int]] = [[] for _ in waiting]
    live: _Rows | None = None
    while waiting or live:
        free = rows - (len(live.numbers) if live else 0)
        if waiting and free >= min(len(waiting), max(1, rows * IDLE_SHARE)):
            numbers = [waiting.pop() for _ in range(min(free, len(waiting)))]
            cache, mask, embeds = prompts.begun(numbers)
            begun = _Rows(numbers, cache, mask, _next_tokens(model, cache, mask, inputs_embeds=embeds))
            if live is None:
                live = begun
            else:
                live.join(begun)
            fresh = numbers
        else:
            assert live is not None
            live.mask = F.pad(live.mask, (0, 1), value=1)
            if live.idle:
                live.mask[live.idle, -1] = 0
            live.tokens = _next_tokens(model, live.cache, live.mask, input_ids=live.tokens)
            fresh = live.numbers
        live = _without_ended(live, fresh, written, max_new_tokens, ends, rows)
    return written


def _without_ended(
    live: _Rows, fresh: Sequence[int], written: list[list[int]], longest: int, ends: set[int], rows: int
) -> _Rows | None:
    """Write down the tokens of the prompts that have a new one, and drop rows that have ended where it pays."""

    def ended(number: int) -> bool:
        return len(written[number]) == longest or (bool(written[number]) and written[number][-1] in ends)

    new = set(fresh)
    for number, token in zip(live.numbers, live.tokens.flatten().tolist(), strict=True):
        if number in new and not ended(number):
            written[number].append(token)
    going = [row for row, number in enumerate(live.numbers) if not ended(number)]
    if not going:
        return None
    live.idle = sorted(set(range(len(live.numbers))) - set(going))
    if len(live.idle) >= max(1, rows * IDLE_SHARE):
        live.keep(going)
    return live


def _next_tokens(model: Any, cache: DynamicCache, mask: Tensor, **inputs: Tensor) -> Tensor:
    """The most probable next token of each row, (rows, 1); the cache takes in what was fed."""
    fed = next(iter(inputs.values())).shape[1]
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -fed:]
    output = model(
        **inputs,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    scores = output.logits[:, -1].float()
    if model.generation_config.suppress_tokens:
        scores[:, model.generation_config.suppress_tokens] = -torch.inf
    return scores.argmax(dim=-1, keepdim=True)

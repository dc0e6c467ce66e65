"""What a model answers: free-form text about many clouds, batched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


@torch.inference_mode()
def generate_answers(
    model: Any,
    processor: Any,
    clouds: Sequence[Any],
    question: str,
    max_new_tokens: int = 100,
    batch_size: int = 20,
    advance: Callable[[int], None] = lambda count: None,
    **generation: Any,
) -> list[str]:
    """Ask one question about each cloud.

    Args:
        model: a `PointAlignForConditionalGeneration` in evaluation mode.
        processor: its processor.
        clouds: (N, 3) or (N, 6) each.
        question: the same for all.
        max_new_tokens: longest answer in tokens; an answer ends at the end of the turn.
        batch_size: clouds at a time.
        advance: called with the number of clouds done.
        generation: further arguments of `generate`; greedy by default.

    Returns:
        One answer per cloud, without special tokens and surrounding space.

    Raises:
        DataError: for a bad cloud.
    """
    device = model.get_input_embeddings().weight.device
    messages = [{"role": "user", "content": [{"type": "point_cloud"}, {"type": "text", "text": question}]}]
    answers: list[str] = []
    for start in range(0, len(clouds), batch_size):
        batch = list(clouds[start : start + batch_size])
        inputs = processor.apply_chat_template([messages] * len(batch), points=batch).to(device)
        options = {"do_sample": False, "max_new_tokens": max_new_tokens, **generation}
        ids = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
        advance(len(batch))
    return answers

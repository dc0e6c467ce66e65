"""Who scores an answer. `likelihood` needs no judge: the model itself says how probable each label's text is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pointalign.errors import DataError


@torch.inference_mode()
def label_log_likelihoods(
    model: Any, processor: Any, clouds: Sequence[Any], question: str, stem: str, labels: Sequence[str]
) -> Tensor:
    """Length-normalised log-probability of each label's text as the model's answer about each cloud.

    The prompt, the cloud and the stem are computed once; all labels share their key-value cache.

    Args:
        model: a `PointAlignForConditionalGeneration` in evaluation mode.
        processor: its processor.
        clouds: B clouds, (N, 3) or (N, 6).
        question: what is asked about each cloud.
        stem: how the answer begins, the same for all labels; may be empty.
        labels: what may follow, for instance " a chair".

    Returns:
        (B, labels) float32: mean log-probability per token of the label's text.

    Raises:
        DataError: without labels.

    Source: length normalisation after Brown et al. 2020 (arXiv 2005.14165), section 2.4.
    """
    if not labels:
        raise DataError("there are no labels to score; name at least one")
    content = [{"type": "point_cloud"}, {"type": "text", "text": question}]
    prompt = processor.encode([{"role": "user", "content": content}], add_generation_prompt=True)["input_ids"]
    joined = [_ids(processor, stem + label) for label in labels]
    shared = _shared_length(joined)
    prompt, tails = prompt + joined[0][:shared], [ids[shared:] for ids in joined]
    device = model.get_input_embeddings().weight.device
    points = torch.stack([processor.prepare_points(cloud) for cloud in clouds]).to(device)
    input_ids = torch.tensor([prompt] * len(clouds), device=device)
    prefix = model(input_ids=input_ids, point_clouds=points, logits_to_keep=1, use_cache=True)
    first = prefix.logits[:, -1].float().log_softmax(dim=-1)
    total = first[:, [tail[0] for tail in tails]]
    if max(map(len, tails)) > 1:
        total = total + _later_tokens(model, processor, prefix.past_key_values, input_ids.shape, tails)
    return (total / torch.tensor([len(tail) for tail in tails], device=device)).cpu()


def _ids(processor: Any, text: str) -> list[int]:
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def _shared_length(sequences: Sequence[Sequence[int]]) -> int:
    """How many first tokens all sequences have in common, leaving at least one of each."""
    length = 0
    while length < min(map(len, sequences)) - 1 and len({ids[length] for ids in sequences}) == 1:
        length += 1
    return length


def _later_tokens(model: Any, processor: Any, cache: Any, prompt_shape: torch.Size, tails: list[list[int]]) -> Tensor:
    """Summed log-probability of each tail's tokens after its first, (B, labels), from the prompts' cache."""
    batch, prompt_length = prompt_shape
    device = model.get_input_embeddings().weight.device
    fed = processor.pad([tail[:-1] for tail in tails], side="right", value=0).to(device)
    wanted = processor.pad([tail[1:] for tail in tails], side="right", value=-100).to(device)
    mask = F.pad((wanted != -100).long(), (prompt_length, 0), value=1)
    cache.batch_repeat_interleave(len(tails))
    logits = model(
        input_ids=fed.repeat(batch, 1), attention_mask=mask.repeat(batch, 1), past_key_values=cache, use_cache=True
    ).logits
    losses = F.cross_entropy(logits.float().transpose(1, 2), wanted.repeat(batch, 1), reduction="none")
    return -losses.sum(dim=1).view(batch, len(tails))

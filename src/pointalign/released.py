"""What the released code does differently from the paper, as options for comparing with published numbers.

Nothing here is used by default: the evaluation prompt (`with_released_prompt`) and the way answers are generated
(`RELEASED_GENERATION`), both by `pointalign evaluate --as-released`; the text of one-turn training questions
(`released_messages`) and the positions of the alignment loss (`released_alignment_mask`), both by
`pointalign train --as-released`; the positions alone by `--alignment.positions released`.
"""

from __future__ import annotations

import copy
import string
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pointalign.errors import ConfigError

RELEASED_QUESTION_WORDS = 50
RELEASED_POINT_SUFFIX = "</PC> "
# Two beams with sampling; no token is the end symbol, so every answer runs to the limit.
RELEASED_GENERATION = {"num_beams": 2, "do_sample": True, "temperature": 0.2, "top_p": 0.7, "eos_token_id": -1}

# The opening of the turn is written twice, as plain text, and there is no beginning-of-sequence token.
RELEASED_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + '###' }}"
    "{% elif '</PC> ' in message['content'] %}"
    "{{ '<s>[INST] ' + message['content'].replace('</PC> ', '</PC> <s>[INST] ', 1) + ' [/INST]' }}"
    "{% else %}{{ '<s>[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)


def with_released_prompt(processor: Any) -> Any:
    """A processor that writes the released evaluation prompt: `<s>[INST] <PC>..</PC> <s>[INST] question [/INST]`.

    Args:
        processor: of an imported MiniGPT-3D or PointAlign model, whose points stand between `<PC>` and `</PC> `.

    Returns:
        A copy; the processor itself keeps the prompt that the model was trained with.

    Raises:
        ConfigError: when the points stand elsewhere in this processor's prompt: the released one belongs to another model.

    Source: released code of PointAlign (arXiv 2603.00412), measured by running it.
    """
    if processor.point_suffix != RELEASED_POINT_SUFFIX:
        raise ConfigError(
            "this model was not trained with points between <PC> and </PC>, so the released prompt is not its own; leave "
            "--as-released out"
        )
    changed = copy.copy(processor)
    changed.chat_template = RELEASED_CHAT_TEMPLATE
    return changed


def released_question(question: str) -> str:
    """A one-turn training question as the released code alters it.

    Lower case, without punctuation but for question marks, and without the words past the 50th. Questions of longer
    conversations, and all questions in evaluation, are left alone there.

    Source: released code of PointAlign (arXiv 2603.00412), measured by running it.
    """
    dropped = string.punctuation.replace("?", "")
    words = question.lower().translate(str.maketrans("", "", dropped)).split()
    return " ".join(words[:RELEASED_QUESTION_WORDS])


def released_messages(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """A training conversation as the released code alters it; one of several turns stays as it is.

    Args:
        messages: as `PointAlignProcessor.encode` takes them.

    Returns:
        The messages, of one turn with its question as `released_question` has it and a blank behind it.

    Source: released code of PointAlign (arXiv 2603.00412), measured by running it.
    """
    if sum(message["role"] == "user" for message in messages) != 1:
        return messages
    return [_released_message(message) if message["role"] == "user" else message for message in messages]


def _released_message(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": released_question(content) + " "}
    parts = [
        {**part, "text": released_question(part["text"]) + " "} if part["type"] == "text" else part for part in content
    ]
    return {**message, "content": parts}


def released_alignment_mask(labels: Tensor, num_point_tokens: int) -> Tensor:
    """The positions that the released code aligns: the last ones of the padded prompt, not the point tokens.

    The prompts of a batch are padded on the right to the longest one and the last positions are taken; in the sequence
    itself a shorter prompt's padding is its answer. Each position is compared with the target of another token.

    Args:
        labels: (B, L) of a right-padded training batch, -100 at the prompts.
        num_point_tokens: Q, positions per row; the prompts must have at least as many tokens.

    Returns:
        (B, L) bool, Q true positions in every row, the same ones for all rows.

    Source: released code of PointAlign (arXiv 2603.00412), measured by running it.
    """
    end = int((labels != -100).int().argmax(dim=1).max())
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, end - num_point_tokens : end] = True
    return mask

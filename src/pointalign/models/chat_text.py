"""Conversations as text: the chat template's rendering, cut where answers begin and end; and the point token in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from pointalign.errors import DataError
from pointalign.storage import writable

DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n' }}"
    "{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)

Message = Mapping[str, Any]


class Segment(NamedTuple):
    """A piece of a rendered conversation, and whether the model is to learn to write it."""

    text: str
    is_answer: bool


def check_text(text: object) -> None:
    """See that something can be told to a language model.

    Raises:
        DataError: when it is no text, or text with half a character, as bytes that are not UTF-8 become.
    """
    if not isinstance(text, str):
        raise DataError(f"{text!r} is no text; give a string")
    if not text.isascii() and (shown := writable(text)) != text:
        raise DataError(f"{shown!r} is not UTF-8 text; type it anew, or save the file as UTF-8")


def cut_at_answers(
    turns: Sequence[Mapping[str, str]],
    template: Callable[[Sequence[Mapping[str, str]], bool], str],
    add_generation_prompt: bool,
) -> list[Segment]:
    """A conversation as text, cut where the assistant's turns begin and end.

    Args:
        turns: messages whose content is text.
        template: the chat template, from turns and whether the assistant's turn is opened at their end.
        add_generation_prompt: end with the opening of the assistant's turn.

    Returns:
        Segments whose joined text is the template's. Where the assistant's turn is opened, nothing is learnt from the earlier
        ones, and all is one segment if the template rewrites them.

    Raises:
        DataError: when answers are to be learnt, but the chat template rewrites earlier turns, so that they cannot be told
            from prompts.
    """
    whole = template(turns, add_generation_prompt)
    segments, written = [], ""
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        prompt = template(turns[:index], True)
        full = template(turns[: index + 1], False)
        if not (prompt.startswith(written) and full.startswith(prompt) and whole.startswith(full.rstrip())):
            if add_generation_prompt:
                return [Segment(whole, False)]
            raise DataError(
                "this tokenizer's chat template rewrites earlier turns, so answers cannot be told from prompts; "
                "give the processor a chat_template that only appends"
            )
        answer = full[len(prompt) :].rstrip()
        segments += [Segment(prompt[len(written) :], False), Segment(answer, True)]
        written = prompt + answer
    return [segment for segment in [*segments, Segment(whole[len(written) :], False)] if segment.text]


def choose_point_token(tokenizer: Any, embedding_rows: int, wanted: str | None = None) -> str:
    """Give the tokenizer a placeholder for point tokens, without touching the language model where possible.

    In this order: the token asked for; `<point>` if the vocabulary has it; `<point>` in one of the embedding's unused
    rows; a special token that the tokenizer reserves but neither its chat template nor its sequence marks use; at last
    `<point>` as a new row (the caller then grows the embedding).

    Args:
        tokenizer: changed in place where a token is added.
        embedding_rows: rows of the language model's token embedding.
        wanted: a token of the user's choice.

    Returns:
        The token's text.
    """
    vocabulary = tokenizer.get_vocab()
    token = wanted or "<point>"
    if token in vocabulary:
        return token
    if wanted is None and len(tokenizer) >= embedding_rows:
        template = str(getattr(tokenizer, "chat_template", None))
        used = set(tokenizer.all_special_tokens)
        reserved = [
            (index, added.content)
            for index, added in tokenizer.added_tokens_decoder.items()
            if added.special and added.content not in used and added.content not in template
        ]
        if reserved:
            return max(reserved)[1]
    tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
    return token

"""How answers are judged: the options that `pointalign judge` and `pointalign evaluate` share, declared once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MAX_TOKENS = 128
JudgeName = Literal["match", "embedding", "llm", "hf"]


@dataclass
class JudgeSettings:
    """Options of the judges; each judge reads those that concern it."""

    judge_model: str | None = None
    """llm: the endpoint's name of the model ($OPENAI_MODEL); hf: a short name, Hub id or folder; embedding: an embedder."""
    judge_base_url: str | None = None
    """llm: address of an OpenAI-compatible endpoint, usually ending in /v1 ($OPENAI_BASE_URL; OpenAI's own without it)."""
    judge_api_key: str | None = None
    """llm: better set $OPENAI_API_KEY, which no list of processes shows; local servers need none."""
    judge_prompt: str | None = None
    """llm, hf: a file with your own prompt, or a folder with TASK.txt for several tasks; see docs/judging.md."""
    judge_max_tokens: int = MAX_TOKENS
    """llm, hf: longest reply in tokens; 0 leaves it to the endpoint."""
    judge_extra: str | None = None
    """llm: a JSON object that is added to each request, for what one endpoint needs and others do not know."""
    judge_concurrency: int = 8
    """llm: requests under way at once."""
    judge_timeout: float = 120.0
    """llm: seconds until a request without a reply is given up."""
    judge_retries: int = 6
    """llm: how often a request is sent again after 429, 5xx, a lost connection or a reply that cannot be read."""
    judge_batch_size: int = 8
    """hf: prompts at a time."""
    judge_constrained: bool = False
    """hf: only replies that can be read may be generated (a class with its index, T or F, a number); for small models."""
    judge_price_in: float | None = None
    """llm: price of a million tokens of prompts, in any currency; without both prices no cost is told."""
    judge_price_out: float | None = None
    """llm: price of a million tokens of replies."""

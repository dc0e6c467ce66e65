"""What judges that are language models have in common: prompts out, replies in, each asked once and kept."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pointalign.evaluation.judging.prompts import JudgePrompts, read_reply, unasked_verdict
from pointalign.evaluation.judging.replies import UNPRICED, Prices, Reply, ReplyCache, count_usage
from pointalign.evaluation.records import Answer, Task, Verdict
from pointalign.judge_settings import MAX_TOKENS


class PromptedJudge:
    """A judge that is asked in words. A subclass says what a reply depends on (`request`) and how to get it (`ask`).

    Args:
        model: its name.
        prompts: one per task.
        max_tokens: of its longest reply.
        prices: of its tokens.
    """

    kind = ""

    def __init__(self, model: str, prompts: JudgePrompts, max_tokens: int, prices: Prices = UNPRICED) -> None:
        self.model = model
        self.prompts = prompts
        self.max_tokens = max_tokens
        self.prices = prices
        self.cache = ReplyCache()
        self.usage: dict[str, Any] = {}
        self.asked_usage: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """Judge, model, and hashes of the prompts and of unusual settings; numbers of others do not compare."""
        name = f"{self.kind} {self.told_model}, prompt {self.prompts.fingerprint}"
        if settings := self.unusual_settings():
            digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
            name += f", settings {digest[:8]}"
        return name

    @property
    def told_model(self) -> str:
        """The model's name; of a path the last part."""
        return Path(self.model).name if Path(self.model).is_absolute() else self.model

    def unusual_settings(self) -> dict[str, Any]:
        """What replies depend on beside model and prompts, where it is not what it is when nobody says."""
        return {"max_tokens": self.max_tokens} if self.max_tokens != MAX_TOKENS else {}

    def details(self) -> dict[str, Any]:
        """What a report states of the judge beside its name."""
        return {
            "model": self.model,
            "prompt": self.prompts.source or "pointalign",
            "prompt_hash": self.prompts.fingerprint,
        }

    def request(self, prompt: str) -> dict[str, Any]:
        """All that the reply to a prompt depends on."""
        raise NotImplementedError

    def ask(self, prompts: Sequence[str], known: Mapping[str, Reply], keep: Callable[[str, Reply], None]) -> None:
        """Get the replies that are not known yet.

        Args:
            prompts: all of a task, each once.
            known: the replies there are.
            keep: called with each new reply as it comes.

        Raises:
            PointAlignError: when the judge cannot be reached or loaded.
        """
        raise NotImplementedError

    def prepare(self, task: Task, answers: Sequence[Answer]) -> tuple[list[str | None], dict[str, Reply]]:
        """The prompt about each answer (None for an empty one, which is not asked about), and the replies there are."""
        prompts = [self.prompts.fill(task, answer) if answer.model_output.strip() else None for answer in answers]
        cached = {prompt: self.cache.get(self.request(prompt)) for prompt in dict.fromkeys(filter(None, prompts))}
        return prompts, {prompt: reply for prompt, reply in cached.items() if reply is not None}

    def __call__(
        self, task: Task, answers: Sequence[Answer], advance: Callable[[int], None] = lambda count: None
    ) -> list[Verdict]:
        """One verdict per answer; afterwards `usage` counts all replies, `asked_usage` those that were new.

        Raises:
            PointAlignError: when the judge cannot be reached or loaded; the replies so far are kept.
        """
        prompts, replies = self.prepare(task, answers)
        times, known = Counter(prompts), dict(replies)
        advance(sum(count for prompt, count in times.items() if prompt is None or prompt in known))

        def keep(prompt: str, reply: Reply) -> None:
            self.cache.put(self.request(prompt), reply)
            replies[prompt] = reply
            advance(times[prompt])

        distinct = list(dict.fromkeys(filter(None, prompts)))
        if len(known) < len(distinct):
            self.ask(distinct, known, keep)
        self.usage = count_usage(replies.values(), self.prices)
        self.asked_usage = count_usage([reply for prompt, reply in replies.items() if prompt not in known], self.prices)
        return [
            unasked_verdict(task, answer) if prompt is None else read_reply(task, answer, replies[prompt].text)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

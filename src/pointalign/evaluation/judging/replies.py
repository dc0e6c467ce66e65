"""Replies of language models as judges: kept on disk by a hash of the request, counted in tokens and money."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pointalign.storage import cache_dir, write_text

TOKENS_PER_PRICE = 1_000_000


@dataclass(frozen=True)
class Reply:
    """What a judge wrote.

    Args:
        text: verbatim.
        prompt_tokens: as the endpoint counts them; None where it does not.
        reply_tokens: likewise.
        finish_reason: why it ended, as the endpoint says: "stop", "length", "content_filter".
        served_by: the model that the endpoint says has replied.
    """

    text: str
    prompt_tokens: int | None = None
    reply_tokens: int | None = None
    finish_reason: str | None = None
    served_by: str | None = None


class ReplyCache:
    """One file per reply, named by a hash of all that the reply depends on; several processes may share it.

    Args:
        folder: where; `judge_replies` in the user's cache when not given.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = cache_dir() / "judge_replies" if folder is None else folder

    def _path(self, request: Mapping[str, Any]) -> Path:
        text = json.dumps(request, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.json"

    def get(self, request: Mapping[str, Any]) -> Reply | None:
        """The reply to this request, if it was ever given."""
        try:
            return Reply(**json.loads(self._path(request).read_text(encoding="utf-8"))["reply"])
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError):
            # A machine that lost power left it empty; the request is sent again and the file written anew.
            return None

    def put(self, request: Mapping[str, Any], reply: Reply) -> None:
        """Keep a reply, beside the request so that people can read both."""
        text = json.dumps({"request": request, "reply": asdict(reply)}, indent=1)
        write_text(self._path(request), text + "\n")


@dataclass(frozen=True)
class Prices:
    """What a million tokens cost, in any currency; None when not told."""

    prompt: float | None = None
    reply: float | None = None


UNPRICED = Prices()


def count_usage(replies: Iterable[Reply], prices: Prices) -> dict[str, Any]:
    """Tokens and cost of replies.

    Returns:
        `replies`, `prompt_tokens`, `reply_tokens`, `without_token_count`, `cost`. The tokens are sums over replies that have
        a count; `cost` is None without prices or when a count is missing, for then it would be a guess.
    """
    listed = list(replies)
    counted = [reply for reply in listed if reply.prompt_tokens is not None and reply.reply_tokens is not None]
    prompt_tokens = sum(reply.prompt_tokens or 0 for reply in counted)
    reply_tokens = sum(reply.reply_tokens or 0 for reply in counted)
    cost = None
    if prices.prompt is not None and prices.reply is not None and len(counted) == len(listed):
        cost = (prompt_tokens * prices.prompt + reply_tokens * prices.reply) / TOKENS_PER_PRICE
    return {
        "replies": len(listed),
        "prompt_tokens": prompt_tokens,
        "reply_tokens": reply_tokens,
        "without_token_count": len(listed) - len(counted),
        "cost": cost,
    }

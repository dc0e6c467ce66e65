"""What goes wrong between us and an endpoint, told apart: what may pass, what stays, and what the user can do."""

from __future__ import annotations

import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from pointalign.evaluation.judging.replies import Reply

PASSING_STATUS = frozenset((408, 409, 425, 429))
SERVER_FAULT = 500
# A request that times out has waited long already.
TIMEOUT_RETRIES = 2
MANY = 1_000_000
SPENT_QUOTA = frozenset(("insufficient_quota", "billing_hard_limit_reached", "Arrearage"))
CONTENT_FILTERS = frozenset(("content_filter", "data_inspection_failed", "DataInspectionFailed"))
REASON_LENGTH = 200
REMEDIES = {
    400: "check the model's name and --judge-extra; a model that takes no max_tokens needs --judge-max-tokens 0",
    401: "set OPENAI_API_KEY to a key of this endpoint, or give --judge-api-key",
    402: "the account is out of credit: settle that, then run the same command again",
    403: "this key may not use the model; use another --judge-model or key",
    404: "check --judge-model, and the address (--judge-base-url), which usually ends in /v1",
    413: "the prompt is too long for this endpoint; use another --judge-model or a shorter --judge-prompt",
    422: "check --judge-extra and --judge-max-tokens against what the endpoint takes",
}
AGAIN = "see whether it works at all, then run the same command again"


@dataclass(frozen=True)
class Fault:
    """A failed request.

    Args:
        what: in words.
        remedy: what the user can do.
        retries: how often it is worth sending it again.
        wait: seconds that the endpoint wants to be left alone; None when it does not say.
        unreached: whether no connection came about.
        reply: what the failure itself says of the answer: a content filter's refusal, which is an unreadable reply.
    """

    what: str
    remedy: str = AGAIN
    retries: int = MANY
    wait: float | None = None
    unreached: bool = False
    reply: Reply | None = None


def judge_fault(error: Exception) -> Fault:
    """Tell what an exception of the openai client, of a time limit or of reading the reply means.

    Raises:
        Exception: the error itself when it is none of these.
    """
    import openai

    if isinstance(error, openai.APIStatusError):
        return _status_fault(error)
    if isinstance(error, (TimeoutError, openai.APITimeoutError)):
        return Fault("no reply in time", f"{AGAIN}, with a longer --judge-timeout if it is slow", TIMEOUT_RETRIES)
    if isinstance(error, openai.APIConnectionError):
        cause = error.__cause__ or error
        if type(cause).__name__ in ("ConnectError", "ConnectTimeout"):
            reason = f"cannot be reached ({_reason(cause)})"
            return Fault(reason, "start it, or correct --judge-base-url", unreached=True)
        return Fault(f"the connection was lost ({_reason(cause)})")
    # Of the client's errors only these are left, for a body that is cut short or is no completion.
    if isinstance(error, (openai.APIError, ValueError)):
        return Fault(f"a reply that cannot be read ({_reason(error)})", f"is it an OpenAI-compatible endpoint? {AGAIN}")
    raise error


def _status_fault(error: Any) -> Fault:
    status, code = error.status_code, error.code
    what = f"{status} {_server_words(error)}".strip()
    if code in CONTENT_FILTERS:
        return Fault(what, reply=Reply("", finish_reason="content_filter"))
    if code in SPENT_QUOTA:
        return Fault(what, REMEDIES[402], retries=0)
    if status in PASSING_STATUS or status >= SERVER_FAULT:
        return Fault(what, wait=_asked_wait(error.response.headers))
    return Fault(what, REMEDIES.get(status, AGAIN), retries=0)


def _server_words(error: Any) -> str:
    """The endpoint's own message in one line, whichever of the usual places it stands in."""
    body = error.body
    if isinstance(body, dict):
        text = body.get("message") or body.get("detail") or body.get("error") or ""
    else:
        text = "" if body is None or "<" in str(body) else body
    return " ".join(str(text).split())[:REASON_LENGTH]


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:REASON_LENGTH] or type(error).__name__


def _asked_wait(headers: Any) -> float | None:
    """Seconds that Retry-After asks for, given as a number or as a date."""
    text = headers.get("retry-after")
    if text is None:
        return None
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None

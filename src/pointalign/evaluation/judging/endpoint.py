"""The `llm` judge: any OpenAI-compatible endpoint, asked patiently; each reply is kept the moment it comes."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pointalign.errors import ConfigError, JudgeError, MissingDependencyError
from pointalign.evaluation.judging.faults import Fault, judge_fault
from pointalign.evaluation.judging.prompted import PromptedJudge
from pointalign.evaluation.judging.prompts import JudgePrompts
from pointalign.evaluation.judging.replies import UNPRICED, Prices, Reply
from pointalign.judge_settings import MAX_TOKENS
from pointalign.progress import say
from pointalign.storage import writable

OPENAI_URL = "https://api.openai.com/v1"
NO_KEY = "none"
FIRST_WAIT = 1.0
LONGEST_BACKOFF = 60.0
# An endpoint that wants to be left alone for longer than this is asked again by the user, not by us.
LONGEST_WAIT = 600.0
SECONDS_BETWEEN_NOTES = 10.0


@dataclass(frozen=True)
class Patience:
    """How long and how often an endpoint is asked.

    Args:
        concurrency: requests under way at once.
        timeout: seconds until a request is given up.
        retries: how often a request is sent again.
    """

    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 6


class EndpointJudge(PromptedJudge):
    """A language model behind an OpenAI-compatible endpoint, at temperature 0.

    Args:
        model: the endpoint's name of it; $OPENAI_MODEL when not given.
        prompts: one per task.
        base_url: the endpoint; $OPENAI_BASE_URL, else OpenAI's, when not given.
        api_key: $OPENAI_API_KEY when not given; endpoints other than OpenAI's may need none.
        max_tokens: longest reply; 0 leaves it to the endpoint.
        extra: added to each request's body.
        patience: how long and how often it is asked.
        prices: of a million tokens.

    Raises:
        ConfigError: when no model is named, or address or key cannot be one.
    """

    kind = "llm"

    def __init__(
        self,
        model: str | None,
        prompts: JudgePrompts,
        base_url: str | None = None,
        api_key: str | None = None,
        max_tokens: int = MAX_TOKENS,
        extra: Mapping[str, Any] | None = None,
        patience: Patience = Patience(),
        prices: Prices = UNPRICED,
    ) -> None:
        model = model or os.environ.get("OPENAI_MODEL")
        if not model:
            raise ConfigError("the llm judge needs a model; give --judge-model, or set OPENAI_MODEL")
        super().__init__(model, prompts, max_tokens, prices)
        self.base_url = (base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL).rstrip("/")
        if not _is_address(self.base_url):
            raise ConfigError(
                f"the judge's address {self.base_url} is not http:// or https:// with a host and perhaps a port; correct it"
            )
        self.api_key = (api_key or os.environ.get("OPENAI_API_KEY") or "").strip()
        if not self.api_key.isascii():
            raise ConfigError("the judge's key holds a character that no key has; copy it again")
        self.extra, self.patience = dict(extra or {}), patience

    @property
    def address(self) -> str:
        """The endpoint as it may be shown: without a user's name and password."""
        parts = urlsplit(self.base_url)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()

    def details(self) -> dict[str, Any]:
        """What a report states of the judge: model, endpoint, prompt, settings of the requests."""
        return {**super().details(), "base_url": self.address, "temperature": 0, **self._options()}

    def _options(self) -> dict[str, Any]:
        limit = {"max_tokens": self.max_tokens} if self.max_tokens else {}
        return {**limit, **({"extra": self.extra} if self.extra else {})}

    def unusual_settings(self) -> dict[str, Any]:
        """The longest reply, and what is sent along."""
        return {**super().unusual_settings(), **({"extra": self.extra} if self.extra else {})}

    def request(self, prompt: str) -> dict[str, Any]:
        """All that the reply to a prompt depends on."""
        return {"base_url": self.address, "model": self.model, "prompt": prompt, "temperature": 0, **self._options()}

    def ask(self, prompts: Sequence[str], known: Mapping[str, Reply], keep: Callable[[str, Reply], None]) -> None:
        """Ask the endpoint for the replies that are not known yet.

        Raises:
            JudgeError: when it cannot be reached, refuses the key, does not know the model, or gives no reply.
            ConfigError: when it is OpenAI's own and no key is given.
            MissingDependencyError: without the openai package.
        """
        if not self.api_key and self.base_url == OPENAI_URL:
            raise ConfigError(
                "the llm judge needs an endpoint; give --judge-base-url, or set OPENAI_API_KEY for OpenAI's own"
            )
        _run(_Session(self, keep).ask_all([prompt for prompt in prompts if prompt not in known]))


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        # Reading the port is what checks it.
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end, also where an event loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    begun: list[tuple[asyncio.AbstractEventLoop, Any]] = []

    async def noted() -> None:
        begun.append((asyncio.get_running_loop(), asyncio.current_task()))
        await work

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(asyncio.run, noted())
        try:
            running.result()
        except BaseException:
            if not running.done():  # Ctrl-C reaches this thread alone
                for loop, task in begun:
                    loop.call_soon_threadsafe(task.cancel)
            raise


class _Session:
    """One round of requests: several at once, all of them held up together when the endpoint asks for it."""

    def __init__(self, judge: EndpointJudge, keep: Callable[[str, Reply], None]) -> None:
        self.judge, self.keep = judge, keep
        self.kept = 0
        self.reached = False
        self.failure: JudgeError | None = None
        self.resume_at = self.noted_at = 0.0

    async def ask_all(self, prompts: Sequence[str]) -> None:
        """Ask everything, or until the first failure; requests that are under way then may still end well."""
        try:
            from openai import AsyncOpenAI
        except ImportError as error:
            raise MissingDependencyError(
                'the llm judge needs the openai package; run `pip install "pointalign[judge]"`'
            ) from error
        judge = self.judge
        client = AsyncOpenAI(
            base_url=judge.base_url, api_key=judge.api_key or NO_KEY, timeout=judge.patience.timeout, max_retries=0
        )
        waiting = iter(prompts)
        async with client:
            # Alone, so that a wrong key or name costs one request.
            await self._work(client, iter([next(waiting)]))
            await asyncio.gather(*(self._work(client, waiting) for _ in range(judge.patience.concurrency)))
        if self.failure is not None:
            raise self.failure

    async def _work(self, client: Any, waiting: Any) -> None:
        while self.failure is None and (prompt := next(waiting, None)) is not None:
            try:
                reply = await self._reply(client, prompt)
            except JudgeError as error:
                self.failure = self.failure or error
                return
            self.keep(prompt, reply)
            self.kept += 1

    async def _reply(self, client: Any, prompt: str) -> Reply:
        """The reply to one prompt, asked again as often as patience allows."""
        attempt, faults = 0, Counter[str]()
        while True:
            await asyncio.sleep(max(0.0, self.resume_at - time.monotonic()))
            try:
                async with asyncio.timeout(self.judge.patience.timeout):
                    completion = await client.chat.completions.create(**self._body(prompt))
                reply = _read_completion(completion)
                self.reached = True
                return reply
            except Exception as error:
                fault = judge_fault(error)
                if fault.reply is not None:
                    return fault.reply
                self.reached = self.reached or not fault.unreached
                attempt += 1
                faults[fault.what] += 1
                await self._wait(fault, attempt, faults[fault.what], error)

    def _body(self, prompt: str) -> dict[str, Any]:
        judge = self.judge
        body = {"model": judge.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
        if judge.max_tokens:
            body["max_tokens"] = judge.max_tokens
        return {**body, "extra_body": judge.extra or None}

    async def _wait(self, fault: Fault, attempt: int, repeated: int, error: Exception) -> None:
        """Sleep until the request may be sent again.

        Args:
            fault: why the last one failed.
            attempt: requests so far.
            repeated: those that failed so.
            error: what the client said.

        Raises:
            JudgeError: when it may not: the fault stays, patience is at its end, or another request has failed.
        """
        retries = 0 if fault.unreached and not self.reached else self.judge.patience.retries
        spent = attempt > retries or repeated > fault.retries
        delay = fault.wait or min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_BACKOFF)
        if spent or delay > LONGEST_WAIT or self.failure is not None:
            raise self._end(fault, repeated, delay) from error
        now = time.monotonic()
        if now - self.noted_at > SECONDS_BETWEEN_NOTES:
            self.noted_at = now
            count, most = (repeated, fault.retries) if fault.retries < retries else (attempt, retries)
            say(f"judge {self.judge.address}: {fault.what}; sent again in {delay:.0f} s ({count} of {most})")
        if fault.wait is not None:
            self.resume_at = max(self.resume_at, now + delay)
        await asyncio.sleep(delay)

    def _end(self, fault: Fault, repeated: int, delay: float) -> JudgeError:
        times = f", {repeated} times" if repeated > 1 else ""
        remedy = fault.remedy
        if delay > LONGEST_WAIT:
            remedy = f"it wants {delay:.0f} s of rest, so run the same command again later"
        kept = f" ({self.kept} new replies are kept)" if self.kept else ""
        return JudgeError(f"judge {self.judge.model} at {self.judge.address}: {fault.what}{times}; {remedy}{kept}")


def _read_completion(completion: Any) -> Reply:
    """The text and counts of a completion.

    Raises:
        ValueError: when it is none.
    """
    choices = getattr(completion, "choices", None)
    if not isinstance(choices, list) or not choices or getattr(choices[0], "message", None) is None:
        raise ValueError("a reply without a message")
    text = getattr(choices[0].message, "content", None) or ""
    if not isinstance(text, str):
        raise ValueError("a reply that is not text")
    counts = (getattr(completion.usage, name, None) for name in ("prompt_tokens", "completion_tokens"))
    prompt_tokens, reply_tokens = (count if isinstance(count, int) else None for count in counts)
    return Reply(
        writable(text),
        prompt_tokens,
        reply_tokens,
        choices[0].finish_reason,
        completion.model,
    )

"""The llm judge against a real HTTP server that fails in every way: nothing lost, nothing asked twice, a clear end."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from pointalign.cli import main
from pointalign.errors import ConfigError, JudgeError, MissingDependencyError
from pointalign.evaluation.judging import build_judge, endpoint, judge_answers, load_task
from pointalign.evaluation.judging.endpoint import _run
from pointalign.evaluation.records import Task

pytest.importorskip("openai", reason="the openai package is not installed: pip install 'pointalign[judge]'")

OPEN = Task("open-vocabulary")
ENDINGS: dict[str, tuple[str, str]] = {
    "wrong key": ("401 - bad key", "401 bad key; set OPENAI_API_KEY to a key of this endpoint"),
    "forbidden": ("403 - no", "403 no; this key may not use the model"),
    "unknown model": ("404 - no model x", "404 no model x; check --judge-model, and the address"),
    "bad request": ("400 - no such field", "400 no such field; check the model's name and --judge-extra"),
    "unknown field": ("422 - what", "422 what; check --judge-extra and --judge-max-tokens"),
    "no credit": ("402 - pay", "402 pay; the account is out of credit"),
    "spent quota": ("429 - code:insufficient_quota all used", "429 all used; the account is out of credit"),
    "long rest": (
        "429 retry-after=3600 later",
        "429 later; it wants 3600 s of rest, so run the same command again later",
    ),
}


def judge_for(server: Any, **options: Any) -> Any:
    return build_judge("llm", **{"judge_model": "judge", "judge_base_url": server.url, **options})


def replies_kept(cache: Path) -> int:
    return len(list((cache / "judge_replies").rglob("*.json")))


def test_every_answer_is_judged_and_each_prompt_asked_once(
    server: Any, captions_file: Path, tmp_path: Path, own_cache: Path
) -> None:
    server.reply = lambda prompt: "F#no" if "number 4" in prompt else "T#yes"
    judge = judge_for(server, judge_price_in=2.0, judge_price_out=10.0)
    summary = judge_answers(captions_file, OPEN, judge, tmp_path / "out.json")
    assert summary["accuracy"] == pytest.approx(10 / 12)
    assert (summary["n"], summary["invalid"]) == (12, 0)
    assert len(server.prompts) == 10 == summary["usage"]["replies"] == replies_kept(own_cache)
    tokens = sum(len(prompt.split()) for prompt in server.prompts)
    assert summary["usage"] == {
        "replies": 10,
        "prompt_tokens": tokens,
        "reply_tokens": 30,
        "without_token_count": 0,
        "cost": pytest.approx((2 * tokens + 10 * 30) / 1e6),
    }
    assert summary["asked"] == summary["usage"]
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0, 128)
    written = json.loads((tmp_path / "out.json").read_text())
    assert [row["correct"] for row in written["verdicts"]].count(False) == 2
    assert written["verdicts"][0]["reply"] == "T#yes"


def test_a_second_run_costs_nothing_and_gives_the_same_file(server: Any, captions_file: Path, tmp_path: Path) -> None:
    first = judge_answers(captions_file, OPEN, judge_for(server), tmp_path / "first.json")
    second = judge_answers(captions_file, OPEN, judge_for(server), tmp_path / "second.json")
    assert len(server.prompts) == 10
    assert (first["asked"]["replies"], second["asked"]["replies"]) == (10, 0)
    assert (tmp_path / "first.json").read_bytes() == (tmp_path / "second.json").read_bytes()


@pytest.mark.parametrize(
    "change",
    [{"judge_model": "other"}, {"judge_max_tokens": 9}, {"judge_extra": '{"seed": 1}'}, {"judge_prompt": "prompt"}],
    ids=lambda change: next(iter(change)),
)
def test_whatever_a_reply_depends_on_is_asked_anew(
    change: dict[str, Any], server: Any, captions_file: Path, tmp_path: Path
) -> None:
    judge_answers(captions_file, OPEN, judge_for(server), tmp_path / "a.json")
    if "judge_prompt" in change:
        (tmp_path / "prompt").write_text("{answer} and {reference}: the same?\n")
        change = {"judge_prompt": str(tmp_path / "prompt")}
    judge_answers(captions_file, OPEN, judge_for(server, **change), tmp_path / "b.json")
    assert len(server.prompts) == 20


FAULTS = ["500", "503 - busy", "429 retry-after=0.02 slow", "cut JSON", "short body", "drop", "no choices", "hang"]
FAULTS += ["no message", "no JSON object", "HTML"]


def test_nothing_is_lost_or_judged_twice_whatever_fails(
    server: Any, captions_file: Path, tmp_path: Path, own_cache: Path
) -> None:
    """Each prompt fails in two ways before it is answered."""
    numbers: dict[str, int] = {}

    def plan(prompt: str, attempt: int) -> str:
        number = numbers.setdefault(prompt, len(numbers))
        return "ok" if attempt > 2 else FAULTS[(2 * number + attempt) % len(FAULTS)]

    server.plan = plan
    summary = judge_answers(captions_file, OPEN, judge_for(server, judge_timeout=0.4), tmp_path / "out.json")
    assert (summary["n"], summary["invalid"]) == (12, 0)
    assert set(server.answered.values()) == {1}
    assert len(server.answered) == 10 == replies_kept(own_cache)
    assert len(server.prompts) == 30


def test_only_replies_that_come_too_late_count_as_such(server: Any, captions_file: Path, tmp_path: Path) -> None:
    """Of three failures in a row one is a time-out, and two of those may be."""
    server.plan = lambda prompt, attempt: (
        "ok" if attempt > 3 or "number 5" not in prompt else ("hang" if attempt == 3 else "429 retry-after=0.02 slow")
    )
    summary = judge_answers(captions_file, OPEN, judge_for(server, judge_timeout=3), tmp_path / "out.json")
    assert summary["n"] == 12
    assert len(server.prompts) == 13


def test_notes_count_what_they_bound(
    server: Any,
    captions_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(endpoint, "SECONDS_BETWEEN_NOTES", -1.0)
    faults = ["429 retry-after=0.02 slow"] * 4 + ["hang"]
    server.plan = lambda prompt, attempt: "ok" if "number 5" not in prompt else [*faults, "ok"][min(attempt, 6) - 1]
    judge_answers(captions_file, OPEN, judge_for(server, judge_timeout=3), tmp_path / "out.json")
    notes = [line.rpartition(" s ")[2] for line in capsys.readouterr().err.splitlines() if "sent again in" in line]
    assert notes == ["(1 of 6)", "(2 of 6)", "(3 of 6)", "(4 of 6)", "(1 of 2)"]


def test_other_settings_are_another_judge(server: Any) -> None:
    usual = judge_for(server).name
    assert ", settings " not in usual
    assert judge_for(server, judge_max_tokens=128).name == usual
    others = [{"judge_max_tokens": 9}, {"judge_extra": '{"seed": 1}'}, {"judge_extra": '{"seed": 2}'}]
    names = {judge_for(server, **other).name for other in others}
    assert len(names) == 3
    assert all(name.startswith(f"{usual}, settings ") for name in names)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_passes_when_it_passes(fault: str, server: Any, captions_file: Path, tmp_path: Path) -> None:
    server.plan = lambda prompt, attempt: "ok" if attempt > 1 or "number 5" not in prompt else fault
    summary = judge_answers(captions_file, OPEN, judge_for(server, judge_timeout=0.4), tmp_path / "out.json")
    assert summary["n"] == 12
    assert len(server.prompts) == 11


@pytest.mark.parametrize("case", ENDINGS)
def test_what_stays_wrong_ends_at_once(
    case: str, server: Any, captions_file: Path, tmp_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    action, message = ENDINGS[case]
    server.plan = lambda prompt, attempt: action
    command = ["judge", str(captions_file), "--task", "open-vocabulary", "--judge", "llm", "--judge-model", "x"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--judge-base-url", server.url, "--out", str(tmp_path / "out.json")])
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err.strip().splitlines()[-1]
    assert "Traceback" not in err
    assert len(server.prompts) == 1
    assert replies_kept(own_cache) == 0
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("action", ["401 - expired", "500", "hang"])
def test_an_endpoint_that_dies_in_the_middle_loses_nothing(
    action: str, server: Any, captions_file: Path, tmp_path: Path, own_cache: Path
) -> None:
    server.plan = lambda prompt, attempt: "ok" if sum(server.answered.values()) < 4 else action
    judge = judge_for(server, judge_timeout=0.2, judge_retries=1, judge_concurrency=1)
    with pytest.raises(JudgeError, match=r"\(4 new replies are kept\)"):
        judge_answers(captions_file, OPEN, judge, tmp_path / "out.json")
    assert replies_kept(own_cache) == 4
    server.plan = lambda prompt, attempt: "ok"
    summary = judge_answers(captions_file, OPEN, judge_for(server), tmp_path / "out.json")
    assert (summary["n"], summary["asked"]["replies"]) == (12, 6)
    assert set(server.answered.values()) == {1}


def test_requests_under_way_may_end_well_after_another_has_failed(
    server: Any, captions_file: Path, own_cache: Path
) -> None:
    server.delay = lambda prompt: 0.0 if "number 1." in prompt else 0.5
    server.plan = lambda prompt, attempt: "401 - expired" if "number 1." in prompt else "ok"
    with pytest.raises(JudgeError, match="expired"):
        judge_answers(captions_file, OPEN, judge_for(server, judge_concurrency=4), own_cache / "out.json")
    assert replies_kept(own_cache) == sum(server.answered.values()) == 4
    assert len(server.prompts) == 5


@pytest.mark.parametrize(
    ("action", "what"), [("hang", "no reply in time"), ("drip", "no reply in time"), ("500", "500")]
)
def test_patience_has_an_end(action: str, what: str, server: Any, captions_file: Path, tmp_path: Path) -> None:
    server.plan = lambda prompt, attempt: action
    start = time.monotonic()
    with pytest.raises(JudgeError, match=f"{what}, 3 times; ") as caught:
        judge_answers(captions_file, OPEN, judge_for(server, judge_timeout=0.2, judge_retries=2), tmp_path / "out.json")
    assert "\n" not in str(caught.value)
    assert len(server.prompts) == 3
    assert time.monotonic() - start < 5


def test_an_endpoint_that_is_not_there(captions_file: Path, tmp_path: Path, server: Any) -> None:
    server.close()
    start = time.monotonic()
    with pytest.raises(JudgeError, match=r"cannot be reached \(.*\); start it, or correct --judge-base-url"):
        judge_answers(captions_file, OPEN, judge_for(server), tmp_path / "out.json")
    assert time.monotonic() - start < 5


def test_retry_after_holds_up_all_requests(server: Any, captions_file: Path, tmp_path: Path) -> None:
    """The first request goes alone; of the next three one is told to wait, and nothing starts until it may go on."""
    server.plan = lambda prompt, attempt: "429 retry-after=1 slow" if "number 1." in prompt and attempt == 1 else "ok"
    server.delay = lambda prompt: 0.0 if "number 1." in prompt else 0.2
    judge_answers(captions_file, OPEN, judge_for(server, judge_concurrency=3), tmp_path / "out.json")
    told, *later = sorted(server.times)[1], *sorted(server.times)[4:]
    assert len(later) == 7
    assert min(later) - told > 0.9


def test_no_more_requests_at_once_than_allowed(server: Any, captions_file: Path, tmp_path: Path) -> None:
    server.delay = lambda prompt: 0.05
    judge_answers(captions_file, OPEN, judge_for(server, judge_concurrency=3), tmp_path / "out.json")
    assert server.most_at_once == 3


def test_a_content_filter_is_a_reply_that_cannot_be_read(server: Any, captions_file: Path, tmp_path: Path) -> None:
    server.plan = lambda prompt, attempt: "400 - code:data_inspection_failed no" if "number 4" in prompt else "ok"
    for _ in range(2):
        summary = judge_answers(captions_file, OPEN, judge_for(server), tmp_path / "out.json")
        assert (summary["n"], summary["invalid"]) == (11, 1)
    assert len(server.prompts) == 10


def test_a_reply_file_that_broke_is_asked_for_again(
    server: Any, captions_file: Path, tmp_path: Path, own_cache: Path
) -> None:
    judge_answers(captions_file, OPEN, judge_for(server), tmp_path / "out.json")
    broken = sorted((own_cache / "judge_replies").rglob("*.json"))[:2]
    for path in broken:
        path.write_text("")
    summary = judge_answers(captions_file, OPEN, judge_for(server), tmp_path / "out.json")
    assert summary["asked"]["replies"] == 2


def test_the_key_comes_from_the_environment_and_is_written_nowhere(
    server: Any, captions_file: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    monkeypatch.setenv("OPENAI_BASE_URL", server.url.replace("//", "//user:hidden@"))
    monkeypatch.setenv("OPENAI_MODEL", "from-environment")
    judge = build_judge("llm")
    summary = judge_answers(captions_file, OPEN, judge, tmp_path / "out.json")
    assert server.bodies[0]["model"] == "from-environment"
    assert summary["judge"].startswith("llm from-environment, prompt ")
    assert summary["judge_details"]["base_url"] == server.url
    written = "".join(path.read_text() for path in tmp_path.rglob("*.json")) + json.dumps(summary)
    assert "sk-secret" not in written
    assert "hidden" not in written
    monkeypatch.delenv("OPENAI_BASE_URL")
    judge_answers(captions_file, OPEN, judge_for(server, judge_model="y"), tmp_path / "out.json")
    assert server.headers["authorization"] == "Bearer sk-secret"


def test_a_running_event_loop_is_no_hindrance(server: Any, captions_file: Path, tmp_path: Path) -> None:
    async def in_a_notebook() -> dict[str, Any]:
        return judge_answers(captions_file, OPEN, judge_for(server), tmp_path / "out.json")

    assert asyncio.run(in_a_notebook())["n"] == 12


def test_no_tokens_told_is_no_cost_told(
    server: Any, captions_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = server.completion
    monkeypatch.setattr(
        server, "completion", lambda prompt: json.dumps({**json.loads(whole(prompt)), "usage": None}).encode()
    )
    judge = judge_for(server, judge_price_in=1.0, judge_price_out=1.0)
    usage = judge_answers(captions_file, OPEN, judge, tmp_path / "out.json")["usage"]
    assert (usage["replies"], usage["without_token_count"], usage["cost"]) == (10, 10, None)


def test_half_a_character_is_sent_as_a_question_mark(server: Any, tmp_path: Path) -> None:
    entry = '{"object_id": "a", "ground_truth": "A chair.", "model_output": "chair \\ud83d"}'
    (tmp_path / "a.json").write_text(f'{{"prompt": "?", "results": [{entry}]}}')
    assert judge_answers(tmp_path / "a.json", OPEN, judge_for(server), tmp_path / "out.json")["n"] == 1
    assert "chair ?" in server.prompts[0]


def test_half_a_character_in_a_reply_is_kept_as_a_question_mark(
    server: Any, captions_file: Path, tmp_path: Path
) -> None:
    server.reply = lambda prompt: "T#\ud83d"
    judge_answers(captions_file, OPEN, judge_for(server), tmp_path / "out.json")
    written = (tmp_path / "out.json").read_text(encoding="utf-8")
    assert "T#?" in written
    assert "ud83d" not in written


def test_ctrl_c_in_a_notebook_ends_the_requests() -> None:
    """There an event loop runs already, and the requests' own in another thread, which a signal does not reach."""
    ended = []

    async def requests() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(time.monotonic())

    async def cell() -> None:
        _run(requests())

    start, notebook = time.monotonic(), asyncio.new_event_loop()
    alarm = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            notebook.run_until_complete(cell())
    finally:
        signal.signal(signal.SIGALRM, alarm)
        notebook.close()
    assert ended
    assert ended[0] - start < 20


@pytest.mark.parametrize("content", [["T"], 7, {"text": "T"}])
def test_a_reply_that_is_not_text_is_asked_for_again_and_never_kept(
    content: Any, server: Any, captions_file: Path, tmp_path: Path, own_cache: Path
) -> None:
    server.reply = lambda prompt: content
    with pytest.raises(JudgeError, match="a reply that is not text"):
        judge_answers(captions_file, OPEN, judge_for(server, judge_retries=1), tmp_path / "out.json")
    assert len(server.prompts) == 2
    assert replies_kept(own_cache) == 0


def test_settings_that_cannot_be(monkeypatch: pytest.MonkeyPatch, captions_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs a model; give --judge-model, or set OPENAI_MODEL"):
        build_judge("llm")
    for address in ("localhost:8000/v1", "http://", "http://[bad/v1", "http://host:port/v1"):
        with pytest.raises(ConfigError, match="is not http:// or https:// with a host and perhaps a port; correct it"):
            build_judge("llm", judge_model="x", judge_base_url=address)
    with pytest.raises(ConfigError, match="needs an endpoint; give --judge-base-url, or set OPENAI_API_KEY"):
        judge_answers(captions_file, OPEN, build_judge("llm", judge_model="x"), tmp_path / "out.json")
    with pytest.raises(ConfigError, match="holds a character that no key has; copy it again"):
        build_judge("llm", judge_model="x", judge_api_key="sk-\u2026")
    with pytest.raises(ConfigError, match="--judge-concurrency 0 cannot be; give 1 or more"):
        build_judge("llm", judge_model="x", judge_concurrency=0)
    with pytest.raises(ConfigError, match="--judge-timeout 0"):
        build_judge("llm", judge_model="x", judge_timeout=0)
    with pytest.raises(ConfigError, match="--judge-extra is not JSON"):
        build_judge("llm", judge_model="x", judge_extra="{")
    with pytest.raises(ConfigError, match="--judge-extra is not a JSON object"):
        build_judge("llm", judge_model="x", judge_extra="[]")
    with pytest.raises(ConfigError, match="did you mean 'judge_model'"):
        build_judge("llm", judge_modle="x")
    with pytest.raises(ConfigError, match="there is no judge 'likely'; choose match, embedding, llm, hf"):
        build_judge("likely")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "openai", None)
    judge = build_judge("llm", judge_model="x", judge_base_url="http://127.0.0.1:1/v1")
    with pytest.raises(MissingDependencyError, match=r'pip install "pointalign\[judge\]"'):
        judge_answers(captions_file, OPEN, judge, tmp_path / "out.json")


def test_extra_goes_into_the_request_and_no_limit_is_sent_where_none_is_wanted(
    server: Any, captions_file: Path, tmp_path: Path
) -> None:
    judge = judge_for(server, judge_extra='{"max_completion_tokens": 7}', judge_max_tokens=0)
    judge_answers(captions_file, OPEN, judge, tmp_path / "out.json")
    assert server.bodies[0]["max_completion_tokens"] == 7
    assert "max_tokens" not in server.bodies[0]


def test_retry_after_may_be_a_date_and_a_wait_is_told(
    server: Any, captions_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    when = formatdate(time.time() + 3, usegmt=True).replace(" ", "_")
    server.plan = lambda prompt, attempt: f"429 retry-after={when} slow" if len(server.prompts) == 1 else "ok"
    judge_answers(captions_file, OPEN, judge_for(server), tmp_path / "out.json")
    assert server.times[1] - server.times[0] > 1
    assert "429 slow; sent again in" in capsys.readouterr().err


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_a_stopped_command_goes_on_where_it_was(
    stop: signal.Signals, server: Any, captions_file: Path, tmp_path: Path
) -> None:
    server.reply = lambda prompt: f"{len(prompt) % 100}#so much"
    task = load_task("captioning")
    unbroken = judge_answers(captions_file, task, judge_for(server), tmp_path / "unbroken.json")
    asked_unbroken = len(server.prompts)
    server.answered.clear()
    environment = {**os.environ, "POINTALIGN_CACHE": str(tmp_path / "other-cache")}
    options = ["--task", "captioning", "--judge", "llm", "--judge-model", "judge", "--judge-base-url", server.url]
    command = [sys.executable, "-m", "pointalign", "judge", str(captions_file), *options, "--judge-concurrency", "2"]
    command += ["--out", str(tmp_path / "broken.json")]
    requests = itertools.count()  # two come at a time, so what is answered already does not tell
    server.plan = lambda prompt, attempt: "hang" if next(requests) >= 5 else "ok"
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    kept = tmp_path / "other-cache" / "judge_replies"
    deadline = time.monotonic() + 60
    while len(list(kept.rglob("*.json"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(stop)
    _, err = running.communicate(timeout=30)
    assert running.returncode == (130 if stop == signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in err
    assert not (tmp_path / "broken.json").exists()
    assert len(list(kept.rglob("[!.]*.json"))) == 5
    server.plan = lambda prompt, attempt: "ok"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    assert summary["asked"]["replies"] == asked_unbroken - 5
    assert summary["score"] == unbroken["score"]
    assert set(server.answered.values()) == {1}
    assert (tmp_path / "broken.json").read_bytes() == (tmp_path / "unbroken.json").read_bytes()

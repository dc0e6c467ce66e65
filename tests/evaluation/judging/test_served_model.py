"""The llm judge against `transformers serve` on loopback: the embedded SmolLM2 really answers, as the hf judge has it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pointalign.cli import main
from pointalign.evaluation.judging import build_judge, judge_answers, load_task, local
from pointalign.models.language_model import resolve_language_model

for package in ("openai", "fastapi", "uvicorn"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 'pointalign[judge,dev]'")

SECONDS_TO_START = 120
REPLY_TOKENS = 8


@pytest.fixture(scope="module")
def model(smollm2_cache: Path) -> str:
    """The folder of the converted model, by which the server knows it."""
    return resolve_language_model("smollm2-135m")


@pytest.fixture(scope="module")
def served(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server of the model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", model, "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    log = tmp_path_factory.mktemp("serve") / "log"
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the server answers."""
    deadline = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"the server did not start:\n{log.read_text()[-2000:]}")


@pytest.fixture
def few_captions(write_answers: Callable[..., Path]) -> Path:
    """Two captions to judge."""
    pairs = [("A red chair.", "a chair"), ("A tall lamp.", "a blue car")]
    entries = [
        {"object_id": str(n), "ground_truth": reference, "model_output": said}
        for n, (reference, said) in enumerate(pairs)
    ]
    return write_answers("few.json", entries)


def test_a_served_model_judges_as_the_same_model_does_here(
    served: str, model: str, few_captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy and in float32 on both sides, the replies are the same to the letter; one prompt at a time, unpadded."""
    monkeypatch.setattr(local, "native_bf16", lambda: False)
    task = load_task("captioning")
    options = {"judge_model": model, "judge_max_tokens": REPLY_TOKENS}
    remote = build_judge("llm", judge_base_url=served, judge_concurrency=2, **options)
    far = judge_answers(few_captions, task, remote, tmp_path / "far.json")
    near = judge_answers(few_captions, task, build_judge("hf", judge_batch_size=1, **options), tmp_path / "near.json")
    assert replies(tmp_path / "far.json") == replies(tmp_path / "near.json")
    assert all(replies(tmp_path / "far.json"))
    assert far["usage"]["prompt_tokens"] == near["usage"]["prompt_tokens"]
    assert far["invalid"] + far["n"] == 2
    again = judge_answers(few_captions, task, remote, tmp_path / "again.json")
    assert again["asked"]["replies"] == 0
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "far.json").read_bytes()


def replies(path: Path) -> list[str]:
    return [row["reply"] for row in json.loads(path.read_text())["verdicts"]]


def test_an_own_prompt_is_followed_but_read_strictly(
    served: str, model: str, peer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The small model writes the line it is told to, in quotation marks: not the form of a reply, and counted as such."""
    prompt = tmp_path / "own.txt"
    prompt.write_text('Repeat this line and nothing else: "8#chair#x" ({answer})')
    arguments = ["judge", str(peer_file), "--task", "closed-set", "--judge", "llm", "--judge-model", model]
    arguments += ["--judge-base-url", served, "--judge-prompt", str(prompt), "--judge-max-tokens", str(REPLY_TOKENS)]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--out", str(tmp_path / "out.json")])
    out, err = capsys.readouterr()
    assert ended.value.code == 0, err
    summary: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    assert sum(reply.startswith('"8#chair') for reply in replies(tmp_path / "out.json")) >= 3
    assert (summary["n"], summary["invalid"], summary["unreadable"]) == (5, 5, 5)
    assert summary["accuracy_without_random"] == 0
    assert "5 without a class (a random one counts; 0.0 % without it)" in err


def test_a_model_that_the_server_does_not_have(
    served: str, peer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--task", "closed-set", "--judge", "llm", "--judge-model", "nonsense", "--judge-base-url", served]
    with pytest.raises(SystemExit) as ended:
        main(["judge", str(peer_file), *arguments])
    assert ended.value.code == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "requested 'nonsense'" in last
    assert "check the model's name" in last

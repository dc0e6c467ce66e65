"""The hf judge: a tiny random model's replies against plain generation, kept and gone on with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pointalign.errors import CheckpointError, ConfigError
from pointalign.evaluation.judging import build_judge, judge_answers, load_task, local
from pointalign.evaluation.judging.prompts import admissible_replies
from pointalign.evaluation.records import Task, TaskKind

CAPTIONING = Task("captioning")


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies must not depend on the machine that tests."""
    monkeypatch.setattr(local, "native_bf16", lambda: False)


@pytest.fixture
def folder(tmp_path: Path, build_tokenizer: Callable[..., Any]) -> Path:
    """A language model of one token per byte."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4096,
        pad_token_id=256,
        bos_token_id=257,
        eos_token_id=258,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def judge_for(folder: Path, **options: Any) -> Any:
    return build_judge("hf", judge_model=str(folder), judge_max_tokens=12, **options)


def replies(path: Path) -> list[str]:
    return [row["reply"] for row in json.loads(path.read_text())["verdicts"]]


def test_replies_are_those_of_plain_greedy_generation(folder: Path, captions_file: Path, tmp_path: Path) -> None:
    judge = judge_for(folder, judge_batch_size=3)
    summary = judge_answers(captions_file, CAPTIONING, judge, tmp_path / "out.json")
    model, tokenizer = judge._load()
    prompts, _ = judge.prepare(CAPTIONING, judge_file_answers(captions_file))
    plain = []
    for prompt in filter(None, prompts):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        said = model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
        plain.append(tokenizer.decode(said, skip_special_tokens=True).strip())
    assert replies(tmp_path / "out.json") == [*plain, None]
    assert summary["judge"].startswith("hf model, prompt ")
    assert summary["judge_details"]["precision"] == "float32"
    assert summary["usage"]["prompt_tokens"] > 1000
    assert 10 <= summary["usage"]["reply_tokens"] <= 120


def judge_file_answers(path: Path) -> Any:
    from pointalign.evaluation.records import read_answers

    return read_answers(path).results


@pytest.mark.parametrize("kind", ["closed-set", "open-vocabulary", "captioning"])
def test_a_constrained_judge_gives_only_replies_that_can_be_read(
    kind: TaskKind, folder: Path, captions_file: Path, peer_file: Path, tmp_path: Path
) -> None:
    task = load_task("closed-set", "modelnet40") if kind == "closed-set" else Task(kind)
    answers = peer_file if kind == "closed-set" else captions_file
    free = judge_answers(answers, task, judge_for(folder), tmp_path / "free.json")
    judge = judge_for(folder, judge_constrained=True)
    constrained = judge_answers(answers, task, judge, tmp_path / "constrained.json")
    assert free["invalid"] > 0
    assert constrained["invalid"] == 0
    assert constrained["judge"] == free["judge"] + ", constrained"
    given = {reply for reply in replies(tmp_path / "constrained.json") if reply is not None}
    assert given <= set(admissible_replies(task))


def test_of_the_admissible_replies_the_model_chooses_token_by_token(folder: Path) -> None:
    judge = judge_for(folder, judge_constrained=True)
    judge.prepare(Task("open-vocabulary"), [])
    model, tokenizer = judge._load()
    logits = model(torch.tensor([tokenizer(local._as_turn(tokenizer, "Same?"), add_special_tokens=False)["input_ids"]]))
    t, f = (int(tokenizer(letter, add_special_tokens=False)["input_ids"][0]) for letter in "TF")
    better = "T" if logits.logits[0, -1, t] > logits.logits[0, -1, f] else "F"
    assert [reply.text for reply in judge._generate(["Same?"])] == [better]


def test_a_run_that_is_killed_goes_on_with_the_same_batches(
    folder: Path, captions_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge_answers(captions_file, CAPTIONING, judge_for(folder, judge_batch_size=4), tmp_path / "unbroken.json")
    monkeypatch.setenv("POINTALIGN_CACHE", str(tmp_path / "other"))
    generate, batches = local.LocalJudge._generate, []

    def killed_in_the_second_batch(judge: Any, prompts: Any) -> Any:
        batches.append(list(prompts))
        if len(batches) == 2:
            raise KeyboardInterrupt
        return generate(judge, prompts)

    monkeypatch.setattr(local.LocalJudge, "_generate", killed_in_the_second_batch)
    with pytest.raises(KeyboardInterrupt):
        judge_answers(captions_file, CAPTIONING, judge_for(folder, judge_batch_size=4), tmp_path / "broken.json")
    kept = sorted((tmp_path / "other" / "judge_replies").rglob("*.json"))
    assert len(kept) == 4
    kept[0].unlink()  # killed between two files of one batch
    first_batch = batches[0]
    batches[:] = [["a batch that went well"], ["so nothing is broken now"]]
    judge_answers(captions_file, CAPTIONING, judge_for(folder, judge_batch_size=4), tmp_path / "broken.json")
    assert batches[2] == first_batch
    assert [len(batch) for batch in batches[2:]] == [4, 4, 2]
    assert (tmp_path / "broken.json").read_bytes() == (tmp_path / "unbroken.json").read_bytes()
    summary = judge_answers(captions_file, CAPTIONING, judge_for(folder, judge_batch_size=4), tmp_path / "again.json")
    assert summary["asked"]["replies"] == 0
    assert len(batches) == 5


def test_other_weights_are_another_judge(folder: Path, captions_file: Path, tmp_path: Path) -> None:
    first = judge_answers(captions_file, CAPTIONING, judge_for(folder), tmp_path / "a.json")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    second = judge_answers(captions_file, CAPTIONING, judge_for(folder), tmp_path / "b.json")
    assert first["judge_details"]["weights"] != second["judge_details"]["weights"]
    assert first["judge"] != second["judge"]
    assert second["asked"]["replies"] == 10


def test_a_copy_of_the_weights_is_the_same_judge(
    folder: Path, captions_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = judge_answers(captions_file, CAPTIONING, judge_for(folder), tmp_path / "a.json")
    copied = tmp_path / "elsewhere" / folder.name
    copied.mkdir(parents=True)
    for path in folder.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    second = judge_answers(captions_file, CAPTIONING, judge_for(copied), tmp_path / "b.json")
    assert second["judge_details"]["weights"] == first["judge_details"]["weights"]
    assert second["judge"] == first["judge"]
    monkeypatch.chdir(folder.parent)
    assert judge_for(Path(folder.name)).name == first["judge"]


def test_a_model_without_a_chat_template_continues_the_prompt(
    folder: Path, build_tokenizer: Callable[..., Any], captions_file: Path, tmp_path: Path
) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    build_tokenizer(chat_template=None).save_pretrained(folder)
    summary = judge_answers(captions_file, CAPTIONING, judge_for(folder), tmp_path / "out.json")
    assert summary["usage"]["replies"] == 10


def test_a_prompt_that_is_too_long_and_a_model_that_is_missing(
    folder: Path, captions_file: Path, tmp_path: Path
) -> None:
    judge = build_judge("hf", judge_model=str(folder), judge_max_tokens=4000)
    with pytest.raises(ConfigError, match="do not fit into the 4096 of"):
        judge_answers(captions_file, CAPTIONING, judge, tmp_path / "out.json")
    with pytest.raises(CheckpointError, match="cannot load language model"):
        judge_answers(captions_file, CAPTIONING, judge_for(tmp_path / "nothing"), tmp_path / "out.json")
    with pytest.raises(ConfigError, match="needs a longest reply; give --judge-max-tokens 1 or more"):
        build_judge("hf", judge_model=str(folder), judge_max_tokens=0)

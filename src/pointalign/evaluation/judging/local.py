"""The `hf` judge: a language model of transformers on this machine, greedy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pointalign.answering.loading import quiet_transformers
from pointalign.device import native_bf16
from pointalign.errors import ConfigError
from pointalign.evaluation.judging.prompted import PromptedJudge
from pointalign.evaluation.judging.prompts import JudgePrompts, admissible_replies
from pointalign.evaluation.judging.replies import Reply
from pointalign.evaluation.provenance import folder_fingerprint
from pointalign.evaluation.records import Answer, Task
from pointalign.judge_settings import MAX_TOKENS
from pointalign.models.language_model import load_language_model, load_tokenizer, resolve_language_model


class LocalJudge(PromptedJudge):
    """A causal language model with or without a chat template; it is loaded when there is something to ask.

    It computes in bfloat16 where that is native, spread over the accelerators where there are any.

    Args:
        model: a short name, a Hub id or a folder, as `load_language_model` takes it.
        prompts: one per task.
        max_tokens: longest reply.
        batch_size: prompts at a time.
        constrained: generate only replies that can be read, see `admissible_replies`. Whether they mean anything is another
            question: hold them against `match`.

    Raises:
        ConfigError: when no model is named.
    """

    kind = "hf"

    def __init__(
        self,
        model: str | None,
        prompts: JudgePrompts,
        max_tokens: int = MAX_TOKENS,
        batch_size: int = 8,
        constrained: bool = False,
    ) -> None:
        if not model:
            raise ConfigError("the hf judge needs a model; give --judge-model NAME, a Hub id or a folder")
        if max_tokens < 1:
            raise ConfigError("the hf judge needs a longest reply; give --judge-max-tokens 1 or more")
        super().__init__(model, prompts, max_tokens)
        self.batch_size = batch_size
        self.precision = "bfloat16" if native_bf16() else "float32"
        self.source = resolve_language_model(model)
        self.weights = folder_fingerprint(Path(self.source)) if Path(self.source).is_dir() else None
        self.constrained = constrained
        self.choices: tuple[str, ...] = ()
        self._loaded: tuple[Any, Any] | None = None

    @property
    def name(self) -> str:
        """As of every prompted judge; constrained replies do not compare with free ones."""
        return super().name + (", constrained" if self.constrained else "")

    def details(self) -> dict[str, Any]:
        """What a report states of the judge: model, weights, precision, prompt."""
        return {**super().details(), **self._settings()}

    def unusual_settings(self) -> dict[str, Any]:
        """The longest reply, and the weights of a folder, of which the name tells the last part alone."""
        return {**super().unusual_settings(), **({"weights": self.weights} if Path(self.model).is_dir() else {})}

    @property
    def told_model(self) -> str:
        """The model's name; of a folder the last part of its path."""
        return Path(self.model).resolve().name if Path(self.model).is_dir() else self.model

    def request(self, prompt: str) -> dict[str, Any]:
        """All that the reply to a prompt depends on, but for rounding, which depends on the batch and the machine."""
        choices = {"choices": self.choices} if self.choices else {}
        return {"model": self.model, "prompt": prompt, **self._settings(), **choices}

    def _settings(self) -> dict[str, Any]:
        return {"weights": self.weights, "precision": self.precision, "max_tokens": self.max_tokens}

    def prepare(self, task: Task, answers: Sequence[Answer]) -> tuple[list[str | None], dict[str, Reply]]:
        """The prompt about each answer, and the replies there are, to which the admissible replies of the task belong."""
        self.choices = admissible_replies(task) if self.constrained else ()
        return super().prepare(task, answers)

    def ask(self, prompts: Sequence[str], known: Mapping[str, Reply], keep: Callable[[str, Reply], None]) -> None:
        """Generate the replies that are not known yet.

        A batch is generated whole if any of it is missing, so that a stopped run goes on with the same batches.

        Raises:
            CheckpointError: when the model cannot be loaded.
            ConfigError: when a prompt is too long for it.
        """
        for start in range(0, len(prompts), self.batch_size):
            batch = prompts[start : start + self.batch_size]
            if all(prompt in known for prompt in batch):
                continue
            for prompt, reply in zip(batch, self._generate(batch), strict=True):
                if prompt not in known:
                    keep(prompt, reply)

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[str]) -> list[Reply]:
        model, tokenizer = self._load()
        encoded = tokenizer(
            [_as_turn(tokenizer, prompt) for prompt in prompts],
            add_special_tokens=tokenizer.chat_template is None,
            padding=True,
            return_tensors="pt",
        ).to(model.device)
        length = encoded["input_ids"].shape[1]
        self._check_length(model, length)
        ids = model.generate(
            **encoded,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=self.max_tokens,
            pad_token_id=tokenizer.pad_token_id,
            prefix_allowed_tokens_fn=_allowed_tokens(tokenizer, self.choices, length) if self.choices else None,
        )[:, length:]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        prompt_tokens = encoded["attention_mask"].sum(dim=1).tolist()
        reply_tokens = (ids != tokenizer.pad_token_id).sum(dim=1).tolist()
        return [
            Reply(text.strip(), *counts, served_by=self.model)
            for text, *counts in zip(texts, prompt_tokens, reply_tokens, strict=True)
        ]

    def _check_length(self, model: Any, length: int) -> None:
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is not None and length + self.max_tokens > longest:
            raise ConfigError(
                f"a prompt of {length} tokens and a reply of {self.max_tokens} do not fit into the {longest} of "
                f"{self.model}; use another --judge-model or a shorter --judge-prompt"
            )

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            placing = {"device_map": "auto"} if torch.accelerator.is_available() else {}
            with quiet_transformers():
                model = load_language_model(self.source, dtype=getattr(torch, self.precision), **placing).eval()
                tokenizer = load_tokenizer(self.source)
            tokenizer.padding_side = "left"
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            self._loaded = (model, tokenizer)
        return self._loaded


def _as_turn(tokenizer: Any, prompt: str) -> str:
    if tokenizer.chat_template is None:
        return prompt
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )


def _allowed_tokens(tokenizer: Any, choices: Sequence[str], length: int) -> Callable[[int, Any], list[int]]:
    """Which tokens may follow, so that a reply after a prompt of so many tokens is one of the choices and ends there."""
    after: dict[tuple[int, ...], set[int]] = {}
    for choice in choices:
        ids = (*tokenizer(choice, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
        for position, token in enumerate(ids):
            after.setdefault(ids[:position], set()).add(token)
    allowed = {begun: sorted(tokens) for begun, tokens in after.items()}
    # A row that has ended is padded while others go on.
    return lambda row, ids: allowed.get(tuple(ids[length:].tolist()), [tokenizer.pad_token_id])

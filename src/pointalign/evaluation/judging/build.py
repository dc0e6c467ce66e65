"""One constructor for every judge, from the options that the command's verbs share."""

from __future__ import annotations

import json
from typing import Any, get_args

from pointalign.config import from_dict
from pointalign.errors import ConfigError
from pointalign.evaluation.judging.endpoint import EndpointJudge, Patience
from pointalign.evaluation.judging.matching import MatchJudge
from pointalign.evaluation.judging.prompts import load_prompts
from pointalign.evaluation.judging.replies import Prices
from pointalign.evaluation.records import Judge
from pointalign.judge_settings import JudgeName, JudgeSettings

AT_LEAST = {"judge_max_tokens": 0, "judge_concurrency": 1, "judge_retries": 0, "judge_batch_size": 1}


def build_judge(name: JudgeName, **options: Any) -> Judge:
    """Build a judge.

    Args:
        name: "match", "embedding", "llm" or "hf".
        options: fields of `JudgeSettings`; those that do not concern the judge have no effect.

    Raises:
        ConfigError: for an unknown name or option, a value out of range, or an option that the judge needs and lacks.
        CheckpointError: when the hf judge's model is a short name that cannot be had.
    """
    settings = from_dict(JudgeSettings, options, "judge")
    _check(settings)
    if name == "match":
        return MatchJudge()
    if name == "embedding":
        from pointalign.evaluation.judging.embedding import EmbeddingJudge

        return EmbeddingJudge(settings.judge_model) if settings.judge_model else EmbeddingJudge()
    if name == "hf":
        from pointalign.evaluation.judging.local import LocalJudge

        prompts = load_prompts(settings.judge_prompt)
        return LocalJudge(
            settings.judge_model,
            prompts,
            settings.judge_max_tokens,
            settings.judge_batch_size,
            settings.judge_constrained,
        )
    if name == "llm":
        return _endpoint_judge(settings)
    raise ConfigError(f"there is no judge {name!r}; choose {', '.join(get_args(JudgeName))}")


def _endpoint_judge(settings: JudgeSettings) -> EndpointJudge:
    return EndpointJudge(
        settings.judge_model,
        load_prompts(settings.judge_prompt),
        settings.judge_base_url,
        settings.judge_api_key,
        settings.judge_max_tokens,
        _extra(settings.judge_extra),
        Patience(settings.judge_concurrency, settings.judge_timeout, settings.judge_retries),
        Prices(settings.judge_price_in, settings.judge_price_out),
    )


def _check(settings: JudgeSettings) -> None:
    for name, least in AT_LEAST.items():
        if getattr(settings, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(settings, name)} cannot be; give {least} or more")
    if not settings.judge_timeout > 0:
        raise ConfigError(f"--judge-timeout {settings.judge_timeout} leaves no time to reply; give seconds above 0")


def _extra(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--judge-extra is not JSON ({error}); write for instance '{{\"seed\": 1}}'") from error
    if not isinstance(values, dict):
        raise ConfigError("--judge-extra is not a JSON object; write for instance '{\"seed\": 1}'")
    return values

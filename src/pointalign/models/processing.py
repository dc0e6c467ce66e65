"""The processor: clouds and chat messages in, tensors out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, ProcessorMixin

from pointalign.errors import CheckpointError, ConfigError, DataError
from pointalign.models.chat_text import DEFAULT_CHAT_TEMPLATE, Message, Segment, check_text, cut_at_answers
from pointalign.models.checkpoint import BUNDLED_MODELS, find_checkpoint, shared_folder
from pointalign.models.point_clouds import ReadCloud, clean_cloud, sample_cloud
from pointalign.models.pointalign import PointAlignConfig


class PointAlignProcessor(ProcessorMixin):
    """Turns clouds and chat messages into a model's inputs.

    Args:
        tokenizer: the language model's tokenizer.
        num_points: N, points of every cloud that reaches the model.
        num_point_tokens: tokens that one cloud becomes, `PointAlignConfig.num_point_tokens`.
        min_points: fewest points a cloud may have: the encoder's max(groups' neighbours, 1).
        point_token: the placeholder's text in the tokenizer's vocabulary.
        point_prefix: text before a cloud's tokens.
        point_suffix: text after a cloud's tokens.
        system_prompt: system message put before conversations that have none; None leaves it to the chat template.
        missing_color: rgb in [0, 1] given to clouds without colour.
        metric_size: whether the model is told how large an object is, `PointEncoderConfig.metric_size`.
        chat_template: Jinja template for tokenizers that have none, or to be used instead of theirs.
    """

    attributes = ["tokenizer"]  # noqa: RUF012
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer: Any = None,
        num_points: int = 8192,
        num_point_tokens: int = 32,
        min_points: int = 32,
        point_token: str = "<point>",
        point_prefix: str = "",
        point_suffix: str = "\n",
        system_prompt: str | None = None,
        missing_color: Sequence[float] = (0.0, 0.0, 0.0),
        metric_size: bool = False,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.num_points = num_points
        self.num_point_tokens = num_point_tokens
        self.min_points = min_points
        self.point_token = point_token
        self.point_prefix = point_prefix
        self.point_suffix = point_suffix
        self.system_prompt = system_prompt
        self.missing_color = list(missing_color)
        self.metric_size = metric_size
        if chat_template is None and getattr(tokenizer, "chat_template", None) is None:
            chat_template = DEFAULT_CHAT_TEMPLATE
        super().__init__(tokenizer, chat_template=chat_template)
        if point_token not in tokenizer.get_vocab():
            raise ConfigError(f"the tokenizer does not know the point token {point_token!r}; add it as a special token")
        self.point_token_id = tokenizer.convert_tokens_to_ids(point_token)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that a model takes."""
        return ["input_ids", "attention_mask", "point_clouds"]

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> PointAlignProcessor:
        """Load the processor that lies beside a model.

        Args:
            pretrained_model_name_or_path: `household-135m`, a folder or a Hub id.
            kwargs: passed to `ProcessorMixin.from_pretrained`.

        Raises:
            CheckpointError: when a bundled model, or the folder that a model shares its processor with, is not there.
            OSError: when its processor is missing or broken.
        """
        name = str(pretrained_model_name_or_path)
        if name in BUNDLED_MODELS or (Path(name) / "config.json").is_file():
            name = str(shared_folder(find_checkpoint(name)))
        return super().from_pretrained(name, **kwargs)  # pyright: ignore[reportReturnType]

    def prepare_points(self, points: Any) -> Tensor:
        """One cloud as the model wants it.

        More than `num_points` points are cut down by farthest point sampling from point 0; fewer are filled up by
        repeating the cloud from its first point on. Colours as in `clean_points`.

        Args:
            points: as in `clean_points`.

        Returns:
            (num_points, 6) float32: xyz centred and in the unit ball, rgb in [0, 1]. With `metric_size` (num_points, 7), the
            last column the radius in metres, 0 where it is not known.

        Raises:
            DataError: as `clean_points`.
        """
        return sample_cloud(self.clean_points(points), self.num_points)

    def clean_points(self, points: Any) -> Tensor:
        """All points of one cloud, checked and with colours; where they lie stays as it is.

        Colours in 0-255 are divided by 255, with a warning. Missing colours become `missing_color`.

        Args:
            points: (N, 3) xyz, (N, 6) xyz and rgb, or (N, 7) with the unit of xyz in metres in every row, 0 where it is not
                known (0.01 for a cloud in centimetres); numpy array or tensor, N >= `min_points`. Or a `PointCloud` of
                `load_point_cloud`.

        Returns:
            (N, 6) float32, rgb in [0, 1]. With `metric_size` (N, 7), the last column the unit.

        Raises:
            DataError: for a wrong shape, too few points, values that are not finite, colours outside 0-255, or several
                units.
        """
        return clean_cloud(points, self.min_points, self.missing_color, self.metric_size)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[Segment]:
        """A conversation as text, cut where the assistant's turns begin and end.

        Args:
            messages: dicts with `role` (system, user, assistant) and `content`: a string, or a list of
                `{"type": "text", "text": ...}` and `{"type": "point_cloud", ...}`.
            add_generation_prompt: end with the opening of the assistant's turn.

        Returns:
            Segments whose joined text is the chat template's; clouds are written as their placeholder tokens.

        Raises:
            DataError: when a text holds the point token; or without `add_generation_prompt`, when the chat template rewrites
                earlier turns, so that answers cannot be told from prompts.
        """
        turns = [{"role": message["role"], "content": self._content(message["content"])} for message in messages]
        if self.system_prompt is not None and (not turns or turns[0]["role"] != "system"):
            turns.insert(0, {"role": "system", "content": self.system_prompt})
        return cut_at_answers(turns, self._template, add_generation_prompt)

    def _template(self, turns: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(
            list(turns), chat_template=self.chat_template, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _content(self, content: str | Sequence[Mapping[str, Any]]) -> str:
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            if part.get("type") == "point_cloud":
                continue
            if part.get("type") != "text" or "text" not in part:
                raise DataError(
                    f'a part of a message is {{"type": "text", "text": ...}} or {{"type": "point_cloud"}}; got {part}'
                )
            check_text(part["text"])
        if any(self.point_token in part["text"] for part in parts if part["type"] != "point_cloud"):
            raise DataError(
                f"a text holds {self.point_token}, the token that stands for a cloud; write it otherwise, or a "
                '{"type": "point_cloud"} part for a cloud'
            )
        return "".join(self.point_markup if part["type"] == "point_cloud" else part["text"] for part in parts)

    @property
    def point_markup(self) -> str:
        """The text that stands for one cloud."""
        return self.point_prefix + self.point_token * self.num_point_tokens + self.point_suffix

    def encode(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> dict[str, list[int]]:
        """Token ids of a conversation, and the labels that train its answers.

        Each segment is tokenised by itself, so that a prompt has the same ids in training and in answering.

        Returns:
            `input_ids` and `labels` of equal length; labels are -100 everywhere but in the assistant's words and the end
            of its turn.
        """
        input_ids: list[int] = []
        labels: list[int] = []
        for segment in self.render(messages, add_generation_prompt):
            ids = self.tokenizer(segment.text, add_special_tokens=False)["input_ids"]
            input_ids += ids
            labels += ids if segment.is_answer else [-100] * len(ids)
        return {"input_ids": input_ids, "labels": labels}

    def pad(self, sequences: Sequence[Sequence[int]], side: str = "left", value: int | None = None) -> Tensor:
        """Sequences of unequal length as one (B, L) tensor.

        Args:
            sequences: lists of ids or labels.
            side: "left" for answering, "right" for training.
            value: what to fill with; the tokenizer's pad (else end) token by default.
        """
        if value is None:
            value = self.tokenizer.pad_token_id
            value = self.tokenizer.eos_token_id if value is None else value
        length = max(len(sequence) for sequence in sequences)
        padded = torch.full((len(sequences), length), int(value or 0), dtype=torch.long)
        for row, sequence in zip(padded, sequences, strict=True):
            span = slice(length - len(sequence), length) if side == "left" else slice(0, len(sequence))
            row[span] = torch.tensor(sequence, dtype=torch.long)
        return padded

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        text: str | Sequence[str] | None = None,
        points: Any = None,
        padding_side: str = "left",
        **kwargs: Any,
    ) -> BatchFeature:
        """Prompts that hold the placeholder once per cloud, and their clouds.

        Args:
            text: one prompt or several; each `point_token` in them stands for one whole cloud.
            points: a cloud or a list of clouds, in the order of their placeholders.
            padding_side: "left" for answering, "right" for training.
            kwargs: `return_tensors` is accepted and always "pt".

        Returns:
            `input_ids`, `attention_mask` (B, L), and `point_clouds` (clouds, N, 6) if there are any.

        Raises:
            DataError: when the number of clouds is not the number of placeholders.
        """
        if unknown := set(kwargs) - {"return_tensors"}:
            raise ConfigError(
                f"the processor has no option {sorted(unknown)[0]!r}; it takes text, points, padding_side"
            )
        texts = [text] if isinstance(text, str) else list(text or [])
        clouds = self._clouds(points)
        placeholders = sum(prompt.count(self.point_token) for prompt in texts)
        if placeholders != len(clouds):
            raise DataError(
                f"the prompts hold {placeholders} {self.point_token} but {len(clouds)} clouds were given; "
                "write the token once for each cloud"
            )
        expanded = [prompt.replace(self.point_token, self.point_token * self.num_point_tokens) for prompt in texts]
        ids = [self.tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in expanded]
        return self._batch(ids, clouds, padding_side)

    def apply_chat_template(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        points: Any = None,
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        padding_side: str = "left",
        **kwargs: Any,
    ) -> Any:
        """Conversations as text or as a model's inputs.

        Args:
            conversation: messages as in `render`, or a list of conversations. A `{"type": "point_cloud", "points": ...}`
                part may carry its cloud.
            points: clouds of the parts that carry none, in order.
            add_generation_prompt: end with the opening of the assistant's turn.
            tokenize: False returns the text.
            padding_side: as in `__call__`.
            kwargs: `return_tensors` and `return_dict` are accepted; tensors in a dict are always returned.

        Returns:
            Text (or a list of texts), or a `BatchFeature` as from `__call__`.

        Raises:
            DataError: when clouds are missing or left over.
        """
        if unknown := set(kwargs) - {"return_tensors", "return_dict"}:
            raise ConfigError(f"apply_chat_template has no option {sorted(unknown)[0]!r} here; see its docstring")
        single = bool(conversation) and isinstance(conversation[0], Mapping)
        conversations: list[Any] = [conversation] if single else list(conversation)
        if not tokenize:
            texts = ["".join(s.text for s in self.render(turns, add_generation_prompt)) for turns in conversations]
            return texts[0] if single else texts
        given = self._clouds(points)
        clouds = []
        for part in (p for turns in conversations for turn in turns for p in _parts(turn["content"])):
            if part["type"] == "point_cloud":
                if part.get("points") is None and not given:
                    raise DataError("a point_cloud part has no points and none are left; pass them in `points`")
                clouds.append(self.prepare_points(part["points"]) if part.get("points") is not None else given.pop(0))
        if given:
            raise DataError(f"{len(given)} clouds are left over; write one point_cloud part for each cloud")
        ids = [self.encode(turns, add_generation_prompt)["input_ids"] for turns in conversations]
        return self._batch(ids, clouds, padding_side)

    def _clouds(self, points: Any) -> list[Tensor]:
        if points is None:
            return []
        if getattr(points, "ndim", None) == 2 or isinstance(points, ReadCloud):
            points = [points]
        return [self.prepare_points(cloud) for cloud in points]

    def _batch(self, ids: list[list[int]], clouds: list[Tensor], side: str) -> BatchFeature:
        data = {"input_ids": self.pad(ids, side), "attention_mask": self.pad([[1] * len(row) for row in ids], side, 0)}
        if clouds:
            data["point_clouds"] = torch.stack(clouds)
        return BatchFeature(data)


def _parts(content: str | Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def load_processor(name: str) -> PointAlignProcessor:
    """The processor that lies beside a model.

    Raises:
        CheckpointError: when it is missing or broken.
    """
    question = "What is this?"
    try:
        processor = PointAlignProcessor.from_pretrained(find_checkpoint(name))
        prompt = "".join(part.text for part in processor.render([{"role": "user", "content": question}], True))
    except (OSError, ValueError, TemplateError) as error:
        raise CheckpointError(
            f"cannot load the processor of {name}: {str(error).splitlines()[0]}; copy it again"
        ) from error
    if question not in prompt:
        raise CheckpointError(f"the chat template of {name} leaves out what is asked; copy its processor again")
    return processor


AutoProcessor.register(PointAlignConfig, PointAlignProcessor, exist_ok=True)

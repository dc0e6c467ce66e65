"""The core of answering: a loaded model that captions, scores labels and talks about clouds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pointalign.answering.generation import Generated, chance, check_room, generate_from, memory_told
from pointalign.answering.streaming import Stream
from pointalign.data.conversations import count_clouds
from pointalign.data.household_phrases import CATEGORY_QUESTIONS
from pointalign.errors import DataError
from pointalign.evaluation.benchmarks import CAPTION, INSTRUCTION
from pointalign.evaluation.judges import CLASS_STEM, class_texts, label_log_likelihoods
from pointalign.models.chat_text import check_text
from pointalign.options import GREEDY, Decoding

CAPTION_QUESTION = CAPTION
FREE_QUESTION = INSTRUCTION
CLASS_QUESTION = CATEGORY_QUESTIONS[0]


class Answerer:
    """A model and its processor, and what can be asked of them.

    Args:
        model: a `PointAlignForConditionalGeneration` in evaluation mode, adapters merged.
        processor: its processor.
        name: what people call the model.
    """

    def __init__(self, model: Any, processor: Any, name: str = "") -> None:
        self.model = model
        self.processor = processor
        self.name = name

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.get_input_embeddings().weight.device

    def prepare(self, cloud: Any) -> Tensor:
        """One cloud as the model reads it.

        Args:
            cloud: as `PointAlignProcessor.clean_points` takes it.

        Returns:
            (num_points, 6) float32.

        Raises:
            DataError: when the cloud is of another shape or kind, too small or not finite.
        """
        return self.processor.prepare_points(cloud)

    def inputs(
        self, conversations: Sequence[Sequence[Mapping[str, Any]]], clouds: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """A left-padded batch of conversations that wait for the assistant's turn.

        Args:
            conversations: messages, with one point_cloud part for each cloud.
            clouds: from `prepare`, in the order of their parts.

        Raises:
            DataError: when the number of parts is not the number of clouds.
        """
        parts = sum(map(count_clouds, conversations))
        if parts != len(clouds):
            raise DataError(f"the messages hold {parts} point_cloud parts for {len(clouds)} clouds; write one for each")
        ids = [self.processor.encode(messages, add_generation_prompt=True)["input_ids"] for messages in conversations]
        inputs = {
            "input_ids": self.processor.pad(ids),
            "attention_mask": self.processor.pad([[1] * len(row) for row in ids], value=0),
        }
        return {**inputs, "point_clouds": torch.stack(list(clouds))} if clouds else inputs

    def reply(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        clouds: Sequence[Tensor],
        decoding: Decoding = GREEDY,
        number: int = 0,
    ) -> list[Generated]:
        """The assistant's next turn in each conversation of a batch.

        Args:
            conversations: as in `inputs`.
            clouds: as in `inputs`.
            decoding: how the words are chosen.
            number: of the batch, for sampling.

        Raises:
            DataError: when clouds are missing or left over, or a conversation is longer than the model's context.
        """
        inputs = self.inputs(conversations, clouds)
        check_room(self.model, inputs["input_ids"].shape[1], decoding.max_new_tokens)
        with chance(decoding, self.device, number), memory_told(len(clouds)):
            return generate_from(self.model, self.processor, inputs, decoding.options())

    def ask(
        self, clouds: Sequence[Tensor], question: str, decoding: Decoding = GREEDY, number: int = 0
    ) -> list[Generated]:
        """Ask one question about each cloud of a batch; arguments as in `reply`."""
        return self.reply([[about_cloud(question)]] * len(clouds), clouds, decoding, number)

    def check_question(self, question: str, room: int) -> None:
        """Refuse a question about a cloud that leaves less room for the answer in the model's context than `room` tokens.

        Raises:
            DataError: when it does.
        """
        prompt = self.processor.encode([about_cloud(question)], add_generation_prompt=True)["input_ids"]
        check_room(self.model, len(prompt), room)

    def stream(
        self,
        messages: Sequence[Mapping[str, Any]],
        clouds: Sequence[Tensor],
        decoding: Decoding = GREEDY,
        number: int = 0,
    ) -> Stream:
        """The assistant's next turn in one conversation, piece by piece; arguments and errors as in `reply`."""
        inputs = self.inputs([messages], clouds)
        check_room(self.model, inputs["input_ids"].shape[1], decoding.max_new_tokens)
        return Stream(self.model, self.processor, inputs, decoding, number)

    def probabilities(self, clouds: Sequence[Tensor], labels: Sequence[str], question: str = CLASS_QUESTION) -> Tensor:
        """How probable each label is for each cloud of a batch, among these labels alone.

        Each label's probability as the answer's words after "It belongs to the class:", over the sum of all labels'. The
        order of the labels is that of `pointalign evaluate`'s likelihood scoring.

        Args:
            clouds: from `prepare`.
            labels: names such as "chair", without article.
            question: what the answer that holds the label replies to.

        Returns:
            (clouds, labels) float32; each row sums to 1.

        Raises:
            DataError: without labels, or when their likelihoods are no finite numbers.
        """
        words = class_texts(labels)
        with memory_told(len(clouds)):
            scores = label_log_likelihoods(self.model, self.processor, clouds, question, CLASS_STEM, words)
        if not scores.isfinite().all():
            raise DataError(
                "the labels' likelihoods are no finite numbers; compute in bfloat16 or float32 (dtype), for float16 has too "
                "small a range for some models"
            )
        return scores.softmax(dim=-1)

    def check_labels(self, labels: Sequence[str], question: str = CLASS_QUESTION) -> None:
        """Refuse labels that are no text, or do not fit into the model's context behind the question.

        Raises:
            DataError: when one is not, or does not.
        """
        for label in labels:
            check_text(label)
        tokenizer = self.processor.tokenizer
        answers = [tokenizer(CLASS_STEM + text, add_special_tokens=False)["input_ids"] for text in class_texts(labels)]
        self.check_question(question, max(map(len, answers), default=0))


def about_cloud(question: str, **cloud: Any) -> dict[str, Any]:
    """A user's message that shows a cloud and asks a question about it; `path` or `points` say which, for those who read it."""
    return {"role": "user", "content": [{"type": "point_cloud", **cloud}, {"type": "text", "text": question}]}

"""Training the point encoder and the connector on captions alone, before any language model reads their tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers.utils.generic import ModelOutput

from pointalign.augmentation import augment, drawn
from pointalign.config import Recipe
from pointalign.data.conversations import Conversation
from pointalign.data.mixture import NumberedBatches
from pointalign.data.sources import open_training_data
from pointalign.errors import ConfigError, DataError
from pointalign.models.point_encoder import PointEncoder
from pointalign.models.pointalign import PointAlignForConditionalGeneration
from pointalign.models.processing import PointAlignProcessor
from pointalign.recipe_trainer import RecipeTrainer
from pointalign.run_folder import RunFolder
from pointalign.run_loop import run_trainer
from pointalign.sentence_embedding import embed_sentences

TARGET_TEMPERATURE = 0.05
TEMPLATE_SHARE = 0.15
NORM_WEIGHT = 0.1


class PointTextContrast(nn.Module):
    """Two losses that tie clouds to their captions before a language model reads them.

    Contrast: the point encoder's pooled features and the caption's sentence embedding find each other in the batch.
    Words: for each of the caption's own tokens some point token points at its row of the language model's embedding, so
    that the language model can read the point tokens from its first step on.

    Args:
        encoder: the point encoder.
        connector: point features to point tokens.
        text_size: width of the sentence embeddings.
        words: (M, D_llm), the language model's embedding of every token that the captions use.

    Source: contrast after ULIP-2 (arXiv 2305.08275), with soft targets from the texts' own similarity, because many objects
    of a small set share their caption's meaning; words are our own, after BLIP-2's (arXiv 2301.12597) soft prompts.
    """

    def __init__(self, encoder: PointEncoder, connector: nn.Module, text_size: int, words: Tensor) -> None:
        super().__init__()
        self.encoder, self.connector = encoder, connector
        self.projection = nn.Linear(2 * encoder.config.hidden_size, text_size)
        self.contrast_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.word_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.words: Tensor
        self.register_buffer("words", F.normalize(words.float(), dim=-1), persistent=False)
        self.word_norm = float(words.float().norm(dim=-1).mean())

    def forward(self, point_clouds: Tensor, text_embeddings: Tensor, caption_words: Tensor) -> ModelOutput:
        """Losses of one batch.

        Args:
            point_clouds: (B, N, C).
            text_embeddings: (B, text_size), unit vectors.
            caption_words: (B, M), how much each token counts in each caption; rows sum to 1.

        Returns:
            `contrastive_loss` and `word_loss`, scalars.
        """
        features = self.encoder(point_clouds)
        pooled = torch.cat([features[:, 0], features[:, 1:].amax(dim=1)], dim=-1)
        embedded = F.normalize(self.projection(pooled).float(), dim=-1)
        logits = self.contrast_scale.exp().clamp(max=100) * embedded @ text_embeddings.T
        targets = (text_embeddings @ text_embeddings.T / TARGET_TEMPERATURE).softmax(dim=-1)
        contrast = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        tokens = self.connector(features).point_tokens.float()
        found = (F.normalize(tokens, dim=-1) @ self.words.T).amax(dim=1)
        words = F.cross_entropy(self.word_scale.exp().clamp(max=100) * found, caption_words)
        norms = (tokens.norm(dim=-1) / self.word_norm - 1).square().mean()
        return ModelOutput(contrastive_loss=contrast, word_loss=words + NORM_WEIGHT * norms)


def caption_words(captions: Sequence[str], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Which tokens make each caption, without those that most captions share.

    Args:
        captions: n texts.
        tokenizer: the language model's.

    Returns:
        Token ids (M,), and weights (n, M) whose rows sum to 1: rarer tokens weigh more (inverse document frequency).
    """
    bags = [set(tokenizer(" " + caption, add_special_tokens=False)["input_ids"]) for caption in captions]
    counts = Counter(token for bag in bags for token in bag)
    kept = sorted(token for token, count in counts.items() if count <= TEMPLATE_SHARE * len(captions))
    if not kept:
        raise DataError("all captions have the same words, so there is nothing to tell clouds apart by")
    column = {token: number for number, token in enumerate(kept)}
    weights = torch.zeros(len(captions), len(kept))
    for row, bag in zip(weights, bags, strict=True):
        for token in bag & column.keys():
            row[column[token]] = math.log(len(captions) / counts[token])
    return torch.tensor(kept), weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-9)


class CloudTextDataset(Dataset):
    """Augmented clouds with what belongs to their captions.

    Args:
        read: gives the cloud of a number, (N, 6).
        texts: tensors with one row per cloud.
        num_points: points of each augmented cloud.
        seed: of the augmentation, which depends on the seed, the object and the step alone.
    """

    def __init__(
        self, read: Callable[[int], Tensor], texts: Mapping[str, Tensor], num_points: int, size_told: float, seed: int
    ) -> None:
        self.read, self.texts, self.num_points, self.size_told, self.seed = read, texts, num_points, size_told, seed

    def __len__(self) -> int:
        return len(next(iter(self.texts.values())))

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Tensor]:
        """The sample of (object number, step)."""
        number, step = index
        return {
            "point_clouds": augment(self.read(number), drawn(self.seed, number, step), self.num_points, self.size_told),
            **{name: tensor[number] for name, tensor in self.texts.items()},
        }


class ContrastTrainer(RecipeTrainer):
    """Contrast and words under a recipe's optimiser and batches."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The batch's loss; `contrastive_loss` and `word_loss` are logged apart."""
        outputs = model(**inputs)
        losses = {name: loss / self.settings.gradient_accumulation for name, loss in outputs.items()}
        self.add_to_log(**losses)
        loss = losses["contrastive_loss"] + losses["word_loss"]
        return (loss, outputs) if return_outputs else loss


def captions_by_object(conversations: Sequence[Conversation]) -> dict[str, list[str]]:
    """Every first answer about each object, the shortest first: what it is, without what varies in telling it."""
    captions: dict[str, list[str]] = {}
    for conversation in conversations:
        answer = next(str(m["content"]) for m in conversation.messages if m["role"] == "assistant")
        captions.setdefault(conversation.object_id, []).append(answer)
    return {name: sorted(answers, key=len) for name, answers in captions.items()}


def mean_embeddings(texts: Sequence[Sequence[str]]) -> Tensor:
    """(n, D) unit vectors: what the sentence embeddings of each object's captions have in common."""
    embedded = iter(torch.from_numpy(embed_sentences([text for group in texts for text in group])))
    means = torch.stack([torch.stack([next(embedded) for _ in group]).mean(dim=0) for group in texts])
    return F.normalize(means, dim=-1)


def balanced_members(weights: Tensor, balance: float) -> list[int]:
    """Numbers of the objects, each as often as it is to be drawn in one pass.

    Args:
        weights: (n, M), the words of each object's caption as `caption_words` gives them.
        balance: of c objects with the same words, each is drawn 1/c^balance as often as one whose words are its own.

    Returns:
        Each number at least once; ratios are rounded to whole numbers.
    """
    _, group, counts = (weights > 0).unique(dim=0, return_inverse=True, return_counts=True)
    shares = counts[group].double() ** -balance
    return torch.arange(len(weights)).repeat_interleave((shares / shares.min()).round().long()).tolist()


def _collate(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def train_encoder(
    recipe: Recipe, folder: RunFolder, model: PointAlignForConditionalGeneration, processor: PointAlignProcessor
) -> RecipeTrainer:
    """Train the point encoder and the connector against captions.

    Args:
        recipe: with one entry in `data.sets`.
        folder: the run's.
        model: whose point encoder and connector train; the language model only lends its token embedding.
        processor: its processor.

    Returns:
        The trainer, at its end.

    Raises:
        ConfigError: when the recipe mixes several sets; this stage learns from one.
    """
    if len(recipe.data.sets) != 1:
        raise ConfigError("stage encoder takes one entry in data.sets; name its types and batch_size there")
    clouds, conversations = open_training_data(recipe.data, folder.path)
    captions = captions_by_object(conversations)
    object_ids = sorted(captions)
    texts = mean_embeddings([captions[name] for name in object_ids])
    tokens, weights = caption_words([captions[name][0] for name in object_ids], processor.tokenizer)
    words = model.get_input_embeddings()(tokens).detach().float()
    contrast = PointTextContrast(model.point_encoder, model.connector, texts.shape[1], words)
    dataset = CloudTextDataset(
        lambda number: processor.clean_points(clouds[object_ids[number]]),
        {"text_embeddings": texts, "caption_words": weights},
        processor.num_points,
        recipe.data.size_told,
        recipe.seed,
    )
    members = [balanced_members(weights, recipe.data.balance)]
    return run_trainer(
        recipe,
        folder,
        lambda arguments, callbacks: ContrastTrainer(
            batches=lambda count, rank, world: NumberedBatches(
                members, recipe.data.sets, count, recipe.seed, rank, world
            ),
            settings=recipe.optimizer,
            model=contrast,
            args=arguments,
            train_dataset=dataset,
            data_collator=_collate,
            callbacks=callbacks,
        ),
    )

"""Training the point encoder: clouds and the embeddings of their captions are drawn together, ULIP style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers.utils.generic import ModelOutput

from pointalign.config import DataSet, Recipe
from pointalign.data.conversations import Conversation, MixtureBatchSampler
from pointalign.data.sources import open_training_data
from pointalign.errors import ConfigError
from pointalign.geometry import normalize_point_cloud
from pointalign.models.checkpoint import written_whole
from pointalign.models.point_encoder import PointEncoder, PointEncoderConfig
from pointalign.run_folder import RunFolder
from pointalign.run_loop import run_trainer
from pointalign.sentence_embedding import embed_sentences
from pointalign.training import RecipeTrainer

TARGET_TEMPERATURE = 0.05


class PointTextContrast(nn.Module):
    """Point encoder, a linear onto the text embedding's width, and the contrastive loss.

    Args:
        encoder: what is trained.
        text_size: width of the text embeddings.

    Source: ULIP-2 (arXiv 2305.08275), point-text term; soft targets from the texts' own similarity, because many objects
    of a small set share their caption's meaning.
    """

    def __init__(self, encoder: PointEncoder, text_size: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection = nn.Linear(2 * encoder.config.hidden_size, text_size)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def embed(self, point_clouds: Tensor) -> Tensor:
        """(B, N, C) to unit vectors (B, text_size), from the class token and the maximum over the groups."""
        features = self.encoder(point_clouds)
        pooled = torch.cat([features[:, 0], features[:, 1:].amax(dim=1)], dim=-1)
        return F.normalize(self.projection(pooled).float(), dim=-1)

    def forward(self, point_clouds: Tensor, text_embeddings: Tensor) -> ModelOutput:
        """Symmetric contrastive loss of B clouds (B, N, C) and their unit text vectors (B, text_size)."""
        logits = self.log_scale.exp().clamp(max=100) * self.embed(point_clouds) @ text_embeddings.T
        targets = (text_embeddings @ text_embeddings.T / TARGET_TEMPERATURE).softmax(dim=-1)
        loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        return ModelOutput(loss=loss)


def augment(points: Tensor, generator: torch.Generator) -> Tensor:
    """A cloud as it might have been: a small turn about the vertical axis, stretched, shaken, thinned, without colour.

    Args:
        points: (N, 6), y up. Objects stand upright, so only small turns are made.
        generator: of all random choices.

    Returns:
        (N, 6), normalised again; thinned-out points are replaced by the first one, so the shape stays.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    xyz, rgb = points[:, :3], points[:, 3:]
    angle = uniform(-0.5, 0.5)
    cos, sin = angle.cos(), angle.sin()
    x, y, z = (xyz * uniform(0.85, 1.15, 3)).unbind(dim=1)
    mirrored = torch.where(uniform(0, 1) < 0.5, -x, x)
    xyz = torch.stack([cos * mirrored + sin * z, y, cos * z - sin * mirrored], dim=1)
    xyz = xyz + 0.01 * torch.randn(xyz.shape, generator=generator)
    rgb = (rgb * uniform(0.8, 1.2, 3) + uniform(-0.1, 0.1, 3)).clamp(0, 1)
    if uniform(0, 1) < 0.2:
        rgb = torch.full_like(rgb, 0.5)
    moved = torch.cat([xyz, rgb], dim=1)
    dropped = uniform(0, 1, len(moved)) < uniform(0, 0.4)
    moved = torch.where(dropped.unsqueeze(1), moved[:1], moved)
    return normalize_point_cloud(moved)


class CloudTextDataset(Dataset):
    """Clouds and their captions' embeddings.

    Args:
        object_ids: the objects.
        clouds: (n, N, 6).
        text_embeddings: (n, D).
        seed: of the augmentation, which depends on the seed, the object and how often it was drawn.
    """

    def __init__(self, object_ids: Sequence[str], clouds: Tensor, text_embeddings: Tensor, seed: int) -> None:
        self.object_ids, self.clouds, self.text_embeddings = list(object_ids), clouds, text_embeddings
        self.seed = seed

    def __len__(self) -> int:
        return len(self.object_ids)

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Tensor]:
        """The sample of (object number, draw number)."""
        number, draw = index
        generator = torch.Generator().manual_seed(hash((self.seed, number, draw)) % 2**63)
        return {
            "point_clouds": augment(self.clouds[number], generator),
            "text_embeddings": self.text_embeddings[number],
        }


class _NumberedBatches(MixtureBatchSampler):
    """Batches of (object number, draw number), so that a sample is a function of the seed and the step alone."""

    def __iter__(self) -> Any:
        for step, batch in enumerate(super().__iter__()):
            yield [(number, step) for number in batch]


class ContrastTrainer(RecipeTrainer):
    """The contrastive loss under a recipe's optimiser and batches."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The batch's loss; logged as `contrastive_loss`."""
        outputs = model(**inputs)
        loss = outputs.loss / self.settings.gradient_accumulation
        self.add_to_log(contrastive_loss=loss)
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The batches of one step; their losses are averaged."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        return batches, torch.tensor(len(batches), device=device)


def captions_by_object(conversations: Sequence[Conversation]) -> dict[str, str]:
    """The longest first answer about each object, as what its cloud is drawn to."""
    captions: dict[str, str] = {}
    for conversation in conversations:
        answer = next(str(m["content"]) for m in conversation.messages if m["role"] == "assistant")
        if len(answer) > len(captions.get(conversation.object_id, "")):
            captions[conversation.object_id] = answer
    return captions


def _collate(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def train_encoder(recipe: Recipe, folder: RunFolder) -> dict[str, int]:
    """Train a point encoder and write it into the run's `model` folder.

    Returns:
        Number of trained weights.

    Raises:
        ConfigError: when the recipe mixes several sets; an encoder learns from one.
    """
    if len(recipe.data.sets) != 1:
        raise ConfigError("stage encoder takes one entry in data.sets; name its types and batch_size there")
    clouds, conversations = open_training_data(recipe.data)
    captions = captions_by_object(conversations)
    object_ids = sorted(captions)
    points = torch.stack([torch.as_tensor(clouds[name])[: recipe.model.num_points] for name in object_ids])
    texts = torch.from_numpy(embed_sentences([captions[name] for name in object_ids]))
    encoder = PointEncoder(PointEncoderConfig(**vars(recipe.model.point_encoder)))
    model = PointTextContrast(encoder, texts.shape[1])
    dataset = CloudTextDataset(object_ids, normalize_point_cloud(points.float()), texts, recipe.seed)
    sets = [DataSet(recipe.data.sets[0].types, 1.0, recipe.data.sets[0].batch_size)]
    members = [range(len(object_ids))]
    trainer = run_trainer(
        recipe,
        folder,
        lambda arguments, callbacks: ContrastTrainer(
            batches=lambda count, rank, world: _NumberedBatches(members, sets, count, recipe.seed, rank, world),
            settings=recipe.optimizer,
            model=model,
            args=arguments,
            train_dataset=dataset,
            data_collator=_collate,
            callbacks=callbacks,
        ),
    )
    if trainer.is_world_process_zero():
        with written_whole(folder.model) as temporary:
            encoder.save_pretrained(temporary)
    return {"point_encoder": sum(parameter.numel() for parameter in encoder.parameters())}

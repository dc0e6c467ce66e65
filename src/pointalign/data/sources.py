"""What a recipe's data settings mean: the clouds, and the conversations about them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from pointalign.config import DataSettings
from pointalign.data.conversations import Conversation, PointCloudSource, keep_fraction, read_conversations
from pointalign.data.household import HOUSEHOLD_FILE, HouseholdObject, load_household
from pointalign.data.household_text import build_instructions
from pointalign.data.objaverse import NumpyClouds
from pointalign.errors import ConfigError, DataError


class HouseholdClouds:
    """The bundled objects' clouds by object id, (2048, 6) in farthest-point order."""

    def __init__(self, objects: list[HouseholdObject]) -> None:
        self.objects = {thing.id: thing for thing in objects}

    @property
    def fingerprint(self) -> str:
        """Hash of the bundled file."""
        return hashlib.sha256(HOUSEHOLD_FILE.read_bytes()).hexdigest()

    def __contains__(self, object_id: object) -> bool:
        return object_id in self.objects

    def __getitem__(self, object_id: str) -> np.ndarray:
        """The object's points.

        Raises:
            DataError: for an unknown id.
        """
        if object_id not in self.objects:
            raise DataError(f"household has no object {object_id!r}; `load_household()` lists them")
        return self.objects[object_id].points


def open_training_data(settings: DataSettings) -> tuple[PointCloudSource, list[Conversation]]:
    """The clouds and conversations that a recipe trains on; of `household` only the training split.

    Raises:
        ConfigError: when a folder of clouds comes without instruction files.
        DataError: when files are missing or broken, or a conversation's cloud is missing.
    """
    if settings.source == "household":
        objects = load_household("train")
        clouds: PointCloudSource = HouseholdClouds(objects)
        conversations = read_conversations(build_instructions(objects))
    else:
        if not settings.instructions:
            raise ConfigError("data.source is a folder, so data.instructions must name PointLLM-format JSON files")
        clouds = NumpyClouds(Path(settings.source))
        conversations = [c for path in settings.instructions for c in read_conversations(path)]
    wanted = {kind for part in settings.sets for kind in part.types}
    conversations = [conversation for conversation in conversations if conversation.kind in wanted]
    kept = keep_fraction((conversation.object_id for conversation in conversations), settings.fraction)
    conversations = [conversation for conversation in conversations if conversation.object_id in kept]
    missing = sorted(object_id for object_id in kept if object_id not in clouds)
    if missing:
        raise DataError(
            f"{len(missing)} of {len(kept)} objects have no cloud in {settings.source} (first: {missing[0]}); "
            "complete the folder"
        )
    return clouds, conversations

"""What a recipe's data settings mean: the clouds, and the conversations about them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pointalign.config import DataSettings
from pointalign.data.conversations import (
    Conversations,
    PointCloudSource,
    join_conversations,
    keep_fraction,
    read_conversations,
)
from pointalign.data.extra import load_extra
from pointalign.data.household import HOUSEHOLD_FILE, MISSING_COLOR, CatalogObject
from pointalign.data.household_split import household_sides
from pointalign.data.household_text import build_conversations
from pointalign.data.objaverse import BROKEN_OBJECTS, VAL_3000_FILE, NumpyClouds
from pointalign.data.packed import INDEX_FILE, JOURNAL_FILE, PackedClouds
from pointalign.errors import ConfigError, DataError
from pointalign.progress import say
from pointalign.storage import write_text

MISSING_FILE = "missing_clouds.txt"
UNSIZED = " without size"


class HouseholdClouds:
    """The bundled objects' clouds by object id, (2048, 7) in farthest-point order with their unit in metres.

    Args:
        objects: of household, and extra ones.
        extra: the file of the extra ones.
    """

    def __init__(self, objects: Sequence[CatalogObject], extra: Path | None = None) -> None:
        self.objects = {thing.id: thing for thing in objects}
        self.extra = extra

    @property
    def fingerprint(self) -> str:
        """Hash of the bundled file, and of the file of extra objects."""
        digest = hashlib.sha256(HOUSEHOLD_FILE.read_bytes())
        if self.extra is not None:
            digest.update(self.extra.read_bytes())
        return digest.hexdigest()

    def __contains__(self, object_id: object) -> bool:
        return object_id in self.objects

    def __getitem__(self, object_id: str) -> np.ndarray:
        """The object's points.

        Raises:
            DataError: for an unknown id.
        """
        if object_id not in self.objects:
            raise DataError(f"household has no object {object_id!r}; `load_household()` lists them")
        return self.objects[object_id].sized_points


class OptionalSizes:
    """Clouds that are there twice: under the object's id as they are, and under `unsized(id)` with their size unknown.

    Args:
        clouds: arrays; those without a seventh column are the same twice.
    """

    def __init__(self, clouds: PointCloudSource) -> None:
        self.clouds = clouds

    @property
    def fingerprint(self) -> str:
        """Of the clouds; taken only when asked for, because a large folder is looked through for it."""
        return self.clouds.fingerprint

    def __contains__(self, object_id: object) -> bool:
        return isinstance(object_id, str) and object_id.removesuffix(UNSIZED) in self.clouds

    def __getitem__(self, object_id: str) -> np.ndarray:
        """The object's points; errors as the clouds'."""
        points = np.asarray(self.clouds[object_id.removesuffix(UNSIZED)])
        return points[:, :6] if object_id.endswith(UNSIZED) else points


def unsized(object_id: str) -> str:
    """What `OptionalSizes` calls an object whose size is not told."""
    return object_id + UNSIZED


def open_clouds(source: str | Path) -> NumpyClouds | PackedClouds:
    """Clouds on disk or network storage: a folder of .npy files, or a packed folder or its address.

    Raises:
        DataError: when they are missing or not whole, or their packing is not finished.
        MissingDependencyError: when the kind of address needs a package that is not installed.
    """
    folder = Path(source)
    if "://" in str(source) or any((folder / name).is_file() for name in (INDEX_FILE, JOURNAL_FILE)):
        return PackedClouds(source)
    return NumpyClouds(folder)


def read_clouds(clouds: PointCloudSource, object_ids: Sequence[str]) -> list[Any]:
    """Several objects' clouds, read at once: from network storage a batch comes in the time of one cloud.

    Raises:
        DataError: when a cloud is missing or broken.
    """
    with ThreadPoolExecutor(max(len(object_ids), 1)) as pool:
        return list(pool.map(clouds.__getitem__, object_ids))


def check_paths(settings: DataSettings) -> None:
    """See that the files on this machine that a recipe reads are there, before a large model is loaded for them.

    Raises:
        DataError: when one is not.
    """
    sources = [settings.source] if settings.source != "household" else []
    extra = [settings.extra] if settings.extra else []
    for paths, read in ((sources, open_clouds), (settings.instructions, read_conversations), (extra, load_extra)):
        for path in paths:
            if "://" not in path and not Path(path).exists():
                read(path)  # tells what is missing, and what to do


def open_training_data(settings: DataSettings, folder: Path | None = None) -> tuple[PointCloudSource, Conversations]:
    """The clouds and conversations that a recipe trains on; of `household` only what is not held out.

    What is left out is said on stderr: objects that are known to be broken, and with `skip_missing` those without cloud.

    Args:
        settings: the recipe's.
        folder: the run's, where the names of objects without cloud are written.

    Raises:
        ConfigError: for an unknown part to hold out, when a folder of clouds comes without instruction files or with extra
            objects, or a run that is gone on with lacks other clouds than before.
        DataError: when files are missing or broken, or a conversation's cloud is missing.
    """
    if settings.extra is not None and settings.source != "household":
        raise ConfigError("data.extra joins household's objects; leave it out, or set data.source to household")
    wanted = {kind for part in settings.sets for kind in part.types}
    if settings.source == "household":
        extra = Path(settings.extra) if settings.extra else None
        objects = [*household_sides(settings.held_out)[0], *(load_extra(extra) if extra else ())]
        clouds: PointCloudSource = HouseholdClouds(objects, extra)
        # Each has conversations of all types, so only those that are kept need be written about.
        kept = keep_fraction((thing.id for thing in objects), settings.fraction)
        everything = read_conversations(build_conversations(thing for thing in objects if thing.id in kept))
        conversations = everything.select(everything.of_types(wanted))
    else:
        if not settings.instructions:
            raise ConfigError("data.source is a folder, so data.instructions must name PointLLM-format JSON files")
        clouds = open_clouds(settings.source)
        everything = _without_broken(
            join_conversations([_without_held_out(read_conversations(path), path) for path in settings.instructions])
        )
        conversations = everything.select(everything.of_types(wanted))
        kept = keep_fraction(conversations.object_ids, settings.fraction)
    missing = sorted(object_id for object_id in kept if object_id not in clouds)
    _report_missing(missing, len(kept), settings, folder)
    return clouds, conversations.select(conversations.about(kept.difference(missing)))


def missing_color(settings: DataSettings) -> tuple[float, float, float]:
    """What stands for no colour in a source's clouds, rgb in [0, 1]: a model trained on them fills in the same.

    Source: for the field's clouds black, as ModelNet40's are evaluated and as PointLLM's authors advise (its issue 22).
    """
    return MISSING_COLOR if settings.source == "household" else (0.0, 0.0, 0.0)


def _about_others(conversations: Conversations, left_out: Iterable[str]) -> Conversations:
    return conversations.select(conversations.about(set(conversations.names).difference(left_out)))


def _without_held_out(conversations: Conversations, path: str) -> Conversations:
    """Those about none of the field's held-out objects, where their list lies beside the file of instructions."""
    listed = Path(path).with_name(VAL_3000_FILE)
    if "://" in path or not listed.is_file():
        return conversations
    try:
        held_out = set(listed.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {listed}: {error}; copy PointLLM's list of held-out objects again") from error
    known = held_out.intersection(conversations.names)
    if not known:
        return conversations
    kept = _about_others(conversations, known)
    say(
        f"left out {len(conversations) - len(kept)} conversations of {path} about {len(known)} held-out objects ({listed})"
    )
    return kept


def _without_broken(conversations: Conversations) -> Conversations:
    broken = sorted(BROKEN_OBJECTS.intersection(conversations.names))
    if not broken:
        return conversations
    kept = _about_others(conversations, broken)
    say(
        f"left out {len(conversations) - len(kept)} conversations about {len(broken)} objects whose published colours are "
        f"broken: {', '.join(broken)}"
    )
    return kept


def _report_missing(missing: Sequence[str], count: int, settings: DataSettings, folder: Path | None) -> None:
    """Refuse missing clouds, or say which are left out; all their names go into the run's folder."""
    names = "".join(f"{name}\n" for name in missing)
    goes_on = settings.skip_missing and len(missing) < count
    file = folder / MISSING_FILE if folder else None
    if file and goes_on and file.is_file() and file.read_text(encoding="utf-8") != names:
        raise ConfigError(
            f"this run was started while other clouds were missing ({file}); bring the folder back to that state, or name "
            "another --out"
        )
    if file and (missing or goes_on):
        write_text(file, names)
    elif file:
        file.unlink(missing_ok=True)
    if not missing:
        return
    told = f"{len(missing)} of {count} objects have no cloud in {settings.source} (first: {', '.join(missing[:3])})"
    listed = f"all names are in {file}" if file else "`pointalign data check` lists them all"
    if not goes_on:
        raise DataError(f"{told}; complete the folder, or set data.skip_missing to go on without them; {listed}")
    say(f"{told}; going on without them, {listed}")

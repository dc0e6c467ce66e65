"""How the file of extra objects is made from three Debian packages, and what is left out of it.

Each model is sampled as household's are. Left out are models that cannot be read, that are flat or black, those beyond
a share of each shape and noun, and those near a held-out object of household.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pointalign.data.extra_duplicates import nearest_held_out, shape_families
from pointalign.data.extra_sources import PACKAGES, Candidate, find_packages, list_candidates
from pointalign.data.files.surface import sample_surface
from pointalign.data.household import XYZ_SCALE, load_household
from pointalign.data.household_build import FPS_BATCH, NUM_SAMPLED, thin_clouds, write_clouds
from pointalign.data.household_split import NEAR_DUPLICATE_DISTANCE
from pointalign.errors import DataError
from pointalign.progress import progress, say
from pointalign.storage import written_file

# A soldier's body wears a hundred uniforms, and helmets would outnumber all furniture.
MOST_PER_SHAPE = 5
MOST_PER_NOUN = 48
# The thinnest side over the longest. Models are either planes (a pond's surface, the back of a shield) or above 0.006.
FLATNESS = 0.004
BLACKNESS = 0.05
# The file is not shipped: a tenth larger than at household's level, and minutes sooner.
COMPRESSION_LEVEL = 6


@dataclass(frozen=True)
class SampledModel:
    """A candidate with its quantised cloud, (NUM_POINTS, 6) int32, and its extents along x, y, z in its own unit."""

    candidate: Candidate
    cloud: np.ndarray
    extents: np.ndarray


def build_extra(sources: Sequence[str | Path], out: str | Path) -> dict[str, int]:
    """Build the Parquet file of extra objects; the same packages give the same bytes.

    What is missing or left out is said on stderr.

    Args:
        sources: folders that the Debian packages were unpacked into, at least one.
        out: the Parquet file to write.

    Returns:
        How many objects were written, in all and per package, and how many were left out.

    Raises:
        DataError: when none of the packages is there, or nothing is left.
    """
    roots = find_packages([Path(source) for source in sources])
    for package in PACKAGES:
        if package not in roots:
            say(f"{package.name} is not there: the file is built without it")
    left_out: Counter[str] = Counter()
    candidates = [candidate for package, root in roots.items() for candidate in list_candidates(package, root)]
    chosen = most_of_each(candidates, [candidate.mesh for candidate in candidates])
    left_out["of a mesh and noun that others show"] = len(candidates) - len(chosen)
    models = _sample(sorted(chosen, key=lambda candidate: candidate.id), left_out)
    models = _far_from_held_out(models, left_out)
    if not models:
        raise DataError("no object of the packages is left; unpack them again")
    models, families = _spread(models, left_out)
    with written_file(Path(out)) as temporary:
        write_clouds(temporary, _columns(models, families), [model.cloud for model in models], COMPRESSION_LEVEL)
    for reason, count in (+left_out).items():
        say(f"left out {count}: {reason}")
    counts = Counter(model.candidate.package.name for model in models)
    return {"objects": len(models), **counts, "left_out": left_out.total()}


def most_of_each(candidates: Sequence[Candidate], shapes: Sequence[str]) -> list[Candidate]:
    """At most MOST_PER_SHAPE candidates of each shape and noun, in the order of a hash of their ids."""
    ranks = _ranks(candidates, shapes)
    return [candidate for candidate, rank in zip(candidates, ranks, strict=True) if rank < MOST_PER_SHAPE]


def _ranks(candidates: Sequence[Candidate], shapes: Sequence[str]) -> list[int]:
    """Each candidate's place among those of its shape and noun, in the order of a hash of their ids."""
    seen: Counter[tuple[str, str]] = Counter()
    ranks = [0] * len(candidates)
    for i in sorted(range(len(candidates)), key=lambda i: _hash(candidates[i])):
        key = (shapes[i], candidates[i].naming.noun)
        ranks[i] = seen[key]
        seen[key] += 1
    return ranks


def _sample(candidates: Sequence[Candidate], left_out: Counter[str]) -> list[SampledModel]:
    """Sample the candidates that can be read and are neither flat nor black."""
    models: list[SampledModel] = []
    with progress("sampling models", len(candidates)) as advance:
        for start in range(0, len(candidates), FPS_BATCH):
            batch: list[tuple[Candidate, np.ndarray]] = []
            clouds: list[np.ndarray] = []
            for candidate in candidates[start : start + FPS_BATCH]:
                try:
                    points = sample_surface(candidate.load(), NUM_SAMPLED, seed=0).points
                except DataError as error:
                    say(f"left out {candidate.id}: {error}")
                    left_out["cannot be read"] += 1
                    continue
                extents = np.ptp(points[:, :3], axis=0)
                if extents.min() < FLATNESS * extents.max():
                    left_out["flat"] += 1
                elif points[:, 3:].mean() < BLACKNESS:
                    left_out["black"] += 1
                else:
                    batch.append((candidate, extents))
                    clouds.append(points.astype(np.float32))
            if batch:
                thin = thin_clouds(np.stack(clouds))
                models += [SampledModel(c, cloud, extents) for (c, extents), cloud in zip(batch, thin, strict=True)]
            advance(len(candidates[start : start + FPS_BATCH]))
    return models


def _far_from_held_out(models: Sequence[SampledModel], left_out: Counter[str]) -> list[SampledModel]:
    if not models:
        return []
    held_out = load_household("test")
    distances, nearest = nearest_held_out(_xyz(models), np.stack([thing.points for thing in held_out]))
    for model, distance, number in zip(models, distances, nearest, strict=True):
        if distance <= NEAR_DUPLICATE_DISTANCE:
            say(f"left out {model.candidate.id}: at {distance:.3f} of the held-out {held_out[number].id}")
            left_out["near a held-out object"] += 1
    return [model for model, distance in zip(models, distances, strict=True) if distance > NEAR_DUPLICATE_DISTANCE]


def _spread(models: Sequence[SampledModel], left_out: Counter[str]) -> tuple[list[SampledModel], list[str]]:
    """At most MOST_PER_SHAPE models of each family and noun, and MOST_PER_NOUN of a noun: first one of each family."""
    candidates = [model.candidate for model in models]
    families = shape_families(
        [c.id for c in candidates], [c.mesh for c in candidates], [c.naming.noun for c in candidates], _xyz(models)
    )
    ranks = _ranks(candidates, families)
    by_noun: defaultdict[str, list[int]] = defaultdict(list)
    for i in sorted(range(len(models)), key=lambda i: (ranks[i], _hash(candidates[i]))):
        if ranks[i] < MOST_PER_SHAPE:
            by_noun[candidates[i].naming.noun].append(i)
    left_out["of a shape and noun that others show"] = len(models) - sum(map(len, by_noun.values()))
    kept = sorted(i for members in by_noun.values() for i in members[:MOST_PER_NOUN])
    left_out["of a noun that others show"] = sum(map(len, by_noun.values())) - len(kept)
    return [models[i] for i in kept], [families[i] for i in kept]


def _hash(candidate: Candidate) -> str:
    return hashlib.sha256(candidate.id.encode()).hexdigest()


def _xyz(models: Sequence[SampledModel]) -> np.ndarray:
    """(B, NUM_POINTS, 3) coordinates in the unit ball."""
    return np.stack([model.cloud[:, :3] for model in models]) / XYZ_SCALE


def _columns(models: Sequence[SampledModel], families: Sequence[str]) -> dict[str, pa.Array]:
    found = [model.candidate for model in models]
    folders = [candidate.path.split("/")[:-1] for candidate in found]
    sizes = [model.extents.tolist() if model.candidate.naming.metres else None for model in models]
    return {
        "id": pa.array([c.id for c in found]),
        "name": pa.array([c.path.rpartition("/")[2].replace("_", " ") for c in found]),
        "category": pa.array(["/".join(words) for words in folders]),
        "tags": pa.array(folders, pa.list_(pa.string())),
        "creator": pa.array([c.package.creator for c in found]),
        "licence": pa.array([c.package.licence for c in found]),
        "source": pa.array([c.package.name for c in found]),
        "size": pa.array(sizes, pa.list_(pa.float32())),
        "label": pa.array([c.naming.label for c in found], pa.string()),
        "noun": pa.array([c.naming.noun for c in found]),
        "family": pa.array(families),
    }

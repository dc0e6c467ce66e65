"""PointAlign: 3D vision-language models whose point tokens keep their geometry."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pointalign.alignment import AlignmentProjector, AlignmentRegularizer, alignment_loss
    from pointalign.data.files.cloud import PointCloud
    from pointalign.data.files.load import load_point_cloud
    from pointalign.data.household import load_household
    from pointalign.errors import PointAlignError
    from pointalign.models.pointalign import PointAlignConfig, PointAlignForConditionalGeneration
    from pointalign.models.processing import PointAlignProcessor
    from pointalign.pipelines import pipeline

__version__ = "0.1.0"

# peft imports bitsandbytes wherever it is installed, which then warns of a kernel that nobody needs.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

_HOMES = {
    "AlignmentProjector": "pointalign.alignment",
    "AlignmentRegularizer": "pointalign.alignment",
    "PointAlignConfig": "pointalign.models.pointalign",
    "PointAlignError": "pointalign.errors",
    "PointAlignForConditionalGeneration": "pointalign.models.pointalign",
    "PointAlignProcessor": "pointalign.models.processing",
    "PointCloud": "pointalign.data.files.cloud",
    "alignment_loss": "pointalign.alignment",
    "load_household": "pointalign.data.household",
    "load_point_cloud": "pointalign.data.files.load",
    "pipeline": "pointalign.pipelines",
}

__all__ = [
    "AlignmentProjector",
    "AlignmentRegularizer",
    "PointAlignConfig",
    "PointAlignError",
    "PointAlignForConditionalGeneration",
    "PointAlignProcessor",
    "PointCloud",
    "alignment_loss",
    "load_household",
    "load_point_cloud",
    "pipeline",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pointalign' has no attribute {name!r}")

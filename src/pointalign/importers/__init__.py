"""Published checkpoints as ours: one module a family."""

from pointalign.importers.assembly import Imported, export
from pointalign.importers.command import import_checkpoint
from pointalign.importers.minigpt3d import import_minigpt3d, load_minigpt3d
from pointalign.importers.pointllm import import_pointllm, load_pointllm
from pointalign.importers.tensors import ImportReport

__all__ = [
    "ImportReport",
    "Imported",
    "export",
    "import_checkpoint",
    "import_minigpt3d",
    "import_pointllm",
    "load_minigpt3d",
    "load_pointllm",
]

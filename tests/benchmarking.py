"""How the tests run the scripts in benchmarks/, at a tiny size and on one thread, and import those that are no modules."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from commands import Command

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def run_benchmark(name: str, *arguments: str) -> dict[str, Any]:
    """The last line of a benchmark at a tiny size."""
    process = Command("--size", "tiny", *arguments, script=BENCHMARKS / name)
    told, errors = process.communicate()
    assert process.returncode == 0, errors
    return json.loads(told.splitlines()[-1])


def load_script(path: Path) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

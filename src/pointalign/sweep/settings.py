"""What a sweep runs: one recipe, several arms that change it, several seeds of each; read from YAML."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from pointalign.config import Recipe, load_recipe, override_recipe, read_yaml
from pointalign.conversion import from_dict
from pointalign.errors import ConfigError


@dataclass
class Sweep:
    """A sweep file. Arms and seeds are crossed; with equal seeds all arms see the same batches from the same start."""

    base: str
    """A bundled recipe, or a YAML file beside the sweep's."""
    arms: dict
    """By name what an arm changes in the base, as a recipe file would; {} for nothing."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Of the runs of each arm."""
    overrides: dict = field(default_factory=dict)
    """What all arms change in the base."""
    against: str | None = None
    """The arm that all others are compared with; the first one when not given."""
    limit: int | None = None
    """Only so many held-out objects; all 100 when not given."""

    @property
    def reference(self) -> str:
        """The arm that the others are compared with."""
        return self.against or next(iter(self.arms))


def load_sweep(path: str | Path) -> tuple[Sweep, dict[tuple[str, int], Recipe]]:
    """Read a sweep file, and see that every recipe of it is one.

    Returns:
        The sweep, and the recipe of each arm and seed; seeds come one after the other, all arms in each.

    Raises:
        ConfigError: when the file is missing or not YAML, or a key or value in it is wrong.
    """
    file = Path(path)
    try:
        values = read_yaml(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}; give a sweep file in YAML") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not {"base", "arms"} <= values.keys():
        raise ConfigError(f"{file} is no sweep; it needs base (a recipe) and arms (by name what each changes)")
    sweep = from_dict(Sweep, values, str(file))
    _check(sweep, file)
    beside = file.parent / sweep.base
    base = override_recipe(
        load_recipe(beside if beside.is_file() else sweep.base), sweep.overrides, f"{file}: overrides"
    )
    recipes = {}
    for seed in sweep.seeds:
        for arm, changes in sweep.arms.items():
            changed = override_recipe(base, changes, f"{file}: arms: {arm}")
            recipes[arm, seed] = override_recipe(changed, {"name": arm, "seed": seed}, str(file))
    return sweep, recipes


def _check(sweep: Sweep, file: Path) -> None:
    if not sweep.arms or not sweep.seeds:
        raise ConfigError(f"{file}: arms and seeds hold at least one each")
    for arm, changes in sweep.arms.items():
        if not isinstance(arm, str):
            raise ConfigError(f"{file}: YAML reads the arm {arm!r} as no name; put it in quotes")
        if not re.fullmatch(r"\w[\w.-]*", arm):
            raise ConfigError(f"{file}: the arm {arm!r} becomes a folder; use letters, digits, dots and dashes")
        if not isinstance(changes, dict):
            raise ConfigError(f"{file}: arms: {arm} holds settings of its own; write `key: value` lines, or {{}}")
    if len(set(sweep.seeds)) < len(sweep.seeds):
        raise ConfigError(f"{file}: a seed stands twice in {sweep.seeds}; name each once")
    if sweep.reference not in sweep.arms:
        raise ConfigError(f"{file}: against names no arm: {sweep.against!r}; the arms are {', '.join(sweep.arms)}")
    if sweep.limit is not None and sweep.limit < 1:
        raise ConfigError(f"{file}: limit {sweep.limit} leaves no object; give 1 or more")

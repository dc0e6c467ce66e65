"""What the bundled recipes are, in words and numbers: for `pointalign recipes` and for docs/recipes.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pointalign.config import Recipe, load_recipe, recipe_head, recipe_names
from pointalign.errors import ConfigError
from pointalign.full_size import (
    ALIGNMENT_PROJECTOR,
    COUNTED,
    PUBLISHED,
    PartCount,
    count_recipe,
    count_weights,
    imported_model,
)
from pointalign.storage import write_text

PAGE_MARKS = ("<!-- tables: pointalign recipes --page -->", "<!-- end of tables -->")
STAGES = tuple(f"minigpt-3d-stage-{number}" for number in (1, 2, 3, 4))


def sums(counts: Mapping[str, PartCount]) -> PartCount:
    """Weights of all parts together."""
    return PartCount(sum(count.total for count in counts.values()), sum(count.trained for count in counts.values()))


def count_bundled() -> dict[str, dict[str, PartCount]]:
    """`count_recipe` of every bundled recipe; those that differ in nothing that is counted are counted once."""
    known: dict[str, dict[str, PartCount]] = {}
    counts = {}
    for name in recipe_names():
        recipe = load_recipe(name)
        loss = recipe.alignment
        parts = (recipe.model, recipe.trains, recipe.lora, recipe.qformer_lora, recipe.query_experts)
        counted = repr((parts, loss.weight > 0, len(loss.layers), loss.target, loss.depth))
        if counted not in known:
            known[counted] = count_recipe(recipe)
        counts[name] = known[counted]
    return counts


def tell_counts() -> dict[str, Any]:
    """Print the weights of every bundled recipe on stderr; what programs get of it."""
    counts = {name: sums(parts) for name, parts in count_bundled().items()}
    _print_counts("recipe", counts)
    return {"recipes": {name: count._asdict() for name, count in counts.items()}}


def tell_count(name: str) -> dict[str, Any]:
    """Print a recipe's weights on stderr, part by part; what programs get of it."""
    counts = count_recipe(load_recipe(name))
    _print_counts("part", {**counts, "all": sums(counts)})
    parts = {part: count._asdict() for part, count in counts.items()}
    return {"recipe": name, **sums(counts)._asdict(), "parts": parts}


def _print_counts(what: str, counts: Mapping[str, PartCount]) -> None:
    table = Table(what)
    for column in ("weights", "trained"):
        table.add_column(column, justify="right")
    for name, count in counts.items():
        table.add_row(name, f"{count.total:,}", f"{count.trained:,}")
    Console(stderr=True).print(table)


def recipes_markdown(counts: Mapping[str, Mapping[str, PartCount]]) -> str:
    """The table of recipes.

    Args:
        counts: of each recipe, see `count_recipe`. The first two lines of its head are what it is and what was published.
    """
    rows = []
    for name, parts in counts.items():
        recipe, total, (what, published, *_) = load_recipe(name), sums(parts), recipe_head(name)
        rates = recipe.optimizer
        rows.append(
            (
                f"`{name}`",
                what,
                published.removeprefix("Published: "),
                "nothing" if recipe.model.start_from is None else f"`{recipe.model.start_from}`",
                ", ".join(f"`{part}`" for part in recipe.trains),
                f"{rates.max_steps:,} x {_batches(recipe)}",
                f"{_rate(rates.learning_rate)} to {_rate(rates.min_learning_rate)}",
                f"{total.trained / 1e6:.2f} M",
                f"{total.total / 1e6:,.1f} M",
            )
        )
    head = ("recipe", "what it is", "published", "starts from", "trains")
    return _markdown((*head, "steps x batch", "learning rate", "trained", "of"), rows, right=3)


def _batches(recipe: Recipe) -> str:
    sets = recipe.data.sets
    sizes = "/".join(str(part.batch_size) for part in sets)
    return sizes if len(sets) == 1 else f"{sizes}, odds {':'.join(f'{part.odds:g}' for part in sets)}"


def _rate(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-")


def parts_markdown(counts: Mapping[str, Mapping[str, PartCount]]) -> str:
    """The table of parts: what each published stage trains, and how large the published models are.

    Args:
        counts: of the recipes, at least of `STAGES` and "pointalign".
    """
    with torch.device("meta"):
        pointllm = count_weights(imported_model(PUBLISHED["checkpoints/pointllm/7b"]))
    stages, aligned = [counts[name] for name in STAGES], counts["pointalign"]
    totals = {part: count.total for part, count in {**aligned, **stages[-1]}.items()}
    columns = {
        "MiniGPT-3D, PointAlign": totals,
        "trained in stage I": _trained(stages[0]),
        "II": _trained(stages[1]),
        "III": _trained(stages[2]),
        "IV": _trained(stages[3]),
        "any of I to IV": {part: max(_trained(stage).get(part, 0) for stage in stages) for part in totals},
        "in PointAlign": _trained(aligned),
        "PointLLM-7B": {part: count.total for part, count in pointllm.items()},
    }
    parts = [part for part in (*COUNTED, ALIGNMENT_PROJECTOR) if part in totals]
    rows = [(f"`{part}`", *(_number(column.get(part, 0)) for column in columns.values())) for part in parts]
    rows.append(("all", *(_number(sum(column.values())) for column in columns.values())))
    return _markdown(("part", *columns), rows, right=len(columns))


def _trained(counts: Mapping[str, PartCount]) -> dict[str, int]:
    return {part: count.trained for part, count in counts.items()}


def _number(value: int) -> str:
    return f"{value:,}" if value else ""


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]], right: int) -> str:
    """A table in Markdown whose last columns are numbers."""
    rule = ["---"] * (len(head) - right) + ["---:"] * right
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def page_tables() -> str:
    """Both tables of docs/recipes.md, from all bundled recipes."""
    counts = count_bundled()
    return f"{recipes_markdown(counts)}\n\n{parts_markdown(counts)}"


def rewrite_page(path: Path) -> None:
    """Put new tables between a page's two marks.

    Raises:
        ConfigError: when the page cannot be read or lacks its marks.
    """
    begin, end = PAGE_MARKS
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give the page docs/recipes.md") from error
    if begin not in text or end not in text:
        raise ConfigError(f"{path} has no tables to rewrite: it lacks the lines {begin} and {end}")
    before, after = text.partition(begin)[0], text.partition(end)[2]
    write_text(path, f"{before}{begin}\n\n{page_tables()}\n\n{end}{after}")

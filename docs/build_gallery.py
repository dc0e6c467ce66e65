"""Writes gallery.md and its pictures: what a model says of held-out objects and of the example files.

    pointalign evaluate                                                       # the bundled model
    python docs/build_gallery.py --evaluation runs/evaluation/household-135m

Which objects are shown is a rule, so that none is picked by hand: the first of every other class, then the mistakes that the
model was surest of. Answers are those of the evaluation, word for word; the example files are answered about here.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pointalign.data.files import load_point_cloud
from pointalign.data.household import load_household
from pointalign.demo.objects import picture_png
from pointalign.evaluation.report import cell, percent
from pointalign.evaluation.results import read_results
from pointalign.pipelines import pipeline

HERE = Path(__file__).parent
EXAMPLES = ("chair.glb", "oak_table.ply", "potted_plant.xyz")
MISTAKES = 4
COMMAND = "python docs/build_gallery.py --evaluation EVALUATION"


def shown(rows: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
    """Numbers of the objects that the rule shows: firsts of every other class, and the surest mistakes among the rest."""
    firsts = sorted({row["label"]: number for number, row in reversed(list(enumerate(rows)))}.values())[::2]
    wrong = [number for number, row in enumerate(rows) if not row["right"] and number not in firsts]
    return firsts, sorted(wrong, key=lambda number: rows[number]["margin"])[:MISTAKES]


def table(entries: Sequence[tuple[str, str, str, str, str]]) -> list[str]:
    """Picture, what it is, the class, the answer to "What is this?" and the caption, one row each."""
    lines = ["| | it is | class | What is this? | caption |", "| --- | --- | --- | --- | --- |"]
    for picture, truth, label, answer, caption in entries:
        lines.append(f"| ![]({picture}) | {cell(truth)} | {cell(label)} | {cell(answer)} | {cell(caption)} |")
    return lines


def example_entries(examples: Path, images: Path, model: str | None, labels: list[str]) -> list[tuple[str, ...]]:
    """What the model says of the example files."""
    caption, chat = pipeline("caption", model=model), pipeline("chat", model=model)
    classify = pipeline("classify", model=model, labels=labels)
    entries = []
    for name in EXAMPLES:
        file = examples / name
        (images / f"{file.stem}.png").write_bytes(
            picture_png(load_point_cloud(file, n_points=2048).array((0.5, 0.5, 0.5)))
        )
        best: Any = classify(file)[0]
        answer = chat(str(file), question="What is this?")["answer"]
        told = f"{best['label']} ({best['score']:.0%})"
        entries.append((f"images/gallery/{file.stem}.png", f"`{name}`", told, answer, caption(file)["caption"]))
    return entries


def build(evaluation: Path, out: Path, examples: Path, model: str | None = None) -> None:
    """Write `gallery.md` and `images/gallery`.

    Args:
        evaluation: folder of `pointalign evaluate` on the household objects, by likelihood.
        out: folder of the page.
        examples: folder of the example files.
        model: which answers about the example files; the bundled one when None.
    """
    classified = read_results(evaluation / "household-classification" / "likelihood")
    captioned = read_results(evaluation / "household-captioning")
    captions = {row["object_id"]: row["model_output"] for row in captioned["objects"]}
    rows, things = classified["objects"], {thing.id: thing for thing in load_household("test")}
    images = out / "images" / "gallery"
    images.mkdir(parents=True, exist_ok=True)

    def entry(number: int) -> tuple[str, str, str, str, str]:
        row = rows[number]
        thing = things[row["object_id"]]
        (images / f"{thing.id}.png").write_bytes(picture_png(thing.points))
        told = row["predicted"] if row["right"] else f"**{row['predicted']}**, not {row['label']}"
        return f"images/gallery/{thing.id}.png", thing.noun, told, row["model_output"], captions[thing.id]

    firsts, mistakes = shown(rows)
    labels = sorted({thing.label for thing in things.values()})
    page = [
        "# Gallery: what the bundled model says",
        "",
        f"Written by `{COMMAND}`; nothing is picked by hand. Accuracy over all held-out objects: "
        f"{percent(classified['accuracy'], classified['interval'])}, n = {classified['n']}. A class in bold is wrong.",
        "",
        "## Held-out objects: the first of every other class",
        "",
        *table([entry(number) for number in firsts]),
        "",
        "## Held-out objects: the mistakes it was surest of",
        "",
        *table([entry(number) for number in mistakes]),
        "",
        "## The example files",
        "",
        *table(example_entries(examples, images, model, labels)),  # pyright: ignore[reportArgumentType]
        "",
        "Pictures: bundled objects and examples by the creators that NOTICE and examples/README.md name.",
        "",
    ]
    (out / "gallery.md").write_text("\n".join(page), encoding="utf-8")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--model", help="another than the bundled one")
    given = parser.parse_args()
    build(given.evaluation, given.out, HERE.parent / "examples", given.model)


if __name__ == "__main__":
    main()

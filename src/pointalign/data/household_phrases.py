"""Phrasings of the questions and answers about household objects. {label} and {noun} come with their articles."""

from __future__ import annotations

# One group per simple_description conversation; the questions are ours but for the field's two usual prompts.
SIMPLE_QUESTIONS = (
    (
        "Describe this object in a sentence.",
        "Give a short description of this point cloud.",
        "Briefly describe this 3D object.",
        "Sum up this object in a few words.",
    ),
    ("What is this?",),
    (
        "What do you see in this point cloud?",
        "Summarize this 3D model briefly.",
        "How would you describe this 3D shape in short?",
        "Write a short caption for this object.",
        "Tell me in brief what this object is.",
    ),
)
DETAILED_QUESTIONS = (
    "Caption this 3D model in detail.",
    "Describe this object in detail.",
    "Give a detailed description of this point cloud.",
    "What can you tell me about this 3D object? Be thorough.",
    "Write a detailed caption for this 3D shape.",
)
CATEGORY_QUESTIONS = (
    "Which class of object is this?",
    "What category does this object belong to?",
    "What kind of object is it?",
    "Name the type of this object.",
)
COLOR_QUESTIONS = (
    "What color is it?",
    "What are its main colors?",
    "Which colors does this object have?",
    "How is the object colored?",
)
PROPORTION_QUESTIONS = (
    "What are its proportions?",
    "How would you describe its overall shape?",
    "Is it tall, flat or long?",
    "Describe the proportions of this object.",
)
WHAT_ANSWERS = (
    "This is {label}: {noun}.",
    "It is {label}, namely {noun}.",
    "The object is {label}: {noun}.",
    "This 3D model shows {label}: {noun}.",
    "The point cloud shows {label}, more exactly {noun}.",
)
# One color, then several.
COLOR_ANSWERS = (
    ("It is mainly {colors}.", "Its main color is {colors}.", "It is colored {colors}.", "Most of it is {colors}."),
    ("It is mainly {colors}.", "Its main colors are {colors}.", "It is colored {colors}.", "Most of it is {colors}."),
)
PART_ANSWERS = (
    "Its upper part is mostly {upper}, its lower part mostly {lower}.",
    "The top is mostly {upper} and the bottom mostly {lower}.",
    "Seen from top to bottom, it goes from {upper} to {lower}.",
)
PROPORTIONS = {
    "flat": (
        "It is flat, much thinner than it is wide.",
        "It lies flat, with very little height.",
        "Its shape is flat and broad.",
    ),
    "flat long": (
        "It is flat, long and narrow.",
        "It lies flat and is much longer than it is wide.",
        "Its shape is a flat, elongated strip.",
    ),
    "panel": (
        "It is thin and upright, like a panel.",
        "It stands upright and has very little depth.",
        "Its shape is an upright panel, wide but thin.",
    ),
    "panel tall": (
        "It is a tall and thin upright shape.",
        "It stands upright, taller than it is wide, and has very little depth.",
        "Its shape is a tall, thin panel.",
    ),
    "slender": (
        "It is tall and slender.",
        "It is slender, several times taller than it is wide.",
        "Its shape is tall and narrow, like a column.",
    ),
    "tall": (
        "It is clearly taller than it is wide.",
        "It is tall, its height exceeding its width and depth.",
        "Its shape is tall and upright.",
    ),
    "long": (
        "It is long and narrow.",
        "It is elongated, several times longer than it is deep.",
        "Its shape is long, with much less depth than length.",
    ),
    "low": (
        "It is low and wide.",
        "It is wider than it is tall, with a low shape.",
        "Its shape is low and broad.",
    ),
    "compact": (
        "It is compact, about as tall as it is wide and deep.",
        "Its proportions are compact, close to a cube.",
        "Its height, width and depth are about the same.",
    ),
    "wide": (
        "It is somewhat wider than it is tall.",
        "It is moderately wide, with less height than width.",
        "Its shape is broad, a little wider than it is tall.",
    ),
    "upright": (
        "It is a little taller than it is wide.",
        "It is upright, with somewhat more height than width.",
        "Its height exceeds its width slightly.",
    ),
    "shallow": (
        "It is about as tall as it is wide, with less depth.",
        "Its height and width are similar, its depth is smaller.",
        "Seen from its broad side it is about as tall as wide; it is less deep.",
    ),
}

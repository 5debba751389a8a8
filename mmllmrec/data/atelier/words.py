"""What the planted worlds are made of: levels of each factor, and the grammar that writes about them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Vocabulary:
    """One world's levels. Hue, pattern and backdrop are seen and never written; material, occasion and maker are
    written and never seen; kind is both."""

    hues: dict[str, Colour]
    patterns: tuple[str, ...]
    backdrops: tuple[str, str]
    kinds: tuple[str, ...]
    materials: tuple[str, ...]
    occasions: tuple[str, ...]
    makers: tuple[tuple[str, ...], tuple[str, ...]]  # ways to say the one, ways to say the other
    moods: tuple[str, ...]  # words that mean nothing for anyone's taste
    houses: tuple[str, ...]
    templates: tuple[str, ...]
    ground: Colour
    panel: Colour


ATELIER = Vocabulary(
    hues={
        "red": (200, 54, 50),
        "amber": (232, 160, 40),
        "green": (76, 148, 72),
        "teal": (32, 148, 160),
        "blue": (52, 88, 180),
        "violet": (134, 70, 160),
    },
    patterns=("plain", "striped", "dotted", "checked", "ringed", "slanted"),
    backdrops=("round", "square"),
    kinds=("vase", "lamp", "bowl", "clock", "bag", "chair"),
    materials=("walnut", "brass", "linen", "glass", "clay", "steel"),
    occasions=("weddings", "quiet evenings", "birthdays", "long journeys", "garden parties", "the first flat"),
    makers=(
        ("made by hand", "hand-finished in a small studio", "worked by one artisan", "shaped at the bench"),
        ("machine made", "cut on the production line", "turned out by the thousand", "built in the big factory"),
    ),
    moods=("calm", "bright", "modest", "tall", "curious", "plucky", "gentle", "proud"),
    houses=("Orell", "Maison Vey", "Tamsin and Co", "Kettle Lane", "Bruno Hatt", "Ilse Norr"),
    templates=(
        "A {kind} in {material}, {maker}. For {occasion}.",
        "{house} presents a {mood} {material} {kind}, {maker}, meant for {occasion}.",
        "Think of {occasion}: this {kind} of {material} was {maker}.",
        "{maker}, as {house} likes it. A {mood} {kind}, {material} throughout, at home in {occasion}.",
    ),
    ground=(246, 241, 232),
    panel=(222, 211, 194),
)

ATELIER_B = Vocabulary(
    hues={
        "rose": (222, 110, 142),
        "rust": (168, 84, 44),
        "lemon": (236, 214, 70),
        "moss": (112, 128, 52),
        "sky": (104, 176, 226),
        "navy": (38, 48, 104),
        "grey": (122, 124, 130),
    },
    patterns=("plain", "striped", "dotted", "checked", "ringed", "slanted"),
    backdrops=("round", "square"),
    kinds=("lamp", "chair", "bottle", "box", "cup", "bag", "clock"),
    materials=("oak", "marble", "silk", "copper", "cork", "paper", "wool"),
    occasions=("winter holidays", "a new office", "house guests", "camping", "name days", "reading"),
    makers=(
        ("crafted by hand", "signed by its maker", "carved one at a time", "from a family workshop"),
        ("pressed by robots", "from the assembly hall", "moulded in bulk", "printed in series"),
    ),
    moods=("quiet", "bold", "slender", "merry", "plain-spoken", "patient", "sunny"),
    houses=("Halden", "Petit Four", "Osk", "Marlow Brothers", "Nine Gates"),
    templates=(
        "{house}: {kind}, {material}. {maker}, and just right for {occasion}.",
        "For {occasion} we suggest this {mood} {kind}. {material}, {maker}.",
        "This {material} {kind} was {maker}. Bring it out for {occasion}.",
        "{maker} at {house}. A {kind} with a {mood} air, {material} all over, for {occasion}.",
    ),
    ground=(232, 238, 242),
    panel=(202, 212, 222),
)


def describe(vocabulary: Vocabulary, row: dict[str, int], rng: np.random.Generator) -> tuple[str, str]:
    """A title and a description of one item. They say kind, material, occasion and maker, and nothing that is seen."""
    v = vocabulary

    def pick(options: tuple[str, ...]) -> str:
        return options[int(rng.integers(len(options)))]

    said = {
        "kind": v.kinds[row["kind"]],
        "material": v.materials[row["material"]],
        "occasion": v.occasions[row["occasion"]],
        "maker": pick(v.makers[row["maker"]]),
        "mood": pick(v.moods),
        "house": pick(v.houses),
    }
    text = pick(v.templates).format(**said)
    title = f"{said['mood']} {said['material']} {said['kind']}"
    return title.capitalize(), text[0].upper() + text[1:]


def caption(vocabulary: Vocabulary, row: dict[str, int]) -> str:
    """What is to be seen in the picture, in words: for the pretraining of a vision tower, never in a catalogue."""
    v = vocabulary
    hue = list(v.hues)[row["hue"]]
    return f"a {hue} {v.patterns[row['pattern']]} {v.kinds[row['kind']]} on a {v.backdrops[row['backdrop']]} backdrop"

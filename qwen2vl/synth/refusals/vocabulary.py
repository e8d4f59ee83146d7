"""What the pictures of the task family `refusals` show: categories of objects, words, facts.

Nothing of it is in the frozen suite `honesty`, which holds out its objects, words and kinds of
facts. Objects of one list have little in common with those of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from random import Random

from qwen2vl.synth.shape_masks import MORE_SHAPE_KINDS, SHAPE_KINDS
from qwen2vl.synth.strings import load_words

__all__ = [
    "ALL_KINDS",
    "CHARACTERS",
    "FACTS",
    "ICON_CATEGORIES",
    "TEXTS",
    "THINGS",
    "are_related",
    "category_of",
    "sample_word",
]

ALL_KINDS = (*SHAPE_KINDS, *MORE_SHAPE_KINDS)
# Objects of names.tsv with little in common, in lists of one group each.
ICON_CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "bird": ("duck", "eagle", "flamingo", "peacock", "parrot", "rooster", "swan"),
    "animal": tuple(
        """
        dog cat horse cow pig monkey lion zebra giraffe camel kangaroo rabbit mouse koala panda
        snake crocodile whale dolphin shark crab lobster butterfly spider scorpion bat hedgehog
        """.split()
    ),
    "fruit": ("peach", "mango", "red apple", "melon", "tangerine", "coconut", "blueberries"),
    "vegetable": ("carrot", "broccoli", "eggplant", "cucumber", "onion", "potato", "garlic"),
    "vehicle": (
        *("taxi", "ambulance", "fire engine", "motorcycle", "locomotive", "racing car"),
        *("police car", "delivery truck", "motor scooter", "speedboat", "tram"),
    ),
    "musical instrument": ("accordion", "banjo", "flute", "maracas", "musical keyboard"),
    "tool": ("wrench", "screwdriver", "axe", "carpentry saw", "scissors"),
    "piece of clothing": ("t-shirt", "jeans", "dress", "necktie", "scarf", "socks", "gloves"),
    "building": ("castle", "church", "factory", "mosque", "stadium"),
    "flower": ("sunflower", "hibiscus", "lotus", "cherry blossom"),
}
THINGS = (
    *(name for names in ICON_CATEGORIES.values() for name in names),
    *("pizza", "hamburger", "pretzel", "croissant", "cookie", "birthday cake", "ice cream"),
    *("teapot", "spoon", "volcano", "tent", "rocket", "parachute", "skateboard", "luggage"),
    *("alarm clock", "compass", "rainbow", "snowflake", "tornado", "cloud", "Christmas tree"),
    *("trophy", "soccer ball", "kite", "yo-yo", "teddy bear", "puzzle piece", "game die"),
    *("sunglasses", "backpack", "lipstick", "megaphone", "radio", "battery", "laptop", "printer"),
    *("television", "flashlight", "newspaper", "paintbrush", "calendar", "magnet", "ladder"),
    *("microscope", "telescope", "syringe", "toothbrush", "broom", "bucket", "chair", "bathtub"),
    *("shopping cart", "fire extinguisher", "shield", "gear", "bomb", "boomerang", "window"),
)
CHARACTERS = {
    "letter": tuple("ABDEFGHJKLMNPQRTUVWYZ"),  # without those that resemble a digit or a shape
    "digit": tuple("23456789"),
}
TEXTS = ("letter", "digit", "number", "word")
# A subject of one of these may be called one of the other.
_RELATED = ({"bird", "animal"}, {"fruit", "vegetable"}, {"digit", "number"}, {"letter", "word"})

_PEOPLE = """
    Anna Ben Carol David Ella Finn Grace Henry Ivy Jack Laura Leo Lucy Marc Nina Noah Paula Peter
    Rosa Ruth Sam Sara Tim Tina Vera Victor Will Zoe
""".split()
_BRANDS = "Velko Nordan Tamiro Brixo Lumeta Kesto Arvana Zentro Molino Faber Rivo Solan".split()
_MATERIALS = "wood glass steel paper wool leather plastic stone cotton brass rubber silk".split()
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_MONTHS = "January February March April May June July August September October".split()


def are_related(category: str, other: str) -> bool:
    """Return whether a subject of one category could be called one of the other."""
    return category == other or {category, other} in _RELATED


def category_of(thing: str) -> str:
    """Return the category of one of THINGS; "object" if it has none."""
    return next((c for c, names in ICON_CATEGORIES.items() if thing in names), "object")


def sample_word(rng: Random) -> str:
    """Sample a word of three to eight letters, in one of three cases."""
    word = rng.choice(_words())
    return rng.choice((word, word.capitalize(), word.upper()))


def _measure(unit: str, low: int, high: int) -> Callable[[Random], str]:
    return lambda rng: f"{rng.randint(low, high)} {unit}"


def _one_of(values: Sequence[str]) -> Callable[[Random], str]:
    return lambda rng: rng.choice(values)


@cache
def _words() -> tuple[str, ...]:
    return tuple(word for word in load_words() if 3 <= len(word) <= 8)


# Task of refusals.json -> how a note writes the fact, and the value that is the answer.
FACTS: Mapping[str, tuple[tuple[str, ...], Callable[[Random], str]]] = {
    "note_phone": (
        ("Phone: {0}", "Tel. {0}", "Call {0}"),
        lambda rng: f"{rng.randint(200, 999)}-{rng.randint(1000, 9999)}",
    ),
    "note_length": (("Length: {0}", "{0} long"), _measure("cm", 11, 240)),
    "note_height": (("Height: {0}", "{0} tall"), _measure("cm", 11, 240)),
    "note_speed": (("Speed: {0}", "Top speed {0}"), _measure("km/h", 11, 320)),
    "note_size": (
        ("Size: {0}", "Size {0}"),
        _one_of(("S", "M", "L", "XL", *"36 38 42 44".split())),
    ),
    "note_code": (("Code: {0}", "Code {0}"), lambda rng: f"{rng.randint(1000, 99999)}"),
    "note_arrival": (
        ("Arrives at {0}", "Arrival: {0}"),
        lambda rng: f"{rng.randint(6, 22)}:{rng.randrange(0, 60, 5):02d}",
    ),
    "note_sale": (("Sale on {0}", "On sale {0}"), _one_of(_DAYS)),
    "note_ready": (
        ("Ready by {0}", "Ready: {0}"),
        lambda rng: f"{rng.randint(1, 28)} {rng.choice(_MONTHS)}",
    ),
    "note_stock": (("In stock: {0}", "{0} left"), lambda rng: str(rng.randint(2, 99))),
    "note_temperature": (("Keep at {0}", "Store at {0}"), _measure("C", 2, 30)),
    "note_material": (("Made of {0}", "Material: {0}"), _one_of(_MATERIALS)),
    "note_brand": (("Brand: {0}", "by {0}"), _one_of(_BRANDS)),
    "note_receiver": (("For: {0}", "For {0}"), _one_of(_PEOPLE)),
    "note_sender": (("From: {0}", "Sent by {0}"), _one_of(_PEOPLE)),
    "note_power": (("Power: {0}", "{0}"), _measure("W", 5, 900)),
    "note_distance": (("Distance: {0}", "{0} away"), _measure("km", 2, 90)),
    "note_page": (("See page {0}", "Page {0}"), lambda rng: str(rng.randint(2, 300))),
}

"""Caption templates of the procedural shapes: every template states every attribute.

A caption that left out, say, the position would make the picture a guess, and a verifier of
pictures made from it would measure luck. So all templates are complete and differ in wording only.
"""

import numpy as np

PLACES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "center": "in the center",
}
RELATION_PHRASES = {
    "left of": "to the left of",
    "right of": "to the right of",
    "above": "above",
    "below": "below",
}

SINGLE_TEMPLATES = (
    "a {size} {color} {shape} {place}, {background} background",
    "a {size} {color} {shape} on a {background} background, {place}",
    "{place}, a {size} {color} {shape} on a {background} background",
    "{size} {color} {shape} {place}, {background} background",
    "{background} background with a {size} {color} {shape} {place}",
    "a picture of a {size} {color} {shape} {place}, with a {background} background",
    "{a_color} {shape} that is {size}, {place} of a {background} picture",
    "there is a {size} {color} {shape} {place} of the {background} background",
)
PAIR_TEMPLATES = (
    "{first} {relation} {second}, {background} background",
    "{first} {phrase} {second} on a {background} background",
    "on a {background} background, {first} is {phrase} {second}",
    "{background} background with {first} {relation} {second}",
    "a picture of {first} {relation} {second}, with a {background} background",
    "two shapes on {background}: {first} {phrase} {second}",
    "there is {first} {relation} {second} on a {background} background",
)


def single_caption(
    rng: np.random.Generator, *, color: str, shape: str, size: str, position: str, background: str
) -> str:
    """One object: a randomly worded caption stating all five attributes."""
    return _pick(rng, SINGLE_TEMPLATES).format(
        color=color,
        a_color=_with_article(color),
        shape=shape,
        size=size,
        place=PLACES[position],
        background=background,
    )


def pair_caption(
    rng: np.random.Generator, *, first: str, second: str, relation: str, background: str
) -> str:
    """Two objects: `first` and `second` are noun phrases such as "large red circle"."""
    return _pick(rng, PAIR_TEMPLATES).format(
        first=_with_article(first),
        second=_with_article(second),
        relation=relation,
        phrase=RELATION_PHRASES[relation],
        background=background,
    )


def _pick(rng: np.random.Generator, templates: tuple[str, ...]) -> str:
    return templates[int(rng.integers(len(templates)))]


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"

"""What stands where in a scene, drawn at random, and in words: several captions, all of them true of the picture.

Lengths are fractions of the image side, x runs to the right and y runs down, so one description
serves every image size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

T = TypeVar("T")

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "cyan")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "crescent")
BACKDROPS = ("plain", "gradient", "noise", "stripes", "checks")

# Radii of the sizes that captions name. The gaps between them keep "small" and "large" true words.
RADII = {"small": (0.20, 0.24), "medium": (0.27, 0.31), "large": (0.35, 0.42)}
PAIR_RADII = {"small": (0.16, 0.18), "medium": (0.20, 0.22)}
MARGIN = 0.04  # kept free at the border, so that neither drawing nor a light crop cuts an object

# The largest turn in degrees. Small where a turn would make one shape look like another.
TURNS = {"star": 36.0, "crescent": 35.0, "triangle": 18.0, "heart": 18.0, "square": 14.0, "cross": 14.0}

SPREAD = 4  # times as long as the short side are pictures with two ends

_DRAWS = 64  # numbers drawn for one scene, more than any scene uses
_TWO_OBJECTS = 0.2  # the share of training scenes with a second object

# The words of the captions.
_FRAMES = (
    "{}",
    "a picture of {}",
    "a photo of {}",
    "a drawing of {}",
    "an image of {}",
    "there is {}",
    "this is {}",
    "you can see {}",
)
_SIZES = {"small": ("small", "small", "tiny", "little"), "large": ("large", "large", "big", "huge")}
_GROUNDS = {
    "plain": ("plain",),
    "gradient": ("shaded",),
    "noise": ("speckled", "noisy"),
    "stripes": ("striped",),
    "checks": ("checked", "chequered"),
}
_RELATIONS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
ENDS = {"left": ("on the left", "on the right"), "above": ("at the top", "at the bottom")}
"""How the two ends of a long picture are called, by the relation of the first to the second."""
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


class Draws:
    """The random numbers of one scene: a pure function of `(seed, index)`.

    Raw Philox output is used because numpy promises never to change that stream.
    """

    def __init__(self, seed: int, index: int) -> None:
        raw = np.random.Philox(key=np.array([seed, index], dtype=np.uint64)).random_raw(_DRAWS)
        self._next = iter(((raw >> 11) * 2.0**-53).tolist()).__next__

    def between(self, low: float = 0.0, high: float = 1.0) -> float:
        """One number in [low, high)."""
        return low + (high - low) * self._next()

    def choice(self, options: Sequence[T]) -> T:
        """One of `options`, all equally likely."""
        return options[int(self._next() * len(options))]


@dataclass(frozen=True, slots=True)
class Thing:
    """One coloured shape. `radius` bounds it, `turn` is in degrees, `tint` shifts red, green and blue."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    radius: float
    turn: float
    tint: tuple[float, float, float]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str | None:
        """'top left', 'centre', ...; None where the words would be open to doubt."""
        words = []
        for value, low, high in ((self.y, "top", "bottom"), (self.x, "left", "right")):
            if value < 0.37 or value > 0.63:
                words.append(low if value < 0.37 else high)
            elif not 0.43 <= value <= 0.57:
                return None
        return " ".join(words) or "centre"


@dataclass(frozen=True, slots=True)
class Backdrop:
    """A muted ground: `tone` is its colour, `contrast` (both 0..255) how far its pattern departs from it."""

    kind: str
    tone: tuple[float, float, float]
    contrast: float
    angle: float
    period: float
    shift_x: float
    shift_y: float


@dataclass(frozen=True, slots=True)
class Scene:
    """One or two things on a backdrop. With two, the first is `relation` ('left', ...) of the second."""

    backdrop: Backdrop
    things: tuple[Thing, ...]
    relation: str | None


def draw_single(draws: Draws, pair: tuple[str, str]) -> Scene:
    """A scene with one thing of the given (colour, shape), anywhere in the image."""
    backdrop = _draw_backdrop(draws)
    size = draws.choice(tuple(RADII))
    radius = draws.between(*RADII[size])
    edge = radius + MARGIN
    x, y = draws.between(edge, 1 - edge), draws.between(edge, 1 - edge)
    return Scene(backdrop, (_draw_thing(draws, pair, size, x, y, radius),), None)


def draw_any(draws: Draws, pairs: Sequence[tuple[str, str]]) -> Scene:
    """A training scene: mostly one thing, sometimes two that differ and stand in a relation."""
    if draws.between() >= _TWO_OBJECTS:
        return draw_single(draws, draws.choice(pairs))
    backdrop = _draw_backdrop(draws)
    position = int(draws.between(0, len(pairs)))
    first = pairs[position]
    second = pairs[(position + 1 + int(draws.between(0, len(pairs) - 1))) % len(pairs)]
    relation = draws.choice(("left", "right", "above", "below"))
    # Each has its half of the relation's axis; across it they stay close, so that one relation alone is true.
    middle = draws.between(0.32, 0.68)
    things = []
    for pair, lower in ((first, relation in ("left", "above")), (second, relation in ("right", "below"))):
        size = draws.choice(tuple(PAIR_RADII))
        radius = draws.between(*PAIR_RADII[size])
        along = draws.between(radius + MARGIN, 0.49 - radius)
        place = (along if lower else 1 - along, middle + draws.between(-0.06, 0.06))
        x, y = place if relation in ("left", "right") else reversed(place)
        things.append(_draw_thing(draws, pair, size, x, y, radius))
    return Scene(backdrop, tuple(things), relation)


def draw_ends(draws: Draws, relation: str, first: tuple[str, str], second: tuple[str, str]) -> Scene:
    """A scene with a thing in the first and one in the last square of a long picture, that is "left" of it or "above".

    The picture is the top, or the left, of a square with its long side.
    """
    backdrop = _draw_backdrop(draws)
    things = []
    for pair, begin in ((first, 0), (second, SPREAD - 1)):
        size = draws.choice(tuple(RADII))
        radius = draws.between(*RADII[size])
        along, across = (draws.between(radius + MARGIN, 1 - radius - MARGIN) for _ in range(2))
        place = (begin + along) / SPREAD, across / SPREAD
        x, y = place if relation == "left" else reversed(place)
        things.append(_draw_thing(draws, pair, size, x, y, radius / SPREAD))
    return Scene(replace(backdrop, period=backdrop.period / SPREAD), tuple(things), relation)


def _draw_backdrop(draws: Draws) -> Backdrop:
    # Dark, so that every colour is brighter than its ground: edges then look alike in all colours, and what a
    # model learns of a shape in one colour serves it in another.
    grey = draws.between(22, 58)
    return Backdrop(
        kind=draws.choice(BACKDROPS),
        tone=tuple(grey + draws.between(-10, 10) for _ in range(3)),
        contrast=draws.between(10, 18),
        angle=draws.between(0, 180),
        period=draws.between(0.14, 0.3),
        shift_x=draws.between(),
        shift_y=draws.between(),
    )


def _draw_thing(draws: Draws, pair: tuple[str, str], size: str, x: float, y: float, radius: float) -> Thing:
    most = TURNS.get(pair[1], 0.0)
    turn = draws.between(-most, most)
    tint = tuple(draws.between(-10, 10) for _ in range(3))
    return Thing(*pair, size, x, y, radius, turn, tint)


def word_scene(scene: Scene, draws: Draws) -> tuple[str, ...]:
    """Three to five different captions, the most telling one first and the shortest last.

    First the fullest, because retrieval reads the first caption by default and "a red circle" fits many
    pictures. The last caption of a scene with one thing names only its colour and shape.
    """
    *fuller, shortest = _word_pair(scene, draws) if scene.relation else _word_single(scene, draws)
    return (*(caption for caption in dict.fromkeys(fuller) if caption != shortest), shortest)


def _word_single(scene: Scene, draws: Draws) -> list[str]:
    """Two telling wordings, then two bare ones that name colour and shape alone.

    The bare ones are what teaches shapes: place, size, ground and colour are easier to see, and where every
    caption tells them a batch can be told apart without looking at shapes. They come in few wordings, so that
    the same thing twice in a batch often has the same caption, which `loss.duplicates` can see. None names a
    shape without its colour: "a star" is never a red one in training, and a model would learn just that.
    """
    thing = scene.things[0]
    sized = _sized(thing, draws)
    place, ground = _in_place(thing, draws), _on_ground(scene, draws)
    plain = _article(thing.name)
    partly = [plain + place, sized, plain + ground]
    if place:
        partly.append(f"{place.strip()}, {plain}")
    return [
        _framed(sized + place + ground, draws),
        _framed(draws.choice(partly), draws),
        draws.choice((thing.name, f"a {thing.shape} that is {thing.colour}", f"a {thing.shape} in {thing.colour}")),
        plain,
    ]


def _word_pair(scene: Scene, draws: Draws) -> list[str]:
    first, second = scene.things
    # The same fact from either side, and either may lead.
    stated = [(first, scene.relation, second), (second, _OPPOSITE[scene.relation], first)]
    if draws.between() < 0.5:
        stated.reverse()
    related = [f"{{}} {draws.choice(_RELATIONS[relation])} {{}}" for _, relation, _ in stated]
    (one, _, other), (two, _, rest) = stated
    fullest = related[0].format(_sized(one, draws), _sized(other, draws))
    return [
        _framed(fullest + _on_ground(scene, draws), draws),
        _framed(related[1].format(_article(two.name), _article(rest.name)), draws),
        related[0].format(_article(one.name), _article(other.name)),
        f"{_article(one.name)} and {_article(other.name)}",
    ]


def word_ends(scene: Scene, draws: Draws) -> tuple[str, ...]:
    """Three or four captions of both ends of a long picture, the shortest last."""
    (first, second), (here, there) = scene.things, ENDS[scene.relation]
    related = f"{_article(first.name)} {draws.choice(_RELATIONS[scene.relation])} {_article(second.name)}"
    captions = [
        _framed(f"{_sized(first, draws)} {here} and {_sized(second, draws)} {there}", draws),
        _framed(f"{_article(second.name)} {there} and {_article(first.name)} {here}", draws),
        related,
        _article(name_ends(scene.relation, (first.colour, first.shape), (second.colour, second.shape))),
    ]
    return tuple(dict.fromkeys(captions))


def name_ends(relation: str, first: tuple[str, str], second: tuple[str, str]) -> str:
    """'red star on the left and a blue circle on the right'."""
    here, there = ENDS[relation]
    return f"{' '.join(first)} {here} and {_article(' '.join(second))} {there}"


def _framed(words: str, draws: Draws) -> str:
    return draws.choice(_FRAMES).format(words)


def _sized(thing: Thing, draws: Draws) -> str:
    """'a big red circle'; a medium size goes without a word."""
    if thing.size not in _SIZES:
        return _article(thing.name)
    return _article(f"{draws.choice(_SIZES[thing.size])} {thing.name}")


def _in_place(thing: Thing, draws: Draws) -> str:
    """' in the top left', ' at the bottom', ...; empty where the place is open to doubt."""
    match thing.place:
        case None:
            return ""
        case "centre":
            return draws.choice((" in the centre", " in the middle"))
        case "left" | "right":
            return f" on the {thing.place}"
        case "top" | "bottom":
            return f" at the {thing.place}"
    return draws.choice((f" in the {thing.place}", f" in the {thing.place} corner"))


def _on_ground(scene: Scene, draws: Draws) -> str:
    return f" on a {draws.choice(_GROUNDS[scene.backdrop.kind])} background"


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"

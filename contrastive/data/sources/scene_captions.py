"""Word a scene: several captions of varied detail, all of them true of the picture."""

from contrastive.data.sources.scene_layout import Draws, Scene, Thing

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
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def word_scene(scene: Scene, draws: Draws) -> tuple[str, ...]:
    """Three to five different captions, the most telling one first and the shortest last.

    First the fullest, because retrieval reads the first caption by default and "a red circle" fits many
    pictures. The last caption of a scene with one thing names only its colour and shape.
    """
    captions = _word_pair(scene, draws) if scene.relation else _word_single(scene, draws)
    *fuller, shortest = captions
    different = dict.fromkeys(fuller)
    different.pop(shortest, None)
    return (*different, shortest)


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
    if draws.unit() < 0.5:
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


def _framed(words: str, draws: Draws) -> str:
    return draws.choice(_FRAMES).format(words)


def _sized(thing: Thing, draws: Draws) -> str:
    """'a big red circle'; a medium size goes without a word."""
    if thing.size not in _SIZES:
        return _article(thing.name)
    return _article(f"{draws.choice(_SIZES[thing.size])} {thing.name}")


def _in_place(thing: Thing, draws: Draws) -> str:
    """' in the top left', ' at the bottom', ...; empty where the place is open to doubt."""
    place = thing.place
    if place is None:
        return ""
    if place == "centre":
        return draws.choice((" in the centre", " in the middle"))
    if place in ("left", "right"):
        return f" on the {place}"
    if place in ("top", "bottom"):
        return f" at the {place}"
    return draws.choice((f" in the {place}", f" in the {place} corner"))


def _on_ground(scene: Scene, draws: Draws) -> str:
    return f" on a {draws.choice(_GROUNDS[scene.backdrop.kind])} background"


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"

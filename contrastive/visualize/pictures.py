"""All pictures of a model: which there are, how each is made, the folder that they are written to.

What the page says of them is in pictures.yaml.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from contrastive.errors import UserError
from contrastive.files import claim_folder, write_json, write_whole
from contrastive.models.encoders import unit_length
from contrastive.page import PARTS, data_uri, filled, html_page
from contrastive.visualize.draw_pictures import (
    draw_beside,
    draw_components,
    draw_embeddings,
    draw_filters,
    draw_maps,
    draw_match,
    draw_positions,
)
from contrastive.visualize.drawing import as_picture, as_uint8, colour_scale, over, png
from contrastive.visualize.pictured_model import PicturedModel
from contrastive.visualize.representations import (
    above_mean,
    effective_rank,
    filter_components,
    match_probabilities,
    mean_cosine,
    pca_colours,
    position_similarity,
    query_attention,
    reading_attention,
    rollout_reading,
    strongest_filters,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_FILTERS = 128
ATTENTION_CUT = 0.002
PEAKED = 10.0
"""Times uniform attention from which on a linear scale would leave nearly all patches black."""
UNIFORM = "attention, in multiples of uniform attention"
PAGE, RECORD, FORMAT = "index.html", "pictures.json", "contrastive-pictures-1"


@dataclass(frozen=True)
class Picture:
    """A picture with what the page says about it."""

    name: str
    """Of the file, without .png."""
    title: str
    reading: str
    """How to read it and what to conclude."""
    source: str
    png: bytes
    alt: str
    found: str
    """Its figures in words; may be empty."""


@dataclass(frozen=True)
class LeftOut:
    """A picture that this model or these inputs do not allow."""

    title: str
    reason: str


@dataclass(frozen=True)
class Drawn:
    """What the function of a picture makes of a model."""

    figure: "Figure"
    found: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    """What pictures.yaml has in braces, beyond the tower's options and `images`, `all_images` and `block`."""


def make_picture(name: str, pictured: PicturedModel) -> Picture | LeftOut:
    """Make one of `PICTURES`."""
    said, drawn = _texts()[name], PICTURES[name](pictured)
    if isinstance(drawn, str):
        return LeftOut(said["title"], drawn)
    fields = vars(pictured.tower.config) | {
        "images": _named(pictured.shown[1]),
        "all_images": _named(pictured.inputs.names),
        "block": pictured.block_name,
    }
    title, reading, source, alt = (
        said[what].format(**fields | drawn.fields) for what in ("title", "reading", "source", "alt")
    )
    image = png(drawn.figure, f"{title}, {pictured.name}")
    return Picture(name, title, reading, source, image, alt=f"{title}: {alt}.", found=drawn.found)


@cache
def _texts() -> dict[str, dict[str, str]]:
    return yaml.safe_load((files("contrastive.visualize") / "pictures.yaml").read_text("utf-8"))


def _named(names: tuple[str, ...]) -> str:
    return f"{len(names)} image{'s' * (len(names) > 1)} ({', '.join(names)})"


def attention(pictured: PicturedModel) -> Drawn:
    config, block = pictured.tower.config, pictured.block_name
    if pictured.layer is None and config.pool == "attention":
        reader = "the pooling probe attends to"
        what = "the learned probe of the attention pooling attends to"
    elif config.pool == "class":
        reader, what = f"the class token attends to in {block}", "the class token attends to"
    else:
        reader = f"the patches attend to on average in {block}"
        what = "all patches attend to on average (no token of a block stands for the image in this tower)"
    maps = pictured.maps(lambda seen: reading_attention(pictured.tower, seen, pictured.layer))
    return Drawn(_head_maps(pictured, maps), fields={"reader": reader, "what": what})


def attention_query(pictured: PicturedModel) -> Drawn:
    row, column = pictured.patch
    maps = pictured.maps(lambda seen: query_attention(pictured.tower, seen, pictured.patch, pictured.block))
    return Drawn(_head_maps(pictured, maps, pictured.patch), fields={"row": row, "column": column})


def _head_maps(pictured: PicturedModel, maps: torch.Tensor, marked: tuple[int, int] | None = None) -> "Figure":
    maps = torch.cat([maps.mean(dim=1, keepdim=True), maps], dim=1)
    labels = ["mean", *(f"head {number}" for number in range(1, maps.shape[1]))]
    # Over all maps, not one by one: colours of two heads, or of two images, are to be compared.
    peaked = bool(maps.flatten().nanquantile(1 - ATTENTION_CUT) > PEAKED)
    scale = colour_scale(maps, low=0.0, cut=ATTENTION_CUT, root=peaked)
    unit = f"{UNIFORM} (square-root scale)" if peaked else UNIFORM
    return draw_maps(*pictured.shown, maps, labels, scale, unit=unit, marked=marked)


def attention_rollout(pictured: PicturedModel) -> Drawn:
    maps = pictured.maps(lambda seen: rollout_reading(pictured.tower, seen))
    scale = colour_scale(maps, cut=ATTENTION_CUT)
    seen = [over(image, values, scale) for image, values in zip(pictured.shown[0], maps, strict=True)]
    there = maps[~maps.isnan()]
    found = f"Between {there.min():.2f} and {there.max():.2f} times uniform attention."
    return Drawn(draw_beside(*pictured.shown, seen, scale, UNIFORM), found)


def patch_colours(pictured: PicturedModel) -> Drawn:
    colours = pca_colours(pictured.patch_tokens)
    pictures = [as_uint8(as_picture(one)) for one in pictured.on_canvas(colours.rgb[0].T, 1.0)]
    shares = [f"{100 * share:.0f} %" for share in colours.explained.tolist()]
    found = f"Red, green and blue hold {', '.join(shares[:2])} and {shares[2]} of the variance."
    return Drawn(draw_beside(*pictured.shown, pictures), found)


def patch_values(pictured: PicturedModel) -> Drawn:
    untrained, trained = (unit_length(tokens).cpu() for tokens in pictured.first_patches)
    figure = draw_embeddings(untrained, trained, "patches")
    return Drawn(figure, _found(untrained, trained), {"first": pictured.inputs.names[0]})


def text_patches_difference(pictured: PicturedModel) -> Drawn | str:
    if missing := _no_texts(pictured, least=2):
        return missing
    maps, texts = pictured.text_maps
    maps = above_mean(maps)
    unit = "cosine of patch and text, minus the patch's mean over the texts"
    figure = draw_maps(*pictured.shown, maps, texts, colour_scale(maps, centre=True), unit=unit)
    return Drawn(figure, fields={"texts": "; ".join(texts)})


def text_patches(pictured: PicturedModel) -> Drawn | str:
    if missing := _no_texts(pictured):
        return missing
    maps, texts = pictured.text_maps
    counts = "Bright patches count for the image only where the pooling reads them: see the attention."
    if pictured.tower.config.pool == "average":
        counts = "The image's embedding is the patches' mean: brighter all over means a text that fits it better."
    figure = draw_maps(*pictured.shown, maps, texts, colour_scale(maps), unit="cosine of patch and text")
    return Drawn(figure, fields={"texts": "; ".join(texts), "counts": counts})


def image_text(pictured: PicturedModel) -> Drawn | str:
    if missing := _no_texts(pictured):
        return missing
    model, inputs = pictured.model, pictured.inputs
    cosines = (pictured.image_features @ pictured.text_features.T).cpu()
    scale, bias = model.logit_scale.detach().exp().cpu(), model.logit_bias
    probabilities = match_probabilities(cosines, scale, None if bias is None else bias.detach().cpu())
    if bias is None:
        loss, short = "each image's probabilities add up to 1: softmax over these texts", "softmax over the texts"
    else:
        loss, short = "each pair has a probability of its own: sigmoid, with the bias that training found", "sigmoid"
    figure = draw_match(inputs.canvas, inputs.texts, cosines, probabilities, inputs.own, f"probability ({short})")
    pairs = [(number, text) for number, text in enumerate(inputs.own) if text is not None]
    right = sum(cosines[number].argmax().item() == text for number, text in pairs)
    found = f"Of {len(pairs)} images, {right} are nearest to their own text." if pairs else ""
    return Drawn(figure, found, {"loss": loss, "texts": "; ".join(inputs.texts)})


def _no_texts(pictured: PicturedModel, least: int = 1) -> str | None:
    """Why there is no picture with texts, if so."""
    if not pictured.tokenizer:
        return "the model has no text tower, or its folder no tokenizer"
    if not pictured.inputs.texts:
        return "these images have no texts; give some, as --text 'a red circle' --text 'a blue star'"
    if len(pictured.inputs.texts) < least:
        return "one text has no others to differ from; give --text twice or more"
    return None


@torch.no_grad()
def embeddings(pictured: PicturedModel) -> Drawn | str:
    if len(pictured.inputs.images) < 2:
        return "one image has nothing to be compared with; give two or more"
    untrained = unit_length(torch.cat([pictured.untrained(batch) for batch in pictured.batches])).cpu()
    trained = pictured.image_features.cpu()
    return Drawn(draw_embeddings(untrained, trained, "images"), _found(untrained, trained))


def _found(untrained: torch.Tensor, trained: torch.Tensor) -> str:
    found = [f"effective rank {effective_rank(x):.1f}, mean cosine {mean_cosine(x):.2f}" for x in (untrained, trained)]
    most = f"The rank can be {min(trained.shape)} at most."
    return f"Untrained: {found[0]}. This model: {found[1]}. {most}"


def positions(pictured: PicturedModel) -> Drawn:
    kind = "learned" if pictured.tower.config.position == "learned" else "fixed sin-cos"
    return Drawn(draw_positions(position_similarity(pictured.tower).cpu()), fields={"kind": kind})


def components(pictured: PicturedModel) -> Drawn:
    found = filter_components(pictured.tower)
    shares, fresh = found.explained, filter_components(pictured.untrained).explained
    said = (
        f"The first holds {100 * shares[0]:.0f} % of the variance, the first ten {100 * shares[:10].sum():.0f} %; "
        f"of an untrained tower {100 * fresh[0]:.0f} % and {100 * fresh[:10].sum():.0f} %."
    )
    return Drawn(draw_components(found.filters), said)


def filters(pictured: PicturedModel) -> Drawn:
    strongest = strongest_filters(pictured.tower, MAX_FILTERS)
    count, total = len(strongest), pictured.tower.config.width
    return Drawn(draw_filters(strongest), fields={"which": "all" if count == total else f"the {count} strongest of"})


# In the order of the page. Each gives why the picture cannot be made, where it cannot.
PICTURES = {
    "attention": attention,
    "attention_query": attention_query,
    "attention_rollout": attention_rollout,
    "patch_colours": patch_colours,
    "patch_values": patch_values,
    "text_patches_difference": text_patches_difference,
    "text_patches": text_patches,
    "image_text": image_text,
    "embeddings": embeddings,
    "positions": positions,
    "filter_components": components,
    "filters": filters,
}


def claim(folder: Path) -> list[str]:
    """Return the names of the pictures that an earlier call left in a folder; files without its record are refused.

    Raises:
        UserError: it is a file, cannot be written, or holds files and none of them is this command's record.
    """
    record = claim_folder(folder, RECORD, "an earlier contrastive visualize", "give another --out")
    if record is None:
        return []
    names = record.get("files")
    if record.get("format") != FORMAT or not isinstance(names, list):
        raise UserError(f"{folder / RECORD} is not of an earlier contrastive visualize; give another --out")
    # A record that someone wrote by hand may name anything: nothing outside the folder is ours.
    return [name for name in names if str(name).endswith(".png") and Path(name).name == name]


def write_page(folder: Path, title: str, remark: str, pictures: Sequence[Picture], left_out: Sequence[LeftOut]) -> Path:
    """Write a PNG for each picture, pictures.json and index.html, which needs no other file; return the page.

    Pictures of an earlier call that are not made again are removed, other files are left alone.

    Raises:
        UserError: as `claim`.
    """
    earlier = claim(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Before the new ones: a picture of another model shall not lie beside a page that does not show it.
    for name in earlier:
        (folder / name).unlink(missing_ok=True)
    record = {
        "format": FORMAT,
        "files": [f"{picture.name}.png" for picture in pictures],
        "model": title,
        "found": {picture.name: picture.found for picture in pictures if picture.found},
        "left_out": {picture.title: picture.reason for picture in left_out},
    }
    write_json(folder / RECORD, record)
    for picture in pictures:
        write_whole(folder / f"{picture.name}.png", picture.png)
    body = filled(PARTS / "pictures.html.jinja", pictures=pictures, left_out=left_out, data_uri=data_uri)
    write_whole(folder / PAGE, html_page(title, remark, body, "pictures.css"))
    return folder / PAGE

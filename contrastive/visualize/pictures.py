"""All pictures of a model: which there are, how each is made, how to read it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from contrastive.models.encoders import unit_length
from contrastive.visualize.draw_pictures import (
    draw_beside,
    draw_components,
    draw_embeddings,
    draw_filters,
    draw_maps,
    draw_match,
    draw_positions,
)
from contrastive.visualize.drawing import Heat, png
from contrastive.visualize.pictured_model import PicturedModel
from contrastive.visualize.representations import (
    above_mean,
    effective_rank,
    filter_components,
    match_probabilities,
    mean_cosine,
    pca_colours,
    position_similarity,
    strongest_filters,
)

MAX_FILTERS = 128
ATTENTION_CUT = 0.002
PEAKED = 10.0
"""Times uniform attention from which on a linear scale would leave nearly all patches black."""
UNIFORM = "attention, in multiples of uniform attention"


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
    found: str = ""
    """Its figures in words."""


@dataclass(frozen=True)
class LeftOut:
    """A picture that this model or these inputs do not allow."""

    title: str
    reason: str


def attention_heads(pictured: PicturedModel) -> Picture:
    config = pictured.tower.config
    if pictured.layer is None and config.pool == "attention":
        title, what = "What the pooling probe attends to", "the learned probe of the attention pooling attends to"
    elif config.pool == "class":
        title, what = f"What the class token attends to in {pictured.block_name}", "the class token attends to"
    else:
        title = f"What the patches attend to on average in {pictured.block_name}"
        what = "all patches attend to on average (no token of a block stands for the image in this tower)"
    figure = _head_maps(pictured, pictured.reading, f"{title}, {pictured.name}")
    return Picture(
        name="attention",
        title=title,
        reading=f"Bright patches are what {what}; the first map is the mean of the {config.num_heads} heads. Heads "
        "that light up different things have divided the work; maps that are flat, or the same in each image, "
        "say that a head looks at places or at nothing, not at content.",
        source="weights: Vaswani et al. 2017, equation 1",
        png=png(figure),
        alt=f"{title}: heat maps over {_images(pictured)}.",
    )


def attention_query(pictured: PicturedModel) -> Picture:
    row, column = pictured.patch
    title = f"What one patch attends to in {pictured.block_name}"
    figure = _head_maps(pictured, pictured.queried, f"{title}, {pictured.name}", pictured.patch)
    return Picture(
        name="attention_query",
        title=title,
        reading=f"Bright patches are what the framed patch (row {row}, column {column}; --query picks another) attends "
        "to. Bright neighbours mean that a head mixes what lies close by; bright look-alikes far away, that it groups "
        "by content; the same spot in every image, that it has become a place to store something.",
        source="weights: Vaswani et al. 2017, equation 1; places to store: Darcet et al. 2024, 'Vision Transformers "
        "Need Registers'",
        png=png(figure),
        alt=f"{title}: heat maps over {_images(pictured)}.",
    )


def attention_rollout(pictured: PicturedModel) -> Picture:
    maps = pictured.rolled
    heat = Heat(maps, cut=ATTENTION_CUT)
    title = f"Attention rollout over all {len(pictured.tower.transformer.blocks)} blocks"
    over = [heat.over(image, values) for image, values in zip(pictured.shown[0], maps, strict=True)]
    figure = draw_beside(*pictured.shown, over, title=f"{title}, {pictured.name}", heat=heat, unit=UNIFORM)
    return Picture(
        name="attention_rollout",
        title=title,
        reading="Bright patches are where attention, followed back through all blocks, could have brought the image's "
        "embedding from. Look at the scale first: in deep towers it is narrow. It says what could be read, not what "
        "mattered: it leaves out the MLPs and the size of the values, and an untrained tower follows edges too.",
        source="Abnar & Zuidema 2020, 'Quantifying Attention Flow in Transformers'",
        found=f"Between {maps.min():.2f} and {maps.max():.2f} times uniform attention.",
        png=png(figure),
        alt=f"{title}: heat maps beside {_images(pictured)}.",
    )


def text_patches(pictured: PicturedModel) -> Picture | LeftOut:
    title = "Which patches look like a text"
    if missing := _no_texts(pictured):
        return LeftOut(title, missing)
    maps, texts = pictured.text_maps
    figure = draw_maps(
        *pictured.shown,
        maps,
        texts,
        Heat(maps),
        title=f"{title}, {pictured.name}",
        unit="cosine of patch and text",
    )
    counts = "Bright patches count for the image only where the pooling reads them: see the attention."
    if pictured.tower.config.pool == "average":
        counts = "The image's embedding is the patches' mean: brighter all over means a text that fits it better."
    return Picture(
        name="text_patches",
        title=title,
        reading="Cosines of each patch, brought alone into the space of the embeddings, with the text. "
        f"{counts} Where all the texts look alike, their differences tell more.",
        source=f"cosine of a single pooled token ({pictured.tower.config.pool})",
        png=png(figure),
        alt=f"{title}: heat maps over {_images(pictured)} for the texts: {'; '.join(texts)}.",
    )


def text_patches_difference(pictured: PicturedModel) -> Picture | LeftOut:
    title = "Which patches look more like a text than like the others"
    if missing := _no_texts(pictured, least=2):
        return LeftOut(title, missing)
    maps, texts = pictured.text_maps
    maps = above_mean(maps)
    heat = Heat(maps, centre=True)
    unit = "cosine of patch and text, minus the patch's mean over the texts"
    figure = draw_maps(*pictured.shown, maps, texts, heat, title=f"{title}, {pictured.name}", unit=unit)
    return Picture(
        name="text_patches_difference",
        title=title,
        reading="Each patch alone is brought into the space of the embeddings, as if the image had no other patch, and "
        "compared with the texts; what all the texts have in common is taken off. Red on the thing that a text names "
        "means that the tower knows where it is, which training never asked for; red all over the image, that each "
        "patch carries what the whole image shows. With other texts the colours change.",
        source=f"cosine of a single pooled token ({pictured.tower.config.pool}), minus each patch's mean over the "
        "texts; cf. Zhou et al. 2022, 'Extract Free Dense Labels from CLIP'",
        png=png(figure),
        alt=f"{title}: heat maps over {_images(pictured)} for the texts: {'; '.join(texts)}.",
    )


def patch_colours(pictured: PicturedModel) -> Picture:
    colours = pca_colours(pictured.patch_tokens)
    pictures = [one.unflatten(0, pictured.grid).cpu().numpy() for one in colours.rgb]
    title = "Patch tokens as colours"
    shares = [f"{100 * share:.0f} %" for share in colours.explained.tolist()]
    figure = draw_beside(*pictured.shown, pictures, title=f"{title} (PCA), {pictured.name}")
    return Picture(
        name="patch_colours",
        title=title,
        reading="Patches of like colour have like tokens, over all images together. One thing in one colour from image "
        "to image means that tokens carry what is there; colours that follow the place in the image, or that differ "
        "only between images, that they carry the place, or the whole image. Patches alike in colour and brightness "
        "are alike in an untrained tower, too: only what goes beyond that was learned.",
        source="Oquab et al. 2023, 'DINOv2', figure 1 (here without the second PCA on the foreground)",
        found=f"Red, green and blue hold {', '.join(shares[:2])} and {shares[2]} of the variance.",
        png=png(figure),
        alt=f"{title}: colour grids beside {_images(pictured)}.",
    )


def image_text(pictured: PicturedModel) -> Picture | LeftOut:
    title = "Images against texts"
    if missing := _no_texts(pictured):
        return LeftOut(title, missing)
    model, inputs = pictured.model, pictured.inputs
    cosines = (pictured.image_features @ pictured.text_features.T).cpu()
    scale, bias = model.logit_scale.detach().exp().cpu(), model.logit_bias
    probabilities = match_probabilities(cosines, scale, None if bias is None else bias.detach().cpu())
    if bias is None:
        loss, short = "each image's probabilities add up to 1: softmax over these texts", "softmax over the texts"
    else:
        loss, short = "each pair has a probability of its own: sigmoid, with the bias that training found", "sigmoid"
    figure = draw_match(
        inputs.images,
        inputs.texts,
        cosines,
        probabilities,
        inputs.own,
        title=f"{title}, {pictured.name}",
        probability_title=f"probability ({short})",
    )
    pairs = [(number, text) for number, text in enumerate(inputs.own) if text is not None]
    right = sum(cosines[number].argmax().item() == text for number, text in pairs)
    return Picture(
        name="image_text",
        title=title,
        reading="Columns are images, rows texts, an image's own text framed. Cosines say what is nearer to what; in "
        f"the probabilities {loss}. Rows bright all along are texts that fit anything: compare within a column.",
        source="Radford et al. 2021, figure 3; Zhai et al. 2023, equation 1",
        found=f"Of {len(pairs)} images, {right} are nearest to their own text." if pairs else "",
        png=png(figure),
        alt=f"{title}: cosines and probabilities of {_images(pictured, every=True)} with the texts: "
        f"{'; '.join(inputs.texts)}.",
    )


@torch.no_grad()
def embeddings(pictured: PicturedModel) -> Picture | LeftOut:
    title = "Embeddings of an untrained tower and of this one"
    if len(pictured.inputs.images) < 2:
        return LeftOut(title, "one image has nothing to be compared with; give two or more")
    untrained = unit_length(torch.cat([pictured.untrained(batch) for batch in pictured.pixels.split(8)])).cpu()
    trained = pictured.image_features.cpu()
    found = [f"effective rank {effective_rank(x):.1f}, mean cosine {mean_cosine(x):.2f}" for x in (untrained, trained)]
    return Picture(
        name="embeddings",
        title=title,
        reading="Left, an image a row, a dimension a column; right, the images' cosines. Stripes down the left picture "
        "are dimensions that say the same of each image. An untrained tower has many, and tells apart little more "
        "than bright from dark; a trained one whose cosines are still near 1 has collapsed, or these images are alike.",
        source="the same options, freshly drawn weights; effective rank: Roy & Vetterli 2007",
        found=f"Untrained: {found[0]}. This model: {found[1]}. The rank can be {min(trained.shape)} at most.",
        png=png(draw_embeddings(untrained, trained, title=f"{title}, {pictured.name}")),
        alt=f"{title}: heat maps of the values and of the cosines of {_images(pictured, every=True)}.",
    )


def positions(pictured: PicturedModel) -> Picture:
    similarity = position_similarity(pictured.tower).cpu()
    kind = pictured.tower.config.position
    title = f"Position embeddings against each other ({'learned' if kind == 'learned' else 'fixed sin-cos'})"
    return Picture(
        name="positions",
        title=title,
        reading="The map at row i, column j is the cosine of that position's embedding with all the others. Bright "
        "spots that wander with the position, with arms along row and column, mean that the tower has learned the "
        "grid; maps of noise, that it has not needed it or was not trained for long.",
        source="Dosovitskiy et al. 2021, figure 7 (centre)",
        png=png(draw_positions(similarity, title=f"Position embeddings, {pictured.name}")),
        alt=f"{title}: a grid of heat maps, one for each position.",
    )


def components(pictured: PicturedModel) -> Picture:
    found = filter_components(pictured.tower)
    shares, fresh = found.explained, filter_components(pictured.untrained).explained
    title = "Principal components of the patch filters"
    return Picture(
        name="filter_components",
        title=title,
        reading="Row by row, the largest first, grey is zero, each stretched to its own range. Smooth gradients, edges "
        "and colour contrasts are a basis for what patches contain; noise among the first ones means too little "
        "training or data. The last ones hold next to nothing.",
        source="Dosovitskiy et al. 2021, figure 7 (left)",
        found=f"The first holds {100 * shares[0]:.0f} % of the variance, the first ten {100 * shares[:10].sum():.0f} %"
        f"; of an untrained tower {100 * fresh[0]:.0f} % and {100 * fresh[:10].sum():.0f} %.",
        png=png(draw_components(found, title=f"{title}, {pictured.name}")),
        alt=f"{title}: a grid of small colour pictures.",
    )


def filters(pictured: PicturedModel) -> Picture:
    strongest = strongest_filters(pictured.tower, MAX_FILTERS)
    count, total = len(strongest), pictured.tower.config.width
    title = f"Patch filters, {'all' if count == total else f'the {count} strongest of'} {total}"
    return Picture(
        name="filters",
        title=title,
        reading="The filters as they are, largest norm first, in one scale where grey is zero. Plain grey ones are "
        "not used.",
        source="the patch embedding's weights",
        png=png(draw_filters(strongest, title=f"{title}, {pictured.name}")),
        alt=f"{title}: a grid of small colour pictures.",
    )


PICTURES: tuple[Callable[[PicturedModel], Picture | LeftOut], ...] = (
    attention_heads,
    attention_query,
    attention_rollout,
    patch_colours,
    text_patches_difference,
    text_patches,
    image_text,
    embeddings,
    positions,
    components,
    filters,
)
"""In the order of the page."""


def _head_maps(pictured: PicturedModel, maps: torch.Tensor, title: str, marked: tuple[int, int] | None = None):
    maps = torch.cat([maps.mean(dim=1, keepdim=True), maps], dim=1)
    labels = ["mean", *(f"head {number}" for number in range(1, maps.shape[1]))]
    # Over all maps, not one by one: colours of two heads, or of two images, are to be compared.
    peaked = bool(maps.flatten().quantile(1 - ATTENTION_CUT) > PEAKED)
    heat = Heat(maps, low=0.0, cut=ATTENTION_CUT, root=peaked)
    unit = f"{UNIFORM} (square-root scale)" if peaked else UNIFORM
    return draw_maps(*pictured.shown, maps, labels, heat, title=title, unit=unit, marked=marked)


def _no_texts(pictured: PicturedModel, least: int = 1) -> str | None:
    """Why there is no picture with texts, if so."""
    if pictured.tokenizer is None:
        return "the model has no text tower, or its folder no tokenizer"
    if not pictured.inputs.texts:
        return "these images have no texts; give some, as --text 'a red circle' --text 'a blue star'"
    if len(pictured.inputs.texts) < least:
        return "one text has no others to differ from; give --text twice or more"
    return None


def _images(pictured: PicturedModel, every: bool = False) -> str:
    names = pictured.inputs.names if every else pictured.shown[1]
    return f"{len(names)} image{'s' * (len(names) > 1)} ({', '.join(names)})"

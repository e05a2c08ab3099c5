"""A page that asks models about images: labels as bars, words as heat maps, texts as searches. Gradio draws it.

C labels, N images.
"""

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from contrastive.data.decode import decode
from contrastive.data.prompts import default_templates, fill, load_templates, template_sets
from contrastive.data.record import BadSample, Source
from contrastive.errors import UserError, needs
from contrastive.evaluate.classification import zero_shot_classifier
from contrastive.evaluate.embeddings import embed_texts, evaluating
from contrastive.evaluate.evaluated_model import EvaluatedModel
from contrastive.evaluate.search import nearest
from contrastive.interop.run_record import RunRecord
from contrastive.page import PARTS, data_uri, filled
from contrastive.visualize.drawing import shortened
from contrastive.visualize.representations import match_probabilities
from contrastive.visualize.word_maps import as_seen, check_text, word_map, words_of

if TYPE_CHECKING:
    import gradio as gr

FITTING, WHOLE = "fitting", -1
MOST_LABELS, MOST_BARS, MOST_FOUND = 1000, 20, 12
NAME_CHARACTERS = 16  # of an image, below it
THUMBNAIL = 256  # pixels of a shorter side
WITHIN, ALONE = "in its context", "alone"
QUIET = {"show_progress": "minimal", "api_visibility": "private", "trigger_mode": "always_last"}
NO_IMAGES = "Start the demo with images to search them: contrastive demo MODEL photos/"


@dataclass(frozen=True)
class LabelScores:
    """How labels fit an image; all are (C,)."""

    labels: tuple[str, ...]
    cosines: torch.Tensor
    shares: torch.Tensor
    """Softmax over the labels of scale · cosine: what chance gives is 1/C."""
    matches: torch.Tensor | None
    """Of a model trained with a bias: the probability that image and label belong together, each by itself."""


def labels_in(text: str) -> tuple[str, ...]:
    """Return the labels that stand in a text, one a line or between commas.

    Raises:
        UserError: none, or too many.
    """
    labels = tuple(dict.fromkeys(filter(None, (" ".join(part.split()) for part in re.split(r"[,;\n]", text)))))
    if not labels:
        raise UserError("type labels, as: cat, dog, bird")
    if len(labels) > MOST_LABELS:
        raise UserError(f"{len(labels)} labels; {MOST_LABELS} at most")
    return labels


def label_scores(bundle: Any, image: bytes, labels: Sequence[str], templates: Sequence[str]) -> LabelScores:
    """Compare an image with labels in prompts, as zero-shot classification does (CLIP, section 3.1).

    Args:
        bundle: anything with `model`, `preprocess` and `tokenizer`.
        image: the bytes of a file.

    Raises:
        UserError: an image that cannot be read.
    """
    model, preprocess = bundle.model, bundle.preprocess
    device = model.logit_scale.device
    pixels = preprocess.normalize(preprocess.collate([as_seen(image, preprocess)]).to(device))
    texts = zero_shot_classifier(model, bundle.tokenizer, labels, templates, device=device)
    with evaluating(model):
        cosines = model.encode_image(pixels).float().cpu() @ texts.T
        scale, bias = model.logit_scale.exp().cpu(), model.logit_bias
        shares = match_probabilities(cosines, scale, None)[0]
        matches = None if bias is None else match_probabilities(cosines, scale, bias.cpu())[0]
    return LabelScores(tuple(labels), cosines[0], shares, matches)


@dataclass(frozen=True)
class FoundImage:
    """An image that a search found: its place in the source, its key, and its cosine with the text."""

    index: int
    key: str
    cosine: float


def found_images(subject: EvaluatedModel, data: str, text: str, count: int) -> list[FoundImage]:
    """Return the images of `data` that are nearest to a text, the nearest first; at most `count`.

    Raises:
        UserError: a text that is empty, or too long for the model.
    """
    check_text(text, subject.bundle.tokenizer)
    images = subject.embeddings(data)
    query = embed_texts(subject.bundle.model, subject.bundle.tokenizer, [text], device=subject.device)
    best = nearest(query, images.features, count)
    rows = zip(best.rows[0].tolist(), best.scores[0].tolist(), strict=True)
    return [FoundImage(int(images.index[row]), images.keys[row], cosine) for row, cosine in rows]


def trained_on(bundle: Any) -> Source:
    """Return a source without samples, of the name of what the model was trained on as far as its run tells.

    `default_templates` goes by it where there is no other.
    """
    source, run = Source(), RunRecord.of(bundle.path)
    source.name = str(run.option("data.train")) if run else ""
    return source


def facts_of(bundle: Any) -> str:
    """Return in words how large a model is, what it sees, and what its loss made of a pair."""
    image, count = bundle.config.image, sum(parameter.numel() for parameter in bundle.model.parameters())
    size = f"{count / 1e6:,.0f} M" if count >= 1e7 else f"{count / 1e6:.1f} M"
    seen = f"{image.image_size}-pixel images, patches of {image.patch_size}"
    if image.native:
        most = bundle.preprocess.config.most_patches
        seen = f"images of any shape, {most} patches of {image.patch_size} at most"
    loss = "softmax" if bundle.model.logit_bias is None else "sigmoid"
    return f"{size} parameters, {seen}, {loss} loss"


@dataclass(frozen=True)
class Demo:
    """What the page asks, and of what: one model, or two. Each answer is HTML, a mistake one line of it."""

    models: tuple[EvaluatedModel, ...]
    known: Source
    """What tells the prompts that fit: the images, or what the first model was trained on."""
    data: str | None = None
    """The images as the models' sources have them; None: there are none to search."""
    templates: str | None = None
    """Set or file of the prompts that are chosen at first; None: those that fit."""

    def labels(self, path: str | None, text: str, prompts: str) -> str:
        """Return the labels of a text as bars of how they fit the image in a file."""
        try:
            labels, image = labels_in(text), _bytes_of(path)
            fit = default_templates(self.known, labels) if prompts == FITTING else load_templates(prompts)
            answers = [(model.name, label_scores(model.bundle, image, labels, fit)) for model in self.models]
        except UserError as error:
            return _answered(wrong=error)
        count = f"{len(fit)} prompts, as" if len(fit) > 1 else "Prompt:"
        note = f"{count} “{fill(fit, labels[0])[len(fit) // 2]}”; dashed: chance, {100 / len(labels):.1f} %."
        if len(labels) > MOST_BARS:
            note += f" The first {MOST_BARS} of {len(labels)} labels."
        if any(answer.matches is not None for _, answer in answers):
            note += " Share: among these labels. Match: the probability that image and label belong together at all."
        return _answered(answers, note, kind="labels")

    def words(self, path: str | None, sentence: str, word: int | None, how: str) -> str:
        """Return heat maps of a word of a sentence over the image in a file."""
        try:
            image = _bytes_of(path)
            place = word if word in range(len(words_of(sentence))) else None  # the sentence may be shorter by now
            of = [word_map(model.bundle, image, sentence, place, alone=how == ALONE) for model in self.models]
        except UserError as error:
            return _answered(wrong=error)
        if place is None:
            note = "Cosine of each patch with the whole sentence."
        elif how == ALONE or len(words_of(sentence)) == 1:
            note = f"Cosine of each patch with “{words_of(sentence)[place]}” as a text of its own."
        else:
            note = (
                f"What “{words_of(sentence)[place]}” changes: each patch's cosine with the sentence, minus that with "
                "the sentence without it. Red: this word speaks for the patch. Blue: against it."
            )
        return _answered([(model.name, one) for model, one in zip(self.models, of, strict=True)], note, kind="words")

    def found(self, text: str) -> tuple[list[list[tuple[Image.Image, str]]], list[list[int]], str]:
        """Return for each model the images nearest to a text with their captions, and their places; and a line."""
        nothing: list[list] = [[] for _ in self.models]
        if self.data is None:
            return nothing, nothing, _answered(wrong=NO_IMAGES)
        try:
            found = [found_images(model, self.data, text, MOST_FOUND) for model in self.models]
            shown = [[self._shown(one) for one in of] for of in found]
        except UserError as error:
            return nothing, nothing, _answered(wrong=error)
        count = len(self.models[0].embeddings(self.data).features)
        note = f"The nearest {len(found[0])} of {count:,} images, by cosine. Click one to take it as the image."
        return shown, [[one.index for one in of] for of in found], _answered(note=note)

    def image(self, index: int, min_side: int | None = None) -> np.ndarray:
        """Return an image of the data, (H, W, 3) uint8, reduced by `decode` where it may be; UserError as it says."""
        source = self.models[0].source(self.data)
        try:
            return decode(source[index].image, min_side=min_side).permute(1, 2, 0).numpy()
        except BadSample as bad:
            raise UserError(f"{source.name}: image {bad.key or index} cannot be read any more") from None

    def _shown(self, found: FoundImage) -> tuple[Image.Image, str]:
        small = Image.fromarray(self.image(found.index, THUMBNAIL))
        small.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))
        return small, f"{found.cosine:.3f} · {shortened([found.key], NAME_CHARACTERS // len(self.models))[0]}"

    def taken(self, index: int) -> np.ndarray | str:
        """Return an image of the data as the page takes it: the file of a JPEG, which as PNG would take seconds."""
        stored = self.models[0].source(self.data)[index].image
        if not (isinstance(stored, bytes) and stored.startswith(b"\xff\xd8\xff")):
            return self.image(index)
        with tempfile.NamedTemporaryFile(suffix=".jpg", dir=os.environ.get("GRADIO_TEMP_DIR"), delete=False) as file:
            file.write(stored)
        return file.name

    def any_image(self) -> np.ndarray | str:
        """Return one of the images at random."""
        return self.taken(int(np.random.default_rng().choice(self.models[0].embeddings(self.data).index)))


def _bytes_of(path: str | None) -> bytes:
    if path is None:
        raise UserError("drop an image first")
    return Path(path).read_bytes()


def _answered(answers: Sequence[tuple[str, Any]] = (), note: str = "", wrong: object = "", kind: str = "") -> str:
    fields = {"kind": kind, "most_bars": MOST_BARS, "data_uri": data_uri, "as_image": Image.fromarray}
    return filled(PARTS / "demo.html.jinja", answers=answers, note=note, wrong=str(wrong), **fields)


def page(demo: Demo) -> "gr.Blocks":
    """Return the page, not yet served. Nothing in it comes from elsewhere, and nothing of it goes elsewhere."""
    needs("the page", "gradio")
    import gradio as gr

    source = None if demo.data is None else demo.models[0].source(demo.data)
    with gr.Blocks(title="contrastive demo", analytics_enabled=False) as blocks:
        gr.Markdown("\n".join(["# contrastive demo", *(f"**{m.name}**: {facts_of(m.bundle)}  " for m in demo.models)]))
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                image = gr.Image(label="Image", sources=["upload", "clipboard"], format="png", elem_id="image")
                # Gradio's own would open it with any of Pillow's plugins; `decode` takes the bytes of known formats.
                image.preprocess = lambda payload: payload and payload.path
                if source is not None:
                    any_of = gr.Button(f"Any of the {len(source):,} images", size="sm", elem_id="any")
                    any_of.click(demo.any_image, None, image, **QUIET)
            with gr.Column(scale=2, min_width=320), gr.Tabs():
                with gr.Tab("Labels"):
                    _labels_tab(demo, image, source)
                with gr.Tab("Words"):
                    _words_tab(demo, image, source)
                with gr.Tab("Search"):
                    _search_tab(demo, image)
    return blocks


def _labels_tab(demo: Demo, image: "gr.Image", source: Source | None) -> None:
    import gradio as gr

    names = source.class_names if source and len(source.class_names or ()) <= MOST_BARS else None
    look = {"label": "Labels", "placeholder": "cat, dog, bird", "submit_btn": "Compare", "elem_id": "labels"}
    with gr.Row(equal_height=True):
        labels = gr.Textbox(", ".join(names or ()), scale=3, **look)
        sets = dict.fromkeys([FITTING, *([demo.templates] if demo.templates else []), *template_sets()])
        prompts = gr.Dropdown(list(sets), value=demo.templates or FITTING, label="Prompts", min_width=120)
    answer = gr.HTML(elem_id="bars", elem_classes="answers")
    asked = [labels.submit, prompts.input, image.change]
    gr.on(asked, demo.labels, [image, labels, prompts], answer, **QUIET)


def _words_tab(demo: Demo, image: "gr.Image", source: Source | None) -> None:
    import gradio as gr

    look = {"label": "Sentence", "placeholder": "a dog on the grass", "submit_btn": "Show", "elem_id": "sentence"}
    with gr.Row(equal_height=True):
        sentence = gr.Textbox(_a_caption(source), scale=3, **look)
        how = gr.Dropdown([WITHIN, ALONE], value=WITHIN, label="A word is compared", min_width=160)
    word = gr.Radio(_choices(sentence.value), value=WHOLE, label="Click a word", elem_id="word")
    answer = gr.HTML(elem_id="heat", elem_classes="answers")

    sentence.change(lambda text: gr.Radio(_choices(text), value=WHOLE), sentence, word, **QUIET)
    asked = [sentence.submit, word.input, how.input, image.change]
    gr.on(asked, demo.words, [image, sentence, word, how], answer, **QUIET)


def _choices(sentence: str) -> list[tuple[str, int]]:
    return [("the whole sentence", WHOLE), *((word, place) for place, word in enumerate(words_of(sentence)))]


def _a_caption(source: Source | None) -> str:
    """A caption of the first images that has words enough to choose from."""
    for index in range(min(20, len(source)) if source else 0):
        try:
            captions = source.captions(index)
        except BadSample:
            continue
        for caption in captions:
            if 2 < len(words_of(caption)) < 12:
                return caption
    return ""


def _search_tab(demo: Demo, image: "gr.Image") -> None:
    import gradio as gr

    text = gr.Textbox(label="Text", placeholder="a dog in snow", submit_btn="Search", elem_id="text")
    note = gr.HTML(_answered(wrong=NO_IMAGES) if demo.data is None else "", elem_id="note", elem_classes="answers")
    if demo.data is None:
        return
    galleries, places = [], [gr.State([]) for _ in demo.models]
    look = {"columns": 4 // len(demo.models), "object_fit": "contain", "height": "auto", "allow_preview": False}
    with gr.Row():
        for model in demo.models:
            galleries.append(gr.Gallery(label=model.name, buttons=[], format="png", elem_classes="found", **look))

    def search(text: str) -> list:
        shown, of, line = demo.found(text)
        return [*shown, *of, line]

    def chosen(places: list[int], clicked: gr.SelectData) -> np.ndarray | str:
        return demo.taken(places[clicked.index])

    text.submit(search, text, [*galleries, *places, note], **QUIET)
    for gallery, place in zip(galleries, places, strict=True):
        gallery.select(chosen, place, image, **QUIET)

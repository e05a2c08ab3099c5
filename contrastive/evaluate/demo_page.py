"""A page that asks models about images: labels as bars, words as heat maps, texts as searches. Gradio draws it."""

import errno
import os
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from contrastive.data.decode import decode
from contrastive.data.prompts import default_templates, fill, load_templates, template_sets
from contrastive.data.record import BadSample, Source
from contrastive.data.sources.paths import MAX_IMAGE_BYTES
from contrastive.errors import UserError, needs
from contrastive.evaluate.asking import FoundImage, facts_of, found_images, label_scores, labels_in
from contrastive.evaluate.evaluated_model import EvaluatedModel
from contrastive.page import PARTS, data_uri, filled
from contrastive.visualize.drawing import shortened
from contrastive.visualize.word_maps import word_map, words_of

if TYPE_CHECKING:
    import gradio as gr

FIRST_PORT = 7860
FITTING, WHOLE = "fitting", -1
MOST_BARS, MOST_FOUND = 20, 12
NAME_CHARACTERS = 16  # of an image, below it
THUMBNAIL = 256  # pixels of a shorter side
WITHIN, ALONE = "in its context", "alone"
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:"
)
QUIET = {"show_progress": "minimal", "api_visibility": "private", "trigger_mode": "always_last"}
NO_IMAGES = "Start the demo with images to search them: contrastive demo MODEL photos/"


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
            shown = [[(self._thumbnail(one.index), self._caption(one)) for one in of] for of in found]
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

    def _thumbnail(self, index: int) -> Image.Image:
        small = Image.fromarray(self.image(index, THUMBNAIL))
        small.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))
        return small

    def _caption(self, found: FoundImage) -> str:
        return f"{found.cosine:.3f} · {shortened([found.key], NAME_CHARACTERS // len(self.models))[0]}"

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

    def renewed(sentence: str) -> gr.Radio:
        return gr.Radio(_choices(sentence), value=WHOLE)

    sentence.change(renewed, sentence, word, **QUIET)
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

    text.submit(search, text, [*galleries, *places, note], **QUIET)
    for gallery, place in zip(galleries, places, strict=True):
        gallery.select(_chosen(demo), place, image, **QUIET)


def _chosen(demo: Demo):
    import gradio as gr

    def chosen(places: list[int], clicked: gr.SelectData) -> np.ndarray | str:
        return demo.taken(places[clicked.index])

    return chosen


class _OwnOnly:
    """Tells browsers to fetch nothing from elsewhere, whatever a page's template or a later Gradio asks for."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def sent(message: dict) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, sent)


def free_port(host: str, port: int | None) -> int:
    """Return the port, or the first free one from `FIRST_PORT`; UserError where it is taken, or none can be had."""
    wanted = range(FIRST_PORT, FIRST_PORT + 100) if port is None else (port,)
    for number in wanted:
        try:
            with socket.create_server((host, number)):
                return number
        except OverflowError:
            raise UserError(f"port is {number}; it must be at most 65535") from None
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise UserError(f"no page can be served at {host}, port {number}: {error.strerror}") from None
    taken = f"port {port} is" if port else f"ports {wanted[0]} to {wanted[-1]} are"
    raise UserError(f"{taken} taken; give another --port{', or none for a free one' if port else ''}")


def serve(blocks: "gr.Blocks", host: str, port: int) -> str:
    """Serve the page from threads of their own, on a free port; return its address. `blocks.close()` ends it."""
    import gradio as gr

    # Gradio asks its own server whether it is up, by way of a proxy where there is one.
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, [direct, "localhost", host]))
    _, address, _ = blocks.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        run_history=False,
        footer_links=[],
        max_file_size=MAX_IMAGE_BYTES,
        theme=gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=(PARTS / "demo.css").read_text("utf-8"),
        app_kwargs={"middleware": [(_OwnOnly, (), {})]},  # class, arguments, named ones
    )
    return address

"""Try a model in the browser: labels for an image, words on its patches, a search by text. Nothing leaves this machine.

    contrastive demo runs/mine
    contrastive demo runs/mine photos/
    contrastive demo runs/mine scenes:test --beside runs/other

MODEL is a run folder, a checkpoint folder or a model folder; with --beside every answer is that of both. IMAGES are a
folder of images, image files, or data as in training; they are embedded once, and kept as `contrastive evaluate` keeps
them. The page is for this machine alone; Ctrl-C ends it. It needs Gradio: pip install 'contrastive[demo]'
"""

import errno
import os
import signal
import socket
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

import contrastive
from contrastive.command_line import LoadingOptions, chosen_device
from contrastive.commands.evaluate_command import named
from contrastive.config import parse
from contrastive.data.prompts import load_templates
from contrastive.data.sources import announce
from contrastive.data.sources.image_files import open_images
from contrastive.data.sources.paths import MAX_IMAGE_BYTES
from contrastive.errors import UserError, needs
from contrastive.evaluate.demo_page import Demo, page, trained_on
from contrastive.evaluate.embedding_store import find_store
from contrastive.evaluate.evaluated_model import EvaluatedModel
from contrastive.interop.loading import results_folder
from contrastive.log import say, warn
from contrastive.option_types import Positive
from contrastive.page import PARTS

if TYPE_CHECKING:
    import gradio as gr

HERE, FIRST_PORT = "127.0.0.1", 7860
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:"
)


@dataclass(frozen=True, kw_only=True)
class DemoOptions(LoadingOptions):
    """Which model is asked, and of which images."""

    model: Annotated[Positional[Path], arg(metavar="MODEL")]
    """Folder of a run, checkpoint or model, or hf-hub:ORG/NAME."""
    images: Annotated[Positional[tuple[str, ...]], arg(metavar="[IMAGES ...]")] = ()
    """A folder of images, image files, or data, to search."""
    beside: Annotated[Path | None, arg(metavar="MODEL")] = None
    """A second model, shown beside the first."""
    templates: Annotated[str | None, arg(metavar="NAME|FILE")] = None
    """Prompts for labels: a set (imagenet, photo, ...), or one a line; none: those that fit."""
    limit: Positive[int | None] = None
    """Search a fixed random subset of N images."""
    cache: Annotated[Path | None, arg(metavar="DIR")] = None
    """Keep embeddings there; none: in MODEL/embeddings."""
    host: str = HERE
    """Address to serve at; 0.0.0.0 opens the page to the network."""
    port: Positive[int | None] = None
    """Port to serve at; none: the first free one from 7860."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("limit", "cache"):
            if getattr(self, name) is not None and not self.images:
                raise UserError(f"--{name} is of IMAGES, and there are none; give them after MODEL, or leave it out")


def load(options: DemoOptions) -> Demo:
    """Load the models and embed the images."""
    data, device = " ".join(options.images) or None, chosen_device(options.device)
    entries = named([options.model, *([options.beside] if options.beside else [])])
    if data and find_store(Path(data).expanduser()):
        raise UserError(f"{data} holds embeddings, which cannot be shown; give the images that they are of")
    sources = {data: open_images(options.images)} if data else {}
    for source in sources.values():
        announce(source)
    models = []
    for entry in entries:
        bundle = contrastive.load(entry.path, device=device)
        bundle.check_image_tower("there is no image to ask it of")
        bundle.check_text_tower("it cannot be asked in words; contrastive visualize shows what it sees")
        bundle.tokenizer([""])  # one that the folder lacks says so now
        cache = options.cache or results_folder(Path(entry.path)) / "embeddings"
        known = {"device": device, "sources": sources, "limit": options.limit}
        models.append(EvaluatedModel(entry.name, bundle, cache, **known, **options.loading()))
        if data and not len(models[-1].embeddings(data).features):
            raise UserError(f"{data}: none of its images could be read")
    known = sources[data] if data else trained_on(models[0].bundle)
    return Demo(tuple(models), known, data, options.templates)


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


def main(arguments: list[str]) -> None:
    options = parse(DemoOptions, arguments, prog="demo", description=__doc__)
    needs("the page", "gradio")
    if options.templates:
        load_templates(options.templates)
    port = free_port(options.host, options.port)
    if options.host not in (HERE, "localhost"):
        warn(f"--host {options.host}: whoever reaches this machine can use the page, and see the images")
    demo = load(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was dropped is removed
    with tempfile.TemporaryDirectory(prefix="contrastive-demo-") as dropped:
        # Read as Gradio is imported: no telemetry, and images that were dropped are gone when the page is.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": dropped}
        blocks = page(demo)
        try:
            say(f"open {serve(blocks, options.host, port)} in a browser; Ctrl-C ends it")
            threading.Event().wait()
        except KeyboardInterrupt:
            say("ended")
        finally:
            blocks.close(verbose=False)

"""One HTML page that needs no other file: its skeleton, its colours, its pictures. Nothing in it is fetched.

Also how a template becomes text, whether a page's or another file's.
"""

import base64
import io
from html import escape
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

import numpy as np
from PIL import Image

SMALL = 64  # pixels a side, as those of digits
PARTS = files("contrastive") / "pages"
"""Style sheets, scripts and templates: base.css for all pages, then those of what some of them hold."""


def html_page(title: str, remark: str, body: str, *parts: str) -> str:
    """Return a whole page: the title as its heading, the remark below it, then `body`.

    Args:
        title, remark: plain text. body: HTML, what came from outside already escaped.
        parts: names of files of `contrastive/pages`, as 'charts.css' and 'charts.js'; scripts run at the end.
    """
    style = "".join((PARTS / name).read_text("utf-8") for name in ("base.css", *parts) if name.endswith(".css"))
    script = "".join((PARTS / name).read_text("utf-8") for name in parts if name.endswith(".js"))
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style></head>\n<body><main>\n"
        f"<header><h1>{escape(title)}</h1>{f'<p>{escape(remark)}</p>' if remark else ''}</header>\n{body}\n</main>\n"
        + (f"<script>\n{script}</script>\n" if script else "")
        + "</body></html>\n"
    )


def filled(template: Traversable, **fields: Any) -> str:
    """Return a template of jinja2 with its fields; in one for HTML their text is escaped, no field may be missing."""
    from jinja2 import Environment, StrictUndefined

    is_html = ".html" in template.name
    strict = Environment(
        autoescape=is_html, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    return strict.from_string(template.read_text("utf-8")).render(**fields)


def data_uri(image: Image.Image | bytes, kind: str = "PNG") -> str:
    """Return a picture, or the bytes of its file, as the address of an <img>; `kind` is Pillow's name of the format."""
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        image.save(file, kind, quality=85)  # which PNG takes no notice of
        image = file.getvalue()
    return f"data:image/{kind.lower()};base64,{base64.b64encode(image).decode()}"


def thumbnail(image: np.ndarray, side: int = 128) -> tuple[str, bool]:
    """Return a picture (H, W, 3) uint8, at most `side` pixels a side, as the address of an <img>.

    Also whether it is to keep its pixels when it is enlarged, the <img> of class 'small'.
    """
    picture = Image.fromarray(np.ascontiguousarray(image))
    if max(picture.size) <= SMALL:
        return data_uri(picture), True
    picture.thumbnail((side, side))
    return data_uri(picture, "JPEG"), False

"""One HTML page that needs no other file: its skeleton, its colours, its pictures. Nothing in it is fetched."""

import base64
import io
from html import escape

from PIL import Image

# Light and dark: surfaces, text, six colours for series, right answers, heat. Every page of ours names these.
_STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #ffffff; --ink: #1d1f23; --soft: #62676f;
  --rule: #e3e3df; --c1: #2f6fde; --c2: #d9622b; --c3: #22927a; --c4: #9a55c4; --c5: #b8860b; --c6: #cf4a7f;
  --right: #17915f; --heat: #2f6fde; --on-strong: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --card: #1c1f25; --ink: #e7e8ea;
  --soft: #9aa0aa;
  --rule: #30343c; --c1: #6ea4ff; --c2: #f0935f; --c3: #4fc3a6; --c4: #c08be6; --c5: #d9b04a; --c6: #ee83ad;
  --right: #42c58d; --heat: #6ea4ff; --on-strong: #e7e8ea; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  font-variant-numeric: tabular-nums; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; letter-spacing: -0.005em; margin: 44px 0 4px; }
p { margin: 0 0 14px; color: var(--soft); max-width: 75ch; overflow-wrap: anywhere; }
a { color: inherit; }
small { color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
code { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; }
.list { width: 100%; }
.list th { text-align: left; font-weight: 500; color: var(--soft); font-size: 13px; }
.list th, .list td { padding: 6px 16px; border-top: 1px solid var(--rule); vertical-align: top; }
.list tr:first-child > * { border-top: 0; }
.list .n { text-align: right; }
img { display: block; max-width: 100%; }
img.small { image-rendering: pixelated; }
footer { margin-top: 44px; color: var(--soft); font-size: 13px; }
@media (max-width: 760px) { main { padding: 24px 14px 40px; } }
@media print { body { background: none; } .card { break-inside: avoid; } }
"""


def html_page(title: str, remark: str, body: str, *, style: str = "", script: str = "") -> str:
    """Return a whole page: the title as its heading, the remark below it, then `body`.

    Args:
        title, remark: plain text. body: HTML, what came from outside already escaped.
        style: CSS beyond what all pages share. script: JavaScript, run at the end.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{style}</style></head>\n<body><main>\n"
        f"<header><h1>{escape(title)}</h1>{f'<p>{escape(remark)}</p>' if remark else ''}</header>\n{body}\n</main>\n"
        + (f"<script>{script}</script>\n" if script else "")
        + "</body></html>\n"
    )


def data_uri(image: Image.Image | bytes, kind: str = "PNG") -> str:
    """Return a picture, or the bytes of its file, as the address of an <img>; `kind` is Pillow's name of the format."""
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        image.save(file, kind, quality=85)  # which PNG takes no notice of
        image = file.getvalue()
    return f"data:image/{kind.lower()};base64,{base64.b64encode(image).decode()}"

"""The folder that pictures are written to: PNG files and a page that needs no other file."""

import base64
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from contrastive.errors import UserError
from contrastive.visualize.pictures import LeftOut, Picture

PAGE, RECORD, FORMAT = "index.html", "pictures.json", "contrastive-pictures-1"

_STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #ffffff; --ink: #1d1f23; --soft: #62676f; --rule: #e3e3df; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14161a; --card: #1c1f25; --ink: #e7e8ea; --soft: #9aa0aa; --rule: #30343c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; letter-spacing: -0.005em; margin: 44px 0 4px; }
p { margin: 0 0 10px; color: var(--soft); max-width: 75ch; overflow-wrap: anywhere; }
p.found { color: var(--ink); }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 16px; font-size: 14px; }
a { color: inherit; }
figure { margin: 12px 0 0; padding: 14px; background: #ffffff; border: 1px solid var(--rule); border-radius: 10px;
  overflow-x: auto; }
img { display: block; max-width: 100%; height: auto; }
small { display: block; color: var(--soft); font-size: 13px; margin-top: 6px; }
li { color: var(--soft); }
@media (max-width: 760px) { main { padding: 24px 14px 40px; } img { max-width: none; } }
@media print { body { background: none; } figure { break-inside: avoid; } }
"""


def claim(folder: Path) -> None:
    """Refuse a folder that holds anything but earlier pictures.

    Raises:
        UserError: it is a file, or holds files and none of them is this command's record.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give another --out")
    if folder.is_dir() and any(folder.iterdir()) and _earlier(folder) is None:
        raise UserError(f"{folder} holds files that are not of an earlier visualize.py; give another --out")


def write_page(folder: Path, title: str, remark: str, pictures: Sequence[Picture], left_out: Sequence[LeftOut]) -> Path:
    """Write a PNG for each picture, index.html and pictures.json; return the page.

    Pictures of an earlier call that are not made again are removed, other files are left alone.

    Raises:
        UserError: as `claim`.
    """
    claim(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in _earlier(folder) or ():
        (folder / name).unlink(missing_ok=True)
    names = [f"{picture.name}.png" for picture in pictures]
    record = {
        "format": FORMAT,
        "files": names,
        "model": title,
        "found": {picture.name: picture.found for picture in pictures if picture.found},
        "left_out": {picture.title: picture.reason for picture in left_out},
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8", "backslashreplace")
    for name, picture in zip(names, pictures, strict=True):
        (folder / name).write_bytes(picture.png)
    page = folder / PAGE
    page.write_text(_page(title, remark, pictures, left_out), "utf-8", "backslashreplace")
    return page


def _earlier(folder: Path) -> list[str] | None:
    """Return the pictures that an earlier call left there; None where there was none."""
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
        if record["format"] != FORMAT:
            return None
        # A record that someone wrote by hand may name anything: nothing outside the folder is ours.
        return [name for name in record["files"] if name.endswith(".png") and Path(name).name == name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _page(title: str, remark: str, pictures: Sequence[Picture], left_out: Sequence[LeftOut]) -> str:
    links = "".join(f'<a href="#{picture.name}">{escape(picture.title)}</a>' for picture in pictures)
    missing = "".join(f"<li>{escape(picture.title)}: {escape(picture.reason)}</li>" for picture in left_out)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}: pictures</title>\n<style>{_STYLE}</style></head>\n<body><main>\n"
        f"<h1>{escape(title)}</h1>\n<p>{escape(remark)}</p>\n<nav>{links}</nav>\n"
        + "\n".join(_section(picture) for picture in pictures)
        + (f"\n<h2>Left out</h2>\n<ul>{missing}</ul>" if missing else "")
        + "\n</main></body></html>\n"
    )


def _section(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    found = f'<p class="found">{escape(picture.found)}</p>' if picture.found else ""
    return (
        f'<section id="{picture.name}"><h2>{escape(picture.title)}</h2>\n<p>{escape(picture.reading)}</p>{found}\n'
        f'<figure><img alt="{escape(picture.alt)}" src="data:image/png;base64,{data}"></figure>\n'
        f"<small>Source: {escape(picture.source)}.</small></section>"
    )

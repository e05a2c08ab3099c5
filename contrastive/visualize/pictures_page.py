"""The folder that pictures are written to: PNG files and a page that needs no other file."""

from collections.abc import Sequence
from pathlib import Path

from contrastive.errors import UserError
from contrastive.files import claim_folder, write_json, write_whole
from contrastive.page import PARTS, data_uri, filled, html_page
from contrastive.visualize.pictures import LeftOut, Picture

PAGE, RECORD, FORMAT = "index.html", "pictures.json", "contrastive-pictures-1"


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
    """Write a PNG for each picture, index.html and pictures.json; return the page.

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

"""Caption images with a model that train.py made.

python examples/vlm/caption.py runs/vlm photo.jpg other.png
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from captioner import Captioner
from tyro.conf import Positional, arg

from contrastive.command_line import chosen_device
from contrastive.config import parse
from contrastive.data.decode import decode
from contrastive.data.record import BadSample
from contrastive.entry import run_script
from contrastive.errors import UserError


@dataclass(frozen=True)
class CaptionImagesOptions:
    """What captions what."""

    model: Annotated[Positional[Path], arg(metavar="DIR")]
    """The --out of train.py."""
    images: Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE ...")]
    """Image files."""
    device: Literal["cpu", "cuda"] | None = None
    """What to compute on; none: cuda where there is one."""


def main(arguments: list[str]) -> None:
    options = parse(CaptionImagesOptions, arguments, prog="vlm caption", description=__doc__)
    if not options.images:
        raise UserError("which images? python examples/vlm/caption.py DIR photo.jpg ...")
    device = chosen_device(options.device)
    images = [(path, read(path)) for path in options.images]
    model = Captioner.load(options.model, device)
    for path, image in images:
        pixels = model.encoder.preprocess(image)[None].to(device)
        print(f"{path}: {model.caption(pixels)[0]}")


def read(path: Path) -> bytes:
    data = path.read_bytes()
    try:
        decode(data)
    except BadSample as error:
        raise UserError(f"{path} is not an image that can be read ({error.reason})") from None
    return data


if __name__ == "__main__":
    run_script("caption.py", main)

"""Caption images with a model that train.py made.

python examples/vlm/caption.py runs/vlm photo.jpg other.png
"""

from pathlib import Path

from captioner import Captioner

from contrastive.command_line import Parser, chosen_device
from contrastive.data.decode import decode
from contrastive.data.record import BadSample
from contrastive.entry import run_script
from contrastive.errors import UserError


def main(arguments: list[str]) -> None:
    parser = Parser("caption.py", __doc__)
    parser.add_argument("model", type=Path, metavar="DIR", help="the --out of train.py")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    options = parser.parse_args(arguments)
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

"""Train on a folder of your own photos, and search them by words.

    python examples/your_own_photos.py                # makes a folder of pictures first
    python examples/your_own_photos.py my_photos      # holiday.jpg, and in holiday.txt what is on it

From scratch a model needs many thousands of photos to learn what things are. With fewer, begin with one that has seen
millions, and change a little of it: add `--init hf-hub:timm/ViT-B-16-SigLIP --lr 1e-5` to the flags of `pretrain`.
"""

import sys
from pathlib import Path

from PIL import Image

from contrastive.data.sources import open_source
from contrastive.entry import run


def make_photos(folder: Path, number: int) -> None:
    """Write 00000.jpg, with what is on it in 00000.txt beside, and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes = open_source("scenes:train")
    for index in range(number):
        record = scenes[index]
        Image.fromarray(record.image).save(folder / f"{index:05}.jpg", quality=95)
        (folder / f"{index:05}.txt").write_text("\n".join(record.captions))  # several captions: a line each


def main(photos: Path | None, work: Path, *flags: str, number: int = 4000) -> None:
    """Train on `photos`; flags are those of `contrastive pretrain`."""
    if photos is None:
        photos = work / "photos"
        make_photos(photos, number)

    # What will be learned from, and what looks wrong with it.
    run("inspect", [str(photos), "--out", str(work / "inspect")])

    # The recipe is the quickstart's, for pictures of 48 pixels; photos of real things want --model.image.image_size 112
    # and --model.image.patch_size 16, or a model by its name: --model ViT-B-32.
    train = ["--data", str(photos), "--loss", "sigmoid", "--epochs", "15", "--out", str(work / "run")]
    run("pretrain", [*train, *flags])

    # The nearest photos to each text, as a table and as a page with pictures, run/search.html.
    known = open_source(str(photos))
    texts = [known[0].captions[0], known[len(known) // 2].captions[0]]
    run("search", [str(work / "run"), str(photos), *texts, "--top", "3"])


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else None, Path("runs/your_own_photos"), *sys.argv[2:])

"""Score an image against texts with onnxruntime.

pip install numpy pillow tokenizers onnxruntime
python example.py photo.jpg "a red circle" "a blue star"
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image


def preprocess(image: Image.Image, options: dict) -> np.ndarray:
    """PIL image to (3, height, width) float32."""
    image, (height, width) = image.convert("RGB"), options["size"]
    filter = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[options["interpolation"]]
    short_side = options["short_side"]
    if options["resize"] == "crop":
        sides = [int(short_side * side / min(image.size)) for side in image.size]
    else:  # both sides to the size, whatever the shape
        sides = [short_side, short_side] if short_side else [width, height]
    image = image.resize(sides, filter)
    margins = sides[0] - width, sides[1] - height
    left, top = [{"round": round(m / 2), "floor": m // 2, "corner": 0}[options["cut"]] for m in margins]
    image = image.crop((left, top, left + width, top + height))
    pixels = (np.asarray(image, np.float32) / 255 - np.float32(options["mean"])) / np.float32(options["std"])
    return pixels.transpose(2, 0, 1)


def tokenize(texts: list[str], folder: Path) -> np.ndarray:
    """Texts to (len(texts), context_length) int64; tokenizer.json pads and cuts."""
    from tokenizers import Tokenizer

    encoded = Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(texts)
    return np.array([row.ids for row in encoded], np.int64)


def open_graph(file: Path):
    """An onnxruntime session."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    return onnxruntime.InferenceSession(str(file), options)


def main(photo: str, *texts: str) -> None:
    folder = Path(__file__).parent
    config = json.loads((folder / "config.json").read_text())
    pixels = preprocess(Image.open(photo), config["preprocess"])[None]
    image_tower = open_graph(folder / "image_tower.onnx")  # or image_tower_fp16.onnx
    image, *scores = image_tower.run(None, {"pixels": pixels})  # (1, E), unit length
    if scores:  # a classifier
        names = config["class_names"] or range(len(scores[0][0]))
        answers = dict(zip(names, scores[0][0], strict=True))
    elif texts:
        text_tower = open_graph(folder / "text_tower.onnx")
        text = text_tower.run(None, {"tokens": tokenize(list(texts), folder)})[0]  # (T, E), unit length
        logits = config["logit_scale"] * image @ text.T + config["logit_bias"]
        answers = dict(zip(texts, logits[0], strict=True))
    else:
        answers = {"embedding": image[0]}
    for name, value in answers.items():
        print(name, value)


if __name__ == "__main__":
    main(*sys.argv[1:])

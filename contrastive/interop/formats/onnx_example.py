"""Score an image against texts with onnxruntime.

pip install numpy pillow tokenizers onnxruntime
python example.py photo.jpg "a red circle" "a blue star"
"""

import json
import math
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
    return _normalised(image.crop((left, top, left + width, top + height)), options).transpose(2, 0, 1)


def patches(image: Image.Image, options: dict) -> tuple[np.ndarray, np.ndarray]:
    """PIL image to its patches, (N, P·P·3) float32, and their rows and columns, (2,) int64; the aspect is kept."""
    image, side = image.convert("RGB"), options["patch_size"]
    low, high = 1e-6, 100.0  # the largest scale at which the patches, rounded up, are not too many
    while high - low >= 1e-5:
        scale = (low + high) / 2
        fits = math.prod(max(1, math.ceil(length * scale / side)) for length in image.size) <= options["patches"]
        low, high = (scale, high) if fits else (low, scale)
    columns, rows = (max(1, math.ceil(length * low / side)) for length in image.size)
    filter = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[options["interpolation"]]
    pixels = _normalised(image.resize((columns * side, rows * side), filter), options)
    cut = pixels.reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4)
    return cut.reshape(rows * columns, -1), np.array([rows, columns])


def _normalised(image: Image.Image, options: dict) -> np.ndarray:
    return (np.asarray(image, np.float32) / 255 - np.float32(options["mean"])) / np.float32(options["std"])


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
    options, photo = config["preprocess"], Image.open(photo)
    if options["resize"] == "native":  # images of any shape
        values, grid = patches(photo, options)
        inputs = {"pixel_values": values[None], "spatial_shapes": grid[None]}
    else:
        inputs = {"pixels": preprocess(photo, options)[None]}
    image_tower = open_graph(folder / "image_tower.onnx")  # or image_tower_fp16.onnx
    image, *scores = image_tower.run(None, inputs)  # (1, E), unit length
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

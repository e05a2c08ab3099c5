"""Turn a labelled set into captions by prompts, learn from them, and score zero-shot with the same prompts.

    python examples/class_prompts.py
    python examples/class_prompts.py cifar10

A class name alone is a poor caption. Put into sentences, "a photo of a {}", it becomes text like any other: the model
learns them as pairs, and a new class needs no new head, only its name.
"""

import sys
from pathlib import Path

from contrastive.entry import run

PROMPTS = ["a scan of the digit {}", "the number {} written by hand", "a blurry {}", "{}"]


def main(data: str, work: Path, *flags: str) -> None:
    """Learn the classes of `data`, whose test part is 'DATA:test'; flags are those of `contrastive pretrain`."""
    prompts = work / "prompts.txt"
    work.mkdir(parents=True, exist_ok=True)
    prompts.write_text("\n".join(PROMPTS) if data == "digits" else "a photo of a(n) {}\na small picture of a(n) {}\n")

    # Captions of one class are right for all images of that class: in a batch they must not count as wrong answers.
    train = [
        "--data",
        data,
        "--eval",
        f"{data}:test",
        "--data.templates",
        str(prompts),
        "--loss.duplicates",
        "positive",
    ]
    # The scans are 8 pixels a side, and the other sets here 32 at most.
    side, patch = (8, 2) if data == "digits" else (32, 4)
    sizes = ["--model.image.image_size", str(side), "--model.image.patch_size", str(patch)]
    run("pretrain", [*train, *sizes, "--epochs", "15", "--out", str(work / "run"), *flags])

    # Each class is the mean of its prompts' embeddings; an image belongs to the nearest.
    run("zero-shot", [str(work / "run"), "--data", f"{data}:test", "--templates", str(prompts)])


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "digits", Path("runs/class_prompts"))

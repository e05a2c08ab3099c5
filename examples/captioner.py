"""Teach a model to write captions while it learns to tell them apart, and let it write.

    python examples/captioner.py

A small decoder reads the image tower's patch tokens and tells the caption word by word (CapPa, SigLIP 2). Its gradient
teaches the tower where things are, so it is worth having even where no captions are wanted.
"""

import sys
from pathlib import Path

from contrastive.entry import run


def main(work: Path, *flags: str) -> None:
    """Train with captions; flags are those of `contrastive pretrain`."""
    out = str(work / "run")
    # Without `keep` the decoder would live in checkpoints alone, and not in the final model.
    objective = ["--objectives", "caption", "--objectives.caption.keep"]
    run("pretrain", ["--data", "scenes", *objective, "--train.steps", "300", "--out", out, *flags])

    # The likeliest word at each place; with --beam 4 the likeliest caption of many.
    run("caption", [out, "scenes:test", "--limit", "5"])

    # In Python: how likely is a caption that somebody else wrote?
    from contrastive.data.sources import open_source
    from contrastive.models.generate import GenerationConfig
    from contrastive.objectives.captioner import load_captioner

    captioner = load_captioner(out, "cpu")
    preprocess, scenes = captioner.bundle.preprocess, open_source("scenes:test")
    pixels = preprocess([scenes[index].image for index in range(3)])  # (3, 3, H, W)
    texts, scores = captioner.write(pixels, GenerationConfig(), range(3))
    for index, (text, score) in enumerate(zip(texts, scores, strict=True)):
        print(f"{scenes[index].captions[0]!r} was written as {text!r} (log-likelihood {score:.2f})")


if __name__ == "__main__":
    main(Path("runs/captioner"), *sys.argv[1:])

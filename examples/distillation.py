"""A small student that learns from a larger teacher, beside the same student without one.

    python examples/distillation.py

Captions say which text belongs to an image. A teacher says more: how well each text of the batch fits, also the wrong
ones. The student learns to give the same (MobileCLIP's distillation loss).
"""

import json
import sys
from pathlib import Path

from contrastive.entry import run

SMALL = ["--model.image.width", "64", "--model.image.depth", "2", "--model.image.mlp_dim", "128"]
SMALL += ["--model.image.projection"]  # from its 64 channels to the 128 that both towers meet in


def main(work: Path, *flags: str, steps: int = 300) -> dict[str, float]:
    """Return acc@1 of teacher and students on scenes:test; flags are those of `contrastive pretrain`."""
    common = ["--data", "scenes", "--train.steps", str(steps), *flags]
    runs = {name: str(work / name) for name in ("teacher", "student_alone", "student_taught")}

    run("pretrain", [*common, "--out", runs["teacher"]])
    run("pretrain", [*SMALL, *common, "--out", runs["student_alone"]])
    # The teacher runs along, frozen; stored embeddings cost less: see `contrastive embed --views`.
    teacher = ["--objectives", "distill", "--teacher", runs["teacher"]]
    run("pretrain", [*SMALL, *common, *teacher, "--out", runs["student_taught"]])

    accuracy = {}
    for name, folder in runs.items():
        out = work / "zero_shot" / name
        run("zero-shot", [folder, "--data", "scenes:test", "--limit", "640", "--out", str(out)])
        accuracy[name] = json.loads((out / "zero_shot.json").read_text())["acc1"]
    print("  ".join(f"{name.replace('_', ' ')} {value:.1f} %" for name, value in accuracy.items()))
    return accuracy


if __name__ == "__main__":
    main(Path("runs/distillation"), *sys.argv[1:])

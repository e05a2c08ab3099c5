"""The trainers that benchmarks/contest.py compares, and what their models make of held-out photographs.

python benchmarks/contest_rivals.py '{"rival": "open_clip", ...}'      # trains, in a process of its own
"""

import csv
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import asdict, dataclass
from glob import glob
from pathlib import Path
from typing import Literal, get_args

import torch
import yaml
from PIL import Image

from contrastive.config import parse
from contrastive.errors import UserError
from contrastive.train.contrastive_task import PretrainConfig

RivalName = Literal["ours", "open_clip"]
RIVALS: tuple[RivalName, ...] = get_args(RivalName)
LossName = Literal["sigmoid", "softmax"]
REPOSITORY = Path(__file__).resolve().parents[1]
RECIPE = REPOSITORY / "configs/flickr8k.yaml"
OPEN_CLIP_VOCABULARY = 49408


@dataclass(frozen=True)
class Run:
    """One training run.

    lr_factor: multiplies the rival's own learning rate. samples: photographs seen, each with one caption, or with as
    many as the recipe shows at once. data: shards. work: a folder for files.
    """

    rival: RivalName
    loss: LossName
    lr_factor: float
    seed: int
    samples: int
    batch: int
    data: str
    work: str

    @property
    def folder(self) -> Path:
        name = f"{self.rival}-{self.loss}-lr{self.lr_factor:g}-seed{self.seed}-{self.samples}"
        return Path(self.work) / name


def train(run: Run, threads: int) -> dict[str, float]:
    """Train in a process of its own, on the CPU, unless that was done so; return its wall_seconds and cpu_seconds."""
    asked, done = {**asdict(run), "threads": threads, "recipe": RECIPE.read_text()}, run.folder / "done.json"
    kept = json.loads(done.read_text()) if done.exists() else {}
    if kept.get("asked") == asked:
        return kept["timing"]
    shutil.rmtree(run.folder, ignore_errors=True)
    run.folder.mkdir(parents=True)
    code = [sys.executable, __file__, json.dumps(asdict(run))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(REPOSITORY)}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    with (run.folder / "train.log").open("w") as log:
        status = subprocess.run(code, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
    if status:
        raise UserError(f"{run.folder.name} ended with status {status}; {run.folder / 'train.log'} says why")
    timing = json.loads((run.folder / "timing.json").read_text())
    done.write_text(json.dumps({"asked": asked, "timing": timing}))
    return timing


def train_ours(run: Run) -> None:
    """scripts/pretrain.py with the recipe, its own learning rates times the factor."""
    recipe = parse(PretrainConfig, [], RECIPE, prog="contest.py", description="").optimizer
    options = {
        **{"config": RECIPE, "loss": run.loss, "data.train": run.data, "run_folder": run.folder / "run"},
        **{"optimizer.lr": recipe.lr * run.lr_factor, "optimizer.muon_lr": recipe.muon_lr * run.lr_factor},
        **{"train.samples": run.samples, "train.global_batch_size": run.batch, "train.seed": run.seed},
        "train.log_every": 50,
    }
    flags = [text for name, value in options.items() for text in (f"--{name}", *str(value).split())]
    subprocess.run([sys.executable, REPOSITORY / "scripts/pretrain.py", *flags], check=True)


def train_open_clip(run: Run) -> None:
    """`open_clip_train.main` with its defaults for a ViT, on a table of all captions, and no option that slows it."""
    from open_clip_train.main import main

    table, rows = unpacked(run)
    if run.samples % rows:
        raise UserError(f"{run.samples} samples are no whole number of epochs of {rows} captions, as open_clip counts")
    _add_model()
    options = {
        **{"train-data": table, "dataset-type": "csv", "workers": 0, "device": "cpu", "precision": "fp32"},
        **{"model": "contest", "batch-size": run.batch, "epochs": run.samples // rows},
        **{"lr": 1e-3 * run.lr_factor, "warmup": run.samples // run.batch // 10, "grad-clip-norm": 1.0},
        **{"seed": run.seed, "logs": run.folder, "name": "run", "save-frequency": 0, "log-every-n-steps": 50},
    }
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    main([*flags, *(["--siglip"] if run.loss == "sigmoid" else [])])


def unpacked(run: Run) -> tuple[Path, int]:
    """Lay the run's photographs out as files beside a table with a row for each caption; return it and its rows."""
    folder = run.folder / "photographs"
    folder.mkdir()
    rows = []
    for name, photograph, captions in photographs(run.data):
        (folder / name).write_bytes(photograph)
        rows += [(str(folder / name), caption) for caption in captions]
    table = folder / "captions.csv"
    with table.open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([("filepath", "title"), *rows])
    return table, len(rows)


def photographs(shards: str):
    """Yield (name, JPEG bytes, captions) of each pair of KEY.jpg and KEY.json."""
    for shard in sorted(glob(shards)):
        with tarfile.open(shard) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
        for name in files:
            if name.endswith(".jpg"):
                yield name, files[name], json.loads(files[name.removesuffix(".jpg") + ".json"])["captions"]


@torch.inference_mode()
def embed(run: Run, shards: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the trained model's image features (N, E), text features (M, E) and each text's image, (M,)."""
    held_out = list(photographs(shards))
    images = [Image.open(io.BytesIO(photograph)).convert("RGB") for _, photograph, _ in held_out]
    texts = [caption for _, _, captions in held_out for caption in captions]
    owners = torch.tensor([place for place, (_, _, captions) in enumerate(held_out) for _ in captions])
    model, preprocess, tokenizer = (_our_model if run.rival == "ours" else _open_clip_model)(run)
    tokens, pixels = tokenizer(texts), torch.cat([preprocess(image)[None] for image in images])
    image_features = torch.cat([model.encode_image(part, normalize=True) for part in pixels.split(250)])
    return image_features, torch.cat([model.encode_text(part, normalize=True) for part in tokens.split(250)]), owners


def _our_model(run: Run):
    import contrastive

    bundle = contrastive.load(run.folder / "run")
    return bundle.model.eval(), lambda image: bundle.preprocess([image])[0], bundle.tokenizer


def _open_clip_model(run: Run):
    import open_clip

    _add_model()
    model, _, preprocess = open_clip.create_model_and_transforms("contest")
    (checkpoint,) = (run.folder / "run/checkpoints").glob("*.pt")
    weights = torch.load(checkpoint, map_location="cpu", weights_only=False)["state_dict"]
    weights.pop("logit_bias", None)  # of a sigmoid run; it changes no ranking
    model.load_state_dict(weights)
    return model.eval(), preprocess, open_clip.get_tokenizer("contest")


def _add_model() -> None:
    """Tell open_clip of towers of the sizes in our recipe: its own ViT and text transformer."""
    import open_clip

    ours = yaml.safe_load(RECIPE.read_text())["model"]
    image, text = ours["image"], ours["text"]
    vision = {"image_size": image["image_size"], "patch_size": image["patch_size"], "layers": image["depth"]}
    vision |= {"width": image["width"], "head_width": image["width"] // image["num_heads"]}
    vision |= {"mlp_ratio": image["mlp_dim"] / image["width"]}
    words = {"context_length": text["context_length"], "vocab_size": OPEN_CLIP_VOCABULARY, "width": text["width"]}
    words |= {"heads": text["num_heads"], "layers": text["depth"]}
    with tempfile.TemporaryDirectory() as folder:
        config = {"embed_dim": ours["embed_dim"], "vision_cfg": vision, "text_cfg": words}
        (Path(folder) / "contest.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder)


if __name__ == "__main__":
    asked, started = Run(**json.loads(sys.argv[1])), time.perf_counter()
    {"ours": train_ours, "open_clip": train_open_clip}[asked.rival](asked)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(each.ru_utime + each.ru_stime for each in used)
    (asked.folder / "timing.json").write_text(
        json.dumps({"wall_seconds": time.perf_counter() - started, "cpu_seconds": cpu})
    )

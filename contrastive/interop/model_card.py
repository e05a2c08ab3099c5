"""README.md of an exported model: what it is, where it comes from, what it scores, how it is loaded."""

import importlib.metadata
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import yaml

from contrastive.data.tokenizer import Tokenizer
from contrastive.interop.bundle import Absent, Bundle
from contrastive.interop.parity import Check
from contrastive.interop.run_record import RunRecord, public_name, without_places
from contrastive.interop.usage import usage
from contrastive.models import DualEncoder, ImageClassifier, TextModel

POOLS = {
    "class": "class token",
    "average": "mean of tokens",
    "attention": "attention head (MAP)",
    "eos": "end-of-text token",
    "last": "last position",
}


def model_card(
    bundle: Bundle, to: str, folder: Path, name: str, checks: Sequence[Check], notes: Sequence[str] = ()
) -> str:
    """Return the card.

    Args:
        to: the format. folder: as written in it. name: ORG/NAME or the folder's own name.
        checks: of the parity check. notes: what the format could not take along.
    """
    run = RunRecord.of(bundle.path)
    parts = [
        _front_matter(bundle, to),
        f"# {name.rpartition('/')[2]}",
        _what(bundle, to, run),
        "## Load it",
        usage(to, bundle, folder, name),
        "## Architecture",
        _architecture(bundle, to),
        *_training(run),
        *_results(run),
        "## The export",
        _export(to, checks),
        "## Limits",
        "\n".join(f"- {line[:1].upper()}{line[1:].rstrip('.')}." for line in (*_limits(bundle, run), *notes)),
        *_options(run),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(bundle: Bundle, to: str) -> str:
    model = bundle.model
    if isinstance(model, DualEncoder):
        task = "zero-shot-image-classification"
    elif _has_head(bundle, to):
        task = "image-classification"
    else:
        task = "feature-extraction" if isinstance(model, TextModel) else "image-feature-extraction"
    tags = ["contrastive", *_family(bundle)] + (["onnxruntime"] if to == "onnx" else [])
    # No licence: that is for whoever shares the model to say.
    described = {"library_name": to, "pipeline_tag": task, "tags": tags}
    return f"---\n{yaml.safe_dump(described, sort_keys=False).strip()}\n---"


def _family(bundle: Bundle) -> list[str]:
    if isinstance(bundle.model, DualEncoder):
        return ["siglip" if bundle.model.logit_bias is not None else "clip", "vision"]
    return [] if isinstance(bundle.model, TextModel) else ["vit", "vision"]


def _has_head(bundle: Bundle, to: str) -> bool:
    """Whether it classifies: transformers has no class for our head, and gets the tower alone."""
    return isinstance(bundle.model, ImageClassifier) and to != "transformers"


def _what(bundle: Bundle, to: str, run: RunRecord | None) -> str:
    model = bundle.model
    if isinstance(model, DualEncoder):
        loss = "sigmoid loss (SigLIP)" if model.logit_bias is not None else "softmax loss (CLIP)"
        kind = f"An image tower and a text tower with a shared embedding space, for the {loss}"
    elif _has_head(bundle, to):
        kind = f"A Vision Transformer that tells {model.config.num_classes:,} classes apart"
    else:
        kind = "A text tower" if isinstance(model, TextModel) else "An image tower (Vision Transformer)"
    if run is None:
        source = public_name(str(bundle.path))
        origin = f"Its weights come from `{source}`; nothing more is known here of how they were made."
    else:
        start = run.option("init")
        begun = f"Trained from {public_name(start)}" if start else "Trained from scratch"
        origin = f"{begun} with contrastive."
        if run.averaged:
            decay = run.option("train.ema_decay")
            origin += f" These are the averaged weights (exponential moving average, decay {decay})."
    return f"{kind}. {origin}"


def _architecture(bundle: Bundle, to: str) -> str:
    rows, model = [], bundle.model
    towers = {"image": getattr(model, "image_tower", None), "text": getattr(model, "text_tower", None)}
    towers = {name: tower for name, tower in towers.items() if tower is not None}
    described = {name: dict(_tower(name, tower, bundle)) for name, tower in towers.items()}
    for what in dict.fromkeys(what for facts in described.values() for what in facts):
        rows.append((what, *(facts.get(what, "") for facts in described.values())))
    table = _table(("", *(f"{name} tower" for name in towers)), rows)
    about = [f"Embeddings have {bundle.config.embed_dim:,} channels."]
    if isinstance(model, DualEncoder):
        about.append(f"Logit scale {model.logit_scale.exp().item():.2f}")
        about[-1] += "." if model.logit_bias is None else f", bias {model.logit_bias.item():.2f}."
    about.append(f"{_millions(model.parameters())} parameters in all.")
    if bundle.class_names and _has_head(bundle, to):
        about.append(f"Classes: {_some(bundle.class_names)}.")
    return f"{table}\n\n{' '.join(about)}"


def _tower(name: str, tower, bundle: Bundle) -> Iterable[tuple[str, str]]:
    config = tower.config
    yield "parameters", _millions(tower.parameters())
    if name == "image":
        yield "input", f"{' × '.join(map(str, tower.input_size))} pixels, patches of {config.patch_size}"
    else:
        yield "input", f"{config.context_length} tokens of {config.vocab_size:,}"
    yield "width, depth, heads, MLP", f"{config.width}, {config.depth}, {config.num_heads}, {config.mlp_dim}"
    yield "pooling", POOLS[config.pool]
    yield "activation", config.activation
    if name == "image":
        yield "positions", config.position
        if bundle.preprocess is not None and not isinstance(bundle.preprocess, Absent):
            options = bundle.preprocess.config
            how = {"squash": "squashed", "crop": "short side scaled, centre cut"}[options.resize]
            yield "preprocessing", f"{how}, {options.interpolation}; mean {options.mean}, std {options.std}"
    else:
        yield "attention", "causal" if config.causal else "both ways"
        yield "tokenizer", _tokenizer(bundle.tokenizer)


def _tokenizer(tokenizer: Tokenizer | Absent | None) -> str:
    if tokenizer is None or isinstance(tokenizer, Absent):
        return "none in this folder"
    kind = {"bpe": "BPE trained on its captions", "clip": "CLIP's BPE"}.get(tokenizer.kind, "of its own folder")
    return kind if tokenizer.clean == "none" else f"{kind}, texts cleaned first ({tokenizer.clean})"


def _training(run: RunRecord | None) -> Iterable[str]:
    if run is None:
        return
    option = run.option
    yield "## Data"
    images = f", {run.num_samples:,} samples" if run.num_samples else ""
    rows = [("trained on", f"{public_name(option('data.train'))}{images}")] if option("data.train") else []
    for what, name in (("prompts of classes", "data.prompts"), ("captions in", "data.caption_templates")):
        value = option(name)
        if value and value != ["{}"]:
            rows.append((what, ", ".join(value) if isinstance(value, list) else public_name(str(value))))
    if (option("data.share") or 1) != 1:
        rows.append(("share of the labels", str(option("data.share"))))
    rows.append(("augmentation", _augmentation(option("data.augment") or {})))
    yield _table(("", ""), rows)
    yield "## Recipe"
    yield _table(("", ""), list(_recipe(run)))


def _recipe(run: RunRecord) -> Iterable[tuple[str, str]]:
    option = run.option
    for what in ("loss", "optimizer", "schedule"):
        if option(what):
            yield what, _said(option(what))
    for what in ("mixup", "cutmix", "label_smoothing"):
        if option(what):
            yield what.replace("_", " "), str(option(what))
    batch, steps = option("train.global_batch_size"), run.step
    if batch:
        yield "batch", f"{batch:,}"
    if steps:
        seen = f", {steps * batch:,} samples seen" if batch else ""
        epochs = f" ({steps * batch / run.num_samples:.2g} epochs)" if batch and run.num_samples else ""
        yield "length", f"{steps:,} steps{seen}{epochs}"
    kept = {name: option(f"train.{name}") for name in ("precision", "max_grad_norm", "seed", "ema_decay")}
    if any(value is not None for value in kept.values()):
        yield "other", _said(kept)


def _results(run: RunRecord | None) -> Iterable[str]:
    if run is None or not run.results:
        return
    yield "## Results"
    rows = [(result.task, result.data, *result.written) for result in run.results]
    yield _table(("task", "data", "figure", "value", "95 % interval", "chance"), rows)


def _export(to: str, checks: Sequence[Check]) -> str:
    names = {"transformers": "transformers", "open_clip": "open_clip_torch", "timm": "timm", "onnx": "onnxruntime"}
    library = names[to]
    used = ", ".join(f"{name} {_version(name)}" for name in (library, "torch"))
    rows = [(check.what, check.kind, *check.written) for check in checks]
    written = f"Written on {datetime.now(UTC):%Y-%m-%d} by contrastive {_version('contrastive')}"
    table = _table(("", "measure", "found", "limit"), rows)
    return f"{written} and read back by {used}: the same images and texts through both.\n\n{table}"


def _limits(bundle: Bundle, run: RunRecord | None) -> Iterable[str]:
    if run is None or not run.results:
        yield "No figure of its quality is known here: measure it on your own data."
    else:
        yield "The figures are of the data named and of one training run; on other data they say nothing."
    if getattr(bundle.model, "image_tower", None) is not None:
        height, width = bundle.model.image_tower.input_size
        yield f"Images are made {height} × {width} pixels first: what is smaller than a few of those is lost."
    if getattr(bundle.model, "text_tower", None) is not None:
        yield f"Texts longer than {bundle.config.text.context_length} tokens are cut."
        if not isinstance(bundle.tokenizer, Absent) and bundle.tokenizer.kind == "bpe":
            yield "The vocabulary was learnt from its own captions: other words fall into pieces it has hardly seen."


def _options(run: RunRecord | None) -> Iterable[str]:
    if run is None:
        return
    options = {name: value for name, value in run.config.items() if name not in ("run_folder", "resume", "trackers")}
    text = yaml.safe_dump(without_places(options), sort_keys=False, width=110).strip()
    yield f"<details><summary>Every option of the run</summary>\n\n```yaml\n{text}\n```\n\n</details>"


def _said(options: dict | str) -> str:
    """'muon: lr 0.002, weight decay 0.1'."""
    if not isinstance(options, dict):
        return str(options)
    told = {name.replace("_", " "): value for name, value in options.items() if value is not None and name != "name"}
    said = [f"{name} {value}" for name, value in told.items()]
    return f"{options['name']}: {', '.join(said)}" if "name" in options else ", ".join(said)


def _augmentation(options: dict) -> str:
    """Those that do something."""
    said = []
    if list(options.get("crop_scale", (1, 1))) != [1, 1]:
        said.append("random crops of {} to {} of the area".format(*options["crop_scale"]))
    if options.get("flip"):
        said.append("mirrored")
    if options.get("rand_augment_ops"):
        said.append(f"RandAugment ({options['rand_augment_ops']}, {options.get('rand_augment_magnitude')})")
    if any(options.get("color_jitter", ())):
        said.append(f"colour jitter {options['color_jitter']} of {options.get('color_jitter_prob')}")
    if options.get("gray_prob"):
        said.append(f"grey {options['gray_prob']}")
    return ", ".join(said) or "none"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in line) + " |" for line in lines)


def _some(names: Sequence[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _millions(parameters) -> str:
    return f"{sum(parameter.numel() for parameter in parameters) / 1e6:,.2f} M"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(version unknown)"

"""README.md of an exported model: what it is, where it comes from, what it scores, how its library loads it."""

import importlib.metadata
import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from string import Template

import yaml

from contrastive.data.tokenizer import Tokenizer
from contrastive.interop.bundle import Absent, Bundle
from contrastive.interop.formats import onnx_example
from contrastive.interop.parity import Check
from contrastive.interop.run_record import RunRecord, public_name
from contrastive.models import DualEncoder, ImageClassifier, TextModel

POOLS = {
    "class": "class token",
    "average": "mean of tokens",
    "attention": "attention head (MAP)",
    "eos": "end-of-text token",
    "last": "last position",
}
PACKAGES = {"transformers": "transformers", "open_clip": "open_clip_torch", "timm": "timm", "onnx": "onnxruntime"}


def model_card(
    bundle: Bundle, to: str, folder: Path, name: str, checks: Sequence[Check], notes: Sequence[str] = ()
) -> str:
    """Return the card.

    Args:
        to: the format. folder: as written in it. name: ORG/NAME or the folder's own name.
        checks: of the parity check. notes: what the format could not take along.
    """
    run = RunRecord.of(bundle.path)
    task, family, kind = _kind(bundle, to)
    tags = ["contrastive", *family] + (["onnxruntime"] if to == "onnx" else [])
    # No licence: that is for whoever shares the model to say.
    described = yaml.safe_dump({"library_name": to, "pipeline_tag": task, "tags": tags}, sort_keys=False)
    parts = [
        f"---\n{described.strip()}\n---",
        f"# {name.rpartition('/')[2]}",
        f"{kind}. {_origin(bundle, run)}",
        "## Load it",
        *_usage(bundle, to, folder, name),
        "## Architecture",
        _architecture(bundle, to),
        *(() if run is None else _of_run(run)),
        "## The export",
        _export(to, checks),
        "## Limits",
        "\n".join(f"- {line[:1].upper()}{line[1:].rstrip('.')}." for line in (*_limits(bundle, run), *notes)),
        *(() if run is None else [_options(run)]),
    ]
    return "\n\n".join(parts) + "\n"


def _kind(bundle: Bundle, to: str) -> tuple[str, list[str], str]:
    """The hub's name of its task, tags of its family, and what it is in words."""
    model = bundle.model
    if isinstance(model, DualEncoder):
        family, loss = ("clip", "softmax") if model.logit_bias is None else ("siglip", "sigmoid")
        loss = f"{loss} loss ({'CLIP' if family == 'clip' else 'SigLIP'})"
        words = f"An image tower and a text tower with a shared embedding space, for the {loss}"
        return "zero-shot-image-classification", [family, "vision"], words
    if isinstance(model, TextModel):
        return "feature-extraction", [], "A text tower"
    if _has_head(bundle, to):
        words = f"A Vision Transformer that tells {model.config.num_classes:,} classes apart"
        return "image-classification", ["vit", "vision"], words
    return "image-feature-extraction", ["vit", "vision"], "An image tower (Vision Transformer)"


def _has_head(bundle: Bundle, to: str) -> bool:
    """Whether it classifies: transformers has no class for our head, and gets the tower alone."""
    return isinstance(bundle.model, ImageClassifier) and to != "transformers"


def _origin(bundle: Bundle, run: RunRecord | None) -> str:
    if run is None:
        source = public_name(str(bundle.path))
        return f"Its weights come from `{source}`; nothing more is known here of how they were made."
    start = run.option("init")
    origin = f"Trained from {public_name(start) if start else 'scratch'} with contrastive."
    if run.averaged:
        decay = run.option("train.ema_decay")
        origin += f" These are the averaged weights (exponential moving average, decay {decay})."
    return origin


def _architecture(bundle: Bundle, to: str) -> str:
    model = bundle.model
    towers = {name: getattr(model, f"{name}_tower", None) for name in ("image", "text")}
    described = {name: dict(_tower(name, tower, bundle)) for name, tower in towers.items() if tower is not None}
    facts = dict.fromkeys(fact for facts in described.values() for fact in facts)
    rows = [(fact, *(facts.get(fact, "") for facts in described.values())) for fact in facts]
    table = _table(("", *(f"{name} tower" for name in described)), rows)
    about = [f"Embeddings have {bundle.config.embed_dim:,} channels."]
    if isinstance(model, DualEncoder):
        bias = "" if model.logit_bias is None else f", bias {model.logit_bias.item():.2f}"
        about.append(f"Logit scale {model.logit_scale.exp().item():.2f}{bias}.")
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


def _of_run(run: RunRecord) -> Iterable[str]:
    yield from ("## Data", _table(("", ""), list(run.data())))
    yield from ("## Recipe", _table(("", ""), list(run.recipe())))
    if run.results:
        rows = [(result.task, result.data, *result.written) for result in run.results]
        yield from ("## Results", _table(("task", "data", "figure", "value", "95 % interval", "chance"), rows))


def _export(to: str, checks: Sequence[Check]) -> str:
    used = ", ".join(f"{name} {_version(name)}" for name in (PACKAGES[to], "torch"))
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


def _options(run: RunRecord) -> str:
    text = yaml.safe_dump(run.public_options(), sort_keys=False, width=110).strip()
    return f"<details><summary>Every option of the run</summary>\n\n```yaml\n{text}\n```\n\n</details>"


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


# How the library that an export is for loads it: code that is ready to run, templates of string.Template.
TEXTS = '["a photo of a cat", "a photo of a dog"]'
TRANSFORMERS = """
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("$name").eval()
processor = AutoProcessor.from_pretrained("$name")
inputs = processor(
    images=Image.open("photo.jpg"), text=$texts,
    padding="max_length", truncation=True, return_tensors="pt",
)
with torch.no_grad():
    logits = model(**inputs).logits_per_image
print($answer)
"""
TRANSFORMERS_IMAGE = """
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("$name").eval()
processor = AutoImageProcessor.from_pretrained("$name")
pixels = processor(Image.open("photo.jpg"), return_tensors="pt")
with torch.no_grad():
    features = model(**pixels).pooler_output
"""
TRANSFORMERS_TEXT = """
import torch
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("$name").eval()
tokenizer = AutoTokenizer.from_pretrained("$name")
tokens = tokenizer($texts, padding="max_length", truncation=True, return_tensors="pt")
with torch.no_grad():
    features = model(**tokens).pooler_output
"""
OPEN_CLIP = """
import open_clip
import torch
from PIL import Image

model, _, preprocess = open_clip.create_model_and_transforms("$place")
tokenizer = open_clip.get_tokenizer("$place")
model.eval()
with torch.no_grad():
    image = model.encode_image(preprocess(Image.open("photo.jpg"))[None], normalize=True)
    text = model.encode_text(tokenizer($texts), normalize=True)
    logits = model.logit_scale.exp() * image @ text.T$plus_bias
print($answer)
"""
TIMM = """
import timm
import torch
from PIL import Image

model = timm.create_model("$place", pretrained=True).eval()
# or, from the weights alone:
# timm.create_model("$architecture",
#     checkpoint_path="model.safetensors"$arguments)
options = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**options, is_training=False)
with torch.no_grad():
    pixels = transform(Image.open("photo.jpg").convert("RGB"))[None]
    patch_tokens = model.forward_features(pixels)
    $result
"""


def _usage(bundle: Bundle, to: str, folder: Path, name: str) -> Iterable[str]:
    """What the folder lacks for it, and the code; `name` is what the code calls the model."""
    for what, part in (("preprocessing options", bundle.preprocess), ("tokenizer", bundle.tokenizer)):
        if isinstance(part, Absent):
            yield f"This folder has no {what}, which its source had not either: that part of the code needs your own."
    if to == "onnx":
        yield (
            "The folder has this as `example.py`. Graphs with `_fp16` in their names compute in float16; inputs and "
            "outputs are float32 and int64 all the same."
        )
    yield f"```python\n{_code(bundle, to, folder, name)}\n```"


def _code(bundle: Bundle, to: str, folder: Path, name: str) -> str:
    model, has_bias = bundle.model, getattr(bundle.model, "logit_bias", None) is not None
    # With the sigmoid loss each pair has a probability of its own, with softmax the texts share them out.
    fields = {"answer": "logits.sigmoid()" if has_bias else "logits.softmax(dim=-1)"}
    fields |= {"name": name, "place": f"hf-hub:{name}" if "/" in name else f"local-dir:{name}", "texts": TEXTS}
    if to == "onnx":
        return Path(onnx_example.__file__).read_text().strip()
    if to == "transformers":
        alone = TRANSFORMERS_TEXT if isinstance(model, TextModel) else TRANSFORMERS_IMAGE
        code = TRANSFORMERS if isinstance(model, DualEncoder) else alone
    elif to == "open_clip":
        code, fields["plus_bias"] = OPEN_CLIP, " + model.logit_bias" if has_bias else ""
    else:
        config, code = json.loads((folder / "config.json").read_text()), TIMM
        arguments = {**config.get("model_args", {}), "num_classes": config.get("num_classes", 0)}
        fields["architecture"] = config["architecture"]
        fields["arguments"] = "".join(f",\n#     {key}={value!r}" for key, value in arguments.items())
        embedding = "embedding = model(pixels)  # not of unit length"
        fields["result"] = "scores = model(pixels)" if isinstance(model, ImageClassifier) else embedding
    return Template(code).substitute(fields).strip()

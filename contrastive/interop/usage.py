"""How an exported folder is loaded by the library it was written for: code for the model card, ready to run."""

import json
from pathlib import Path

from contrastive.interop.bundle import Absent, Bundle
from contrastive.interop.formats import onnx_example
from contrastive.models import DualEncoder, ImageClassifier, TextModel

TEXTS = '["a photo of a cat", "a photo of a dog"]'


def usage(to: str, bundle: Bundle, folder: Path, name: str) -> str:
    """Return Markdown with the code for this model.

    Args:
        folder: as written. name: what the code calls it, a hub's ORG/NAME or the folder's own name.
    """
    write = {"transformers": _transformers, "open_clip": _open_clip, "timm": _timm, "onnx": _onnx}[to]
    lacking = [
        f"This folder has no {what}, which its source had not either: that part of the code needs your own."
        for what, part in (("preprocessing options", bundle.preprocess), ("tokenizer", bundle.tokenizer))
        if isinstance(part, Absent)
    ]
    return "\n\n".join([*lacking, write(bundle, folder, name)])


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _answer(bundle: Bundle) -> str:
    """How logits become probabilities: each pair for itself with the sigmoid loss, over the texts with softmax."""
    return "logits.sigmoid()" if bundle.model.logit_bias is not None else "logits.softmax(dim=-1)"


def _transformers(bundle: Bundle, folder: Path, name: str) -> str:
    imports = ["import torch", "from PIL import Image"]
    if isinstance(bundle.model, TextModel):
        return _python(
            "import torch",
            "from transformers import AutoModel, AutoTokenizer",
            "",
            f'model = AutoModel.from_pretrained("{name}").eval()',
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
            f'tokens = tokenizer({TEXTS}, padding="max_length", truncation=True, return_tensors="pt")',
            "with torch.no_grad():",
            "    features = model(**tokens).pooler_output",
        )
    if not isinstance(bundle.model, DualEncoder):
        return _python(
            *imports,
            "from transformers import AutoImageProcessor, AutoModel",
            "",
            f'model = AutoModel.from_pretrained("{name}").eval()',
            f'processor = AutoImageProcessor.from_pretrained("{name}")',
            'pixels = processor(Image.open("photo.jpg"), return_tensors="pt")',
            "with torch.no_grad():",
            "    features = model(**pixels).pooler_output",
        )
    return _python(
        *imports,
        "from transformers import AutoModel, AutoProcessor",
        "",
        f'model = AutoModel.from_pretrained("{name}").eval()',
        f'processor = AutoProcessor.from_pretrained("{name}")',
        "inputs = processor(",
        f'    images=Image.open("photo.jpg"), text={TEXTS},',
        '    padding="max_length", truncation=True, return_tensors="pt",',
        ")",
        "with torch.no_grad():",
        "    logits = model(**inputs).logits_per_image",
        f"print({_answer(bundle)})",
    )


def _open_clip(bundle: Bundle, folder: Path, name: str) -> str:
    place = f"hf-hub:{name}" if "/" in name else f"local-dir:{name}"
    plus_bias = " + model.logit_bias" if bundle.model.logit_bias is not None else ""
    return _python(
        "import open_clip",
        "import torch",
        "from PIL import Image",
        "",
        f'model, _, preprocess = open_clip.create_model_and_transforms("{place}")',
        f'tokenizer = open_clip.get_tokenizer("{place}")',
        "model.eval()",
        "with torch.no_grad():",
        '    image = model.encode_image(preprocess(Image.open("photo.jpg"))[None], normalize=True)',
        f"    text = model.encode_text(tokenizer({TEXTS}), normalize=True)",
        f"    logits = model.logit_scale.exp() * image @ text.T{plus_bias}",
        f"print({_answer(bundle)})",
    )


def _timm(bundle: Bundle, folder: Path, name: str) -> str:
    config = json.loads((folder / "config.json").read_text())
    place = f"hf-hub:{name}" if "/" in name else f"local-dir:{name}"
    arguments = {**config.get("model_args", {}), "num_classes": config.get("num_classes", 0)}
    written = "".join(f",\n#     {key}={value!r}" for key, value in arguments.items())
    result = ["scores = model(pixels)"] if isinstance(bundle.model, ImageClassifier) else []
    return _python(
        "import timm",
        "import torch",
        "from PIL import Image",
        "",
        f'model = timm.create_model("{place}", pretrained=True).eval()',
        "# or, from the weights alone:",
        f'# timm.create_model("{config["architecture"]}",\n#     checkpoint_path="model.safetensors"{written})',
        "options = timm.data.resolve_model_data_config(model)",
        "transform = timm.data.create_transform(**options, is_training=False)",
        "with torch.no_grad():",
        '    pixels = transform(Image.open("photo.jpg").convert("RGB"))[None]',
        "    patch_tokens = model.forward_features(pixels)",
        "    " + (result or ["embedding = model(pixels)  # not of unit length"])[0],
    )


def _onnx(bundle: Bundle, folder: Path, name: str) -> str:
    about = (
        "The folder has this as `example.py`. Graphs with `_fp16` in their names compute in float16; inputs and "
        "outputs are float32 and int64 all the same."
    )
    return f"{about}\n\n```python\n{Path(onnx_example.__file__).read_text().strip()}\n```"

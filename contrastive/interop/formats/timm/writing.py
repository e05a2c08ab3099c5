"""An image tower or a classifier as a folder of timm: config.json and model.safetensors."""

from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from contrastive.data.preprocess import PreprocessConfig
from contrastive.errors import UserError
from contrastive.files import read_json, write_json
from contrastive.interop.bundle import Bundle
from contrastive.interop.formats.outputs import Outputs
from contrastive.interop.formats.timm.head import KEY
from contrastive.interop.formats.timm.keys import tower_to_theirs
from contrastive.interop.formats.timm.naming import timm_name, timm_problems
from contrastive.interop.formats.timm.processor import processor_problems, taken_size, write_processor
from contrastive.models import DualEncoder, ImageClassifier, ImageTower
from contrastive.models.dual_encoder import unit_length

WEIGHTS = "model.safetensors"


def write(bundle: Bundle, folder: Path, place: Path) -> list[str]:
    """Write the image tower for timm into an existing empty folder; return notes for the user.

    A projection becomes timm's `head` with a zero bias, as timm itself keeps CLIP's; a classifier's head is `head`.

    Args:
        place: where the folder will lie, for the commands in the notes.

    Raises:
        UserError: no image tower, or options that timm's ViT cannot express (all are named).
    """
    bundle.check_image_tower("timm holds image towers")
    model = bundle.model
    tower = model.image_tower
    preprocess, patch_size = checked_preprocess(bundle), tower.config.patch_size
    problems = timm_problems(tower.config) + processor_problems(preprocess, patch_size)
    if isinstance(model, ImageClassifier):
        problems += _classifier_problems(model)
    if problems:
        raise UserError(f"{bundle.path}: timm cannot express {'; '.join(problems)}; --to onnx can")
    name, arguments = timm_name(tower.config, taken_size(preprocess, patch_size))
    weights, num_classes, kind = tower_to_theirs(tower_state(tower), tower.config), 0, "none"
    if isinstance(model, ImageClassifier):
        num_classes, kind = model.head.out_features, "classifier"
        head = (model.head.weight, model.head.bias)
    elif tower.projection is not None:
        num_classes, kind = tower.projection.out_features, "projection"
        head = (tower.projection.weight, torch.zeros(num_classes))
    if num_classes:
        weights |= dict(zip(("head.weight", "head.bias"), (part.detach().clone() for part in head), strict=True))
    save_file(weights, folder / WEIGHTS)
    description = describe_for_timm(name, arguments, num_classes, write_processor(preprocess, patch_size))
    description[KEY] = kind
    if bundle.class_names is not None:
        description["label_names"] = list(bundle.class_names)
    write_json(folder / "config.json", description)
    return _notes(bundle)


def describe_for_timm(name: str, arguments: dict, num_classes: int, processor: dict) -> dict:
    """Return timm's config.json."""
    return {
        "architecture": name,
        "num_classes": num_classes,
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": num_classes,
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            **processor,
        },
    }


def tower_state(tower: ImageTower) -> dict[str, torch.Tensor]:
    """Return an image tower's weights by the names they have in a model, fixed positions among them."""
    state = {**tower.state_dict(), "position_embedding": tower.position_embedding}
    return {f"image_tower.{name}": tensor.detach().cpu().float() for name, tensor in state.items()}


def checked_preprocess(bundle: Bundle) -> PreprocessConfig:
    """Return how images become pixels.

    Raises:
        UserError: there is no preprocessing, which timm and open_clip cannot do without, or it makes images of another
            size than the tower's positions are for.
    """
    try:
        preprocess = bundle.preprocess.config
    except UserError as error:  # of an Absent, which says what is missing
        raise UserError(f"{error}; --to transformers and --to onnx write the model without") from None
    made, taken = preprocess.size, bundle.model.image_tower.input_size
    if tuple(made) != tuple(taken):
        raise UserError(
            f"the preprocessing makes {made[0]}×{made[1]} pixels, the image tower has positions for "
            f"{taken[0]}×{taken[1]}: call model.image_tower.set_input_size or give the bundle another preprocess"
        )
    return preprocess


def outputs(
    folder: Path, images: list[Image.Image], texts: list[str], pixels: torch.Tensor, tokens: torch.Tensor | None
) -> Outputs:
    """What timm makes of the folder: `image` is the embedding of an image tower, `logits` a classifier's scores."""
    import timm
    from timm.data import create_transform, resolve_model_data_config

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    is_classifier = read_json(folder / "config.json")[KEY] == "classifier"
    with torch.inference_mode():
        full = padded(pixels, model.patch_embed.img_size)
        pooled = model.forward_head(model.forward_features(full), pre_logits=True)
        head = model.head(pooled)
    return Outputs(
        image=unit_length(pooled if is_classifier else head),
        logits=head if is_classifier else None,
        pixels=cropped([transform(image.convert("RGB")) for image in images], pixels),
    )


def padded(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return our pixels with those that patches pass over, as zeros on the right and below, where a model has such."""
    return torch.nn.functional.pad(pixels, (0, size[1] - pixels.shape[-1], 0, size[0] - pixels.shape[-2]))


def cropped(images: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """Return a library's pixels without those that patches pass over; `like` has the size that they fill."""
    return torch.stack(images)[..., : like.shape[-2], : like.shape[-1]]


def _classifier_problems(model: ImageClassifier) -> list[str]:
    problems = []
    if model.config.unit_features:
        problems.append("model.unit_features true (its head reads features as they are)")
    if model.image_tower.projection is not None:
        problems.append("model.image.projection true below a classifier (it has one linear layer there)")
    return problems


def _notes(bundle: Bundle) -> list[str]:
    notes = []
    if isinstance(bundle.model, DualEncoder):
        notes.append("timm has no text towers: this is the image tower alone")
    if not isinstance(bundle.model, ImageClassifier) and bundle.model.image_tower.projection is not None:
        notes.append(
            "the projection to the embedding space is timm's head, with a bias of zero; num_classes=0 omits it"
        )
    if bundle.model.image_tower.config.position == "sincos":
        notes.append("the fixed sin-cos positions are written as learned ones of the same values")
    return notes + cut_notes(bundle.preprocess.config)


def cut_notes(config: PreprocessConfig) -> list[str]:
    """What the evaluation transforms of timm and open_clip, both torchvision's, do a little otherwise."""
    if config.cut == "floor":
        return ["where the middle lies between two pixels, the crop can be one pixel further right or down than before"]
    return []

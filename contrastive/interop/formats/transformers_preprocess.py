"""preprocessor_config.json of transformers as our preprocessing, and back."""

from pathlib import Path

from contrastive.data.preprocess import CLIP_MEAN, CLIP_STD, SIGLIP_MEAN, SIGLIP_STD, Preprocess, PreprocessConfig
from contrastive.errors import UserError
from contrastive.files import read_json, write_json
from contrastive.interop.bundle import Absent
from contrastive.interop.formats import check, is_count, is_positive, per_channel
from contrastive.interop.formats.evaluation_transform import made_preprocess, taken_size

FILE, NESTED_FILE = "preprocessor_config.json", "processor_config.json"
SQUASH, CROP, NAFLEX = "SiglipImageProcessor", "CLIPImageProcessor", "Siglip2ImageProcessor"
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
DEFAULTS = {
    SQUASH: {
        "size": {"height": 224, "width": 224},
        "do_center_crop": False,
        "crop_size": None,
        "image_mean": SIGLIP_MEAN,
        "image_std": SIGLIP_STD,
    },
    CROP: {
        "size": {"shortest_edge": 224},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    },
    NAFLEX: {
        "resample": 2,
        "patch_size": 16,
        "max_num_patches": 256,
        "image_mean": SIGLIP_MEAN,
        "image_std": SIGLIP_STD,
    },
}
SHARED_DEFAULTS = {
    "do_resize": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}
OLD_NAMES = {"CLIPFeatureExtractor": CROP, "SiglipFeatureExtractor": SQUASH}


def read_preprocess(folder: Path, image_size: int, patch_size: int, native: bool = False) -> Preprocess | Absent:
    """Return what the folder's image processor does; `Absent`, with the reason, where we cannot do exactly that.

    Args:
        image_size: what the model takes, in pixels; what does not fill a patch at its right and bottom is cut off, as
            the model itself does.
        native: whether the model takes images of any shape.

    Raises:
        UserError: a damaged file.
    """
    file, options = folder / FILE, None
    if file.exists():
        options = read_json(file)
    elif (folder / NESTED_FILE).exists():
        file = folder / NESTED_FILE
        options = read_json(file).get("image_processor")
    if options is None:
        return Absent(
            f"{folder} says nothing about preprocessing ({FILE} is missing): copy that file from where the model came "
            "from, or make a contrastive.data.preprocess.Preprocess of your own"
        )
    try:
        kind, options = _filled(options)
        return (
            _native(options, image_size, patch_size, native)
            if kind == NAFLEX
            else _preprocess(options, image_size, patch_size)
        )
    except UserError as error:
        return Absent(f"{file}: {error}")


def _preprocess(options: dict, image_size: int, patch_size: int) -> Preprocess:
    """UserError says, without the file, what we do not do."""
    size, crop_size = _size(options, "size", ("shortest_edge",)), _size(options, "crop_size", ("height", "width"))
    resample, short, cropped = options["resample"], size.get("shortest_edge"), bool(options["do_center_crop"])
    kept, scaled = crop_size if cropped else size, short or size.get("height")
    height, width = kept.get("height"), kept.get("width")
    fills = image_size % patch_size == 0
    problems = {
        f"resample {resample!r} is not supported, only 2 (bilinear) and 3 (bicubic)": (
            type(resample) is not int or resample not in RESAMPLE
        ),
        "do_resize false (or null) leaves images as large as they are: resize them yourself": not options["do_resize"],
        "use_square_size true is not supported: name height and width in size": options.get("use_square_size"),
        f"size {options['size']} with do_center_crop {cropped} does not give images of one size": (
            set(size) not in ({"shortest_edge"}, {"height", "width"}) or set(kept) != {"height", "width"}
        ),
        f"images become {height}×{width} pixels, but the model takes {image_size}×{image_size}: set size and crop_size "
        "to that": (height, width) != (image_size, image_size),
        f"size {options['size']} is not a square": short is None and scaled != size.get("width"),
        f"size {options['size']} is smaller than crop_size, which would put a black border around": (
            scaled is not None and scaled < image_size
        ),
        f"a crop to {image_size} pixels, which patches of {patch_size} do not fill, is not supported": (
            not fills and (scaled != image_size or short is not None)
        ),
    }
    for problem in (text for text, is_so in problems.items() if is_so):
        raise UserError(problem)
    resize, cut = "squash" if short is None else "crop", "floor" if cropped else "round"  # without a crop: no matter
    statistics = _normalisation(options)
    return made_preprocess(resize, scaled, (image_size, image_size), patch_size, statistics, RESAMPLE[resample], cut)


def _native(options: dict, image_size: int, patch_size: int, native: bool) -> Preprocess:
    """As `_preprocess`, of images of any shape."""
    if not native:
        raise UserError(
            f"{NAFLEX} keeps the aspect ratio, with another grid of patches for each image, which this tower has not; "
            "for images squashed to its square make a contrastive.data.preprocess.Preprocess(PreprocessConfig("
            f"{image_size}, interpolation='bilinear'))"
        )
    resample, most = options["resample"], options["max_num_patches"]
    check(type(resample) is int and resample in RESAMPLE, "resample", resample, "2 (bilinear) or 3 (bicubic)")
    check(is_count(most), "max_num_patches", most, "a whole number above 0")
    if not options["do_resize"]:
        raise UserError("do_resize false (or null) leaves images as large as they are: resize them yourself")
    if options["patch_size"] != patch_size:
        raise UserError(
            f"patch_size is {options['patch_size']!r}, but the model's weights are of patches of {patch_size}: set it "
            "to that"
        )
    made = {"resize": "native", "interpolation": RESAMPLE[resample], "patches": most}
    return Preprocess(PreprocessConfig(image_size, patch_size, **made, **_normalisation(options)))


def _filled(options: dict) -> tuple[str, dict]:
    """The class and the options with its defaults; null stays, which the library takes for off, or fails at."""
    check(isinstance(options, dict), "image_processor", options, "an object of options")
    named = options.get("image_processor_type") or options.get("feature_extractor_type") or ""
    check(isinstance(named, str), "image_processor_type", named, "the name of a class")
    kind = OLD_NAMES.get(named, named.removesuffix("Fast").removesuffix("Pil"))
    if kind not in DEFAULTS:
        raise UserError(f"image_processor_type '{named}' is not supported; known: {', '.join(DEFAULTS)}")
    return kind, {**SHARED_DEFAULTS, **DEFAULTS[kind], **options}


def _size(options: dict, name: str, number_means: tuple[str, ...]) -> dict:
    """A size by the names of its sides; in old files it is a number, of the short side or of a square's both."""
    size = options[name]
    if isinstance(size, dict):
        sides = {side: value for side, value in size.items() if value is not None}
    elif isinstance(size, list) and len(size) == 2:
        sides = {"height": size[0], "width": size[1]}
    elif size is None:
        sides = {}
    else:
        sides = dict.fromkeys(number_means, size)
    check(all(map(is_count, sides.values())), name, size, "in whole numbers of pixels")
    return sides


def _normalisation(options: dict) -> dict[str, tuple[float, ...]]:
    """Mean and std, by our names, where white is 1, whatever factor the library multiplies pixels with."""
    factor = 255.0
    if options["do_rescale"]:
        rescale = options["rescale_factor"]
        check(is_positive(rescale), "rescale_factor", rescale, "a number above 0")
        factor *= rescale
    factor = 1.0 if abs(factor - 1) < 1e-9 else factor
    found = {"mean": 0.0, "std": 1.0}
    if options["do_normalize"]:
        found = {name: options[f"image_{name}"] for name in found}
    wanted = "a number, or three of them"
    channels = {name: per_channel(f"image_{name}", value, wanted, ":") for name, value in found.items()}
    return {name: tuple(value / factor for value in values) for name, values in channels.items()}


def write_preprocess(
    config: PreprocessConfig, image_size: int, patch_size: int, processor_class: str | None, folder: Path
) -> list[str]:
    """Write preprocessor_config.json.

    Args:
        image_size: of the tower.
        processor_class: of the library's, which handles images and texts; None for an image tower alone.

    Returns:
        What the library does otherwise, in plain sentences.

    Raises:
        UserError: the library has no such preprocessing.
    """
    if config.size != (image_size, image_size):
        height, width = config.size
        raise UserError(
            f"the preprocessing makes {height}×{width} pixels, the image tower takes {image_size}×{image_size}: "
            "give the bundle a Preprocess of that size"
        )
    whole = taken_size(config, patch_size)[0]
    scaled = config.short_side or image_size
    cropped = scaled != whole or config.resize == "crop"
    if cropped and config.cut == "corner":
        raise UserError("preprocess cut 'corner': transformers cuts the centre only; set cut 'floor'")
    sized = {
        "image_processor_type": CROP if cropped else SQUASH,
        "size": {"shortest_edge": scaled} if config.resize == "crop" else {"height": scaled, "width": scaled},
        "do_center_crop": cropped,
        **({"crop_size": {"height": image_size, "width": image_size}} if cropped else {}),
    }
    if config.resize == "native":
        patches = {"patch_size": config.patch_size, "max_num_patches": config.most_patches}
        sized = {"image_processor_type": NAFLEX, **patches}
    options = {
        "do_convert_rgb": True,
        **SHARED_DEFAULTS,
        **sized,
        "resample": next(number for number, name in RESAMPLE.items() if name == config.interpolation),
        "image_mean": list(config.mean),
        "image_std": list(config.std),
        **({"processor_class": processor_class} if processor_class else {}),
    }
    write_json(folder / FILE, options)
    odd = config.resize == "crop" or (scaled - image_size) % 2
    if cropped and config.cut == "round" and odd:
        return [
            "transformers cuts the centre of an image half a pixel further up and left where its margin is odd (a "
            "photograph in four is shifted by one pixel); loading this folder with contrastive does the same"
        ]
    return []

"""What users of open_clip, transformers and timm type first: it works, or the line names the right thing."""

import copy
import operator
import pickle
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import contrastive
from contrastive.data.preprocess import Preprocess, PreprocessConfig
from contrastive.data.record import BadSample
from contrastive.data.tokenizer import clip_tokenizer
from contrastive.entry import COMMANDS
from contrastive.errors import UserError
from contrastive.interop.bundle import Bundle
from contrastive.interop.encoder import ImageProcessor
from contrastive.losses import SigmoidLoss, SoftmaxLoss
from contrastive.models import (
    ClassifierConfig,
    DualEncoder,
    ImageClassifier,
    ImageTowerConfig,
    ModelConfig,
    TextTowerConfig,
)
from contrastive.models.image_encoder import ImageEncoder
from contrastive.words import table

ROOT = Path(__file__).resolve().parents[1]
IMAGE = ImageTowerConfig(image_size=16, patch_size=8, width=16, depth=2, num_heads=2, mlp_dim=32)
TEXT = TextTowerConfig(vocab_size=49_408, context_length=16, width=16, depth=1, num_heads=2, mlp_dim=32, eos_id=49_407)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """What the words below are said of, by the names that they have in them."""
    folder = tmp_path_factory.mktemp("images")
    for name, mode in (("x.jpg", "RGB"), ("y.png", "RGBA"), ("p.gif", "P"), ("c.jpg", "CMYK")):
        Image.new(mode, (20, 24), 128 if mode == "P" else None).save(folder / name)
    (folder / "text.jpg").write_text("not an image")
    config = ModelConfig(embed_dim=16, image=IMAGE, text=TEXT, init_logit_bias=-10.0)
    model, tokenizer = DualEncoder(config).eval(), clip_tokenizer(16)
    preprocess = Preprocess(PreprocessConfig(image_size=16))
    bundle = Bundle(model, preprocess, tokenizer, config, folder)
    encoder = ImageEncoder(model.image_tower, preprocess=ImageProcessor(preprocess))
    head = ImageClassifier(ClassifierConfig(image=IMAGE, num_classes=3))
    features = torch.nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
    names = {
        "contrastive": contrastive,
        "torch": torch,
        "np": np,
        "Image": Image,
        "folder": folder,
        "path": str(folder),
    }
    names |= {"model": model, "tokenizer": tokenizer, "bundle": bundle, "encoder": encoder, "classifier": head}
    return names | {"SigmoidLoss": SigmoidLoss, "SoftmaxLoss": SoftmaxLoss, "i": features, "t": features.flip(0)}


# One table for each place where words are typed, a row each: what is typed, and a pattern of the line that answers; or
# what is true of what comes of it, as `it`.
PYTHON = [
    (
        "contrastive.create_model_and_transforms('ViT-B-16', pretrained='openai')",
        "transforms': here it is contrastive.load",
    ),
    ("contrastive.create_model_from_pretrained('hf-hub:timm/ViT-B-16-SigLIP')", "here it is contrastive.load"),
    ("contrastive.get_tokenizer('ViT-B-16')", "here it is contrastive.load.PATH..tokenizer"),
    ("contrastive.tokenize(['a dog'])", "here it is contrastive.load.PATH..tokenizer"),
    ("contrastive.list_pretrained()", "list_models"),
    ("contrastive.available_models()", "list_models"),
    ("contrastive.AutoModel.from_pretrained('google/siglip-base-patch16-224')", "contrastive.load.'hf-hub:"),
    ("contrastive.CLIPModel", "contrastive.load.'hf-hub:"),
    ("contrastive.AutoProcessor", "preprocess"),
    ("contrastive.push_to_hub", "contrastive export"),
    ("contrastive.ClipLoss()", "losses.SoftmaxLoss"),
    ("contrastive.losses.SigLipLoss()", "losses.SigmoidLoss"),
    (
        "contrastive.create_model('ViT-B-16', 'laion2b_s34b_b88k')",
        "no option 'pretrained': here it is con",
    ),
    ("contrastive.create_model('siglip_vit_ti_32', pretrained=False).config.embed_dim", "it == 192"),
    ("contrastive.build_zero_shot_classifier(model)", "contrastive zero-shot"),
    ("contrastive.nonsense", "has no attribute 'nonsense'$"),
    (
        "contrastive.create_model('ViT-B-16', pretrained='laion2b_s34b_b88k')",
        "no option 'pretrained'.*contrastive.lo",
    ),
    ("contrastive.create_model('ViT-B-16', device='cuda')", "no option 'device'.*create_model.NAME..to"),
    ("contrastive.create_model('ViT-B-16', embed_dims=3)", "no option 'embed_dims'. Did you mean 'embed_dim'"),
    ("contrastive.create_model('RN50')", "'RN50' is not among our models"),
    ("contrastive.create_model('ViT-B/32')", "ViT-B-32-quickgelu OpenAI's"),
    ("contrastive.create_model('hf-hub:timm/ViT-B-16-SigLIP')", "contrastive.load.'hf-hub:timm/ViT-B-16-SigLIP'"),
    ("contrastive.create_model('vit_base_patch16_224')", "contrastive classifier --model vit_base_patch16_224"),
    ("contrastive.create_model('vit_b_16')", "unknown model 'vit_b_16'. Did you mean 'clip_vit_b_16'"),
    ("contrastive.load('ViT-B-16')", "That is an architecture: contrastive.create_model.'ViT-B-16'"),
    ("contrastive.load('laion/CLIP-ViT-B-16-laion2B-s34B-b88K')", "For the hub: hf-hub:laion"),
    ("contrastive.load(path, device='cuda:99')", "device 'cuda:99' is not here; there is cpu"),
    ("contrastive.load(path, device='gpu')", "device 'gpu' is not here; there is cpu"),
    ("contrastive.load_image_encoder(path, device='cuda:99')", "device 'cuda:99' is not here"),
    ("model.visual(torch.zeros(1, 3, 16, 16))", "here it is model.image_tower"),
    ("model.vision_model", "model.image_tower"),
    ("model.transformer", "model.text_tower.transformer"),
    ("model.get_image_features(pixel_values=0)", "model.encode_image.pixels, normalize=False"),
    ("model.get_text_features(0)", "model.encode_text"),
    ("model.save_pretrained('x')", "contrastive export"),
    ("model.push_to_hub('x')", "--push"),
    ("model.forward_features(0)", "load_image_encoder"),
    ("model.set_grad_checkpointing()", "gradient_checkpointing"),
    ("model.lock_image_tower()", "requires_grad_.False"),
    ("model.nonsense", "'DualEncoder' object has no attribute 'nonsense'$"),
    ("model.config.embed_dim", "it == 16"),
    ("model.config.hidden_size", "here it is model.config: .embed_dim, .image.image_size, .image.width"),
    ("model.config.projection_dim", "'ModelConfig' object has no attribute 'projection_dim': here it is model.config:"),
    ("model.config.vision_config.hidden_size", "model.config: .embed_dim, .image.image_size"),
    ("model.config.nonsense", "'ModelConfig' object has no attribute 'nonsense'$"),
    ("model.num_parameters()", "for weights in model.parameters"),
    ("model.forward_head", "model.encode_image.pixels, normalize=False"),
    ("classifier.id2label", "contrastive.load.PATH..class_names"),
    ("model(torch.zeros(1, 3, 16, 16), tokenizer(['a'])).logits_per_image", "model.logit_scale.exp"),
    ("model(torch.zeros(1, 3, 16, 16), tokenizer(['a'])).image_embeds", ".image and .text are .B, E., L2-normalised"),
    (
        "model.encode_text(tokenizer('a dog')[0])",
        "a tensor of shape .16,. is none of ids .*; of one text, tokens.None.",
    ),
    ("contrastive.list_models('*siglip*')", "it and all('siglip' in name for name in it)"),
    ("bundle.preprocess.image_mean", "bundle.preprocess.config: .image_size, .mean"),
    ("bundle.preprocess.nonsense", "'Preprocess' object has no attribute 'nonsense'$"),
    ("model.encode_image(torch.zeros(1, 3, 16, 16))", "it.shape == (1, 16)"),
    ("model.encode_image(bundle.preprocess(path + '/x.jpg'))", "shape .3, 16, 16. is none of pixels .*pixels.None."),
    ("model.encode_text(['a dog'])", "a list is no tensor of ids .B, N.: bundle.tokenizer.texts"),
    ("model.encode_image(path + '/x.jpg')", "a str is no tensor of pixels .*bundle.preprocess"),
    ("classifier.visual", "'ImageClassifier' object has no attribute 'visual': here it is model.image_tower"),
    ("classifier.reset_classifier(10)", "model.head"),
    ("bundle.encode_image", "here it is bundle.model.encode_image"),
    ("bundle.visual", "here it is bundle.model.image_tower"),
    ("bundle.eval()", "bundle.model.eval"),
    ("bundle.processor(0)", "bundle.preprocess"),
    ("bundle.save_pretrained('x')", "contrastive export"),
    ("bundle.preprocess(path + '/x.jpg')", "it.shape == (3, 16, 16)"),
    ("bundle.preprocess(folder / 'c.jpg')", "it.shape == (3, 16, 16)"),
    ("bundle.preprocess([path + '/x.jpg', folder / 'y.png', Image.new('L', (9, 9))])", "it.shape == (3, 3, 16, 16)"),
    ("bundle.preprocess(np.zeros((20, 30, 3), np.uint8))", "it.shape == (3, 16, 16)"),
    ("bundle.preprocess(images=path + '/p.gif', return_tensors='pt')", "it.pixel_values.shape == (1, 3, 16, 16)"),
    ("bundle.preprocess(path + '/z.jpg')", "cannot read the image '.*z.jpg': No such file"),
    ("bundle.preprocess(path)", "cannot read the image '.*': Is a directory"),
    ("bundle.preprocess(path + '/text.jpg')", "unreadable_image .*text.jpg"),
    ("bundle.preprocess(torch.zeros(3, 16, 16))", "a Tensor is not an image: give a PIL image, a path"),
    ("bundle.preprocess([])", "the list is empty"),
    ("bundle.preprocess('x.jpg', return_tensors='np')", "'pt' is what there is"),
    ("encoder.preprocess([folder / 'x.jpg'])", "it.shape == (1, 3, 16, 16)"),
    ("encoder.num_features, encoder.embed_dim", "it == (16, 16)"),
    ("encoder.forward_features(0)", "load_image_encoder.*keep_prefix"),
    ("encoder.feature_info", "layer=.3, 6"),
    ("encoder.vision_tower", "encoder itself"),
    ("encoder.default_cfg", "encoder.preprocess.config"),
    ("encoder.nonsense", "'ImageEncoder' object has no attribute 'nonsense'$"),
    ("tokenizer(['a dog', 'a cat'], context_length=8)", "it.shape == (2, 8) and it[0, -1] == 0"),
    ("tokenizer('one text')", "it.shape == (1, 16)"),
    (
        "tokenizer(['a'], padding='max_length', truncation=True, return_tensors='pt')",
        "no option padding, truncation, r",
    ),
    ("tokenizer(['a'], max_length=32)", "context_length=32"),
    ("tokenizer(['a'], context_length=2)", "context length 2 leaves no room"),
    ("tokenizer([None])", "are strings.* not NoneType"),
    ("tokenizer(None)", "are strings.* not NoneType"),
    ("tokenizer.encode('a dog')", "here it is tokenizer.texts"),
    ("tokenizer.decode(tokenizer('a dog')[0])", "it == 'a dog'"),
    ("tokenizer.batch_decode([])", "tokenizer.decode"),
    ("tokenizer.pad_token_id", "tokenizer.pad_id"),
    ("tokenizer.model_max_length", "tokenizer.context_length"),
    ("len(tokenizer)", "it == 49408"),
    ("SigmoidLoss()(i, t, 10.0, -10.0)", "it == SigmoidLoss()(i, t, torch.tensor(10.0), torch.tensor(-10.0))"),
    ("SigmoidLoss()(i, t, 10, np.float32(-10))", "it == SigmoidLoss()(i, t, torch.tensor(10.0), torch.tensor(-10.0))"),
    ("SoftmaxLoss()(i, t, 14)", "it == SoftmaxLoss()(i, t, torch.tensor(14.0))"),
    ("SoftmaxLoss()(i, t, 'ten')", "logit_scale must be one number"),
    ("SigmoidLoss()(i, t, 10.0)", "needs a logit_bias"),
    ("contrastive.__version__", "it.count('.') == 2"),
]


@pytest.mark.parametrize(("typed", "answer"), PYTHON, ids=[typed for typed, _ in PYTHON])
def test_python(typed, answer, ours):
    if answer.startswith("it"):
        assert eval(answer, ours | {"it": eval(typed, ours)})
        return
    with pytest.raises((AttributeError, UserError, ValueError, BadSample), match=answer) as caught:
        eval(typed, ours)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("word", ["AutoProcessor", "SiglipModel", "create_model_and_transforms"])
def test_an_import_by_name_is_answered_as_an_attribute_is(word):
    with pytest.raises(ImportError, match=f"no attribute '{word}': here it is contrastive.load"):
        exec(f"from contrastive import {word}")
    with pytest.raises(ImportError, match="cannot import name 'nonsense'"):
        exec("from contrastive import nonsense")
    assert not hasattr(contrastive, word)


def has(thing, path):
    try:
        operator.attrgetter(path)(thing)
    except AttributeError:
        return False
    return True


@pytest.mark.parametrize("row", [row for row in table() if row[0] != "flag"], ids=lambda row: f"{row[0]} {row[1][0]}")
def test_words_are_not_there_and_their_answers_are(row, ours):
    """A word that has come to exist needs no answer; an answer that names what has gone helps nobody."""
    place, words, answer = row
    if place == "command":
        assert not COMMANDS.keys() & {word.replace("_", "-") for word in words}
    elif place != "create_model":
        assert not [word for word in words if word in dir(ours[place])]
    owners = {name: [ours[name]] for name in ("bundle", "encoder", "tokenizer")}
    owners["model"] = [ours["model"], ours["classifier"]]
    for owner, path in re.findall(r"(?<![-.\w])(contrastive|model|bundle|encoder|tokenizer)\.((?:\w+\.)*\w+)", answer):
        known = [has(thing, path) for thing in owners.get(owner, [])] or [pydoc.locate(f"{owner}.{path}")]
        assert any(known), f"{owner}.{path}"
    for command in re.findall(r"(?<![\w.])contrastive ([\w-]+)", answer):
        assert command in COMMANDS


def test_words_disturb_nothing(ours):
    model = ours["model"]
    assert not hasattr(model, "visual") and not hasattr(ours["bundle"], "visual")
    for thing in (model, ours["bundle"], ours["encoder"], ours["tokenizer"]):
        assert type(copy.deepcopy(thing)) is type(pickle.loads(pickle.dumps(thing))) is type(thing)
    pixels = torch.randn(2, 3, 16, 16)
    compiled = torch.compile(model.encode_image, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(pixels), model.encode_image(pixels))
    assert torch.compile(ours["encoder"], backend="eager", fullgraph=True)(pixels).shape == (2, 4, 16)


def test_numbers_leave_the_features_their_gradient(ours):
    features = ours["i"].clone().requires_grad_()
    both = [(10.0, -10.0), (torch.tensor(10.0), torch.tensor(-10.0))]
    first, second = (torch.autograd.grad(SigmoidLoss()(features, ours["t"], *numbers), features)[0] for numbers in both)
    assert torch.equal(first, second)


def test_the_package_names_itself():
    code = "from contrastive import *; import contrastive; print(create_model, losses); help(contrastive)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "create_model(" in done.stdout and "hf-hub:ORGANISATION/NAME" in done.stdout
    assert (ROOT / "contrastive" / "py.typed").is_file()
    assert {"load", "create_model", "losses", "__version__"} <= set(dir(contrastive))


def test_the_page_has_the_table():
    page = (ROOT / "docs" / "coming-from.md").read_text("utf-8")
    rows = [
        line for line in (ROOT / "contrastive" / "words.md").read_text("utf-8").splitlines() if line.startswith("|")
    ]
    assert "\n".join(rows) in page and len(rows) > 40
    assert "docs/coming-from.md" in (ROOT / "README.md").read_text("utf-8")

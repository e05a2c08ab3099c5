"""Class names of well-known data sets, CLIP's ImageNet prompts, and the templates that suit a data set."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from class_names import load_class_names

from contrastive.data.class_sets import class_set, class_set_of, class_sets
from contrastive.data.prompts import default_templates, fill, load_templates, template_sets
from contrastive.errors import UserError

COUNTS = {
    "cifar10": 10, "cifar20": 20, "cifar100": 100, "coco": 80, "country211": 211, "digits": 10, "dtd": 47,
    "eurosat": 10, "fashion_mnist": 10, "fer2013": 7, "fgvc_aircraft": 100, "flowers102": 102, "food101": 101,
    "gtsrb": 43, "imagenet": 1000, "imagenet1k": 1000, "imagenette": 10, "imagewoof": 10, "kmnist": 10,
    "letters": 26, "mnist": 10, "pcam": 2, "pets": 37, "resisc45": 45, "stl10": 10, "svhn": 10, "ucf101": 101,
    "voc2007": 20,
}  # fmt: skip


@pytest.mark.parametrize("name", class_sets())
def test_every_set_has_its_classes_each_once_and_templates(name):
    names = load_class_names(name)
    assert len(names) == len({name.lower() for name in names}) == COUNTS[name]
    assert all(spoken and spoken == " ".join(spoken.split()) and "_" not in spoken for spoken in names)
    known = class_set(name)
    assert known.places(known.names) == known.places(known.own_names) == tuple(range(len(names)))
    templates = load_templates(known.templates)
    assert load_templates(name) == templates and len(set(templates)) == len(templates) >= 5
    assert all("{}" in template for template in templates)


def test_sets_of_our_own_are_sentences_that_take_a_name():
    for name in template_sets():
        filled = [caption for one in ("oak", "pine") for caption in fill(load_templates(name), one)]
        assert len(set(filled)) == len(filled)
        assert not any("a oak" in text or "an pine" in text for text in filled) or name in WITH_ARTICLE


# CLIP's own wordings, which say 'a' of everything.
WITH_ARTICLE = {"cifar", "photo", "imagenet", "imagenet_simple"}


def test_order_is_that_of_the_labels_in_torchvision():
    from torchvision import datasets

    assert class_set("fashion_mnist").own_names[0] == "T-shirt/top"
    assert class_set("fashion_mnist").places(datasets.FashionMNIST.classes) == tuple(range(10))
    assert list(class_set("kmnist").names) == datasets.KMNIST.classes
    assert [f"{number} - {name}" for number, name in enumerate(load_class_names("mnist"))] == datasets.MNIST.classes


def test_order_is_that_of_clip_benchmark():
    benchmark = pytest.importorskip("clip_benchmark")
    theirs = json.loads((Path(benchmark.__path__[0]) / "datasets" / "en_classnames.json").read_text())
    for ours, other in (("flowers102", "flowers"), ("country211", "country211"), ("pets", "pets")):
        pairs = list(zip(load_class_names(ours), theirs[other], strict=True))
        assert all(a.lower()[:4].replace("-", " ") == b.lower()[:4].replace("-", " ") for a, b in pairs)
    numbers = ("20", "30", "50", "60", "70", "80", "80", "100", "120")
    assert all(number in name for number, name in zip(numbers, load_class_names("gtsrb"), strict=False))


def test_alphabetical_sets_are_in_the_order_of_their_folders():
    for name in ("dtd", "food101", "resisc45", "eurosat", "imagenette", "imagewoof", "gtsrb", "cifar100"):
        own = [own.replace(" ", "_").lower() for own in class_set(name).own_names]
        assert own == sorted(own), name


def test_imagenet_is_open_clips():
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

    names = load_class_names("imagenet")
    apart = {index for index, name in enumerate(names) if name != IMAGENET_CLASSNAMES[index]}
    assert apart == {744, 836} and (names[744], names[836], names[837]) == ("projectile", "sunglass", "sunglasses")
    for name, theirs in (("imagenet", OPENAI_IMAGENET_TEMPLATES), ("imagenet_simple", SIMPLE_IMAGENET_TEMPLATES)):
        ours = load_templates(name)
        assert fill(ours, "hot dog") == tuple(template("hot dog") for template in theirs)
    assert len(load_templates("imagenet")) == 80 and len(load_templates("imagenet_simple")) == 7


def test_a_source_gets_the_templates_of_its_classes():
    def found(names, name="x"):
        return default_templates(SimpleNamespace(name=name, class_names=tuple(names), templates=None))

    assert found(["SeaLake", "River", *class_set("eurosat").own_names[:8]]) == load_templates("satellite")
    assert found(f"{number:05d}" for number in range(43)) == load_templates("signs")
    assert found(str(number) for number in range(10)) == load_templates("digits")
    assert found(name.replace(" ", "_") for name in load_class_names("food101")) == load_templates("food")
    assert found(load_class_names("food101")[:100]) == load_templates("photo")
    assert found(["positive", "negative"]) == load_templates("photo")
    assert found(f"n{number:08d}" for number in range(1000)) == load_templates("imagenet")
    assert found(load_class_names("imagenet")) == load_templates("imagenet")
    nameless = SimpleNamespace(name="x", class_names=None, templates=None)
    assert default_templates(nameless, load_class_names("dtd")) == load_templates("textures")
    assert default_templates(nameless) == load_templates("photo")


def test_spoken_names_follow_the_order_of_the_data():
    folders = sorted(class_set("fer2013").own_names)  # alphabetical, unlike the labels of the original file
    assert load_class_names("fer2013")[3:5] == ("happy", "sad")
    names = load_class_names("fer2013", folders)
    assert dict(zip(folders, names, strict=True))["disgust"] == "disgusted" and names[4:6] == ("neutral", "sad")
    with pytest.raises(UserError, match="eurosat: 10 class names given, but the data has 2 classes"):
        load_class_names("eurosat", ["a", "b"])
    assert class_set_of(()) is None


def test_files_and_wrong_names(tmp_path):
    (tmp_path / "names.json").write_text('["a", "b"]')
    assert load_class_names(tmp_path / "names.json") == load_class_names(str(tmp_path / "names.json")) == ("a", "b")
    with pytest.raises(UserError, match="eurosatt: neither a file nor a set .*Did you mean 'eurosat'") as caught:
        load_class_names("eurosatt")
    assert "\n" not in str(caught.value)
    (tmp_path / "twice.txt").write_text("a\nb\na\n")
    with pytest.raises(UserError, match="twice.txt: 'a' names both class 1 and class 3"):
        load_class_names(tmp_path / "twice.txt")

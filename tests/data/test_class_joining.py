"""Class names out of two places are joined by name, by WordNet id or by number; by place only where that is said."""

import json
from pathlib import Path

import numpy as np
import pytest
from class_names import load_class_names
from PIL import Image
from shard_writing import write_tar

from contrastive.data.class_joining import (
    check_classes,
    in_classes_of,
    join,
    like_ids,
    read_class_file,
    spoken_names,
    warn_of_ids,
)
from contrastive.data.class_sets import ClassSet, class_set, wordnet_lines
from contrastive.data.prompts import load_templates
from contrastive.data.sources import announce, open_source
from contrastive.errors import UserError

WNIDS = ("n01440764", "n01443537", "n02102040")
SPOKEN = ("tench", "goldfish", "English Springer Spaniel")
IMAGENETTE = class_set("imagenette").own_names


def folders(root: Path, *names: str, images: int = 1) -> str:
    for shade, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(images):
            Image.fromarray(np.full((8, 8, 3), shade % 256, np.uint8)).save(root / name / f"{number}.png")
    return str(root)


def said(file: Path, content: object) -> str:
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


def test_a_name_that_begins_like_another_is_not_that(tmp_path):
    food = folders(tmp_path / "food", "dumplings soup", "pizza")
    with pytest.raises(UserError, match="food101: 101 class names given, .* without a name there: 'dumplings soup'"):
        open_source(food, classes="food101")


def test_the_same_names_in_another_order(tmp_path):
    pets = folders(tmp_path / "pets", "cat", "dog", "sea lion")
    names = said(tmp_path / "names.txt", "Dog\nsea_lion\ncat\n")
    source = open_source(pets, classes=names)
    assert source.class_names == ("cat", "Dog", "sea_lion") and source.own_names == ("cat", "dog", "sea lion")
    assert [source.captions(i)[0] for i in range(3)] == [f"a photo of a {n}." for n in ("cat", "Dog", "sea lion")]
    assert source.stored.fingerprint == open_source(pets).stored.fingerprint != source.fingerprint


def test_other_names_are_paired_in_order_and_shown(tmp_path, capsys):
    pets = folders(tmp_path / "pets", "cat", "dog", "sea lion")
    source = open_source(pets, classes=said(tmp_path / "names.txt", "tabby\nhound\nseal\n"))
    announce(source)
    shown = " ".join(capsys.readouterr().err.split())
    assert "in the order of the classes" in shown and "cat → tabby, dog → hound, sea lion → seal" in shown
    assert source.class_names == ("tabby", "hound", "seal")


@pytest.mark.parametrize(
    ("own", "given", "message"),
    [
        (("cat", "dog"), ["cat", "dog", "seal"], "3 class names given, but the data has 2 .* data: 'seal'"),
        (("cat", "dog", "ape"), ["cat", "dog"], "2 class names given, but the data has 3 .* there: 'ape'"),
        (("cat", "dog"), ["cat", "hound"], "same in part only; without a name there: 'dog'; .* data: 'hound'"),
        (("Dog", "dog"), ["a dog", "dog"], "without a name there: 'Dog'"),
        (("Dog", "dog"), ["DOG", "cat"], "same in part only; without a name there: 'Dog', 'dog'"),
        (("6", "11", "13"), {"a": "x", "b": "y", "c": "z"}, "without a name there: '6', '11', '13'"),
        (("6", "11"), list("abcdefghijklmnop"), "may count from 0 or from 1; give a JSON file that says it"),
        (("0", "7"), list("abc"), "a class is numbered 7"),
        (None, {"1": "a", "2": "b"}, "numbers 1 to 2, but labels count from 0"),
    ],
)
def test_what_cannot_be_joined_is_refused(tmp_path, own, given, message):
    file = said(tmp_path / "names.json", given)
    with pytest.raises(UserError, match=message) as caught:
        load_class_names(file, own)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "own", "names"),
    [
        ("x.txt", "n01443537 goldfish, Carassius auratus\nn01440764 tench, Tinca tinca\n", WNIDS[:2], SPOKEN[:2]),
        ("x.txt", "n01440764\nn02102040\nn01443537\n", WNIDS, SPOKEN),
        ("x.txt", "n02119789 1 kit_fox\nn01440764 2 tench\n", ("n01440764",), ("tench",)),
        ("x.txt", "n01440764,my fish\n", ("n01440764",), ("my fish",)),
        ("x.json", {"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}, WNIDS[1::-1], ("goldfish", "tench")),
        ("x.json", {"0": ["n01440764", "tench"], "1": ["n01443537", "gold_fish"]}, ("0", "1"), ("tench", "gold_fish")),
        ("x.json", {"n01440764": "tench", "n01443537": "goldfish"}, WNIDS[:1], ("tench",)),
        ("x.json", {"10": "k", "2": "b", "1": "a"}, ("1", "10", "2"), ("a", "k", "b")),
        ("x.json", {"0": "cat", "1": "dog"}, ("dog", "cat"), ("dog", "cat")),
        ("x.json", {"0": "cat", "1": "dog"}, ("00", "01"), ("cat", "dog")),
        ("x.json", {"1": "dog", "0": "cat"}, None, ("cat", "dog")),
        ("x.json", {"dog": "a hound", "cat": "a tabby"}, ("cat", "dog"), ("a tabby", "a hound")),
        ("x.txt", "0: airplane\n1: car\n", ("1",), ("car",)),
        ("x.txt", "1 001.Albatross\n2 002.Auklet\n", ("1", "2"), ("Albatross", "Auklet")),
        ("x.txt", "/a/airfield 0\n/b/bar 1\n", ("1",), ("/b/bar",)),  # as Places365 has them
        ("x.txt", "cat=0\ndog=1\n", ("dog", "cat"), ("dog", "cat")),
        ("x.txt", "class 0\nclass 1\n", ("class 1", "class 0"), ("class 1", "class 0")),
        ("x.txt", "1. cat\n2. dog\n", ("Dog", "Cat"), ("dog", "cat")),
        ("x.json", {"dog": 0, "cat": 1}, ("cat", "dog"), ("cat", "dog")),
        ("x.json", {"model_type": "vit", "id2label": {"0": "dog", "1": "cat"}}, ("cat", "dog"), ("cat", "dog")),
        ("x.txt", "C\nC#\nC++\n", ("C#", "C", "C++"), ("C#", "C", "C++")),
        ("x.txt", "Café\nthé\n", ("thé", "cafe\u0301"), ("thé", "Café")),
        ("x.txt", "a\nb\nc\n", ("1", "2", "3"), ("a", "b", "c")),
        ("x.txt", "a\nb\nc\n", ("2", "0"), ("c", "a")),
        ("x.txt", "goldfish\ntench\nEnglish Springer Spaniel\n", WNIDS, SPOKEN),
    ],
)
def test_files_of_names_as_they_are_found(tmp_path, name, content, own, names):
    assert load_class_names(said(tmp_path / name, content), own) == names


@pytest.mark.parametrize(
    ("own", "given", "names"),
    [
        (("001.Laysan_Albatross", "002.Auklet"), ["auklet", "Laysan Albatross"], ("Laysan Albatross", "auklet")),
        (("n02085620-Pug", "n02085782-Spaniel"), ["spaniel", "cat"], None),
        (("n02085620-Pug", "n02085782-Spaniel"), ["spaniel", "pug"], ("pug", "spaniel")),
        (("0_cat", "1_dog"), {"dog": "a hound", "cat": "a tabby"}, ("a tabby", "a hound")),
        (("cat", "dog"), ["001.dog", "002.cat"], ("cat", "dog")),
    ],
)
def test_numbers_and_ids_before_names_are_no_part_of_them(tmp_path, own, given, names):
    file = said(tmp_path / "x.json", given)
    if names is None:
        with pytest.raises(UserError, match="the same in part only"):
            load_class_names(file, own)
    else:
        assert load_class_names(file, own) == names


def test_folders_numbered_before_their_names_are_spoken_without(tmp_path, capsys):
    source = open_source(folders(tmp_path / "cub", "001.Laysan_Albatross", "002.Auklet"))
    announce(source)
    assert source.captions(0)[0] == "a photo of a Laysan Albatross." and source.class_names[1] == "Auklet"
    assert "class names without their numbers: 001.Laysan_Albatross →" in " ".join(capsys.readouterr().err.split())
    dogs = folders(tmp_path / "dogs", "n02085620-Chihuahua", "n02085782-Japanese_spaniel")
    assert open_source(dogs).captions(1)[0] == "a photo of a Japanese spaniel."
    assert open_source(dogs, classes="imagenet").class_names == ("Chihuahua", "Japanese Chin")


@pytest.mark.parametrize(
    "names", [("1 dollar", "2 dollar"), ("707-320", "727-200"), ("3 cats", "dogs"), ("1_a", "1_b"), ("0", "1"), ()]
)
def test_numbers_that_tell_names_apart_stay(names):
    assert spoken_names(names) is None


def test_imagenet_as_wordnet_names_it_is_joined_by_its_order():
    lemmas = dict(line.split("\t") for line in wordnet_lines("imagenet_synset_to_lemma.txt"))
    imagenet = class_set("imagenet")
    own = [lemmas[number] for number in imagenet.own_names]
    own[517] = "crane2"  # told apart, as `datasets` has it
    assert join(imagenet, own) == (imagenet.names, "by name") and spoken_names(own) == imagenet.names
    assert spoken_names(own[::-1]) is None


@pytest.mark.parametrize("content", ["'dog',\n'cat',\n", '"dog"\n"cat"\n', "lambda: 'x'\ncat\n"])
def test_names_written_as_python_are_refused(tmp_path, content):
    with pytest.raises(UserError, match="is Python code; write the text alone, one a line, or a JSON list"):
        load_class_names(said(tmp_path / "x.txt", content), ("cat", "dog"))


def test_names_beside_class_folders_are_joined_to_them(tmp_path):
    pets = folders(tmp_path / "pets", "cat", "dog")
    said(tmp_path / "pets" / "classes.json", {"dog": "a hound", "cat": "a tabby"})
    source = open_source(pets)
    assert source.class_names == ("a tabby", "a hound") and source.own_names == ("cat", "dog")
    said(tmp_path / "pets" / "classes.json", ["dog", "cow"])
    with pytest.raises(UserError, match=r"classes.json: .* the same in part only; .* there: 'cat'; .* data: 'cow'"):
        open_source(pets)


def test_synonyms_that_are_shared_are_told_apart(tmp_path):
    lines = "n02012849 crane\nn03126707 crane\nn01440764 tench, Tinca tinca\n"
    assert read_class_file(Path(said(tmp_path / "x.txt", lines))).names == ("crane bird", "construction crane", "tench")
    with pytest.raises(UserError, match="'tench' names both class 1 and class 2"):
        read_class_file(Path(said(tmp_path / "y.json", {"a": "tench", "b": "tench"})))


def test_wordnet_ids_are_spoken_in_any_form(tmp_path):
    source = open_source(folders(tmp_path / "wnids", *WNIDS))
    assert source.class_names == SPOKEN and source.own_names == WNIDS
    assert source.templates == load_templates("imagenet") and source.captions(0)[0] == "a bad photo of a tench."
    rows = "".join(f"wnids/{wnid}/0.png,{wnid}\n" for wnid in WNIDS[::2])
    table = open_source(said(tmp_path / "t.csv", "image,label\n" + rows))
    assert table.class_names == SPOKEN[::2] and table.captions(1) == source.captions(2)
    picture = (tmp_path / "wnids" / WNIDS[0] / "0.png").read_bytes()
    for place in ("plain", "named"):
        members = [
            (f"{n}.{end}", data) for n, own in enumerate(WNIDS) for end, data in (("png", picture), ("cls", own))
        ]
        (tmp_path / place).mkdir()
        write_tar(tmp_path / place / "0.tar", [(n, d.encode() if isinstance(d, str) else d) for n, d in members])
    said(tmp_path / "named" / "classnames.txt", "\n".join(WNIDS[::-1]))
    for place in ("plain", "named"):
        shards = open_source(str(tmp_path / place / "0.tar"))
        assert [shards.class_names[shards.label(i)] for i in range(3)] == list(SPOKEN)
        assert shards.captions(2) == source.captions(2)
    assert len(open_source(str(tmp_path / "plain" / "0.tar")).class_names) == 1000


@pytest.mark.parametrize("classes", [None, "imagenet", "imagenette"])
def test_imagenettes_ten_have_one_set_of_prompts(tmp_path, classes):
    source = open_source(folders(tmp_path / "a", *IMAGENETTE), classes=classes)
    assert len(set(source.class_names)) == 10 and source.templates == load_templates("imagenet")
    if classes != "imagenet":
        named = open_source(folders(tmp_path / "b", *class_set("imagenette").names))
        numbered = open_source(folders(tmp_path / "c", *map(str, range(10))), classes="imagenette")
        said = {source.captions(i) for i in range(10)}
        assert said == {named.captions(i) for i in range(10)} == {numbered.captions(i) for i in range(10)}


def test_ids_beyond_imagenet_and_of_no_set(tmp_path, capsys):
    assert spoken_names(("n01440764", "cat")) == ("tench", "cat") and spoken_names(("cat",)) is None
    both = spoken_names(("n00004475", "n01440764", "n99999999"))
    assert both == ("organism", "tench", "n99999999")
    source = open_source(folders(tmp_path / "x", "n00004475", "n99999999"))
    warn_of_ids(source)
    assert "1 of 2 class names look like ids, as 'n99999999'" in " ".join(capsys.readouterr().err.split())


def test_every_id_has_a_name_of_its_own():
    whole = class_set("imagenet")
    assert spoken_names(whole.own_names) == whole.names
    assert load_class_names("imagenet", whole.own_names[::-1]) == whole.names[::-1]
    ids = [f"n{number:08d}" for number in (12946849, 2012849, 3126707, 4475)]
    assert len(set(spoken_names(ids))) == 4


def test_numbered_folders(tmp_path, capsys):
    hundred = folders(tmp_path / "hundred", *map(str, range(100)))
    source = open_source(hundred, classes="cifar100")
    places = {source.stored[i].key.partition("/")[0]: source.label(i) for i in range(100)}
    assert places == {str(number): number for number in range(100)}
    assert source.class_names == class_set("cifar100").names
    with pytest.raises(UserError, match="10 class names given, but a class is numbered 99"):
        open_source(hundred, classes="cifar10")
    for names, told in (
        (("00", "01", "10", "02"), "numbered 0 to 10 with gaps"),
        (("1", "2", "3"), "numbered 1 to 3: label 0 is '1'"),
        (("0", "1"), "numbered 0 to 1: the number is the label"),
    ):
        source = open_source(folders(tmp_path / told[-9:], *names))
        assert told in source.reading and list(source.class_names) == sorted(names, key=int)
    with pytest.raises(UserError, match="'01' and '1' are the same number"):
        open_source(folders(tmp_path / "twice", "1", "01"))
    mixed = open_source(folders(tmp_path / "mixed", "class10", "class9"))
    assert mixed.class_names == ("class10", "class9") and mixed.reading == "2 class folders"


def test_junk_and_empty_folders_are_no_classes(tmp_path):
    root = tmp_path / "data"
    before = open_source(folders(root, "cat", "dog")).stored.fingerprint
    folders(root, "cat", "__MACOSX", ".ipynb_checkpoints", "dog/@eaDir")
    (root / "bird").mkdir()
    (root / "lost+found").mkdir()
    source = open_source(str(root))
    assert source.class_names == ("cat", "dog") and len(source) == 2
    counts = {reason: found["count"] for reason, found in source.left_aside.items()}
    assert counts == {"system folders": 3, "folders without images": 1}
    assert source.left_aside["folders without images"]["keys"] == ["bird"]
    # A run begun when the empty one was a class, with other labels, is not to go on.
    assert before != source.stored.fingerprint


def test_labels_of_other_data_are_joined_by_name(tmp_path):
    train = open_source(folders(tmp_path / "train", "ape", "bird", "cat", "dog"))
    held_out = open_source(folders(tmp_path / "val", "Dog", "bird"))
    joined = in_classes_of(train.class_names, train.name, held_out)
    assert [joined.label(i) for i in range(2)] == [joined[i].label for i in range(2)] == [3, 1]
    assert joined.class_names == train.class_names and joined.fingerprint != held_out.fingerprint
    assert in_classes_of(train.class_names, "x", train) is train
    with pytest.raises(UserError, match="has 2 classes, but m has 4; none of these: 'seal'"):
        in_classes_of(train.class_names, "m", open_source(folders(tmp_path / "other", "cat", "seal")))
    numbers = open_source(said(tmp_path / "val" / "x.csv", "image,label\nDog/0.png,1\nbird/0.png,0\n"))
    with pytest.raises(UserError, match="without class names: nothing says which of the 4 classes of m they are; put"):
        in_classes_of(train.class_names, "m", numbers)
    assert in_classes_of(None, "m", train).reading.endswith("labels as they are, since m names no classes")
    ids = open_source(folders(tmp_path / "ids", *WNIDS[:2]))
    assert [in_classes_of(WNIDS[1::-1], "m", ids).label(i) for i in range(2)] == [1, 0]
    assert [in_classes_of(SPOKEN[::-1], "m", ids).label(i) for i in range(2)] == [2, 1]


def test_names_and_templates_of_clip_benchmarks_layout(tmp_path):
    place = tmp_path / "cls" / "test"
    place.mkdir(parents=True)
    write_tar(
        place / "0.tar",
        [(f"{n}.{end}", data) for n in range(4) for end, data in (("jpg", b"x"), ("cls", b"%d" % (n % 2)))],
    )
    nameless = open_source(str(place / "0.tar"))
    assert nameless.class_names is None
    with pytest.raises(UserError, match="has labels, but neither captions nor class names: give --data.classes"):
        check_classes([nameless], {"data.classes": None})
    assert open_source(str(place / "0.tar"), classes="pcam").class_names == class_set("pcam").names
    said(place.parent / "classnames.txt", "airplane\nautomobile\n")
    said(place.parent / "zeroshot_classification_templates.txt", "a sketch of a {c}.\nthe {c}\n")
    source = open_source(str(place / "0.tar"))
    assert source.captions(1) == ("a sketch of a automobile.", "the automobile")
    assert "class names: " in source.reading and "classnames.txt" in source.reading
    assert open_source(str(place / "0.tar"), prompts="plain").captions(1) == ("automobile",)


def test_options_of_labelled_data_that_find_none(tmp_path):
    scenes = open_source("scenes:val", classes="cifar10")
    assert scenes.class_names is None
    for option in ({"classes": "cifar10"}, {"templates": "photo"}):
        with pytest.raises(UserError, match=f"--data.{next(iter(option))} .* nothing here has labels; leave it out"):
            check_classes([scenes], {f"data.{name}": value for name, value in option.items()})
    check_classes([scenes, open_source("digits:test")], {"data.classes": "digits", "data.templates": None})


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("0", "1"), 2),
        (("00ff12ab9c", "deadbeef01"), 2),
        (("550e8400-e29b-41d4-a716-446655440000", "x"), 0),
        (("737", "A320", "DC-10"), 0),
        (("n99999999", "cat", "dog"), 1),
        (("cafe", "facade", "decade"), 0),
    ],
)
def test_names_that_look_like_ids(names, found):
    assert len(like_ids(names)) == found


def test_how_names_were_joined_is_said():
    cifar = class_set("cifar10")
    assert join(cifar, ("1", "0"))[1] == "by number, from 0"
    assert join(cifar, [str(number) for number in range(1, 11)]) == (cifar.names, "by number, from 1")
    assert join(cifar, ("truck", "ship"))[1] == "by name" and join(cifar, None)[1] == "by label"
    names = ("a", "b")
    assert join(ClassSet("names.txt", "", names, names), ("x", "y"))[1].startswith("in the order of the classes")

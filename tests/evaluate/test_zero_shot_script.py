"""scripts/zero_shot.py on a real, untrained model and real sources."""

import json

import numpy as np
import pytest
from PIL import Image
from small_model import save_small_model, script_caller

from contrastive.commands.zero_shot_command import claim_zero_shot, save_confusion, write_zero_shot
from contrastive.data.class_joining import load_class_set
from contrastive.data.sources.scenes import HELD_OUT_PAIRS, PAIRS
from contrastive.errors import UserError


@pytest.fixture
def zero_shot(monkeypatch, capfd):
    return script_caller("zero_shot.py", monkeypatch, capfd)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("run") / "final")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """An image folder of three classes, one of them without a readable image."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog", "empty"):
        (folder / name).mkdir()
        for i in range(2):
            Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(folder / name / f"{i}.png")
    for i in range(2):
        (folder / "empty" / f"{i}.png").write_bytes(b"no picture")
    return folder


def test_scores_scenes_and_writes_the_result(zero_shot, model_folder):
    done = zero_shot(model_folder, "--data", "scenes:test", "--limit", 200, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    for shown in ("acc@1", "acc@5", "mean per-class recall", "chance level", "1.56 %", "lowest recall"):
        assert shown in done.stdout
    folder = model_folder / "zero_shot" / "scenes-test-limit-200"
    assert sorted(file.name for file in folder.iterdir()) == ["confusion.png", "zero_shot.json"]
    result = json.loads((folder / "zero_shot.json").read_text())
    assert result["model"] == str(model_folder) and result["data"] == "scenes:test" and result["date"]
    assert result["class_names"] == [" ".join(pair) for pair in PAIRS]
    confusion = np.array(result["confusion"])
    assert confusion.shape == (64, 64) and confusion.sum() == result["num_images"] == 200
    assert result["acc1"] == pytest.approx(100 * np.trace(confusion) / 200)
    with Image.open(folder / "confusion.png") as picture:
        assert min(picture.size) > 1000


def test_tells_pairs_never_trained_on_apart(zero_shot, model_folder, tmp_path):
    made = zero_shot(model_folder, "--data", "scenes:test", "--limit", 300, "--out", tmp_path, "--json")
    assert json.loads(made.stdout) == json.loads((tmp_path / "zero_shot.json").read_text())
    done = zero_shot(model_folder, "--data", "scenes:test", "--limit", 300, "--out", tmp_path)
    assert "acc@1, held-out classes" in done.stdout and "acc@1, classes seen in training" in done.stdout
    result = json.loads((tmp_path / "zero_shot.json").read_text())
    confusion = np.array(result["confusion"])
    heldout = [PAIRS.index(pair) for pair in HELD_OUT_PAIRS]
    expected = 100 * confusion.diagonal()[heldout].sum() / confusion[heldout].sum()
    assert result["heldout_acc1"] == pytest.approx(expected)


def test_skips_what_it_cannot_read_and_replaces_only_its_own_result(zero_shot, model_folder, pictures, tmp_path):
    templates = tmp_path / "templates.txt"
    templates.write_text("a {}\nthe {}\n")
    names = tmp_path / "names.json"
    names.write_text('["kitten", "puppy", "nothing"]')
    out = tmp_path / "out"
    call = (model_folder, "--data", pictures, "--classes", names, "--templates", templates, "--out", out)
    first, second = zero_shot(*call), zero_shot(*call)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "2 unreadable_image" in first.stdout and "1 (nothing)" in first.stdout
    paired = " ".join(first.stderr.split())
    assert "in the order of the classes" in paired and "cat → kitten, dog → puppy, empty → nothing" in paired
    assert "replacing" not in first.stderr and "replacing the earlier result" in second.stderr
    result = json.loads((out / "zero_shot.json").read_text())
    assert result["skipped"] == {"unreadable_image": 2} and result["missing_classes"] == ["nothing"]
    assert result["own_names"] == ["cat", "dog", "empty"]
    assert result["class_names"] == ["kitten", "puppy", "nothing"] and result["templates"] == [
        "a {}",
        "the {}",
    ]

    before = (out / "zero_shot.json").read_bytes()
    other = zero_shot(model_folder, "--data", "digits", "--out", out)
    assert other.returncode == 2 and "choose another --out" in other.stderr
    assert (out / "zero_shot.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("RUN", "--data", "scenes:val"), "no class names"),
        (("RUN", "--data", "scenes:tset"), "Did you mean 'test'"),
        (("RUN", "--data", "digits", "--bach-size", "4"), "Did you mean 'batch_size'"),
        (("RUN", "--data", "digits", "--batch-size", "0"), "batch_size is 0; it must be above 0"),
        (("/no/such/run", "--data", "digits"), "/no/such/run"),
        (("RUN",), "--data"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(zero_shot, model_folder, arguments, message):
    before = sorted(model_folder.rglob("*"))
    done = zero_shot(*(model_folder if argument == "RUN" else argument for argument in arguments))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("zero_shot.py: error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert sorted(model_folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("names.txt", "cat\ndog\ncat\n", "'cat' names both class 1 and class 3"),
        ("names.json", '["cat", "cat"]', "'cat' names both class 1 and class 2"),
        ("names.txt", "cat\n\ndog\n", "class 2 has no name"),
        ("names.json", '{"cat": 0.5}', "JSON list"),
        ("names.json", "[cat", "not a list of names"),
    ],
)
def test_a_wrong_file_of_class_names_is_one_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        load_class_set(tmp_path / name)


def test_class_names_one_a_line(tmp_path):
    (tmp_path / "names.txt").write_bytes("\ufeffcat\r\nhot dog \r\n\r\n".encode())
    assert load_class_set(tmp_path / "names.txt").names == ("cat", "hot dog")


def test_a_run_can_be_moved_but_another_model_is_kept_out(tmp_path):
    result = {"acc1": 1.0, "num_images": 1, "confusion": [[1]], "class_names": ["a"]}
    write_zero_shot(claim_zero_shot(tmp_path / "a", "digits"), tmp_path / "a", "digits", result)
    (tmp_path / "a").rename(tmp_path / "b")
    write_zero_shot(claim_zero_shot(tmp_path / "b", "digits"), tmp_path / "b", "digits", result)
    with pytest.raises(UserError, match="choose another --out"):
        claim_zero_shot(tmp_path / "c", "digits", tmp_path / "b" / "zero_shot" / "digits")
    (tmp_path / "d").write_text("a file")
    with pytest.raises(UserError, match="cannot write"):
        claim_zero_shot(tmp_path / "b", "digits", tmp_path / "d")


@pytest.mark.parametrize("num_classes", [1, 20, 64, 300])
def test_confusion_pictures_of_any_size(tmp_path, num_classes):
    confusion = np.diag(np.arange(num_classes))  # class 0 has no image
    names = [f"class ${i}$ with a name that is far too long for a label" for i in range(num_classes)]
    save_confusion(confusion, names, tmp_path / "c.png", title="any & $all$")
    with Image.open(tmp_path / "c.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert 400 < pixels.shape[0] < 2000 and 400 < pixels.shape[1] < 2000
    if num_classes > 1:  # the diagonal is dark blue
        assert ((pixels[..., 2] - pixels[..., 0] > 60) & (pixels.sum(axis=2) < 300)).any()

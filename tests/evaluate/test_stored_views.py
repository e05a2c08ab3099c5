"""A teacher's embeddings of views and captions: those of the views that training draws again, of no other data."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from colour_model import COLOURS, ColourSource
from rank_processes import run_on_ranks
from small_model import save_small_model, script_caller

import contrastive
from contrastive.data.augment import AugmentConfig, augment
from contrastive.data.record import BadSample
from contrastive.data.sources import open_source
from contrastive.data.stored_views import Views, find_views
from contrastive.errors import UserError
from contrastive.evaluate.embedding_writing import embed_views

AUGMENT = AugmentConfig(crop_scale=(0.2, 0.9), flip=True, color_jitter=(0.3, 0.3, 0.3, 0.1))
LAYOUT = {"dtype": "float32", "precision": "fp32", "samples_per_shard": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("teacher") / "final")


@pytest.fixture(scope="module")
def bundle(folder):
    return contrastive.load(folder)


@pytest.fixture
def source():
    return made_source()


def made_source():
    texts = {0: ("a red thing", "red"), 1: (" ", "green"), 2: (), **{i: (f"number {i}",) for i in range(3, 11)}}
    made = ColourSource([list(COLOURS)[i % 6] for i in range(11)], texts=texts, unreadable=(3,))
    made.fingerprint = "eleven colours"
    return made


def embed(out, bundle, source, count=3, **options):
    layout = {**LAYOUT, **options}
    return embed_views(out, bundle, source, Views(count, AUGMENT), device="cpu", batch_size=7, **layout)


def test_views_and_captions_are_those_that_are_drawn_again(tmp_path, bundle, source):
    _, left_out = embed(tmp_path, bundle, source)
    assert left_out == {"unreadable_image": 1, "empty_caption": 1}
    stored = pickle.loads(pickle.dumps(find_views(tmp_path)))  # as a worker has it
    stored.check(source, AUGMENT)
    assert stored.views == Views(3, AUGMENT)
    assert stored.logit_scale == pytest.approx(bundle.model.logit_scale.exp().item())
    for index, number in ((0, 0), (0, 2), (5, 1), (10, 2)):
        rng = stored.views.draws(index, number)
        pixels = bundle.preprocess.normalize(augment(source[index].image, 16, AUGMENT, rng))
        with torch.no_grad():
            expected = bundle.model.encode_image(pixels[None])[0]
        torch.testing.assert_close(stored.image(index, number), expected)
    for index, caption, text in ((0, 1, "red"), (1, 1, "green"), (9, 0, "number 9")):
        with torch.no_grad():
            expected = bundle.model.encode_text(bundle.tokenizer([text]))[0]
        torch.testing.assert_close(stored.texts(index, [caption])[0], expected)
    for ask in (lambda: stored.image(3, 0), lambda: stored.texts(1, [1, 0]), lambda: stored.texts(2, [0])):
        with pytest.raises(BadSample, match="no_embedding"):
            ask()


def test_views_differ_by_image_and_number_and_not_by_how_many_there_are(source):
    three, five = Views(3, AUGMENT), Views(5, AUGMENT)
    draws = {(i, n): tuple(five.draws(i, n).random(3)) for i in range(4) for n in range(5)}
    assert len(set(draws.values())) == 20
    assert draws[2, 1] == tuple(three.draws(2, 1).random(3))
    image = open_source("scenes:val")[0].image
    whole = AugmentConfig(crop_scale=(1.0, 1.0))
    small, large = (Views(1, whole).of(image, 0, size)[0] for size in (16, 32))
    assert small.shape == (3, 16, 16) and large.shape == (3, 32, 32)


def test_an_interrupted_command_goes_on(tmp_path, bundle, source):
    embed(tmp_path, bundle, source)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "texts-00001.npy").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    del config["complete"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is unfinished"):
        find_views(tmp_path).check(source, AUGMENT)
    kept = (tmp_path / "images-00000.npy").stat().st_mtime_ns
    embed(tmp_path, bundle, source)
    assert (tmp_path / "images-00000.npy").stat().st_mtime_ns == kept
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.pop("config.json") and before.pop("config.json") and before == after


def embed_on_rank(rank, world_size, model, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    _, left_out = embed(Path(folder) / "two", contrastive.load(model), made_source())
    assert left_out == {"unreadable_image": 1, "empty_caption": 1}
    dist.destroy_process_group()


def test_ranks_write_the_same_files(tmp_path, folder, bundle, source):
    run_on_ranks(2, embed_on_rank, 2, folder, str(tmp_path))
    embed(tmp_path / "one", bundle, source)
    one, two = (sorted((tmp_path / name).glob("*.npy")) for name in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two]
    for ours, theirs in zip(one, two, strict=True):
        np.testing.assert_allclose(np.load(ours), np.load(theirs), atol=1e-6)
    find_views(tmp_path / "two").check(source, AUGMENT)


def test_half_precision(tmp_path, bundle, source):
    embed(tmp_path / "half", bundle, source, dtype="float16")
    embed(tmp_path / "whole", bundle, source)
    half, whole = (find_views(tmp_path / name) for name in ("half", "whole"))
    assert np.load(tmp_path / "half" / "images-00000.npy").dtype == np.float16
    assert not torch.equal(half.image(0, 1), whole.image(0, 1))
    torch.testing.assert_close(half.image(0, 1), whole.image(0, 1), atol=1e-3, rtol=0)
    assert half.texts(0, [0]).norm().item() == pytest.approx(1, abs=1e-6)


def other_data(source, stored, out):
    source.fingerprint = "others"


def other_pictures(source, stored, out):  # under a fingerprint of names alone
    source.shown = source.shown[1:] + source.shown[:1]


def torn(source, stored, out):
    path = out / "images-00001.npy"
    path.write_bytes(path.read_bytes()[:-30])


def gone(source, stored, out):
    (out / "texts-00002.npy").unlink()


def of_another_store(source, stored, out):
    np.save(out / "images-00001.npy", np.zeros((4, 2, 32), np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_data, "of other data .*embed this with contrastive embed --views"),
        (other_pictures, "of views that come out otherwise here"),
        (torn, "images-00001.npy is damaged"),
        (gone, "texts-00002.npy is damaged"),
        (of_another_store, "images-00001.npy is not of"),
    ],
)
def test_what_does_not_fit_is_told_before_training(tmp_path, bundle, source, change, message):
    embed(tmp_path, bundle, source)
    change(source, find_views(tmp_path), tmp_path)
    with pytest.raises(UserError, match=message):
        find_views(tmp_path).check(source, AUGMENT)


def test_other_augmentation_is_told(tmp_path, bundle, source):
    embed(tmp_path, bundle, source)
    with pytest.raises(UserError, match=r"data.augment.flip is False, but the views of .* were drawn with True"):
        find_views(tmp_path).check(source, replace(AUGMENT, flip=False))


def test_a_folder_is_of_one_teacher_and_one_set_of_views(tmp_path, bundle, source):
    embed(tmp_path / "out", bundle, source)
    other = contrastive.load(save_small_model(tmp_path / "other", seed=1))
    for changed, message in (
        (lambda: embed(tmp_path / "out", other, source), "begun with another teacher"),
        (lambda: embed(tmp_path / "out", bundle, source, count=4), "begun with other views"),
        (lambda: embed(tmp_path / "out", bundle, source, dtype="float16"), "begun with dtype float32, not float16"),
        (lambda: embed(tmp_path / "other", bundle, source), "holds something else than stored views"),
    ):
        with pytest.raises(UserError, match=message):
            changed()


def test_damaged_config(tmp_path, bundle, source):
    embed(tmp_path, bundle, source)
    config = json.loads((tmp_path / "config.json").read_text())
    for change in ({"embed_dim": "wide"}, {"views": []}, {"logit_scale": None}, {"data": {"num_samples": 3}}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match="is damaged"):
            find_views(tmp_path)


@pytest.fixture
def script(monkeypatch, capfd):
    return script_caller("embed.py", monkeypatch, capfd)


def test_the_script(script, folder, tmp_path):
    (tmp_path / "run.yaml").write_text("loss: softmax\ndata: {augment: {crop_scale: [0.5, 0.8], flip: true}}\n")
    flags = ("--views", 2, "--augment", tmp_path / "run.yaml", "--dtype", "float16", "--device", "cpu")
    done = script(folder, "scenes:val", tmp_path / "out", *flags)
    assert done.returncode == 0, done.stderr
    assert "2 views of each of" in done.stderr
    stored = find_views(tmp_path / "out")
    stored.check(open_source("scenes:val"), AugmentConfig(crop_scale=(0.5, 0.8), flip=True))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--augment", "FILE"), "--augment says how views are drawn: say how many of each image with --views N"),
        (("--views", "2", "--limit", "9"), "leave out --limit"),
        (("--views", "2", "--space", "pooled"), "leave out --space"),
        (("--views", "0"), "views is 0; it must be above 0"),
        (("--views", "2", "--augment", "FILE"), "unknown key 'crop_scal'. Did you mean 'crop_scale'?"),
    ],
)
def test_bad_input_is_one_line(script, folder, tmp_path, flags, message):
    (tmp_path / "run.yaml").write_text("data: {augment: {crop_scal: [0.5, 0.8]}}\n")
    flags = [tmp_path / "run.yaml" if flag == "FILE" else flag for flag in flags]
    done = script(folder, "scenes:val", tmp_path / "out", *flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr
    assert not (tmp_path / "out").exists()


def test_labelled_data_has_no_captions_of_its_own(script, folder, tmp_path):
    done = script(folder, "digits:test", tmp_path / "out", "--views", 2, "--device", "cpu")
    assert done.returncode == 2 and "digits:test has no captions to embed as texts" in done.stderr

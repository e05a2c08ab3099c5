"""`contrastive curate` on a real, untrained model; and a run that trains on what it keeps."""

import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from launching import pretrain_here, rows
from PIL import Image
from rank_processes import script_on_ranks
from small_model import SCRIPTS, save_small_model, script_caller

import contrastive
from contrastive.data.order_choice import order_for
from contrastive.data.sources import open_source
from contrastive.errors import UserError
from contrastive.evaluate.embedding_store import StoreOptions, claim_store, store_config
from contrastive.evaluate.embeddings import embed_images, embed_texts

TINY = """
model:
  embed_dim: 16
  image: {image_size: 16, patch_size: 8, width: 16, depth: 1, num_heads: 2, mlp_dim: 32}
  text: {context_length: 8, width: 16, depth: 1, num_heads: 2, mlp_dim: 32}
data: {vocab_size: 300}
train: {global_batch_size: 4, log_every: 1}
checkpoint: {every: 3}
"""
MODEL = {"path": "", "key": "0", "preprocess": {}}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("run") / "final")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """20 pairs: number 7 shows what number 2 does, 11 is in the test set, 5 has no caption, 13 cannot be read."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)) for _ in range(20)]
    pictures[7] = pictures[2]
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number:02d}.png")
    (folder / "13.png").write_bytes(b"no picture")
    (folder / "test").mkdir()
    pictures[11].save(folder / "test" / "own.png")
    with (folder / "pairs.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "caption"])
        table.writerows([f"{number:02d}.png", "" if number == 5 else f"a thing {number}"] for number in range(20))
    return folder


@pytest.fixture
def curate(monkeypatch, capfd):
    return script_caller("curate.py", monkeypatch, capfd)


def table_of(out):
    return pq.read_table(out / "samples.parquet").to_pydict()


def test_each_rule_and_what_is_left_behind(curate, model_folder, pairs, tmp_path, embedded):
    out, data = tmp_path / "kept", pairs / "pairs.csv"
    call = (model_folder, data, out, "--duplicates", "0.9999", "--against", pairs / "test", "--against-above", "0.9999")
    done = curate(*call, "--cache", tmp_path / "cache", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    against = f"against {pairs / 'test'}"
    assert figures["dropped"] == {"unreadable image": 1, "no caption": 1, against: 1, "duplicate": 1}
    assert (figures["samples"], figures["kept"]) == (20, 16)
    found = table_of(out)
    assert dict(zip(found["index"], found["dropped"], strict=True)) == {
        number: {5: "no caption", 7: "duplicate", 11: against}.get(number) for number in range(20) if number != 13
    }
    assert [n for n in found["near"] if n is not None] == [2, 0] and found["key"][0].endswith("pairs.csv:0")
    source, kept = open_source(str(data)), open_source(str(out))
    assert [kept.captions(i) for i in range(16)] == [source.captions(i) for i in range(20) if i not in (5, 7, 11, 13)]
    bundle = contrastive.load(model_folder)
    scores = embed_images(bundle.model, source, bundle.preprocess, indices=[3], device="cpu").features
    score = (scores @ embed_texts(bundle.model, bundle.tokenizer, ["a thing 3"], device="cpu").T).item()
    assert found["score"][3] == pytest.approx(score, abs=1e-5) and found["score"][5] is None

    page = (out / "curation.html").read_text()
    assert page.count("<img") == 2 * 10 + 2 * 2 and "http" not in page and "near-duplicate" in page

    embedded.clear()
    best = curate(model_folder, data, out, "--keep-best", "0.25", "--cache", tmp_path / "cache")
    assert best.returncode == 0 and not embedded and "dropped: score" in best.stdout  # nothing is embedded again
    kept = open_source(str(out))
    scores = np.array([np.nan if score is None else score for score in found["score"]])
    expected = np.argsort(-scores[~np.isnan(scores)], kind="stable")[:4]  # round(0.25 * 18)
    places = np.array(found["index"])[~np.isnan(scores)][expected]
    assert sorted(kept[i].key for i in range(len(kept))) == sorted(source[int(i)].key for i in places)


def test_two_ranks_keep_what_one_does(curate, model_folder, pairs, tmp_path, free_port):
    words = (model_folder, pairs / "pairs.csv", tmp_path / "two", "--duplicates", "0.9999", "--against", pairs / "test")
    two = (*words, "--cache", tmp_path / "cache-of-two")
    status, told = script_on_ranks(2, free_port, SCRIPTS / "curate.py", *two, folder=tmp_path / "told")
    assert status == [0, 0], told
    assert curate(*words[:2], tmp_path / "one", *words[3:], "--cache", tmp_path / "cache").returncode == 0
    assert (tmp_path / "two" / "kept.npy").read_bytes() == (tmp_path / "one" / "kept.npy").read_bytes()


def test_a_run_trains_on_what_is_kept_and_not_on_something_else(curate, model_folder, pairs, tmp_path):
    out, config, cache = tmp_path / "kept", tmp_path / "tiny.yaml", tmp_path / "cache"
    config.write_text(TINY)
    call = (model_folder, pairs / "pairs.csv", out, "--cache", cache)
    assert curate(*call, "--duplicates", "0.9999").returncode == 0
    kept = open_source(str(out))
    order = order_for(kept, 4, 0)
    assert sorted(order.at(np.arange(17))) == list(range(17))  # each once an epoch
    run = ("--config", config, "--data.train", out, "--run_folder", tmp_path / "run")
    pretrain_here(*run, "--train.steps", "3")
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3]
    assert all(np.isfinite(row["loss"]) for row in rows(tmp_path / "run"))

    assert curate(*call, "--keep-best", "0.5").returncode == 0  # other samples under the same name
    with pytest.raises(UserError, match="cannot resume: num_samples is 9"):
        pretrain_here(*run, "--train.steps", "6", "--resume")


def test_images_without_captions_have_no_scores_and_no_doubles(curate, model_folder, tmp_path):
    done = curate(model_folder, "digits:test", tmp_path / "kept", "--duplicates", "0.9", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["scores"] == {"all": {}, "kept": {}} and 0 < figures["dropped"]["duplicate"] < figures["samples"] - 1
    kept = open_source(str(tmp_path / "kept"))
    assert len(kept) == figures["kept"] and kept.prompted and kept.label(0) is not None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("RUN", "digits:test", "OUT", "--keep-best", "0.5"), "digits:test has no captions to embed as texts"),
        (("RUN", "scenes:val,digits", "OUT"), "curate each by itself"),
        (("RUN", "PAIRS", "OUT", "--keep-best", "30"), "it must be from 0 to 1"),
        (("RUN", "PAIRS", "OUT", "--against-above", "0.9"), "has no effect without --against"),
        (("RUN", "PAIRS", "OUT", "--against", "PAIRS"), "names data twice, or DATA itself"),
        (("RUN", "PAIRS", "OUT", "--min-score", "2"), "nothing would be kept"),
        (("RUN", "PAIRS", "RUN"), "holds files that are not of a curation; give another OUT"),
        (("RUN", "STORE", "OUT"), "give the data that they are of"),
        (("RUN", "PAIRS", "OUT", "--against", "nowhere"), "unknown data source 'nowhere'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(curate, model_folder, pairs, tmp_path, arguments, told):
    places = {"RUN": model_folder, "PAIRS": pairs / "pairs.csv", "OUT": tmp_path / "out", "STORE": tmp_path / "store"}
    if "STORE" in arguments:
        claim_store(tmp_path / "store", store_config(MODEL, open_source("digits"), StoreOptions()))
    done = curate(*(places.get(argument, argument) for argument in arguments), "--cache", tmp_path / "cache")
    assert done.returncode == 2 and done.stdout == "" and told in done.stderr.replace("\n", " "), done.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_data_is_left_alone(curate, model_folder, pairs, tmp_path):
    out = tmp_path / "kept"
    assert curate(model_folder, pairs / "pairs.csv", out).returncode == 0
    done = curate(model_folder, "digits:test", out)
    assert done.returncode == 2 and "holds the curation of" in done.stderr
    assert len(open_source(str(out))) == 18

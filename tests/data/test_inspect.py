"""Inspecting a source: the figures are true, what is shown is what training gets, and the page is safe."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from contrastive.commands.inspect_command import main
from contrastive.data.augment import AugmentConfig
from contrastive.data.inspection import chosen_indices, distribution, measure, summary
from contrastive.data.loader import train_loader
from contrastive.data.order_choice import order_for
from contrastive.data.samples import PairDataset
from contrastive.data.sources import open_source
from contrastive.data.tokenizer import clip_tokenizer, train_bpe
from contrastive.errors import UserError
from contrastive.visualize.inspection_page import contact_sheet, see, spark

EVIL = "<script>alert('x')</script> & <b>"


def jpeg(height, width, grey):
    data = io.BytesIO()
    Image.new("RGB", (width, height), (grey, grey, grey)).save(data, "JPEG")
    return data.getvalue()


@pytest.fixture
def table(tmp_path):
    """Six samples: one picture and two captions are there twice, one image is broken."""
    rows = []
    for number, caption in enumerate([EVIL, "a dog", "a dog", "a dog", " ", "one two three"]):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(20 + 10 * (number // 2), 60, 40 * (number // 2)))
        rows.append({"image": f"{number}.jpg", "caption": [caption]})
    (tmp_path / "5.jpg").write_bytes(b"<html>")
    rows[1]["caption"] = ["a dog", "another [red]caption[/red]"]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "pairs.jsonl"


def inspect_data(*args):
    main([str(arg) for arg in args])


def figures_of(table, context_length=77):
    source, tokenizer = open_source(str(table)), clip_tokenizer(context_length)
    return summary(source, measure(source, range(6), tokenizer), tokenizer)


def test_figures_are_counted_by_hand(table):
    figures = figures_of(table)
    assert (figures["samples"], figures["inspected"], figures["readable"]) == (6, 6, 5)
    assert figures["formats"] == {"JPEG RGB": 5}
    assert figures["height"]["min"] == 20 and figures["height"]["max"] == 40 and figures["height"]["median"] == 30
    assert figures["width"]["histogram"] == {"edges": [60, 61], "counts": [5]}
    assert figures["short_side"]["max"] == 40
    assert sum(figures["height"]["histogram"]["counts"]) == 5
    assert figures["unusable"] == {
        "empty_caption": {"count": 1, "keys": ["pairs.jsonl:4"]},
        "unreadable_image": {"count": 1, "keys": ["pairs.jsonl:5"]},
    }
    assert figures["captions_per_sample"]["max"] == 2
    assert figures["caption_characters"]["min"] == 5 and figures["caption_characters"]["max"] == len(EVIL)
    assert figures["duplicate_captions"]["count"] == 2 and figures["duplicate_captions"]["of"] == 5
    assert figures["duplicate_captions"]["most_repeated"] == [
        {"what": "a dog", "times": 3, "keys": ["pairs.jsonl:1", "pairs.jsonl:2", "pairs.jsonl:3"]}
    ]
    assert figures["duplicate_images"]["count"] == 2  # 0 and 1, 2 and 3


@pytest.mark.parametrize(("context_length", "count"), [(4, 2), (3, 5), (77, 0)])
def test_a_caption_is_cut_where_it_has_more_tokens_than_the_context(table, context_length, count):
    # 'a dog' is two tokens between two special ones: 4 is just enough for it.
    figures = figures_of(table, context_length)
    assert figures["truncated_captions"] == {"count": count, "share": count / 5}
    assert figures["caption_tokens"]["min"] == 4


def test_tokens_are_counted_up_to_the_end_whatever_the_padding(table):
    # GPT-2's kind pads with the token that ends a text; and CLIP's vocabulary finds its end token in a text too.
    source, tokenizer = open_source(str(table)), clip_tokenizer()
    lengths = measure(source, range(5), tokenizer).lengths["caption_tokens"]
    tokenizer.pad_id = tokenizer.eos_id
    assert measure(source, range(5), tokenizer).lengths["caption_tokens"] == lengths
    table.write_text(table.read_text().replace("a dog", "a <end_of_text> dog"))
    assert min(measure(open_source(str(table)), range(5), clip_tokenizer()).lengths["caption_tokens"]) == 5


def test_what_is_shown_is_what_training_gets():
    source = open_source("scenes:val")
    tokenizer = train_bpe(text for index in range(50) for text in source.captions(index))
    augment = AugmentConfig(crop_scale=(0.3, 1.0), flip=True)
    seen, rate = see(source, tokenizer, 40, augment, 7, ("a {} b",), shown=5, samples=10)
    order = order_for(source, 64, 7)  # whatever the batch
    dataset = PairDataset(source, order, tokenizer, 40, augment, ("a {} b",))
    batch = next(iter(train_loader(dataset, num_steps=1)))
    assert len(seen) == 5 and rate > 0
    for place, sample in enumerate(seen):
        assert torch.equal(sample.image, batch["image"][place])
        assert torch.equal(sample.tokens, batch["tokens"][place])
        assert sample.captions == source.captions(int(batch["index"][place]))


def test_page_holds_the_pixels_and_escapes_the_text(table, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    inspect_data(table, "--out", out, "--image_size", 16, "--shown", 6, "--augment.crop_scale", 1, 1)
    page = (out / "index.html").read_text("utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page and "<b>" not in page
    assert "http" not in page  # nothing is fetched
    pictures = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    ]
    assert len(pictures) == 6 and all(picture.shape == (16, 16, 3) for picture in pictures)
    sheet = np.asarray(Image.open(out / "contact_sheet.png"))
    assert sheet.shape == (2 * 16 + 4, 3 * 16 + 2 * 4, 3)
    assert (sheet[:16, :16] == pictures[0]).all() and (sheet[20:, 40:] == pictures[5]).all()
    assert "a dog" in page and "pairs.jsonl:" in page
    assert json.loads((out / "figures.json").read_text())["images_per_second"] > 0
    said = capsys.readouterr().err
    inspect_data(table, "--out", out, "--image_size", 16, "--shown", 6, "--json")
    assert json.loads(capsys.readouterr().out) == json.loads((out / "figures.json").read_text())
    assert "unusable: unreadable_image" in said and "1: pairs.jsonl:5" in said


def test_keys_with_markup_are_printed_as_they_are(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(jpeg(20, 20, 1))
    (folder / "b[red].jpg").write_bytes(b"broken")
    for name in ("a", "b[red]"):
        (folder / f"{name}.txt").write_text("words")
    inspect_data(folder, "--out", tmp_path / "out", "--image_size", 16)
    assert "b[red].jpg" in capsys.readouterr().err


def test_data_without_a_usable_sample_is_reported_all_the_same(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.jpg").write_bytes(b"broken")
        (folder / f"{name}.txt").write_text("words")
    inspect_data(folder, "--out", tmp_path / "out")
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert figures["unusable"]["unreadable_image"]["count"] == 2 and figures["height"] is None
    assert "there are no samples to show" in capsys.readouterr().err


def test_labelled_data_counts_its_classes(tmp_path, monkeypatch):
    inspect_data("digits:test", "--out", tmp_path / "out", "--shown", 4, "--image_size", 16)
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert figures["classes"]["seen"] == figures["classes"]["names"] == 10
    assert figures["duplicate_captions"] is None and figures["formats"] == {"pixels": 355}


def test_the_subset_is_random_and_fixed_and_local_to_a_few_shards_when_remote():
    class Remote:
        remote = True

        def __len__(self):
            return 100_000

    local = open_source("scenes:train")
    indices = chosen_indices(local, 100, 0)
    assert len(set(indices.tolist())) == 100 and (indices == chosen_indices(local, 100, 0)).all()
    assert (indices != chosen_indices(local, 100, 1)).any() and (np.diff(indices) > 1).mean() > 0.9
    assert len(chosen_indices(open_source("digits:test"), None, 0)) == 355
    remote = chosen_indices(Remote(), 1000, 0)
    assert len(set(remote.tolist())) == 1000 and (np.diff(remote) > 1).sum() <= 3 and remote.max() < 100_000


def test_a_histogram_counts_everything_once():
    values = [1, 1, 2, 500, 1000]
    found = distribution(values)
    assert sum(found["histogram"]["counts"]) == 5 and len(found["histogram"]["counts"]) == 24
    assert len(spark(found)) == 24 and spark(found)[0] == "█" and spark(found)[1] == " "
    assert distribution([]) is None


def test_contact_sheet_of_one():
    assert contact_sheet([torch.zeros(3, 8, 8, dtype=torch.uint8)]).size == (8, 8)


def test_nothing_of_others_is_overwritten(table, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "index.html").write_text("precious")
    with pytest.raises(UserError, match="files that are not of an inspection"):
        inspect_data(table, "--out", out)
    assert (out / "index.html").read_text() == "precious"
    (out / "index.html").unlink()
    inspect_data(table, "--out", out, "--image_size", 16)
    inspect_data(table, "--out", out, "--image_size", 16)  # the same again
    with pytest.raises(UserError, match="holds the inspection of"):
        inspect_data("digits:test", "--out", out)


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ([], "SPEC"),
        (["digits", "--samples", "0"], "samples is 0"),
        (["digits", "--augment.crop_scale", "2", "3"], "crop_scale"),
        (["digits", "--caption_templates", "x"], "each needs {}"),
        (["digits", "--tokenizer", "clp"], "Did you mean 'clip'"),
        (["digitz"], "Did you mean 'digits'"),
        (["digits", "--tokenizer", "clip", "--vocab_size", "300"], "--vocab_size has no effect with --tokenizer clip"),
        (["scenes:val", "--classes", "digits"], "--classes digits is for labelled data"),
    ],
)
def test_mistakes_are_said_in_one_line(tmp_path, monkeypatch, args, match):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=match) as caught:
        inspect_data(*args)
    assert "\n" not in str(caught.value)


def test_real_shards(shared_data, tmp_path, monkeypatch):
    shard = shared_data / "flickr8k" / "dev-000000.tar"
    inspect_data(shard, "--samples", 200, "--shown", 4, "--out", tmp_path / "out")
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert figures["short_side"]["max"] == 160 and figures["captions_per_sample"]["min"] == 5
    assert not figures["unusable"] and figures["readable"] == 200

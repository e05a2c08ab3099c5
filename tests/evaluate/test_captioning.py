"""Scores of generated captions: against figures worked out by hand, and end to end with a decoder that knows all."""

import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from small_model import script_caller

from contrastive.data.preprocess import Preprocess, PreprocessConfig
from contrastive.data.sources import open_source
from contrastive.data.sources.scenes import Scenes
from contrastive.data.tokenizer import train_bpe
from contrastive.errors import UserError
from contrastive.evaluate import captioning
from contrastive.evaluate.captioning import caption_scores, share_named
from contrastive.files import write_folder
from contrastive.interop.bundle import Bundle, save_model
from contrastive.models import DualEncoder, ImageTowerConfig, ModelConfig, TextTowerConfig
from contrastive.models.caption_decoder import CaptionDecoderConfig
from contrastive.models.generate import GenerationConfig, generate, log_likelihood
from contrastive.objectives import captioner as captioner_module
from contrastive.objectives.caption import CaptionConfig, decoder_for
from contrastive.objectives.captioner import Captioner
from contrastive.objectives.learner import save_objectives


def test_bleu_by_hand():
    # Of 5 words 4, of 4 pairs 3, of 3 triples 2, of 2 quadruples 1 are in the reference, which is one word longer.
    found = caption_scores(["a red star is here", "x"], [["a red star is there too"], ["x"]])
    counts = (5 / 6) * (3 / 4) * (2 / 3) * (1 / 2)  # with the second caption's one word
    assert found["bleu4"] == pytest.approx(100 * counts**0.25 * math.exp(1 - 7 / 6), rel=1e-6)


def test_cider_of_references_themselves_and_of_nothing_shared():
    texts = ["a red star on the left side", "two blue rings far away here", "One, green heart; in the middle!"]
    assert caption_scores(texts, [[text] for text in texts])["cider"] == pytest.approx(1000)
    assert caption_scores(["q w e r", "t y u i", ""], [[text] for text in texts])["cider"] == 0
    # Case and punctuation are no words.
    upper = [text.upper() + "." for text in texts]
    assert caption_scores(upper, [[text] for text in texts])["cider"] == pytest.approx(1000)


def test_a_class_is_named_by_all_its_words_and_no_others():
    names = ("red star", "red ring", "blue star")
    captions = ["A star that is red.", "a big red star", "a red star and a ring", "a star", "a red heart", "blue star"]
    right = [share_named([caption], [0], names) for caption in captions]
    assert right == [100, 100, 0, 0, 0, 0]
    assert share_named(captions, [0, 0, 0, 0, 0, 2], names) == 50


@pytest.fixture(scope="module")
def captioner():
    torch.manual_seed(0)
    tokenizer = train_bpe((text for index in range(200) for text in Scenes().captions(index)), 400, 40)
    small = {"width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 16}
    image = ImageTowerConfig(image_size=32, patch_size=8, **small)
    config = ModelConfig(16, image, TextTowerConfig(vocab_size=tokenizer.vocab_size, context_length=40, **small))
    parts = DualEncoder(config).eval(), Preprocess(PreprocessConfig(image_size=32)), tokenizer, config
    decoder = decoder_for(CaptionDecoderConfig(**small), 16, tokenizer).eval()
    return Captioner(Bundle(*parts, Path("model")), decoder, tokenizer)


def told(monkeypatch, captioner, say):
    """Have a decoder that says of image `number` what `say` does."""

    def generate(decoder, image, how, numbers, attempt, own):
        assert image.shape == (len(numbers), 16, 16)
        return decoder.ids(captioner.bundle.tokenizer([say(number) for number in numbers])), torch.zeros(len(numbers))

    monkeypatch.setattr(captioner_module, "generate", generate)


def test_a_model_that_tells_the_truth_names_every_class(monkeypatch, captioner):
    source = Scenes("test", image_size=32, num_samples=64)
    told(monkeypatch, captioner, lambda number: source.captions(number)[0])
    found = captioning.captioning(captioner, source, device="cpu", batch_size=20)
    assert (found["named"], found["seen_named"], found["heldout_named"], found["num_images"]) == (100, 100, 100, 64)
    assert found["num_named"] == {"named": 64, "seen_named": 56, "heldout_named": 8}
    assert found["bleu4"] == pytest.approx(100)
    assert found["captions"]["test-00000003"] == source.captions(3)[0]
    # One that knows only what training has is wrong exactly in what is held out.
    heldout = source.heldout_labels
    told(monkeypatch, captioner, lambda n: "a star" if source.label(n) in heldout else source.captions(n)[-1])
    found = captioning.captioning(captioner, source, device="cpu", batch_size=20)
    assert (found["heldout_named"], found["seen_named"], found["named"]) == (0, 100, 87.5)


def test_images_are_captioned_by_the_decoder_itself(captioner):
    seen = []
    written, bad = captioning.caption_images(
        captioner, Scenes("val", 32, 5), GenerationConfig(), device="cpu", batch_size=3, tell=seen.append
    )
    assert [one.index for one in written] == list(range(5)) and not bad and seen == written
    assert all(one.log_likelihood < 0 for one in written)
    alone, _ = captioning.caption_images(captioner, Scenes("val", 32), GenerationConfig(), indices=[3], device="cpu")
    assert alone[0].text == written[3].text


def test_the_best_of_several_drawn_captions_is_nearest_to_its_image(captioner):
    """Among those that are drawn anyway, whatever batch an image is in; one alone is what it was."""
    source, numbers = Scenes("val", 32, 5), range(5)

    def written(how, indices=numbers, **more):
        return captioning.caption_images(captioner, source, how, indices=indices, device="cpu", **more)[0]

    pixels = torch.stack([captioner.bundle.preprocess(source[index].image) for index in numbers])
    patches, model = captioner.patches(pixels), captioner.bundle.model
    how, texts, likeness = GenerationConfig("sample", seed=1), [], []
    for attempt in range(4):
        ids, _ = generate(captioner.decoder, patches, how, numbers, attempt)
        texts.append(list(map(captioner.tokenizer.decode, ids)))
        likeness.append((model.encode_image(pixels) * model.encode_text(captioner.tokenizer(texts[-1]))).sum(dim=1))
    nearest = torch.stack(likeness).argmax(dim=0).tolist()
    found = written(GenerationConfig("sample", seed=1, best_of=4), batch_size=2)
    assert [one.text for one in found] == [texts[k][row] for row, k in enumerate(nearest)] and len(set(nearest)) > 1
    assert written(GenerationConfig("sample", seed=1, best_of=4), [3])[0].text == found[3].text
    assert [one.text for one in written(how)] == texts[0]
    with pytest.raises(UserError, match="model has no text tower: best_of compares captions with images"):
        bundle = replace(captioner.bundle, tokenizer=None)
        captioning.caption_images(replace(captioner, bundle=bundle), source, replace(how, best_of=2), device="cpu")


def test_classes_by_the_mean_likelihood_of_their_prompts(captioner):
    source, templates = Scenes("heldout", image_size=32, num_samples=16), ("a {}", "a picture of a {}")
    found = captioning.zero_shot_by_likelihood(captioner, source, device="cpu", templates=templates)
    pixels = torch.stack([captioner.bundle.preprocess(source[index].image) for index in range(16)])
    each = []
    for template in templates:
        tokens = captioner.bundle.tokenizer([template.replace("{}", name) for name in source.class_names])
        each.append(log_likelihood(captioner.decoder, captioner.patches(pixels), tokens).exp())
    predicted = sum(each).argmax(dim=1)
    labels = torch.tensor([source.label(index) for index in range(16)])
    assert found["acc1"] == pytest.approx(100 * (predicted == labels).float().mean().item())
    assert torch.equal(torch.tensor(found["confusion"]).sum(0), torch.bincount(predicted, minlength=64))
    assert found["templates"] == list(templates) and found["num_classes"] == 64


def test_without_anything_to_compare_with(captioner, monkeypatch):
    source = open_source("scenes:val")
    source.captions = lambda index: ()
    with pytest.raises(UserError, match="scenes:val has neither captions nor class names to compare"):
        captioning.captioning(captioner, source, device="cpu")
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(UserError, match="pip install 'contrastive.captions.'"):
        caption_scores(["a"], [["a"]])


@pytest.fixture(scope="module")
def folder(captioner, tmp_path_factory):
    """The same as a checkpoint holds it."""
    folder, options = tmp_path_factory.mktemp("model"), CaptionConfig(**asdict(captioner.decoder.config))
    bundle = captioner.bundle
    objective = SimpleNamespace(name="caption", options=options)
    weights = {f"objectives.caption.decoder.{name}": t for name, t in captioner.decoder.state_dict().items()}

    def fill(place):
        save_model(place, bundle.model.state_dict(), bundle.config, bundle.preprocess.config, bundle.tokenizer)
        save_objectives(place / "objectives", [objective], weights, None)

    write_folder(folder / "final", fill)
    return folder


def test_the_tasks_of_a_suite(folder, tmp_path, monkeypatch, capfd):
    for task in ("captioning", "caption_likelihood"):
        call = script_caller("evaluate.py", monkeypatch, capfd)
        words = [folder, "--task", task, "--data", "scenes:heldout", "--limit", 6, "--out", tmp_path / task]
        done = call(*words)
        assert done.returncode == 0, done.stderr
        (result,) = json.loads((tmp_path / task / "evaluation.json").read_text())["results"]
        wanted = ("named", "cider", "bleu4") if task == "captioning" else ("acc1", "heldout_acc1")
        assert set(wanted) <= set(result["figures"])


def test_the_script_captions_files_folders_and_data(folder, tmp_path, monkeypatch, capfd):
    for name in ("a", "b", "c"):
        Image.fromarray(Scenes()[ord(name)].image).save(tmp_path / f"{name}.png")
    (tmp_path / "torn.png").write_bytes(b"no picture")
    call = script_caller("caption.py", monkeypatch, capfd)
    done = call(folder, tmp_path / "b.png", tmp_path, "scenes:test", "--limit", 5, "--json")
    assert done.returncode == 0 and "not captioned: 1 unreadable_image" in done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(row["image"]).name for row in rows[:4]] == ["b.png", "a.png", "b.png", "c.png"] and len(rows) == 9
    assert rows[0]["caption"] == rows[2]["caption"] and rows[0]["log_likelihood"] < 0
    assert call(folder, tmp_path / "b.png").stdout == f"{tmp_path / 'b.png'}\t{rows[0]['caption']}\n"
    drawn = [call(folder, tmp_path / "b.png", "--sample", "--seed", seed).stdout for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing.png"], "caption.py: error: no image file nothing.png"),
        (["scenes:test", "--top-k", "3"], "--top-k has no effect without --sample; leave it out"),
        (["scenes:test", "--beam", "2", "--top-p", "0.5"], "--top-p has no effect without --sample"),
        (["scenes:test", "--length-penalty", "2"], "--length-penalty has no effect without --beam"),
        (["scenes:test", "--sample", "--top-p", "2"], "top_p is 2.0; it is a probability, 1 at most"),
        (["scenes:test", "--sample", "--beam", "2"], "two ways to choose a caption"),
        (["scenes:test", "--best-of", "2"], "--best-of has no effect without --sample; leave it out"),
    ],
)
def test_what_cannot_be_is_one_line(words, said, folder, monkeypatch, capfd):
    done = script_caller("caption.py", monkeypatch, capfd)(folder, *words)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1

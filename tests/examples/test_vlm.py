"""examples/vlm: it trains, comes back from its folder, takes a real language model, and counts captions honestly."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate.small_model import save_small_model
from native_model import Shapes, save_native
from PIL import Image
from rank_processes import script_on_ranks

from contrastive.errors import UserError

VLM = Path(__file__).resolve().parents[2] / "examples" / "vlm"
CLASSES = ("red circle", "red star", "blue circle")


@pytest.fixture
def call(tmp_path, free_port):
    """Run a script of the example; returns its exit status, and what it wrote to stderr."""

    def call(script, *arguments):
        (status,), told = script_on_ranks(1, free_port, VLM / script, *arguments, folder=tmp_path / "told")
        return status, told

    return call


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(VLM))


@pytest.fixture
def encoder(tmp_path):
    import contrastive

    return contrastive.load_image_encoder(save_small_model(tmp_path / "model"), layer=-1)


def build(encoder):
    from captioner import Captioner
    from language import small_language

    torch.manual_seed(0)
    captions = ["a red circle", "a blue star on a plain background", "two green hearts"] * 3
    return Captioner(encoder, *small_language(captions, vocab_size=300))


def test_trains_and_captions_from_the_command_line(tmp_path, call):
    model, out = save_small_model(tmp_path / "model"), tmp_path / "vlm"
    flags = ("--layer", -1, "--steps", 2, "--batch-size", 4, "--eval-images", 4, "--out", out)
    status, told = call("train.py", model, *flags)
    assert status == 0, told
    assert "scenes:heldout" in told and "% of 4 captions" in told
    results = json.loads((out / "results.json").read_text())
    assert [result["data"] for result in results] == ["scenes:test", "scenes:heldout"]
    image = tmp_path / "image.png"
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(image)
    shown = subprocess.run(
        [sys.executable, VLM / "caption.py", out, image], capture_output=True, text=True, timeout=300
    )
    assert shown.returncode == 0 and shown.stdout.startswith(f"{image}: ")
    status, told = call("caption.py", out, out / "results.json")
    assert status == 2
    assert told.splitlines()[-1].startswith("caption.py: error: ") and "is not an image" in told


def test_a_dry_run_shows_captions_and_writes_nothing(tmp_path, examples, encoder, capsys):
    spec = importlib.util.spec_from_file_location("vlm_train", VLM / "train.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    options = ("--layer", "-1", "--data", "digits", "--eval", "scenes:test", "--out", str(tmp_path / "vlm"))
    script.main([str(tmp_path / "model"), *options, "--dry-run"])
    told = capsys.readouterr().err
    assert "--data digits:train: 1,442 samples" in told and "--eval scenes:test" in told
    assert told.count(" is read as ") == 3 and not (tmp_path / "vlm").exists()


def test_captions_of_no_images_are_refused(examples):
    import caption

    with pytest.raises(UserError, match="which images"):
        caption.main(["runs/vlm"])


def test_the_loss_is_that_of_the_caption_alone(examples, encoder):
    model = build(encoder).eval()
    pixels, ids = torch.randn(2, 3, 16, 16), torch.randint(3, 200, (2, 5))
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    loss = model(pixels, ids, mask)
    other_padding = ids.masked_fill(~mask, 7)
    torch.testing.assert_close(model(pixels, other_padding, mask), loss)
    embeddings = torch.cat([model.prefix(pixels)[0], model.language_model.get_input_embeddings()(ids)], dim=1)
    first = embeddings.shape[1] - ids.shape[1]
    scores = model.language_model(inputs_embeds=embeddings).logits[:, first - 1 : -1]  # each position tells the next
    expected = torch.nn.functional.cross_entropy(scores[mask], ids[mask])
    torch.testing.assert_close(loss, expected)


def test_only_projector_and_language_model_learn(examples, encoder):
    model = build(encoder).train()
    assert not encoder.training
    model(torch.randn(2, 3, 16, 16), torch.randint(3, 200, (2, 5)), torch.ones(2, 5, dtype=torch.bool)).backward()
    assert all(parameter.grad is None for parameter in encoder.parameters())
    learning = [*model.projector.parameters(), *model.language_model.parameters()]
    assert all(parameter.grad is not None for parameter in learning)


def test_learns_two_captions_by_heart_and_saves_them(examples, encoder, tmp_path):
    from caption_data import collate
    from captioner import Captioner

    model = build(encoder).train()
    pixels = torch.randn(2, 3, 16, 16)
    texts = ["a red circle", "a blue star"]
    ids = [torch.tensor([*model.tokenizer(text)["input_ids"], model.tokenizer.eos_token_id]) for text in texts]
    batch = collate(list(zip(pixels, ids, strict=True)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model(**batch).backward()
        optimizer.step()
    assert model.eval().caption(pixels) == texts
    model.save(tmp_path / "vlm", str(tmp_path / "model"), layer=-1)
    assert Captioner.load(tmp_path / "vlm").caption(pixels) == texts


def test_takes_a_language_model_of_transformers_frozen(tmp_path, examples, encoder, call):
    model = build(encoder)
    folder = tmp_path / "language"
    model.language_model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    common = ("--layer", -1, "--steps", 2, "--batch-size", 2, "--eval", "--out", tmp_path / "vlm")
    status, told = call("train.py", tmp_path / "model", "--language-model", folder, "--freeze-language-model", *common)
    assert status == 0, told
    from language import load_language

    before, after = (
        model.language_model.state_dict(),
        load_language(tmp_path / "vlm" / "language_model", trained=False)[0].state_dict(),
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    status, told = call("train.py", tmp_path / "model", *common)
    assert status == 2 and "nothing is overwritten" in told


def test_refuses_language_models_that_cannot_caption(tmp_path, examples, encoder):
    from captioner import Captioner
    from language import load_language
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

    with pytest.raises(UserError, match="config.json is missing"):
        load_language(tmp_path, trained=True)
    model = build(encoder)
    model.language_model.half().save_pretrained(tmp_path / "half")
    with pytest.raises(UserError, match="tokenizer"):
        load_language(tmp_path / "half", trained=True)
    model.tokenizer.save_pretrained(tmp_path / "half")
    assert load_language(tmp_path / "half", trained=True)[0].dtype == torch.float32
    assert load_language(tmp_path / "half", trained=False)[0].dtype == torch.float16
    size = {"vocab_size": 300, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(hidden_size=16, intermediate_size=16, **size)).save_pretrained(tmp_path / "bert")
    GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "small")
    for name, message in (("bert", "not a causal language model"), ("small", "another model's")):
        model.tokenizer.save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match=message):
            load_language(tmp_path / name, trained=True)
    short = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=20))
    with pytest.raises(UserError, match="more than the 20 positions"):
        Captioner(encoder, short, model.tokenizer)


def test_the_encoder_is_the_one_it_was_trained_on(tmp_path, examples, encoder):
    from captioner import Captioner

    build(encoder).save(tmp_path / "vlm", str(tmp_path / "model"), layer=-1)
    Captioner.load(tmp_path / "vlm")
    shutil.rmtree(tmp_path / "model")
    save_small_model(tmp_path / "model", seed=1)
    with pytest.raises(UserError, match="other weights"):
        Captioner.load(tmp_path / "vlm")
    (tmp_path / "vlm" / "captioner.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        Captioner.load(tmp_path / "vlm")


def test_a_caption_that_names_more_than_the_class_is_wrong(examples):
    from scoring import names_exactly

    assert names_exactly("a picture of a big red circle on the left", 0, CLASSES)
    assert not names_exactly("a red star", 0, CLASSES)
    assert not names_exactly("a red circle and a blue star", 0, CLASSES)  # also a red star, in a blue circle's company
    assert not names_exactly("", 0, CLASSES)
    assert names_exactly("This is a red circle!", 0, ("Red Circle", "Blue Star"))


def test_native_images_are_captioned_in_a_batch_as_alone(tmp_path, examples):
    from caption_data import CaptionDataset, collate

    import contrastive

    model = build(contrastive.load_image_encoder(save_native(tmp_path / "model"), layer=-1)).eval()
    assert model.num_patches == 16
    data = CaptionDataset(Shapes(), model.encoder.preprocess, model.tokenizer)
    samples = [data[index] for index in range(8)]
    batch = collate(samples)
    counts = batch["mask"].sum(dim=1).double()
    each = torch.stack([model(**collate([sample])).double() for sample in samples])
    torch.testing.assert_close(model(**batch).double(), (each * counts).sum() / counts.sum(), rtol=1e-4, atol=1e-5)
    pixels = batch["pixels"]
    assert len(set(pixels.lengths.tolist())) > 2
    assert model.caption(pixels) == [model.caption(pixels[row : row + 1])[0] for row in range(8)]
    model.train()(**batch).backward()
    assert all(weight.grad.abs().sum() > 0 for weight in model.projector.parameters())

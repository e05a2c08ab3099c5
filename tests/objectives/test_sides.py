"""Two views of an image, and captions that are nearly right, against their formulas, under ranks and micro-batches."""

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from launching import pretrain_here, rows
from rank_processes import joined, run_on_ranks
from shard_writing import write_tar

from contrastive.data.extras import DrawnSample
from contrastive.data.preprocess import Preprocess, PreprocessConfig
from contrastive.data.record import Record, Source
from contrastive.data.sources.open import SOURCES, open_source
from contrastive.data.tokenizer import train_bpe
from contrastive.distributed.runtime import Runtime
from contrastive.errors import UserError
from contrastive.losses import LOSSES, SigmoidLossConfig
from contrastive.losses import reference as formulas
from contrastive.models import Features, ImageTowerConfig, ModelConfig, TextTowerConfig
from contrastive.objectives import Setting
from contrastive.objectives.hard_negatives import HardNegativesConfig
from contrastive.objectives.learner import Learner
from contrastive.objectives.slip import SlipConfig
from contrastive.train.gradient import Batch, forward_backward

CONFIG = ModelConfig(
    embed_dim=16,
    image=ImageTowerConfig(image_size=16, patch_size=4, width=16, depth=1, num_heads=2, mlp_dim=32),
    text=TextTowerConfig(vocab_size=20, context_length=6, width=16, depth=1, num_heads=2, mlp_dim=32),
    init_logit_scale=10.0,
)
B = 12
PREPROCESS = Preprocess(PreprocessConfig(image_size=16))
IMAGES = torch.arange(B) % 11  # the last is the first once more
KINDS = ("softmax", "sigmoid")
PRESENT = torch.arange(B) % 4 != 1


class Texts(Source):
    """Twelve samples with the captions that a column has; every fourth has no negative."""

    columns_read, captioned = ("caption_column",), True

    def __init__(self, column):
        self.name, self.fingerprint, self.column = "texts:", str(column), column

    def __len__(self):
        return B

    def captions(self, index):
        if self.column == "wrong":
            return ("a dog", f" a cat {index}", "") if PRESENT[index] else ("a dog ",)
        return ("a dog",) if self.column is None else ()


@SOURCES.register("texts")
def open_texts(argument, columns):
    return Texts(columns.caption)


TOKENIZER = train_bpe(["a dog", "a cat"], 300, 6, "whitespace")


def setting(name, kind="softmax", **more):
    parts = Texts(None), TOKENIZER, PREPROCESS
    return Setting(name, CONFIG, *parts, 10, (16,), B, loss=LOSSES.get(kind)(), **more)


def learner(kind):
    torch.manual_seed(0)
    model = Learner(replace(CONFIG, init_logit_bias=-3.0 if kind == "sigmoid" else None))
    model.objectives["slip"] = SlipConfig(loss=kind, hidden=16, out=8, temperature=0.2).build(setting("slip"))
    model.objectives["hard_negatives"] = HardNegativesConfig(column="wrong").build(setting("hard_negatives", kind))
    return model.double()


def data():
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(B, 3, 16, 16, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, 20, (B, 6), generator=generator)
    views = torch.randint(0, 256, (B, 2, 3, 16, 16), generator=generator, dtype=torch.uint8)
    negatives = {"tokens": torch.randint(0, 20, (B, 6), generator=generator), "present": PRESENT}
    return pixels, tokens, {"slip": {"views": views, "image": IMAGES}, "hard_negatives": negatives}


def gradients(kind, accumulate, runtime, rank=0, world_size=1):
    model = learner(kind)
    pixels, tokens, inputs = data()
    pixels, tokens = pixels.chunk(world_size)[rank], tokens.chunk(world_size)[rank]
    inputs = {name: {k: v.chunk(world_size)[rank] for k, v in own.items()} for name, own in inputs.items()}
    batch = Batch(pixels, tokens.chunk(accumulate), tokens[:, 0], inputs)
    how = {"objectives": model.active(0), "seed": (0, 5), "runtime": runtime}
    losses = forward_backward(runtime.wrap(model), LOSSES.get(kind)().build(), batch, **how)
    return losses, {name: p.grad for name, p in model.named_parameters()}


def with_negatives(kind, model, image, text, negatives):
    if kind == "softmax":
        return formulas.softmax_loss_with_negatives(image, text, negatives, model.logit_scale.exp())
    positive = torch.eye(B, B + len(negatives), dtype=torch.bool)
    scalars = model.logit_scale.exp(), model.logit_bias
    return formulas.sigmoid_loss(image, torch.cat([text, negatives]), *scalars, positive, torch.ones_like(positive))


def wanted(kind):
    """The losses by their formulas, and the gradients."""
    model = learner(kind)
    pixels, tokens, inputs = data()
    slip = model.objectives["slip"]

    def told(view):
        seen = model.image_tower(PREPROCESS.normalize(view).double(), project=False)
        return torch.nn.functional.normalize(slip.head(seen), dim=1)

    views = torch.cat([told(inputs["slip"]["views"][:, side]) for side in (0, 1)])
    own = torch.arange(2 * B).roll(B)[:, None] == torch.arange(2 * B)  # which two are a pair
    same = IMAGES.repeat(2)[:, None] == IMAGES.repeat(2)
    logits = (5 * views @ views.T).masked_fill(same & ~own, -torch.inf)
    if kind == "softmax":
        of_views = torch.nn.functional.cross_entropy(logits, torch.arange(2 * B).roll(B))
    else:
        of_views = formulas.sigmoid_loss(views, views, 5, -math.log(2 * B - 2), own, own | ~same)
    features = model.encode_image(pixels), model.encode_text(tokens)
    negatives = model.encode_text(inputs["hard_negatives"]["tokens"])[PRESENT]
    plain, whole = (with_negatives(kind, model, *features, some) for some in (negatives[:0], negatives))
    losses = {"loss": whole + of_views, "contrastive_loss": plain, "slip_loss": of_views}
    names, parameters = zip(*model.named_parameters(), strict=True)
    return losses, dict(zip(names, torch.autograd.grad(losses["loss"], parameters), strict=True))


def check(kind, losses, grads):
    right, expected = wanted(kind)
    for name, value in right.items():
        torch.testing.assert_close(losses[name], value.detach(), rtol=1e-9, atol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-6, atol=1e-11, msg=name)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_they_equal_their_formulas(kind, accumulate):
    check(kind, *gradients(kind, accumulate, Runtime("fp32")))


def test_of_different_images_it_is_the_loss_of_simclr():
    first, second = torch.nn.functional.normalize(torch.randn(2, 7, 5).double(), dim=2)
    slip = SlipConfig(temperature=0.2).build(setting("slip"))
    loss = slip.loss_of_batch(None, {"first": first, "second": second}, {"image": torch.arange(7)})
    torch.testing.assert_close(loss, formulas.view_loss(first, second, 0.2), rtol=1e-12, atol=0)


def run_rank(rank, world_size, port, folder):
    runtime = joined(rank, world_size, port)
    results = {(kind, k): gradients(kind, k, runtime, rank, world_size) for kind in KINDS for k in (1, 2)}
    torch.save(results, f"{folder}/rank{rank}.pt")
    runtime.close()


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_equal_the_formulas(ranks, tmp_path, free_port):
    run_on_ranks(ranks, run_rank, ranks, free_port, str(tmp_path))
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(ranks)]
    for case, (_, grads) in results[0].items():
        losses = {name: sum(r[case][0][name] for r in results) / ranks for name in results[0][case][0]}
        check(case[0], losses, grads)


def test_a_locked_tower_learns_no_views():
    with pytest.raises(UserError, match="--objectives slip trains the image tower, which --lock image keeps as it is"):
        SlipConfig().build(setting("slip", locked=True))


def test_of_several_captions_it_is_the_mean_or_one_denominator():
    image, negative, *texts = torch.nn.functional.normalize(torch.randn(5, B, 7).double(), dim=2)
    scale, more, seen = torch.tensor(9.0).double(), {"negative": negative}, {"present": PRESENT}
    features = Features(image, torch.stack(texts, dim=1), scale, None)
    wrong = negative[PRESENT]

    def added(all_captions):
        objective = HardNegativesConfig(column="wrong").build(setting("hard_negatives", all_captions=all_captions))
        return objective.loss_of_batch(features, more, seen)

    each = [
        formulas.softmax_loss_with_negatives(image, text, wrong, scale)
        - formulas.softmax_loss_with_negatives(image, text, wrong[:0], scale)
        for text in texts
    ]
    torch.testing.assert_close(added(False), sum(each) / 3, rtol=1e-10, atol=0)
    right = scale * image @ torch.cat(texts).T
    both = torch.cat([right, scale * image @ wrong.T], dim=1)
    expected = (both.logsumexp(1) - right.logsumexp(1)).mean() / 2
    torch.testing.assert_close(added(True), expected, rtol=1e-10, atol=0)
    seen["present"] = torch.zeros(B, dtype=torch.bool)
    assert added(True) == 0


def test_negatives_are_drawn_and_those_without_are_counted():
    extra = (
        HardNegativesConfig(column="wrong")
        .build(setting("hard_negatives", caption_templates=("a photo of {}", "{}")))
        .extra
    )
    drawn = set()
    for index in range(B):
        for seed in range(10):
            record = Record(f"key{index}", b"", ("a  dog",))
            sample = DrawnSample(record, index, ("a dog",), np.random.default_rng(seed), 16, None)
            made = extra.of(sample)
            assert made["present"] == bool(PRESENT[index]) and made["tokens"].shape == (6,)
            assert sample.bad == ([] if PRESENT[index] else [("missing_negative", f"key{index}")])
            drawn.add(TOKENIZER.decode(made["tokens"])[:4])
    assert drawn == {"", "a ca", "a ph"}


@pytest.mark.parametrize(
    ("column", "more", "said"),
    [
        (None, {}, "hard_negatives has no negatives: say where they are with --objectives.hard_negatives.column"),
        ("absent", {}, "column absent: none of 12 samples has one there"),
        ("wrong", {"loss": None}, "is for --loss sigmoid and softmax"),
        ("wrong", {"loss": SigmoidLossConfig(duplicates="ignore")}, "not for loss.duplicates ignore"),
    ],
)
def test_negatives_that_cannot_be_are_one_line(column, more, said):
    with pytest.raises(UserError) as error:
        HardNegativesConfig(column=column).build(replace(setting("hard_negatives"), **more))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_run_from_a_table(tiny, tmp_path):
    """Both objectives, negatives from a column; each sample's is its own, and one in four has none."""
    from PIL import Image

    for number in range(16):
        Image.new("RGB", (20, 20), (16 * number, 0, 99)).save(tmp_path / f"{number}.png")
    rows_ = (f"{n}.png,a red {n},{'' if n % 4 == 0 else f'a blue {n}'}" for n in range(16))
    (tmp_path / "pairs.csv").write_text("image,caption,wrong\n" + "\n".join(rows_) + "\n")
    words = ["--config", tiny, "--data.train", tmp_path / "pairs.csv", "--data.eval", "--train.steps", 2]
    words += ["--objectives", "slip", "hard_negatives", "--objectives.slip.hidden", 16, "--objectives.slip.out", 8]
    words += ["--train.accumulate", 2, "--run_folder", tmp_path / "run"]
    pretrain_here(*words, "--objectives.hard_negatives.column", "wrong")
    assert all({"slip_loss", "hard_negatives_loss"} <= row.keys() for row in rows(tmp_path / "run"))
    counts = [row["counts"] for row in rows(tmp_path / "run", "bad_samples")]
    assert sum(count["missing_negative"] for count in counts) == 8
    with pytest.raises(UserError, match="no column 'worng'; the columns are: image, caption, wrong. Did you mean"):
        pretrain_here(*words, "--run_folder", tmp_path / "b", "--objectives.hard_negatives.column", "worng")
    with pytest.raises(UserError, match="objectives.hard_negatives.keep: it has no modules that could be kept"):
        keep = ("--objectives.hard_negatives.column", "wrong", "--objectives.hard_negatives.keep")
        pretrain_here(*words, "--run_folder", tmp_path / "d", *keep)
    with pytest.raises(UserError, match="hard_negatives.column wrong: scenes:val has no texts to choose from"):
        words[3] = "scenes:val"
        pretrain_here(*words, "--run_folder", tmp_path / "c", "--objectives.hard_negatives.column", "wrong")


def test_negatives_of_other_kinds_of_data(tmp_path):
    """A field of KEY.json, a text beside the image, and cells with lists, where rows of one image are one sample."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    stored = {"caption": "a dog", "wrong": ["a cat", "a cow"]}
    members = [("a.png", file.getvalue()), ("a.json", json.dumps(stored).encode()), ("a.not.txt", b"a fish")]
    write_tar(tmp_path / "a.tar", members)
    for name in ("x.png", "y.png"):
        (tmp_path / name).write_bytes(file.getvalue() + name.encode())
    rows_ = [("y.png", "a dog", ["no", "not"]), ("x.png", "a dog", ["a cat"]), ("x.png", "a hound", ["a cow", "a dog"])]
    table = [dict(zip(("image", "caption", "wrong"), row, strict=True)) for row in rows_]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, table)))
    for data, column, found in (
        ("a.tar", "wrong", [["a cat", "a cow"]]),
        ("a.tar", "not.txt", [["a fish"]]),
        ("t.jsonl", "wrong", [["no", "not"], ["a cat", "a cow"]]),
    ):
        source = open_source(str(tmp_path / data))
        objective = HardNegativesConfig(column=column).build(replace(setting("hard_negatives"), source=source))
        assert [objective.extra.usable(n, source.captions(n)) for n in range(len(source))] == found

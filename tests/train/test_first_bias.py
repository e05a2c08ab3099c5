"""What a run begins with. The first logit bias: the log-odds that a text of a batch matches an image of it."""

import math
from dataclasses import replace

import pytest
import torch

from contrastive.data.record import Source
from contrastive.data.settings import DataConfig
from contrastive.data.sources import open_source
from contrastive.data.sources.derived import ClassPrompts, Mixture
from contrastive.data.tokenizer import train_bpe
from contrastive.losses.sigmoid import SigmoidLossConfig
from contrastive.losses.softmax import SoftmaxLossConfig
from contrastive.train.contrastive_task import ContrastiveTask, PretrainConfig, num_distinct, resolve
from contrastive.train.options import TrainConfig

POSITIVE, NEGATIVE = (SigmoidLossConfig(duplicates=duplicates) for duplicates in ("positive", "negative"))


class Part(Source):
    """A hundred samples, of some classes where `classes` names any."""

    def __init__(self, name, classes=None):
        self.name = self.fingerprint = name
        self.class_names = classes and tuple(classes.split())

    def __len__(self):
        return 100


def part(name, classes):
    return ClassPrompts(Part(name, classes), ("a {}",)) if classes else Part(name)


def test_the_first_bias_knows_how_many_classes_there_are():
    """Among prompts of ten classes, equal ones matches, one pair in ten matches, not one in 256."""
    tokenizer = train_bpe(["a zero", "a one"], 300, 8)
    named, config = open_source("digits"), PretrainConfig(train=TrainConfig(steps=1, global_batch_size=256))
    assert resolve(config, named, tokenizer).model.init_logit_bias == pytest.approx(-math.log(9))
    apart = replace(config, loss=replace(config.loss, duplicates="negative"))
    assert resolve(apart, named, tokenizer).model.init_logit_bias == pytest.approx(-math.log(255))
    asked = replace(config, model=replace(config.model, init_logit_scale=5.0, init_logit_bias=-3.0))
    model = resolve(asked, named, tokenizer).model
    assert (model.init_logit_scale, model.init_logit_bias) == (5.0, -3.0)


def by_pairs(parts, weights, batch):
    """The same as 1 / p, from all pairs of parts; at most the batch."""
    matching = 0.0
    for one, first in zip(parts, weights, strict=True):
        for other, second in zip(parts, weights, strict=True):
            if one.prompted and other.prompted:
                shared = len(set(one.class_names) & set(other.class_names))
                both = first * second / sum(weights) ** 2
                matching += both * shared / (len(one.class_names) * len(other.class_names))
        if not one.prompted:  # an image's own text, one of the batch
            matching += first / sum(weights) / batch
    return min(batch, 1 / matching)


@pytest.mark.parametrize(
    ("classes", "weights"),
    [
        (["a b c", "d e"], (1, 1)),
        (["a b c", "c d"], (3, 2)),
        (["a b c d e f g h i j", "a b c d e f g h i j"], (1, 5)),
        (["a b c d e f g", None], (4, 1)),
        (["a b", None, "b c d"], (1, 2, 7)),
        ([None, None], (1, 3)),
    ],
)
@pytest.mark.parametrize("batch", [2, 64, 4096])
def test_a_mixture_of_class_prompts_has_the_log_odds_of_a_match(classes, weights, batch):
    parts = [part(f"part{number}", names) for number, names in enumerate(classes)]
    mixture = Mixture("mix", parts, weights)
    found = num_distinct(POSITIVE, mixture, batch)
    assert found == pytest.approx(by_pairs(parts, weights, batch))
    assert POSITIVE.initial_logits(found)[1] == pytest.approx(max(-math.log(max(found - 1, 1)), -10))
    assert num_distinct(NEGATIVE, mixture, batch) == batch


def test_sampled_pairs_of_a_mixture_match_as_often():
    """Two parts that share a class: of 500,000 drawn pairs as many match as is said."""
    parts, weights = [part("one", "a b c"), part("two", "c d")], (3, 2)
    draws = torch.Generator().manual_seed(0)
    which = torch.multinomial(torch.tensor([0.6, 0.4]), 10**6, replacement=True, generator=draws)
    three, two = (torch.randint(size, (10**6,), generator=draws) for size in (3, 2))
    text, image = torch.where(which == 0, three, two + 2).view(2, -1)  # 'c' is number 2 of both
    assert num_distinct(POSITIVE, Mixture("mix", parts, weights), 4096) == pytest.approx(
        1 / (text == image).double().mean().item(), rel=0.01
    )


@pytest.mark.parametrize("classes", [2, 3, 7, 10, 49, 1000, 1001])
def test_of_one_set_of_class_prompts_it_is_the_number_of_classes_exactly(classes):
    prompts = part("one", " ".join(map(str, range(classes))))
    for batch in (4, 64, 5000):
        found = num_distinct(POSITIVE, prompts, batch)
        assert found == min(batch, classes) and type(found) is int
    assert num_distinct(POSITIVE, Part("captioned"), 300) == 300


def test_the_loss_of_guessing_among_all_captions_of_a_batch():
    """With --all_captions a text is one of B·K, an image one of B."""
    loss, data = SoftmaxLossConfig(duplicates="negative"), DataConfig(captions_per_image=3)
    config = PretrainConfig(loss=loss, data=data, all_captions=True, train=TrainConfig(steps=1, global_batch_size=8))
    source, tokenizer = open_source("digits"), train_bpe(["a zero", "a one"], 300, 8)
    tower = {"width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 16}
    image, text = replace(config.model.image, **tower), replace(config.model.text, context_length=8, **tower)
    config = resolve(
        replace(config, model=replace(config.model, embed_dim=16, image=image, text=text)), source, tokenizer
    )
    task = ContrastiveTask(config, source, tokenizer, [])
    images, texts = torch.ones(8, 4), torch.ones(24, 4)
    guessed = task.loss(images, texts, torch.tensor(10.0), caption_ids=torch.arange(8))
    assert guessed.item() == pytest.approx(task.chance_loss) == math.log(8) + math.log(3) / 2

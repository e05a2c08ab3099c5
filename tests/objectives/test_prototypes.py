"""What learns from the model's own average, against its formula, under ranks and micro-batches; the teacher."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from rank_processes import joined, run_on_ranks

from contrastive.data.augment import AugmentConfig
from contrastive.data.extras import Crops, DrawnPlaces, DrawnSample
from contrastive.data.preprocess import Preprocess, PreprocessConfig
from contrastive.data.record import Record
from contrastive.distributed.runtime import Runtime
from contrastive.errors import UserError
from contrastive.losses import SigmoidLoss
from contrastive.losses import reference as formulas
from contrastive.models import ImageTowerConfig, ModelConfig, TextTowerConfig
from contrastive.objectives import Setting
from contrastive.objectives.learner import Learner
from contrastive.objectives.masked import MaskedConfig
from contrastive.objectives.patch_distill import PatchDistillConfig
from contrastive.objectives.patch_mean import PatchMeanConfig
from contrastive.objectives.self_distill import SelfDistillConfig
from contrastive.objectives.self_taught import PrototypeObjective
from contrastive.train.gradient import Batch, forward_backward

CONFIG = ModelConfig(
    embed_dim=16,
    image=ImageTowerConfig(
        image_size=16, patch_size=4, width=16, depth=2, num_heads=2, mlp_dim=32, class_token=True, pool="attention"
    ),
    text=TextTowerConfig(vocab_size=20, context_length=6, width=16, depth=1, num_heads=2, mlp_dim=32),
    init_logit_scale=10.0,
    init_logit_bias=-3.0,
)
POOLING = {pool: replace(CONFIG, image=replace(CONFIG.image, pool=pool)) for pool in ("attention", "class", "average")}
HEAD = {"prototypes": 12, "hidden": 16, "bottleneck": 8}
B, CROPS, MASKED, MIDDLES = 24, 2, 5, 3
PREPROCESS = Preprocess(PreprocessConfig(image_size=16))


def setting(name, others=None, sizes=(16,), **how):
    return Setting(name, CONFIG, None, None, PREPROCESS, 10, sizes, others=others or {}, **how)


def learner(balance="center", pool="attention", **starts):
    torch.manual_seed(0)
    model = Learner(POOLING[pool])
    configs = {
        "self_distill": SelfDistillConfig(crops=CROPS, balance=balance, start=starts.get("self_distill", 0.0), **HEAD),
        "masked": MaskedConfig(
            balance=balance, start=starts.get("masked", 0.0), center_images=balance == "sinkhorn", **HEAD
        ),
        "patch_distill": PatchDistillConfig(window=3, balance=balance, start=starts.get("patch_distill", 0.0), **HEAD),
        "patch_mean": PatchMeanConfig(temperature=0.2, start=starts.get("patch_mean", 0.0)),
    }
    for name, config in configs.items():
        model.objectives[name] = config.build(
            replace(setting(name, dict(model.objectives.items())), model=POOLING[pool])
        )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # a teacher of its own, tokens that are not all alike, a centre
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for one in with_prototypes(model).values():
            one.center += 0.1 * torch.randn(one.center.shape, generator=generator)
    return model.double()


def with_prototypes(model):
    return {name: one for name, one in model.objectives.items() if isinstance(one, PrototypeObjective)}


def data():
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(B, 3, 16, 16, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, 20, (B, 6), generator=generator)
    crops = torch.randint(0, 256, (B, CROPS, 3, 8, 8), generator=generator, dtype=torch.uint8)
    places = torch.rand(B, 16, generator=generator).argsort(dim=1)[:, :MASKED].sort(dim=1).values
    middles = torch.rand(B, 16, generator=generator).argsort(dim=1)[:, :MIDDLES].sort(dim=1).values
    inputs = {"self_distill": {"views": crops}, "masked": {"places": places}, "patch_distill": {"places": middles}}
    inputs["patch_mean"] = {"image": torch.arange(B) % (B - 2)}  # two images are there twice
    return pixels, tokens, inputs


def gradients(balance, accumulate, runtime, rank=0, world_size=1, pool="attention"):
    model = learner(balance, pool)
    pixels, tokens, inputs = data()
    pixels, tokens = pixels.chunk(world_size)[rank], tokens.chunk(world_size)[rank]
    inputs = {name: {k: v.chunk(world_size)[rank] for k, v in own.items()} for name, own in inputs.items()}
    batch = Batch(pixels, tokens.chunk(accumulate), tokens[:, 0], inputs)
    how = {"objectives": model.active(0), "seed": (0, 5), "runtime": runtime}
    losses = forward_backward(runtime.wrap(model), SigmoidLoss(), batch, **how)
    centers = {name: one._next_center for name, one in with_prototypes(model).items()}
    return losses, {name: p.grad for name, p in model.named_parameters()}, centers


def wanted(balance, pool):
    """The losses by their formulas, the gradients of all that learns, and the centres after the step."""
    model = learner(balance, pool)
    pixels, tokens, inputs = data()
    student, (distill, masked, local, mean) = model.image_tower, model.objectives.values()

    def loss(told, aimed, center):
        told, aimed = told.flatten(0, -2), aimed.flatten(0, -2)
        if balance == "center":
            return formulas.prototype_loss(told, aimed, center, 0.1, 0.04)
        return -(aimed * (told / 0.1).log_softmax(1)).sum(1).mean()

    with torch.no_grad():
        seen = distill.own_teacher.tower.forward_features(pixels)
        rows = torch.arange(B)[:, None], 1 + inputs["masked"]["places"]  # after the class token
        of_image = distill.teacher_head(distill.own_teacher.tower.pooled(seen, project=False))
        embedded = F.normalize(distill.own_teacher.tower.pooled(seen), dim=1)
        of_patches = masked.teacher_head(seen[rows])
        if masked.options.center_images:
            of_patches = of_patches - masked.teacher_head(seen[:, 1:]).mean(dim=1, keepdim=True)
        teacher, middles = distill.own_teacher.tower, inputs["patch_distill"]["places"]
        of_windows = local.teacher_head(teacher(windows(pixels, middles), project=False).unflatten(0, (B, MIDDLES)))
        centers = {
            "patch_distill": 0.9 * local.center + 0.1 * of_windows.flatten(0, 1).mean(0),
            "self_distill": 0.9 * distill.center + 0.1 * of_image.mean(0),
            "masked": 0.9 * masked.center + 0.1 * of_patches.flatten(0, 1).mean(0),
        }
        if balance == "sinkhorn":
            of_image = formulas.sinkhorn(of_image, 0.04, 3)
            of_patches = formulas.sinkhorn(of_patches.flatten(0, 1), 0.04, 3).unflatten(0, (B, MASKED))
            of_windows = formulas.sinkhorn(of_windows.flatten(0, 1), 0.04, 3).unflatten(0, (B, MIDDLES))
    crops = PREPROCESS.normalize(inputs["self_distill"]["views"].flatten(0, 1)).double()
    told = distill.head(student(crops, project=False)).unflatten(0, (B, CROPS))
    own = loss(told, of_image[:, None].expand_as(told), distill.center)
    x = student.patch_embed(pixels).flatten(2).transpose(1, 2).clone()
    x[torch.arange(B)[:, None], inputs["masked"]["places"]] = masked.mask_token
    x = torch.cat([student.class_token.expand(B, 1, -1), x], dim=1) + student.position_embedding
    tokens_seen = student.norm(student.transformer(x))
    other = loss(masked.head(tokens_seen[rows]), of_patches, masked.center)
    patches = student.forward_features(pixels)[:, 1:]
    alone = patches[torch.arange(B)[:, None], middles].flatten(0, 1)
    alone = student.head(alone[:, None]) if pool == "attention" else alone
    third = loss(local.head(alone).unflatten(0, (B, MIDDLES)), of_windows, local.center)
    means = F.normalize(mean.head(patches.mean(dim=1)), dim=1)
    same_image = formulas.pair_labels(inputs["patch_mean"]["image"], "ignore")
    fourth = formulas.softmax_loss(means, embedded, 1 / 0.2, *same_image)
    labels = formulas.pair_labels(tokens[:, 0], "negative")
    features = model.encode_image(pixels), model.encode_text(tokens), model.logit_scale.exp(), model.logit_bias
    contrastive = formulas.sigmoid_loss(*features, *labels)
    losses = {"self_distill_loss": own, "masked_loss": other, "patch_distill_loss": third, "patch_mean_loss": fourth}
    losses["loss"] = contrastive + own + 0.25 * other + third + fourth
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return (
        losses,
        dict(zip(learning, torch.autograd.grad(losses["loss"], list(learning.values())), strict=True)),
        centers,
    )


def windows(pixels, middles):
    """Three patches of 4 a side around each, or what the image has of them, at 12 x 12 pixels, one by one."""

    def stretched(image, middle, dim):
        first, last = 4 * max(0, middle - 1), 4 * min(4, middle + 2)
        at = first + (torch.arange(12, dtype=torch.float64) + 0.5) / 12 * (last - first) - 0.5
        low = at.floor().long()
        share = (at - low)[:, None] if dim == 1 else at - low
        below, above = (image.index_select(dim, near.clamp(0, 15)) for near in (low, low + 1))
        return below * (1 - share) + above * share

    found = []
    for image, places in zip(pixels, middles.tolist(), strict=True):
        found += [stretched(stretched(image, place // 4, 1), place % 4, 2) for place in places]
    return torch.stack(found)


def check(balance, losses, grads, centers, pool="attention"):
    right, expected, next_centers = wanted(balance, pool)
    for name, value in right.items():
        torch.testing.assert_close(losses[name], value.detach(), rtol=1e-10, atol=0)
    for name, grad in grads.items():
        if name in expected:
            # The positions of crops and windows are resampled in float32.
            atol = 1e-8 if name == "image_tower.position_embedding" else 1e-12
            torch.testing.assert_close(grad, expected[name], rtol=1e-7, atol=atol, msg=name)
        else:
            assert grad is None, name
    for name, center in centers.items() if balance == "center" else ():
        torch.testing.assert_close(center, next_centers[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("pool", ["attention", "class"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("balance", ["center", "sinkhorn"])
def test_all_equal_their_formulas(balance, accumulate, pool):
    check(balance, *gradients(balance, accumulate, Runtime("fp32"), pool=pool), pool)


def run_rank(rank, world_size, port, folder):
    runtime = joined(rank, world_size, port)
    results = {(balance, k): gradients(balance, k, runtime, rank, world_size) for balance in BALANCES for k in (1, 2)}
    torch.save(results, f"{folder}/rank{rank}.pt")
    runtime.close()


BALANCES = ("center", "sinkhorn")


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_equal_the_formulas(ranks, tmp_path, free_port):
    run_on_ranks(ranks, run_rank, ranks, free_port, str(tmp_path))
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(ranks)]
    for case, (_, grads, centers) in results[0].items():
        losses = {name: sum(r[case][0][name] for r in results) / ranks for name in results[0][case][0]}
        check(case[0], losses, grads, centers)


def test_one_teacher_is_kept_by_who_begins_first():
    model = learner(self_distill=0.5, masked=0.2, patch_distill=0.9, patch_mean=0.9)
    distill, masked = model.objectives["self_distill"], model.objectives["masked"]
    assert masked.teacher is distill.teacher and distill.teacher.keeper == "masked"
    other = PatchMeanConfig(momentum=0.9).build(setting("other", dict(model.objectives.items())))
    assert other.teacher is not masked.teacher and other.teacher.keeper == "other"
    names = [name for name in model.state_dict() if "tower" in name and name.startswith("objectives.")]
    assert names and all(name.startswith("objectives.self_distill.own_teacher.") for name in names)
    with torch.no_grad():
        masked.begin(model)
        assert all(map(torch.equal, distill.teacher.tower.parameters(), model.image_tower.parameters()))
        model.image_tower.norm.bias += 1
        distill.begin(model)  # later: the teacher has gone its way
        assert not torch.equal(distill.teacher.tower.norm.bias, model.image_tower.norm.bias)
        before = distill.teacher.tower.norm.bias.clone()
        distill.after_update(model, torch.tensor(False))
        assert torch.equal(distill.teacher.tower.norm.bias, before)
        masked.after_update(model, torch.tensor(True))
        assert torch.equal(distill.teacher.tower.norm.bias, before), "a skipped step"
        masked.after_update(model, torch.tensor(False))
        torch.testing.assert_close(distill.teacher.tower.norm.bias, before + 0.004, rtol=0, atol=1e-9)


def drawn(size, seed=0):
    import numpy as np

    image = np.random.default_rng(7).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return DrawnSample(Record("a", image), 0, (), np.random.default_rng(seed), size, None)


def test_what_is_drawn():
    crops = Crops("self_distill", 0, 3, AugmentConfig(crop_scale=(0.1, 0.2)), {16: 8, 32: 12})
    assert crops.of(drawn(16))["views"].shape == (3, 3, 8, 8) and crops.of(drawn(32))["views"].shape == (3, 3, 12, 12)
    assert torch.equal(crops.of(drawn(16))["views"], crops.of(drawn(16))["views"])
    assert not torch.equal(crops.of(drawn(16))["views"], crops.of(drawn(16, 1))["views"])
    seen = torch.zeros(16)
    for seed in range(400):
        places = torch.from_numpy(DrawnPlaces("masked", 0, 0.3, 4).of(drawn(16, seed))["places"])
        assert len(places) == 5 and (places.diff() > 0).all()
        seen[places] += 1
    share = seen / 400
    assert (share - 5 / 16).abs().max() < 5 * math.sqrt(5 / 16 * 11 / 16 / 400)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SelfDistillConfig(crop_size=16).build(setting("self_distill")), "below the images' 16 pixels"),
        (lambda: SelfDistillConfig(crop_size=6).build(setting("self_distill")), "a multiple of the patch size 4"),
        (lambda: SelfDistillConfig(crop_size=8).build(setting("self_distill", sizes=(8, 16))), "the images' 8 pixels"),
        (lambda: MaskedConfig().build(setting("masked", locked=True)), "--lock image keeps as it is"),
        (
            lambda: PatchMeanConfig().build(replace(setting("patch_mean"), model=POOLING["average"])),
            "for model.image.pool class or attention; average is the patches' mean",
        ),
        (lambda: PatchDistillConfig(window=4).build(setting("patch_distill")), "window is 4; it has to be odd"),
        (
            lambda: PatchDistillConfig(window=3).build(setting("patch_distill", drops_patches=True)),
            "reads all patches, and patch_dropout drops some",
        ),
    ],
)
def test_what_cannot_be_is_one_line(make, said):
    with pytest.raises(UserError) as error:
        make()
    assert said in str(error.value) and "\n" not in str(error.value)

"""Affinity distillation against its formula on the full matrix: values and gradients, on one and on several ranks."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_processes import run_on_ranks
from torch import nn

from contrastive.distributed import collectives
from contrastive.losses import NonFiniteFeatures, all_pairs, reference
from contrastive.losses.affinity import AffinityLoss, TeacherFeatures

SCALES = (30.0, 7.0)


def units(batch, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(batch, dim, generator=generator, dtype=torch.float64), dim=1)


def inputs(batch, dim, widths, scale=12.0):
    """The student's leaves, and teachers of other widths and scales."""
    student = [units(batch, dim, 0), units(batch, dim, 1), torch.tensor(scale, dtype=torch.float64)]
    teachers = [
        TeacherFeatures(units(batch, width, 2 + k), units(batch, width, 9 + k), SCALES[k])
        for k, width in enumerate(widths)
    ]
    return [leaf.requires_grad_() for leaf in student], teachers


def value_and_gradients(loss, student, teachers):
    value = loss(*student, teachers)
    return [value.detach(), *torch.autograd.grad(value, student)]


@given(
    batch=st.integers(1, 17),
    dim=st.integers(1, 9),
    widths=st.sampled_from([(5,), (3, 11)]),
    scale=st.floats(0.1, 100),
    tile=st.integers(1, 18),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_formula(batch, dim, widths, scale, tile):
    student, teachers = inputs(batch, dim, widths, scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(all_pairs, "CPU_TILE", tile)
        ours = value_and_gradients(AffinityLoss(), student, teachers)
    expected = value_and_gradients(reference.affinity_loss, student, teachers)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_the_formula_is_that_of_mobileclip():
    """Written out: 1/(b·K) Σ over rows and teachers of Σ p log(p/q), half of the texts' and half of the images'."""
    (image, text, scale), teachers = inputs(7, 4, (5, 6))
    expected = 0
    for teacher in teachers:
        p = teacher.logit_scale * teacher.image @ teacher.text.T
        q = scale * image @ text.T
        for mine, theirs in ((q, p), (q.T, p.T)):
            q_row, p_row = mine.softmax(1), theirs.softmax(1)
            expected += (p_row * (p_row / q_row).log()).sum() / (7 * 2) / 2
    torch.testing.assert_close(reference.affinity_loss(image, text, scale, teachers), expected)


def test_a_student_like_its_teacher_has_nothing_to_learn():
    student, _ = inputs(9, 4, ())
    value, *gradients = value_and_gradients(AffinityLoss(), student, [TeacherFeatures(*(s.detach() for s in student))])
    for tensor in (value, *gradients):
        torch.testing.assert_close(tensor, torch.zeros_like(tensor), rtol=0, atol=1e-12)


@pytest.mark.parametrize("wanted", [(), (0,), (1,), (2,)])
def test_only_the_gradients_that_are_wanted(wanted):
    student, teachers = inputs(13, 6, (4,))
    for i, tensor in enumerate(student):
        tensor.requires_grad_(i in wanted)
    value, expected = AffinityLoss()(*student, teachers), reference.affinity_loss(*student, teachers)
    torch.testing.assert_close(value.detach(), expected.detach())
    assert value.requires_grad == bool(wanted)
    for i in wanted:
        ours = torch.autograd.grad(value, student[i], retain_graph=True)
        torch.testing.assert_close(ours, torch.autograd.grad(expected, student[i], retain_graph=True))


def test_float32_is_near_and_memory_linear(monkeypatch):
    student, teachers = inputs(300, 16, (24, 8))
    expected = value_and_gradients(reference.affinity_loss, student, teachers)
    single = [leaf.detach().float().requires_grad_() for leaf in student]
    monkeypatch.setattr(all_pairs, "CPU_TILE", 32)
    teachers = [TeacherFeatures(t.image.float(), t.text.float(), t.logit_scale) for t in teachers]
    with Largest() as seen:
        ours = value_and_gradients(AffinityLoss(), single, teachers)
    assert seen.largest <= 300 * 24, "as large as the largest features, not as the batch squared"
    for a, b in zip(ours, expected, strict=True):
        assert ((a.double() - b).norm() / b.norm()) < 1e-6


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.largest = max(self.largest, *(t.numel() for t in (out, *args) if isinstance(t, torch.Tensor)), 0)
        return out


def test_features_that_do_not_fit():
    (image, text, scale), (teacher,) = inputs(6, 4, (5,))
    with pytest.raises(ValueError, match="a teacher has 5 rows, the student 6"):
        AffinityLoss()(image, text, scale, [TeacherFeatures(teacher.image[:5], teacher.text[:5], 1.0)])
    teacher.image[2, 1] = torch.nan
    with pytest.raises(NonFiniteFeatures, match="image_features"):
        AffinityLoss()(image, text, scale, [teacher])


BATCH, EXCHANGES = 18, {"ring": collectives.RingBlocks, "gather": collectives.GatheredBlocks}


def run_rank(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    all_pairs.CPU_TILE = 5
    (image, text, scale), teachers = inputs(BATCH, 6, (7, 6))

    def own(tensor):
        return tensor.detach().chunk(world_size)[rank]

    taught = [TeacherFeatures(own(t.image), own(t.text), t.logit_scale) for t in teachers]
    found = {}
    for exchange, kind in EXCHANGES.items():
        all_pairs.every_block = kind
        student = [leaf.requires_grad_() for leaf in (own(image).clone(), own(text).clone(), scale.detach().clone())]
        found[exchange] = value_and_gradients(AffinityLoss(), student, taught)
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_equal_one_process(world_size, tmp_path):
    run_on_ranks(world_size, run_rank, world_size, str(tmp_path))
    ranks = [torch.load(tmp_path / f"rank{r}.pt") for r in range(world_size)]
    expected = value_and_gradients(reference.affinity_loss, *inputs(BATCH, 6, (7, 6)))
    for exchange in EXCHANGES:
        value, image, text, scale = zip(*(rank[exchange] for rank in ranks), strict=True)
        # DistributedDataParallel divides by the ranks; features of a rank are its own.
        ours = torch.stack(value).mean(), torch.cat(image), torch.cat(text), torch.stack(scale).mean()
        ours = ours[0], ours[1] / world_size, ours[2] / world_size, ours[3]
        torch.testing.assert_close(list(ours), expected, rtol=1e-9, atol=1e-12)

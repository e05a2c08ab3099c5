"""Generation with kept keys and values against plain forward passes, exhaustive search and the distribution itself."""

import itertools

import pytest
import torch

from contrastive.errors import UserError
from contrastive.models import generate as generation
from contrastive.models.caption_decoder import CaptionDecoder, CaptionDecoderConfig
from contrastive.models.generate import GenerationConfig, generate, log_likelihood

EOS, LENGTH = 2, 4


@pytest.fixture
def decoder():
    torch.manual_seed(3)
    config = CaptionDecoderConfig(width=16, depth=2, num_heads=4, mlp_dim=24)
    made = CaptionDecoder(config, 12, vocab_size=6, context_length=LENGTH, eos_id=EOS).double().eval()
    for parameter in made.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return made


def images(count, seed=0):
    return torch.randn(count, 5, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_likelihood(decoder, image, ids):
    """Of each image and caption, by whole forward passes: (B, C)."""
    scores = torch.empty(len(image), len(ids), dtype=torch.float64)
    for place, row in enumerate(ids):
        length = row.tolist().index(EOS) + 1 if EOS in row else len(row)
        told = row[None, :length].expand(len(image), -1)
        likely = decoder.logits(decoder(image, told)).log_softmax(-1)
        scores[:, place] = likely.gather(2, told[..., None]).sum((1, 2))
    return scores


def every_caption(length=LENGTH):
    """All there are over the six ids, up to `length` long, filled up with EOS."""
    others = [i for i in range(6) if i != EOS]
    ended = [(*some, EOS) for n in range(length) for some in itertools.product(others, repeat=n)]
    rows = [*ended, *itertools.product(others, repeat=length)]
    return torch.tensor([(*row, *[EOS] * (length - len(row))) for row in rows])


def lengths(ids):
    return torch.tensor([row.tolist().index(EOS) + 1 if EOS in row else len(row) for row in ids])


def test_greedy_is_that_of_plain_forward_passes_and_stops_at_the_end(decoder):
    image, rows, total = images(12), [], []
    for one in image:
        ids, score = torch.empty(1, 0, dtype=torch.int64), 0.0
        while ids.shape[1] < LENGTH and EOS not in ids:
            padded = torch.cat([ids, torch.zeros(1, 1, dtype=torch.int64)], dim=1)
            likely = decoder.logits(decoder(one[None], padded))[:, -1].log_softmax(-1)
            value, token = likely.max(dim=-1)
            ids, score = torch.cat([ids, token[None]], dim=1), score + value.item()
        rows.append([*ids[0].tolist(), *[EOS] * (LENGTH - ids.shape[1])])
        total.append(score)
    ids, score = generate(decoder, image, GenerationConfig())
    assert ids.tolist() == [row[: ids.shape[1]] for row in rows]
    assert score.tolist() == pytest.approx(total, rel=1e-5)
    assert len(set(lengths(ids).tolist())) > 2  # some end early
    beam = generate(decoder, image, GenerationConfig("beam", num_beams=1))
    assert beam[0].tolist() == rows and beam[1].tolist() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_a_wide_beam_finds_the_best_of_all_captions(decoder, length_penalty):
    image, captions = images(5, seed=1), every_caption()
    scores = plain_likelihood(decoder, image, captions)
    assert torch.allclose(scores.exp().sum(1), torch.ones(5, dtype=torch.float64))
    best = (scores / lengths(captions) ** length_penalty).argmax(dim=1)
    ids, score = generate(decoder, image, GenerationConfig("beam", 5**LENGTH, length_penalty))
    assert torch.equal(ids, captions[best])
    torch.testing.assert_close(score.double(), scores.gather(1, best[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    narrow, found = generate(decoder, image, GenerationConfig("beam", 3, length_penalty))
    own = plain_likelihood(decoder, image, narrow).diagonal()
    torch.testing.assert_close(found.double(), own, rtol=1e-5, atol=1e-5)
    _, greedy = generate(decoder, image, GenerationConfig())
    assert length_penalty or (found >= greedy - 1e-5).all()


def test_drawn_captions_come_as_often_as_they_are_likely(decoder):
    count, captions = 4000, every_caption()
    one = images(1)
    ids, score = generate(decoder, one.expand(count, -1, -1), GenerationConfig("sample"))
    expected = plain_likelihood(decoder, one, captions)[0].exp()
    places = {tuple(row): place for place, row in enumerate(captions.tolist())}
    drawn = torch.tensor([places[(*row, *[EOS] * (LENGTH - len(row)))] for row in ids.tolist()])
    share = torch.bincount(drawn, minlength=len(captions)) / count
    likely = expected > 0.01
    assert likely.sum() > 5
    assert ((share - expected)[likely].abs() < 4 * (expected[likely] / count).sqrt()).all()
    torch.testing.assert_close(score.double().exp(), expected[drawn], rtol=1e-4, atol=1e-6)


def test_a_draw_depends_on_seed_and_image_alone(decoder):
    image, how = images(8), GenerationConfig("sample", seed=5)
    ids, _ = generate(decoder, image, how)
    for number in (0, 5):
        alone, _ = generate(decoder, image[number : number + 1], how, [number])
        assert alone[0].tolist() == ids[number, : alone.shape[1]].tolist()
    assert not torch.equal(ids[:, :2], generate(decoder, image, GenerationConfig("sample", seed=6))[0][:, :2])


def test_top_k_and_top_p_leave_out_what_is_unlikely(decoder):
    one = images(1, seed=2)
    first = decoder.logits(decoder(one, torch.zeros(1, 1, dtype=torch.int64)))[0, 0].softmax(-1)
    order, many = first.argsort(descending=True), one.expand(500, -1, -1)

    def drawn(**how):
        return set(generate(decoder, many, GenerationConfig("sample", **how))[0][:, 0].tolist())

    assert drawn(top_k=2) == set(order[:2].tolist())
    upto = first[order].cumsum(0)
    assert drawn(top_p=(upto[1] + 1e-6).item()) == set(order[:3].tolist())
    assert drawn(top_p=(upto[1] - 1e-6).item()) == set(order[:2].tolist())
    assert len(drawn(temperature=5.0)) == 6 and len(drawn(temperature=0.01)) == 1
    greedy = generate(decoder, images(6), GenerationConfig())[0]
    assert torch.equal(generate(decoder, images(6), GenerationConfig("sample", top_k=1))[0], greedy)


def test_likelihoods_are_those_of_plain_forward_passes(decoder, monkeypatch):
    image = images(3)
    captions = torch.tensor([[4, 2, 5, 2], [2, 2, 2, 2], [3, 4, 5, 2], [1, 3, 0, 0]])
    expected = plain_likelihood(decoder, image, captions)
    torch.testing.assert_close(log_likelihood(decoder, image, captions), expected)
    monkeypatch.setattr(generation, "POSITIONS_AT_ONCE", 24)  # two captions of the three images
    torch.testing.assert_close(log_likelihood(decoder, image, captions), expected)


@pytest.mark.parametrize("wrong", [{"top_p": 1.5}, {"temperature": 0.0}, {"num_beams": 0}, {"top_k": 0}])
def test_numbers_that_make_no_sense_are_refused(decoder, wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        generate(decoder, images(1), GenerationConfig("sample", **wrong))

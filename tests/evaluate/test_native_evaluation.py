"""Every evaluation of a model of native images: pictures of many shapes in batches score as each by itself."""

import pytest
import torch
from native_model import PATCH, Shapes, save_native

import contrastive
from contrastive.data.preprocess import native_grid
from contrastive.evaluate.captioning import caption_images, zero_shot_by_likelihood
from contrastive.evaluate.embeddings import embed_images
from contrastive.evaluate.evaluated_model import EvaluatedModel
from contrastive.evaluate.suite import task_from
from contrastive.models.caption_decoder import CaptionDecoderConfig
from contrastive.models.generate import GenerationConfig
from contrastive.objectives.caption import decoder_for
from contrastive.objectives.captioner import Captioner
from contrastive.patches import Patches, one_by_one


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return contrastive.load(save_native(tmp_path_factory.mktemp("native") / "model"))


@pytest.fixture
def subject(bundle, tmp_path):
    def make(batch_size):
        loading = {"sources": {"shapes": Shapes(), "more": Shapes("more")}, "device": "cpu", "batch_size": batch_size}
        return EvaluatedModel("model", bundle, tmp_path / str(batch_size), **loading)

    return make


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


def test_embeddings_are_those_of_each_image(bundle):
    source = Shapes()
    found = embed_images(bundle.model, source, bundle.preprocess, device="cpu", batch_size=7)
    with torch.no_grad():
        alone = [bundle.model.encode_image(bundle.preprocess(source[index].image)[None]) for index in range(24)]
    close(found.features, torch.cat(alone))
    assert found.keys == [f"{index:02d}" for index in range(24)]


TASKS = {
    "zero_shot": {},
    "retrieval": {},
    "knn": {"k": [3]},
    "linear_probe": {},
    "few_shot": {"shots": [1, 2]},
    "segmentation_knn": {"k": 5},
    "segmentation_linear": {},
    "correspondence": {},
    "pointing": {},
}


@pytest.mark.parametrize("kind", TASKS)
def test_figures_are_those_of_single_images(kind, subject):
    probe = kind in ("knn", "linear_probe", "few_shot")
    data = {"train": "shapes", "test": "more"} if probe else {"data": "shapes"}
    task = task_from({"task": kind, **data, **TASKS[kind]}, "here")
    together, alone = (task.run(subject(size)).figures for size in (24, 1))
    assert together and {name: figure.value for name, figure in together.items()} == pytest.approx(
        {name: figure.value for name, figure in alone.items()},
        abs=3 if kind == "segmentation_linear" else 1e-6,  # which ends at a tolerance
    )


def test_masks_lie_on_their_pictures(bundle):
    for index in range(8):
        record = Shapes()[index]
        image = bundle.preprocess.pixels(80 * record.mask[..., None].repeat(3, axis=2))
        picture, mask = image.pixels()[0], one_by_one(Patches.batch([bundle.preprocess.mask(record.mask)]), 1)[0]
        rows, columns = native_grid(*record.mask.shape, PATCH, 16)
        assert mask.shape == picture.shape == (rows * PATCH, columns * PATCH)
        assert ((picture / 80).round() == mask).float().mean() > 0.9


@pytest.mark.parametrize("how", [{}, {"method": "beam", "num_beams": 3}, {"method": "sample", "best_of": 2}])
def test_captions_are_those_of_each_image(bundle, how):
    torch.manual_seed(0)
    sizes = {"width": 32, "depth": 2, "num_heads": 2, "mlp_dim": 32}
    decoder = decoder_for(CaptionDecoderConfig(**sizes), 32, bundle.tokenizer).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    captioner, how = Captioner(bundle, decoder, bundle.tokenizer), GenerationConfig(**how)
    together, alone = (caption_images(captioner, Shapes(), how, device="cpu", batch_size=size)[0] for size in (24, 1))
    assert [one.text for one in together] == [one.text for one in alone]
    assert [one.log_likelihood for one in together] == pytest.approx([one.log_likelihood for one in alone], abs=1e-4)
    assert len({round(one.log_likelihood, 3) for one in together}) > 8
    likely = [
        zero_shot_by_likelihood(captioner, Shapes(), device="cpu", batch_size=size, templates=["a {}"])
        for size in (24, 1)
    ]
    assert likely[0] == likely[1]

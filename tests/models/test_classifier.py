import pytest
import torch
from torchvision.models import vit_b_16, vit_h_14, vit_l_16

from contrastive.errors import UserError
from contrastive.models import ClassifierConfig, ImageClassifier, ImageTowerConfig, classifier_config, list_classifiers
from contrastive.models.classifier import replace

SMALL = ImageTowerConfig(image_size=16, patch_size=8, width=16, depth=2, num_heads=2, mlp_dim=32, pool="average")


@pytest.mark.parametrize(("name", "reference"), [("base", vit_b_16), ("large", vit_l_16), ("huge", vit_h_14)])
def test_sizes_are_the_papers(name, reference, monkeypatch):
    """Table 1 of the paper says 86, 307 and 632 million; torchvision's models have the exact number."""
    monkeypatch.setattr("contrastive.models.classifier.initialise_tower", lambda *_: None)  # slow, and not the point
    with torch.device("meta"):
        model, theirs = ImageClassifier(replace(classifier_config(name), num_classes=1000)), reference()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_names():
    assert list_classifiers() == ["tiny", "small", "base", "large", "huge"]
    with pytest.raises(UserError, match="unknown model 'bse'. Did you mean 'base'"):
        classifier_config("bse")


def test_scores_start_equal_and_the_head_reads_the_features():
    torch.manual_seed(0)
    model = ImageClassifier(ClassifierConfig(SMALL, num_classes=3)).eval()
    pixels = torch.randn(4, 3, 16, 16)
    assert torch.equal(model(pixels), torch.zeros(4, 3))
    torch.nn.init.normal_(model.head.weight)
    expected = model.encode_image(pixels, normalize=False) @ model.head.weight.T
    torch.testing.assert_close(model(pixels), expected)
    model.config = replace(model.config, unit_features=True)
    torch.testing.assert_close(model(pixels), model.encode_image(pixels) @ model.head.weight.T)


def test_features_before_and_after_the_projection():
    model = ImageClassifier(ClassifierConfig(replace(SMALL, projection=True), embed_dim=8, num_classes=3)).eval()
    pixels = torch.randn(2, 3, 16, 16)
    before = model.encode_image(pixels, normalize=False, project=False)
    assert before.shape == (2, 16) and model.config.embed_dim == 8
    projected = model.image_tower.projection(before)
    torch.testing.assert_close(model.encode_image(pixels, normalize=False), projected)
    torch.testing.assert_close(model.encode_image(pixels).norm(dim=1), torch.ones(2))


def test_the_number_of_classes_must_be_known():
    with pytest.raises(UserError, match="model.num_classes"):
        ImageClassifier(ClassifierConfig(SMALL))

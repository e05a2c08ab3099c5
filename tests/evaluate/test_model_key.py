"""The key by which stored embeddings know their model."""

from types import SimpleNamespace

from contrastive.data.preprocess import Preprocess, PreprocessConfig
from contrastive.evaluate.embedding_writing import model_identity
from contrastive.models import DualEncoder, ImageTowerConfig, ModelConfig, TextTowerConfig


def test_a_new_option_that_is_off_leaves_keys_as_they_were():
    """Else all that was ever stored would have to be embedded again."""
    size = {"width": 8, "depth": 1, "num_heads": 1, "mlp_dim": 8}
    image, text = ImageTowerConfig(image_size=16, patch_size=8, **size), {"vocab_size": 20, "context_length": 6, **size}
    model = DualEncoder(ModelConfig(8, image, TextTowerConfig(**text)))
    for parameter in model.parameters():
        parameter.data.zero_()
    preprocess = Preprocess(PreprocessConfig(image_size=16))
    told = model_identity(SimpleNamespace(model=model, preprocess=preprocess, tokenizer=None, path="x"))
    assert told["key"] == "4aaa50b80f7dbc8a3e284784d23fac1d21043b5c9181a979fbe85c9ce790a5ba"
    names = {"resize", "mean", "std", "interpolation", "short_side", "cut", "image_size"}
    assert set(told["preprocess"]) == names

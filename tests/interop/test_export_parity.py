"""The check behind every export finds small faults of a folder, which features hardly show."""

import json
from dataclasses import replace

import pytest
from small_bundles import small_bundle

from contrastive.errors import UserError
from contrastive.interop.export import export
from contrastive.interop.formats import transformers_folder as writing
from contrastive.interop.parity import embedding_limit
from contrastive.models import ImageModel, ImageModelConfig


@pytest.mark.parametrize(
    ("kind", "file", "path", "value", "what"),
    [
        ("siglip", "config.json", ("vision_config", "layer_norm_eps"), 1e-5, "image embeddings are"),
        ("siglip", "config.json", ("text_config", "layer_norm_eps"), 1e-5, "text embeddings are"),
        ("siglip", "preprocessor_config.json", ("image_mean",), [0.49] * 3, "pixels are not the model's .mean differ"),
        ("clip", "preprocessor_config.json", ("image_std",), [0.27] * 3, "pixels are not the model's .mean differ"),
    ],
)
def test_a_small_fault_is_found(kind, file, path, value, what, tmp_path, monkeypatch):
    right = writing.write

    def wrong(bundle, folder, place):
        notes = right(bundle, folder, place)
        options = section = json.loads((folder / file).read_text())
        for name in path[:-1]:
            section = section[name]
        assert section[path[-1]] != value
        section[path[-1]] = value
        (folder / file).write_text(json.dumps(options))
        return notes

    monkeypatch.setattr(writing, "write", wrong)
    with pytest.raises(UserError, match=what):
        export(small_bundle(kind), "transformers", tmp_path / "out")


@pytest.mark.parametrize(("depth", "limit"), [(1, 2e-6), (12, 4e-6), (27, 8e-6), (60, 1e-5)])
def test_the_limit_grows_with_depth(depth, limit):
    bundle = small_bundle("image")
    config = ImageModelConfig(32, replace(bundle.config.image, depth=depth))
    assert embedding_limit(replace(bundle, model=ImageModel(config))) == pytest.approx(limit)

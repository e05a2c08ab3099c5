"""Uses of the public API, checked by pyright (test_typing.py) and never run: what editors know of each value."""

from typing import assert_type

import torch
from PIL import Image

import contrastive
from contrastive import ImageEncoder
from contrastive.interop.bundle import Bundle
from contrastive.models import DualEncoder

image = Image.new("RGB", (64, 48))

assert_type(contrastive.__version__, str)
assert_type(contrastive.list_models(), list[str])

model = contrastive.create_model("siglip_vit_b_16")
assert_type(model, DualEncoder)
pixels, tokens = torch.zeros(2, 3, 224, 224), torch.zeros(2, 64, dtype=torch.int64)
assert_type(model.encode_image(pixels), torch.Tensor)
assert_type(model.encode_text(tokens, normalize=False), torch.Tensor)
assert_type(model.config.embed_dim, int)

bundle = contrastive.load("runs/mine", device="cpu")
assert_type(bundle, Bundle)
ids: torch.Tensor = bundle.tokenizer(["a dog", "a cat"])
bundle.model.encode_image(bundle.preprocess(image).unsqueeze(0))

encoder = contrastive.load_image_encoder("runs/mine", layer=-2, norm=False)
assert_type(encoder, ImageEncoder)
tower_tokens: torch.Tensor = encoder(encoder.preprocess(image).unsqueeze(0))

image_features, text_features = model.encode_image(pixels), model.encode_text(tokens)
sigmoid, softmax = contrastive.losses.SigmoidLoss(), contrastive.losses.SoftmaxLoss()
loss: torch.Tensor = sigmoid(image_features, text_features, model.logit_scale.exp(), model.logit_bias)
loss += softmax(image_features, text_features, model.logit_scale.exp())

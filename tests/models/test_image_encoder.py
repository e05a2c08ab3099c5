"""The encoder's layers are transformers' and timm's own, to 1e-5; what is not needed is not in it."""

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from test_transformers_parity import clip, siglip

from contrastive.errors import UserError
from contrastive.models import DualEncoder, ImageTower, ImageTowerConfig
from contrastive.models.image_encoder import ImageEncoder

SHAPE = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 3, "num_heads": 4, "mlp_dim": 64}
MAP = ImageTowerConfig(**SHAPE)  # SigLIP's attention pooling
CLASS = ImageTowerConfig(**SHAPE, pool="class", class_token=True, pre_norm=True, patch_bias=False, activation="gelu")


def tower_of(config=MAP, std=0.2):
    torch.manual_seed(0)
    tower = ImageTower(config, config.width).eval()
    for parameter in tower.parameters():  # biases and norms too, which start at 0 and 1
        torch.nn.init.normal_(parameter, std=std)
    return tower


def images(*shape, seed=1):
    return torch.randn(*(shape or (2, 3, 32, 32)), generator=torch.Generator().manual_seed(seed))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [siglip, clip])
@torch.no_grad()
def test_layers_are_those_of_transformers(family):
    torch.manual_seed(0)
    theirs, config, weights = family()
    for tensor in weights.values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn_like(tensor) * 0.2)
    dual = DualEncoder(config).eval()
    own = dual.state_dict()
    dual.load_state_dict({name: weights[name].reshape(tensor.shape) for name, tensor in own.items()})
    pixels, depth, prefix = images(), config.image.depth, int(config.image.class_token)
    output = theirs.eval().vision_model(pixel_values=pixels, output_hidden_states=True)
    assert len(output.hidden_states) == depth + 1
    for layer in range(-depth - 1, depth + 1):
        encoder = ImageEncoder(dual.image_tower, layer)
        close(encoder(pixels), output.hidden_states[layer][:, prefix:])
        assert encoder.config.num_hidden_layers == layer % (depth + 1)
    for one, other in zip(ImageEncoder(dual.image_tower, -1).hidden_states(pixels), output.hidden_states, strict=True):
        close(one, other)
    last = ImageEncoder(dual.image_tower, -1, norm=True)
    if family is siglip:  # CLIP's last_hidden_state is not normalised
        close(last(pixels), output.last_hidden_state)
        close(ImageEncoder(dual.image_tower, -1, norm=True, pool="attention")(pixels), output.pooler_output)
    else:
        close(ImageEncoder(dual.image_tower, -1)(pixels), output.last_hidden_state[:, 1:])
        close(ImageEncoder(dual.image_tower, -1, norm=True, pool="class")(pixels), output.pooler_output)
        close(ImageEncoder(dual.image_tower, -2, keep_prefix=True)(pixels), output.hidden_states[-2])


def as_timm(tower):
    """timm's VisionTransformer with the weights of a tower that has a class token and pre_norm."""
    from timm.models.vision_transformer import VisionTransformer

    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 2}
    model = VisionTransformer(**shape, num_classes=0, pre_norm=True, global_pool="token").eval()
    names = {"attention.": "attn.", "attn.out_proj": "attn.proj", "transformer.blocks": "blocks"}
    names |= {"pre_norm": "norm_pre", "patch_embed.": "patch_embed.proj."}
    weights = {}
    for name, tensor in tower.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        weights[name] = tensor
    for block in range(3):
        for kind in ("weight", "bias"):
            parts = [weights.pop(f"blocks.{block}.attn.{part}_proj.{kind}") for part in "qkv"]
            weights[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
    weights["cls_token"] = weights.pop("class_token")[None, None]
    weights["pos_embed"] = weights.pop("position_embedding")[None]
    model.load_state_dict(weights)
    return model


@torch.no_grad()
def test_intermediate_layers_are_those_of_timm():
    tower = tower_of(CLASS)
    theirs, pixels = as_timm(tower), images()
    encoder = ImageEncoder(tower, -1, norm=True)
    for n in (1, 2, 3, [0], [2, 0], (1, -1), {1}):
        for options in ({}, {"norm": True}, {"reshape": True}, {"return_prefix_tokens": True, "norm": True}):
            mine = encoder.get_intermediate_layers(pixels, n, **options)
            others = theirs.get_intermediate_layers(pixels, list(n) if isinstance(n, set) else n, **options)
            assert isinstance(mine, tuple) and len(mine) == len(others)
            for one, other in zip(mine, others, strict=True):
                for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (one, other)), strict=True):
                    close(a, b)
    [(patches, class_token)] = encoder.get_intermediate_layers(pixels, return_class_token=True)  # DINO's
    assert patches.shape == (2, 16, 32) and class_token.shape == (2, 32)
    for layer in (1, 2, 3):  # the convention that the docstring states
        close(ImageEncoder(tower, layer)(pixels), theirs.get_intermediate_layers(pixels, [layer - 1])[0])


@torch.no_grad()
def test_grid_holds_the_patch_tokens_row_by_row():
    encoder, pixels = ImageEncoder(tower_of(CLASS)), images(2, 3, 16, 40)
    tokens, grid = encoder(pixels), encoder(pixels, fmt="NCHW")
    assert tokens.shape == (2, 10, 32) and grid.shape == (2, 32, 2, 5) and grid.is_contiguous()
    assert torch.equal(grid[:, :, 1, 3], tokens[:, 1 * 5 + 3])
    tower = ImageTower(replace(MAP, width=3, num_heads=1, depth=0, pool="average"), 3)
    torch.nn.init.zeros_(tower.patch_embed.bias)
    tower.patch_embed.weight.data = torch.eye(3)[:, :, None, None].expand(3, 3, 8, 8) / 64  # the mean colour
    torch.nn.init.zeros_(tower.position_embedding)
    close(ImageEncoder(tower, 0)(pixels, fmt="NCHW"), torch.nn.functional.avg_pool2d(pixels, 8))


@torch.no_grad()
def test_several_layers_at_once_in_the_order_given():
    tower, pixels = tower_of(), images()
    both = ImageEncoder(tower, [-2, 0, 3])(pixels)
    assert isinstance(both, tuple) and len(both) == 3
    for layer, tokens in zip((2, 0, 3), both, strict=True):
        assert torch.equal(tokens, ImageEncoder(tower, layer)(pixels))
    assert isinstance(ImageEncoder(tower, (1,))(pixels), tuple)


def test_what_is_not_needed_is_not_there():
    tower = tower_of()
    encoder = ImageEncoder(tower, (0, -3))
    names = set(encoder.state_dict())
    assert {name.split(".")[2] for name in names if name.startswith("transformer")} == {"0"}
    assert not any(name.startswith(("norm", "head", "projection")) for name in names)
    assert names <= set(tower.state_dict()), "the tower's own names"
    assert "norm.weight" in ImageEncoder(tower, norm=True).state_dict()
    assert "head.probe" in ImageEncoder(tower, pool="tower").state_dict()
    assert encoder.tower_depth == 3 and len(encoder.blocks) == 1


@pytest.mark.parametrize("pool", ["class", "average", "attention"])
@torch.no_grad()
def test_pooling_is_that_of_the_tower(pool):
    config = replace(CLASS, pool=pool, projection=True)
    tower, pixels = tower_of(config), images()
    expected = tower(pixels, project=False)
    close(ImageEncoder(tower, -1, norm=True, pool="tower")(pixels), expected)
    close(ImageEncoder(tower, -1, norm=True, pool=pool)(pixels), expected)
    raw = ImageEncoder(tower, -1, norm=True)(pixels)
    close(ImageEncoder(tower, -1, norm=True, pool="average")(pixels), raw.mean(dim=1))


def test_the_copy_is_its_own():
    tower = tower_of(replace(MAP, dropout=0.5, patch_dropout=0.5))
    tower.transformer.gradient_checkpointing = 1.0
    encoder = ImageEncoder(tower)
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tower.state_dict().items())
    pixels = images()
    assert torch.equal(encoder.train()(pixels), encoder.eval()(pixels)), "no dropout of any kind"
    assert not encoder.transformer.gradient_checkpointing


def test_attributes_that_vlm_code_reads():
    encoder = ImageEncoder(tower_of(CLASS), (1, -2), norm=True)
    assert encoder.embed_dim == encoder.hidden_size == encoder.num_features == 32
    assert (encoder.patch_size, encoder.grid_size, encoder.num_patches) == (8, (4, 4), 16)
    assert (encoder.num_patches_per_side, encoder.num_prefix_tokens) == (4, 1)
    assert encoder.device == torch.device("cpu") and encoder.dtype == torch.float32
    config = encoder.config
    told = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)
    assert told == (32, 2, 4, 64) and config.tower_depth == 3
    assert (config.image_size, config.patch_size, config.hidden_act) == (32, 8, "gelu")
    assert (config.layer, config.norm, config.pool) == ((1, -2), True, None)
    assert config.to_dict()["hidden_size"] == 32
    assert ImageEncoder(tower_of()).num_prefix_tokens == 0


@torch.no_grad()
def test_copies_pickles_and_files():
    encoder, pixels = ImageEncoder(tower_of(CLASS)), images()
    encoder.set_input_size((16, 40))
    file = io.BytesIO()
    torch.save(encoder, file)
    file.seek(0)
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder)), torch.load(file, weights_only=False)):
        assert torch.equal(other(pixels), encoder(pixels)) and other.grid_size == (2, 5)


@pytest.mark.parametrize(
    ("position", "options", "sizes"),
    [("learned", {}, [32, 48]), ("sincos", {"layer": (1, -1), "norm": True, "pool": "tower"}, [32])],
)
def test_compiles_as_one_graph(position, options, sizes):
    encoder = ImageEncoder(tower_of(replace(CLASS, position=position)), **options)
    torch.compiler.reset()
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True)  # traces the backward pass too
    for size in sizes:
        pixels = images(2, 3, size, size)
        for one, other in zip(compiled(pixels), encoder(pixels), strict=True):
            close(one, other)


@torch.no_grad()
def test_bfloat16_and_autocast():
    exact, pixels = ImageEncoder(tower_of(CLASS, std=0.1), -1), images()
    half = copy.deepcopy(exact).to(torch.bfloat16)
    expected = exact(pixels)
    assert half.dtype == torch.bfloat16 and half(pixels).dtype == torch.bfloat16, "float32 pixels are taken"
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = exact(pixels)
    for rounded in (half(pixels), under_autocast):
        cosine = torch.cosine_similarity(rounded.float(), expected, dim=-1)
        assert cosine.min() > 0.999
    half.set_input_size(48)
    assert half(images(1, 3, 48, 48)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (MAP, {"layer": 4}, "layer 4 is not in an image tower of 3 blocks: use -4 to 3"),
        (MAP, {"layer": -5}, "layer -5 is not"),
        (MAP, {"layer": (1, 7)}, "layer 7 is not"),
        (MAP, {"layer": ()}, "layer is empty"),
        (MAP, {"layer": True}, "layer is True"),
        (MAP, {"layer": "-2"}, "layer is '-2': give an integer"),
        (MAP, {"pool": "max"}, "unknown pool 'max'; use one of class, average"),
        (MAP, {"pool": "class"}, "needs a tower with a class token"),
        (CLASS, {"pool": "attention"}, "needs the attention head"),
        (MAP, {"keep_prefix": True}, "no class token"),
        (CLASS, {"keep_prefix": True, "pool": "class"}, "pooled features have no tokens"),
    ],
)
def test_wrong_choices(config, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        ImageEncoder(tower_of(config), **arguments)
    assert "\n" not in str(caught.value)


def test_wrong_calls():
    encoder, pixels = ImageEncoder(tower_of()), images()
    pooled, whole = ImageEncoder(tower_of(), pool="average"), ImageEncoder(tower_of(), layer=-1)
    for call, message in (
        (lambda: encoder(pixels[0]), r"pixels are \(3, 32, 32\), not \(B, 3, H, W\)"),
        (lambda: encoder((pixels * 50).byte()), "not normalised floats"),
        (lambda: encoder(pixels[..., 1:]), "must be multiples of 8"),
        (lambda: encoder(pixels, fmt="NHWC"), "use 'NLC'"),
        (lambda: pooled(pixels, fmt="NCHW"), "without pool"),
        (lambda: encoder.hidden_states(pixels), "ends at block 2 of 3: load it with layer=-1"),
        (lambda: encoder.get_intermediate_layers(pixels), "ends at block 2 of 3: load it with layer=-1"),
        (lambda: whole.get_intermediate_layers(pixels, norm=True), "load it with norm=True"),
        (lambda: whole.get_intermediate_layers(pixels, [3]), "block 3: this encoder has 3 blocks"),
        (lambda: whole.get_intermediate_layers(pixels, 4), "4 blocks: this encoder has 3 blocks"),
        (lambda: whole.get_intermediate_layers(pixels, 0), "n is 0, which is no block"),
        (lambda: whole.get_intermediate_layers(pixels, -1), "n is -1, which is no block"),
        (lambda: whole.get_intermediate_layers(pixels, return_class_token=True), "no class token"),
    ):
        with pytest.raises(UserError, match=message):
            call()

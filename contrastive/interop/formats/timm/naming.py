"""Which of timm's names, with which arguments, is an image tower of ours."""

from pathlib import Path

from contrastive.errors import UserError
from contrastive.interop.formats.timm.architecture import THEIR_POOLS, build_on_meta, describe
from contrastive.interop.formats.timm.keys import written_table
from contrastive.models import ImageTowerConfig

# timm takes the epsilon of norms from the code of a name alone; the rest can be given as arguments. The first name
# is for attention pooling: timm fills a 'siglip' model of another pooling without complaint over missing weights.
BASES = {1e-6: ("vit_base_patch16_siglip_224", "vit_base_patch16_224"), 1e-5: ("vit_base_patch16_clip_224",) * 2}


def timm_problems(config: ImageTowerConfig) -> list[str]:
    """Return the options that timm's ViT cannot express, each with what to do."""
    problems = []
    if config.norm_eps not in BASES:
        known = " or ".join(map(str, BASES))
        problems.append(f"model.image.norm_eps {config.norm_eps} (timm's ViTs have {known}; train with one of them)")
    if config.pre_norm and config.patch_bias:
        problems.append("model.image.pre_norm with model.image.patch_bias true (train with patch_bias false)")
    return problems


def timm_name(config: ImageTowerConfig, size: tuple[int, int]) -> tuple[str, dict]:
    """Return timm's name and the arguments that make it this tower; none where a name of the registry is it already.

    Args:
        config: one that `timm_problems` finds nothing in.
        size: (height, width) in pixels that the model takes.
    """
    registered = registered_name(config, size)
    if registered is not None:
        return registered, {}
    base = BASES[config.norm_eps][config.pool != "attention"]
    return base, {
        "img_size": list(size),
        "patch_size": config.patch_size,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": mlp_ratio(config.width, config.mlp_dim),
        "class_token": config.class_token,
        "global_pool": THEIR_POOLS[config.pool],
        "fc_norm": False,
        "pool_include_prefix": config.pool == "attention" and config.class_token,
        "pre_norm": config.pre_norm,
        "act_layer": config.activation,
    }


def registered_name(config: ImageTowerConfig, size: tuple[int, int]) -> str | None:
    """Return the name in timm's registry whose model has exactly this architecture and input size, or None."""
    import timm

    if size[0] != size[1]:
        return None
    kind = "siglip" if config.pool == "attention" else "siglip_gap" if not config.class_token else "clip*"
    for pattern in (f"vit_*_patch{config.patch_size}_{kind}_{size[0]}", f"vit_*_patch{config.patch_size}_{size[0]}"):
        for name in timm.list_models(pattern):
            if _is(name, config, size):
                return name
    return None


def mlp_ratio(width: int, mlp_dim: int) -> float:
    """Return the factor for which int(width · factor), as both libraries compute it, is mlp_dim."""
    ratio = mlp_dim / width
    return ratio if int(width * ratio) == mlp_dim else (mlp_dim + 0.5) / width


def _is(name: str, config: ImageTowerConfig, size: tuple[int, int]) -> bool:
    model = build_on_meta(name, Path(name), num_classes=0)
    try:
        found, taken = describe(model, Path(name))
    except UserError:  # a ViT of another kind
        return False
    # The keys tell of LayerScale, missing biases and the like, which can be read but not written.
    keys = {entry.theirs for entry in written_table(config)}
    same = _comparable(found) == _comparable(config) and tuple(taken) == tuple(size)
    return same and keys == model.state_dict().keys() and not model.no_embed_class


def _comparable(config: ImageTowerConfig) -> tuple:
    """What has to agree: neither how a tower is trained nor where its positions come from."""
    names = ("patch_size", "width", "depth", "num_heads", "mlp_dim", "pool", "class_token", "pre_norm")
    # Without pre_norm timm's patches have a bias, which can be zero.
    return tuple(getattr(config, name) for name in (*names, "activation", "norm_eps"))

"""The table of a classifier's parts, shapes and parameters, as tutorials print it."""

from rich import box
from rich.table import Table

from contrastive.log import console, is_main_process
from contrastive.models import ImageClassifier


def parameter_rows(model: ImageClassifier) -> list[tuple[str, str, int]]:
    """Return (part, shape of what it gives for one image, parameters); the last row is the sum."""
    image, tower = model.config.image, model.image_tower
    tokens = image.num_patches + image.class_token
    tokens_shape = f"{tokens} x {image.width}"
    parts = [
        ("patch embedding", f"{image.num_patches} x {image.width}", tower.patch_embed),
        *((f"block {n}", tokens_shape, block) for n, block in enumerate(tower.transformer.blocks, start=1)),
        ("final norm", tokens_shape, tower.norm),
        ("head", str(model.config.num_classes), model.head),
    ]
    rows = [(name, shape, sum(p.numel() for p in module.parameters())) for name, shape, module in parts]
    total = sum(p.numel() for p in model.parameters())
    # What lies between patches and blocks: class token, positions, a norm there; and a pooling head.
    rows.insert(1, ("class token, positions and pooling", tokens_shape, total - sum(count for *_, count in rows)))
    return [*rows, ("all", "", total)]


def show_parameters(model: ImageClassifier) -> None:
    """Print the table, blocks of one size as one line."""
    if not is_main_process():
        return
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("part")
    table.add_column("gives, for one image")
    table.add_column("parameters", justify="right")
    rows = parameter_rows(model)
    blocks = [row for row in rows if row[0].startswith("block ")]
    for name, shape, count in rows:
        if name == "block 1":
            table.add_row(f"{len(blocks)} blocks", shape, f"{len(blocks)} x {count:,}")
        elif not name.startswith("block "):
            table.add_row(name, shape, f"{count:,}")
    console.print(table)

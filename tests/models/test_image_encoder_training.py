"""Training on top of an encoder: freezing by block, DDP without unused parameters, checkpointing, LoRA."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from rank_processes import run_on_ranks
from test_image_encoder import CLASS, MAP, close, images, tower_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from contrastive.errors import UserError
from contrastive.models.image_encoder import ImageEncoder


def trainable(encoder):
    """Which of the stages e (embeddings), 0, 1, ... and n (norm, head) learn; a stage learns whole or not at all."""
    stages = {}
    for name, parameter in encoder.named_parameters():
        part = name.split(".")[2] if name.startswith("transformer") else "n" if name[:4] in ("norm", "head") else "e"
        stages.setdefault(part, set()).add(parameter.requires_grad)
    assert all(len(values) == 1 for values in stages.values())
    return "".join(part for part, values in sorted(stages.items()) if True in values)


def test_freezing_by_block():
    encoder = ImageEncoder(tower_of(), -1, norm=True, pool="attention")
    total = sum(p.numel() for p in encoder.parameters())
    assert trainable(encoder) == "012en" and encoder.num_trainable_parameters == total
    assert trainable(encoder.freeze(2)) == "2n"
    assert trainable(encoder.unfreeze(2)) == "12n"
    assert trainable(encoder.freeze()) == "" and encoder.num_trainable_parameters == 0
    assert trainable(encoder.unfreeze(1)) == "2n"
    assert trainable(encoder.freeze().unfreeze(slice(0, 2))) == "01"
    assert trainable(encoder.freeze(slice(0, 1))) == "1"
    assert trainable(encoder.unfreeze(0)) == "1n"
    assert trainable(encoder.unfreeze().freeze(0)) == "012n", "the embeddings alone"
    for wrong in (4, -1, True):
        with pytest.raises(UserError, match="this encoder has 3; give 0 to 3"):
            encoder.freeze(wrong)
    frozen = ImageEncoder(tower_of()).freeze()
    assert not frozen(images()).requires_grad


def test_checkpointing_changes_no_gradient_and_works_above_frozen_embeddings():
    pixels, gradients, runs = images(), [], []
    for on in (False, True):
        encoder = ImageEncoder(tower_of()).freeze(1)
        encoder.set_grad_checkpointing(on)
        count = []
        encoder.blocks[1].register_forward_pre_hook(lambda *_, count=count: count.append(1))
        encoder(pixels).square().sum().backward()
        gradients.append([p.grad for p in encoder.blocks[1].parameters()])
        runs.append(len(count))
        assert encoder.patch_embed.weight.grad is None
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert runs == [1, 2], "the block ran again in the backward pass, in eval mode too"
    with torch.no_grad():
        encoder(pixels)


CASES = {
    "llava": (CLASS, {}),
    "several": (CLASS, {"layer": (0, 2), "norm": True}),
    "tower": (MAP, {"layer": -1, "norm": True, "pool": "tower"}),
    "embeddings": (CLASS, {"layer": 0}),
}


def gradients_of(name, rank, world_size):
    config, options = CASES[name]
    encoder = ImageEncoder(tower_of(replace(config, projection=True)), **options)
    wrapped = DistributedDataParallel(encoder) if world_size > 1 else encoder
    pixels = images(4, 3, 32, 32).chunk(world_size)[rank]
    for _ in range(2):  # DDP tells of a parameter left without a gradient at the next forward pass
        encoder.zero_grad()
        outputs = wrapped(pixels)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(x.square().mean() for x in outputs).backward()
    return {key: parameter.grad for key, parameter in encoder.named_parameters()}


def run_rank(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    torch.save({name: gradients_of(name, rank, world_size) for name in CASES}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_no_parameter_is_unused_under_ddp(tmp_path):
    run_on_ranks(2, run_rank, 2, str(tmp_path))
    for rank in range(2):
        for name, gradients in torch.load(tmp_path / f"rank{rank}.pt").items():
            expected = gradients_of(name, 0, 1)
            assert gradients.keys() == expected.keys() and all(g is not None for g in gradients.values())
            for key, gradient in gradients.items():
                close(gradient, expected[key])


def test_lora_by_peft():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    encoder, pixels = ImageEncoder(tower_of(CLASS, std=0.1), norm=True), images()
    before = encoder(pixels).detach()
    original = copy.deepcopy(encoder.state_dict())
    adapted = get_peft_model(encoder, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * 2 * 2 and all("lora_" in name for name in names)
    assert torch.equal(adapted(pixels), before), "LoRA starts as nothing"
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(adapted(pixels), torch.zeros_like(before)).backward()
        optimizer.step()
    after = adapted(pixels).detach()
    assert (after - before).abs().max() > 1e-2
    merged = adapted.merge_and_unload()
    assert isinstance(merged, ImageEncoder) and merged.config.hidden_size == 32
    close(merged(pixels), after)
    changed = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, original[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj"} and len(changed) == 4

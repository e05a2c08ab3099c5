import os
import socket

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from colour_model import COLOURS, ColourSource, bundle

from contrastive.evaluate.embeddings import embed_images, embed_texts, pick_indices

NAMES = list(COLOURS)


def source_of(number, **options):
    return ColourSource([NAMES[i % len(NAMES)] for i in range(number)], **options)


def embed(source, **options):
    subject = bundle()
    return embed_images(subject.model, source, subject.preprocess, device="cpu", **options)


def test_rows_follow_the_indices_asked_for():
    found = embed(source_of(20), indices=[7, 2, 11], batch_size=2)
    assert found.index.tolist() == [7, 2, 11]
    expected = torch.nn.functional.normalize(torch.tensor([COLOURS[NAMES[i % 6]] for i in (7, 2, 11)]).float())
    torch.testing.assert_close(found.features, expected)
    assert found.features.dtype == torch.float32 and found.features.device.type == "cpu"


def test_unreadable_images_are_left_out_and_told():
    found = embed(source_of(9, unreadable=(0, 1, 5)), batch_size=2, progress=True)
    assert found.index.tolist() == [2, 3, 4, 6, 7, 8]
    assert len(found.features) == 6
    assert found.bad == [("unreadable_image", f"picture {i}") for i in (0, 1, 5)]
    assert found.keys == list("234678")
    assert found.skipped == {"unreadable_image": 3}


def test_a_source_without_a_readable_image_gives_no_rows():
    found = embed(source_of(3, unreadable=(0, 1, 2)))
    assert found.features.shape == (0, 3) and found.index.shape == (0,)


def test_each_module_gets_its_own_mode_back():
    subject = bundle()
    subject.model.train()
    subject.model.towers[1].eval()  # as a locked tower is
    embed_images(subject.model, source_of(3), subject.preprocess, device="cpu")
    embed_texts(subject.model, subject.tokenizer, ["a red thing"], device="cpu")
    assert subject.model.training and subject.model.towers[0].training
    assert not subject.model.towers[1].training


def test_features_can_be_trained_on():
    features = embed(source_of(6)).features
    weight = torch.ones(3, requires_grad=True)
    (features @ weight).sum().backward()
    torch.testing.assert_close(weight.grad, features.sum(dim=0))


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_texts_come_in_order_whatever_the_batch(batch_size):
    subject = bundle()
    texts = [f"some {name} thing" for name in NAMES]
    features = embed_texts(subject.model, subject.tokenizer, texts, device="cpu", batch_size=batch_size)
    expected = torch.nn.functional.normalize(torch.tensor(list(COLOURS.values())).float())
    torch.testing.assert_close(features, expected)


def test_a_subset_is_fixed_rising_and_spread():
    picked = pick_indices(1000, 100)
    assert np.array_equal(picked, pick_indices(1000, 100))
    assert (np.diff(picked) > 0).all() and len(picked) == 100
    assert picked[0] < 100 and picked[-1] >= 900
    assert np.array_equal(pick_indices(5, None), np.arange(5)) and np.array_equal(pick_indices(5, 9), np.arange(5))


def _embed_on_rank(rank, world_size, port, number, folder):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    found = embed(source_of(number, unreadable=(1, 6)), batch_size=2)
    torch.save((found.features, found.index, found.bad), f"{folder}/{number}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("number", [1, 7])
def test_two_ranks_give_every_rank_the_rows_of_one_process(tmp_path, number):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_embed_on_rank, (2, port, number, str(tmp_path)), nprocs=2, start_method="fork")
    alone = embed(source_of(number, unreadable=(1, 6)), batch_size=2)
    for rank in range(2):
        features, index, bad = torch.load(tmp_path / f"{number}-{rank}.pt")
        assert torch.equal(features, alone.features)
        assert torch.equal(index, alone.index)
        assert bad == alone.bad

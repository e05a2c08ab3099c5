"""Small batches as CIFAR's author pickled them with Python 2."""

import pickle
import struct

import numpy as np

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
LABELS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def rows(images):
    """(N, 3072): the red plane, the green one, the blue one."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1).copy()


def python2_pickle(batch):
    """Write a dict of str, lists of int or str, and a uint8 array, as Python 2's protocol 2 writes it."""

    def text(value):
        value = value.encode("latin-1") if isinstance(value, str) else value
        return b"T" + struct.pack("<i", len(value)) + value  # BINSTRING, which Python 3 never writes

    def number(value):
        return b"J" + struct.pack("<i", value)

    def array(values):
        shape = b"".join(map(number, values.shape))
        dtype = b"cnumpy\ndtype\n(" + text("u1") + number(0) + number(1) + b"tR"
        dtype += b"(" + number(3) + text("|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
        made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + number(0) + b"t" + text("b") + b"tR"
        return made + b"(" + number(1) + b"(" + shape + b"t" + dtype + b"\x89" + text(values.tobytes()) + b"tb"

    def value(item):
        if isinstance(item, np.ndarray):
            return array(item)
        if isinstance(item, list):
            return b"](" + b"".join(map(value, item)) + b"e"
        return number(item) if isinstance(item, int) else text(item)

    items = b"".join(text(key) + value(item) for key, item in batch.items())
    return b"\x80\x02}(" + items + b"u."


def write_cifar10(folder, write=python2_pickle):
    """Five batches of two images, a test batch of the first three."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(5):
        chosen = slice(2 * number, 2 * number + 2)
        batch = {"batch_label": "x", "labels": LABELS[chosen], "data": rows(IMAGES[chosen]), "filenames": ["a", "b"]}
        (folder / f"data_batch_{number + 1}").write_bytes(write(batch))
    (folder / "test_batch").write_bytes(write({"labels": LABELS[:3], "data": rows(IMAGES[:3])}))
    (folder / "batches.meta").write_bytes(write({"num_vis": 3072, "label_names": NAMES}))
    return folder


def python3_pickle(protocol):
    return lambda batch: pickle.dumps({key.encode(): item for key, item in batch.items()}, protocol=protocol)

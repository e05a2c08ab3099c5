"""Well-known sets with a few pictures each, in the layouts in which torchvision.datasets has them."""

import csv
import json
import pickle
import struct
from pathlib import Path

import numpy as np

from contrastive.data.class_sets import class_set

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 28, 28), dtype=np.uint8)
FACES = RNG.integers(0, 256, (3, 48, 48), dtype=np.uint8)
HOUSES = RNG.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
BIRDS = RNG.integers(0, 256, (3, 96, 96, 3), dtype=np.uint8)


THINGS = RNG.integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
THING_LABELS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


def idx(values):
    return struct.pack(f">{1 + values.ndim}I", 2048 + values.ndim, *values.shape) + values.tobytes()


def put(path, content=None):
    """Write a file, by default one whose content is its own name."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else (content or path.name).encode())


def put_mat(path, **values):
    from scipy.io import savemat

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    savemat(path, values)


def idx_files(folder, train, test, images=GREY, first_label=0):
    for prefix in (train, test):
        put(folder / f"{prefix}-images-idx3-ubyte", idx(images))
        put(folder / f"{prefix}-labels-idx1-ubyte", idx(np.arange(len(images), dtype=np.uint8) + first_label))


def mnist(root, name="MNIST"):
    idx_files(root / name / "raw", "train", "t10k")


def letters(root):
    lying = np.ascontiguousarray(GREY.transpose(0, 2, 1))
    idx_files(root / "EMNIST" / "raw", "emnist-letters-train", "emnist-letters-test", lying, first_label=1)


def put_batch(path, images, **fields):
    """A pickled batch as CIFAR's author wrote them: a row is the red plane, the green one, the blue one."""
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    put(path, pickle.dumps({"data": rows, **fields}, protocol=2))


def cifar10(folder):
    """Five batches of two images, a test batch of the first three."""
    for number in range(5):
        chosen = slice(2 * number, 2 * number + 2)
        put_batch(folder / f"data_batch_{number + 1}", THINGS[chosen], labels=THING_LABELS[chosen])
    put_batch(folder / "test_batch", THINGS[:3], labels=THING_LABELS[:3])
    put(folder / "batches.meta", pickle.dumps({"label_names": list(class_set("cifar10").names)}))
    return folder


def cifar100(folder):
    for name in ("train", "test"):
        put_batch(folder / name, THINGS[:2], fine_labels=[99, 0], coarse_labels=[1, 2])
    put(folder / "meta", pickle.dumps({"fine_label_names": [f"thing_{number}" for number in range(100)]}))
    return folder


def caltech101(root):
    for name in ("BACKGROUND_Google", "accordion", "bass"):
        for number in (1, 2):
            put(root / "caltech101" / "101_ObjectCategories" / name / f"image_{number:04d}.jpg", f"{name} {number}")


def country211(root):
    for split in ("train", "valid", "test"):
        for code in ("AD", "AE", "AF"):
            put(root / "country211" / split / code / f"{code} {split}.jpg")


def dtd(root):
    names = class_set("dtd").own_names
    for split in ("train", "val", "test"):
        rows = [f"{name}/{name}_{split}.jpg" for name in names]
        put(root / "dtd" / "dtd" / "labels" / f"{split}1.txt", "\n".join(rows[::-1]))
        for row in rows:
            put(root / "dtd" / "dtd" / "images" / row)


def eurosat(root):
    for name in ("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop",
                 "Residential", "River", "SeaLake"):  # fmt: skip
        put(root / "eurosat" / "2750" / name / f"{name}_1.jpg")


def fer2013(root):
    (root / "fer2013").mkdir(parents=True)
    with open(root / "fer2013" / "fer2013.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["emotion", "pixels", "Usage"])
        for label, (face, usage) in enumerate(zip(FACES, ("Training", "PublicTest", "PrivateTest"), strict=True)):
            writer.writerow([label + 3, " ".join(map(str, face.ravel())), usage])


def fgvc_aircraft(root):
    data = root / "fgvc-aircraft-2013b" / "data"
    put(data / "variants.txt", "\n".join(class_set("fgvc_aircraft").own_names))
    for split in ("train", "val", "trainval", "test"):
        put(data / f"images_variant_{split}.txt", f"0000002 737-300\n0000001 {split} 707-320".replace(f"{split} ", ""))
    for number in (1, 2):
        put(data / "images" / f"000000{number}.jpg")


def flowers102(root):
    folder = root / "flowers-102"
    for number in (1, 2, 3):
        put(folder / "jpg" / f"image_{number:05d}.jpg")
    put_mat(folder / "imagelabels.mat", labels=np.array([[77, 1, 98]]))
    put_mat(folder / "setid.mat", trnid=np.array([[1, 3]]), valid=np.array([[2, 3]]), tstid=np.array([[2, 1]]))


def food101(root):
    names = [name.replace(" ", "_").lower() for name in class_set("food101").names]
    for split in ("train", "test"):
        rows = {name: [f"{name}/{split}"] for name in reversed(names)}
        put(root / "food-101" / "meta" / f"{split}.json", json.dumps(rows))
        for name in names:
            put(root / "food-101" / "images" / name / f"{split}.jpg", f"{name} {split}")


def gtsrb(root):
    for label in (0, 1, 2):
        put(root / "gtsrb" / "GTSRB" / "Training" / f"{label:05d}" / f"{label}.ppm")
        put(root / "gtsrb" / "GTSRB" / "Final_Test" / "Images" / f"test{label}.ppm")
    put(root / "gtsrb" / "GT-final_test.csv", "Filename;ClassId\ntest0.ppm;14\ntest1.ppm;1\ntest2.ppm;2\n")


def imagenette(root):
    for split in ("train", "val"):
        for name in class_set("imagenette").own_names:
            put(root / "imagenette2" / split / name / f"{name}_{split}.JPEG")


def pets(root):
    names = class_set("pets").own_names
    files = ["_".join(name.lower().split()) + "_1" for name in names]
    rows = "".join(f"{file} {label} 1 1\n" for label, file in enumerate(files, start=1))
    for split in ("trainval", "test"):
        put(root / "oxford-iiit-pet" / "annotations" / f"{split}.txt", rows)
    for file in files:
        put(root / "oxford-iiit-pet" / "images" / f"{file}.jpg")


def rendered_sst2(root):
    for split in ("train", "valid", "test"):
        for name in ("negative", "positive"):
            put(root / "rendered-sst2" / split / name / f"{name}.png")


def stanford_cars(root):
    folder = root / "stanford_cars"
    fields = [("class", "O"), ("fname", "O")]
    rows = np.array([[(np.array([[2]]), "b.jpg"), (np.array([[1]]), "a.jpg")]], dtype=fields)
    put_mat(folder / "devkit" / "cars_train_annos.mat", annotations=rows)
    put_mat(folder / "cars_test_annos_withlabels.mat", annotations=rows)
    put_mat(folder / "devkit" / "cars_meta.mat", class_names=np.array([["AM General Hummer", "Acura RL"]], dtype="O"))
    for name in ("cars_train/a.jpg", "cars_train/b.jpg", "cars_test/a.jpg", "cars_test/b.jpg"):
        put(folder / name)


def stl10(root):
    folder = root / "stl10_binary"
    columns_first = np.ascontiguousarray(BIRDS.transpose(0, 3, 2, 1)).tobytes()
    for split in ("train", "test"):
        put(folder / f"{split}_X.bin", columns_first)
        put(folder / f"{split}_y.bin", bytes([2, 1, 10]))
    put(folder / "unlabeled_X.bin", columns_first)
    put(folder / "class_names.txt", "\n".join(class_set("stl10").own_names))


def sun397(root):
    put(root / "SUN397" / "ClassName.txt", "/a/abbey\n/a/apartment_building/outdoor\n")
    for name in ("a/abbey/sun_b.jpg", "a/abbey/sun_a.jpg", "a/apartment_building/outdoor/sun_c.jpg"):
        put(root / "SUN397" / name)


def svhn(root):
    for split in ("train", "test"):
        put_mat(root / f"{split}_32x32.mat", X=HOUSES.transpose(1, 2, 3, 0), y=np.array([[10], [1], [9]]))


# How each set is written, and what a split then holds: pictures (bytes of files, else arrays) and their classes.
SMALL_SETS = {
    "mnist": (mnist, "test", GREY, ["zero", "one", "two", "three", "four", "five"]),
    "fashion_mnist": (lambda root: mnist(root, "FashionMNIST"), "train", GREY, ["T-shirt or top", "pair of trousers"]),
    "kmnist": (lambda root: mnist(root, "KMNIST"), "train", GREY, ["o", "ki", "su"]),
    "letters": (letters, "test", GREY, ["A", "B", "C"]),
    "cifar10": (
        lambda root: cifar10(root / "cifar-10-batches-py"), "test", THINGS[:3], ["cat", "automobile", "deer"]
    ),
    "cifar100": (
        lambda root: cifar100(root / "cifar-100-python"), "train", THINGS[:2], ["thing_99", "thing_0"]
    ),
    "caltech101": (
        caltech101, "all", [b"accordion 1", b"accordion 2", b"bass 1"], ["accordion", "accordion", "bass"]
    ),
    "country211": (
        country211, "valid", [b"AD valid.jpg", b"AE valid.jpg"], ["Andorra", "United Arab Emirates", "Afghanistan"]
    ),
    "dtd": (dtd, "val", [b"banded_val.jpg", b"blotchy_val.jpg"], ["banded", "blotchy"]),
    "eurosat": (eurosat, "all", [b"AnnualCrop_1.jpg"], ["annual crop land", "forest", "shrubs and other low plants"]),
    "fer2013": (fer2013, "test", FACES[1:], ["sad", "surprised"]),
    "fgvc_aircraft": (fgvc_aircraft, "trainval", [b"0000001.jpg", b"0000002.jpg"], ["707-320", "737-300"]),
    "flowers102": (flowers102, "test", [b"image_00001.jpg", b"image_00002.jpg"], ["passion flower", "pink primrose"]),
    "food101": (food101, "test", [b"apple_pie test"], ["apple pie", "baby back ribs", "baklava"]),
    "gtsrb": (gtsrb, "test", [b"test0.ppm", b"test1.ppm"], ["stop", "speed limit 30", "speed limit 50"]),
    "imagenette": (imagenette, "val", [b"n01440764_val.JPEG"], ["tench", "English springer", "cassette player"]),
    "pets": (pets, "test", [b"abyssinian_1.jpg", b"american_bulldog_1.jpg"], ["Abyssinian", "American bulldog"]),
    "rendered_sst2": (rendered_sst2, "val", [b"negative.png", b"positive.png"], ["negative", "positive"]),
    "stanford_cars": (stanford_cars, "test", [b"a.jpg", b"b.jpg"], ["AM General Hummer", "Acura RL"]),
    "stl10": (stl10, "train", BIRDS, ["bird", "airplane", "truck"]),
    "sun397": (
        sun397, "all", [b"sun_a.jpg", b"sun_b.jpg", b"sun_c.jpg"], ["abbey", "abbey", "apartment_building/outdoor"]
    ),
    "svhn": (svhn, "test", HOUSES, ["zero", "one", "nine"]),
}  # fmt: skip

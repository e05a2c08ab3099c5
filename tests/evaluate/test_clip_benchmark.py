"""LAION's CLIP_benchmark on our models: each task runs offline, and says what our own evaluators say."""

import gzip
import importlib
import io
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
import torchvision
from colour_benchmark import Labelled, colour_bundle, picture, random_run, tokenizer
from colour_model import COLOURS, ColourModel, bundle
from PIL import Image
from shard_writing import write_tar

import contrastive
from contrastive.data.sources import open_source
from contrastive.errors import UserError
from contrastive.evaluate.classification import classification_metrics, zero_shot
from contrastive.evaluate.compositional import compositional
from contrastive.evaluate.embeddings import embed_images
from contrastive.evaluate.linear_probe import linear_probe
from contrastive.evaluate.probe_input import checked_input
from contrastive.evaluate.retrieval import retrieval
from contrastive.interop import clip_benchmark as adapter

pytest.importorskip("clip_benchmark", reason="needs clip-benchmark")

NAMES = tuple(COLOURS)
TEMPLATES = ("a {} thing", "{}")
RNG = np.random.default_rng(0)


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    """Run the command in this process; return what it wrote, one dict a result file."""
    monkeypatch.setattr(adapter, "load", lambda path: colour_bundle())
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("results").mkdir()

    def call(*args, model="runs/colours", amp=()):
        given = ["--model", str(model)] if model else []
        adapter.run(["eval", *given, "--num_workers", "0", "--quiet", "--output", OUTPUT, *amp, *map(str, args)])
        return [json.loads(path.read_text()) for path in sorted((tmp_path / "results").iterdir())]

    return call


OUTPUT = "results/{dataset}_{pretrained}_{model}_{language}_{task}.json"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """CLIP_benchmark's layout, which our reader reads too: noisy colours, with two captions each."""
    root = tmp_path_factory.mktemp("shards")
    for split, num in (("train", 120), ("test", 150)):
        folder = root / split
        folder.mkdir()
        labels = RNG.choice(len(NAMES), num, p=(0.4, 0.2, 0.1, 0.1, 0.1, 0.1))
        members = []
        for index, label in enumerate(labels):
            # No two pictures are alike: on ties the two would differ, since ours count them against the model.
            colour = 0.4 * np.array(COLOURS[NAMES[label]]) + 0.6 * RNG.uniform(0, 255, 3)
            captions = [" ".join(str(int(1000 * v)) for v in colour + RNG.uniform(0, 25, 3)) for _ in range(2)]
            key = f"s{index:04d}"
            members += [(f"{key}.png", picture(colour)), (f"{key}.cls", str(label).encode())]
            members += [(f"{key}.txt", "\n".join(captions).encode())]
            members += [(f"{key}.json", json.dumps({"captions": captions}).encode())]
        write_tar(folder / "0.tar", members)
        (folder / "nshards.txt").write_text("1")
        (folder / "classnames.txt").write_text("\n".join(NAMES))
    (root / "classnames.txt").write_text("\n".join(NAMES))
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(t.replace("{}", "{c}") for t in TEMPLATES))
    return root


def captioned(shards, root):
    """The same samples as a retrieval dataset."""
    root.mkdir()
    (root / "test").symlink_to(shards / "test")
    (root / "dataset_type.txt").write_text("retrieval")
    return root


def agree(found, own, names):
    for theirs, ours in names.items():
        assert 100 * found[theirs] == pytest.approx(own[ours], abs=1e-4), theirs


def test_zero_shot_agrees(benchmark, shards):
    [result] = benchmark("--dataset", "wds/colours", "--dataset_root", shards)
    own = zero_shot(colour_bundle(), open_source(str(shards / "test" / "0.tar")), device="cpu", templates=TEMPLATES)
    assert 30 < own["acc1"] < own["acc5"] < 100
    agree(result["metrics"], own, {name: name for name in ("acc1", "acc5", "mean_per_class_recall")})
    assert result["model"] == "runs/colours" and result["task"] == "zeroshot_classification"
    assert result["pretrained"].startswith("sha256-")


def test_more_workers_than_shards(benchmark, shards):
    [one, two] = [benchmark("--dataset", "wds/colours", "--dataset_root", shards, "--num_workers", n) for n in (0, 2)]
    assert one == two


def test_workers_need_not_be_forked(shards):
    """The dataset can be pickled, as it has to be for workers that are not copies of this process."""
    adapter.mended_cli()
    builder = importlib.import_module("clip_benchmark.datasets.builder")
    dataset = builder.build_wds_dataset("colours", bundle().preprocess, data_dir=str(shards))
    assert len(list(pickle.loads(pickle.dumps(dataset)))) == 150


@pytest.mark.parametrize("column", [None, "txt"])  # a list in KEY.json, lines in KEY.txt
def test_retrieval_agrees(benchmark, shards, tmp_path, column):
    given = ("--dataset", "wds/colours", "--task", "zeroshot_retrieval", "--recall_k", 1, 5, 10)
    [result] = benchmark(*given, "--dataset_root", captioned(shards, tmp_path / "data"))
    source = open_source(str(shards / "test" / "0.tar"), caption_column=column)
    own = retrieval(colour_bundle(), source, device="cpu", captions="all")
    assert 10 < own["image_to_text_r1"] < 90 and 10 < own["text_to_image_r1"] < 90
    ways = {"text_retrieval": "image_to_text", "image_retrieval": "text_to_image"}
    agree(result["metrics"], own, {f"{a}_recall@{k}": f"{b}_r{k}" for a, b in ways.items() for k in (1, 5, 10)})


def test_flickr8k_files(benchmark, tmp_path):
    root = tmp_path / "flickr"
    root.mkdir()
    colours = RNG.integers(1, 255, (30, 3))
    lines = ["image,caption"]
    for index, colour in enumerate(colours):
        (root / f"{index}.jpg").write_bytes(picture(colour, "JPEG"))
        lines += [f"{index}.jpg,{' '.join(map(str, colour + n))}" for n in range(5)]
    (root / "flickr8k_test_karpathy.txt").write_text("\n".join(lines))
    [result] = benchmark("--dataset", "flickr8k", "--dataset_root", root, "--recall_k", 1, 29)
    assert result["task"] == "zeroshot_retrieval"
    assert result["metrics"]["image_retrieval_recall@1"] > 0.5 > 1 / 30


@pytest.mark.parametrize("val", [(), ("--val_split", "train")])
def test_linear_probe_without_cuda(benchmark, shards, tmp_path, monkeypatch, val):
    """Theirs is trained by AdamW, ours by L-BFGS to the optimum: the features and the scoring are what can agree."""
    adapter.mended_cli()  # first: the module takes `accuracy` as it finds it
    probe = importlib.import_module("clip_benchmark.metrics.linear_probe")
    inferred, infer = [], probe.infer
    monkeypatch.setattr(probe, "infer", lambda *a: inferred.append(infer(*a)) or inferred[-1])
    given = ("--dataset", "wds/colours", "--dataset_root", shards, "--task", "linear_probe", "--batch_size", 16)
    [result] = benchmark(*given, *val, "--fewshot_epochs", 10, "--feature_root", tmp_path / "features")
    metrics, _ = classification_metrics(*inferred[-1])
    agree(result["metrics"], metrics, {f"lp_{n}": n for n in ("acc1", "acc5", "mean_per_class_recall")})
    assert metrics["acc1"] > 1.5 * 40  # the commonest class is 40 %

    [kept] = (tmp_path / "features").iterdir()
    ours = []
    for split in ("train", "test"):
        source = open_source(str(shards / split / "0.tar"))
        features = embed_images(bundle().model, source, bundle().preprocess, device="cpu").features
        torch.testing.assert_close(torch.load(kept / f"features_{split}.pt"), features)
        labels = torch.tensor([source.label(index) for index in range(len(source))])
        assert torch.equal(torch.load(kept / f"targets_{split}.pt"), labels)
        ours += [features, labels]
    assert linear_probe(checked_input(*ours))["acc1"] == pytest.approx(metrics["acc1"], abs=10)


def test_features_are_not_kept_unasked(benchmark, shards, tmp_path):
    given = ("--dataset", "wds/colours", "--dataset_root", shards, "--task", "linear_probe", "--fewshot_epochs", 1)
    benchmark(*given)
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_sugar_crepe(benchmark, tmp_path):
    (tmp_path / "val2017").mkdir()
    pairs = [("red", "blue"), ("red", "white"), ("blue", "yellow"), ("cyan", "green")]
    wrong = [("green", "red")]
    entries = {}
    for index, (name, other) in enumerate(pairs + wrong):
        shown = other if (name, other) in wrong else name
        (tmp_path / "val2017" / f"{index}.png").write_bytes(picture(COLOURS[shown]))
        entries[str(3 * index)] = {"filename": f"{index}.png", "caption": name, "negative_caption": other}
    (tmp_path / "swap_obj.json").write_text(json.dumps(entries))
    [result] = benchmark("--dataset", "sugar_crepe/swap_obj", "--dataset_root", tmp_path)
    assert result["task"] == "image_caption_selection"
    assert result["metrics"]["text_acc"] == pytest.approx(4 / 5)
    own = compositional(colour_bundle(), tmp_path / "swap_obj.json", device="cpu", image_root=tmp_path / "val2017")
    agree(result["metrics"], own, {"text_acc": "acc1"})


def test_winoground(benchmark, monkeypatch):
    import datasets

    row = {f"image_{i}": Image.open(io.BytesIO(picture(COLOURS[name]))) for i, name in enumerate(("red", "blue"))}
    rows = [row | {"caption_0": "red", "caption_1": "blue"}, row | {"caption_0": "red", "caption_1": "yellow"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: {"test": rows})
    [result] = benchmark("--dataset", "winoground")
    # For yellow, halfway to red, the red picture is nearer than the blue one: the image score fails, not the text's.
    assert result["metrics"] == {"image_acc": 0.5, "text_acc": 0.5, "acc": 0.5}


@pytest.fixture
def run_folder(tmp_path):
    return random_run(tmp_path / "runs" / "mine")


def test_mnist_files_and_a_real_model(shared_data, benchmark, monkeypatch, run_folder, tmp_path):
    raw = tmp_path / "MNIST" / "raw"  # torchvision's layout
    raw.mkdir(parents=True)
    for packed in (shared_data / "mnist").iterdir():
        header, item = (16, 784) if "images" in packed.name else (8, 1)
        with gzip.open(packed) as file:
            start, kept = file.read(header), file.read(200 * item)
        (raw / packed.stem).write_bytes(start[:4] + (200).to_bytes(4, "big") + start[8:] + kept)
    monkeypatch.setattr(adapter, "load", contrastive.load)
    given = ("--dataset", "mnist", "--dataset_root", tmp_path, "--dump_classnames", "--dump_templates")
    [result] = benchmark(*given, model=run_folder)
    assert result["model"] == str(run_folder)
    source = Labelled(torchvision.datasets.MNIST(tmp_path, train=False), result["classnames"])
    templates = [template.replace("{c}", "{}") for template in result["templates"]]
    own = zero_shot(contrastive.load(run_folder), source, device="cpu", templates=templates)
    assert own["num_images"] == 200
    agree(result["metrics"], own, {name: name for name in ("acc1", "acc5", "mean_per_class_recall")})


def test_cifar10_files(benchmark, monkeypatch, tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    labels = [number % 10 for number in range(40)]
    data = RNG.integers(0, 256, (40, 3072), dtype=np.uint8)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": labels}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    cifar10 = torchvision.datasets.CIFAR10  # knows the sums of the real files only
    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(cifar10, attribute, [[name, None] for name, _ in getattr(cifar10, attribute)])
    monkeypatch.setattr(cifar10, "meta", cifar10.meta | {"md5": None})
    [result] = benchmark("--dataset", "cifar10", "--dataset_root", tmp_path, "--dump_templates")
    templates = [template.replace("{c}", "{}") for template in result["templates"]]
    own = zero_shot(colour_bundle(), Labelled(cifar10(tmp_path), names), device="cpu", templates=templates)
    agree(result["metrics"], own, {name: name for name in ("acc1", "acc5", "mean_per_class_recall")})


def test_a_changed_model_has_another_name(benchmark, monkeypatch, run_folder, shards):
    """Its result is not skipped as existing, and the old features are not found."""
    monkeypatch.setattr(adapter, "load", contrastive.load)
    given = ("--dataset", "wds/colours", "--dataset_root", shards, "--skip_existing")
    assert len(benchmark(*given, model=run_folder)) == len(benchmark(*given, model=run_folder)) == 1
    shutil.rmtree(run_folder)
    random_run(run_folder)
    first, second = benchmark(*given, model=run_folder)
    assert first["pretrained"] != second["pretrained"] and first["model"] == second["model"]


def test_many_models_and_the_table(benchmark, monkeypatch, shards, tmp_path):
    models = {"runs/good": colour_bundle(), "../other/": colour_bundle(model=ColourModel(collapsed=True))}
    monkeypatch.setattr(adapter, "load", models.get)
    (tmp_path / "models.txt").write_text("\n".join(models))
    results = benchmark(
        "--dataset", "wds/colours", "--dataset_root", shards, "--pretrained_model", "models.txt", model=None
    )
    assert {result["model"] for result in results} == models.keys()
    adapter.run(["build", "results"])
    assert (tmp_path / "benchmark.csv").read_text().count("runs/good") == 2  # as model and in its full name


def test_float32_unless_asked(benchmark, shards, monkeypatch):
    seen = []
    encode = ColourModel.encode_image
    monkeypatch.setattr(
        ColourModel, "encode_image", lambda *a: seen.append(torch.is_autocast_enabled("cpu")) or encode(*a)
    )
    for amp in ((), ("--amp",)):
        benchmark("--dataset", "wds/colours", "--dataset_root", shards, amp=amp)
    assert not any(seen[: len(seen) // 2]) and all(seen[len(seen) // 2 :])


def test_open_clip_models_are_left_as_they_are(benchmark, monkeypatch, shards):
    models = importlib.import_module("clip_benchmark.models")
    given = []

    def load(**options):
        given.append((options["model_name"], options["pretrained"]))
        return ColourModel(), bundle().preprocess, tokenizer

    monkeypatch.setitem(models.TYPE2FUNC, "open_clip", load)
    more = (
        "--dataset",
        "wds/colours",
        "--dataset_root",
        shards,
        "--model_type",
        "open_clip",
        "--pretrained",
        "laion2b",
    )
    benchmark(*more, model="ViT-B-32")
    assert given == [("ViT-B-32", "laion2b")]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "say what to do: eval or build"),
        (("eval",), "give a model: --model PATH"),
        (("eval", "--model", "nowhere"), "no model at nowhere"),
        (("eval", "--model", "m", "--task", "sing"), "invalid choice: 'sing'.*See .* --help"),
        (
            ("eval", "--model", "m", "--pretrained", "openai"),
            "--pretrained has no effect: --model PATH has its",
        ),
        (("eval", "--model", "m", "--task", "captioning"), "needs a model that writes text"),
        (("eval", "--model", "m", "--dataset", "cifra10"), "--dataset cifra10 cannot be read from root: Unsupported"),
        (("eval", "--model", "m", "--dataset", "wds/x", "--dataset_root", "no"), "wds/x .*no/test/nshards.txt"),
    ],
)
def test_bad_input_is_one_line(benchmark, monkeypatch, args, message):
    if "nowhere" in args:
        monkeypatch.setattr(adapter, "load", contrastive.load)
    with pytest.raises(UserError, match=message) as caught:
        adapter.run(list(args))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("task", ["zeroshot_classification", "zeroshot_retrieval"])
def test_a_model_without_a_text_tower(benchmark, monkeypatch, shards, tmp_path, task):
    monkeypatch.setattr(adapter, "load", lambda path: colour_bundle(tokenizer=None))
    given = ("--dataset", "wds/colours", "--dataset_root")
    root = captioned(shards, tmp_path / "data") if task == "zeroshot_retrieval" else shards
    with pytest.raises(UserError, match="runs/colours has no text tower; .* only linear_probe"):
        benchmark(*given, root, "--task", task)
    assert not list((tmp_path / "results").iterdir())
    [result] = benchmark(*given, shards, "--task", "linear_probe", "--fewshot_epochs", 1)
    assert result["metrics"]["lp_acc1"] > 0

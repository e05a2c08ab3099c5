"""Suites: read strictly, one embedding pass, never old features, one failure does not end the others."""

import json
from dataclasses import replace

import pytest
import torch
from colour_model import COLOURS, ColourSource
from PIL import Image
from small_model import save_small_model

import contrastive
from contrastive.data.sources.derived import Renamed
from contrastive.errors import UserError
from contrastive.evaluate import evaluated_model as evaluated_module
from contrastive.evaluate.classification import zero_shot
from contrastive.evaluate.comparison import ModelEntry
from contrastive.evaluate.embedding_store import StoreOptions, claim_store, store_config
from contrastive.evaluate.embedding_writing import fill_store, model_identity
from contrastive.evaluate.evaluated_model import EvaluatedModel
from contrastive.evaluate.retrieval import retrieval
from contrastive.evaluate.suite import Suite, read_suite, run_suite, task_from
from contrastive.interop.bundle import Bundle
from contrastive.models import ClassifierConfig, ImageClassifier

NAMES = list(COLOURS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("suite") / "final")


@pytest.fixture
def bundle(folder):
    return contrastive.load(folder)


@pytest.fixture
def data(monkeypatch):
    """Sources by name, in place of those that open_source finds."""

    def source(number, **options):
        made = ColourSource([NAMES[i % 6] for i in range(number)], **options)
        made.fingerprint = made.name = f"{number} colours"
        return made

    sources = {
        "train": source(30),
        "test": source(13, unreadable=(4,)),
        "unlabelled": source(7, labels=None, class_names=None),
        "other": source(8, class_names=("a", "b", "c", "d", "e", "f")),
        "nameless": source(6, class_names=None),
        "silent": source(9, texts=[()] * 9),
        "broken": source(3, unreadable=(0, 1, 2)),
    }

    def open_source(spec):
        if spec not in sources:
            raise UserError(f"unknown data source '{spec}'")
        return sources[spec]

    monkeypatch.setattr(evaluated_module, "open_source", open_source)
    return sources


def subject_of(bundle, cache, **options):
    return EvaluatedModel("small", bundle, cache, device="cpu", **options)


def run(subject, *tasks):
    """The results of tasks given as in a suite's file."""
    suite = Suite("suite", tuple(task_from(values, "here") for values in tasks))
    return run_suite([ModelEntry("small", "p")], [lambda: subject], suite).results


ZERO_SHOT = {"task": "zero_shot", "data": "test"}
KNN = {"task": "knn", "train": "train", "test": "test", "k": [3, 5]}


def test_the_same_figures_as_the_evaluators_alone(tmp_path, bundle, data):
    tasks = (
        ZERO_SHOT,
        {"task": "retrieval", "data": "train"},
        {"task": "retrieval", "data": "train", "captions": "first"},
    )
    texts = [(f"a {NAMES[i % 6]} thing", f"{i} things")[: 1 + i % 2] for i in range(30)]
    data["train"].texts = texts[:7] + [(" ",)] + texts[8:]
    found = run(subject_of(bundle, tmp_path), *tasks)
    alone = zero_shot(bundle, data["test"], device="cpu")
    for name in ("acc1", "acc5", "mean_per_class_recall"):
        assert found[0].outcome.figures[name].value == pytest.approx(alone[name])
    assert found[0].outcome.figures["acc1"].chance == pytest.approx(100 / 6)
    assert found[0].outcome.figures["acc5"].chance == pytest.approx(500 / 6)
    assert found[0].outcome.details["skipped"] == {"unreadable_image": 1}
    for result, captions in zip(found[1:], ("all", "first"), strict=True):
        alone = retrieval(bundle, data["train"], device="cpu", captions=captions)
        figures, details = result.outcome.figures, result.outcome.details
        assert {name: figure.value for name, figure in figures.items()} == pytest.approx(
            {name: alone[name] for name in figures}
        )
        assert {name: figure.chance for name, figure in figures.items() if figure.chance} == pytest.approx(
            alone["chance"]
        )
        for name in ("num_images", "num_texts", "duplicate_texts"):
            assert details[name] == alone[name]
        assert details["skipped"]["missing_caption"] == alone["skipped"]["missing_caption"] == 1


def test_every_share_has_an_interval_around_it(tmp_path, bundle, data):
    tasks = (ZERO_SHOT, {"task": "retrieval", "data": "train"}, KNN)
    for result in run(subject_of(bundle, tmp_path), *tasks):
        assert result.outcome.figures.keys() >= set(result.outcome.headline)
        assert not any(name in result.outcome.details for name in ("predicted", "hits", "confusion"))
        for name, figure in result.outcome.figures.items():
            low, high = figure.interval
            assert low <= figure.value <= high, name
            assert name.endswith("median_rank") or (low >= 0 and high <= 100)


def test_shots_that_a_class_has_not_are_left_out(tmp_path, bundle, data):
    task = {"task": "few_shot", "train": "train", "test": "test", "shots": [1, 5, 25]}
    (result,) = run(subject_of(bundle, tmp_path), task)
    assert result.outcome.headline == ("shot1_acc1", "shot5_acc1")
    assert result.outcome.details["left_out_shots"] == [25]
    assert result.outcome.figures["mean_per_class_recall"].interval is None


def test_a_head_of_scikit_learn(tmp_path, bundle, data):
    task = {"task": "head", "head": "random_forest", "train": "train", "test": "test", "options": {"n_estimators": 7}}
    (result,) = run(subject_of(bundle, tmp_path), task)
    assert result.outcome.details["options"] == {"n_estimators": 7}
    assert result.outcome.figures["acc1"].value > 50  # plain colours


def test_the_compositional_choice(tmp_path, bundle):
    for name in ("red", "blue"):
        Image.new("RGB", (20, 20), name).save(tmp_path / f"{name}.png")
    choices = {
        str(i): {"filename": f"{name}.png", "caption": f"a {name} thing", "negative_caption": "a thing"}
        for i, name in enumerate(("red", "blue"))
    }
    (tmp_path / "choices.json").write_text(json.dumps(choices))
    task = {"task": "compositional", "data": str(tmp_path / "choices.json")}
    (result,) = run(subject_of(bundle, tmp_path), task)
    assert result.outcome.figures.keys() == {"acc1"} and result.outcome.figures["acc1"].chance == 50
    assert "hits" not in result.outcome.details


def test_images_are_embedded_once_for_all_tasks(tmp_path, bundle, data, embedded):
    probe = {**KNN, "task": "linear_probe"}
    probe.pop("k")
    results = run(subject_of(bundle, tmp_path), ZERO_SHOT, KNN, probe, {"task": "retrieval", "data": "train"})
    assert not any(result.error for result in results)
    assert sum(embedded) == 30 + 12
    run(subject_of(bundle, tmp_path), ZERO_SHOT, KNN)
    assert sum(embedded) == 30 + 12  # nor by the next evaluation of the same model


def test_a_changed_model_is_never_scored_with_old_features(tmp_path, bundle, data, embedded):
    run(subject_of(bundle, tmp_path), ZERO_SHOT)
    with torch.no_grad():
        bundle.model.image_tower.projection.weight[0, 0] += 1e-6
    embedded.clear()
    (result,) = run(subject_of(bundle, tmp_path), ZERO_SHOT)
    assert sum(embedded) == 12 and len(list(tmp_path.iterdir())) == 2 and not result.error


def test_both_spaces_and_limits_are_kept_apart(tmp_path, bundle, data):
    subject = subject_of(bundle, tmp_path)
    assert subject.embeddings("test").features.shape == (12, 32)
    assert subject.embeddings("test", "pooled").features.shape == (12, 48)
    limited = subject_of(bundle, tmp_path, limit=5).embeddings("train")
    assert limited.features.shape == (5, 32) and len(list(tmp_path.iterdir())) == 3


def store_of(folder, bundle, source, parts=("images", "texts"), **options):
    store = claim_store(folder, store_config(model_identity(bundle), source, StoreOptions(**options)))
    fill_store(store, bundle, source, parts, device="cpu")
    return str(folder)


def test_a_folder_of_embeddings_stands_for_the_data(tmp_path, bundle, data, embedded):
    train = store_of(tmp_path / "train", bundle, data["train"])
    test = store_of(tmp_path / "test", bundle, data["test"])
    tasks = ({**ZERO_SHOT, "data": test}, {**KNN, "train": train, "test": test}, {"task": "retrieval", "data": train})
    embedded.clear()
    given = run(subject_of(bundle, tmp_path / "cache"), *tasks)
    assert embedded == [] and not (tmp_path / "cache").exists()
    made = run(subject_of(bundle, tmp_path / "cache"), ZERO_SHOT, KNN, {"task": "retrieval", "data": "train"})
    assert [result.outcome.figures for result in given] == [result.outcome.figures for result in made]
    some = subject_of(bundle, tmp_path / "cache", limit=9).embeddings(train, texts=True)
    assert len(some.features) == len(some.texts.texts) == 9
    assert all(NAMES[index % 6] in some.texts.texts[row] for row, index in enumerate(some.index.tolist()))


def test_a_folder_of_another_models_embeddings_is_refused(tmp_path, bundle, data):
    folder = store_of(tmp_path / "store", bundle, data["test"])
    pooled = store_of(tmp_path / "pooled", bundle, data["test"], ("images",), space="pooled")
    with torch.no_grad():
        bundle.model.image_tower.projection.weight[0, 0] += 1e-6
    (result,) = run(subject_of(bundle, tmp_path / "cache"), {**ZERO_SHOT, "data": folder})
    assert "holds embeddings of another model" in result.error and "\n" not in result.error
    (result,) = run(subject_of(contrastive.load(bundle.path), tmp_path / "cache"), {**ZERO_SHOT, "data": pooled})
    assert result.error == f"{pooled} holds pooled features; the task uses projected ones (space: pooled)"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"task": "zero_shot", "data": "unlabelled"}, "no class names"),
        ({"task": "zero_shot", "data": "broken"}, "none of its images could be read"),
        ({"task": "zero_shot", "data": "nowhere"}, "unknown data source 'nowhere'"),
        ({"task": "retrieval", "data": "silent"}, "9 colours has no captions"),
        ({**KNN, "test": "unlabelled"}, "7 colours has no class labels; kNN needs labelled data"),
        (
            {**KNN, "test": "nameless"},
            "30 colours and 6 colours do not both name their classes (classnames.txt)",
        ),
        ({**KNN, "test": "other"}, "30 colours and 8 colours have different classes; kNN needs the same"),
        ({"task": "classification", "data": "test"}, "small has no classifier's head"),
    ],
)
def test_a_task_that_cannot_be_is_one_line_and_the_others_go_on(tmp_path, bundle, data, task, message):
    failed, done = run(subject_of(bundle, tmp_path), task, ZERO_SHOT)
    assert failed.outcome is None and message in failed.error and "\n" not in failed.error
    assert done.error is None and done.outcome.figures


def test_classes_in_another_order_are_joined_by_name(tmp_path, bundle, data):
    asked = {**ZERO_SHOT, "templates": "plain"}
    before, zero = run(subject_of(bundle, tmp_path / "a"), KNN, asked)
    data["test"] = Renamed(data["test"], tuple(name.upper() for name in NAMES[::-1]), (5, 4, 3, 2, 1, 0))
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    named = {**asked, "classes": str(tmp_path / "names.txt")}
    after, again = run(subject_of(bundle, tmp_path / "b"), KNN, named)
    for name, figure in before.outcome.figures.items():
        assert after.outcome.figures[name].value == pytest.approx(figure.value)
    for name, figure in zero.outcome.figures.items():
        assert again.outcome.figures[name].value == pytest.approx(figure.value)


def test_without_a_text_tower_probes_work(tmp_path, bundle, data):
    subject = subject_of(replace(bundle, tokenizer=None), tmp_path)
    zero, found, probe = run(subject, ZERO_SHOT, {"task": "retrieval", "data": "train"}, KNN)
    assert zero.error.endswith("has no text tower, which zero-shot classification needs")
    assert found.error.endswith("has no text tower, which retrieval needs")
    assert probe.outcome.figures["acc1"].value >= 0


def test_a_classifier_is_scored_by_its_head_and_by_probes(tmp_path, bundle, data):
    image = replace(bundle.config.image, projection=False)
    config = ClassifierConfig(image=image, num_classes=6)
    classifier = Bundle(ImageClassifier(config).eval(), bundle.preprocess, None, config, bundle.path)
    with torch.no_grad():
        classifier.model.head.bias[2] = 1  # all is blue
    own, probe = run(subject_of(classifier, tmp_path), {"task": "classification", "data": "test"}, KNN)
    assert own.outcome.figures["acc1"].value == pytest.approx(100 * 2 / 12)
    assert own.outcome.figures["mean_per_class_recall"].value == pytest.approx(100 / 6)
    assert probe.error is None and "num_train" in probe.outcome.details


def test_a_classifier_of_other_classes_is_refused(tmp_path, bundle, data):
    config = ClassifierConfig(image=replace(bundle.config.image, projection=False), num_classes=6)
    model = ImageClassifier(config).eval()
    classifier = Bundle(model, bundle.preprocess, None, config, bundle.path, class_names=tuple(NAMES[:5]) + ("grey",))
    tasks = ({"task": "classification", "data": name} for name in ("test", "other", "unlabelled"))
    named, other, none = run(subject_of(classifier, tmp_path), *tasks)
    assert named.error == (
        f"class 5 is '{NAMES[5]}' in 13 colours, but 'grey' in small; their labels mean different things"
    )
    assert other.error.startswith(f"class 0 is 'a' in 8 colours, but '{NAMES[0]}' in small")
    assert "has no class labels" in none.error


def test_an_unforeseen_fault_is_a_line_too(tmp_path, bundle, data, monkeypatch):
    def fail(*args, **options):
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr("contrastive.evaluate.feature_probes.Knn.fit", fail)
    failed, done = run(subject_of(bundle, tmp_path), KNN, ZERO_SHOT)
    assert failed.error == "ZeroDivisionError: by nothing" and done.outcome


def test_a_model_that_cannot_be_loaded_does_not_end_the_others(tmp_path, bundle, data):
    def load():
        raise UserError("no whole model")

    entries = [ModelEntry("bad", "b"), ModelEntry("small", "p")]
    suite = Suite("suite", (task_from(ZERO_SHOT, "here"), task_from({"task": "retrieval", "data": "train"}, "here")))
    found = run_suite(entries, [load, lambda: subject_of(bundle, tmp_path)], suite)
    assert found.failures == ["bad, all tasks: no whole model"]
    assert entries[0].key is None and len(entries[1].key) == 64
    assert [bool(result.outcome) for result in found.results] == [False, False, True, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: [{task: zero_shoot, data: a}]", "task 1: unknown task 'zero_shoot'. Did you mean 'zero_shot'?"),
        ("tasks: [{task: zero_shot, dat: a}]", "task 1: unknown key 'dat'. Did you mean 'data'?"),
        ("tasks: [{task: zero_shot}]", "task 1: 'data' is missing"),
        ("tasks: [{task: zero_shot, data: 3}]", "data is 3, expected str"),
        ("tasks: [{task: knn, train: a, test: b, k: 5}]", "k is 5, expected a list of int"),
        ("tasks: [{task: knn, train: a, test: b, space: pool}]", "space is 'pool', expected one of projected, pooled"),
        ("tasks: [{data: a}]", "task 1: expected {task: NAME, ...}, one of zero_shot"),
        ("tasks: [{task: zero_shot, data: a}, {task: zero_shot, data: a}]", "task 2 is task 1 again"),
        ("tasks: [{task: zero_shot, data: a, templates: phto}]", "Did you mean 'photo'"),
        ("tasks: [{task: zero_shot, data: a, classes: cifar11}]", "task 1: classes cifar11: neither a file nor a set"),
        ("tasks: [{task: compositional, data: none.json}]", "task 1: no file none.json"),
        ("tasks: [{task: head, head: randm_forest, train: a, test: b}]", "Did you mean 'random_forest'"),
        ("tasks: [{task: head, head: svm, train: a, test: b, options: {c: 1}}]", "head svm has no option 'c'"),
        ("tasks: [{task: knn, train: a, test: b, k: [0, 5]}]", "task 1: kNN needs positive numbers of neighbours"),
        ("tasks: [{task: knn, train: a, test: b, temperature: 0}]", "the temperature is 0.0; it has to be positive"),
        ("tasks: [{task: few_shot, train: a, test: b, shots: []}]", "needs positive numbers of shots, got none"),
        ("tasks: [{task: few_shot, train: a, test: b, seeds: 0}]", "few-shot needs at least one seed, got 0"),
        ("tasks: []", "expected `tasks:` and a list"),
        ("task: [{task: zero_shot, data: a}]", "expected `tasks:`"),
        ("tasks: [{task: zero_shot, data: a}]\nlimits: 3", "unknown key 'limits'"),
        ("tasks: [{", "not valid YAML"),
    ],
)
def test_a_wrong_suite_is_one_line(tmp_path, text, message):
    (tmp_path / "suite.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_suite(tmp_path / "suite.yaml")
    assert message in str(caught.value) and "suite.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_values_of_a_suite_have_their_types(tmp_path):
    (tmp_path / "s.yaml").write_text("tasks: [{task: knn, train: a, test: b, k: [1, 2], temperature: 1e-1}]")
    (task,) = read_suite(tmp_path / "s.yaml").tasks
    assert task.k == (1, 2) and task.temperature == 0.1

"""scripts/evaluate.py on real, untrained models and real sources."""

import json

import pytest
from small_model import SCRIPTS, save_small_model, script_caller

from contrastive.evaluate.suite import read_suite

SUITES = SCRIPTS.parent / "configs" / "suites"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("suite") / "final")


@pytest.fixture
def evaluate(monkeypatch, capfd):
    return script_caller("evaluate.py", monkeypatch, capfd)


SMALL = """
tasks:
  - {task: zero_shot, data: digits:test}
  - {task: retrieval, data: scenes:val}
  - {task: knn, train: digits:train, test: digits:test, k: [5, 20]}
"""


@pytest.fixture
def suite_file(tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL)
    return tmp_path / "small.yaml"


def test_two_models_in_one_table(evaluate, folder, suite_file, tmp_path):
    other = save_small_model(tmp_path / "other" / "final", seed=3)
    call = (
        folder.parent,
        other.parent,
        "--suite",
        suite_file,
        "--limit",
        200,
        "--device",
        "cpu",
        "--out",
        tmp_path / "o",
    )
    done = evaluate(*call, "--cache", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    for shown in (folder.parent.name, "other", "zero-shot", "kNN", "digits:train →", "acc@1", "10.0 %"):
        assert shown in done.stdout
    result = json.loads((tmp_path / "o" / "evaluation.json").read_text())
    assert [model["name"] for model in result["models"]] == [folder.parent.name, "other"]
    assert len(result["results"]) == 6 and len({model["key"] for model in result["models"]}) == 2
    figure = result["results"][0]["figures"]["acc1"]
    assert figure["low"] <= figure["value"] <= figure["high"] and figure["chance"] == pytest.approx(10)
    assert len(list((tmp_path / "cache").iterdir())) == 2 * 3
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == [
        f"evaluation.{e}" for e in ("html", "json", "md")
    ]

    alone = evaluate(folder.parent, "--suite", suite_file, "--limit", 200, "--device", "cpu", "--out", tmp_path / "o")
    assert alone.returncode == 2 and "is the evaluation of" in alone.stderr and "choose another --out" in alone.stderr
    assert json.loads((tmp_path / "o" / "evaluation.json").read_text()) == result


def test_the_small_suite_needs_nothing_and_works(evaluate, folder, tmp_path):
    call = (folder, "--suite", SUITES / "small.yaml", "--limit", 300, "--device", "cpu", "--out", tmp_path / "o")
    done = evaluate(*call, "--cache", tmp_path / "c", "--json")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "o" / "evaluation.json").read_text())
    assert json.loads(done.stdout) == written
    assert {result["model"] for result in written["results"]} == {folder.parent.name}
    assert all(result["figures"] for result in written["results"])
    accuracy = {
        task["title"]: result["figures"]["acc1"]["value"]
        for task, result in zip(written["tasks"], written["results"], strict=True)
        if "acc1" in result["figures"]
    }
    assert accuracy["linear probe"] > 60 and accuracy["kNN"] > 60  # even of random features


@pytest.mark.parametrize("file", sorted(SUITES.glob("*.yaml")), ids=lambda file: file.name)
def test_every_suite_can_be_read(file):
    assert read_suite(file).tasks


def test_one_task_by_flags_and_without_a_cache(evaluate, folder, tmp_path):
    flags = (
        "--train",
        "digits:train",
        "--data",
        "digits:test",
        "--option",
        "k=[7, 9]",
        "--no-cache",
        "--device",
        "cpu",
    )
    done = evaluate(folder, "--task", "knn", *flags, "--out", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "o" / "evaluation.json").read_text())["results"]
    assert {"k7_acc1", "k9_acc1", "acc1"} <= result["figures"].keys()
    assert not (folder / "embeddings").exists() and not (tmp_path / "o" / ".embeddings").exists()


def test_a_failing_task_is_told_and_the_exit_status_says_so(evaluate, folder, tmp_path):
    (tmp_path / "s.yaml").write_text(SMALL.replace("digits:train", "scenes:val"))
    done = evaluate(folder, "--suite", tmp_path / "s.yaml", "--limit", 50, "--cache", tmp_path / "c", "--device", "cpu")
    assert done.returncode == 1
    assert "scenes:val has no class labels; kNN needs labelled data" in done.stdout.replace("\n", " ")
    written = folder / "evaluation" / "s"
    results = json.loads((written / "evaluation.json").read_text())["results"]
    assert [("error" in result) for result in results] == [False, False, True]
    assert "has no class labels" in (written / "evaluation.md").read_text()


def test_when_nothing_could_be_done_an_earlier_evaluation_stays(evaluate, folder, tmp_path):
    flags = ("--train", "digits:train", "--data", "digits:test", "--limit", 50, "--out", tmp_path / "o")
    knn = (folder, "--task", "knn", *flags, "--cache", tmp_path / "c", "--device", "cpu")
    assert evaluate(*knn, "--option", "k=[5]").returncode == 0
    before = (tmp_path / "o" / "evaluation.json").read_text()
    done = evaluate(*knn, "--option", "k=[51]")
    assert done.returncode == 2 and done.stdout == ""
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["digits", "digits", "evaluate.py"]
    assert done.stderr.endswith("k = 51 neighbours of a gallery of 50 images; give a k of at most 50\n")
    assert (tmp_path / "o" / "evaluation.json").read_text() == before

    (tmp_path / "s.yaml").write_text(SMALL)
    (tmp_path / "none").mkdir()
    (tmp_path / "other").mkdir()
    for runs, last in (
        ((tmp_path / "none",), "none, all tasks: no model at"),
        ((tmp_path / "none", tmp_path / "other"), "none of the 3 tasks could be done"),
    ):
        done = evaluate(*runs, "--suite", tmp_path / "s.yaml", "--out", tmp_path / "new")
        assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "new").exists()
        lines = done.stderr.splitlines()
        assert lines[-1].startswith(f"evaluate.py: error: {last}") and len(lines) == (1 if len(runs) == 1 else 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("RUN",), "give --suite FILE, or --task NAME with --data SPEC"),
        (("RUN", "--task", "kn", "--data", "digits"), "unknown task 'kn'. Did you mean 'knn'?"),
        (("RUN", "--task", "knn", "--data", "digits"), "--task knn: 'train' is missing; give --train SPEC"),
        (("RUN", "--task", "knn", "--train", "digits"), "--task knn: 'test' is missing; give --data SPEC"),
        (("RUN", "--task", "retrieval", "--data", "/no/data", "--device", "cpu"), "retrieval on /no/data: "),
        (("RUN", "--task", "zero_shot", "--data", "digits", "--option", "k"), "--option 'k': expected KEY=VALUE"),
        (("RUN", "--task", "zero_shot", "--data", "digits", "--option", "k=3"), "unknown key 'k'"),
        (("RUN", "--suite", "no.yaml"), "cannot read the suite no.yaml"),
        (("RUN", "--suite", "no.yaml", "--task", "knn"), "--suite names all tasks"),
        (("RUN", "RUN", "--task", "zero_shot", "--data", "digits"), "the same model is given twice"),
        (("/no/run", "--task", "zero_shot", "--data", "digits"), "no model at /no/run"),
        (("RUN", "--task", "zero_shot", "--data", "digits", "--out", __file__), "cannot write to"),
        (("RUN", "--tsk", "zero_shot"), "Did you mean 'task'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(evaluate, folder, arguments, message):
    before = sorted(folder.rglob("*"))
    done = evaluate(*(folder if argument == "RUN" else argument for argument in arguments))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("evaluate.py: error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert sorted(folder.rglob("*")) == before

"""The table of many models on many tasks: terminal, Markdown, JSON and page."""

import io
import json
import re
from dataclasses import replace

import pytest
from rich.console import Console
from test_report import Page

from contrastive.errors import UserError
from contrastive.evaluate.comparison import (
    Comparison,
    ModelEntry,
    TaskResult,
    claim_output,
    comparison_page,
    markdown,
    print_comparison,
    write_output,
)
from contrastive.evaluate.suite import task_from
from contrastive.evaluate.tasks import Figure, Outcome

EVIL = "</style><script>alert('x')</script> | `a` [red]b[/red]"

TASKS = [
    task_from(values, "here")
    for values in (
        {"task": "zero_shot", "data": "scenes:test"},
        {"task": "retrieval", "data": "scenes:val"},
        {"task": "knn", "train": "digits:train", "test": "digits:test", "space": "pooled"},
        {"task": "few_shot", "train": "digits:train", "test": "digits:test"},
    )
]


def share(value, chance):
    return Figure(value, (max(0.0, value - 2.5), min(100.0, value + 2.5)), chance)


def outcomes(shift):
    retrieval = {
        "image_to_text_r1": share(41.5 + shift, 0.5),
        "text_to_image_r1": share(38.25 + shift, 0.5),
        "text_to_image_r10": share(80.0 + shift, 5.0),
        "text_to_image_median_rank": Figure(3.0, (2.0, 4.0)),
    }
    shots = {f"shot{n}_acc1": share(30.0 + n + shift, 10.0) for n in (1, 5)}
    return [
        Outcome({"acc1": share(93.2 + shift, 1.5625), "acc5": share(99.0, 7.8125)}, ("acc1",), {"num_images": 2560}),
        Outcome(retrieval, ("image_to_text_r1", "text_to_image_r1"), {}),
        Outcome({"acc1": share(88.8 + shift, 10.0), "k20_acc1": share(88.8 + shift, 10.0)}, ("acc1",), {}),
        Outcome(shots, tuple(shots), {}),
    ]


def made(names=("sigmoid", "softmax"), failing=()):
    """A comparison of models by those names; `failing`: (model, task number) pairs."""
    results = []
    for place, name in enumerate(names):
        for task, outcome in enumerate(outcomes(-1.5 * place)):
            failed = (name, task) in failing
            error = f"{name} cannot" if failed else None
            results.append(TaskResult(name, task, None if failed else outcome, error, 1.25))
    entries = [ModelEntry(name, f"runs/{name}", "0" * 64) for name in names]
    return Comparison("small", TASKS, entries, results)


def printed(comparison, width):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    print_comparison(comparison, console)
    lines = console.file.getvalue().splitlines()
    assert max(len(line.rstrip()) for line in lines if not line.startswith("failed")) <= width
    return console.file.getvalue()


def test_a_limit_is_told():
    assert "At most" not in printed(made(), 120)
    limited = replace(made(), limit=1500)
    for text in (printed(limited, 120), markdown(limited)):
        assert "At most 1,500 images of each data set." in text.replace("\n", " ")


@pytest.mark.parametrize(("width", "models"), [(80, 1), (80, 2), (140, 1), (140, 4)])
def test_models_stand_side_by_side_where_they_fit(width, models):
    names = ["sigmoid", "softmax", "a third one", "fourth"][:models]
    text = printed(made(names), width)
    (line,) = [line for line in text.splitlines() if line.strip().startswith("zero-shot")]
    assert re.findall(r"\d+\.\d %", line) == ["1.6 %", *(f"{93.2 - 1.5 * n:.1f} %" for n in range(models))]
    for shown in ("scenes:test", "[90.7, 95.7]", "image → text R@1", "1-shot acc@1", "kNN", "before the", "95 %"):
        assert shown in text, shown
    assert "…" not in text


def test_models_stand_below_each_other_where_they_do_not_fit():
    names = [f"runs/model-number-{n}" for n in range(9)]
    text = printed(made(names), 80)
    assert all(name in text for name in names)
    rows = [line for line in text.splitlines() if "93.2 %" in line]
    assert len(rows) == 1 and "[90.7, 95.7]" in rows[0] and names[0] in rows[0]
    assert text.count("chance 1.6 %") == 1 and "kNN on digits:train → digits:test, before the projection" in text
    assert "…" not in text


def test_failures_are_lines_under_the_table():
    comparison = made(failing=[("softmax", 2), *(("sigmoid", n) for n in range(4))])
    text = printed(comparison, 80)
    assert comparison.failures == [
        "sigmoid, all tasks: sigmoid cannot",
        "softmax, kNN on digits:train → digits:test, before the projection: softmax cannot",
    ]
    assert all(f"failed: {line}" in text for line in comparison.failures)
    assert "kNN" in text and text.count("failed") >= 5 + 2  # no model has a figure of it, the task is told still


def test_markdown_is_one_table_with_every_model():
    text = markdown(made())
    rows = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    assert {len(row) for row in cells} == {7}
    assert cells[0] == ["task", "data", "features", "figure", "chance", "sigmoid", "softmax"]
    zero_shot = ["zero-shot", "scenes:test", "after the projection", "acc@1", "1.6 %"]
    assert cells[2] == [*zero_shot, "93.2 % [90.7, 95.7]", "91.7 % [89.2, 94.2]"]
    assert cells[5][:3] == ["kNN", "digits:train → digits:test", "before the projection"]


def test_the_page_has_a_bar_for_each_headline_figure():
    html = comparison_page(made())
    page = Page(html)
    assert not page.open, "every tag is closed"
    text = re.sub(r"\s+", " ", " | ".join(page.text))
    widths = [style for style in page.attributes("style") if "background" in style]
    assert len(widths) == 2 * 6  # six headline figures
    assert "width:93.20%;background:var(--c1)" in widths and "width:91.70%;background:var(--c2)" in widths
    assert "left:90.70%;width:5.00%" in page.attributes("style")  # the interval
    assert "left:1.56%" in page.attributes("style")  # chance
    for shown in ("acc@5", "text → image median rank", "5-shot acc@1", "before the projection", "k=20 acc@1"):
        assert shown in text
    assert not page.attributes("href") and not page.attributes("src")
    assert not re.findall(r"https?://|url\(|@import", html)


def test_text_of_the_user_is_text_everywhere(tmp_path):
    comparison = made([EVIL, "b"], failing=[(EVIL, 1)])
    html = comparison_page(comparison)
    assert "<script>" not in html and EVIL in Page(html).text
    assert EVIL.replace("\n", "") in printed(comparison, 400)
    rows = [line for line in markdown(comparison).splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {8}


def test_the_files_and_whose_folder_it_is(tmp_path):
    comparison = made(failing=[("softmax", 2)])
    claim_output(tmp_path / "out", comparison.models)
    write_output(tmp_path / "out", comparison)
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["suite"] == "small" and written["interval"]["level"] == 95
    assert written["tasks"][2]["features"] == "before the projection" and written["tasks"][2]["options"]["k"][0] == 10
    figure = written["results"][0]["figures"]["acc1"]
    assert figure == {"value": 93.2, "low": pytest.approx(90.7), "high": pytest.approx(95.7), "chance": 1.5625}
    assert written["results"][6] == {"model": "softmax", "task": 2, "seconds": 1.25, "error": "softmax cannot"}

    claim_output(tmp_path / "out", comparison.models)  # the same models again
    with pytest.raises(UserError, match="is the evaluation of runs/sigmoid, runs/softmax; choose another --out"):
        claim_output(tmp_path / "out", comparison.models[:1])
    (tmp_path / "out" / "evaluation.json").write_text('{"other": 1}')
    with pytest.raises(UserError, match="no evaluation of ours"):
        claim_output(tmp_path / "out", comparison.models)
    (tmp_path / "out" / "evaluation.json").unlink()
    with pytest.raises(UserError, match="evaluation.md is there without evaluation.json"):
        claim_output(tmp_path / "out", comparison.models)

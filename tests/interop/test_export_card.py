"""The model card of a run: what it was, what it scores, and nothing of where it was made."""

import json
import os
import re

import pytest
import yaml
from small_bundles import small_bundle

from contrastive.errors import UserError
from contrastive.files import write_folder
from contrastive.interop.bundle import save_model
from contrastive.interop.export import export
from contrastive.interop.run_record import STALE_SECONDS, RunRecord, public_name

CONFIG = {
    "run_folder": "/home/me/runs/cats",
    "init": None,
    "loss": {"name": "sigmoid", "duplicates": "positive", "init_bias": None},
    "optimizer": {"name": "adamw", "lr": 0.001, "weight_decay": 0.1},
    "schedule": {"decay": "cosine", "warmup_steps": 30},
    "train": {"steps": 90, "global_batch_size": 64, "precision": "bf16", "seed": 3, "ema_decay": 0.99},
    "data": {
        "train": "/home/me/data/cats/{00000..00031}.tar=2,/home/me/dogs.csv=1",
        "eval": ["/home/me/data/flowers:test"],
        "templates": "/home/me/prompts.txt",
        "augment": {"crop_scale": [0.9, 1.0], "flip": True, "color_jitter": [0.0, 0.0, 0.0, 0.0]},
    },
}


@pytest.fixture
def run(tmp_path):
    """A run folder with a final model, a checkpoint before it, and evaluations."""
    folder, bundle = tmp_path / "cats", small_bundle("siglip")
    weights, preprocess = bundle.model.state_dict(), bundle.preprocess.config

    def fill(to):
        save_model(to, weights, bundle.config, preprocess, bundle.tokenizer)
        (to / "state.json").write_text(json.dumps({"step": 60, "num_samples": 640}))

    write_folder(folder / "checkpoints" / "step-00000060", fill)
    write_folder(folder / "final", lambda to: save_model(to, weights, bundle.config, preprocess, bundle.tokenizer))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    rows = [
        {"kind": "eval", "step": 60, "zero_shot//home/me/data/flowers:test/acc1": 11.0},
        {"kind": "train", "step": 90, "loss": 1.0},
        {"kind": "eval", "step": 90, "zero_shot//home/me/data/flowers:test/acc1": 22.0, "retrieval/val/num_images": 5},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = {"data": "/home/me/birds:test", "acc1": 33.25, "chance": 10.0, "model": "/home/me/runs/cats"}
    write(folder / "zero_shot" / "birds" / "zero_shot.json", result)
    figure = {"value": 44.0, "low": 41.5, "high": 46.5, "chance": 2.0}
    results = [{"task": 0, "headline": ["image_to_text_r10"], "figures": {"image_to_text_r10": figure}}, {"task": 0}]
    tasks = [{"task": "retrieval", "data": "/home/me/pairs.csv"}]
    evaluation = {"models": [{"path": "/home/me/runs/cats"}], "limit": 500, "tasks": tasks, "results": results}
    write(folder / "evaluation" / "retrieval" / "evaluation.json", evaluation)
    return folder


def write(file, content):
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(content))


def cells(card):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line.startswith("|")]


def test_the_whole_card(run, tmp_path):
    export(run, "transformers", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1]) == {
        "library_name": "transformers",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["contrastive", "siglip", "vision"],
    }
    assert "/home" not in card and "/me/" not in card and str(tmp_path) not in card
    told = cells(card)
    for row in (
        ["trained on", "cats/{00000..00031}.tar=2,dogs.csv=1, 640 samples"],
        ["prompts of classes", "prompts.txt"],
        ["augmentation", "random crops of 0.9 to 1.0 of the area, mirrored"],
        ["loss", "sigmoid: duplicates positive"],
        ["optimizer", "adamw: lr 0.001, weight decay 0.1"],
        ["length", "90 steps, 5,760 samples seen (9 epochs)"],
        ["zero-shot", "flowers:test", "acc@1", "22.0 %", "", ""],
        ["zero-shot", "birds:test", "acc@1", "33.2 %", "", "10.0 %"],
        ["retrieval", "pairs.csv (500 samples)", "image → text R@10", "44.0 %", "41.5 to 46.5", "2.0 %"],
        ["input", "32 × 32 pixels, patches of 8", "12 tokens of 300"],
    ):
        assert row in told, row
    assert "averaged weights (exponential moving average, decay 0.99)" in card
    assert not any("num_images" in cell for row in told for cell in row)
    options = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.S).group(1))
    assert options["train"] == CONFIG["train"] and options["data"]["eval"] == ["flowers:test"]
    assert "run_folder" not in options


def test_a_checkpoint_has_its_own_figures(run, tmp_path):
    export(run / "checkpoints" / "step-00000060", "timm", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    results = [row for row in cells(card) if row[0] in ("zero-shot", "retrieval")]
    assert results == [["zero-shot", "flowers:test", "acc@1", "11.0 %", "", ""]]
    assert "60 steps" in card and yaml.safe_load(card.split("---")[1])["library_name"] == "timm"


def test_figures_of_weights_that_are_gone_are_left_out(run):
    """An evaluation from before the final weights were written is of a checkpoint."""
    earlier = (run / "final" / "model.safetensors").stat().st_mtime - STALE_SECONDS - 1
    os.utime(run / "zero_shot" / "birds" / "zero_shot.json", (earlier, earlier))
    found = {(result.task, result.data) for result in RunRecord.of(run / "final").results}
    assert found == {("zero-shot", "flowers:test"), ("retrieval", "pairs.csv (500 samples)")}


@pytest.mark.parametrize("config", ["{}", "train: 5", "loss: sigmoid\ntrain: {steps: 90}"])
def test_options_that_a_run_does_not_name_are_left_out(run, tmp_path, config):
    (run / "config.yaml").write_text(config)
    export(run, "timm", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "Trained from scratch" in card and "None |" not in card and "from None" not in card and "| batch |" not in card
    )
    assert ("| length | 90 steps |" in card) == ("steps" in config)


def test_a_folder_of_another_library_is_of_no_run(run, tmp_path):
    """Wherever it lies: the options and figures of a run are of the run's own models."""
    export(run, "transformers", run / "checkpoints" / "step-00000090")
    assert RunRecord.of(run / "checkpoints" / "step-00000090") is None
    export(run / "checkpoints" / "step-00000090", "timm", tmp_path / "out")
    assert "nothing more is known here" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("inside", "source"), [("final", "."), (".", "final"), ("final", ".."), ("checkpoints", ".")])
def test_a_source_named_from_inside_the_run(run, tmp_path, monkeypatch, inside, source):
    if inside == "checkpoints":
        inside = "checkpoints/step-00000060"
    monkeypatch.chdir(run / inside)
    export(source, "transformers", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "cats/{00000..00031}.tar=2" in card and "the text tower" in card.lower() and "``" not in card.split("```")[0]
    assert ("60 steps" if "checkpoints" in inside else "90 steps") in card


def test_damaged_results_do_not_stop_an_export(run, tmp_path):
    (run / "zero_shot" / "birds" / "zero_shot.json").write_text("{torn")
    (run / "evaluation" / "retrieval" / "evaluation.json").write_text("[]")
    (run / "metrics.jsonl").write_text("")
    export(run, "timm", tmp_path / "out")
    assert "## Results" not in (tmp_path / "out" / "README.md").read_text()


def test_a_source_without_processor_and_tokenizer(run, tmp_path):
    """Its towers are written and checked all the same; formats that cannot do without refuse."""
    export(run, "transformers", tmp_path / "whole")
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "whole" / name).unlink()
    done = export(tmp_path / "whole", "transformers", tmp_path / "out")
    assert [check.what for check in done.checks] == ["image embeddings", "text embeddings", "logits"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "This folder has no tokenizer" in card and "`whole`" in card and str(tmp_path) not in card
    for to in ("timm", "open_clip"):
        with pytest.raises(UserError, match=r"preprocessor_config.json is missing.*--to transformers and --to onnx"):
            export(tmp_path / "whole", to, tmp_path / to)
        assert not (tmp_path / to).exists()


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("scenes:test", "scenes:test"),
        ("hf:org/name:train", "hf:org/name:train"),
        ("hf-hub:org/name@main", "hf-hub:org/name@main"),
        ("hf:org/name=2,/home/me/x.csv=1", "hf:org/name=2,x.csv=1"),
        ("/data/me/mnist:test", "mnist:test"),
        ("../shared/data/mnist", "mnist"),
        ("~/pairs.csv", "pairs.csv"),
        ("/data/me/pairs/{00000..00331}.tar", "pairs/{00000..00331}.tar"),
        ("/a/{0,1}.tar=2,/b/c.csv=1", "a/{0,1}.tar=2,c.csv=1"),
        ("https://user:secret@host/pairs/{0..3}.tar?key=secret", "pairs/{0..3}.tar"),
        ("s3://bucket/train-*.tar", "bucket/train-*.tar"),
        ("/a/train → /b/test", "train → test"),
    ],
)
def test_names_without_places(spec, name):
    assert public_name(spec) == name

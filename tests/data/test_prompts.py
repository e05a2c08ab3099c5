"""Prompt templates: the sets, files of one's own, filling."""

from types import SimpleNamespace

import pytest

from contrastive.data.prompts import default_templates, fill, load_templates, template_sets
from contrastive.errors import UserError


def test_every_set_loads_and_takes_a_name():
    assert {"photo", "cifar", "digits", "scenes", "plain", "food", "satellite", "imagenet"} <= set(template_sets())
    for name in template_sets():
        templates = load_templates(name)
        assert len(set(templates)) == len(templates)
        assert all("red circle" in caption and "{" not in caption for caption in fill(templates, "red circle"))
    assert load_templates("plain") == ("{}",)
    assert len(load_templates("photo")) >= 12
    assert len(load_templates("cifar")) == 18


def test_fill_writes_underscores_as_spaces_and_the_article_only_where_asked():
    assert fill(("a photo of a {}.", "{}"), "polar_bear") == ("a photo of a polar bear.", "polar bear")
    assert fill(("a(n) {}",), "orange ring") == ("an orange ring",)
    assert fill(("a(n) {}",), "red ring") == ("a red ring",)
    assert fill(("a photo of a {}.",), "airplane") == ("a photo of a airplane.",)  # CLIP's own wording


def test_file_of_templates(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("# birds\n\na bird, a {}\n{} in a tree\n")
    assert load_templates(str(path)) == ("a bird, a {}", "{} in a tree")
    path.write_text('["a bird, a {c}",\n "{} in a tree"]')
    assert load_templates(str(path)) == ("a bird, a {}", "{} in a tree")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a photo of a {}\na photo\n", "line 2: 'a photo' has no '{}'"),
        (b"# nothing\n\n", "holds no prompt template"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"'a photo of a {}.',\n'a {}.',\n", "'a photo of a {}.', is Python code; write the text alone"),
        (b'lambda c: f"a photo of a {c}.",\n', "lambda .* is Python code"),
        (b'{"cat": ["a {} with fur"]}', "one a line or a JSON list of texts; of an object"),
        (b'["a photo of a {}."', "one a line or a JSON list of texts"),
        (b'[{"text": "a {}"}]', "one a line or a JSON list of texts"),
    ],
)
def test_bad_file_is_refused(tmp_path, content, message):
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_templates(str(path))
    assert "\n" not in str(caught.value)


def test_unknown_set_gets_a_suggestion():
    with pytest.raises(UserError, match="Did you mean 'photo'"):
        load_templates("photos")


def test_default_templates_fit_the_source():
    def named(name, classes, **more):
        return SimpleNamespace(name=name, class_names=classes, **{"templates": None, **more})

    cifar = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert default_templates(named("digits:test", ("zero",))) == load_templates("digits")
    assert default_templates(named("scenes:heldout", ("red circle",))) == load_templates("scenes")
    assert default_templates(named("x/test.parquet", tuple(cifar))) == load_templates("cifar")
    assert default_templates(named("birds", ("jay", "wren"))) == load_templates("photo")
    assert default_templates(named("birds", ("jay",), templates=("a {} bird",))) == ("a {} bird",)

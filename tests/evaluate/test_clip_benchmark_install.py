"""CLIP_benchmark, or what it imports, is not installed: one line that names it."""

import sys

import pytest

from contrastive.errors import UserError
from contrastive.interop import clip_benchmark as adapter

pytest.importorskip("clip_benchmark", reason="needs clip-benchmark")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("clip_benchmark", "clip-benchmark is not installed; install it with: pip install"),
        ("requests", "needs requests"),
    ],
)
def test_what_is_not_installed_is_named(monkeypatch, missing, message):
    for name in [name for name in sys.modules if name.split(".")[0] == "clip_benchmark"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    adapter._import_and_mend.cache_clear()
    with pytest.raises(UserError, match=message) as caught:
        adapter.run(["eval"])
    assert "\n" not in str(caught.value)
    adapter._import_and_mend.cache_clear()


def test_only_captioning_needs_pycocoevalcap(monkeypatch):
    for name in [
        name for name in sys.modules if name.startswith("pycocoevalcap") or name.endswith("metrics.captioning")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    adapter._do_without_captioning()
    with pytest.raises(UserError, match="captioning cannot run: .*pycocoevalcap"):
        sys.modules["clip_benchmark.metrics.captioning"].evaluate(model=None)

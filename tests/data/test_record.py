"""What every source has, and that whatever wraps a source lets all of it through."""

import importlib
import pickle
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest

import contrastive
from contrastive.data.order_choice import order_for
from contrastive.data.record import FaultCounts, Record, Source, Wrapped
from contrastive.data.sources import SOURCES, open_source
from contrastive.data.sources.derived import ClassPrompts, Mixture, Renamed
from contrastive.data.sources.subset import Subset, labelled_share

MEMBERS = sorted(
    {name for name in (*vars(Source), *Source.__annotations__) if not name.startswith("_")} | {"__len__", "__getitem__"}
)
SOURCES_OF_THEIR_OWN = {"parts", "stored"}

# How each wrapper is made, and what it alters of the source that it wraps.
WRAPPERS = {
    ClassPrompts: (
        lambda source: ClassPrompts(source, ("a {}",)),
        {"__getitem__", "captions", "captioned", "templates", "prompted", "fingerprint"},
    ),
    Renamed: (
        lambda source: Renamed(source, ("b", "a"), (1, 0), own_names=("dog", "cat")),
        {"class_names", "own_names", "heldout_labels", "fingerprint", "__getitem__", "label"},
    ),
    Subset: (
        lambda source: Subset(source, np.array([1, 2, 7]), "some"),
        {"name", "fingerprint", "shard_sizes", "__len__", "__getitem__", "captions", "label"},
    ),
}


class Plain(Source):
    """Has what a source must have, and nothing else."""

    name, fingerprint = "plain", "0"

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return Record(str(index), b"")


class Full(Source):
    """Has something of its own for every member."""

    name, fingerprint, class_names = "full", "f", ("cat", "dog")
    own_names = ("n1", "n2")
    captioned, labelled, prompted, remote = False, True, False, True
    templates, heldout_labels, weights = ("the {}",), frozenset({1}), (1,)
    shard_sizes = np.array([3, 0, 5])
    reading, left_aside = "2 class folders", FaultCounts(not_an_image={"count": 1, "keys": ["readme.md"]})
    columns_read = ("image_column",)
    masked, mask_names = True, ("ground", "cat")

    def __init__(self):
        self.asked = []

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return Record(str(index), b"", self.captions(index), self.label(index))

    def captions(self, index):
        return (f"text {index}",)

    def label(self, index):
        return index % 2

    def wanted(self, shards):
        return [(f"{shard}.tar", 7, None) for shard in shards]

    def prefetch(self, shards):
        self.asked.append(shards)


def seen(source, full, member):
    """What a member of a source gives."""
    if member == "__len__":
        return len(source)
    if member == "__getitem__":
        return [source[index] for index in range(len(source))]
    if member in ("captions", "label"):
        return [getattr(source, member)(index) for index in range(len(source))]
    if member == "wanted":
        return source.wanted([2, 0])
    if member == "prefetch":
        full.asked.clear()
        source.prefetch([2, 0])
        return list(full.asked)
    value = getattr(source, member)
    return value.tolist() if isinstance(value, np.ndarray) else value


def wrappers():
    """All subclasses of Wrapped in the package, as only the import of every module of the data brings them."""
    data = importlib.import_module("contrastive.data")
    for module in pkgutil.walk_packages(data.__path__, "contrastive.data."):
        importlib.import_module(module.name)
    found, waiting = [], [Wrapped]
    while waiting:
        new = [kind for kind in waiting.pop().__subclasses__() if kind.__module__.startswith(contrastive.__name__)]
        found += new
        waiting += new
    return found


def test_every_wrapper_is_known_here():
    assert set(wrappers()) == WRAPPERS.keys(), "say in WRAPPERS how it is made and what it alters"


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("kind", [Wrapped, *WRAPPERS], ids=lambda kind: kind.__name__)
def test_every_member_comes_through_a_wrapper(kind, member):
    make, altered = WRAPPERS.get(kind, (kind, set()))
    full = Full()
    wrapper = make(full)
    if member in SOURCES_OF_THEIR_OWN:
        assert (getattr(Full(), member) != wrapper) and getattr(wrapper, member)
    elif member in altered:
        assert seen(wrapper, full, member) != seen(full, full, member)
    else:
        assert seen(wrapper, full, member) == seen(full, full, member)
    if member not in SOURCES_OF_THEIR_OWN | {"weights", "prompted"}:
        assert seen(full, full, member) != seen(Plain(), full, member), "Full has to have something of its own"


def test_a_wrapper_is_one_part_and_keeps_what_is_stored():
    full = Full()
    for make, _ in WRAPPERS.values():
        wrapper = make(full)
        assert wrapper.parts == (wrapper,) and wrapper.weights == (1,)
    prompts = ClassPrompts(full, ("a {}",))
    assert prompts.stored is full and full.stored is full
    share = labelled_share(full, 0.5)
    assert share.stored is share
    stored = labelled_share(prompts, 0.5).stored
    assert stored.fingerprint == share.fingerprint and stored[1] == share[1]


def test_a_mixture_is_wrapped_by_its_parts():
    mixture = Mixture("mix", [Plain(), Full()], (1, 2))
    assert [part.name for part in mixture.parts] == ["plain", "full"] and mixture.stored is mixture
    with pytest.raises(ValueError, match="mix: wrap each part"):
        Wrapped(mixture)


def test_a_source_with_the_least_has_all_the_rest():
    plain = Plain()
    for member in MEMBERS:
        assert hasattr(plain, member)
    assert plain.parts == (plain,) and plain.captions(1) == () and plain.label(1) is None and plain.wanted([0]) == []
    for ask in (plain.captions, plain.label):
        with pytest.raises(IndexError, match="plain: index 4"):
            ask(4)


def example_of_the_docs():
    text = (Path(__file__).resolve().parents[2] / "docs" / "extending.md").read_text()
    return text.partition("## A data source\n")[2].partition("\n## ")[0]


def test_the_docs_name_every_member():
    section = re.sub(r"```.*?```", "", example_of_the_docs(), flags=re.DOTALL)
    named = {name.partition("(")[0] for name in re.findall(r"`([^`]+)`", section)}
    assert set(MEMBERS) - {"__len__", "__getitem__"} <= named and "`len(source)`, `source[index]`" in section


def test_the_source_of_the_docs_works_as_it_stands(monkeypatch):
    monkeypatch.setattr(SOURCES, "_entries", dict(SOURCES._entries))
    exec("".join(re.findall(r"```python\n(.*?)```", example_of_the_docs(), re.DOTALL)), {})
    source = open_source("mine:here")
    assert source.name == "mine:here" and len(source) == 100 and source[7].captions == ("picture 7",)
    assert len(order_for(source, 10, 0).at(np.arange(100))) == 100 and pickle.loads(pickle.dumps(Plain()))[3].key == "3"

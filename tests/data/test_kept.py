"""A folder of kept samples as a data source: what training reads after a curation."""

import json

import numpy as np
import pytest
from PIL import Image

from contrastive.data.sources import open_source
from contrastive.data.sources.derived import as_found
from contrastive.data.sources.open import absolute, held_out_spec
from contrastive.data.sources.subset import FORMAT, KeptData, write_kept
from contrastive.errors import UserError


def keep(folder, spec, indices, **changed):
    folder.mkdir(exist_ok=True)
    source = as_found(open_source(spec))
    said = {"format": FORMAT, "data": absolute(spec), "image_column": None, "caption_column": None}
    said |= {"fingerprint": source.fingerprint, "num_samples": len(source), "kept": len(indices)} | changed
    write_kept(folder, KeptData(**said), np.array(indices, dtype=np.int64))
    return str(folder)


@pytest.fixture
def kept(tmp_path):
    return keep(tmp_path / "kept", "scenes:val", [0, 3, 4, 9])


def test_a_kept_folder_is_those_samples(kept):
    whole, source = open_source("scenes:val"), open_source(kept)
    assert len(source) == 4 and [source[i].key for i in range(4)] == [whole[i].key for i in (0, 3, 4, 9)]
    assert source.captions(1) == whole.captions(3) and source.name == kept and source.class_names == whole.class_names
    assert source.reading.startswith(f"kept of the {len(whole):,} of scenes:val")
    assert held_out_spec(kept) is None and source.fingerprint != whole.fingerprint


def test_it_may_be_curated_again_and_labels_are_spoken_as_of_the_whole(tmp_path):
    first = keep(tmp_path / "first", "digits", [1, 5, 7, 8])
    second = keep(tmp_path / "second", first, [0, 2])
    source, whole = open_source(second), open_source("digits")
    assert [source.label(i) for i in (0, 1)] == [whole.label(1), whole.label(7)] and source.prompted
    assert source.captions(1) == whole.captions(7) and source.stored.captions(1) == ()
    assert held_out_spec(second) == "digits:test"


def test_it_is_a_part_of_a_mixture_as_others(kept):
    mixture = open_source(f"{kept}=2,digits=1")
    assert mixture.weights == (2, 1) and mixture[1].key.endswith(open_source("scenes:val")[3].key)


def test_relative_paths_hold_from_other_folders(tmp_path, monkeypatch):
    write_pairs(tmp_path / "pairs.csv", 3)
    monkeypatch.chdir(tmp_path)
    keep(tmp_path / "kept", "pairs.csv", [2])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert open_source("../kept").captions(0) == ("text 2",)


def write_pairs(path, count):
    for i in range(count):
        Image.new("RGB", (2, 2)).save(path.with_name(f"{i}.jpg"))
    path.write_text("".join(["path,caption\n", *(f"{i}.jpg,text {i}\n" for i in range(count))]))


def test_other_data_than_was_curated_is_refused(tmp_path):
    write_pairs(tmp_path / "pairs.csv", 3)
    folder = keep(tmp_path / "kept", str(tmp_path / "pairs.csv"), [2])
    write_pairs(tmp_path / "pairs.csv", 4)
    with pytest.raises(UserError, match=r"kept: .*pairs.csv is not as it was .* \(4 samples now, 3 then\); curate it"):
        open_source(folder)


@pytest.mark.parametrize(
    ("indices", "changed"),
    [([3, 3], {}), ([4, 1], {}), ([-1, 2], {}), ([1, 10**6], {}), ([1, 2], {"kept": 3}), ([], {})],
)
def test_places_that_are_none_are_refused(tmp_path, indices, changed):
    folder = keep(tmp_path / "kept", "scenes:val", indices, **changed)
    with pytest.raises(UserError, match="kept.npy is damaged"):
        open_source(folder)


def test_damage_is_one_line(kept, tmp_path):
    path = tmp_path / "kept" / "kept.npy"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="kept.npy is damaged"):
        open_source(kept)
    path = tmp_path / "kept" / "kept.json"
    said = json.loads(path.read_text())
    for changed, told in (
        ({"format": "contrastive-kept-9"}, "this version reads"),
        ({"kept": "many"}, "kept"),
        ({"data": kept}, "kept of itself"),
    ):
        path.write_text(json.dumps(said | changed))
        with pytest.raises(UserError, match=told):
            open_source(kept)
    path.write_text(json.dumps({"format": FORMAT}))
    with pytest.raises(UserError, match="is damaged"):
        open_source(kept)

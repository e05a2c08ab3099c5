"""Images for their own sake: files, folders that are no data set, and data sources."""

import os

import pytest
from PIL import Image

from contrastive.data.sources.image_files import open_images
from contrastive.errors import UserError


@pytest.fixture
def photos(tmp_path):
    for number, name in enumerate(("b.png", "a.png", "trip/c.PNG", ".hidden.png")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(path)
    return tmp_path


def test_a_folder_of_any_images_is_taken_whole(photos):
    source = open_images([str(photos)])
    assert [source[index].key for index in range(len(source))] == ["a.png", "b.png", "trip/c.PNG"]
    assert source.captions(0) == () and source.label(0) is None and source[1].image[:4] == b"\x89PNG"


def test_files_are_taken_as_given(photos):
    source = open_images([str(photos / "b.png"), str(photos / "a.png")])
    assert (len(source), source.name) == (2, "2 images")
    assert source[0].key == str(photos / "b.png")


def test_a_data_set_keeps_what_it_knows():
    assert open_images(["scenes:test"]).class_names


def test_a_photo_that_was_edited_is_another(photos):
    before = open_images([str(photos)]).fingerprint
    assert open_images([str(photos)]).fingerprint == before
    os.utime(photos / "a.png", (1, 1))
    assert open_images([str(photos)]).fingerprint != before


def test_what_is_not_there_is_told(photos, tmp_path_factory):
    for places, told in (
        ([str(photos / "x.png")], "no such file"),
        (["scenes:test", str(photos)], "one data source or folder"),
        (["nowhere"], "unknown data source"),
        ([str(tmp_path_factory.mktemp("empty"))], "no images"),
    ):
        with pytest.raises(UserError, match=told):
            open_images(places)

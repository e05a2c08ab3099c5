"""Images for their own sake, as a search or a page wants them: any data source, and any folder or files of images."""

import os
from collections.abc import Sequence

from contrastive.data.record import Source, fingerprint_of
from contrastive.data.sources.folder import ImageFiles, images_below
from contrastive.data.sources.open import open_source
from contrastive.data.sources.paths import IMAGE_SUFFIXES
from contrastive.errors import UserError


def open_images(places: Sequence[str]) -> Source:
    """Open one data source (see `open_source`), one folder of images in any order, or image files.

    A folder that is no data set, for its images have neither captions nor classes, gives all images below it.

    Raises:
        UserError: nothing of that name, no image in it, or several places that are not image files.
    """
    files = [os.path.expanduser(place) for place in places]
    if all(path.rpartition(".")[2].lower() in IMAGE_SUFFIXES and not os.path.isdir(path) for path in files):
        if missing := [path for path in files if not os.path.isfile(path)]:
            raise UserError(f"no image at {missing[0]}: no such file")
        return _alone(places[0] if len(places) == 1 else f"{len(places)} images", os.curdir, files)
    if len(places) > 1:
        raise UserError(f"{' '.join(places)}: give one data source or folder, or any number of image files")
    try:
        return open_source(places[0])
    except UserError:
        found = images_below(files[0]) if os.path.isdir(files[0]) else []
        if not found:
            raise
        return _alone(places[0], files[0], found)


def _alone(name: str, root: str, paths: Sequence[str]) -> ImageFiles:
    source = ImageFiles(name, root, paths)
    # Photos are called alike in many folders, and are edited: names alone do not tell whose embeddings are kept.
    seen = (os.stat(os.path.join(root, path)) for path in paths)
    source.fingerprint = fingerprint_of(
        "\0".join([source.fingerprint, *(f"{s.st_size} {s.st_mtime_ns}" for s in seen)])
    )
    return source

"""Read one image file."""

from contrastive.data.record import BadSample

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
# No photograph is larger as a file; one that is would cost every worker that much memory.
MAX_IMAGE_BYTES = 256 * 2**20


def read_image_file(path: str, key: str) -> bytes:
    """Return the bytes of the file. Raises BadSample: 'missing_image', 'unreadable_image', 'too_large'."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_IMAGE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise BadSample("missing_image", key) from None
    except (OSError, ValueError):  # ValueError: a name that holds a zero byte
        raise BadSample("unreadable_image", key) from None
    if len(data) > MAX_IMAGE_BYTES:
        raise BadSample("too_large", key)
    return data

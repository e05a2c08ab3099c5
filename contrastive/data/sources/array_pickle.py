"""Read pickles of plain values and arrays of bytes without running anything that they name."""

import io
import pickle
from typing import Any

import numpy as np

from contrastive.errors import UserError


def read_array_pickle(path: str) -> dict[str, Any]:
    """Return the dict that a pickle holds: of lists, texts, numbers and uint8 arrays; texts of Python 2 as bytes.

    A pickle is a program: it may name any function to be called. Here every name but those that numpy writes for
    an array is refused, and those stand for our own code, so that not even numpy sees what the file says.

    Raises:
        UserError: it names something else, holds something else, or is damaged.
    """
    try:
        with open(path, "rb") as file:
            held = _Unpickler(file, path).load()
        named = {key.decode() if isinstance(key, bytes) else key: value for key, value in held.items()}
    except UserError:
        raise
    except Exception as error:  # a damaged pickle leads the reader to nearly all of them
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} is damaged or no pickle of arrays ({reason}); fetch it anew") from None
    return {key: value.values if isinstance(value, _Array) else value for key, value in named.items()}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BufferedReader, path: str):
        super().__init__(file, encoding="bytes")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        known = _NAMES.get((module.replace("numpy._core", "numpy.core"), name))
        if known is None:
            raise UserError(f"{self._path} asks for {module}.{name}, which no data need; nothing of it was run")
        return known


class _DType:
    """Stands for numpy.dtype: only the name of the type is taken from the file."""

    def __init__(self, code: str | bytes, *rest: object):
        self.code = code.decode("latin-1") if isinstance(code, bytes) else code

    def __setstate__(self, state: object) -> None:
        pass


class _Array:
    """Stands for numpy.ndarray, made empty and then told its shape and bytes."""

    def __init__(self, *_: object):
        self.values = np.empty(0, dtype=np.uint8)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, columns_first, content = state
        self.values = _from_bytes(content, dtype, shape, "F" if columns_first else "C")


def _from_bytes(content: bytes | bytearray, dtype: _DType, shape: tuple[int, ...], order: str) -> np.ndarray:
    if dtype.code not in ("u1", "|u1", "uint8"):
        raise ValueError(f"an array of '{dtype.code}', not of unsigned bytes")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape, order=order)


def _encode(text: str, encoding: str) -> bytes:
    """Stands for codecs.encode, as which Python 3 writes bytes in the protocols of Python 2."""
    return text.encode("latin-1")


_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("numpy.core.numeric", "_frombuffer"): _from_bytes,
    ("_codecs", "encode"): _encode,
}

"""Safetensors files, read a part at a time wherever they lie: the header first, then what is asked for.

The library, which writes them, reads files of this machine alone.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np

from cmd_jax.errors import UserError
from cmd_jax.files import check_content, parse_json
from cmd_jax.interop.ranges import BucketBytes, LocalBytes, Span, open_bytes

DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2, "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4",
    "U16": "<u2", "U8": "u1", "BOOL": "?", "C64": "<c8",
}  # fmt: skip
OTHERS = ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0")  # of quantised weights; a file may hold them, but none is read
LENGTH = 8  # bytes in front that tell how long the header is
FIRST = 2**17  # bytes of the first request, which hold the headers of most files
LARGEST_HEADER = 100_000_000  # bytes, as the library has it
MOST_DIMENSIONS = 32
SIZE = range(2**48)
ENTRY = {"dtype": str, "shape": [SIZE], "data_offsets": [SIZE, SIZE], ...: object}
LIKE = {"__metadata__?": ({...: str}, None), ...: ENTRY}


class Damaged(ValueError):
    """A file that is cut off, or not what its header says."""


class Stored(NamedTuple):
    """A tensor in a file, not read yet. dtype: as safetensors calls it. start: of its bytes in the file."""

    file: LocalBytes | BucketBytes
    dtype: str
    shape: tuple[int, ...]
    start: int

    def span(self, index: tuple[slice, ...]) -> Span:
        """Where the bytes of its rows index[0] lie. Damaged for a dtype of OTHERS."""
        if self.dtype not in DTYPES:
            raise Damaged(f"of dtype {self.dtype}")
        first, stop = _rows(self.shape, index)
        size = math.prod(self.shape[1:]) * np.dtype(DTYPES[self.dtype]).itemsize
        return self.start + first * size, self.start + stop * size

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Of a bucket, its rows index[0] are requested."""
        start, stop = self.span(index)
        first, end = _rows(self.shape, index)
        data = self.file.read(start, stop) if start < stop else b""
        rows = np.frombuffer(data, DTYPES[self.dtype]).reshape((end - first, *self.shape[1:])[: len(self.shape)])
        return np.array(rows[(slice(None), *index[1:])[: len(self.shape)]])  # a copy: a file may change


def _rows(shape: tuple[int, ...], index: tuple[slice, ...]) -> tuple[int, int]:
    return index[0].indices(shape[0])[:2] if shape else (0, 1)


@contextlib.contextmanager
def open_safetensors(path, field: str) -> Iterator[tuple[dict[str, Stored], dict[str, str]]]:
    """-> ({name: tensor} in the order in which they lie there, the texts beside them).

    Damaged, OSError, and UserError (field=path) for a pointer of git-lfs in its place.
    """
    with open_bytes(path) as file:
        first = bytes(file.read(0, min(file.size, FIRST)))
        check_content(first, field, path)
        yield _header(file, first)


def _header(file: LocalBytes | BucketBytes, first: bytes) -> tuple[dict[str, Stored], dict[str, str]]:
    """first: bytes of the file."""
    length = int.from_bytes(first[:LENGTH], "little")
    start = LENGTH + length
    if length > LARGEST_HEADER or start > file.size:
        raise Damaged(f"{file.size} bytes, of which {length} would be a header")
    text = first[LENGTH:start] if start <= len(first) else bytes(file.read(LENGTH, start))
    try:
        entries = parse_json(text, "header", "", like=LIKE)
    except UserError as e:
        raise Damaged(f"header: {e.problem}") from None
    texts = entries.pop("__metadata__", None) or {}
    tensors, end = {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        (offset, stop), shape = entry["data_offsets"], tuple(entry["shape"])
        if entry["dtype"] not in (*DTYPES, *OTHERS):
            raise Damaged(f"{name[:100]} is of dtype {entry['dtype'][:20]}")
        if len(shape) > MOST_DIMENSIONS or math.prod(filter(None, shape)) >= SIZE.stop:
            raise Damaged(f"{name[:100]} has a shape that no array has")
        if offset != end or stop < offset:
            raise Damaged(f"{name[:100]} does not begin where the tensor before it ends")
        tensors[name], end = Stored(file, entry["dtype"], shape, start + offset), stop
        if entry["dtype"] in DTYPES and tensors[name].span((slice(None),) * len(shape))[1] != start + stop:
            raise Damaged(f"{name[:100]} has {stop - offset} bytes, not those of {list(shape)}")
    if start + end != file.size:
        raise Damaged(f"{file.size} bytes, not {start + end}")
    return tensors, texts

"""TensorFlow's Example, the records of a dataset, written and read without TensorFlow and faster than by protobuf."""

import struct
from collections.abc import Mapping, Sequence


def example(features: Mapping[str, bytes | str | int | float | Sequence[bytes] | Sequence[str]]) -> bytes:
    """An Example of bytes, texts, numbers, or lists of one kind, the same bytes whatever the order of the names.

    What is bytes may be any buffer of them. As in `parse`, protobuf would copy them more often than it takes to write.
    """
    entries = []
    for name in sorted(features):
        value = features[name]
        values = [value] if isinstance(value, str | int | float | bytes | bytearray | memoryview) else value
        feature = _message(2, _message(_kind(values), _values(values)))
        entries += _message(1, [*_message(1, [name.encode()]), *feature])
    return b"".join(_message(1, entries))


def _kind(values: Sequence) -> int:
    """The number of the list that a Feature keeps them in: of bytes, floats, or whole numbers."""
    first = values[0] if len(values) else b""
    return 3 if isinstance(first, int) else 2 if isinstance(first, float) else 1


def _values(values: Sequence) -> list:
    kind = _kind(values)
    if kind == 1:
        pieces = (v.encode("utf-8", "surrogateescape") if isinstance(v, str) else v for v in values)
        return [part for piece in pieces for part in _message(1, [piece])]
    packed = struct.pack(f"<{len(values)}f", *values) if kind == 2 else b"".join(map(_as_varint, values))
    return _message(1, [packed])


def _message(number: int, parts: list) -> list:
    """The parts of a field: its tag and length, and its content."""
    return [bytes([number << 3 | 2]) + _as_varint(sum(map(len, parts))), *parts]


def _as_varint(value: int) -> bytes:
    value, out = value & (1 << 64) - 1, bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def parse(record: bytes) -> dict[str, list]:
    """The lists of an Example: memoryviews into `record` for bytes, whole numbers, or floats.

    protobuf's own parser copies a record twice, which is most of the time that reading a window of it takes. ValueError
    for what is no Example.
    """
    view, features = memoryview(record), {}
    try:
        position, end = _content(record, 0, 1)  # Example.features
        while position < end:
            position, stop = _content(record, position, 1)  # an entry of the map
            position, after = _content(record, position, 1)
            name, (position, stop) = record[position:after].decode(), _content(record, after, 2)
            kind = record[position] >> 3 if position < stop else 1
            position, stop = _content(record, position, kind) if position < stop else (stop, stop)
            if kind == 1:
                values = features[name] = []
                while position < stop:
                    first, position = _content(record, position, 1)
                    values.append(view[first:position])
            else:
                features[name] = (_floats if kind == 2 else _integers)(record, position, stop)
                position = stop
    except IndexError as error:
        raise ValueError("it ends within a field") from error
    return features


def text_of(value: bytes | memoryview) -> str:
    """A text of a record; names of files may be no UTF-8."""
    return bytes(value).decode("utf-8", "surrogateescape")


def _varint(record: bytes, position: int) -> tuple[int, int]:
    """(value, the position behind it)."""
    if (value := record[position]) < 128:
        return value, position + 1
    value, shift = value & 127, 7
    while True:
        position += 1
        byte = record[position]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position + 1
        shift += 7


def _content(record: bytes, position: int, number: int) -> tuple[int, int]:
    """Where the content of field `number`, one with a length, begins and ends; its tag is at `position`."""
    if record[position] != number << 3 | 2:
        raise ValueError(f"it has the tag {record[position]} where field {number} should begin")
    length, position = _varint(record, position + 1)
    if position + length > len(record):
        raise ValueError("a field is longer than its message")
    return position, position + length


def _integers(record: bytes, position: int, end: int) -> list[int]:
    values = []
    while position < end:
        position, stop = _content(record, position, 1)
        while position < stop:
            value, position = _varint(record, position)
            values.append(value - (1 << 64) if value >> 63 else value)
    return values


def _floats(record: bytes, position: int, end: int) -> list[float]:
    first, stop = _content(record, position, 1) if position < end else (end, end)
    return [x for (x,) in struct.iter_unpack("<f", record[first:stop])]

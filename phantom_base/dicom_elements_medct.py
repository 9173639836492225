"""The elements of a DICOM file that stand before its pixels, read without a word.

Unusual: pydicom's own reader warns and logs what it stumbles over, values of the header among it, and can be silenced
for the whole process only, which is not a reader's to do. Its dictionary is used here, its reader is not. Values are
converted when they are asked for, so whatever nobody asks for is never looked at: names, dates, character sets.

Source: DICOM PS3.5 (6.2, 7), PS3.10 (7.1).
"""

import io
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO, Literal

try:
    from pydicom import datadict
    from pydicom.uid import UID_dictionary
except ImportError:  # said where a DICOM file is read
    datadict, UID_dictionary = None, {}

INSTALL = "pip install pydicom pyjpegls pylibjpeg-openjpeg python-gdcm"
"""How to get what reads DICOM: the dictionary of pydicom, and the decoders of compressed pixels."""

_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_PIXELS = (0x7FE00008, 0x7FE00009, 0x7FE00010)
_LONG = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
_NUMBERS = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d", "UV": "Q", "SV": "q"}
_TWICE = "twice"
_TEXTS_OF_ONE = ("LT", "ST", "UT", "UR")
_MAX_VALUE_BYTES = 2**20
"""Longer values, such as overlays and colour tables, are passed over."""
_MAX_ELEMENTS = 2**16
_MAX_DEPTH = 16


class Elements:
    """A data set, or an item of a sequence: values by keyword, as pydicom has them."""

    def __init__(self, raw: dict[int, tuple[str, Any]], is_implicit: bool, is_little: bool):
        self._raw, self.original_encoding = raw, (is_implicit, is_little)
        self.file_meta: Elements | None = None

    def __len__(self) -> int:
        return len(self._raw)

    def __contains__(self, keyword: str) -> bool:
        return datadict.tag_for_keyword(keyword) in self._raw

    def __getattr__(self, keyword: str) -> Any:
        if keyword.startswith("_") or keyword not in self:
            raise AttributeError(keyword)
        return self.get(keyword)

    def get(self, keyword: str, default: Any = None) -> Any:
        """The value of an attribute.

        Args:
            keyword: The attribute's keyword in the DICOM dictionary, such as "PixelSpacing".
            default: What to return if the attribute is absent.

        Returns:
            A number, a string, a list of either, or a list of `Elements`; `None` if the attribute is present but empty.

        Raises:
            ValueError: If the value is malformed.
        """
        tag = datadict.tag_for_keyword(keyword)
        if tag not in self._raw:
            return default
        kind, value = self._raw[tag]
        if kind == _TWICE:
            raise ValueError("twice in one data set")
        if kind in ("", "UN"):
            kind = kind_of(tag)
            if kind == "US or SS":  # of pixel values
                kind = "SS" if self.get("PixelRepresentation") == 1 else "US"
        if kind == "SQ":
            if isinstance(value, bytes):
                implicit, little = self.original_encoding
                value = _items_of(io.BytesIO(value), len(value), implicit, little, 0)
                self._raw[tag] = (kind, value)
            return value
        return _value(kind[:2], value, self.original_encoding[1])

    def written(self, tag: int) -> bytes:
        """A value as it is written; nothing if it is not there, or a sequence of undefined length."""
        _, value = self._raw.get(tag, ("", b""))
        return value if isinstance(value, bytes) else b""

    def sequences(self) -> Iterator[list["Elements"]]:
        """The items of each sequence.

        Raises:
            ValueError, EOFError: If one is damaged.
        """
        for tag, (kind, _) in list(self._raw.items()):
            if kind == "SQ" or (kind in ("", "UN") and kind_of(tag) == "SQ"):
                yield self.get(datadict.keyword_for_tag(tag)) or []


def name_of_uid(uid: str) -> str | None:
    """What the standard calls a UID; none if it does not know it."""
    return UID_dictionary[uid][0] if uid in UID_dictionary else None


def read_meta(stream: BinaryIO) -> Elements:
    """The file meta information, behind the mark `DICM` or where a file without one begins; nothing if there is none.

    The stream then stands behind it.

    Raises:
        ValueError, EOFError: If it is damaged.
    """
    stream.seek(128)
    if stream.read(4) != b"DICM":
        stream.seek(0)
    raw: dict[int, tuple[str, Any]] = {}
    while True:
        if _peek(stream, 0, 2) != b"\x02\x00":
            return Elements(raw, False, True)
        is_implicit = not _is_kind(_peek(stream, 4, 2))
        _read_element(stream, raw, is_implicit, True, 0)


def read_data_set(stream: BinaryIO, is_little: bool | None) -> Elements:
    """Elements up to the pixels, or to the end of the stream, which is left at the pixels.

    Whether value representations are explicit is detected from the first element, since the transfer syntax is often
    wrong about it; so is the byte order if it is not known.

    Args:
        stream: Positioned at the first element of the data set.
        is_little: Whether the byte order is little-endian; `None` to detect it.

    Raises:
        ValueError, EOFError: If the data set is damaged.
    """
    raw: dict[int, tuple[str, Any]] = {}
    is_implicit = not _is_kind(_peek(stream, 4, 2))
    if is_little is None:
        group = _peek(stream, 0, 2)
        is_little = int.from_bytes(group, "little") <= int.from_bytes(group, "big")  # the first groups are small
    for _ in range(_MAX_ELEMENTS):
        head = _peek(stream, 0, 4)
        if len(head) < 4 or _tag(head, is_little) in _PIXELS:
            return Elements(raw, is_implicit, is_little)
        _read_element(stream, raw, is_implicit, is_little, 0)
    raise ValueError("too many elements")


def _peek(stream: BinaryIO, offset: int, count: int) -> bytes:
    at = stream.tell()
    found = stream.read(offset + count)[offset:]
    stream.seek(at)
    return found


def _is_kind(letters: bytes) -> bool:
    return len(letters) == 2 and letters.isalpha() and letters.isupper()


def _tag(head: bytes, is_little: bool) -> int:
    group, element = struct.unpack("<HH" if is_little else ">HH", head)
    return group << 16 | element


def _read_element(
    stream: BinaryIO, raw: dict[int, tuple[str, Any]], is_implicit: bool, is_little: bool, depth: int
) -> int:
    """One element into `raw`; gives its tag, that of an item's or a sequence's end too."""
    head = _exactly(stream, 8)
    tag, order = _tag(head[:4], is_little), "little" if is_little else "big"
    if tag >> 16 == 0xFFFE:
        return tag
    kind, length = "", int.from_bytes(head[4:], order)
    if not is_implicit and _is_kind(head[4:6]):
        kind = head[4:6].decode()
        length = int.from_bytes(_exactly(stream, 4) if head[4:6] in _LONG else head[6:], order)
    if length == _UNDEFINED and (tag in _PIXELS or kind in ("OB", "OW")):
        _skip_fragments(stream, order)  # of a compressed icon
    elif length == _UNDEFINED:
        # Values of an unknown kind and length are sequences without kinds.
        value = _items_of(stream, None, is_implicit or kind == "UN", is_little, depth)
        _put(raw, tag, "SQ", value)
    elif length > _MAX_VALUE_BYTES and kind != "SQ" and (kind or kind_of(tag) != "SQ"):
        _skip(stream, length)
    else:
        _put(raw, tag, kind, _exactly(stream, length))
    return tag


def _put(raw: dict[int, tuple[str, Any]], tag: int, kind: str, value: Any) -> None:
    """An element that a data set may hold once; two different ones leave nothing to rely on."""
    raw[tag] = (_TWICE, None) if raw.get(tag, (kind, value)) != (kind, value) else (kind, value)


def kind_of(tag: int) -> str:
    """The value representation of an attribute in the dictionary; UN if it is not there."""
    try:
        return datadict.dictionary_VR(tag)
    except KeyError:
        return "UN"


def _items_of(stream: BinaryIO, length: int | None, is_implicit: bool, is_little: bool, depth: int) -> list[Elements]:
    """Items of a sequence of a length, or up to its end."""
    if depth > _MAX_DEPTH:
        raise ValueError("sequences too deep")
    items, order, end = [], "little" if is_little else "big", None if length is None else stream.tell() + length
    while end is None or stream.tell() < end:
        head = _exactly(stream, 8)
        tag, count = _tag(head[:4], is_little), int.from_bytes(head[4:], order)
        if tag == _SEQUENCE_END:
            break
        if tag != _ITEM:
            raise ValueError("no item of a sequence")
        items.append(_item(stream, None if count == _UNDEFINED else count, is_implicit, is_little, depth + 1))
    return items


def _item(stream: BinaryIO, length: int | None, is_implicit: bool, is_little: bool, depth: int) -> Elements:
    raw: dict[int, tuple[str, Any]] = {}
    is_implicit = is_implicit or (length != 0 and not _is_kind(_peek(stream, 4, 2)) and length is not None)
    if length is None:
        for _ in range(_MAX_ELEMENTS):
            if _read_element(stream, raw, is_implicit, is_little, depth) == _ITEM_END:
                return Elements(raw, is_implicit, is_little)
        raise ValueError("too many elements")
    data = io.BytesIO(_exactly(stream, length))
    while data.tell() < length:
        _read_element(data, raw, is_implicit, is_little, depth)
    return Elements(raw, is_implicit, is_little)


def _exactly(stream: BinaryIO, count: int) -> bytes:
    parts = []
    for size in _chunks(count):
        part = stream.read(size)
        parts.append(part)
        if len(part) != size:
            raise EOFError("cut short")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _skip(stream: BinaryIO, count: int) -> None:
    for size in _chunks(count):
        _exactly(stream, size)


def _skip_fragments(stream: BinaryIO, order: Literal["little", "big"]) -> None:
    """Pass over a compressed image up to its end."""
    for _ in range(_MAX_ELEMENTS):
        head = _exactly(stream, 8)
        tag, length = _tag(head[:4], order == "little"), int.from_bytes(head[4:], order)
        if tag == _SEQUENCE_END:
            return
        if tag != _ITEM or length == _UNDEFINED:
            raise ValueError("no fragment of an image")
        _skip(stream, length)
    raise ValueError("too many fragments")


def _chunks(count: int) -> Iterator[int]:
    """Never more at once than a damaged length may waste."""
    while count > 0:
        yield min(count, _MAX_VALUE_BYTES)
        count -= _MAX_VALUE_BYTES


def _value(kind: str, data: bytes, is_little: bool) -> Any:
    if kind in _NUMBERS:
        size = struct.calcsize(_NUMBERS[kind])
        if len(data) % size:
            raise ValueError("no whole numbers")
        found = list(struct.unpack(f"{'<' if is_little else '>'}{len(data) // size}{_NUMBERS[kind]}", data))
    elif kind.startswith("O") or kind == "UN":
        return data or None
    else:
        text = data.decode("latin-1").strip(" \0")
        parts = ([text] if kind in _TEXTS_OF_ONE else text.split("\\")) if text else []
        convert = {"DS": _decimal, "IS": _integer}.get(kind, lambda part: part.strip(" \0"))
        found = [convert(part) for part in parts]
    return None if not found else found[0] if len(found) == 1 else found


def _decimal(text: str) -> float | None:
    return float(text) if text.strip() else None


def _integer(text: str) -> int | None:
    if not text.strip():
        return None
    number = float(text) if "." in text or "e" in text.lower() else int(text)
    if number != int(number):
        raise ValueError("no whole number")
    return int(number)


__all__ = ["INSTALL", "Elements", "kind_of", "name_of_uid", "read_data_set", "read_meta"]

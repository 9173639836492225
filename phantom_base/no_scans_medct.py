"""What a file is that is not a scan, so that a message can say the cause: a page, a pointer, an archive, or nothing."""

from collections.abc import Callable

from .byte_sources_medct import GZIP_MAGIC, HEAD_BYTES, ByteSource, inflated_head

_AGAIN = "Copy or download it again"
_UNPACK = "Unpack it and pass what it holds"

_LFS = "Fetch the file itself: git lfs pull"
_LOGGED_IN = "Download it again, logged in"
_NO_PICTURE = "Pass the scan, not a picture of it"

STANDS_FOR_A_FILE = (_AGAIN, _LFS, _LOGGED_IN)
"""Remedies of what lies in the place of another file."""

_KINDS: tuple[tuple[Callable[[bytes], bool], str, str], ...] = (
    (lambda head: not head, "empty", _AGAIN),
    (
        lambda head: head.startswith(b"version https://git-lfs.github.com/spec/"),
        "a Git LFS pointer, which stands for a file that was not downloaded",
        _LFS,
    ),
    (
        lambda head: head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html", b"<head")),
        "an HTML page, as servers send for a login or an error",
        _LOGGED_IN,
    ),
    (lambda head: not head.strip(b"\0"), "nothing but zeros where it begins", _AGAIN),
    (lambda head: head.startswith(b"%PDF"), "a PDF", "Pass the scan"),
    (lambda head: head.startswith(b"\x89PNG"), "a PNG picture", _NO_PICTURE),
    (lambda head: head.startswith(b"\xff\xd8\xff"), "a JPEG picture", _NO_PICTURE),
    (lambda head: head.startswith((b"II*\0", b"MM\0*")), "a TIFF picture", "Pass the scan with its geometry"),
    (lambda head: head.startswith(b"GIF8"), "a GIF picture", _NO_PICTURE),
    (lambda head: head.startswith(b"BM") and head[6:10] == bytes(4), "a bitmap", _NO_PICTURE),
    (lambda head: head[257:262] == b"ustar", "a tar archive", _UNPACK),
    (
        lambda head: head.startswith((b"PK\3\4", b"7z\xbc\xaf\x27\x1c", b"Rar!", b"\xfd7zXZ", b"BZh")),
        "an archive",
        _UNPACK,
    ),
    (lambda head: head.startswith((b"MZ", b"\x7fELF")), "a program", "Pass the scan"),
    (lambda head: head.startswith(b"\x89HDF"), "an HDF5 file", "Write it as NIfTI"),
    (lambda head: head.startswith(b"\x93NUMPY"), "a NumPy array", "Load it and pass the array with `affine=`"),
    (lambda head: head.lstrip()[:1] in (b"{", b"[") and _is_text(head), "a JSON text", "Pass the scan"),
    (lambda head: head.lstrip().startswith(b"<?xml"), "an XML text", "Pass the scan"),
    (lambda head: _is_text(head), "a text", "Pass the scan"),
)


def _is_text(head: bytes) -> bool:
    try:
        text = head[: HEAD_BYTES - 4].decode("utf-8", errors="strict" if len(head) < HEAD_BYTES - 4 else "ignore")
    except UnicodeDecodeError:
        return False
    return all(letter.isprintable() or letter in "\t\r\n\f" for letter in text) and len(text) > len(head) // 4


def what_is(source: ByteSource) -> tuple[str, str] | None:
    """What a file is and the remedy, by its content, and for voxels without a header by its name; none if unknown."""
    head = source.head(HEAD_BYTES)
    if head.startswith(GZIP_MAGIC):
        inner = inflated_head(source, HEAD_BYTES)
        if inner[128:132] == b"DICM":
            return "a DICOM file in gzip", _UNPACK
        found = next((what for is_kind, what, _ in _KINDS if inner and is_kind(inner)), None)
        if found is not None:
            return f"{found} in gzip", _UNPACK
    for is_kind, what, remedy in _KINDS:
        if is_kind(head):
            return what, remedy
    if source.name.lower().removesuffix(".gz").endswith(".img"):
        return "voxels without their header", "Pass the path of the .hdr file, with this one beside it"
    return None

"""Identifies files by their first bytes, not their names, in words for error messages."""

import zipfile
from pathlib import Path

NPZ = "a file of NumPy arrays (.npz)"
SAFETENSORS = "a file of safetensors"
PICKLE = "a pickle, which is not opened because it could run code"
TORCH = "a file of PyTorch, whose pickle is not opened because it could run code"
CUT_ZIP = "a zip archive that is cut short or damaged"

COMPRESSED = {  # first bytes: (the program that compressed, the one that decompresses)
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}

_PICTURE = "a single picture"
_BEGINNINGS = {
    b"\x93NUMPY": "a single NumPy array (.npy)",
    **dict.fromkeys((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), PICKLE),
    **{start: f"compressed with {writer}" for start, (writer, _) in COMPRESSED.items()},
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"PAR1": "a Parquet table",
    **dict.fromkeys((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8"), _PICTURE),
    b"version https://git-lfs": "a pointer of Git LFS, whose file was not fetched (git lfs pull)",
    **dict.fromkeys((b"<!doctype html", b"<html"), "a web page"),
    b"<?xml": "an XML text, such as a server's error message",
}


def kind_of(path: Path) -> str | None:
    """The kind of a file; None: a kind that is not listed here, such as a tar.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(32)
    if not head:
        return "an empty file"
    if head.startswith(b"PK\x03\x04"):
        return _zipped(path)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return SAFETENSORS
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return _PICTURE
    text = head.lstrip().lower()
    for start, words in _BEGINNINGS.items():
        if head.startswith(start) or text.startswith(start):
            return words
    return None


def _zipped(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # zipfile raises errors of nearly any kind on damage
        return CUT_ZIP
    if any(name.endswith("/data.pkl") for name in names):
        return TORCH
    return NPZ if any(name.endswith(".npy") for name in names) else "a zip archive"

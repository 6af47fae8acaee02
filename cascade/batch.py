"""What code knows of a batch's keys, which the table in `cascade/__init__.py` describes.

A stage that writes or reads a new kind of key adds it to that table and to `KINDS`.
"""

import re
from typing import Any, NamedTuple

Batch = dict[str, Any]


class Kind(NamedTuple):
    """A key that is not a picture.

    Attributes:
        source: what the key is computed from. A source is dropped as a whole (classifier-free
            guidance), with every key computed from it.
        setting: the configuration value that gives its size; None: the size is free.
    """

    source: str
    setting: str | None = None


KINDS = {
    "tokens": Kind("caption"),
    "label": Kind("caption"),
    "text": Kind("caption", "text.size"),
    "clip_text": Kind("caption", "clip.model.dim"),
    "clip_image": Kind("clip_image", "clip.model.dim"),
}


def source(key: str) -> str:
    """What a key is computed from: the caption, or the key itself."""
    return KINDS[key].source if key in KINDS else key


def image_key(size: int) -> str:
    """The key of pictures of this side, in pixels."""
    return f"image_{size}"


# Keys of the size of a picture's file, the corner of its crop, and its size in the bucket, each
# [b, 2] (SDXL, section 2.2).
FRAMING = ("original_size", "crop_corner", "target_size")


def frame_key(size: int) -> str:
    """The key of the height and width that the base stage of this size is to paint."""
    return f"frame_{size}"


def hint_key(name: str, size: int) -> str:
    """The key of pictures of a condition that ControlNets read, of this side in pixels."""
    return f"control/{name}_{size}"


def weight_key(name: str) -> str:
    """The key of the weights of a condition in sampling."""
    return f"control/{name}_weight"


def image_size(key: str) -> int | None:
    """The side in pixels of a key's pictures; None: the key holds no pictures."""
    found = re.fullmatch(r"image_(\d+)", key)
    return int(found[1]) if found else None

"""COCO-30k: the exact protocol that `coco:DIR` stands for, as prompts and as a reference.

DIR is a local copy of `annotations/captions_val2014.json` and `val2014/` from cocodataset.org.
Papers (GLIDE, Imagen, Karlo) use "30,000 captions of the validation set" without saying which.
Here, for a seed (0):

* Prompts: the 30,000 of the 40,504 images of val2014 with the smallest SHA-256 of "SEED image ID",
  and for each the non-empty caption with the smallest SHA-256 of "SEED caption ID", where ID is the
  annotation's; ordered by image id. Hashes, unlike a library's random generator, never change.
* Pictures: one for each caption, 256 px, PNG.
* Reference: all of val2014; the centred square of each picture is resized to 256 px (Pillow's
  bicubic, which is antialiased) on the fly.
* FID with the clean resizing to 299 px (`features.CLEAN`); the guidance scale is reported.
"""

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cascade.errors import UserError
from cascade.eval.pictures.prompts import Prompt, read_prompts
from cascade.eval.pictures.sets import PictureSet, listed, picture_set
from cascade.formats.texts import BadText, decoded, one_line

log = logging.getLogger(__name__)

PREFIX = "coco:"
COUNT, SIZE = 30_000, 256

_CAPTIONS, _PICTURES = "annotations/captions_val2014.json", "val2014"


def prompts(folder: Path, count: int = COUNT, seed: int = 0) -> list[Prompt]:
    """One caption of each selected image, with `image_id` and `caption_id`.

    Raises:
        UserError: the copy is missing, damaged or has fewer images.
    """
    found = _annotations(folder)
    captions: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation in found["annotations"]:
        if one_line(annotation["caption"]):
            captions[annotation["image_id"]].append(annotation)
    if empty := len(found["annotations"]) - sum(map(len, captions.values())):
        log.warning("%s: %d empty captions are ignored", folder / _CAPTIONS, empty)
    if len(captions) < count:
        raise UserError(f"{folder} has captions of {len(captions):,} images: copy all {count:,}")
    drawn = sorted(captions, key=lambda image: _order(seed, "image", image))[:count]
    chosen = [
        min(captions[image], key=lambda caption: _order(seed, "caption", caption["id"]))
        for image in sorted(drawn)
    ]
    return [
        Prompt(one_line(c["caption"]), {"image_id": c["image_id"], "caption_id": c["id"]})
        for c in chosen
    ]


def reference(folder: Path, progress: Callable[[int, int], None] | None = None) -> PictureSet:
    """All images of the annotations, at 256 px.

    Raises:
        UserError: the copy is missing, or its pictures are not those of the annotations.
    """
    asked = {Path(image["file_name"]).stem for image in _annotations(folder)["images"]}
    there = listed(folder / _PICTURES).pictures.keys()
    if differ := asked ^ there:
        what = "lacks" if asked - there else "has, in addition to those of the annotations,"
        raise UserError(
            f"{folder / _PICTURES} {what} {len(differ)} pictures, such as {min(differ)}: copy "
            "exactly the pictures of val2014"
        )
    return picture_set(folder / _PICTURES, square=SIZE, progress=progress)


def departures(pictures: PictureSet) -> list[str]:
    """Warnings about a set that deviates from the protocol."""
    found = []
    if len(pictures) != COUNT:
        found.append(f"COCO-30k has {COUNT:,} pictures")
    if set(pictures.sizes) != {(SIZE, SIZE)}:
        found.append(f"COCO-30k has pictures of {SIZE} px")
    return found


def _annotations(folder: Path) -> dict[str, Any]:
    file = folder / _CAPTIONS
    try:
        found = json.loads(decoded(file.read_bytes()))
        whole = all({"file_name", "id"} <= image.keys() for image in found["images"])
        whole &= all({"id", "image_id", "caption"} <= a.keys() for a in found["annotations"])
    except FileNotFoundError:
        raise UserError(f"{file} is not there: give a folder with it and {_PICTURES}/") from None
    except BadText as error:
        raise UserError(f"{file} is {error}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise UserError(f"{file} is damaged, or not COCO's captions: copy it again")
    return found


def _order(seed: int, what: str, number: int) -> str:
    return hashlib.sha256(f"{seed} {what} {number}".encode()).hexdigest()


def prompts_of(given: str) -> list[Prompt]:
    """The prompts of a file, or of a copy of COCO (`coco:DIR`)."""
    if given.startswith(PREFIX):
        return prompts(Path(given.removeprefix(PREFIX)))
    return read_prompts(Path(given))

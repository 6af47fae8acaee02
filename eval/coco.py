"""COCO-30k, written down: what `coco:DIR` means as prompts and as a reference.

A local copy has `annotations/captions_val2014.json` and `val2014/`, as cocodataset.org gives them
out. Papers say "30,000 captions of the validation set" (GLIDE, Imagen, Karlo), and not which.
Here, for a seed (0):

* Images: the 30,000 of the 40,504 of val2014 with the least SHA-256 of "SEED image ID", and of each
  the one caption with the least SHA-256 of "SEED caption ID", ID being the annotation's, of those
  that are not empty; in the order of image ids. No library's generator is in it, so that nobody's
  update can change it.
* Pictures: one for each caption, at 256 px, PNG.
* Reference: all of val2014, the centred square cut out of each picture and resized to 256 px
  (Pillow's bicubic, which is antialiased), made on the way and kept nowhere.
* FID by the clean resizing to 299 px (`features.CLEAN`), and the guidance scale told.
"""

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cascade.errors import UserError
from cascade.eval.prompts import Prompt
from cascade.eval.sets import PictureSet, listed, picture_set
from cascade.texts import BadText, decoded, one_line

log = logging.getLogger(__name__)

PREFIX = "coco:"
COUNT, SIZE = 30_000, 256

_CAPTIONS, _PICTURES = "annotations/captions_val2014.json", "val2014"


def prompts(folder: Path, count: int = COUNT, seed: int = 0) -> list[Prompt]:
    """One caption of each image drawn, with `image_id` and `caption_id`.

    Raises:
        UserError: there is no such copy, or it has fewer images.
    """
    found = _annotations(folder)
    captions: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation in found["annotations"]:
        if one_line(annotation["caption"]):
            captions[annotation["image_id"]].append(annotation)
    if empty := len(found["annotations"]) - sum(map(len, captions.values())):
        log.warning("%s: %d captions are empty, and passed over", folder / _CAPTIONS, empty)
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
    """Every image of the annotations, at 256 px.

    Raises:
        UserError: there is no such copy, or its pictures are others.
    """
    asked = {Path(image["file_name"]).stem for image in _annotations(folder)["images"]}
    there = listed(folder / _PICTURES).pictures.keys()
    if differ := asked ^ there:
        what = "lacks" if asked - there else "has beside those of the annotations"
        raise UserError(
            f"{folder / _PICTURES} {what} {len(differ)} pictures, such as {min(differ)}"
        )
    return picture_set(folder / _PICTURES, square=SIZE, progress=progress)


def departures(pictures: PictureSet) -> list[str]:
    """What a set does not keep of the protocol, to be said beside its numbers."""
    said = []
    if len(pictures) != COUNT:
        said.append(f"COCO-30k has {COUNT:,} pictures")
    if set(pictures.sizes) != {(SIZE, SIZE)}:
        said.append(f"COCO-30k has pictures of {SIZE} px")
    return said


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
        raise UserError(f"{file} is damaged, or no captions of COCO's: copy it again")
    return found


def _order(seed: int, what: str, number: int) -> str:
    return hashlib.sha256(f"{seed} {what} {number}".encode()).hexdigest()

"""Captions of scenes of the level "language", apart by split.

With one object there are few meanings, so a tenth of all texts is held out instead; with several,
the meaning is (see `generate`).
"""

import zlib

import numpy as np

from cascade.data.scenes.captions import Scene
from cascade.data.scenes.language import Asked, Wording, worded

PARAPHRASES = 8  # of each scene, in its JSON
_NOVEL = 0.5  # probability of each novel choice, where a caption has any


def _asked(scene: Scene) -> Asked:
    """What captions of a scene ask for."""
    sizes = [o.size for o in scene.objects]
    larger = sizes.index("large") if scene.names_size else None
    return Asked([(o.color, o.shape) for o in scene.objects], scene.relation, larger)


def _apart(scene: Scene, text: str, split: str) -> bool:
    """Whether a caption may be in a split."""
    if split == "unseen" or len(scene.objects) > 1:
        return True
    return (zlib.crc32(text.encode()) % 10 == 0) == (split == "val")


def wording(scene: Scene, split: str, rng: np.random.Generator) -> Wording:
    """Draw the caption of a scene; in the splits but "train" half of them have something novel."""
    while True:
        novel = _NOVEL if split != "train" and rng.random() < 0.5 else 0.0
        found = worded(_asked(scene), rng, novel)
        if bool(found.novel) == bool(novel) and _apart(scene, found.text, split):
            return found


def paraphrases(scene: Scene, split: str, rng: np.random.Generator) -> list[str]:
    """Draw `PARAPHRASES` captions of a scene, novel words and forms among them."""
    found: list[str] = []
    while len(found) < PARAPHRASES:
        text = worded(_asked(scene), rng, _NOVEL).text
        found += [text] if _apart(scene, text, split) else []
    return found

"""Edits of pictures with a trained cascade: each is one function on a `Cascade` and a batch.

* `embeddings`: great circles, text differences, principal components (unCLIP, section 3).
* `inversion`: the noise that leads to a given picture.
* `known`: solvers that start from a picture, or keep a part of it (SDEdit, RePaint).
* `windows`: pictures that are larger than the network's own size.
* `canvas`: between a user's picture and those that the stages see.
* `operations`: the edits.
"""

from cascade.edit.embeddings import slerp, text_difference

__all__ = ["slerp", "text_difference"]

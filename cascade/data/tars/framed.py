"""The bucket of each picture of a corpus."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int16

from cascade.buckets import Buckets, Shape
from cascade.data.items import Bucket
from cascade.data.tars.corpus import Corpus
from cascade.data.transforms import Pictures
from cascade.errors import UserError

log = logging.getLogger(__name__)


class Framed(NamedTuple):
    """The pictures of a corpus in buckets.

    Attributes:
        of: the buckets.
        shapes: their heights and widths, in pixels of the largest size.
        labels: the number of each picture's bucket, by tar.
    """

    of: Buckets
    shapes: Sequence[Shape]
    labels: Sequence[Int16[np.ndarray, "_"]]

    @classmethod
    def of_corpus(cls, buckets: Buckets, corpus: Corpus, pictures: Pictures) -> "Framed":
        """Give each picture the bucket of nearest aspect ratio that is open (`Buckets.merged`).

        Raises:
            UserError: an index without sides, or pictures that are cropped otherwise, are joined
                by pictures of conditions, or have sizes at which the buckets are no whole pixels.
        """
        if not pictures.sizes or pictures.crop or pictures.conditions:
            raise UserError(
                "data.buckets frames whole pictures: leave it out where there are none, where "
                "data.pictures.crop is set, or with conditions of a ControlNet"
            )
        for size in pictures.sizes:
            buckets.at(size)
        shapes = buckets.at(pictures.largest)
        nearest = [buckets.nearest(*sides.T) for sides in corpus.sides()]
        counts = np.bincount(np.concatenate(nearest), minlength=len(shapes))
        goes = buckets.merged(counts.tolist())
        held = np.bincount(goes, weights=counts, minlength=len(shapes)).astype(int)
        for b, (shape, count) in enumerate(zip(buckets.shapes, held)):
            if counts[b] and goes[b] != b:
                log.warning(
                    "bucket %dx%d has %d pictures, less than a batch of %d: they go to %dx%d",
                    *(shape[1], shape[0], counts[b], buckets.batch),
                    *buckets.shapes[goes[b]][::-1],
                )
            elif count:
                log.info("bucket %dx%d: %d pictures", shape[1], shape[0], count)
        return cls(buckets, shapes, [goes[own].astype(np.int16) for own in nearest])

    def bucket(self, tar: int, place: int) -> Bucket:
        """Return the bucket of a picture."""
        return Bucket(self.of, self.shapes[self.labels[tar][place]])

"""Codecs: how a stage's x0 is read from a batch, and written back into one.

A codec names the key that its stage writes (`writes`), encodes that key to x0 of about unit
variance, decodes x0 to the key, and tells the shape to sample. `fit` takes statistics of training
batches before the first step.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from cascade.batch import Batch, frame_key, image_key
from cascade.buckets import Buckets
from cascade.errors import UserError


class Pixels(nn.Module):
    """Pictures in [-1, 1], unchanged.

    Args:
        size: side in pixels; written as `image_{size}`.
        low: side of the low-resolution picture of a super-resolution stage. The shape to sample
            follows from that of `image_{low}`, which may be larger than in training.
        buckets: the shapes that a base stage is trained in, and so may be asked for by
            `frame_{size}` (`asked`); None: squares alone.

    Raises:
        UserError: the buckets are no whole pixels at this size.
    """

    factor = 1  # side of the square of pixels for each position of x0

    def __init__(self, size: int, low: int | None = None, buckets: Buckets | None = None):
        super().__init__()
        self.size, self.low = size, low
        self.writes = image_key(size)
        self.shapes = buckets.at(size) if buckets else [(size, size)]
        self.buckets = buckets

    def fit(self, batches: Iterable[Batch]) -> None:
        """Does nothing: pixels need no statistics."""

    def encode(self, batch: Batch) -> Float[Tensor, "b 3 h w"]:
        return batch[self.writes]

    def decode(self, x0: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        return x0.clamp(-1, 1)

    def shape(self, batch: Batch) -> tuple[int, ...]:
        if self.low is None:
            frame = batch.get(frame_key(self.size))
            return 3, *((self.size, self.size) if frame is None else frame[0].tolist())
        sides = batch[image_key(self.low)].shape[2:]
        return 3, *(side * self.size // self.low for side in sides)


class Embedding(nn.Module):
    """CLIP embeddings, scaled for diffusion. Decoding normalises those of unit norm again.

    By default each dimension gets zero mean and unit variance, by the mean and standard deviation
    of the training embeddings (as in Karlo), which are buffers and so part of the checkpoint. With
    `deviation`, the embedding is multiplied by one number instead, which gives its entries that
    root mean square.

    Args:
        size: d, the size of the embedding.
        key: the batch key that is read in training and written in sampling.
        deviation: of each of the d numbers. unCLIP's is 0.5375, that of pictures in [-1, 1]: a
            factor of 17.2 at d = 1024 (appendix C), 14.9 at 768. DALLE2-pytorch's is 1: a factor of
            the root of d.
        unit: whether the embeddings have unit norm; otherwise they are raw (Karlo, Kandinsky).
    """

    def __init__(
        self,
        size: int,
        key: str = "clip_image",
        deviation: float | None = None,
        unit: bool = True,
    ):
        super().__init__()
        self.size, self.writes, self.fitted = size, key, deviation is None
        self.unit = unit
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.full((size,), size**-0.5 / (deviation or 1.0)))

    def fit(self, batches: Iterable[Batch]) -> None:
        """Takes the mean and standard deviation of each dimension, unless `deviation` was given.

        Raises:
            UserError: the embeddings have another size.
        """
        z = torch.cat([batch[self.writes] for batch in batches]).double()
        _check_size(z, self.size)
        if not self.fitted:
            return
        self.mean.copy_(z.mean(0))
        self.std.copy_(z.std(0).clamp(min=1e-4))

    def encode(self, batch: Batch) -> Float[Tensor, "b d"]:
        return (batch[self.writes] - self.mean) / self.std

    def decode(self, x0: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        z = x0 * self.std + self.mean
        return F.normalize(z, dim=1) if self.unit else z

    def shape(self, batch: Batch) -> tuple[int, ...]:
        return (self.size,)


class Tokens(nn.Module):
    """CLIP image embeddings as 1 + k tokens (unCLIP, section 2.2: k = 319 of 1024, 1024 buckets).

    The first token is the dot product with the text embedding; the others are principal components,
    by decreasing variance. The buckets of a token are equally wide and cover `REACH` standard
    deviations on either side of the mean; values beyond fall into the outermost. A bucket decodes
    to its centre, so a component within reach is off by at most REACH / buckets standard
    deviations. The dot product conditions the other tokens and is not decoded. Axes and buckets are
    part of the checkpoint.

    Args:
        size: d, the size of the embedding.
        components: k.
        buckets: number of values of each token.
        share: fraction of the variance that the components must retain. The paper's lose less than
            1 %.

    Raises:
        UserError: more components than dimensions.
    """

    REACH = 4.0

    def __init__(self, size: int, components: int, buckets: int, share: float = 0.99):
        super().__init__()
        if components > size:
            raise UserError(
                f"net.components={components}, but the embeddings have {size} numbers: set "
                f"net.components={size} at most"
            )
        self.size, self.buckets, self.share = size, buckets, share
        self.writes = "clip_image"
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("axes", torch.eye(components, size))
        self.register_buffer("low", torch.full((1 + components,), -1.0))  # where the buckets begin
        self.register_buffer("width", torch.full((1 + components,), 2 / buckets))

    def fit(self, batches: Iterable[Batch]) -> None:
        """Takes axes and buckets in one pass, which keeps only sums, in float64.

        Args:
            batches: with `clip_image` and `clip_text`.

        Raises:
            UserError: embeddings of another size, or the components retain less than `share`.
        """

        def rows() -> Iterator[Tensor]:
            for batch in batches:
                _check_size(batch[self.writes], self.size)
                yield torch.cat([self._dot(batch), batch[self.writes]], 1)

        mean, covariance = moments(rows())
        variance, axes = principal(covariance[1:, 1:])
        components = len(self.axes)
        kept = variance.cumsum(0) / variance.sum()
        if kept[components - 1] < self.share:
            raise UserError(
                f"{components} of {self.size} components retain {kept[components - 1]:.2%} of the "
                f"variance, not {self.share:.2%}: set net.components="
                f"{int((kept < self.share).sum()) + 1}, or lower stage.codec.share"
            )
        variance = torch.cat([covariance[:1, 0], variance[:components]])
        reach = self.REACH * variance.sqrt().clamp(min=1e-6)
        self.mean.copy_(mean[1:])
        self.axes.copy_(axes[:components])
        self.low.copy_(torch.cat([mean[:1], torch.zeros_like(reach[1:])]) - reach)
        self.width.copy_(2 * reach / self.buckets)

    def encode(self, batch: Batch) -> Int64[Tensor, "b t"]:
        """Returns bucket numbers; reads `clip_image` and `clip_text`."""
        z = batch[self.writes]
        with torch.autocast(z.device.type, enabled=False):  # bfloat16 is coarser than the buckets
            components = (z.to(self.mean) - self.mean) @ self.axes.T
            y = torch.cat([self._dot(batch).to(self.mean), components], 1)
        return ((y - self.low) / self.width).long().clamp(0, self.buckets - 1)

    def decode(self, x0: Int64[Tensor, "b t"]) -> Float[Tensor, "b d"]:
        y = self.low + (x0 + 0.5) * self.width
        with torch.autocast(y.device.type, enabled=False):
            return F.normalize(self.mean + y[:, 1:] @ self.axes, dim=1)

    def shape(self, batch: Batch) -> tuple[int, ...]:
        return (len(self.low),)

    def _dot(self, batch: Batch) -> Float[Tensor, "b 1"]:
        return (batch[self.writes] * batch["clip_text"]).sum(1, keepdim=True)


def _check_size(z: Float[Tensor, "b d"], size: int) -> None:
    if (found := z.shape[1]) != size:
        raise UserError(
            f"clip.model.dim={size}, but the embeddings have {found} numbers: set "
            f"clip.model.dim={found}, or embeddings to those of this CLIP"
        )


def moments(
    rows: Iterable[Float[Tensor, "_ d"]],
) -> tuple[Float64[Tensor, " d"], Float64[Tensor, "d d"]]:
    """Mean and covariance of rows, in one pass that keeps only sums, in float64."""
    count, total, second = 0, 0, 0
    for some in rows:
        y = some.double()
        count, total, second = count + len(y), total + y.sum(0), second + y.T @ y
    mean = total / count
    return mean, second / count - torch.outer(mean, mean)


def principal(
    covariance: Float64[Tensor, "d d"],
) -> tuple[Float64[Tensor, " d"], Float64[Tensor, "d d"]]:
    """Principal components: variances in decreasing order, and their axes [axis, d].

    The sign of an axis is free; it is chosen so that the entry of largest magnitude is positive.
    """
    variance, axes = torch.linalg.eigh(covariance)
    variance, axes = variance.flip(0).clamp(min=0), axes.T.flip(0)
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    return variance, axes * largest.sign()

"""Operations on CLIP embeddings (unCLIP, sections 3 and 4), which need no network.

Embeddings and noise lie on or near a sphere, so they are interpolated along great circles: points
on a straight line between two of them would be too short.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def slerp(
    a: Float[Tensor, "b *d"], b: Float[Tensor, "b *d"], share: float
) -> Float[Tensor, "b *d"]:
    """Spherical interpolation from a (share 0) to b (share 1).

    It is linear where a and b are parallel. For CLIP embeddings [b, d] and for the noise
    [b, c, h, w] that DDIM inversion returns.
    """
    flat = [F.normalize(x.flatten(1), dim=1) for x in (a, b)]
    angle = (flat[0] * flat[1]).sum(1).clamp(-1, 1).arccos().view(-1, *[1] * (a.ndim - 1))
    sine = angle.sin()
    straight = sine < 1e-7
    sine = torch.where(straight, 1.0, sine)
    of_a = torch.where(straight, 1 - share, ((1 - share) * angle).sin() / sine)
    of_b = torch.where(straight, share, (share * angle).sin() / sine)
    return of_a * a + of_b * b


def text_difference(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "b d"],
    before: Float[Tensor, "b d"],
    share: float,
) -> Float[Tensor, "b d"]:
    """Rotate an image embedding towards the difference of two captions (section 3.3).

    Args:
        image: CLIP embedding of the picture to change, of unit norm or raw; its norm stays.
        text: embedding of a caption of the desired picture.
        before: embedding of a caption of the present picture, or of an empty one ("a photo").
        share: of the rotation towards text - before; the paper uses up to 0.25 or 0.5.
    """
    return slerp(image, _as_long(text - before, image), share)


def along(
    z: Float[Tensor, "b d"], mean: Float[Tensor, " d"], axes: Float[Tensor, "k d"]
) -> Float[Tensor, "b d"]:
    """Reconstruct embeddings from their components along some axes (section 4, figure 7).

    Args:
        z: of unit norm or raw; the norm stays.
        mean, axes: of the embeddings that the components were computed from (`codecs.moments`,
            `codecs.principal`).
    """
    centred = z - mean
    return _as_long(mean + centred @ axes.T @ axes, z)


def _as_long(a: Float[Tensor, "b d"], z: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    """The direction of a, with the norm of z."""
    return F.normalize(a, dim=1) * z.norm(dim=1, keepdim=True)

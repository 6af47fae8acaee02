"""Interpolate CLIP embeddings and noise along great circles (unCLIP, section 3).

Both lie on or near a sphere, so points on a straight line between two of them would be too short.
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
        image: unit-norm CLIP embedding of the picture to change.
        text: embedding of a caption of the desired picture.
        before: embedding of a caption of the present picture, or of an empty one ("a photo").
        share: of the rotation towards text - before; the paper uses up to 0.25 or 0.5.
    """
    return slerp(image, F.normalize(text - before, dim=1), share)

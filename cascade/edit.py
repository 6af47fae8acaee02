"""Moving about in embeddings and in noise (unCLIP, section 3): on great circles.

Both lie on spheres, or near them: a straight line would lead through points that are too short.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def slerp(
    a: Float[Tensor, "b *d"], b: Float[Tensor, "b *d"], share: float
) -> Float[Tensor, "b *d"]:
    """From a at share 0 to b at share 1; a straight line where they point the same or opposite way.

    For CLIP embeddings [b, d], and for the noise [b, c, h, w] that DDIM inversion gives.
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
    """An image embedding, turned by what one caption says and another does not (section 3.3).

    Args:
        image: unit-norm CLIP embedding of the picture to change.
        text: of a caption of what it is to become.
        before: of a caption of what it is, or of one that says nothing ("a photo").
        share: of the way towards text - before; the paper ends at 0.25 to 0.5.
    """
    return slerp(image, F.normalize(text - before, dim=1), share)

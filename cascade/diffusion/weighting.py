"""Loss weights: functions of logsnr that multiply |x0_hat - x0|^2, whatever the network predicts.

In these terms, plain MSE on eps has the weight SNR, on v 1 + SNR, on x0 1.
"""

from jaxtyping import Float
from torch import Tensor


def min_snr(logsnr: Float[Tensor, "*b"], *, gamma: float = 5.0) -> Float[Tensor, "*b"]:
    """min(SNR, gamma) (Min-SNR, 2303.09556)."""
    return logsnr.exp().clamp(max=gamma)


def clipped_v(logsnr: Float[Tensor, "*b"], *, gamma: float = 5.0) -> Float[Tensor, "*b"]:
    """min(1 + SNR, gamma): the weight of plain MSE on v, clipped as in Min-SNR.

    Unlike min(SNR, gamma) it keeps a weight of 1 at the noisiest levels, where the condition is the
    only thing to learn from.
    """
    return (1 + logsnr.exp()).clamp(max=gamma)


def x0(logsnr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """1: the loss in the space of x0."""
    return logsnr.new_ones(logsnr.shape)


def eps(logsnr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """SNR: the loss in the space of the noise."""
    return logsnr.exp()


def flow(logsnr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """(1 + SNR^1/2)^2: the loss in the space of the velocity of straight paths, x0 - eps.

    At time t, with SNR = (t / (1 - t))^2, it is 1 / (1 - t)^2 (JiT, 2511.13720).
    """
    return (1 + (logsnr / 2).exp()).square()

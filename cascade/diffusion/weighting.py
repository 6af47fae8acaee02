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

"""Loss weights: functions of logsnr that multiply |x0_hat - x0|^2, whatever the network predicts.

In these terms plain MSE on eps is SNR, on v it is 1 + SNR, on x0 it is 1.
"""

from jaxtyping import Float
from torch import Tensor


def min_snr(logsnr: Float[Tensor, "*b"], *, gamma: float = 5.0) -> Float[Tensor, "*b"]:
    """min(SNR, gamma) (Min-SNR, 2303.09556)."""
    return logsnr.exp().clamp(max=gamma)


def clipped_v(logsnr: Float[Tensor, "*b"], *, gamma: float = 5.0) -> Float[Tensor, "*b"]:
    """min(1 + SNR, gamma): what plain MSE on v weighs, clipped as Min-SNR clips.

    Unlike min(SNR, gamma) it keeps a weight of 1 at the noisiest levels, where all that a network
    can learn is what the condition says.
    """
    return (1 + logsnr.exp()).clamp(max=gamma)

"""Training on CUDA: autocast to bfloat16; parameters, gradients and moments stay in float32."""

from lightning.pytorch.plugins.precision import MixedPrecision, Precision


class Bfloat16(MixedPrecision):
    """Lightning's, which also clips gradients for fused optimizers.

    It refuses them for the sake of a scaler of losses, and bfloat16 has none.

    Args:
        device: type of the device.
    """

    clip_gradients = Precision.clip_gradients

    def __init__(self, device: str = "cuda"):
        super().__init__("bf16-mixed", device)

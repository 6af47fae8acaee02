"""The sizes of a CLIP that is trained here, and open_clip's configuration of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cascade.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """The size of a CLIP.

    Args:
        image_size: side of the pictures, in pixels.
        dim: d, the size of the embeddings.
        vision_layers: four numbers for a residual network, one for a vision transformer. At 32
            pixels a residual network learns much faster.
        vision_width: width of either.
        text_width, text_layers, text_heads: sizes of the text transformer.
        length: context length, with start and end tokens.
        patch: side of the vision transformer's patches, in pixels.
        head_width: channels per head of the vision tower, or all channels if there are fewer.

    Raises:
        UserError: the heads do not divide a width, or the patches a picture.
    """

    image_size: int
    dim: int
    vision_layers: int | Sequence[int]
    vision_width: int
    text_width: int
    text_layers: int
    text_heads: int
    length: int = 77
    patch: int = 16
    head_width: int = 64

    def __post_init__(self):
        fits = [("text_heads", "text_width")]
        if isinstance(self.vision_layers, int):
            fits += [("patch", "image_size")]
            if self.head_width < self.vision_width:
                fits += [("head_width", "vision_width")]
        for part, whole in fits:
            if getattr(self, whole) % getattr(self, part):
                raise UserError(
                    f"clip.model.{part}={getattr(self, part)} does not divide "
                    f"clip.model.{whole}={getattr(self, whole)}: change one of them"
                )

    def model_config(self) -> dict[str, Any]:
        """The arguments of `open_clip.CLIP`."""
        vision = {
            "image_size": self.image_size,
            "layers": self.vision_layers,
            "width": self.vision_width,
            "head_width": min(self.head_width, self.vision_width),
            "patch_size": self.patch,
        }
        text = {
            "context_length": self.length,
            "width": self.text_width,
            "layers": self.text_layers,
            "heads": self.text_heads,
        }
        return {"embed_dim": self.dim, "vision_cfg": vision, "text_cfg": text}

    def build(self) -> Any:
        """An untrained `open_clip.CLIP`."""
        import open_clip

        return open_clip.CLIP(**self.model_config())

"""Overrides of the smallest trainings, which several tests run."""

SR = [
    "stage=sr256", "size=16", "low=8", "crop=null", "batch=4", "warmup=8", "grids=0",
    "net.net.channels=8", "net.net.multipliers=[1]", "net.net.blocks=1", "net.net.patch=2",
    "net.net.embed=16",
]  # fmt: skip

DECODER = [
    "stage=decoder_text", "text=clip_tiny", "size=16", "batch=4", "warmup=8", "grids=0",
    "net.channels=8", "net.embed=16", "net.blocks=1", "net.width=32", "net.head_channels=8",
    "clip.model.text_width=16", "clip.model.text_layers=1", "clip.model.vision_width=8",
]  # fmt: skip

EMBEDDED = [
    *(f"clip.model.{value}" for value in ("vision_layers=[1,1,1,1]", "vision_width=8")),
    *(f"clip.model.{value}" for value in ("text_width=16", "text_layers=1", "text_heads=2")),
    "clip.model.dim=16",
]  # the CLIP of the two below

PRIOR = ["stage=prior", *EMBEDDED, "net.width=16", "net.layers=1", "net.heads=2"]

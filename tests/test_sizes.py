"""The published sizes: parameters of conf/net, counted without memory, against the papers' figures.

Where the settings in a paper or a released configuration determine the count, it is within 3 % of
the printed figure. Where they leave something open, or the figure is rounded to one digit, the
file states its reading and what that counts, which is compared here.
"""

from typing import NamedTuple

import pytest
import torch

from cascade.config.compose import built, composed

POOL = (
    "+stage.conditioner.embedders.caption.pool="
    "{_target_: cascade.encoders.pooling.AttentionPool, size: 4096, heads: 64}"
)
SR = ("stage=sr256", "stage.conditioner.embedders.low.dim=${net.embed}")
T5 = ("stage=decoder_text", "text=t5_xxl")


class Size(NamedTuple):
    """Millions of parameters, as printed and as the file reads the paper."""

    net: str
    how: tuple[str, ...]
    printed: float
    reading: float | None = None  # None: determined
    whole: bool = False  # with the conditioner: text transformer, projections, pooling


SIZES = [
    Size("unclip_prior", ("stage=prior", "clip=unclip"), 1000, 1228, whole=True),
    Size(
        "unclip_decoder", ("stage=decoder", "clip=unclip", "text=trained_unclip"), 3500, None, True
    ),
    Size("unclip_sr256", SR, 700, 730),
    Size("unclip_sr1024", SR, 300, 282),
    Size("glide_base", ("stage=decoder_text", "text=trained_glide"), 3500, whole=True),
    Size("glide_released", ("stage=decoder_text", "text=trained_glide_released"), 385, whole=True),
    Size("imagen_300m", T5, 300),
    Size("imagen_500m", T5, 500),
    Size("imagen_1b", T5, 1000),
    Size("imagen_2b", T5, 2000),
    Size("imagen_sr256", SR, 600, 486),
    Size("imagen_sr1024", SR, 400, 477),
    Size("karlo_prior", ("stage=prior", "clip=vit_l_14"), 1000, whole=True),
    Size(
        "karlo_decoder", ("stage=decoder", "clip=vit_l_14", "text=clip_vit_l_14"), 900, None, True
    ),
    Size("karlo_sr", SR, 700),
    Size("sr3_256", SR, 625),
    Size("if_m", (*T5, POOL), 400, 372, whole=True),
    Size("if_l", (*T5, POOL), 900, 935, whole=True),
    Size("if_xl", (*T5, POOL), 4300, whole=True),
]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.net)
def test_published_size(size):
    config = composed("train", ["data.path=none", *size.how, f"net={size.net}"])
    with torch.device("meta"):
        stage = built(config.stage)
    part = stage if size.whole else stage.net
    millions = sum(p.numel() for p in part.parameters()) / 1e6
    if size.reading is None:
        assert millions == pytest.approx(size.printed, rel=0.03)
    else:
        assert millions == pytest.approx(size.reading, rel=0.005)

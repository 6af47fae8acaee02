"""`Conditioner`: joins embedders, and drops conditions for classifier-free guidance."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cascade.batch import Batch, source
from cascade.conditioning.captions import Sequence, with_empty
from cascade.conditioning.cond import Cond, log_weights
from cascade.conditioning.vectors import Extent, Vector
from cascade.diffusion.noise import Noise


class Conditioner(nn.Module):
    """Joins the embedders' conditions: sums vectors, concatenates tokens and images.

    Args:
        embedders: by any name; each reads one batch key.
        drop: for each source ("caption", "clip_image"), the share of training samples without it.
        sketch: computes a further image from the joined tokens and their mask.
        empty_caption: replace a dropped caption by the empty one, encoded like any other (GLIDE,
            Karlo, IF); it is read from the batch, as `empty`. Otherwise each embedder has a
            replacement of its own.
    """

    def __init__(
        self,
        embedders: Mapping[str, nn.Module],
        drop: Mapping[str, float] | None = None,
        sketch: nn.Module | None = None,
        empty_caption: bool = False,
    ):
        super().__init__()
        self.embedders: Any = nn.ModuleDict(embedders)
        self.sketch, self.empty_caption = sketch, empty_caption
        self.drop = dict(drop or {})
        if unknown := set(self.drop) - self.sources:
            known = sorted(self.sources)
            raise ValueError(f"drop of {sorted(unknown)}, but the conditions are {known}")

    @property
    def reads(self) -> frozenset[str]:
        """The batch keys that the embedders read."""
        return frozenset(embedder.key for embedder in self.embedders.values())

    @property
    def extents(self) -> frozenset[str]:
        """Those of them that sampling has a default for: sizes and crops (`complete`)."""
        return frozenset(e.key for e in self.embedders.values() if isinstance(e, Extent))

    @property
    def sources(self) -> frozenset[str]:
        """What those keys are computed from: "caption", "clip_image", a small picture."""
        return frozenset(map(source, self.reads))

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the embeddings and text states that a batch must have, by key."""
        sized = [e for e in self.embedders.values() if isinstance(e, (Vector, Sequence))]
        return {e.key: e.size for e in sized if e.key != "tokens"}

    def complete(self, batch: Batch, shape: tuple[int, ...]) -> Batch:
        """Adds the sizes and crops that a batch lacks, for pictures [3, h, w] to be sampled."""
        more = {}
        for embedder in self.embedders.values():
            if isinstance(embedder, Extent) and embedder.key not in batch:
                pair = torch.tensor(embedder.default(*shape[1:]))
                device = embedder.project[0].weight.device
                more[embedder.key] = pair.to(device).expand(len(batch["sample"]), 2)
        return {**batch, **more}

    def forward(
        self, batch: Batch, noise: Noise | None = None, without: Collection[str] = ()
    ) -> Cond:
        """Embeds a batch.

        Args:
            noise: given in training, where each source is dropped at its own rate.
            without: sources dropped from every sample, to measure what they contribute.
        """
        some = batch[next(iter(self.reads))]
        keep = {}
        if noise is not None:
            for name, rate in sorted(self.drop.items()):  # each draw advances the stream
                keep[name] = torch.special.ndtr(noise((len(some),))) >= rate
        for name in without:
            keep[name] = torch.zeros(len(some), dtype=torch.bool, device=some.device)
        return self._join(batch, keep, default=True)

    def null(self, batch: Batch) -> Cond:
        """Embeds a batch with its caption and CLIP embedding dropped; the small picture stays."""
        return self._join(batch, {}, default=False)

    def _join(self, batch: Batch, keep: dict[str, Tensor], default: bool) -> Cond:
        some = batch[next(iter(self.reads))]
        all_or_none = torch.full((len(some),), default, device=some.device)
        if self.empty_caption and ("caption" in keep or not default):
            batch = with_empty(batch, keep.get("caption", all_or_none), self.reads)
            keep = {**keep, "caption": torch.ones_like(all_or_none)}
        parts = [
            embedder(batch, keep.get(source(embedder.key), all_or_none))
            for embedder in self.embedders.values()
        ]
        vectors = [p.vector for p in parts if p.vector is not None]
        tokens = [p.tokens for p in parts if p.tokens is not None]
        masks = [p.mask for p in parts if p.mask is not None]
        if len({mask.dtype for mask in masks}) > 1:  # some caption has weighted phrases
            masks = list(map(log_weights, masks))
        images = [p.image for p in parts if p.image is not None]
        after_text = 0  # tokens after the last embedder of text, which itself reports 0
        for part in (p for p in parts if p.tokens is not None):
            after_text = after_text + part.after_text if part.after_text else 0
        cond = Cond(
            vector=sum(vectors) if vectors else None,
            tokens=torch.cat(tokens, 1) if tokens else None,
            mask=torch.cat(masks, 1) if masks else None,
            image=torch.cat(images, 1) if images else None,
            after_text=after_text,
        )
        if self.sketch is None:
            return cond
        sketch = self.sketch(cond.tokens, cond.mask)
        return replace(cond, image=torch.cat([sketch, *images], 1), sketch=sketch)

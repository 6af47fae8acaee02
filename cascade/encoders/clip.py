"""CLIP, through open_clip: frozen, from local files, or of any size, trained here.

A CLIP trained here is a directory in open_clip's own format (`open_clip_config.json`,
`open_clip_model.safetensors`; open_clip reads it as `local-dir:`), with open_clip's tokenizer.
Pictures are [b, 3, h, w] in [-1, 1]; embeddings are [b, d], of unit norm unless asked for raw.
"""

import copy
import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cascade.batch import Batch, image_key
from cascade.encoders.architecture import Architecture
from cascade.encoders.contrastive import contrastive, gathered
from cascade.encoders.identity import Former, OfCaptions, identity
from cascade.encoders.published.state import clip_state
from cascade.encoders.sam import SAM
from cascade.encoders.sources import (
    CLIP_CONFIG,
    CLIP_WEIGHTS,
    CLIPSource,
    clip_model,
    clip_source,
    default_of,
)
from cascade.encoders.text import ids, token_mask, tokenize, trimmed
from cascade.encoders.text_tower import OPTIONS, load_text_tower
from cascade.encoders.weights import check_tensors, reading, weights_hash
from cascade.errors import UserError
from cascade.files.atomic import write_atomically, write_text
from cascade.nets.layers import altered
from cascade.trainable import Trainable

MAX_LOGIT_SCALE = math.log(100)


def save_clip(architecture: Architecture, clip: nn.Module, folder: Path) -> None:
    """Writes a CLIP trained here, as two files, each atomically."""
    half = [0.5, 0.5, 0.5]  # pictures in [-1, 1] go in as they are
    pictures = {"mean": half, "std": half}
    config = {"model_cfg": architecture.model_config(), "preprocess_cfg": pictures}
    state = {k: v.detach().cpu().contiguous() for k, v in clip.state_dict().items()}
    write_text(folder / CLIP_CONFIG, json.dumps(config, indent=2) + "\n")
    write_atomically(folder / CLIP_WEIGHTS, lambda path: save_file(state, path))


class _Whole(nn.Module):
    """Maps tokens to raw embeddings and states by the text tower of a whole CLIP, of any kind."""

    def __init__(self, clip: nn.Module):
        super().__init__()
        self.clip = clip

    def forward(self, tokens: Int64[Tensor, "b n"]) -> tuple[Tensor, Tensor]:
        found = self.clip.forward_intermediates(
            text=tokens, text_indices=1, normalize=False, normalize_intermediates=True
        )
        return found["text_features"], found["text_intermediates"][-1]


class FrozenCLIP(OfCaptions):
    """A frozen CLIP, loaded on first use.

    As an `Encoder` it reads `caption` and writes `clip_text`, `text` and `text_mask`.

    Args:
        path_or_name: a directory in the format of open_clip or transformers, a file of OpenAI's, or
            one of open_clip's names ("ViT-L-14", OpenAI's "ViT-L/14"), or of timm's with its tag
            ("vit_large_patch14_clip_224.openai").
        checkpoint: with a name: a file of weights, or one of open_clip's tags ("openai") whose
            weights are in the local Hugging Face cache. A tag determines how pictures are
            normalised; for a file it is OpenAI's way, unless its configuration lies next to it.
        quick_gelu: whether the activation is QuickGELU, x sigmoid(1.702 x), if neither a
            configuration nor the tag, the name or the SHA-256 of the file tells.
        unit: normalise embeddings to unit norm; otherwise they are raw, as Karlo reads them.

    Raises (on first use):
        UserError: files are missing or unreadable, the text tower is another library's, or the
            activation is unknown.
    """

    writes = frozenset({"clip_text", "text", "text_mask"})
    words: tuple[str, ...] = ()  # learned beside the vocabulary (`adapters.words`)

    def __init__(
        self,
        path_or_name: str,
        checkpoint: str | None = None,
        quick_gelu: bool | None = None,
        unit: bool = True,
    ):
        self.name, self.checkpoint, self.quick_gelu = path_or_name, checkpoint, quick_gelu
        self.unit = unit

    @cached_property
    def hash(self) -> str:
        """Identifies the weights, the architecture and the normalisation of embeddings."""
        raw = {} if self.unit else {"unit": False}
        return identity(self._weights, {**self._source.choices, **raw})

    @property
    def choices(self) -> dict[str, Any]:
        """Everything besides the weights that the output depends on (`quick_gelu`, sizes...)."""
        return self._source.choices

    @property
    def dim(self) -> int:
        """d, the size of the embeddings."""
        return self._source.model["embed_dim"]

    @property
    def length(self) -> int:
        """n, the context length."""
        return self._text_sizes["context_length"]

    @property
    def text_parameters(self) -> int:
        """Parameters of the text tower without its token embeddings (as Imagen counts them)."""
        named = self._model.named_parameters()
        return sum(p.numel() for k, p in named if not k.startswith(("visual", "token_embedding")))

    @property
    def image_size(self) -> int:
        """The side of its input pictures, in pixels."""
        return self._source.model["vision_cfg"]["image_size"]

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of `clip_text` and `text`, if known on this machine; loads nothing."""
        if not (model := clip_model(self.name)):
            return {}
        width = (default_of("CLIPTextCfg") | model["text_cfg"])["width"]
        return {"clip_text": model["embed_dim"], "text": width}

    @property
    def former(self) -> Former:
        """The hash of earlier versions, which covered the weights alone."""
        return Former(self._weights, self._source.again and self.unit, self._source.doubtful)

    def to(self, device: torch.device | str) -> "FrozenCLIP":
        if "_tower" in vars(self):
            self._tower.to(device)
        return super().to(device)

    @torch.no_grad()
    def image(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Embeds pictures of any size, resized (anti-aliased bicubic) and normalised for it."""
        return self._model.encode_image(self._normalised(x), normalize=self.unit)

    @torch.no_grad()
    def patches(self, x: Float[Tensor, "b 3 h w"], layer: int = -1) -> Float[Tensor, "b d H W"]:
        """The states of pictures of any size at each position, after a block of the vision tower.

        Args:
            layer: the block, counted from the end; a residual network has five stages.

        Raises:
            UserError: there is no such block.
        """
        found = self._model.forward_intermediates(
            image=self._normalised(x), intermediates_only=True, normalize_intermediates=True
        )["image_intermediates"]
        if not -len(found) <= layer < 0:
            raise UserError(f"layer={layer}: {self.name} has the blocks -{len(found)} to -1")
        return found[layer]

    def _normalised(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 H W"]:
        x, size = x.to(self.device).float(), (self.image_size, self.image_size)
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(-1, 1)
        mean, std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in self._source[1:3])
        return ((x + 1) / 2 - mean) / std

    def text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Encodes captions: `clip_text` [b, d], `text` [b, n, w], `text_mask` and `tokens` [b, n].

        `text` holds the states after the last norm; n is the length of the longest caption. Only
        words that are being learned get a gradient.
        """
        tokens = tokenize(captions, self.length, self.words).to(self.device)
        embeddings, states = self._tower(tokens)
        kept = trimmed(tokens)
        return {
            "clip_text": F.normalize(embeddings, dim=-1) if self.unit else embeddings,
            "text": states[:, : kept.shape[1]],
            "text_mask": token_mask(kept),
            "tokens": kept,
        }

    def text_state(self) -> dict[str, Tensor]:
        """The weights of the text tower, by open_clip's names, perhaps among others."""
        tower = self._tower
        return (tower.clip if isinstance(tower, _Whole) else tower).state_dict()

    def tokenized(self, captions: Sequence[str]) -> list[list[int]]:
        return ids(captions, self.length, self.words)

    @property
    def table(self) -> nn.Module:
        """The table of tokens of the text tower."""
        return self._reader.token_embedding

    def taught(self, word: str, extend: Callable[[nn.Module], nn.Module]) -> "FrozenCLIP":
        """A copy that reads a further word; it shares all weights.

        Args:
            extend: adds the word's row to the table.
        """
        other = copy.copy(self)
        reader = altered(self._reader, token_embedding=extend(self.table))
        whole = isinstance(self._tower, _Whole)
        other._tower = altered(self._tower, clip=reader) if whole else reader
        other.words = (*self.words, word)
        return other

    @property
    def _reader(self) -> Any:
        return self._tower.clip if isinstance(self._tower, _Whole) else self._tower

    @cached_property
    def _source(self) -> CLIPSource:
        return clip_source(self.name, self.checkpoint, self.quick_gelu)

    @cached_property
    def _weights(self) -> str:
        return weights_hash([self._source.weights])

    @cached_property
    def _text_sizes(self) -> dict[str, Any]:
        chosen = self._source.choices["text_cfg"]
        return {k: v for k, v in default_of("CLIPTextCfg").items() if k in OPTIONS} | chosen

    @cached_property
    def _tower(self) -> nn.Module:
        """Maps tokens to embeddings and states. Of a usual CLIP, the text tower alone is loaded."""
        quick, weights = self._source.choices["quick_gelu"], self._source.weights
        tower = None
        with suppress(SafetensorError, OSError):  # which loading all of it reports
            tower = load_text_tower(self.dim, quick, self._text_sizes, weights)
        if tower is None:
            return _Whole(self._model)
        return tower.eval().requires_grad_(False).to(self.device)

    @cached_property
    def _model(self) -> Any:
        import open_clip

        state = clip_state(self._source, self.name)
        with reading([self._source.weights], self.name):
            model = open_clip.CLIP(**self._source.model)
            model.load_state_dict(state)
        return model.eval().requires_grad_(False).to(self.device)


class CLIPTraining(Trainable):
    """Trains a CLIP from `image_{size}` and `caption` with the symmetric contrastive loss.

    Args:
        clip: the sizes of the CLIP.
        optimizer: creates an optimizer for parameter groups.
        learning_rate: factor of the learning rate after a number of images; None: constant.
        batch: global batch size, to count images.
        sam: takes each gradient at the worst loss nearby, by this rank's samples (unCLIP, appendix
            C); None: at the weights.
    """

    def __init__(
        self,
        clip: Architecture,
        optimizer: Callable[..., torch.optim.Optimizer],
        learning_rate: Callable[[int], float] | None = None,
        batch: int = 1,
        sam: SAM | None = None,
    ):
        super().__init__(optimizer, learning_rate, batch)
        self.architecture, self.clip, self.sam = clip, clip.build(), sam

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor, Int64[Tensor, "b n"]]:
        """Embeds pictures and captions; returns the tokens as well."""
        tokens = tokenize(batch["caption"], self.architecture.length).to(self.device)
        image = self.clip.encode_image(batch[image_key(self.architecture.image_size)])
        text = self.clip.encode_text(tokens)
        return F.normalize(image.float(), dim=1), F.normalize(text.float(), dim=1), tokens

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """The mean contrastive loss of this rank's samples, over both directions."""
        image, text, tokens = self.embed(batch)
        images, texts, all_tokens = gathered(image), gathered(text), gathered(tokens)
        captions = torch.unique(all_tokens, dim=0, return_inverse=True)[1]
        own = self.rank * len(image) + torch.arange(len(image), device=image.device)
        scale = self.clip.logit_scale.exp()
        with torch.autocast(image.device.type, enabled=False):  # bfloat16 is too coarse for logits
            by_image = contrastive(image, texts, own, captions, scale)
            by_text = contrastive(text, images, own, captions, scale)
        return (by_image + by_text).mean() / 2

    def training_step(self, batch: Batch, number: int) -> Tensor:
        loss = self.loss(batch)
        if self.sam is None:
            return loss
        self.sam.climb(loss, self.parameters())
        return self.loss(batch)

    def after_backward(self) -> None:
        if self.sam is not None:
            self.sam.descend()

    @torch.no_grad()
    def after_step(self) -> None:
        self.clip.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def groups(self) -> list[dict[str, Any]]:
        matrices = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim <= 1]  # no decay, as in CLIP
        return [{"params": matrices}, {"params": others, "weight_decay": 0.0}]

    def export(self, run: Path) -> None:
        """Writes the current weights, in the format that `FrozenCLIP` reads."""
        if self.rank == 0:
            save_clip(self.architecture, self.clip, run)

    def restore(self, run: Path, of: str | None = None) -> None:
        """Loads what `export` wrote.

        Args:
            of: what this module is, for the message; None: the run's own.

        Raises:
            UserError: there are no weights, or they belong to another configuration.
        """
        if not (run / CLIP_WEIGHTS).exists():
            raise UserError(f"{run} holds no {CLIP_WEIGHTS}: train it first")
        with reading([run / CLIP_WEIGHTS], str(run)):
            weights = load_file(run / CLIP_WEIGHTS)
            found = str(run / CLIP_WEIGHTS)
            check_tensors(self.clip.state_dict(), weights, found, of or "clip.model")
            self.clip.load_state_dict(weights)

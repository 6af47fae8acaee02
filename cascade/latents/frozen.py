"""Frozen autoencoders from local folders: trained here, or in diffusers' format.

One trained here is a folder with `autoencoder.json` and `autoencoder.safetensors`. One in the
format of diffusers, with `config.json`, is computed by its own classes, which the extra `diffusers`
installs. Both run in float32.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cascade.encoders.identity import Former, identity
from cascade.encoders.weights import NotHere, check_tensors, read_json, reading, weights_hash
from cascade.errors import UserError
from cascade.files.atomic import write_atomically, write_text
from cascade.latents.autoencoder import Architecture, Autoencoder, Posterior
from cascade.latents.tiles import tiled

CONFIG, WEIGHTS = "autoencoder.json", "autoencoder.safetensors"
THEIR_CONFIG, THEIR_WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
# Of diffusers' classes, the setting that lists the levels of resolution.
LEVELS = {"AutoencoderKL": "block_out_channels", "AutoencoderDC": "encoder_block_out_channels"}


class Source(NamedTuple):
    """The files of an autoencoder, and what its configuration says.

    Attributes:
        kind: diffusers' class; None: trained here.
        latent: channels of the latents.
        factor: side of the square of pixels for each latent.
    """

    config: Path
    weights: Path
    kind: str | None
    choices: Mapping[str, Any]
    latent: int
    factor: int


def save_autoencoder(sizes: Architecture, autoencoder: Autoencoder, folder: Path) -> None:
    """Writes an autoencoder trained here, as two files, each atomically."""
    config = asdict(sizes) | {"multipliers": list(sizes.multipliers)}
    state = {k: v.detach().cpu().contiguous() for k, v in autoencoder.state_dict().items()}
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    write_atomically(folder / WEIGHTS, lambda path: save_file(state, path))


def read_autoencoder(autoencoder: Autoencoder, weights: Path, whose: str) -> None:
    """Loads what `save_autoencoder` wrote. UserError if it does not fit."""
    found = load_file(weights)
    check_tensors(autoencoder.state_dict(), found, str(weights), whose)
    autoencoder.load_state_dict(found)


def autoencoder_source(folder: Path) -> Source:
    """Finds the files of an autoencoder.

    Raises:
        NotHere: there is no such folder.
        UserError: the folder holds no autoencoder, or one of a kind that cannot be used.
    """
    if not folder.exists():
        raise NotHere(f"{folder} is not there: train it with stage=autoencoder run={folder}")
    if (folder / CONFIG).exists():
        found, weights, kind = read_json(folder / CONFIG), folder / WEIGHTS, None
        config = folder / CONFIG
        try:
            sizes = Architecture(**found)
            latent, factor = int(sizes.latent), int(sizes.factor)
        except (TypeError, ValueError) as error:
            raise UserError(f"{config} is damaged: fetch it again") from error
    elif (config := folder / THEIR_CONFIG).exists():
        found, weights = read_json(config), folder / THEIR_WEIGHTS
        if (kind := found.get("_class_name")) not in LEVELS:
            raise UserError(f"{config} describes {kind}: give a folder of {' or '.join(LEVELS)}")
        try:
            latent = int(found["latent_channels"])
            factor = 2 ** (len(found[LEVELS[kind]]) - 1)
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(f"{config} lacks latent_channels or {LEVELS[kind]}") from error
    else:
        raise UserError(
            f"{folder} holds no autoencoder: give a run of stage=autoencoder, or a folder of "
            "diffusers' AutoencoderKL or AutoencoderDC"
        )
    if not weights.exists():
        raise UserError(f"{folder} has no {weights.name}: train or fetch it first")
    return Source(config, weights, kind, found, latent, factor)


class FrozenAutoencoder:
    """A frozen autoencoder, loaded on first use. It is no module, so checkpoints do not hold it.

    Args:
        folder: with the files of an autoencoder.
        tile: side in latents above which it decodes in tiles of that side.
        overlap: of the tiles, in latents.

    Raises (on first use):
        UserError: the folder holds no autoencoder, or weights of another one.
    """

    device = torch.device("cpu")

    def __init__(self, folder: str, tile: int = 128, overlap: int = 16):
        if not 0 < 2 * overlap <= tile:
            raise UserError(f"tile={tile} overlap={overlap}: the overlap is at most half the tile")
        self.name = self.folder = folder
        self.tile, self.overlap = tile, overlap

    @cached_property
    def source(self) -> Source:
        return autoencoder_source(Path(self.folder))

    @cached_property
    def hash(self) -> str:
        """Identifies the weights and the architecture."""
        choices = {k: v for k, v in self.source.choices.items() if not k.startswith("_")}
        return identity(weights_hash([self.source.weights]), choices)

    @property
    def former(self) -> Former:
        return Former("")

    def to(self, device: torch.device | str) -> "FrozenAutoencoder":
        """Sets the device that it computes on."""
        self.device = torch.device(device)
        if "_model" in vars(self):
            self._model.to(self.device)
        return self

    @torch.no_grad()
    def posterior(self, x: Float[Tensor, "b 3 H W"]) -> Posterior:
        """The latents of pictures in [-1, 1]."""
        with torch.autocast(self.device.type, enabled=False):
            x = x.to(self.device).float()
            if self.source.kind is None:
                return self._model.posterior(x)
            found = self._model.encode(x)
            if self.source.kind == "AutoencoderDC":
                return Posterior(found.latent)
            return Posterior(found.latent_dist.mean, found.latent_dist.std)

    @torch.no_grad()
    def decode(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Pictures of latents, in tiles if one side is larger than `tile`."""
        with torch.autocast(self.device.type, enabled=False):
            z = z.to(self.device).float()
            if max(z.shape[2:]) > self.tile:
                return tiled(self._decode, z, self.tile, self.overlap)
            return self._decode(z)

    @property
    def _decode(self) -> Callable[[Tensor], Tensor]:
        if self.source.kind is None:
            return self._model.decode
        return lambda z: self._model.decode(z).sample

    @cached_property
    def _model(self) -> Any:
        source = self.source
        with reading([source.weights], self.name):
            model = _of_diffusers(source) if source.kind else _own(source)
        return model.eval().requires_grad_(False).to(self.device)


def _own(source: Source) -> nn.Module:
    model = Architecture(**source.choices).build()
    read_autoencoder(model, source.weights, str(source.config))
    return model


def _of_diffusers(source: Source) -> nn.Module:
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            f"{source.config.parent} is in diffusers' format: run "
            "`pip install 'cascade-diffusion[diffusers]'` first"
        ) from error
    diffusers.utils.logging.set_verbosity_error()
    kind = getattr(diffusers, source.kind or "")
    # It renames the tensors of older versions.
    model, about = kind.from_pretrained(
        source.config.parent,
        local_files_only=True,
        use_safetensors=True,
        low_cpu_mem_usage=False,
        output_loading_info=True,
        torch_dtype=torch.float32,
    )
    wrong = [*about["missing_keys"], *about["unexpected_keys"], *about["mismatched_keys"]]
    if wrong:
        raise UserError(
            f"{source.weights} does not hold the weights of {source.config}: {wrong[0]}; give the "
            "files that belong together"
        )
    return model

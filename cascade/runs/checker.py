"""Refuses prompts and blackens pictures that match concepts, which a YAML file names as texts.

The mechanism is that of Stable Diffusion's safety checker: the cosine between a CLIP's embedding of
a prompt or picture and that of a concept is compared with the concept's threshold. Cosines between
two texts are much larger than those between a text and a picture, so each has its own threshold.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from omegaconf import OmegaConf
from torch import Tensor

from cascade.config.compose import loaded
from cascade.config.signatures import Type
from cascade.config.values import conform
from cascade.encoders.clip import FrozenCLIP
from cascade.errors import UserError
from cascade.formats.texts import brief


@dataclass(frozen=True)
class Concept:
    """A text, and the cosines from which on a prompt or a picture matches it.

    Args:
        prompt, picture: thresholds in (-1, 1]; None: it is not compared.

    Raises:
        UserError: the text is empty, or a threshold is missing or out of range.
    """

    text: str
    prompt: float | None = None
    picture: float | None = None

    def __post_init__(self):
        given = [value for value in (self.prompt, self.picture) if value is not None]
        if not self.text.strip() or not given or any(not -1 < value <= 1 for value in given):
            raise UserError(
                f"concept {brief(self.text)!r}: give a text, and thresholds above -1 and up to 1 "
                "as prompt or picture"
            )


@dataclass(frozen=True)
class Checks:
    """The content of the file.

    Args:
        clip, checkpoint, quick_gelu: as of `FrozenCLIP`; a directory may be relative to the file.
    """

    clip: str
    concepts: Sequence[Concept]
    checkpoint: str | None = None
    quick_gelu: bool | None = None


def _floats(concept: Mapping[str, Any]) -> dict[str, Any]:
    """The same, with thresholds that are whole numbers as floats."""
    return {k: float(v) if isinstance(v, int) else v for k, v in concept.items()}


class Checker:
    """Compares prompts and pictures with concepts.

    Args:
        clip: embeds prompts, pictures and concepts.
    """

    def __init__(self, clip: FrozenCLIP, concepts: Sequence[Concept]):
        self.clip, self.concepts = clip, tuple(concepts)

    @classmethod
    def load(cls, file: Path, device: torch.device) -> "Checker":
        """Reads a checker's file.

        Raises:
            UserError: the file is missing or damaged, or has other keys or values than `Checks` and
                `Concept` take.
        """
        if not file.is_file():
            raise UserError(f"{file} is not there: give a YAML file of concepts")
        config = loaded(file)
        try:
            conform(config, Type(fields=f"{__name__}.Checks"))
            found = OmegaConf.to_container(config)
            some = found.pop("concepts")
            if wrong := [one for one in some if not isinstance(one, dict)]:
                raise TypeError(f"{brief(wrong[0])} is no concept")
            read = Checks(concepts=[Concept(**_floats(one)) for one in some], **found)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        except (KeyError, TypeError) as error:
            words = " ".join(str(error).rpartition("()")[2].strip("'").split())
            raise UserError(
                f"{file}: {words}: give clip, and concepts as a list of {{text, prompt, picture}}"
            ) from None
        if not read.concepts:
            raise UserError(f"{file} has no concepts: give at least one")
        beside = file.parent / read.clip
        name = str(beside) if beside.is_dir() else read.clip
        clip = FrozenCLIP(name, read.checkpoint, read.quick_gelu)
        return cls(clip.to(device), read.concepts)

    @property
    def identity(self) -> str:
        """Sixteen hexadecimal digits of the CLIP and the concepts."""
        concepts = [[one.text, one.prompt, one.picture] for one in self.concepts]
        text = json.dumps([self.clip.hash, concepts])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def check(self, prompts: Sequence[str]) -> None:
        """Raises UserError if a prompt matches a concept."""
        for start in range(0, len(prompts), 64):
            some = prompts[start : start + 64]
            cosines = self.clip.text(some)["clip_text"] @ self._concepts.T
            for prompt, matched in zip(some, self._matched(cosines, "prompt")):
                if matched:
                    raise UserError(
                        f"{brief(prompt)!r} matches {brief(matched)!r}, which the checker refuses: "
                        "ask for something else"
                    )

    def blackened(
        self, pictures: UInt8[np.ndarray, "n h w 3"]
    ) -> tuple[UInt8[np.ndarray, "n h w 3"], list[str | None]]:
        """The pictures, black where they match a concept, and the concept that each matches."""
        found: list[str | None] = []
        for some in torch.from_numpy(pictures).split(64):
            x = some.permute(0, 3, 1, 2).float() / 127.5 - 1
            found += self._matched(self.clip.image(x) @ self._concepts.T, "picture")
        black = np.array([one is not None for one in found])[:, None, None, None]
        return np.where(black, np.uint8(0), pictures), found

    @cached_property
    def _concepts(self) -> Float[Tensor, "c d"]:
        return self.clip.text([one.text for one in self.concepts])["clip_text"]

    def _matched(self, cosines: Float[Tensor, "n c"], kind: str) -> list[str | None]:
        """The concept that each row exceeds most, relative to its threshold; None: it is below."""
        limits = [getattr(one, kind) for one in self.concepts]
        limits = [math.inf if limit is None else limit for limit in limits]
        excess = cosines.cpu() - torch.tensor(limits)
        best = excess.max(1)
        return [
            self.concepts[i].text if value >= 0 else None
            for value, i in zip(best.values.tolist(), best.indices.tolist())
        ]

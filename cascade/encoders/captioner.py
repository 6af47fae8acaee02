"""Captioners: models of transformers, in local folders, that describe a picture in words.

The network and its processor are classes of transformers' own, chosen by `model_type`, so no code
in the folder is run.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor

from cascade.encoders.identity import identity
from cascade.encoders.published.language_models import CONFIG, weights_in
from cascade.encoders.weights import NotHere, read_json, reading, weights_hash
from cascade.errors import UserError

SIDE = 448  # of the pictures for a model that takes any size
NUCLEUS = 0.9  # words are drawn from the likeliest that together have this probability, as by BLIP

_SETTINGS = (".json", ".jinja", ".model", ".txt")  # endings of files that the words depend on
# Florence-2's answers name places with such words, and other models mark the end of thoughts.
_MARKS = re.compile(r"<[^<>\s]*>")


class Captioner:
    """BLIP, BLIP-2, Florence-2, or any vision-language model of transformers; loaded on first use.

    Args:
        folder: with config.json, the files of the processor, and weights as safetensors.
        prompt: what a model that chats is asked, a task of Florence-2 ("<DETAILED_CAPTION>"), or
            the words that captions of others begin with, which are not repeated. None: the model's
            usual one.
        tokens: the most tokens that it writes.
        bf16: whether it computes in bfloat16.

    Raises:
        NotHere: files are missing.
        UserError: the folder holds no captioner, or (on first use) its files do not fit.
    """

    device = torch.device("cpu")

    def __init__(
        self, folder: str | Path, prompt: str | None = None, tokens: int = 128, bf16: bool = False
    ):
        self.folder, self.prompt, self.tokens, self.bf16 = Path(folder), prompt, tokens, bf16
        self.name, self.kind = str(folder), _kind(self.folder)
        self._weights = weights_in(self.folder)

    def to(self, device: torch.device | str) -> "Captioner":
        """Set the device that it computes on."""
        self.device = torch.device(device)
        if "_model" in vars(self):
            self._model.to(self.device)
        return self

    def load(self, *prompts: str | None) -> None:
        """Load the model and caption a blank picture, so that errors come before the work begins.

        Args:
            prompts: that it will be asked as well.

        Raises:
            UserError: the files, or the prompt, do not fit.
        """
        blank = Image.new("RGB", (self.size, self.size))
        for prompt in dict.fromkeys([None, *prompts]):
            self([blank], prompt=prompt)

    @cached_property
    def hash(self) -> str:
        """Identifies the weights, the folder's settings, and what captions depend on besides."""
        settings = [p for p in self.folder.iterdir() if p.suffix in _SETTINGS and p.is_file()]
        files = weights_hash([*self._weights, *sorted(settings)])
        choices = {"prompt": self.prompt, "tokens": self.tokens, "bf16": self.bf16}
        return identity(files, choices)

    @property
    def size(self) -> int:
        """The side of the square pictures that it is given, in pixels."""
        config = read_json(self.folder / CONFIG)
        eye = config.get("vision_config") or config.get("encoder") or {}
        size = eye.get("image_size") or getattr(self._pictures, "size", None) or SIDE
        if not isinstance(size, int):
            sides = [size.get("height"), size.get("shortest_edge")]
            size = next((side for side in sides if side and side < 2 * SIDE), SIDE)
        return size

    @torch.inference_mode()
    def __call__(
        self,
        pictures: Sequence[Image.Image],
        seeds: Sequence[np.random.Generator] | None = None,
        samples: int = 1,
        prompt: str | None = None,
    ) -> list[list[str]]:
        """Return the captions of each picture, without empty ones.

        Args:
            seeds: draw each caption's words, `samples` for each picture in turn, whatever else is
                in the batch; None: the most likely words, or as the folder's generation_config.json
                searches.
            prompt: another one than the captioner's.

        Raises:
            UserError: the processor does not take the pictures or the prompt.
        """
        from transformers import LogitsProcessorList, TopPLogitsWarper

        with self._refusing("does not take these pictures and this prompt"):
            asked = prompt or self.prompt or self._usual
            inputs = self._inputs(pictures, asked).to(self.device, self._model.dtype)
            how: dict[str, Any] = {"do_sample": False}
            if seeds is not None:
                # One word is left to choose from, so that `generate` draws nothing by itself.
                how = {"do_sample": True, "num_beams": 1, "num_return_sequences": samples}
                how["logits_processor"] = LogitsProcessorList(
                    [TopPLogitsWarper(NUCLEUS), _Drawn(seeds)]
                )
            with _quiet():
                written = self._model.generate(**inputs, max_new_tokens=self.tokens, **how)
            texts = self._words(written, inputs.get("input_ids"), samples, asked)
        return [
            [text for text in texts[i : i + samples] if text] for i in range(0, len(texts), samples)
        ]

    @property
    def _usual(self) -> str | None:
        if getattr(self._processor, "chat_template", None):
            return "Describe this picture in detail."
        return "<DETAILED_CAPTION>" if self.kind == "florence2" else None

    def _inputs(self, pictures: Sequence[Image.Image], prompt: str | None) -> Any:
        options = {"return_tensors": "pt", "padding": True}
        if not getattr(self._processor, "chat_template", None):
            if self._processor is self._pictures:
                if prompt is not None:
                    raise UserError(f"{self.folder} reads no prompt: omit --prompt and --tags")
                return self._pictures(images=list(pictures), return_tensors="pt")
            text = None if prompt is None else [prompt] * len(pictures)
            return self._processor(images=list(pictures), text=text, **options)
        question = {"type": "text", "text": prompt}
        asked = [
            [{"role": "user", "content": [{"type": "image", "image": picture}, question]}]
            for picture in pictures
        ]
        return self._processor.apply_chat_template(
            asked,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )

    def _words(
        self,
        written: Int64[Tensor, "b n"],
        asked: Int64[Tensor, "_ m"] | None,
        samples: int,
        prompt: str | None,
    ) -> list[str]:
        """Return what was written, without what was asked: many models repeat it."""
        if asked is not None and not self._model.config.is_encoder_decoder:
            before = asked.repeat_interleave(samples, 0)
            if torch.equal(written[:, : before.shape[1]], before):
                written = written[:, before.shape[1] :]
        texts = self._tokenizer.batch_decode(written, skip_special_tokens=True)
        texts = [" ".join(_MARKS.sub(" ", text).split()) for text in texts]
        begun = " ".join((prompt or "").split()).casefold()
        cut = [len(begun) if text.casefold().startswith(begun) else 0 for text in texts]
        return [text[start:].strip() for text, start in zip(texts, cut)]

    @contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        try:
            yield
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # transformers raises errors of any kind
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{self.folder} {what} ({type(error).__name__}: {reason}): give another folder or "
                "--prompt"
            ) from error

    @cached_property
    def _processor(self) -> Any:
        """Makes a network's inputs of pictures and words, or of pictures alone."""
        from transformers import AutoImageProcessor, AutoProcessor

        with self._refusing("has no processor that transformers can read"), _quiet():
            found = AutoProcessor.from_pretrained(self.folder, **_LOCAL)
            if not hasattr(found, "tokenizer"):  # vision-encoder-decoder: two processors
                found = AutoImageProcessor.from_pretrained(self.folder, **_LOCAL)
            elif not self._config.is_encoder_decoder:
                found.tokenizer.padding_side = "left"
            return found

    @property
    def _pictures(self) -> Any:
        return getattr(self._processor, "image_processor", self._processor)

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        if hasattr(self._processor, "tokenizer"):
            return self._processor.tokenizer
        with self._refusing("has no tokenizer that transformers can read"), _quiet():
            return AutoTokenizer.from_pretrained(self.folder, **_LOCAL)

    @cached_property
    def _config(self) -> Any:
        from transformers import AutoConfig

        with self._refusing("has a config.json that transformers cannot read"), _quiet():
            return AutoConfig.from_pretrained(self.folder, **_LOCAL)

    @cached_property
    def _model(self) -> Any:
        from transformers import AutoModelForImageTextToText

        dtype = torch.bfloat16 if self.bf16 else torch.float32
        with reading(self._weights, self.folder.name), _quiet():
            model, found = AutoModelForImageTextToText.from_pretrained(
                self.folder,
                config=self._config,
                use_safetensors=True,
                dtype=dtype,
                ignore_mismatched_sizes=True,  # so that they are listed in `found`
                output_loading_info=True,
                **_LOCAL,
            )
        lacking = [*found["missing_keys"], *(of[0] for of in found["mismatched_keys"])]
        if lacking:
            raise UserError(
                f"{self.folder} is no captioner: its weights lack {sorted(lacking)[0]} "
                f"({len(lacking)} in all): give a model with all of its parts"
            )
        return model.eval().requires_grad_(False).to(self.device)


_LOCAL = {"local_files_only": True, "trust_remote_code": False}


class _Drawn:
    """Draws each row's next word, with a generator of its own, by the Gumbel-max trick."""

    def __init__(self, seeds: Sequence[np.random.Generator]):
        self.seeds = seeds

    def __call__(
        self, ids: Int64[Tensor, "b n"], scores: Float[Tensor, "b v"]
    ) -> Float[Tensor, "b v"]:
        noise = np.stack([rng.gumbel(size=scores.shape[1]) for rng in self.seeds])
        noisy = scores.double() + torch.from_numpy(noise).to(scores.device)
        chosen = noisy.argmax(1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def _kind(folder: Path) -> str:
    """The `model_type` of a folder. Raises UserError if it is not a captioner's."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CAPTIONERS,
    )

    if not (folder / CONFIG).is_file():
        raise NotHere(
            f"{folder} is no captioner: it has no {CONFIG}; give the folder of a vision-language "
            "model of transformers"
        )
    kind = read_json(folder / CONFIG).get("model_type")
    if not isinstance(kind, str) or kind not in CAPTIONERS:
        raise UserError(
            f"{folder} is no captioner: its {CONFIG} has model_type {json.dumps(kind)}, which "
            "transformers does not let describe pictures; give a vision-language model (BLIP, "
            "BLIP-2, Florence-2, LLaVA, ...)"
        )
    return kind


@contextmanager
def _quiet() -> Iterator[None]:
    """Let transformers report no more than errors, and show no bars."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

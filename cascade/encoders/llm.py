"""Language models as text encoders: any encoder or causal model that transformers has."""

from collections.abc import Sequence
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from torch.nn.utils.rnn import pad_sequence

from cascade.encoders.identity import Former, OfCaptions, identity
from cascade.encoders.published.language_models import (
    ModelFiles,
    Splits,
    built_from,
    config_of,
    files_of,
    network_of,
    splits_of,
    tokenizer_of,
)
from cascade.encoders.weights import NotHere, weights_hash
from cascade.errors import UserError

_NO_TOKEN = -1  # stands for end-of-text in `tokenized`, if the model puts none behind captions


class FrozenLLM(OfCaptions):
    """A language model's states of each caption: writes `text` and `text_mask`.

    A causal model (Qwen, Llama, Gemma, ...), an encoder (BERT, ...) or the encoder half of both
    (T5Gemma, UMT5, ...), with its own tokenizer. States begin with the caption's first token, and
    do not depend on the other captions of a batch.

    Args:
        folder: with config.json, tokenizer.json and model.safetensors, in one file or several.
        layer: which states. "mean": the mean over all layers (not the embeddings), each normalised
            to mean 0 and variance 1 over a token's numbers (2506.08210, which found it best). -1:
            the last layer's, as the model returns them. i: those that transformers lists as
            `hidden_states[i]`, of which 0 are the embeddings.
        instruction: text before each caption, which the model reads, and whose states are cut.
        length: greatest number of tokens of a caption; longer ones are cut, and keep the
            end-of-text token if the model puts one.
        side: "left" or "right", where shorter captions of a batch are padded for the model.
        bf16: compute in bfloat16, for large models.

    Raises:
        UserError: no such layer or side; on first use, a file is missing or damaged, or does not
            fit the others; the model has no such layer, or it has learned positions, which padding
            on the left would shift.
    """

    writes = frozenset({"text", "text_mask"})
    former = Former("")  # earlier versions had no such encoder

    def __init__(
        self,
        folder: str,
        layer: int | str = "mean",
        instruction: str = "",
        length: int = 256,
        side: str = "right",
        bf16: bool = False,
    ):
        if side not in ("left", "right") or (isinstance(layer, str) and layer != "mean"):
            raise UserError(f"layer={layer}, side={side}: give a number or mean, and left or right")
        self.name, self.layer, self.instruction, self.length = folder, layer, instruction, length
        self.side, self.dtype = side, torch.bfloat16 if bf16 else torch.float32

    @cached_property
    def parameters(self) -> int:
        """The number of parameters that captions are read with. Raises UserError as `config_of`."""
        return sum(p.numel() for p in self._sizes.parameters())

    @property
    def text_parameters(self) -> int:
        """As `parameters`, but without token embeddings, as other encoders count for sweeps."""
        return self.parameters - self._sizes.get_input_embeddings().weight.numel()

    @property
    def sizes(self) -> dict[str, int]:
        """The width of `text`, if the configuration is on this machine; loads nothing."""
        try:
            return {"text": self._sizes.config.hidden_size}
        except NotHere:
            return {}

    @cached_property
    def hash(self) -> str:
        """Identifies weights, tokenizer and configuration, and every choice but the precision."""
        # The length is compared by itself, as that of every encoder is.
        chosen = {"layer": self.layer, "instruction": self.instruction, "side": self.side}
        return identity(self._weights, {**self._source.choices, **chosen})

    def text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """`text` [b, n, w] and `text_mask` [b, n], padded behind the captions to the longest."""
        rows = [[*self._before, *own] for own in map(self._own, captions)]
        self._check_length(max(map(len, rows)))
        ids, mask = self._padded(rows)
        with torch.no_grad():
            states = self._states(ids.to(self.device), mask.to(self.device))
        own = [s[of][len(self._before) :] for s, of in zip(states, mask.to(self.device))]
        lengths = torch.tensor([len(s) for s in own], device=self.device)
        text = pad_sequence(own, batch_first=True)
        places = torch.arange(text.shape[1], device=self.device)
        return {"text": text, "text_mask": places < lengths[:, None]}

    def tokenized(self, captions: Sequence[str]) -> list[list[int]]:
        end = [] if self._splits.behind else [_NO_TOKEN]
        return [self._own(caption) + end for caption in captions]

    def _own(self, caption: str) -> list[int]:
        """The tokens of a caption whose states are kept: at least one, at most `length`."""
        before, behind = self._splits
        first = [] if self.instruction else before
        words = self._tokenizer.encode(caption, add_special_tokens=False).ids
        kept = words[: max(self.length - len(first) - len(behind), 0)]
        return [*first, *kept, *behind] or [self._end]

    def _padded(
        self, rows: Sequence[list[int]]
    ) -> tuple[Int64[Tensor, "b n"], Bool[Tensor, "b n"]]:
        n = max(map(len, rows))
        ids = torch.full((len(rows), n), self._model.config.pad_token_id or 0)
        mask = torch.zeros(len(rows), n, dtype=torch.bool)
        for i, row in enumerate(rows):
            place = slice(n - len(row), n) if self.side == "left" else slice(len(row))
            ids[i, place], mask[i, place] = torch.tensor(row), True
        return ids, mask

    def _states(
        self, ids: Int64[Tensor, "b n"], mask: Bool[Tensor, "b n"]
    ) -> Float[Tensor, "b n w"]:
        model, given = self._model, {}
        if self.side == "left":
            self._check_positions()
            if "position_ids" in signature(model.forward).parameters:
                given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        found = model(
            input_ids=ids,
            attention_mask=mask.long(),
            output_hidden_states=self.layer != -1,
            **given,
        )
        if self.layer == -1:
            return found.last_hidden_state
        layers = found.hidden_states
        if self.layer == "mean":
            normed = [layer_norm(x.float(), x.shape[-1:]) for x in layers[1:]]
            return torch.stack(normed).mean(0).to(self.dtype)
        if not -len(layers) <= self.layer < len(layers):
            raise UserError(f"{self.name} has no layer {self.layer}: choose 0 to {len(layers) - 1}")
        return layers[self.layer]

    def _check_positions(self) -> None:
        names = [name for name, _ in self._model.named_modules()]
        if not any("rotary" in name or "relative" in name for name in names):
            raise UserError(f"{self.name} has learned positions: omit side=left, which shifts them")

    def _check_length(self, longest: int) -> None:
        most = getattr(self._model.config, "max_position_embeddings", None)
        if most and longest > most:
            raise UserError(
                f"{self.name} reads at most {most} tokens, not {longest}: set a length of at most "
                f"{most - len(self._before)}"
            )

    @cached_property
    def _before(self) -> list[int]:
        """The tokens of the instruction.

        It is tokenized by itself, so that a caption's tokens do not depend on it.
        """
        if not self.instruction:
            return []
        words = self._tokenizer.encode(self.instruction, add_special_tokens=False).ids
        return [*self._splits.before, *words]

    @cached_property
    def _end(self) -> int:
        """The model's end-of-text token, which stands for a caption without tokens."""
        end = getattr(self._sizes.config, "eos_token_id", None)
        return (end[0] if isinstance(end, list) else end) or 0

    @cached_property
    def _sizes(self) -> nn.Module:
        folder = Path(self.name)
        return built_from(config_of(folder), folder)

    @cached_property
    def _source(self) -> ModelFiles:
        return files_of(Path(self.name))

    @cached_property
    def _weights(self) -> str:
        return weights_hash([*self._source.weights, self._source.tokenizer])

    @cached_property
    def _splits(self) -> Splits:
        return splits_of(self._tokenizer)

    @cached_property
    def _tokenizer(self) -> Any:
        most = self._sizes.get_input_embeddings().num_embeddings
        return tokenizer_of(self._source.tokenizer, most)

    @cached_property
    def _model(self) -> nn.Module:
        model = network_of(self._source, self.dtype)
        return model.eval().requires_grad_(False).to(self.device)

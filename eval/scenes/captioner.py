"""Trains a small BLIP from nothing to describe scenes, and measures its long captions.

    python -m cascade.eval.scenes.captioner --out runs/captioner [--level plain] [--pictures N]

The folder has BLIP's own format (transformers), so that `cascade data caption --model` reads it as
any other. Captions are measured by their facts (`cascade.eval.scenes.facts`) on held-out scenes.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cascade.data.scenes.captions import Scene, long_caption
from cascade.data.scenes.generate import render, sample_scene
from cascade.draws import generator
from cascade.encoders.captioner import Captioner
from cascade.errors import UserError
from cascade.eval.scenes.facts import facts_in, facts_of, share
from cascade.nets.layers import Positions
from cascade.runs.progress import shown
from cascade.training.muon import Muon

SIDE, PATCH, BATCH = 64, 8, 32
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
_WORDS_FROM = 3000  # scenes whose captions hold all words of a level


def scenes(level: str, split: str, seed: int = 0) -> Iterator[Scene]:
    """Yield scenes of a split without end."""
    n = 0
    while True:
        yield sample_scene(level, split, generator(seed, f"captioner/{split}", n))
        n += 1


def blip(level: str, width: int, layers: int) -> tuple[Any, Any]:
    """Return a BLIP of random weights for pictures of 64 px, and its processor.

    Its tokens are the words of the long captions of a level. Its position embeddings begin as
    smooth functions of the place, twenty times as large as BLIP's own: with BLIP's, it learned
    from 32,000 pictures what a scene shows, but not where.

    Args:
        width: of both towers.
        layers: of each of them.
    """
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    some = islice(scenes(level, "train"), _WORDS_FROM)
    words = sorted(set(chain(*(re.findall(r"\w+|[^\w\s]", long_caption(s).lower()) for s in some))))
    vocab = {word: i for i, word in enumerate([*_SPECIAL, *words])}
    tokenizer = BertTokenizer(vocab=vocab, bos_token="[DEC]", model_max_length=128)
    half = [0.5, 0.5, 0.5]
    pictures = BlipImageProcessor(
        size={"height": SIDE, "width": SIDE}, image_mean=half, image_std=half
    )
    own = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    own |= {"num_attention_heads": width // 32, "initializer_range": 0.02}
    text = {"vocab_size": len(vocab), "encoder_hidden_size": width, "max_position_embeddings": 128}
    text |= {"bos_token_id": vocab["[DEC]"], "eos_token_id": vocab["[SEP]"]}
    text |= {"sep_token_id": vocab["[SEP]"], "pad_token_id": vocab["[PAD]"]}
    vision = {**own, "image_size": SIDE, "patch_size": PATCH}
    model = BlipForConditionalGeneration(
        BlipConfig(vision_config=vision, text_config={**own, **text})
    )
    places = model.vision_model.embeddings.position_embedding
    with torch.no_grad():
        places[0, 1:] = Positions(width)(SIDE // PATCH, SIDE // PATCH).flatten(1).T
    return model, BlipProcessor(pictures, tokenizer)


def train(
    out: Path, level: str, pictures: int, lr: float = 3e-3, width: int = 96, layers: int = 3
) -> list[float]:
    """Train a captioner on a level's scenes, and write its folder; return the loss of each step.

    Args:
        pictures: how many are seen, each of them once.
        lr: of Muon, at its highest: it rises in the first tenth and falls to 0.
        width, layers: of both towers.
    """
    torch.manual_seed(0)
    model, processor = blip(level, width, layers)
    optimizer, steps = Muon(model.parameters(), lr, fused=True), -(-pictures // BATCH)
    rise = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / rise, (steps - n) / (steps - rise + 1))
    )
    drawn, losses = scenes(level, "train"), []
    with shown("captioner", "pictures") as progress:
        for step in range(steps):
            some = list(islice(drawn, BATCH))
            loss = model(**batch(some, processor, model.config.text_config)).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            progress((step + 1) * BATCH, steps * BATCH)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return losses


def batch(some: Sequence[Scene], processor: Any, config: Any) -> dict[str, torch.Tensor]:
    """Return what BLIP is trained on: pictures, and captions that it continues from [DEC]."""
    rendered = [Image.fromarray(render(scene, SIDE)) for scene in some]
    captions = [long_caption(scene) for scene in some]
    inputs = processor(images=rendered, text=captions, padding=True, return_tensors="pt")
    inputs["input_ids"][:, 0] = config.bos_token_id
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return {**inputs, "labels": labels}


def measured(folder: Path, level: str, split: str, count: int) -> dict[str, float]:
    """Return the share of facts that a captioner has right about held-out scenes, by kind."""
    captioner, some = Captioner(folder), list(islice(scenes(level, split), count))
    said: list[str] = []
    for start in range(0, count, BATCH):
        rendered = [Image.fromarray(render(s, SIDE)) for s in some[start : start + BATCH]]
        said += [texts[0] for texts in captioner(rendered)]
    return share([(facts_in(text), facts_of(scene)) for text, scene in zip(said, some)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the captioner")
    parser.add_argument("--level", default="plain", help="of the scenes (plain)")
    parser.add_argument("--pictures", type=int, default=64_000, help="to train on (64,000)")
    parser.add_argument("--count", type=int, default=500, help="held-out scenes (500)")
    args = parser.parse_args()
    if args.out.exists():
        raise UserError(f"{args.out} exists: choose another folder, or remove it")
    losses = train(args.out, args.level, args.pictures)
    print(f"loss {losses[-1]:.3f}")
    for split in ("val", "unseen"):
        found = measured(args.out, args.level, split, args.count)
        print(split, *(f"{kind} {100 * right:.1f} %" for kind, right in found.items()))


if __name__ == "__main__":
    main()

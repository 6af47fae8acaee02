"""A stage as networks and a scheduler of diffusers, and what its README says of it.

FOLDER/STAGE/unet/          or those of Karlo: prior/; decoder/, text_proj/; super_res_first/...
FOLDER/STAGE/scheduler/
FOLDER/STAGE/text_encoder/  and tokenizer/, of a stage that reads captions
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from cascade.codecs import Pixels
from cascade.conditioning import LowRes, Sequence
from cascade.conditioning.vectors import Label
from cascade.encoders.clip import FrozenCLIP
from cascade.encoders.published.byte_pairs import BytePairs
from cascade.export.layouts import Model, refused, write_json, write_network
from cascade.export.model import Part
from cascade.export.priors import prior_model, text_projection
from cascade.export.readme import Stage, Text, small_of
from cascade.export.samplers import first_deviation, sampled, scheduler, timesteps
from cascade.export.texts import text_model, text_transformer, write_byte_pairs
from cascade.export.tokenizer import write_tokenizer
from cascade.export.unets import level_of, unet_model


def write_alone(part: Part, folder: Path) -> Stage:
    """Writes the folder of a stage; returns how it is sampled.

    Raises:
        UserError: diffusers has no counterpart of one of its settings.
    """
    stage = sampled(part, whole=False)
    folder.mkdir()
    schedule = scheduler(stage, part)
    write_json(folder / "scheduler/scheduler_config.json", schedule)
    plain = not isinstance(stage.codec, Pixels) or "clip_image" in stage.conditioner.reads
    about = Stage(part.name, schedule["_class_name"], timesteps(stage, part), stage.sampler.scale)
    for clip in (one for one in stage.encoders if isinstance(one, FrozenCLIP)):
        write_network(text_model(clip, "clip"), folder / "text_encoder")
        write_tokenizer(folder / "tokenizer", clip.length)
    if plain:
        for name, model in _of_karlo(stage, part):
            write_network(model, folder / name)
        return about
    about = about._replace(size=stage.codec.size, deviation=first_deviation(stage))
    return _write_unet(stage, part, folder, about)


def _of_karlo(stage: Any, part: Part) -> Iterator[tuple[str, Model]]:
    """The networks of a prior, or of a decoder that reads CLIP embeddings."""
    config, where = part.run.config.stage, part.name
    if not isinstance(stage.codec, Pixels):
        yield "prior", prior_model(stage, config, where)
        return
    yield "text_proj", text_projection(stage, where)
    yield "decoder", unet_model(stage.net, config.net, stage.codec.size, where)


def _write_unet(stage: Any, part: Part, folder: Path, about: Stage) -> Stage:
    """Writes a U-Net that is told a picture, a class and a caption, or some of these."""
    where, conditions = part.name, stage.conditioner
    of_kind = {type(embedder): embedder for embedder in conditions.embedders.values()}
    if other := [kind.__name__ for kind in of_kind if kind not in (LowRes, Label, Sequence)]:
        raise refused(where, "stage.conditioner.embedders", other[0], "low, label or caption")
    if conditions.sketch is not None:
        raise refused(where, "stage.conditioner.sketch", True, None)
    low, label, caption = (of_kind.get(kind) for kind in (LowRes, Label, Sequence))
    if about.scale != 1 and (caption is None or not conditions.empty_caption):
        raise refused(where, "sampler.scale", about.scale, "1 without an empty caption")
    shift = level_of(stage, where) if low else None
    for name, net, config in _nets(stage, part):
        model = unet_model(net, config, stage.codec.size, where, shift)
        write_network(model if label is None else _told_classes(model, label), folder / name)
        about = about._replace(net=model.kind, folders=(*about.folders, name))
    if low is not None:
        about = about._replace(small=small_of(low, where))
    if caption is not None:
        about = about._replace(text=_write_text(stage, caption, folder, where))
    return about._replace(label=label is not None)


def _nets(stage: Any, part: Part) -> Iterator[tuple[str, nn.Module, Any]]:
    config = part.run.config.stage.net
    if not str(config._target_).endswith(".ByLevel"):
        yield "unet", stage.net, config
        return
    yield "super_res_first", stage.net.net, config.net
    yield "super_res_last", stage.net.last, config.net


def _told_classes(model: Model, label: Any) -> Model:
    classes = label.embed.weight.detach().float().clone()
    about = {**model.config, "num_class_embeds": len(classes)}
    return Model(model.kind, about, {**model.state, "class_embedding.weight": classes})


def _write_text(stage: Any, caption: Any, folder: Path, where: str) -> Text:
    model = text_transformer(caption, where)
    readers = [one for one in stage.encoders if isinstance(one, BytePairs)]
    if not readers:
        raise refused(where, "text.reader", stage.encoders[0].name, "BytePairs")
    write_network(model, folder / "text_encoder")
    write_byte_pairs(readers[0], folder / "tokenizer")
    length = model.config["max_position_embeddings"]
    return Text(length, model.config["vocab_size"] - length)

"""Captions by a captioner: what it says, alone or in batches; how training draws from them."""

import json
import os
import shutil
import signal
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    BlipForConditionalGeneration,
    Florence2ForConditionalGeneration,
    LlavaForConditionalGeneration,
    VisionEncoderDecoderModel,
)

from cascade import cli
from cascade.config.compose import built, composed
from cascade.data import embeddings as module
from cascade.data.precompute import precompute
from cascade.data.recaptions.reading import Recaptions
from cascade.data.recaptions.writing import Asked, rows
from cascade.data.transforms import decode
from cascade.draws import generator
from cascade.encoders.captioner import Captioner, _Drawn
from cascade.encoders.clip import Architecture, CLIPTraining, FrozenCLIP
from cascade.errors import UserError
from cascade.training.compatibility import _same_captions
from cascade.training.provenance import Provenance
from tests.captioners import KINDS, written
from tests.processes import Job
from tests.test_embeddings import LACKS, WORDS, members, write_clip, write_shards

WEB = {" ".join(WORDS[(i + j) % 8] for j in range(1 + i % 5)) for i in range(24)}

CLASSES = {
    "blip": BlipForConditionalGeneration,
    "blip-2": Blip2ForConditionalGeneration,
    "florence2": Florence2ForConditionalGeneration,
    "llava": LlavaForConditionalGeneration,
    "vision-encoder-decoder": VisionEncoderDecoderModel,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: written(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    return write_shards(tmp_path / "data")


def caption(data, model, *options, tokens=8):
    words = ["data", "caption", str(data), "--model", str(model), "--tokens", str(tokens)]
    return cli.main([*words, *map(str, options)])


def pictures(count=5):
    files = [dict(members(i, str(i)))[f"{i}.png"] for i in range(count)]
    return [Image.fromarray(decode(file, 16)) for file in files]


def reference(kind, folder, picture, prompt):
    """The words of the model's own class, of one picture."""
    model = CLASSES[kind].from_pretrained(folder)
    if kind == "vision-encoder-decoder":
        inputs = AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        return AutoTokenizer.from_pretrained(folder).decode(out[0], skip_special_tokens=True)
    processor, asked, cut = AutoProcessor.from_pretrained(folder), prompt, 0
    if kind == "llava":
        asked = f"<image>{prompt}:"
    inputs = processor(images=picture, text=asked, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    if kind == "llava":
        cut = inputs["input_ids"].shape[1]
    text = processor.batch_decode(out[:, cut:], skip_special_tokens=True)[0]
    begun = prompt if kind in ("blip", "blip-2") and prompt else ""
    assert text.startswith(begun)
    return " ".join(text.removeprefix(begun).split())


@pytest.mark.parametrize(
    ("kind", "prompt"),
    [
        *((kind, None) for kind in KINDS),
        *((kind, "a b") for kind in KINDS if kind != "vision-encoder-decoder"),
    ],
)
def test_captions_are_those_of_the_model_itself_alone_or_in_a_batch(folders, kind, prompt):
    usual = {"florence2": "<DETAILED_CAPTION>", "llava": "Describe this picture in detail."}
    captioner, some = Captioner(folders[kind], prompt, tokens=8), pictures()
    assert captioner.size == 16
    together = captioner(some)
    assert together == [captioner([picture])[0] for picture in some]
    expected = [reference(kind, folders[kind], p, prompt or usual.get(kind)) for p in some]
    assert [texts[0] if texts else "" for texts in together] == expected
    assert not prompt or len({*expected}) > 1, "the words do not depend on the picture"


@pytest.mark.parametrize("kind", KINDS)
def test_each_draw_depends_on_its_own_seed_alone(folders, kind):
    captioner, some = Captioner(folders[kind], tokens=8), pictures(3)

    def seeds(of):
        return [generator(0, f"{of}", i) for i in range(4)]

    together = captioner(some, [rng for n in range(3) for rng in seeds(n)], 4)
    torch.manual_seed(7)
    alone = [captioner([some[n]], seeds(n), 4)[0] for n in range(3)]
    assert together == alone
    assert len({text for texts in together for text in texts}) > 6


def test_words_are_drawn_with_their_probabilities():
    scores = torch.tensor([[0.0, 1.0, -1.0, -torch.inf]]).expand(20_000, 4)
    ids = torch.zeros(20_000, 1, dtype=torch.long)
    drawn = _Drawn([np.random.default_rng(i) for i in range(len(scores))])(ids, scores)
    assert ((drawn == 0).sum(1) == 1).all()
    assert (drawn.isinf().sum(1) == 3).all()
    shares = (drawn == 0).double().mean(0)
    expected = scores[0].double().softmax(0)
    assert (shares - expected).abs().max() < 4 * (0.25 / len(scores)) ** 0.5


def die_writing(data, out, model):
    """Dies in the middle of the second file."""

    def save(tensors, path, metadata):
        save_file(tensors, path, metadata)
        if "00001" in path.name:
            os.truncate(path, 20)
            os.kill(os.getpid(), signal.SIGKILL)

    module.save_file = save
    asked = Asked(Captioner(model, tokens=8), "long_caption", samples=2)
    precompute(data, out, asked.about, partial(rows, asked=asked))


def test_a_killed_call_that_goes_on_in_other_batches_writes_the_same(data, folders, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert caption(data, folders["blip"], "--samples", 2, "--out", whole) == 0
    job = Job(die_writing, (data, killed, folders["blip"]), out=tmp_path / "job")
    assert job.wait() == [-signal.SIGKILL], job.output()
    again = ("--samples", 2, "--out", killed, "--batch", 3, "--workers", 1)
    assert caption(data, folders["blip"], *again) == 0
    assert not list(killed.glob(".*.part"))
    for path in sorted(whole.glob("*.safetensors")):
        own, other = load_file(path), load_file(killed / path.name)
        assert {k: v.tolist() for k, v in own.items()} == {k: v.tolist() for k, v in other.items()}


def test_captions_below_the_score_are_left_out_and_counted(data, folders, tmp_path, capsys):
    clip = write_clip(tmp_path / "clip")
    out, every = tmp_path / "kept", tmp_path / "every"
    assert caption(data, folders["blip"], "--samples", 3, "--out", every) == 0
    encoder, scored = FrozenCLIP(str(clip)), {}
    for i in range(24):
        shard, key = f"train-{i // 8:05d}", f"{i // 8:05d}{i % 8}"
        texts = Recaptions(every).of(shard, key)["long_caption"]
        picture = torch.from_numpy(decode(dict(members(i, "x"))["x.png"], 16).copy())
        seen = encoder.image(picture.permute(2, 0, 1)[None] / 127.5 - 1)
        cosines = F.cosine_similarity(seen, encoder.text(texts)["clip_text"]).tolist()
        scored[shard, key] = list(zip(texts, cosines))
    least = float(np.median([score for own in scored.values() for _, score in own]))
    kept = {of: [text for text, score in own if score >= least] for of, own in scored.items()}
    capsys.readouterr()
    few = ("--samples", 3, "--out", out, "--clip", clip, "--least", repr(least))
    assert caption(data, folders["blip"], *few) == 0
    said = capsys.readouterr().out
    assert {of: Recaptions(out).of(*of)["long_caption"] for of in kept} == kept
    lost = sum(map(len, scored.values())) - sum(map(len, kept.values()))
    assert lost > 30
    assert f"{lost} captions were left out" in said
    assert f"captions of {sum(map(bool, kept.values()))} of 24 pictures" in said


def samples(data, *overrides):
    chosen = ["stage=decoder_text", "data=recaptioned", f"data.path={data}", *overrides]
    config = composed("train", chosen)
    return built({**config.data, "pictures": {**config.data.pictures, "sizes": []}})


def test_training_draws_captions_as_dalle3_does(data, folders):
    assert caption(data, folders["blip"], "--samples", 2) == 0
    recaptions, shards = Recaptions(data / "captions"), samples(data)
    drawn = [(item["key"], item["caption"]) for item in map(shards.__getitem__, range(1000))]
    written = {key: recaptions.of(*key.split("/"))["long_caption"] for key, _ in drawn}
    both = [(key, text) for key, text in drawn if key.split("/")[1] not in LACKS["txt"]]
    synthetic = sum(text in written[key] for key, text in both)
    assert all(text in WEB or text in written[key] for key, text in drawn)  # not the JSON's
    assert abs(synthetic / len(both) - 0.95) < 4 * (0.95 * 0.05 / len(both)) ** 0.5
    seen = Counter(drawn)
    for key, texts in written.items():
        if len(set(texts)) == 2:
            assert min(seen[key, text] for text in texts) > 5
    again = samples(data)  # in another order, as after a resumption or on another rank
    assert all(again[n]["caption"] == drawn[n][1] for n in range(999, 0, -17))
    other = samples(data, "seed=1")
    assert [other[n]["caption"] for n in range(50)] != [text for _, text in drawn[:50]]
    everyone = samples(data, "data.recaptions=null")
    assert "on a grey square" in " ".join(everyone[n]["caption"] for n in range(20))


def test_where_a_caption_was_left_out_others_are_drawn(data, folders, tmp_path):
    none = ("--clip", write_clip(tmp_path / "clip"), "--least", 1)
    assert caption(data, folders["blip"], *none) == 0
    shards = samples(data)
    assert {shards[n]["caption"] for n in range(30)} <= WEB
    with pytest.raises(UserError, match=r"none of .* has long_caption"):
        shards.check(4)


def test_captions_of_another_shard_or_picture_are_refused(data, folders):
    assert caption(data, folders["blip"]) == 0
    samples(data).check(4)
    folder = data / "captions"
    whole = (folder / "train-00001.safetensors").read_bytes()
    shutil.copy(folder / "train-00000.safetensors", folder / "train-00001.safetensors")
    with pytest.raises(UserError, match=r"train-00001\.safetensors has no captions of 00001"):
        samples(data).check(4)
    (folder / "train-00001.safetensors").write_bytes(whole[:-9])
    with pytest.raises(UserError, match="is missing or broken: run `cascade data caption`"):
        samples(data).check(4)
    (folder / "train-00001.safetensors").unlink()
    with pytest.raises(UserError, match="lacks 1 of 3 shards, such as train-00001: run `cascade"):
        samples(data)
    (folder / "train-00001.safetensors").write_bytes(whole)
    swapped = data / "train-00001.tar"
    bytes_ = swapped.read_bytes()
    swapped.write_bytes(bytes_.replace(b"IHDR", b"ihdr", 1))
    with pytest.raises(UserError, match="has captions of another picture than 00001"):
        samples(data).check(4)


def test_a_run_is_not_resumed_with_the_captions_of_another(data, folders):
    module = CLIPTraining(
        Architecture(16, 8, 1, 16, 16, 1, 2, length=12, patch=8), torch.optim.Adam
    )
    assert caption(data, folders["blip"]) == 0
    checkpoint = {}
    Provenance(module, samples(data)).on_save_checkpoint(None, None, checkpoint)
    Provenance(module, samples(data)).on_load_checkpoint(None, None, checkpoint)
    shutil.rmtree(data / "captions")
    assert caption(data, folders["llava"]) == 0
    with pytest.raises(UserError, match="captions were made by other weights"):
        Provenance(module, samples(data)).on_load_checkpoint(None, None, checkpoint)


def test_tags_are_the_answer_to_another_question(data, folders):
    assert caption(data, folders["llava"], "--tags", "a, b", "--prompt", "x") == 0
    picture = Image.fromarray(decode(dict(members(2, "x"))["x.png"], 16))
    found = Recaptions(data / "captions").of("train-00000", "000002")
    assert found["long_caption"] == [reference("llava", folders["llava"], picture, "x")]
    answer = reference("llava", folders["llava"], picture, "a, b")
    assert found["tags"] == list(dict.fromkeys(filter(None, map(str.strip, answer.split(",")))))
    drawn = samples(data, "+data.captions.tags=1.0", "data.captions.long_caption=0.0")
    tags = Recaptions(data / "captions")
    some = [drawn[n] for n in range(40)]
    found = [item["caption"] in tags.of(*item["key"].split("/"))["tags"] for item in some]
    assert sum(found) > 20


def test_a_prompt_for_a_model_that_reads_none_is_refused(data, folders, capsys):
    assert caption(data, folders["vision-encoder-decoder"], "--prompt", "a") == 2
    assert "reads no prompt: omit --prompt" in capsys.readouterr().err
    assert not (data / "captions").exists()


def test_another_prompt_needs_another_folder(data, folders, capsys):
    assert caption(data, folders["blip"]) == 0
    assert caption(data, folders["blip"], "--prompt", "a b") == 2
    assert "with prompt=None, not a b: choose another folder" in capsys.readouterr().err


def test_states_of_captions_are_those_of_the_captioner(data, folders, tmp_path):
    clip = write_clip(tmp_path / "clip")
    assert caption(data, folders["blip"]) == 0
    words = ["data", "precompute", str(data), "--text", str(clip)]
    words += ["--captions", "long_caption,txt", "--recaptions", str(data / "captions")]
    assert cli.main(words) == 0
    written = Recaptions(data / "captions").of("train-00000", "000002")["long_caption"]
    expected = FrozenCLIP(str(clip)).text(written)["clip_text"][0]
    rows = module.Embeddings(data / "text")
    found = rows.row("train-00000", "000002", "long_caption")["clip_text"]
    assert (found - expected).abs().max() < 1e-6
    store, fields = module.Embeddings(data / "text"), ["long_caption", "txt"]
    _same_captions(store, store.about, fields, None, Recaptions(data / "captions"))
    with pytest.raises(UserError, match="of other captions than training reads"):
        _same_captions(store, store.about, fields, None, None)


def without_words(folder, out):
    """A BLIP whose file of weights lacks the half that writes."""
    shutil.copytree(folder, out)
    weights = load_file(out / "model.safetensors")
    seeing = {name: x for name, x in weights.items() if not name.startswith("text_decoder")}
    save_file(seeing, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("nowhere", [], "is no captioner: it has no config.json"),
        ("clip", [], 'is no captioner: its config.json has model_type "clip"'),
        ("gpt2", [], 'is no captioner: its config.json has model_type "gpt2"'),
        ("blind", [], "is no captioner: its weights lack text_decoder"),
        ("blip", ["--field", "txt"], "--field txt is taken"),
        ("blip", ["--samples", 0], "--samples, --batch and --tokens: give 1 or more"),
        ("blip", ["--clip", "x"], "--clip needs --least SCORE"),
        ("blip", ["--least", 0.2], "--least has no effect without --clip"),
        ("blip", ["--clip", "nowhere", "--least", 0.2], "neither a directory nor a CLIP"),
    ],
)
def test_what_cannot_caption_is_said_in_one_line(
    data, folders, tmp_path, capsys, model, options, words
):
    folder = folders.get(model, tmp_path / model)
    if model in ("clip", "gpt2"):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": model}))
    if model == "blind":
        without_words(folders["blip"], folder)
    capsys.readouterr()
    assert caption(data, folder, *options) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert sorted(path.name for path in data.iterdir()) == [f"train-{s:05d}.tar" for s in range(3)]

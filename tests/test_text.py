import hashlib
import io
import json
import random
import shutil
import socket
import tarfile
import time
from pathlib import Path

import lightning as L
import open_clip
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    MT5EncoderModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Tokenizer,
    UMT5EncoderModel,
)

from cascade.config.compose import built, composed
from cascade.encoders.text import FrozenT5, TextTransformer, Tokenizer, token_mask, tokenize
from cascade.errors import UserError

START, END = 49406, 49407
WORDS = [
    "a",
    "small",
    "large",
    "red",
    "green",
    "blue",
    "square",
    "circle",
    "left",
    "of",
    "on",
    "grey",
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_tokens_are_those_of_open_clip():
    captions = ["", "A  red\nSQUARE, on grey!", "naïve &amp; 漢字 🙂", "red " * 100]
    assert torch.equal(tokenize(captions, 77), open_clip.tokenize(captions))


@pytest.mark.parametrize("length", [4, 77])
def test_a_long_caption_keeps_its_end(length):
    tokens = tokenize(["red square " * 200, ""], length)
    assert tokens[0, 0] == START
    assert tokens[0, -1] == END
    assert (tokens[0] == END).sum() == 1
    assert tokens[1].tolist() == [START, END] + [0] * (length - 2)


def test_a_caption_of_one_endless_word_is_no_burden():
    word = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=10_000))
    start = time.perf_counter()
    tokens = tokenize([word, "   " * 10_000 + "red"], 32)
    assert time.perf_counter() - start < 1
    assert tokens[0, -1] == END
    assert torch.equal(tokens[1:], tokenize(["red"], 32))


def test_the_mask_ends_with_end_of_text():
    tokens = tokenize(["a !; b", "", "red " * 20], 8)
    assert tokens[0, 2] == 0  # the token "!", not padding
    mask = token_mask(tokens)
    ends = (tokens == END).int().argmax(1)
    assert mask.sum(1).tolist() == (ends + 1).tolist()
    assert mask[2].all()


def test_the_tokenizer_completes_a_batch():
    """To the length of its longest caption: what lies behind is padding in every row."""
    batch = Tokenizer(8)({"caption": ["red", "a red circle"]})
    whole = tokenize(["red", "a red circle"], 8)
    assert batch["tokens"].tolist() == whole[:, :5].tolist()
    assert whole[:, 5:].max() == 0


def transformer(near=None):
    torch.manual_seed(0)
    encoder = TextTransformer(width=32, layers=2, heads=4, length=12, near=near)
    for parameter in encoder.parameters():  # some weights start at zero
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


@pytest.mark.parametrize("near", [None, 5])
def test_padding_changes_nothing(near):
    encoder, captions = transformer(near), ["a red square", "circle"]
    states, mask = encoder(tokenize(captions, 12))
    shorter, short_mask = encoder(tokenize(captions, 5))
    assert mask.sum(1).tolist() == short_mask.sum(1).tolist() == [5, 3]
    torch.testing.assert_close(states[mask], shorter[short_mask])


def test_words_are_summed_with_their_neighbours():
    encoder = TextTransformer(width=32, layers=1, heads=4, length=12, near=3)
    # Blocks start as the identity.
    tokens, weights = tokenize(["a red square"], 12), encoder.near.weight[:, 0].T
    words = encoder.embed(tokens)[0, :5] + encoder.positions[:5]
    states = [
        word + sum(weights[k] * words[i + k - 1] for k in range(3) if 0 <= i + k - 1 < 5)
        for i, word in enumerate(words)
    ]
    expected = encoder.norm(torch.stack(states))
    torch.testing.assert_close(encoder(tokens)[0][0, :5], expected)


def test_every_token_sees_every_other_but_no_padding():
    encoder, tokens = transformer(), tokenize(["a red square"], 12)
    seen = []
    encoder.embed.register_forward_hook(lambda m, i, out: seen.append(out) or out.retain_grad())
    for position in range(5):
        states, _ = encoder(tokens)
        states[0, position].square().sum().backward()
        influence = seen[-1].grad[0].abs().sum(1) > 0
        assert influence.tolist() == [True] * 5 + [False] * 7


def write_t5(folder, seed=0):
    rng = random.Random(0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(rng.sample(WORDS, 6)) for _ in range(300)),
        model_prefix=str(folder / "spiece"),
        vocab_size=30,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    about = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    torch.manual_seed(seed)
    config = T5Config(vocab_size=200, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return write_t5(tmp_path_factory.mktemp("t5"))


def test_t5_equals_transformers_and_ignores_padding(t5):
    frozen = FrozenT5(str(t5))
    captions = ["a red square", "", "a small blue circle left of a large red square"]
    found = frozen.text(captions)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(t5 / "spiece.model"))
    theirs = T5EncoderModel.from_pretrained(t5).eval()
    for i, caption in enumerate(captions):
        ids = torch.tensor([[*pieces.encode(caption), pieces.eos_id()]])
        assert found["text_mask"][i].sum() == ids.shape[1]
        expected = theirs(ids).last_hidden_state[0].detach()
        torch.testing.assert_close(found["text"][i, : ids.shape[1]], expected, atol=1e-5, rtol=1e-4)
    assert frozen.width == 16
    assert frozen({"caption": captions}).keys() == {"caption"} | frozen.writes


def test_t5_keeps_its_end_of_text(t5):
    frozen = FrozenT5(str(t5), length=6)
    seen = []
    frozen._model.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    assert frozen.text(["red square " * 900, "red"])["text"].shape == (2, 6, 16)
    assert seen[0][0, -1] == 1
    assert seen[0][1].tolist().count(1) == 1


def test_t5_in_bfloat16(t5):
    assert FrozenT5(str(t5), bf16=True).text(["red"])["text"].dtype == torch.bfloat16


def test_a_module_that_holds_a_t5_does_not_own_it(t5):
    module = L.LightningModule()
    module.t5 = FrozenT5(str(t5))
    assert not module.t5.text(["red"])["text"].requires_grad
    assert not module.state_dict()
    assert not list(module.parameters())


def test_the_hash_is_that_of_weights_and_architecture(t5, tmp_path):
    weights, whole = (t5 / "model.safetensors").read_bytes(), FrozenT5(str(t5)).hash
    assert FrozenT5(str(t5)).former.hash == hashlib.sha256(weights).hexdigest()[:16] != whole
    other = write_t5(tmp_path, seed=1)
    hashes = {whole, FrozenT5(str(other)).hash}
    shutil.copy(t5 / "model.safetensors", other)
    assert FrozenT5(str(other)).hash == whole
    about(other, feed_forward_proj="gated-gelu")
    assert len({*hashes, FrozenT5(str(other)).hash}) == 3


def about(folder, **changes):
    """Changes config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def own(t5, tmp_path):
    """A copy of the folder, to be changed."""
    return Path(shutil.copytree(t5, tmp_path / "own"))


BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("shared.weight"), "lacks shared.weight"),
        (lambda w: w.pop(BIAS), f"lacks {BIAS}"),
        (lambda w: w.update(extra=w[BIAS].clone()), "has besides extra"),
        (lambda w: w.update({BIAS: w[BIAS].T}), r"is \[2, 32\], not \[32, 2\]"),
        (lambda w: w.update({"shared.weight": w["shared.weight"].int()}), "of whole numbers, not"),
        (lambda w: [w.update({f"t5.{k}": w.pop(k)}) for k in list(w)], "lacks .* has besides t5."),
    ],
    ids=["embedding", "positions", "extra", "shape", "type", "prefix"],
)
def test_a_t5_has_all_its_weights_and_no_others(own, change, words):
    weights = load_file(own / "model.safetensors")
    change(weights)
    save_file({k: v.contiguous() for k, v in weights.items()}, own / "model.safetensors")
    with pytest.raises(UserError, match=words) as caught:
        FrozenT5(str(own)).text(["red"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["whole", "table", "float16", "bin"])
def test_the_same_weights_by_other_names_and_types_are_a_t5(t5, own, kind):
    file, weights = own / "model.safetensors", load_file(own / "model.safetensors")
    expected = T5EncoderModel.from_pretrained(t5).eval()
    if kind == "whole":  # with the decoder
        model = T5ForConditionalGeneration(expected.config)
        model.load_state_dict(weights, strict=False)
        model.save_pretrained(own)
        assert any(name.startswith("decoder.") for name in load_file(file))
    elif kind == "table":
        weights["encoder.embed_tokens.weight"] = weights.pop("shared.weight")
        save_file(weights, file, {"format": "pt"})
    elif kind == "float16":
        save_file({k: v.half() for k, v in weights.items()}, file, {"format": "pt"})
        expected = expected.half().float()
    else:
        file.unlink()
        torch.save(weights, own / "pytorch_model.bin")
    found = FrozenT5(str(own)).text(["a red square"])["text"]
    ids = FrozenT5(str(t5))._tokenizer(["a red square"], return_tensors="pt").input_ids
    torch.testing.assert_close(found, expected(ids).last_hidden_state.detach())


@pytest.mark.parametrize("model", [UMT5EncoderModel, MT5EncoderModel])
def test_relatives_of_t5_are_refused(own, model):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    model(model.config_class(vocab_size=200, **sizes)).save_pretrained(own)
    with pytest.raises(UserError, match=r"has model_type u?mt5, not t5"):
        FrozenT5(str(own)).text(["red"])
    with pytest.raises(UserError, match="not t5"):  # precomputed rows are asked by the hash alone
        _ = FrozenT5(str(own)).hash


def described(t5):
    """What transformers itself writes for the tokenizer of spiece.model."""
    return json.loads(T5Tokenizer.from_pretrained(t5)._tokenizer.to_str())


def test_both_files_of_a_tokenizer_are_read_where_they_agree(t5, own):
    (own / "tokenizer.json").write_text(json.dumps(described(t5)))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(t5 / "spiece.model"))
    for alone in (False, True):
        if alone:
            (own / "spiece.model").unlink()
        ids = FrozenT5(str(own))._tokenizer(["A small red square"]).input_ids[0]
        assert ids == [*pieces.encode("A small red square"), pieces.eos_id()]


def lowered(rule):
    low = {"type": "Lowercase"}
    rule["normalizer"] = {"type": "Sequence", "normalizers": [low, rule["normalizer"]]}


def renumbered(rule):
    vocabulary = rule["model"]["vocab"]
    vocabulary[7], vocabulary[8] = vocabulary[8], vocabulary[7]


def byte_pairs(rule):
    tokens = ["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]
    numbers = {token: i for i, token in enumerate(tokens)}
    rule["model"] = {"type": "BPE", "vocab": numbers, "merges": [], "unk_token": "<unk>"}


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lowered, r"tokenizer.json has other tokens than T5's"),
        (byte_pairs, "cannot be read as T5's tokenizer"),
        (renumbered, "spiece.model (has other tokens|calls it)"),
        (lambda rule: rule.update(normalizer=None), "spiece.model has other tokens"),
    ],
)
def test_another_tokenizer_is_refused(t5, own, change, words, beside):
    """What differs from spiece.model shows only where that is there too."""
    rule = described(t5)
    change(rule)
    (own / "tokenizer.json").write_text(json.dumps(rule))
    if not beside:
        (own / "spiece.model").unlink()
    if not beside and "spiece.model" in words:
        assert FrozenT5(str(own)).text(["red"])
        return
    with pytest.raises(UserError, match=words) as caught:
        FrozenT5(str(own)).text(["red"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model"])
@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\x00\x01\x02"])
def test_a_damaged_tokenizer_is_said_in_one_line(own, name, data):
    (own / "spiece.model").unlink()
    (own / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name} cannot be read as T5's tokenizer") as caught:
        FrozenT5(str(own)).text(["red"])
    assert "\n" not in str(caught.value)


def test_a_configuration_that_is_no_t5s_is_said_in_one_line(own):
    about(own, feed_forward_proj="a-b-c")
    for call in (lambda t5: t5.hash, lambda t5: t5.text(["red"])):
        with pytest.raises(UserError, match=r"config\.json is no T5's") as caught:
            call(FrozenT5(str(own)))
        assert "\n" not in str(caught.value)


def test_more_tokens_than_weights_are_refused(own):
    about(own, vocab_size=20)
    with pytest.raises(UserError, match=r"has a token \d+, but its config.json has 20 tokens"):
        _ = FrozenT5(str(own))._tokenizer


def test_what_a_t5_lacks_is_said_in_one_line(t5, tmp_path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text((t5 / "config.json").read_text())
    for path, words in (
        (tmp_path / "half", "put its spiece.model or tokenizer.json, model.safetensors there"),
        (tmp_path / "nowhere", "nor in the local Hugging Face cache"),
        ("google/t5-v1_1-xxl", "fetch its config.json, tokenizer and weights"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            FrozenT5(str(path)).text(["red"])
        assert "\n" not in str(caught.value)


def test_the_width_is_known_without_weights(t5, tmp_path):
    frozen = FrozenT5(str(tmp_path))
    assert frozen.sizes == {}
    with pytest.raises(UserError, match=r"put its config\.json there"):
        _ = frozen.width
    (tmp_path / "config.json").write_text((t5 / "config.json").read_text())
    assert frozen.sizes == {"text": frozen.width} == {"text": 16}
    assert FrozenT5("google/t5-v1_1-xxl").sizes == {}
    for text, words in (("{", "damaged"), ("[1]", "no JSON object"), ("{}", "no d_model")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=words):
            _ = frozen.width


def text(choice):
    return composed("train", ["data.path=none", "stage=decoder_text", f"text={choice}"]).text


# Of T5 v1.1 (1910.10683 and its release notes): d_model, d_ff, layers, heads of width 64.
T5_SIZES = {
    "small": (512, 1024, 8, 6),
    "base": (768, 2048, 12, 12),
    "large": (1024, 2816, 24, 16),
    "xl": (2048, 5120, 24, 32),
    "xxl": (4096, 10240, 24, 64),
}


@pytest.mark.parametrize("size", T5_SIZES)
def test_t5_of_every_size_counts_what_is_published(size, vectors):
    width, hidden, layers, heads = T5_SIZES[size]
    config = T5Config(
        vocab_size=32128,
        d_model=width,
        d_ff=hidden,
        d_kv=64,
        num_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        model = T5EncoderModel(config)
    total, table = (sum(p.numel() for p in m.parameters()) for m in (model, model.shared))
    expected = vectors["t5_v1_1_encoder_params"][size]
    counted = {"embedding": table, "blocks_only": total - table, "total": total}
    assert counted == expected
    chosen = text(f"t5_{size}")
    assert chosen.size == width
    assert chosen.reader.path_or_name == f"google/t5-v1_1-{size}"


def test_if_reads_77_tokens_of_imagens_t5():
    imagen, floyd = text("t5_xxl"), text("t5_xxl_77")
    assert built(floyd.reader).length == 77
    assert {**floyd, "reader": {**floyd.reader, "length": None}} == {
        **imagen,
        "reader": {**imagen.reader, "length": None},
    }


@pytest.mark.parametrize(
    ("choice", "width", "layers", "length", "billions"),
    [
        ("trained_glide", 2048, 24, 128, 1.2),  # GLIDE, section 4.1: "roughly 1.2 billion"
        ("trained_unclip", 2048, 24, 256, 1.2),
        ("trained_glide_released", 512, 16, 128, 0.05),
    ],
)
def test_trained_transformers_have_their_published_sizes(choice, width, layers, length, billions):
    with torch.device("meta"):
        encoder, reader = built(text(choice).encoder), built(text(choice).reader)
    blocks = sum(p.numel() for p in encoder.blocks.parameters())
    assert blocks == layers * (12 * width**2 + 13 * width)
    assert blocks / 1e9 == pytest.approx(billions, rel=0.03)
    assert encoder.positions.shape == (length, width)
    assert encoder.blocks[0].heads == {2048: 32, 512: 8}[width]
    assert reader.length == length


def test_captions_are_mixed_per_sample_as_in_dalle3(tmp_path):
    with tarfile.open(tmp_path / "train-00000.tar", "w") as tar:
        for i in range(10):
            fields = json.dumps({"long_caption": f"synthetic {i}"}).encode()
            for end, data in (("png", b"unread"), ("txt", b"web %d" % i), ("json", fields)):
                info = tarfile.TarInfo(f"{i:04d}.{end}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    overrides = ["stage=decoder_text", "data=recaptioned", f"data.path={tmp_path}"]
    config = composed("train", overrides)
    shards = built({**config.data, "pictures": {**config.data.pictures, "sizes": []}})
    captions = [shards[n]["caption"].split()[0] for n in range(2000)]
    synthetic = captions.count("synthetic")
    assert synthetic + captions.count("web") == 2000
    assert abs(synthetic / 2000 - 0.95) < 4 * (0.95 * 0.05 / 2000) ** 0.5
    # Drawn anew for each sample number, so that a picture has both in the course of time.
    assert len({captions[n] for n in range(2000) if shards[n]["key"].endswith("/0003")}) == 2

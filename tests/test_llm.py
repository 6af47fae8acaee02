"""Language models as text encoders: their states are transformers' own, from files as published."""

import json
import random
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from cascade.cli import main
from cascade.data.scenes.generate import write_scenes
from cascade.doctor.encoder import encoder as doctor
from cascade.doctor.finding import Budget
from cascade.encoders.llm import FrozenLLM
from cascade.errors import UserError
from cascade.export.encoders import kind_of, place_of, write_encoder
from cascade.runs.run import Run
from tests.small import DECODER

CAPTIONS = ["a red square", "", "a small blue circle left of a large red square", "unheard of ½ 🙂"]
SIZES = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
BERT = {key: SIZES[key] for key in list(SIZES)[:5]}
T5 = {"vocab_size": 300, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def two(name):
    """An encoder-decoder of two equal halves."""
    return getattr(transformers, f"{name}Config")(encoder=dict(SIZES), decoder=dict(SIZES))


MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES)),
    "smollm3": lambda: transformers.SmolLM3ForCausalLM(
        transformers.SmolLM3Config(**SIZES, pad_token_id=0, eos_token_id=1)
    ),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**SIZES, sliding_window=4)
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, num_local_experts=2)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=300, n_embd=16, n_layer=3, n_head=2)
    ),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
    "roberta": lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**BERT)),
    "umt5": lambda: transformers.UMT5ForConditionalGeneration(transformers.UMT5Config(**T5)),
    "t5gemma": lambda: transformers.T5GemmaForConditionalGeneration(two("T5Gemma")),
    "t5gemma2": lambda: transformers.T5Gemma2ForConditionalGeneration(
        transformers.T5Gemma2Config(
            encoder={"text_config": dict(SIZES), "vision_config": VISION}, decoder=dict(SIZES)
        )
    ),
}


def tokenizer(before="", behind=""):
    """Byte pairs of some captions, with special tokens around each, as the file says them."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    rng, words = (
        random.Random(0),
        ["a", "small", "large", "red", "blue", "square", "circle", "left", "of"],
    )
    texts = [" ".join(rng.sample(words, 6)) for _ in range(200)]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<end>", "<begin>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    if before or behind:
        special = [(t, made.token_to_id(t)) for t in (before, behind) if t]
        made.post_processor = processors.TemplateProcessing(
            single=" ".join(filter(None, [before, "$A", behind])), special_tokens=special
        )
    return made


def write(folder, kind, before="<begin>", behind="", shards=False):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # or the layers hardly differ
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder, **({"max_shard_size": "20KB"} if shards else {}))
    tokenizer(before, behind).save(str(folder / "tokenizer.json"))
    return model


FAST = ("llama", "t5gemma2", "bert")  # one of each kind


@pytest.fixture(
    scope="module",
    params=[pytest.param(k, marks=() if k in FAST else pytest.mark.slow) for k in MODELS],
)
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return folder, request.param, write(folder, request.param)


def own(model, name):
    """What reads captions within a model with a head, by transformers' own names."""
    if name in ("umt5", "t5gemma", "t5gemma2"):
        return model.get_encoder()
    return model.base_model


def ids_of(folder, caption):
    file = str(folder / "tokenizer.json")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=file)
    return torch.tensor([fast(caption).input_ids])


@pytest.mark.parametrize("layer", [-1, 0, 2, "mean"])
def test_states_are_those_of_transformers(made, layer):
    folder, name, model = made
    found = FrozenLLM(str(folder), layer).text(CAPTIONS)
    for i, caption in enumerate(CAPTIONS):
        ids = ids_of(folder, caption)
        with torch.no_grad():
            theirs = own(model, name)(input_ids=ids, output_hidden_states=True)
        layers = torch.stack(theirs.hidden_states)[:, 0]
        if layer == "mean":
            some = layers[1:]
            centred = some - some.mean(-1, keepdim=True)
            expected = (centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()).mean(0)
        else:
            expected = theirs.last_hidden_state[0] if layer == -1 else layers[layer]
        assert found["text_mask"][i].tolist() == [
            j < ids.shape[1] for j in range(found["text"].shape[1])
        ]
        states = found["text"][i, : ids.shape[1]]
        torch.testing.assert_close(states, expected, atol=1e-4, rtol=1e-4)


def test_parameters_are_counted_exactly(made):
    """Heads and decoders are not counted; tied and shared ones once; without reading weights."""
    folder, name, model = made
    reader = own(model, name)
    reader = getattr(reader, "text_model", reader)
    unused = {"bert": "pooler", "roberta": "pooler"}.get(name, "no such part")
    expected = sum(p.numel() for n, p in reader.named_parameters() if unused not in n)
    encoder = FrozenLLM(str(folder))
    assert encoder.parameters == expected
    assert encoder.text_parameters == expected - 300 * 16
    assert "_model" not in vars(encoder)
    assert encoder.sizes == {"text": 16}
    assert sum(p.numel() for p in encoder._model.parameters()) == expected


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "t5gemma"])
def test_a_caption_has_the_same_states_in_every_batch(tmp_path, kind, side):
    write(tmp_path, kind)
    encoder = FrozenLLM(str(tmp_path), "mean", "Say what is drawn. ", side=side)
    together = encoder.text(CAPTIONS)
    for i, caption in enumerate(CAPTIONS):
        alone = encoder.text([caption])["text"][0]
        n = len(alone)
        assert together["text_mask"][i].tolist() == [j < n for j in range(len(together["text"][i]))]
        torch.testing.assert_close(together["text"][i, :n], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "roberta"])
def test_learned_positions_are_not_shifted(tmp_path, kind):
    write(tmp_path, kind)
    with pytest.raises(UserError, match="learned positions"):
        FrozenLLM(str(tmp_path), side="left").text(CAPTIONS)


def test_an_instruction_is_read_and_its_states_are_cut(tmp_path):
    model, words = write(tmp_path, "qwen3", behind="<end>"), "A picture of this: "
    states = FrozenLLM(str(tmp_path), -1, words).text(CAPTIONS)
    plain = tokenizer()
    for i, caption in enumerate(CAPTIONS):
        parts = ["<begin>", words, caption, "<end>"]
        ids = [plain.encode(part).ids for part in parts]
        with torch.no_grad():
            whole = model.base_model(
                torch.tensor([[*ids[0], *ids[1], *ids[2], *ids[3]]])
            ).last_hidden_state[0]
        kept = whole[len(ids[0]) + len(ids[1]) :]
        assert states["text_mask"][i].sum() == len(kept)
        torch.testing.assert_close(states["text"][i, : len(kept)], kept, atol=1e-4, rtol=1e-4)
    plainly = FrozenLLM(str(tmp_path), -1).text(CAPTIONS)["text"]
    assert not torch.allclose(plainly[0, 1], states["text"][0, 0], atol=1e-2)


def test_long_captions_are_cut_and_end_as_others_do(tmp_path):
    write(tmp_path, "t5gemma", before="", behind="<end>")
    encoder = FrozenLLM(str(tmp_path), length=5)
    assert encoder.text(["red square " * 50])["text"].shape == (1, 5, 16)
    assert encoder.tokenized(["red square " * 50])[0][-1] == 1
    assert encoder.tokenized([""]) == [[1]]


def test_a_caption_without_tokens_is_an_end_of_text(tmp_path):
    write(tmp_path, "smollm3", before="")
    assert FrozenLLM(str(tmp_path)).text([""])["text_mask"].tolist() == [[True]]


def test_weights_in_several_files_are_the_same(tmp_path):
    one, several = tmp_path / "one", tmp_path / "several"
    write(one, "gemma3")
    write(several, "gemma3", shards=True)
    assert len(list(several.glob("*.safetensors"))) > 2
    found = [FrozenLLM(str(folder)).text(CAPTIONS)["text"] for folder in (one, several)]
    assert torch.equal(*found)
    next(several.glob("model-00002*")).unlink()
    with pytest.raises(UserError, match="has no model-00002"):
        FrozenLLM(str(several)).text(["red"])


def test_the_hash_covers_weights_tokenizer_and_every_choice(tmp_path):
    write(tmp_path, "llama")
    name, hashes = str(tmp_path), set()
    for options in (
        {},
        {"layer": 2},
        {"layer": -1},
        {"instruction": "Draw "},
        {"side": "left"},
    ):
        hashes.add(FrozenLLM(name, **options).hash)
        assert FrozenLLM(name, **options).hash in hashes
    moved = tmp_path.with_name(f"{tmp_path.name}-moved")
    shutil.copytree(tmp_path, moved)
    assert FrozenLLM(str(moved)).hash in hashes
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    hashes.add(FrozenLLM(str(moved)).hash)
    (moved / "config.json").write_text(json.dumps({**config, "transformers_version": "9"}))
    assert FrozenLLM(str(moved)).hash in hashes
    tokenizer("", "<end>").save(str(moved / "tokenizer.json"))
    hashes.add(FrozenLLM(str(moved)).hash)
    weights = load_file(moved / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, moved / "model.safetensors", {"format": "pt"})
    hashes.add(FrozenLLM(str(moved)).hash)
    assert len(hashes) == 8


def altered(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def with_config(**more):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **more}))

    return change


NORM = "model.layers.1.input_layernorm.weight"
REFUSED = {
    "missing": (lambda f: altered(f, lambda w: w.pop(NORM)), f"lacks .*{NORM[6:]}"),
    "shape": (lambda f: altered(f, lambda w: w.update({NORM: torch.ones(4)})), "another shape"),
    "besides": (
        lambda f: altered(f, lambda w: w.update({NORM.replace("1", "9"): torch.ones(16)})),
        "besides layers.9",
    ),
    "layers": (with_config(num_hidden_layers=2), "has besides layers.2"),
    "kind": (with_config(model_type="made_up"), "model_type made_up"),
    "code": (
        with_config(model_type="mine", auto_map={"AutoModel": "mine.Model"}),
        "code in the folder is not run",
    ),
    "quantized": (with_config(quantization_config={"bits": 4}), "quantized"),
    "tokens": (with_config(vocab_size=200), "has 200 tokens"),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json is damaged"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "put its config.json there"),
    "pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "as safetensors",
    ),
    "cut": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x08" + bytes(7) + b"{}"),
        "cannot be read as weights",
    ),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter"),
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_belong_together_is_refused(tmp_path, change, words):
    write(tmp_path, "llama")
    change(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        FrozenLLM(str(tmp_path)).text(["red"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"layer": "first"}, {"side": "middle"}, {"layer": 9}])
def test_a_wrong_choice_is_refused(tmp_path, options):
    write(tmp_path, "llama")
    with pytest.raises(UserError):
        FrozenLLM(str(tmp_path), **options).text(["red"])


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Shards, and the states of their captions as a mean over the layers of a small Qwen3."""
    folder = tmp_path_factory.mktemp("scenes")
    write(folder, "qwen3")
    write_scenes(folder / "shards", "plain", "train", 24, 16, 0)
    options = ["--instruction", "Draw ", "--length", "20"]
    given = ["data", "precompute", str(folder / "shards"), "--text", str(folder)]
    assert main([*given, *options]) == 0
    return folder


def training(folder, run, *more):
    net = [o for o in DECODER if not o.startswith(("clip.", "text="))]
    reader = [
        "+text.reader.instruction='Draw '",
        f"text.reader.folder={folder}",
        "text.size=16",
        "+text.reader.length=20",
    ]
    data = [f"data.path={folder / 'shards'}", f"run={folder / run}", "images=80", "text=llm"]
    return ["train", *net, *reader, *data, *more]


@pytest.mark.slow
def test_twenty_steps_with_rows_and_with_the_model_are_the_same(scenes):
    """To the precision of bfloat16, in which rows are kept."""
    assert main(training(scenes, "rows", "precomputed=text")) == 0
    assert main(training(scenes, "online")) == 0
    rows, online = (load_file(Run(scenes / run).weights[0]) for run in ("rows", "online"))
    assert rows.keys() == online.keys()
    for name, value in rows.items():
        torch.testing.assert_close(value, online[name], atol=5e-3, rtol=0)


@pytest.mark.parametrize("other", ["+text.reader.layer=2", "+text.reader.side=left"])
def test_rows_of_another_choice_are_refused(scenes, other, capsys):
    assert main(training(scenes, "refused", "precomputed=text", other)) == 2
    assert "was made by another encoder" in capsys.readouterr().err


def test_describe_counts_the_model(scenes, capsys):
    argv = [o for o in training(scenes, "none")[1:] if not o.startswith(("run=", "data."))]
    assert main(["describe", *argv, "data.path=none"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"({FrozenLLM(str(scenes)).parameters:,} parameters), frozen" in said


def test_a_copy_has_the_same_hash_and_the_doctor_says_it(scenes, tmp_path):
    reader = FrozenLLM(str(scenes), "mean")
    assert kind_of(reader) == "llm"
    assert place_of(reader) == (str(scenes), None)
    write_encoder(reader, tmp_path / "llm")
    assert FrozenLLM(str(tmp_path / "llm"), "mean").hash == reader.hash
    said = " ".join(finding.what for finding in doctor(tmp_path / "llm", Budget(None)))
    assert f"{reader.parameters:,} parameters" in said
    assert FrozenLLM(str(scenes)).hash in said


@pytest.mark.parametrize("option", [["--padded"], ["--raw"]])
def test_options_of_other_encoders_are_refused(scenes, option, capsys):
    argv = ["data", "precompute", str(scenes / "shards"), "--text", str(scenes)]
    assert main([*argv, *option]) == 2
    assert "a language model" in capsys.readouterr().err

"""Learned words: tokens beside the vocabulary, one row of each table, and nothing else."""

import pytest
import torch
from safetensors.torch import load_file

from cascade.adapters.words import WORD, Word, check_word, learned
from cascade.encoders.text import Tokenizer, ids, token_mask, token_of, tokenize
from cascade.errors import UserError
from cascade.runs.model import load_cascade
from cascade.runs.run import Run
from tests.models import write_model

NAME = "<blicket>"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("words")
    write_model(root)
    for name in ("prior", "decoder"):
        stage = Run(root / name).load()
        stage.adapt(Word(NAME, "circle"))
        with torch.no_grad():
            for row in stage.adapter.rows.values():
                row += 1
        stage.export(root / f"{name}_word")
    return root


def test_a_word_is_one_token_and_other_captions_are_read_as_before():
    captions = ["a red circle", "", "a very long caption " * 20]
    assert torch.equal(tokenize(captions, 12, [NAME]), tokenize(captions, 12))
    start, a, red, end = 49406, 320, 736, 49407
    assert ids(["a red <Blicket>"], 12, [NAME]) == [[start, a, red, -1, end]]
    assert ids([f"{NAME}, a {NAME}"], 12, ["dax", NAME])[0][1] == -2
    found = tokenize([f"a {NAME}" * 20], 8, [NAME])
    assert found[0, -1] == end
    assert token_mask(found).all()
    # A word of letters ends where letters do not go on.
    assert -1 in ids(["a zorp."], 12, ["zorp"])[0]
    assert ids(["a zorpy"], 12, ["zorp"]) == ids(["a zorpy"], 12)
    assert Tokenizer(12).tokenized([NAME]) == ids([NAME], 12)


def captions(*texts):
    return {
        "caption": list(texts),
        "sample": torch.arange(len(texts)),
        "clip_image": torch.eye(12)[: len(texts)],
    }


@pytest.mark.parametrize("name", ["prior", "decoder"])
def test_it_begins_as_the_word_that_it_is_like(model, name):
    stage, base = Run(model / name).load(), Run(model / name).load()
    stage.adapt(Word(NAME, "circle"))
    one, other = captions("a red <blicket>"), captions("a red circle")
    found, expected = (s.conditioner(s.encoded(b)) for s, b in ((stage, one), (base, other)))
    torch.testing.assert_close(found.tokens, expected.tokens)
    plain = stage.conditioner(stage.encoded(other))
    torch.testing.assert_close(plain.tokens, expected.tokens, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["prior", "decoder"])
def test_the_loss_reaches_the_row_alone(model, name):
    stage = Run(model / name).load()
    before = {key: value.clone() for key, value in stage.state_dict().items()}
    stage.adapt(Word(NAME, "circle"))
    trained = [key for key, p in stage.named_parameters() if p.requires_grad]
    assert trained == [f"adapter.rows.{'text' if name == 'prior' else 'tokens'}"]
    batch = captions(f"a red {NAME}", "a red circle") | {"image_16": torch.rand(2, 3, 16, 16)}
    optimizer = torch.optim.AdamW(stage.groups(), lr=0.1)
    stage.training_step(stage.encoded(batch), 0).backward()
    optimizer.step()
    row = next(iter(stage.adapter.rows.values()))
    assert row.grad.abs().max() > 0
    after = {key.replace(".table.", "."): value for key, value in stage.state_dict().items()}
    assert all(torch.equal(after[key], value) for key, value in before.items())
    # A caption without the word has no gradient.
    other = captions("a cross") | {"image_16": batch["image_16"][:1]}
    assert not stage.training_step(stage.encoded(other), 0).requires_grad


def test_a_cascade_reads_the_words_of_runs(model):
    (model / "words.yaml").write_text(
        "stages: {prior: {words: [prior_word]}, decoder: {words: [decoder_word]}}\n"
    )
    (model / "plain.yaml").write_text("stages: {prior: {}, decoder: {}}\n")

    def sampled(file, text):
        batch = {"caption": [text], "sample": torch.tensor([0])}
        return load_cascade(model / file)(batch, 0)

    one, other = (sampled(file, "a red circle") for file in ("words.yaml", "plain.yaml"))
    assert all(torch.equal(one[key], other[key]) for key in ("clip_image", "image_16"))
    one, other = (sampled(file, f"a red {NAME}") for file in ("words.yaml", "plain.yaml"))
    assert not torch.equal(one["clip_image"], other["clip_image"])
    assert not torch.equal(one["image_16"], other["image_16"])
    links = [load_cascade(model / f).stages[1] for f in ("words.yaml", "plain.yaml")]
    assert (
        links[0].encoders[0].hash != links[1].encoders[0].hash
    )  # which folders of pictures record


def test_a_file_holds_the_row_and_says_of_what_network(model):
    found = load_file(model / "prior_word" / WORD)
    clip = load_file(model / "clip" / "open_clip_model.safetensors")
    torch.testing.assert_close(
        found["text"], clip["token_embedding.weight"][token_of("circle")] + 1
    )
    stage = Run(model / "early").load()
    with pytest.raises(UserError, match="trained for another network"):
        learned(stage, [model / "decoder_word"])
    stage = Run(model / "decoder").load()
    with pytest.raises(UserError, match="the word of another run, too"):
        learned(stage, [model / "decoder_word"] * 2)
    with pytest.raises(UserError, match=r"holds no word\.safetensors"):
        learned(stage, [model / "decoder"])


def test_several_words_have_a_token_each(model):
    stage = Run(model / "decoder").load()
    stage.adapt(Word("dax <2>", "square"))
    stage.export(model / "second")
    both = learned(Run(model / "decoder").load(), [model / "decoder_word", model / "second"])
    tokens = both.encoded(captions(f"a {NAME} and a dax <2>"))["tokens"]
    assert sorted(set(tokens[tokens < 0].tolist())) == [-2, -1]
    rows = both.conditioner.embedders["caption"].encoder.embed(torch.tensor([[-1, -2]]))[0]
    table = Run(model / "decoder").load().conditioner.embedders["caption"].encoder.embed
    torch.testing.assert_close(
        rows,
        table(torch.tensor([token_of("circle"), token_of("square")]))
        + torch.tensor([[1.0], [0.0]]),
    )


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("circle", "a word already: give one such as '<circle>'"),
        ("Circle", "a word already"),
        ("", "without spaces"),
        (" <x>", "without spaces"),
        ("x" * 101, "without spaces"),
    ],
)
def test_what_is_no_new_word_is_refused(word, says):
    with pytest.raises(UserError, match=says):
        check_word(word)


def test_a_word_is_like_one_word():
    with pytest.raises(UserError, match="several tokens"):
        Word(NAME, "blicket")

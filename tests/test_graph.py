"""Static graphs of networks compute what the networks do, and their table compares the two."""

import numpy as np
import pytest
import torch
from PIL import Image

from cascade import cli
from cascade.config.compose import built, composed, saved
from cascade.eval.benchmarks import graph
from cascade.pipeline import Cascade

SMALL = [
    *("stage=decoder_text", "text=trained_tiny", "size=16", "text.size=16"),
    *("net.channels=8", "net.embed=16", "net.blocks=1", "net.width=32", "net.head_channels=8"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A cascade of one stage that reads captions."""
    folder = tmp_path_factory.mktemp("model")
    config = composed("train", [*SMALL, f"run={folder / 'decoder'}", "data.path=none"])
    saved(config, folder / "decoder/config.yaml")
    torch.manual_seed(0)
    stage = built(config.stage)
    for (
        parameter
    ) in stage.parameters():  # some of which begin at zero, so that nothing would differ
        torch.nn.init.normal_(parameter, std=0.05)
    stage.export(folder / "decoder")
    (folder / "cascade.yaml").write_text("stages:\n  decoder: {steps: 2}\n")
    return folder


def test_a_network_is_exported_once_for_each_shape(model):
    made = []

    def make(flat, given):
        made.append(tuple(given[0].shape))
        return flat

    (link,) = graph.load_cascade(model).stages
    expected = {}
    for count in (1, 2, 1):
        expected[count] = graph.paint(Cascade([link]), ["a red circle"] * count, 0)["image_16"]
    link.net.forward = graph.Exported(link.net, make)
    for count in (1, 2, 1):
        found = graph.paint(Cascade([link]), ["a red circle"] * count, 0)["image_16"]
        assert torch.equal(found, expected[count])
    assert [shape[0] for shape in made] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["onnx", "ahead of time"])
def test_what_is_exported_paints_the_same(model, way, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    _, eager = graph.measured(model, "eager", 2, 1)
    times, found = graph.measured(model, way, 2, 1)
    assert set(times) == {"image_16", graph.WHOLE}
    assert times["image_16"]["first"] > times["image_16"]["later"] > 0
    assert (found["image_16"] - eager["image_16"]).abs().max() < 1e-4
    assert eager["image_16"].std() > 0.1


@pytest.mark.slow
def test_compiled_networks_paint_the_same(model, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    pictures = []
    for option in ([], ["--compile"]):
        out = str(tmp_path / f"{len(option)}.png")
        words = ["sample", "a red circle", "--model", str(model), "--out", out, *option]
        assert cli.main(words) == 0
        pictures.append(np.asarray(Image.open(out), dtype=int))
    assert abs(pictures[0] - pictures[1]).max() <= 1
    assert pictures[0].std() > 20
    monkeypatch.setenv("CXX", "no-compiler")
    assert cli.main([*words[:-2], str(tmp_path / "2.png"), "--compile"]) == 2


def test_the_table_compares_with_eager():
    times = {
        way: {of: {"first": first, "later": later} for of in ("image_16", graph.WHOLE)}
        for way, first, later in (("eager", 1.0, 0.5), ("compile", 60.0, 0.25))
    }
    pictures = {"eager": np.zeros((1, 3, 2, 2)), "compile": np.full((1, 3, 2, 2), 2 / 255)}
    found = {
        way: {"times": times[way], "memory": 100.0, "pictures": pictures[way]} for way in times
    }
    rows = list(zip(*(column.cells for column in graph.table({**found, "onnx": {}}).columns)))
    assert rows[1] == ("eager", "all", "1.00", "0.500", "1.00", "100", "0")
    assert rows[2] == ("compile", "image_16", "60.00", "0.250", "0.50", "", "")
    assert rows[3] == ("compile", "all", "60.00", "0.250", "0.50", "100", "1")
    assert rows[4][:2] == ("onnx", "failed: see above")

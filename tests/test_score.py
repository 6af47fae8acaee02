"""Numbers of pictures on disk: those of the metrics, whoever computes them, and with a protocol."""

import gzip
import json
import math
import pickle
import shutil
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cascade.cli import main
from cascade.data.scenes.generate import write_scenes
from cascade.encoders.clip import Architecture, FrozenCLIP, save_clip
from cascade.errors import UserError
from cascade.eval.cascades.protocol import measured, sample_of
from cascade.eval.metrics import interval
from cascade.eval.metrics import measures as measures_module
from cascade.eval.metrics.distances import cosines, frechet_rows, inception_score
from cascade.eval.metrics.features import CLIPFeatures, InceptionFeatures, inception
from cascade.eval.metrics.kernels import cmmd, kid, kid_subsets
from cascade.eval.metrics.manifold import in_balls, precision
from cascade.eval.metrics.measures import CLIP_SCORE, SWEEPS, Measure
from cascade.eval.metrics.statistics import Moments, Origin
from cascade.eval.pictures import captions, extraction, generation, record
from cascade.eval.pictures.evaluation import Evaluation, opened
from cascade.eval.pictures.prompts import LAYOUTS, Prompt
from cascade.eval.pictures.record import Record
from cascade.eval.pictures.sets import picture_set
from cascade.pipeline import Cascade
from tests.hostile import refused
from tests.processes import Job

COLORS = ("red", "green", "blue", "white")


def picture(seed, size=32):
    rng = np.random.default_rng(seed)
    tint = rng.integers(0, 200, 3)
    return (tint + rng.integers(0, 56, (size, size, 3))).astype(np.uint8)


def write(folder, seeds, size=32):
    folder.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(seeds):
        Image.fromarray(picture(seed, size)).save(folder / f"{i:04d}.png")
        (folder / f"{i:04d}.txt").write_text(f"a {COLORS[i % 4]} square")
    return folder


class Blocks:
    """A space of means over blocks of pixels; it counts the pictures that it has seen."""

    name, dim, hash, resize = "means of blocks", 12, "0123456789abcdef", "none"
    seen = 0

    def __call__(self, pictures):
        self.seen += len(pictures)
        x = torch.nn.functional.adaptive_avg_pool2d(pictures.float() / 255, 2).flatten(1)
        return x + torch.tanh(3 * x.roll(1, 1))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """37 pictures and a reference of 43 others."""
    folder = tmp_path_factory.mktemp("sets")
    return write(folder / "fake", range(37)), write(folder / "real", range(100, 143))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    of_text = {"text_width": 16, "text_layers": 1, "text_heads": 2, "length": 16}
    architecture = Architecture(32, 8, 1, 32, patch=8, **of_text)
    save_clip(architecture, architecture.build(), folder)
    return folder


@pytest.fixture
def work(sets, tmp_path):
    fake, real = map(picture_set, sets)
    found = captions.captioned(fake)
    return Evaluation(fake, {}, real, found, cache=tmp_path / "cache", draws=20)


def test_a_space_without_numbers_is_refused(work):
    """Before its features are computed: of pictures alone there is only the Inception score."""
    space = Blocks()
    with pytest.raises(UserError, match="nothing to measure in means of blocks: give a --ref"):
        replace(work, reference=None).records([space])
    assert space.seen == 0


def test_features_that_an_earlier_version_kept_are_read(work, clip):
    """It named them by the hash of the weights, which a directory's configuration completes."""
    judge, weights = FrozenCLIP(str(clip)), (clip / "open_clip_model.safetensors").read_bytes()
    old = sha256(weights).hexdigest()[:16]
    before = CLIPFeatures(judge)
    before.hash, before.name = old, f"CLIP features of {clip}, {old[:8]}"
    before.clip = SimpleNamespace(name=str(clip), image=judge.image)
    work = replace(work, captions=None)
    expected = [record.value for record in work.records([before])]
    kept = sorted(work.cache.iterdir())
    after = CLIPFeatures(judge)
    assert after.hash != old
    after.clip = SimpleNamespace(name=str(clip), former=judge.former)  # nothing to compute with
    assert [record.value for record in work.records([after])] == expected
    assert sorted(work.cache.iterdir()) == kept
    statistics = next(path for path in kept if path.suffix == ".npz")
    assert Moments.load(statistics).check(after) == []
    foreign = SimpleNamespace(name="ViT-B-32", former=judge.former, image=judge.image)
    foreign.hash, foreign.dim = judge.hash, judge.dim
    with pytest.raises(UserError, match="statistics are of"):
        Moments.load(statistics).check(CLIPFeatures(foreign))


def by_name(records):
    assert len({found.name for found in records}) == len(records)
    return {found.name: found for found in records}


def batches(pictures):
    """Batches of another size than extraction's, with the rows of their pictures."""
    blocks = pictures.blocks(10)
    return [(torch.tensor(rows), x) for rows, x in zip(blocks, pictures.batches(blocks))]


def in_order(pictures, space):
    """The features of a set, from batches of another size than extraction's."""
    found = torch.empty(len(pictures), space.dim)
    for rows, batch in batches(pictures):
        found[rows] = space(batch)
    return found


def test_numbers_are_those_of_the_metrics(work, clip):
    """The same features go through the metrics' own functions."""
    judge = FrozenCLIP(str(clip))
    for space in (Blocks(), CLIPFeatures(judge)):
        found = by_name(work.records([space]))
        fake, real = (in_order(pictures, space) for pictures in work.sets)
        densities, covered = in_balls(fake, real)
        expected = {
            f"Fréchet distance ({space.name})": frechet_rows(fake, real, minimum=2),
            "precision": precision(fake, real),
            "recall": precision(real, fake),
            "density": densities.mean().item(),
            "coverage": covered.double().mean().item(),
        }
        if isinstance(space, Blocks):
            expected |= {"KID": kid(fake, real), "KID (subsets)": kid_subsets(fake, real)[0]}
        else:
            texts = judge.text([row["caption"] for row in work.captions])["clip_text"]
            score = cosines(fake, texts).mean().item()
            expected |= {"CMMD": cmmd(fake, real), "CLIP score": score}
        # The network's own float32 depends on how pictures are batched.
        exact = 1e-9 if isinstance(space, Blocks) else 1e-5
        assert {name: r.value for name, r in found.items()} == pytest.approx(
            expected, rel=exact, abs=exact
        )


def test_a_measure_is_one_entry_of_the_table(work, monkeypatch):
    toy = Measure(
        "norm",
        "mean norm",
        "less",
        lambda sample: sample.rows.norm(dim=1).mean().item(),
        lambda sample: (0.0, 9.0),
    )
    monkeypatch.setattr(measures_module, "MEASURES", (*measures_module.MEASURES, toy))
    fake, real = (in_order(pictures, Blocks()) for pictures in work.sets)
    norm = pytest.approx(fake.norm(dim=1).mean().item(), rel=1e-6)
    found = by_name(work.records([Blocks()]))["mean norm"]
    assert (found.value, found.interval) == (norm, (0.0, 9.0))
    of_cascade = measured(sample_of(Blocks(), fake, real, None))
    assert (of_cascade["norm"], of_cascade["intervals"]["norm"]) == (norm, (0.0, 9.0))
    assert toy in measures_module.measures(SWEEPS)
    assert (toy.best([2.0, 1.0]), CLIP_SCORE.best([2.0, 1.0])) == (1, 0)


def test_intervals_hold_their_number(work):
    for found in work.records([Blocks()]):
        if found.interval:
            assert found.interval[0] <= found.value <= found.interval[1]
    bare = by_name(replace(work, draws=0).records([Blocks()]))
    assert bare["KID"].interval is None
    assert bare["precision"].interval == interval.of_share(bare["precision"].value, 37)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(extraction, "BLOCK", 4)
    monkeypatch.setattr(extraction, "PART", 2)


@pytest.mark.parametrize("count", [2, 3, 9])
def test_shards_find_the_numbers_of_one(work, small_parts, tmp_path, count):
    """Five parts and six: of nine shards, some have no picture. They run one after the other."""
    one = work.records([Blocks()])
    shared, spaces = replace(work, cache=tmp_path / "shared"), [Blocks() for _ in range(count)]
    results = [shared.records([spaces[i]], (i, count)) for i in reversed(range(count))]
    assert [r is None for r in results] == [True] * (count - 1) + [False]
    assert sum(space.seen for space in spaces) == 37 + 43
    for a, b in zip(one, results[-1]):
        assert a.value == pytest.approx(b.value, rel=1e-9, abs=1e-12)
        assert replace(a, value=0.0, interval=None) == replace(b, value=0.0, interval=None)
    assert not list(tmp_path.glob("shared/parts-*"))


def test_features_are_kept_and_of_one_protocol_only(work, sets):
    first, again, other = Blocks(), Blocks(), Blocks()
    other.resize = "another"
    numbers = [asdict(record) for record in work.records([first])]
    assert [asdict(record) for record in work.records([again])] == numbers
    work.records([other])
    assert (first.seen, again.seen, other.seen) == (80, 0, 80)
    changed = sets[0] / "0003.png"
    before = changed.read_bytes()
    try:
        Image.fromarray(picture(999)).save(changed)
        anew = replace(work, pictures=picture_set(sets[0]))
        records = anew.records([again])
        assert again.seen == 37  # the reference's are kept
        assert [r.value for r in records] != [n["value"] for n in numbers]
    finally:
        changed.write_bytes(before)


def test_a_killed_extraction_goes_on(work, small_parts):
    class Dying(Blocks):
        def __call__(self, pictures):
            if self.seen >= 20:
                raise KeyboardInterrupt
            return super().__call__(pictures)

    dying, after = Dying(), Blocks()
    with pytest.raises(KeyboardInterrupt):
        work.records([dying])
    assert work.records([after]) is not None
    assert after.seen == 80 - 16  # two parts of eight pictures had been done


def test_a_set_is_read_block_by_block(work, small_parts):
    class Watching(Blocks):
        def __call__(self, pictures):
            assert len(pictures) <= 4
            return super().__call__(pictures)

    rows = extraction.features_of(work.pictures, Watching(), work.cache, torch.device("cpu"))
    kept = extraction.moments_of(rows, Origin.of(Blocks(), "x"), work.cache)
    torch.testing.assert_close(kept.cov, torch.cov(rows.double().T), rtol=1e-12, atol=1e-15)
    assert kept.n == 37


def test_files_of_statistics_are_references(work, tmp_path):
    whole = by_name(work.records([Blocks()]))
    name = "Fréchet distance (means of blocks)"
    rows = torch.cat([Blocks()(batch) for _, batch in batches(work.reference)])
    moments = Moments.of(rows, Origin.of(Blocks(), work.reference.hash))
    moments.save(tmp_path / "ours.npz")
    np.savez(tmp_path / "theirs.npz", mu=moments.mean.numpy(), sigma=moments.cov.numpy())
    for file, count in (("ours.npz", 43), ("theirs.npz", None)):
        (found,) = replace(work, reference=tmp_path / file).records([Blocks()])
        assert (found.name, found.reference_count) == (name, count)
        assert found.value == pytest.approx(whole[name].value, rel=1e-9)
        assert any("unknown extractor" in w for w in found.warnings) == (count is None)
    other = Blocks()
    other.hash = "another"
    refused(
        lambda: replace(work, reference=tmp_path / "ours.npz").records([other]), "same extractor"
    )
    np.savez(tmp_path / "wide.npz", mu=np.zeros(13), sigma=np.eye(13))
    refused(
        lambda: replace(work, reference=tmp_path / "wide.npz").records([Blocks()]), "13 dimensions"
    )


def test_inceptions_numbers(sets, tmp_path):
    """Of seeded weights, which are not those of the FID, and give no number of that name."""
    torch.manual_seed(0)
    torch.save(inception().state_dict(), tmp_path / "weights.pth")
    data = (tmp_path / "weights.pth").read_bytes()
    with pytest.raises(UserError, match="copy"):
        InceptionFeatures(tmp_path / "weights.pth")
    import hashlib

    space = InceptionFeatures(tmp_path / "weights.pth", hashlib.sha256(data).hexdigest())
    few = picture_set(sets[0], only={f"{i:04d}" for i in range(12)})
    work = Evaluation(few, {}, cache=tmp_path)
    (score,) = work.records([space])
    rows = extraction.features_of(few, space, tmp_path, torch.device("cpu"))
    assert (score.value, score.std) == inception_score([space.logits(rows)])
    assert "FID" not in {r.name for r in work.records([space])}


def test_what_is_to_be_said_stands_beside_the_number(work, sets, tmp_path):
    for found in work.records([Blocks()]):
        assert "fewer than 10,000 pictures" in found.warnings
    tall = tmp_path / "tall"
    tall.mkdir()
    for i in range(11):
        Image.fromarray(picture(i)[:, :20]).save(tall / f"{i}.png")
    Image.fromarray(picture(100)).save(tall / "9.png")
    Image.fromarray(picture(5)[:, :, 0]).save(tall / "8.png")
    strange = replace(work, pictures=picture_set(tall), captions=None)
    assert strange.notes == [f"{tall}: 1 grey, made RGB"]
    (distance, *_) = strange.records([Blocks()])
    assert "pictures and reference differ in size" in distance.warnings
    assert "1 pictures are in the reference as well" in distance.warnings
    assert "fewer pictures than the feature dimension" in distance.warnings
    refused(lambda: opened(tall, mixed=False), "sizes")
    few = replace(work, pictures=picture_set(sets[0], only={"0000", "0001"}), captions=None)
    refused(lambda: few.records([Blocks()]), "has 2 pictures")


@dataclass
class Painter:
    """Stands for a trained stage."""

    reads: frozenset = frozenset({"caption"})
    writes: str = "image_32"

    def encoded(self, batch):
        return batch

    def sample(self, batch, seed, progress=None):
        pictures = [torch.from_numpy(picture(n)).permute(2, 0, 1) for n in batch["sample"].tolist()]
        return torch.stack(pictures) / 127.5 - 1


MODEL = {
    "weights": "EMA",
    "hash": "abc",
    "stages": {"image_32": {"sampler": {"scale": 2.5, "steps": 20}}},
}


@pytest.fixture
def generated(tmp_path):
    texts = ["a red star", "a blue ring " * 20, "a green moon"]
    prompts = [Prompt(t, {"prompt": t, "Category": k}) for t, k in zip(texts, "ABA")]
    job = generation.Job(tmp_path / "generated", prompts, LAYOUTS["plain"], 6, seed=7)
    generation.generate(Cascade([Painter()]), job, MODEL)
    return job.out


def numbers(folder):
    return by_name(loaded(folder / "numbers.json"))


def loaded(path):
    """The records of a file, as they were before."""
    pairs = ("interval", "warnings")
    return [
        Record(**{**found, **{k: found[k] if found[k] is None else tuple(found[k]) for k in pairs}})
        for found in json.loads(path.read_text())["records"]
    ]


def test_the_command_measures_a_generated_folder(generated, sets, clip, tmp_path, capsys):
    argv = ["evaluate", "--pictures", str(generated), "--clip", str(clip), "--bootstrap", "10"]
    argv += ["--reference", str(sets[1]), "--out", str(tmp_path / "out"), "--cache", str(tmp_path)]
    for shard in ("1/2", "0/2"):
        assert main([*argv, "--shard", shard]) == 0
    assert main(argv) == 0
    assert "CLIP score" in capsys.readouterr().out
    found = numbers(tmp_path / "out")
    score = found["CLIP score"]
    assert (score.guidance, score.steps, score.seed) == ({"image_32": 2.5}, {"image_32": 20}, 7)
    assert (score.weights, score.model_hash, score.count) == ("EMA", "abc", 18)
    parts = found["CLIP score, Category A"], found["CLIP score, Category B"]
    assert [part.count for part in parts] == [12, 6]
    assert score.value == pytest.approx((12 * parts[0].value + 6 * parts[1].value) / 18)
    cut = "6 captions have more than 16 tokens, and are cut"
    assert [cut in part.warnings for part in (score, *parts)] == [True, False, True]
    assert found["CMMD"].reference_hash == picture_set(sets[1]).hash
    page = (tmp_path / "out" / "report.html").read_text()
    assert "guidance image_32=2.5" in page
    assert "data:image/png" in page


def test_ranks_measure_together(generated, sets, clip, tmp_path):
    """Three processes at once, which find each other's share as torchrun gives it."""
    argv = ["evaluate", "--pictures", str(generated), "--clip", str(clip), "--bootstrap", "0"]
    argv += ["--reference", str(sets[1])]
    one, three = (
        [*argv, "--out", str(tmp_path / name), "--cache", str(tmp_path / f"{name}.features")]
        for name in ("one", "three")
    )
    assert main(one) == 0
    ranks = Job(main, (three,), out=tmp_path / "log", ranks=3)
    assert ranks.wait(120) == [0, 0, 0], ranks.output()
    one, three = numbers(tmp_path / "one"), numbers(tmp_path / "three")
    assert one.keys() == three.keys()
    for name, found in one.items():
        assert three[name].value == pytest.approx(found.value, rel=1e-9, abs=1e-12)


def test_one_missing_picture_is_named_before_any_number(generated, clip, tmp_path, capsys):
    (generated / "00001_0003.png").unlink()
    argv = ["evaluate", "--pictures", str(generated), "--clip", str(clip)]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 2
    assert "00001_0003" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "no features to measure in"),
        (["--clip", "CLIP"], "nothing to measure"),
        (["--clip", "CLIP", "--judge", "x"], "without --model"),
        (["--clip", "CLIP", "--shard", "2/2"], "i/n"),
        (["--clip", "CLIP", "--reference", "x", "--bootstrap", "-1"], "bootstrap"),
        (["--clip", "CLIP", "--resize", "pytorch"], "Inception's"),
        (["--clip", "CLIP", "--reference", "nowhere"], "nowhere is not there"),
        (["--clip", "CLIP", "--reference", "nowhere.npz"], "no statistics"),
        (["--clip", "CLIP", "--reference", "coco:nowhere"], "captions_val2014.json is not there"),
        (["--clip", "CLIP", "--captions", "missing.csv"], "missing.csv"),
        (["--dino", "nowhere"], "no config.json"),
        (["--inception", "nowhere.pth"], "no Inception weights"),
        (["--inception", "nowhere.pth", "--checkpoint", "x"], "give --clip"),
    ],
)
def test_the_command_refuses(options, says, sets, clip, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for i in range(12):
        Image.fromarray(picture(i)).save(bare / f"{i}.png")
    given = [str(clip) if word == "CLIP" else word for word in options]
    assert main(["evaluate", "--pictures", str(bare), *given]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert says in error
    assert error.startswith("cascade: ")


def test_nothing_is_written_into_what_is_measured(sets, clip, tmp_path, monkeypatch, capsys):
    """Nor where the set is called `.`, whose features lay in it as `..features`."""
    shutil.copytree(sets[0], tmp_path / "set")
    before = sorted((tmp_path / "set").iterdir())
    monkeypatch.chdir(tmp_path / "set")
    argv = ["evaluate", "--pictures", ".", "--clip", str(clip)]
    assert main(argv) == 0
    assert sorted((tmp_path / "set").iterdir()) == before
    assert (tmp_path / "set.evaluation" / "numbers.json").exists()
    assert list((tmp_path / "set.features").iterdir())
    for option in ("--out", "--cache"):
        refuse = [*argv[:2], str(tmp_path / "set"), *argv[3:], option, "inside"]
        assert main(refuse) == 2
        assert f"which is only read: choose another {option}" in capsys.readouterr().err
    assert sorted((tmp_path / "set").iterdir()) == before


def test_features_of_shards_that_cannot_be_written_to_are_not_kept(tmp_path):
    write_scenes(tmp_path, "plain", "train", 5, 32, seed=0)
    (tmp_path / "features").write_text("a file in the place of the folder")
    found = extraction.features_of_split(tmp_path, "train", 32, Blocks())
    (tmp_path / "features").unlink()
    assert torch.equal(found, extraction.features_of_split(tmp_path, "train", 32, Blocks()))
    assert (tmp_path / "features").is_dir()


def written(path, kind):
    data = {"mu": np.zeros(3), "sigma": np.eye(3)}
    match kind:
        case "npy":
            np.save(path.open("wb"), data["sigma"])
        case "npz":
            np.savez(path.open("wb"), **data)
        case "pkl":
            path.write_bytes(pickle.dumps(data))
        case "pt":
            torch.save({k: torch.from_numpy(v) for k, v in data.items()}, path)
        case "old":
            torch.save({"mu": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
        case "gz":
            path.write_bytes(gzip.compress(b"x"))
        case "png":
            Image.fromarray(picture(0)).save(path, "PNG")
        case "safetensors":
            save_file({"mu": torch.zeros(3)}, path)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("npy", "a single NumPy array"),
        ("npz", "a file of NumPy arrays"),
        ("pkl", "a pickle, which is not opened"),
        ("pt", "a file of PyTorch"),
        ("old", "a pickle, which is not opened"),
        ("gz", "compressed with gzip"),
        ("png", "a single picture"),
        ("safetensors", "a file of safetensors"),
    ],
)
def test_another_container_is_called_what_it_is(kind, says, tmp_path):
    path = tmp_path / "samples.tar"  # whatever its name says
    written(path, kind)
    refused(lambda: opened(path, False), f"is {says}")


def test_pictures_or_a_model_and_not_both(capsys):
    for argv in ([], ["--pictures", "x", "--model", "y"]):
        with pytest.raises(SystemExit) as stop:
            main(["evaluate", *argv])
        assert stop.value.code == 2
    assert main(["evaluate", "--model", "x"]) == 2
    assert "--judge" in capsys.readouterr().err
    assert main(["evaluate", "--model", "x", "--data", "y", "--judge", "ViT-L-14"]) == 2
    assert "--judge ViT-L-14 is no directory" in capsys.readouterr().err


# Records

NUMBER = Record(
    name="Fréchet distance (CLIP features of ViT-B-32, 0123abcd)",
    value=12.345678,
    interval=(11.5, 13.25),
    count=300,
    pictures="out",
    pictures_hash="aa",
    format="PNG",
    size="64x64",
    reference="val",
    reference_count=1000,
    reference_hash="bb",
    extractor="CLIP features of ViT-B-32, 0123abcd",
    extractor_hash="0123abcd",
    resize="antialiased bicubic to the size that the CLIP sees",
    guidance={"image_64": 1.5},
    steps={"image_64": 50},
    weights="EMA",
    model_hash="cc",
    captions_hash="dd",
    seed=0,
    warnings=("fewer than 10,000 pictures",),
)


def test_a_record_says_its_protocol():
    words = NUMBER.words
    for part in ("12.35 [11.5, 13.25]", "n = 300 (out, aa) vs 1,000 (val, bb)", "PNG, 64x64"):
        assert part in words
    for part in ("guidance image_64=1.5", "steps image_64=50", "EMA", "captions dd", "seed 0"):
        assert part in words
    assert "beware: fewer than 10,000 pictures" in words
    assert "\n" not in words


def test_records_come_back_as_they_were(tmp_path):
    bare = Record(
        name="n", value=-0.5, count=2, pictures="p", pictures_hash="h", format="PNG", size="1x1"
    )
    record.save([NUMBER, bare], ["a note"], tmp_path / "numbers.json")
    assert loaded(tmp_path / "numbers.json") == [NUMBER, bare]
    assert len(record.rows([NUMBER, bare])[0]) == len(record.COLUMNS)


def test_numbers_that_are_not_finite_are_refused():
    for value in (math.nan, math.inf):
        refused(lambda value=value: replace(NUMBER, value=value), "damaged")

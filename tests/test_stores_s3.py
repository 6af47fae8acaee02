"""Claims about stores that speak S3: moto's server on loopback, behind a proxy that makes faults.

`make moto` installs it into build/moto, apart from the locked versions, which it disagrees with.
"""

import json
import os
import socket
import subprocess
import time
from http.client import HTTPConnection
from pathlib import Path

import pytest
import torch

from cascade.cli import main
from cascade.config.compose import built, composed
from cascade.data.embeddings import Embeddings, write_embeddings
from cascade.data.scenes.generate import write_scenes
from cascade.data.shards import Shards
from cascade.data.transforms import BadSample
from cascade.doctor.data import data
from cascade.doctor.finding import Budget
from cascade.encoders.clip import save_clip
from cascade.errors import UserError
from cascade.files.stores.places import files_of, place, read_bytes, stat_of, write, write_text
from tests.serving import Faults, proxied
from tests.small import EMBEDDED
from tests.test_resume import COMMON, SR, assert_equal, run, state, weights
from tests.test_shards import SMALL, picture
from tests.test_stores import another_helper, assert_same

pytestmark = pytest.mark.slow

MOTO = Path(__file__).parents[1] / "build" / "moto" / "bin" / "moto_server"
CANARY = "CANARYwJalrXUtnFEMI"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": f"{CANARY}ID",
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}SECRET",
    "AWS_SESSION_TOKEN": f"{CANARY}TOKEN",
    "AWS_REGION": "us-east-1",
}


@pytest.fixture(scope="module")
def moto(tmp_path_factory):
    """The address of moto's server, with an empty bucket."""
    if not MOTO.exists():
        pytest.skip("moto is not installed: make moto")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = open(tmp_path_factory.mktemp("moto") / "log", "w")  # noqa: SIM115
    server = subprocess.Popen([MOTO, "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log)
    try:
        end = time.monotonic() + 60
        while True:
            try:
                asked = HTTPConnection("127.0.0.1", port, timeout=10)
                asked.request("PUT", "/bucket")
                assert asked.getresponse().status == 200
                break
            except OSError:
                assert server.poll() is None
                assert time.monotonic() < end
                time.sleep(0.2)
        yield "127.0.0.1", port
    finally:
        server.kill()
        server.wait()
        log.close()


@pytest.fixture
def faults():
    return Faults(latency=0.05, refused=0.05, cut=0.03, reset=0.03, slow=0.02, pause=3.0)


@pytest.fixture
def store(moto, faults, monkeypatch, tmp_path):
    """The URL of a folder of a bucket that is read through a proxy with faults."""
    with proxied(moto, faults) as endpoint:
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("CASCADE_CACHE", str(tmp_path / "cache"))
        with another_helper(TIMEOUT=2.0):
            yield f"s3://bucket/{tmp_path.name}"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_scenes(folder, "plain", "train", 20, 32, seed=0, shard_size=5)
    write_scenes(folder, "plain", "val", 4, 32, seed=1)
    assert main(["data", "index", str(folder)]) == 0
    return folder


def tiny_clip(folder):
    model = built(composed("train", ["stage=clip", "data.path=none", *EMBEDDED]).clip.model)
    torch.manual_seed(0)
    save_clip(model, model.build(), folder)
    return str(folder)


def copied(folder, store):
    for path in sorted(folder.glob("*.*")):
        write(
            place(f"{store}/{path.name}"), lambda to, path=path: to.write_bytes(path.read_bytes())
        )


def test_a_training_from_a_store_with_faults_equals_one_from_the_disk_and_notes_no_secret(
    capfd, shards, store, faults, tmp_path
):
    own = [word for word in [*COMMON, *SR] if not word.startswith("clip.")]
    own += ["micro_batch=2", "+data.block=2"]
    whole = run([*own, f"data.path={shards}", f"run={tmp_path / 'whole'}"])
    copied(shards, store)
    faults.refused = faults.reset = 0.2
    there = run([*own, f"data.path={store}", "workers=2", f"run={tmp_path / 'there'}"])
    assert_equal(state(whole), state(there))
    assert_equal(weights(whole), weights(there))
    assert sum(faults.count.values()) - faults.count["none"] > 3
    told = "".join(capfd.readouterr())
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(files) > 10
    assert CANARY not in told
    assert [path for path, data in files.items() if CANARY.encode() in data] == []


def test_a_store_is_indexed_where_it_is_or_into_a_folder_and_read_as_the_disk(
    shards, store, tmp_path, capsys
):
    for tar in shards.glob("*.tar"):
        write(place(f"{store}/{tar.name}"), lambda to, tar=tar: to.write_bytes(tar.read_bytes()))
    assert main(["data", "index", store, "--index", str(tmp_path / "notes")]) == 0
    assert main(["data", "index", store]) == 0
    names = {one.name for one in files_of(place(store))}
    assert names == {p.name for p in shards.iterdir()}
    noted = json.loads(read_bytes(place(f"{store}/dataset.json")))["tars"]
    assert all(
        one["version"] == stat_of(place(f"{store}/{name}")).version for name, one in noted.items()
    )
    here = Shards(shards, SMALL, block=2)
    for there in (Shards(store, SMALL, block=2), Shards(f"{store}/*.tar", SMALL, block=2)):
        assert there.provenance() == here.provenance()
        assert_same(here, there, range(len(here)))
    there = Shards(store, SMALL, block=2, index=tmp_path / "notes")
    assert_same(here, there, range(len(here)))
    assert len(Shards(store, SMALL, "val")) == 4
    # A tar of the same size that was written anew is another, and one that is lacking is missed.
    data = bytearray((shards / "train-00001.tar").read_bytes())
    data[700] ^= 1
    write(place(f"{store}/train-00001.tar"), lambda to: to.write_bytes(data))
    with pytest.raises(UserError, match=r"train-00001.tar has changed since it was indexed"):
        Shards(store, SMALL)


def test_what_is_written_appears_whole_or_not_at_all(store, faults):
    faults.away = True
    with another_helper(FIRST_PATIENCE=1.0), pytest.raises(Exception, match="s3://bucket"):
        write_text(place(f"{store}/a"), "x")
    faults.away = False
    with pytest.raises(FileNotFoundError):
        stat_of(place(f"{store}/a"))
    data = os.urandom(12 * 2**20)  # in several parts
    write(place(f"{store}/a"), lambda to: to.write_bytes(data))
    assert read_bytes(place(f"{store}/a")) == data


def test_what_the_store_refuses_is_told_at_once(store):
    begun = time.monotonic()
    with pytest.raises(UserError, match="no-such-bucket"):
        Shards("s3://no-such-bucket/p", SMALL)
    assert time.monotonic() - begun < 10


def test_embeddings_are_written_to_a_store_and_joined_as_from_the_disk(shards, store, tmp_path):
    clip = tiny_clip(tmp_path / "clip")
    copied(shards, store)
    own = str(tmp_path / "rows")
    assert main(["data", "precompute", str(shards), "--clip", clip, "--out", own]) == 0
    assert main(["data", "precompute", store, "--clip", clip]) == 0
    here = {"clip": Embeddings(own)}
    there = {"clip": Embeddings(f"{store}/embeddings")}
    a = Shards(shards, SMALL, block=2, embeddings=here)
    b = Shards(store, SMALL, block=2, embeddings=there)
    assert_same(a, b, range(len(a)))
    assert there["clip"].about == here["clip"].about
    with pytest.raises(UserError, match="lacks 1 of 1 shards, such as x"):
        there["clip"].require(["x"])


def test_captions_states_of_unequal_length_are_read_from_a_store(store, tmp_path):
    states = [torch.randn(n, 3, dtype=torch.bfloat16) for n in (2, 0, 4)]
    rows = {"txt/text": torch.cat(states), "txt/text.offsets": torch.tensor([0, 2, 2, 6])}
    write_embeddings(place(f"{store}/text"), "a", ["x", "y", "z"], rows, {})
    found = Embeddings(f"{store}/text")
    assert found.row("a", "z")["text"].equal(states[2])
    with pytest.raises(BadSample, match="no embedding"):
        found.row("a", "y")
    data = bytearray(read_bytes(place(f"{store}/text/a.safetensors")))
    data = bytes(data).replace(b'"data_offsets":[0,', b'"data_offsets":[9,')
    write(place(f"{store}/text/b.safetensors"), lambda to: to.write_bytes(data))
    with pytest.raises(UserError, match=r"b.safetensors is missing or broken"):
        Embeddings(f"{store}/text").row("b", "z")


def test_pictures_are_packed_into_a_store_as_onto_a_disk(store, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.jpg").write_bytes(picture(i))
        (folder / f"{i}.txt").write_text(str(i))
    for out in (str(tmp_path / "packed"), f"{store}/packed"):
        words = ["data", "pack", out, "--pictures", str(folder), "--per-shard", "2", "--val", "2"]
        assert main(words) == 0
        assert main(words) == 0  # which finds all there
    for path in (tmp_path / "packed").iterdir():
        assert read_bytes(place(f"{store}/packed/{path.name}")) == path.read_bytes()
    (folder / "6.jpg").write_bytes(picture(7))
    (folder / "6.txt").write_text("7")
    assert main(words) == 2  # another list


def test_the_doctor_checks_a_store_as_a_folder(shards, store):
    copied(shards, store)
    assert main(["data", "index", store]) == 0
    here, there = (
        [(found.level, found.what) for found in data(where, True, Budget(None))]
        for where in (shards, place(store))
    )
    assert ("note", "24 samples in 5 tars") in here
    assert here == there

"""A run whose shards are in a store equals one from a disk bit for bit, and may change places."""

import pytest

from cascade.cli import main
from cascade.data.scenes.generate import write_scenes
from cascade.stage import Stage
from tests.serving import Faults, serving
from tests.test_resume import (
    COMMON,
    SR,
    Killed,
    assert_equal,
    one_thread,  # noqa: F401 (a fixture)
    run,
    seen_by,
    state,
    weights,
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_scenes(folder, "plain", "train", 20, 32, seed=0, shard_size=10)
    assert main(["data", "index", str(folder)]) == 0
    return folder


def test_a_run_that_is_killed_and_goes_on_from_a_store_equals_one_on_a_disk(
    shards, tmp_path, monkeypatch
):
    monkeypatch.setenv("CASCADE_CACHE", str(tmp_path / "cache"))
    own = [*COMMON, *SR, "micro_batch=2", "+net.net.dropout=0.5", "+data.block=1"]
    own = [word for word in own if not word.startswith("clip.")]
    whole = run([*own, f"data.path={shards}", f"run={tmp_path / 'whole'}"])
    with serving(shards, Faults(refused=0.05, cut=0.05, reset=0.05)) as server:
        there = [*own, f"run={tmp_path / 'there'}", "workers=2", "+data.cache_gb=1"]
        with monkeypatch.context() as patched:
            seen_by(patched, Stage, 5)
            with pytest.raises(Killed):
                run([*there, f"data.path={shards}"])
        found = run([*there, f"data.path={server.url}"])
    assert_equal(state(whole), state(found))
    assert_equal(weights(whole), weights(found))

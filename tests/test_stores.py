"""Claims about shards in stores: they are read as on a disk, whatever befalls requests and cache.

The server speaks HTTP on loopback (`tests.serving`); `tests/test_stores_s3.py` has one of S3.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from cascade.cli import main
from cascade.data.loading import collate, loader
from cascade.data.shards import Shards
from cascade.errors import UserError
from cascade.files.stores import client
from cascade.files.stores.cache import PIECE, Cache
from cascade.files.stores.client import Unreachable
from cascade.files.stores.places import place, stat_of, upload
from cascade.files.stores.reading import opened
from tests.serving import Faults, serving
from tests.test_index import assert_paired, indexed, pairs
from tests.test_shards import SMALL, sample, write

BIG = 2 * PIECE + 12_345


@contextmanager
def another_helper(**limits):
    """Within the context, questions go to a helper of its own, with these limits."""
    names = {name: getattr(client, name) for name in ("_address", *limits)}
    others = client._connections.pop(os.getpid(), None)
    client._address = None
    for name, value in limits.items():
        setattr(client, name, value)
    try:
        yield
    finally:
        if (own := client._connections.pop(os.getpid(), None)) is not None:
            own.close()
            helper = client._helpers.pop()
            helper.stdin.close()
            helper.wait(10)
        if others is not None:
            client._connections[os.getpid()] = others
        for name, value in names.items():
            setattr(client, name, value)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache's folder, empty at first."""
    monkeypatch.setenv("CASCADE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    """Five indexed shards of eight samples; one picture is none, and one tar is cut short."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for s in range(5):
        members = [m for i in range(8) for m in sample(f"{i:04d}", (8 * s + i) % 25)]
        if s == 1:
            members[6] = (members[6][0], b"no picture")
        write(folder / f"{s:05d}.tar", members)
    whole = (folder / "00003.tar").read_bytes()
    (folder / "00003.tar").write_bytes(whole[: len(whole) * 2 // 3])
    indexed(folder)
    return folder


OPTIONS = {"seed": 2, "block": 2, "captions": {"txt": 0.5, "long_caption": 0.5}}
OPTIONS |= {"max_skip_fraction": 0.5}


def assert_same(here, there, numbers):
    for n in numbers:
        a, b = here[n], there[n]
        assert a.keys() == b.keys()
        for key, value in a.items():
            same = torch.equal if isinstance(value, torch.Tensor) else lambda x, y: x == y
            assert same(value, b[key]), (n, key)


def test_a_store_is_read_as_a_disk_bit_for_bit_and_each_byte_fetched_once(folder):
    here = Shards(folder, SMALL, **OPTIONS)
    with serving(folder) as server:
        there = Shards(server.url, SMALL, **OPTIONS)
        assert there.provenance() == here.provenance()
        assert (len(there), there.skipped) == (len(here), here.skipped)
        assert_same(here, there, range(2 * len(here)))
        there.check(4)
        tars = [n for (kind, name), n in server.asked.items() if kind == "GET" and "tar" in name]
        assert tars == [1] * 5
    assert any(here[n]["skipped"] for n in range(len(here)))
    assert "obstore" not in sys.modules  # its threads would not survive a fork


def test_forked_workers_read_after_their_parent_has_and_share_what_was_fetched(folder):
    here = Shards(folder, SMALL, **OPTIONS)
    with serving(folder) as server:
        there = Shards(server.url, SMALL, **OPTIONS)
        there[0]
        for got in loader(there, 5, start=3, batches=9, workers=2):
            want = collate([here[n] for n in got["sample"].tolist()])
            assert got["key"] == want["key"]
            assert got["image_8"].equal(want["image_8"])
        tars = [n for (kind, name), n in server.asked.items() if kind == "GET" and "tar" in name]
        assert max(tars) == 1


def moved_index(folder, tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    for path in [*folder.glob("*.index"), folder / "dataset.json"]:
        path.rename(notes / path.name)
    return notes


def test_the_index_may_be_in_a_folder_of_its_own(folder, tmp_path):
    notes = moved_index(folder, tmp_path)
    here = Shards(folder, SMALL, index=notes, **OPTIONS)
    with serving(folder) as server:
        there = Shards(server.url, SMALL, index=str(notes), **OPTIONS)
        assert_same(here, there, range(len(here)))
        with pytest.raises(UserError, match="a web server does not list its files"):
            Shards(server.url, SMALL)
        with pytest.raises(UserError, match=r"has no dataset.json: run `cascade data index .*--in"):
            Shards([f"{server.url}/00000.tar"], SMALL, index=str(tmp_path))
    assert main(["data", "index", str(folder), "--index", str(tmp_path / "new")]) == 0
    assert len(Shards(folder, SMALL, index=tmp_path / "new", **OPTIONS)) == len(here)
    assert not [*folder.glob("*.index")]


@pytest.mark.parametrize("cache_gb", [1.0, 0.0])
def test_faults_of_all_kinds_change_no_sample(folder, cache_gb):
    here = Shards(folder, SMALL, **OPTIONS)
    faults = Faults(refused=0.1, cut=0.1, reset=0.1, slow=0.02, pause=1.5, seed=1)
    with serving(folder, faults) as server, another_helper(TIMEOUT=1.0):
        there = Shards(server.url, SMALL, cache_gb=cache_gb, **OPTIONS)
        numbers = range(len(here) if cache_gb else 16)
        assert_same(here, there, numbers)
    assert sum(faults.count.values()) - faults.count["none"] >= 3


def test_a_shard_that_changes_stops_the_run_with_its_name(folder):
    with serving(folder) as server:
        there = Shards(server.url, SMALL, shuffle=False, cache_gb=0.0, max_skip_fraction=0.5)
        there[0]
        write(folder / "00000.tar", [m for i in range(8) for m in sample(f"{i:04d}", 24 - i)])
        os.utime(folder / "00000.tar", (1e9, 1e9))
        with pytest.raises(UserError, match=r"/00000.tar has changed since this process began"):
            there[1]
        with pytest.raises(UserError, match=r"/00000.tar has changed since this process began"):
            list(loader(there, 4, batches=2, workers=2))
        anew = Shards(server.url, SMALL, shuffle=False, max_skip_fraction=0.5)
        with pytest.raises(UserError, match=r"/00000.tar has changed since it was indexed: run"):
            anew[0]
        (folder / "00002.tar").unlink()
        with pytest.raises(UserError, match=r"cannot read .*/00002.tar"):
            anew[20]


@pytest.mark.parametrize("versions", ["etag", "none"])
def test_a_copy_of_other_age_is_compared_by_its_content_and_noted_where_that_can_be(
    folder, tmp_path, versions
):
    notes = moved_index(folder, tmp_path)
    for tar in folder.glob("*.tar"):
        os.utime(tar, (1e9, 1e9))
    with serving(folder, versions=versions) as server:
        there = Shards(server.url, SMALL, shuffle=False, index=notes, max_skip_fraction=0.5)
        assert_paired(pairs(there, 6))
        with open(folder / "00004.tar", "r+b") as file:
            file.seek(600)
            file.write(b"?")
        os.utime(folder / "00004.tar", (1.1e9, 1.1e9))
        with pytest.raises(UserError, match=r"00004.tar has changed since it was indexed"):
            there[len(there) - 1]


def test_a_store_that_is_away_is_told_in_bounded_time_and_asked_to_try_again(folder, monkeypatch):
    with serving(folder) as server, another_helper(PATIENCE=1.0, FIRST_PATIENCE=1.0):
        there = Shards(server.url, SMALL, shuffle=False, cache_gb=0.0, max_skip_fraction=0.5)
        item = there[0]
        server.faults.away = True
        begun = time.monotonic()
        with pytest.raises(Unreachable, match=r"/00000.tar: "):
            there[1]
        assert time.monotonic() - begun < 20
        server.faults.away = False
        assert there[0]["key"] == item["key"]


def big(folder):
    data = os.urandom(BIG)
    (folder / "big.tar").write_bytes(data)
    return data


def ranges(server, gb=1.0):
    return opened(place(f"{server.url}/big.tar"), Cache.of(gb))


def test_damaged_pieces_of_the_cache_are_fetched_again(folder, cache):
    data = big(folder)
    with serving(folder) as server:
        assert ranges(server).pread(BIG, 0) == data
        first, second, last = sorted(path for path in cache.glob("*/*"))
        fetched = server.asked["GET", "big.tar"]
        assert ranges(server).pread(2 * BIG, 7) == data[7:]
        assert server.asked["GET", "big.tar"] == fetched

        def flip(path, at):
            content = bytearray(path.read_bytes())
            content[at] ^= 1
            path.write_bytes(content)

        damages = [
            lambda: flip(first, 12_345),
            lambda: flip(first, PIECE + 3),  # of a checksum
            lambda: last.write_bytes(last.read_bytes()[:-1]),
            lambda: last.write_bytes(b""),
            lambda: first.write_bytes(second.read_bytes()),
        ]
        for n, damage in enumerate(damages, 1):
            damage()
            assert ranges(server).pread(BIG, 0) == data
            assert server.asked["GET", "big.tar"] == fetched + n


def test_the_cache_keeps_its_size_and_what_is_read_stays(folder, cache):
    data = big(folder)
    with serving(folder) as server:
        limit = 5 * PIECE
        for copy in range(4):
            (folder / f"{copy}.tar").write_bytes(data)
            there = opened(place(f"{server.url}/{copy}.tar"), Cache(cache, limit))
            assert there.pread(BIG, 0) == data
            assert sum(path.stat().st_size for path in cache.glob("*/*")) <= limit
    oldest, *_, newest = sorted(cache.glob("*/*"), key=lambda path: path.stat().st_mtime)
    os.utime(oldest, (0, 0))
    small = Cache(cache, 1)
    key, number = oldest.parent.name, int(oldest.name)
    length = oldest.stat().st_size - 4 * -(-PIECE // 2**14)
    part = small.read(key, number, length, 0, 100)
    assert time.time() - oldest.stat().st_mtime < 60  # which is how use is noted
    with open(oldest, "rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        small.evict(0)
        assert [*cache.glob("*/*")] == [oldest]
        assert small.read(key, number, length, 0, 100) == part
    small.evict(0)
    assert not [*cache.glob("*/*")]
    assert newest != oldest


def test_without_a_place_for_the_cache_reading_goes_on(folder, cache, capfd):
    cache.write_text("a file is in the way")
    here = Shards(folder, SMALL, **OPTIONS)
    with serving(folder) as server, another_helper():
        there = Shards(server.url, SMALL, **OPTIONS)
        assert_same(here, there, range(6))
    assert "cannot be written to" in capfd.readouterr().err


@pytest.mark.parametrize(("megabytes", "kept"), [(6, 1), (3, 0)])
def test_a_full_disk_takes_what_it_can_and_reading_goes_on(folder, cache, capfd, megabytes, kept):
    cache.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(cache)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system of limited size can be mounted here")
    try:
        data = big(folder)
        with serving(folder) as server, another_helper():
            for _ in range(2):
                assert ranges(server).pread(BIG, 0) == data
        assert len([path for path in cache.glob("*/*") if path.stat().st_size > PIECE]) == kept
        assert ("No space left" in capfd.readouterr().err) == (not kept)
    finally:
        subprocess.run(["umount", "--lazy", str(cache)], check=True)


READER = """
import os, sys
from cascade.files.stores.places import place, stat_of, upload
stat_of(place(sys.argv[1]))
if os.fork() == 0:
    stat_of(place(sys.argv[2]))
from cascade.files.stores import client
print(client._helpers[0].pid, flush=True)
input()
"""


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_the_helper_outlives_signals_and_ends_with_the_last_who_may_ask(folder):
    with serving(folder) as server:
        urls = [f"{server.url}/{name}.tar" for name in ("00000", "00001")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen([sys.executable, "-c", READER, *urls], **pipes)
        helpers = {int(process.stdout.readline()), int(process.stdout.readline())}
        (helper,) = helpers
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(helper, number)
        time.sleep(0.2)
        assert not gone(helper)
        process.kill()
        process.stdin.close()  # which ends its child
        process.wait()
        end = time.monotonic() + 10
        while not gone(helper):
            assert time.monotonic() < end
            time.sleep(0.05)


def test_a_helper_that_was_killed_is_followed_by_another(folder):
    with serving(folder) as server, another_helper():
        there = place(f"{server.url}/00000.tar")
        before = stat_of(there)
        client._helpers[-1].kill()
        client._helpers.pop().wait()
        assert stat_of(there) == before


@pytest.mark.parametrize("url", ["s3://id:CANARY@b/p", "https://host/p?sig=CANARY"])
def test_credentials_in_a_url_are_refused_and_not_repeated(url):
    with pytest.raises(UserError, match="leave credentials") as error:
        Shards(url, SMALL)
    assert "CANARY" not in str(error.value)


def test_no_message_holds_secrets(monkeypatch):
    from cascade.files.stores.objects import plain

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "CANARY/1234")
    text = "GET https://h/p?sig=abc (key CANARY/1234)\n\nDebug source: everything"
    assert plain(text) == "GET https://h/p (key ...)"


def test_of_a_folder_the_file_that_says_that_all_is_there_comes_last(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    for name in ("a/x.png", "b.png", "manifest.json", ".claims"):
        (tmp_path / name).write_text(name)
    asked = []
    monkeypatch.setattr(client, "ask", lambda do, url, file: asked.append((url, Path(file))))
    upload(tmp_path, place("s3://b/out/"), last="manifest.json")
    assert [url for url, _ in asked] == [
        "s3://b/out/a/x.png",
        "s3://b/out/b.png",
        "s3://b/out/manifest.json",
    ]
    assert all(url.endswith(file.read_text()) for url, file in asked)


@pytest.mark.parametrize(
    "words",
    [
        ["data", "scenes", "s3://b/p"],
        ["launch", "cascade=unclip", "data.path=s3://b/p", "run=none"],
    ],
)
def test_what_reads_no_store_says_so(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert "s3://b/p: " in (told := capsys.readouterr().err)
    assert "from a disk only" in told

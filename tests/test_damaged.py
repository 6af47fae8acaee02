"""Damaged shards: whatever happened to a tar, no picture gets the caption of another.

Each picture carries the number of its sample in its pixels, each caption in its text.
"""

import bz2
import gzip
import io
import lzma
import tarfile
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from cascade.data.shards import Shards
from cascade.data.stream import Stream
from cascade.data.tars import urls
from cascade.data.tars.dataset import index_folder
from cascade.data.tars.index import CUT, load, scan
from cascade.data.transforms import BadSample, Pictures
from cascade.errors import UserError

SIDE, FOLDER = 4, 50  # pixels, tars
PICTURES = Pictures((SIDE,))


def picture(number):
    """A PNG of one colour, which says the number."""
    file = io.BytesIO()
    colour = (number >> 16, number >> 8 & 255, number & 255)
    Image.new("RGB", (SIDE, SIDE), colour).save(file, "PNG", compress_level=0)
    return file.getvalue()


def shown(image):
    red, green, blue = (round(float((x.mean() + 1) * 127.5)) for x in image)
    return red << 16 | green << 8 | blue


def header(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def member(name, data, size=None):
    """A member as [name, blocks]; `size` is what its header says instead of the truth."""
    filled = data + bytes(-len(data) % 512)
    return [name, header(name, len(data) if size is None else size) + filled]


def renamed(one, name):
    size = int(one[1][124:135], 8)
    return [name, header(name, size) + one[1][512:]]


def draw(rng, *choices):
    return choices[rng.integers(len(choices))]


def swapped(rng, members):
    i, j = rng.choice(len(members), 2, replace=False)
    members[i], members[j] = members[j], members[i]


def doubled(rng, members):
    if rng.integers(2):
        members.insert(rng.integers(len(members) + 1), draw(rng, *members))
    else:
        key = draw(rng, *members)[0].split(".")[0]
        members += [one for one in members if one[0].split(".")[0] == key]


def misnamed(rng, members):
    """One member gets the key of another sample, or one of its own."""
    i = rng.integers(len(members))
    extension = members[i][0].partition(".")[2]
    key = draw(rng, draw(rng, *members)[0].split(".")[0], "another", "../up", "a.b", "")
    members[i] = renamed(members[i], f"{key}.{extension}")


def lost(rng, members):
    del members[rng.integers(len(members))]


def missized(rng, members):
    i = rng.integers(len(members))
    name, data = members[i]
    size = int(data[124:135], 8)
    near, far = size + int(rng.integers(-size, 40)), int(rng.integers(1, 5000))
    members[i] = [name, header(name, max(0, draw(rng, near, near, far))) + data[512:]]


def cut_member(rng, members):
    """A picture lacks its end, and the header says so; or a caption is empty."""
    i = rng.integers(len(members))
    name, data = members[i]
    size = int(data[124:135], 8)
    members[i] = member(name, data[512 : 512 + (size // 2 if name.endswith("png") else 0)])


def interleaved(rng, members):
    members[:] = [members[i] for i in rng.permutation(len(members))]


MANY = (swapped, doubled, missized, cut_member, interleaved, lost)


def archive(rng, numbers):
    """The bytes of a tar of these samples that suffered one damage or two, and its names."""
    members = []
    for number in numbers:
        some = {"png": picture(number), "txt": b"number %08d" % number}
        if rng.integers(2):
            some["json"] = b'{"number": %d}' % number
        order = rng.permutation(list(some))
        members += [member(f"{number:08d}.{e}", some[e]) for e in order]
    # What a second damage removes would hide that a member was renamed: nobody could tell.
    kinds = [misnamed] if not rng.integers(5) else [draw(rng, *MANY)]
    kinds += [draw(rng, *MANY)] if kinds != [misnamed] and not rng.integers(3) else []
    for kind in kinds:
        kind(rng, members)
    data = b"".join(data for _, data in members) + bytes(1024)
    names = [kind.__name__ for kind in kinds]
    if not rng.integers(6):
        data, names = data[: rng.integers(len(data))], [*names, "cut"]
    if not rng.integers(12):
        data, names = draw(rng, gzip, bz2, lzma).compress(data), [*names, "compressed"]
    return data, names


def read(path, number, count):
    """(numbers read, samples named) of a tar: pairs are checked, and each that is bad counts."""
    shards, found, named = path, set(), 0
    for place in range(count):
        try:
            item = shards.item(number, place, 0)
        except BadSample:
            named += 1
            continue
        assert item["caption"] == f"number {shown(item['image_4']):08d}", item["key"]
        found.add(shown(item["image_4"]))
    return found, named


def check_folder(folder, seed, tars):
    """Writes damaged tars, and reads them: by an index, by a scan, and as a stream."""
    rng, given, kinds = np.random.default_rng(seed), {}, {}
    for n in range(tars):
        numbers = [int(x) for x in rng.integers(1, 2**24, rng.integers(2, 7))]
        path = folder / f"{n:05d}.tar"
        data, kinds[path.name] = archive(rng, numbers)
        given[path.name] = set(numbers)
        path.write_bytes(data)
    _, unreadable = index_folder(folder, lambda *_: None)
    packed = {name for name in given if "compressed" in kinds[name]}
    assert {name for name in given if any(name in line for line in unreadable)} == packed
    for name in packed:
        with pytest.raises(UserError, match=rf"{name}: it is compressed"):
            scan(folder / name)
        (folder / name).unlink()
    index_folder(folder, lambda *_: None)
    try:
        shards = Shards(folder, PICTURES, max_skip_fraction=1.0)
    except UserError as error:
        assert "no usable sample" in str(error)  # noqa: PT017
        return 0
    total = 0
    for n, path in enumerate(shards.corpus.paths):
        index = load(path)
        assert np.array_equal(scan(path).spans, index.spans)
        found, bad = read(shards, n, shards.corpus.counts[n])
        total += len(found)
        missing = len(given[path.name] - found)
        without = len(index.ends) - shards.corpus.counts[n]  # those that have a JSON alone
        named = index.left_out.total() + without + bad
        assert found <= given[path.name]
        what = seed, path.name, kinds[path.name]
        if "lost" not in what[2]:  # a sample of which nothing is left cannot be missed
            assert named >= min(1, missing), what
        if not index.left_out[CUT] and not {"lost", "missized"} & {*what[2]}:
            assert named >= missing, what
        streamed(path)
    return total


def streamed(path):
    """No wrong pair, until the stream ends or finds nothing more to use."""
    with suppress(UserError):
        for item in Stream(str(path), PICTURES, False, shuffle=False).items(range(9)):
            assert item["caption"] == f"number {shown(item['image_4']):08d}", item["key"]


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(urls, "WAITS", ())


@pytest.mark.parametrize(
    "seeds",
    [range(6), [19, 96], pytest.param(range(6, 200), marks=pytest.mark.slow)],
    ids=["300", "renamed and swallowed", "9,700"],
)
def test_a_damaged_tar_pairs_no_picture_with_another_caption(seeds, tmp_path):
    total = 0
    for seed in seeds:
        folder = tmp_path / str(seed)
        folder.mkdir()
        total += check_folder(folder, seed, FOLDER)
    assert total > len(seeds) * FOLDER * 2  # of four on average

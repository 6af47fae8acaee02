"""Whatever an independent writer put into a tar is read as it was, or counted and named."""

import io
import os
import subprocess
import tarfile
from collections import Counter, defaultdict
from shutil import rmtree

import hypothesis.strategies as st
import pytest

from cascade.data.tars import urls
from cascade.data.tars.index import CUT, scan
from cascade.data.tars.keys import CAPTIONS, FIRST_DOT, LAST_DOT, PICTURES
from cascade.data.tars.tar import contents
from tests.drawn import holds

MEMBERS = ("jpg", "JPG", "png", "WebP", "txt", "TXT", "json", "cls", "seg.npy")
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
FOLDERS = ("", "a/", "./", "b.c/d/", "é漢/", "x" * 50 + "/" + "y" * 30 + "/")
FORTY = "/".join(["z" * 40] * 6) + "/"  # which USTAR has no room for


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(urls, "WAITS", ())


def kind(extension):
    extension = extension.lower()
    return "picture" if extension in PICTURES else extension if extension in CAPTIONS else None


@st.composite
def samples(draw, folders=FOLDERS):
    """Samples with keys of their own, as (key, {extension: bytes, or the name it links to})."""
    stems = st.tuples(st.sampled_from(folders), st.text("ab0é_- ", min_size=1, max_size=4))
    keys = draw(st.lists(stems.map("".join), min_size=1, max_size=5, unique=True))
    found = []
    for i, key in enumerate(keys):
        extensions = draw(
            st.lists(st.sampled_from(MEMBERS), min_size=1, max_size=4, unique_by=str.lower)
        )
        members = {}
        for extension in extensions:
            data = f"{i} {extension}".encode() * draw(st.sampled_from([1, 1, 1, 100]))
            members[extension] = data if draw(st.integers(0, 9)) else b""
        found.append((key, members))
    return found


@st.composite
def archives(draw):
    """A format, and members in their order: name, bytes, type of a link, and its target."""
    form, found = draw(st.sampled_from(FORMATS)), []
    for key, members in draw(
        samples(FOLDERS if form == tarfile.USTAR_FORMAT else (*FOLDERS, FORTY))
    ):
        for extension, data in members.items():
            name = f"{key}.{extension}"
            link = draw(st.sampled_from([None] * 6 + [tarfile.LNKTYPE, tarfile.SYMTYPE]))
            there = [m[0] for m in found if m[1] is not None]
            if link and kind(extension):
                target = draw(st.sampled_from(there)) if there else "nowhere/to"
                if draw(st.integers(0, 4)) == 0:
                    target = "nowhere/to"
                found.append((name, None, link, target))
            else:
                found.append((name, data, None, None))
    return form, found


def write(path, members, form):
    with tarfile.open(path, "w", format=form, encoding="utf-8") as tar:
        for name, data, link, target in members:
            info = tarfile.TarInfo(name)
            if link is None:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            else:
                here = os.path.dirname(name)
                info.type = link
                info.linkname = (
                    target if link == tarfile.LNKTYPE else os.path.relpath(target, here or ".")
                )
                tar.addfile(info)
    return path


def unpacked(members):
    """What unpacking would leave, by name; None: a link to nothing."""
    left = {}
    for name, data, link, target in members:
        left[name] = data if link is None else left.get(target)
    return left


def by_key(files):
    """Pictures and captions of each key, by kind: the first one of several pictures."""
    found = defaultdict(dict)
    for name, data in files.items():
        folder, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        if kind(extension):
            found[f"{folder}/{stem}" if folder else stem][extension.lower()] = data
        else:
            found[f"{folder}/{stem}" if folder else stem]
    return found


def complete(members):
    """The picture and the captions that are to be read of a sample, or None."""
    pictures = [members[e] for e in PICTURES if members.get(e)]
    texts = {e: members[e] for e in CAPTIONS if members.get(e)}
    return {"picture": pictures[0], **texts} if pictures and texts else None


def indexed(tar, keys=FIRST_DOT):
    """By key, what an index finds; and its left-outs."""
    index, data = scan(tar, keys), tar.read_bytes()
    found = {}
    for row, spans in enumerate(index.spans):
        parts = [data[start : start + size] for start, size in spans]
        found[index.key(row)] = {n: p for n, p in zip(("picture", *CAPTIONS), parts) if p}
    return found, index.left_out


def streamed(tar, keys=FIRST_DOT):
    bad = []
    found = {s.key: dict(s.members) for s in urls.streamed("t", str(tar), bad, keys)}
    return found, bad


@holds(40, archives())
def test_a_tar_of_any_format_is_read_as_it_would_be_unpacked(folder, archive):
    form, members = archive
    tar = write(folder / "a.tar", members, form)
    expected = by_key(unpacked(members))
    whole = {key: found for key, m in expected.items() if (found := complete(m))}
    found, left_out = indexed(tar)
    assert found == whole
    assert len(found) + left_out.total() == len(expected)
    read, bad = streamed(tar)
    assert len(read) + len(bad) == len(expected)
    if all(link is None for _, _, link, _ in members):
        assert read == whole
        assert Counter(reason for _, reason in bad) == left_out
    else:
        # A stream takes a second picture of a sample whose first one is a link.
        alone = [key for key in read if sum(e in PICTURES for e in expected[key]) == 1]
        assert all(whole[key].items() >= read[key].items() for key in alone)


@holds(30, archives(), st.data())
def test_a_tar_that_is_cut_is_never_whole_and_pairs_nothing_falsely(folder, archive, data):
    form, members = archive
    tar = write(folder / "a.tar", members, form)
    whole, _ = indexed(tar)
    size = tar.stat().st_size
    with tarfile.open(tar) as there:
        end = max(m.offset_data + (-(-m.size // 512) * 512 if m.isreg() else 0) for m in there)
    cut = data.draw(st.integers(0, min(size, end + 511)))
    (folder / "cut.tar").write_bytes(tar.read_bytes()[:cut])
    assert not contents(folder / "cut.tar").whole
    found, left_out = indexed(folder / "cut.tar")
    assert found.items() <= whole.items() or any(link for *_, link, _ in members)
    assert left_out[CUT] == 1
    read, bad = streamed(folder / "cut.tar")
    for key, sample in {**found, **read}.items():
        ones = {part.split()[0] for part in sample.values()}
        assert len(ones) == 1 or any(link for *_, link, _ in members), key
    assert bad[-1][1] in (CUT, "cannot be read")


@holds(15, samples(), st.sampled_from(["ustar", "gnu", "pax"]), st.data())
def test_a_tar_of_the_system_is_its_folder(folder, drawn, form, data):
    root = folder / "root"
    rmtree(root, ignore_errors=True)
    root.mkdir()
    there = []
    for key, members in drawn:
        if form != "ustar" and data.draw(st.booleans()):
            key = FORTY + key
        for extension, content in members.items():
            path = root / f"{key}.{extension}"
            path.parent.mkdir(parents=True, exist_ok=True)
            how = data.draw(
                st.sampled_from(["file", "file", "file", "hard", "symbolic", "dangling"])
            )
            if not kind(extension):
                how = "file"
            if how == "hard" and there:
                os.link(data.draw(st.sampled_from(there)), path, follow_symlinks=False)
            elif how == "symbolic" and there:
                path.symlink_to(os.path.relpath(data.draw(st.sampled_from(there)), path.parent))
            elif how == "dangling":
                path.symlink_to("nothing")
            else:
                path.write_bytes(content)
            there.append(path)
    tar = folder / "a.tar"
    env = {**os.environ, "LC_ALL": "C.UTF-8"}
    subprocess.run(
        ["tar", "-cf", tar, f"--format={form}", "--sort=name", "-C", root, "."], check=True, env=env
    )
    names = [path for path in root.rglob("*") if not path.is_dir()]
    files = {f"./{p.relative_to(root)}": p.read_bytes() if p.exists() else None for p in names}
    expected = by_key(files)
    whole = {key: found for key, m in expected.items() if (found := complete(m))}
    found, left_out = indexed(tar)
    assert found == whole
    assert len(found) + left_out.total() == len(expected)
    read, bad = streamed(tar)
    assert len(read) + len(bad) == len(expected)


DOTTED = st.lists(st.sampled_from("012345"), min_size=1, max_size=5, unique=True)


@holds(25, st.lists(st.sampled_from(["s.", "s_0.", "a/t.", "u"]), min_size=1, unique=True), DOTTED)
def test_keys_with_dots_are_counted_or_read_as_they_were_meant(folder, stems, numbers):
    keys = [stem + number for stem in sorted(stems) for number in sorted(numbers)]
    parts = [
        (f"{key}.{e}", f"{key} {e}".encode(), None, None) for key in keys for e in ("jpg", "txt")
    ]
    tar = write(folder / "a.tar", parts, tarfile.GNU_FORMAT)
    whole = {key: {"picture": f"{key} jpg".encode(), "txt": f"{key} txt".encode()} for key in keys}
    assert indexed(tar, LAST_DOT) == (whole, Counter())
    assert streamed(tar, LAST_DOT) == (whole, [])
    found, left_out = indexed(tar)
    assert found.items() <= whole.items()
    assert len(found) + left_out.total() == len(keys)
    read, bad = streamed(tar)
    assert (read, len(bad)) == (found, left_out.total())

"""Claims about folders of files: what links lead to is there, once, to pack and to measure."""

from cascade.data.tars.listing import captioned_by_files, usable
from cascade.eval.pictures.sets import picture_set
from tests.hostile import refused
from tests.test_shards import picture


def test_linked_folders_are_followed_and_circles_refused(tmp_path):
    folder, more = tmp_path / "set", tmp_path / "more"
    folder.mkdir()
    (more / "deep").mkdir(parents=True)
    (folder / "p0.jpg").write_bytes(picture(0))
    (more / "deep/p1.jpg").write_bytes(picture(1))
    (folder / "linked").symlink_to(more)
    assert picture_set(folder).ids == ["linked/deep/p1", "p0"]
    for place, target in ((more / "up", more), (more / "up", folder), (folder / "twice", more)):
        place.symlink_to(target)
        assert "remove the link" in refused(lambda: picture_set(folder))
        place.unlink()


def test_packing_sees_what_is_behind_linked_folders_and_counts_dangling_links(tmp_path):
    folder, more = tmp_path / "set", tmp_path / "more"
    for i, place in enumerate((folder, more)):
        place.mkdir()
        (place / f"p{i}.jpg").write_bytes(picture(i))
        (place / f"p{i}.txt").write_text(str(i))
    (folder / "linked").symlink_to(more)
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (folder / "gone.txt").write_text("2")
    (folder / "._p0.jpg").write_bytes(b"left by a Mac")
    rows, refusals = usable(folder, captioned_by_files(folder))
    assert {row.name: row.captions["caption"] for row in rows} == {
        "linked/p1.jpg": "1",
        "p0.jpg": "0",
    }
    assert refusals == {"missing file": ["gone.jpg"]}

"""Sets of pictures: what is in them, what is said of them, what is refused, and their captions."""

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from cascade.errors import UserError
from cascade.eval.pictures import captions, coco
from cascade.eval.pictures.conversion import GREY, PALETTE, TRANSPARENT, TURNED
from cascade.eval.pictures.sets import picture_set
from cascade.formats.rgb import MAX_PIXELS
from tests.hostile import refused


def array(seed, h=6, w=6, channels=3):
    shape = (h, w, channels) if channels > 1 else (h, w)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def png(image, **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        file, **{"format": "PNG", **options}
    )
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Seven pictures, two of them deeper; ids are not in the order of writing."""
    for i in (3, 0, 5, 1, 4, 2, 6):
        path = tmp_path / "set" / ("deep" if i > 4 else "") / f"p{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(array(i)))
    return tmp_path / "set"


def packed(folder, tar):
    with tarfile.open(tar, "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.add(file, file.relative_to(folder))
    return tar


def held(pictures, size=3):
    blocks = pictures.blocks(size)
    rows = [i for block in blocks for i in block]
    found = [x for batch in pictures.batches(blocks) for x in batch.numpy()]
    return {pictures.ids[i]: x.transpose(1, 2, 0) for i, x in zip(rows, found)}


def test_ids_are_sorted_and_pictures_are_theirs(folder):
    pictures = picture_set(folder)
    assert pictures.ids == ["deep/p5", "deep/p6", *(f"p{i}" for i in range(5))]
    assert (pictures.size, pictures.format, pictures.notes) == ((6, 6), "PNG", {})
    for name, picture in held(pictures).items():
        np.testing.assert_array_equal(picture, array(int(name[-1])))


def test_a_tar_is_the_same_set_as_its_folder(folder, tmp_path):
    a, b = picture_set(folder), picture_set(packed(folder, tmp_path / "set.tar"))
    assert (a.ids, a.hash) == (b.ids, b.hash)
    for name, picture in held(b).items():
        np.testing.assert_array_equal(picture, held(a)[name])
    many = tmp_path / "tars"
    many.mkdir()
    packed(folder, many / "one.tar")
    assert picture_set(many).ids == [f"one/{name}" for name in a.ids]


def test_the_hash_tells_one_byte_one_name_and_one_picture(folder):
    hashes = {picture_set(folder).hash}
    (folder / "p0.png").rename(folder / "p9.png")
    hashes.add(picture_set(folder).hash)
    (folder / "p9.png").rename(folder / "p0.png")
    assert picture_set(folder).hash in hashes
    data = bytearray((folder / "p1.png").read_bytes())
    about = PngImagePlugin.PngInfo()
    about.add_text("a", "b")
    (folder / "p1.png").write_bytes(png(array(1), pnginfo=about))  # the same pixels
    hashes.add(picture_set(folder).hash)
    (folder / "p1.png").write_bytes(data)
    hashes.add(picture_set(folder, square=4).hash)
    (folder / "p0.png").unlink()
    hashes.add(picture_set(folder).hash)
    assert len(hashes) == 5


def test_blocks_hold_each_picture_once_and_one_size_each(folder):
    (folder / "p2.png").write_bytes(png(array(2, 5, 8)))
    pictures = picture_set(folder)
    blocks = pictures.blocks(4)
    assert sorted(i for block in blocks for i in block) == list(range(7))
    assert all(len({pictures.sizes[i] for i in block}) == 1 for block in blocks)
    assert held(pictures)["p2"].shape == (5, 8, 3)
    assert "p2 of 8x5" in refused(lambda: pictures.size, "--resize")


def test_conversions_are_made_as_said(tmp_path):
    rgb, grey, alpha = array(0), array(1, channels=1), array(2, channels=4)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    palette = Image.fromarray(rgb).quantize(4)
    sources = {
        "grey.png": (png(grey), np.repeat(grey[:, :, None], 3, 2)),
        "palette.png": (png(palette), np.asarray(palette.convert("RGB"))),
        "turned.webp": (
            png(array(3, 4, 9), format="WEBP", lossless=True, exif=exif),
            np.rot90(array(3, 4, 9), -1),
        ),
    }
    for name, (data, _) in sources.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "clear.png").write_bytes(png(alpha))
    pictures = picture_set(tmp_path)
    assert pictures.notes == {GREY: 1, PALETTE: 1, TRANSPARENT: 1, TURNED: 1}
    assert pictures.format == "PNG and WEBP"
    found = held(pictures)
    for name, (_, expected) in sources.items():
        np.testing.assert_array_equal(found[name.partition(".")[0]], expected)
    a = alpha[:, :, 3:] / 255
    white = alpha[:, :, :3] * a + 255 * (1 - a)
    assert np.abs(found["clear"] - white).max() <= 1
    assert pictures.sizes[pictures.ids.index("turned")] == (9, 4)


def animated():
    frames = [Image.fromarray(array(i)) for i in range(3)]
    return png(frames[0], save_all=True, append_images=frames[1:])


def huge():
    return png(Image.new("1", (10_000, MAX_PIXELS // 10_000 + 1)))


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"

BAD = {
    "animated": ("a.png", animated, "several pictures"),
    "animated webp": (
        "a.webp",
        lambda: png(
            Image.open(io.BytesIO(animated()), formats=("PNG",)), format="WEBP", save_all=True
        ),
        "several",
    ),
    "no picture": ("a.png", lambda: b"hello", "broken"),
    "empty": ("a.png", lambda: b"", "broken"),
    "of another format": ("a.jpg", lambda: HEIC, "format that is not read"),
    "huge": ("a.png", huge, "pixels"),
    "another ending": ("a.heic", lambda: HEIC, "format that is not read: save it as PNG"),
    "no ending": ("a.bin", lambda: png(array(0)), "picture by its bytes: save it as PNG"),
    "the same id": ("p0.jpg", lambda: png(array(0), format="JPEG"), "not the only one"),
}


def test_whatever_a_picture_is_called_and_saved_as_it_is_read(folder):
    for form, name in (("GIF", "a.gif"), ("BMP", "b.BMP"), ("TIFF", "c.tif"), ("PNG", "d.jfif")):
        (folder / name).write_bytes(png(Image.fromarray(array(9)), format=form))
    (folder / "e.gif").write_bytes(png(array(8, channels=1), format="GIF"))
    (folder / "notes.md").write_text("no picture")
    pictures = picture_set(folder)
    found = held(pictures)
    assert set(found) == {"deep/p5", "deep/p6", *(f"p{i}" for i in range(5)), *"abcde"}
    for name in "bcd":
        np.testing.assert_array_equal(found[name], array(9))
    np.testing.assert_array_equal(found["e"], np.repeat(array(8, channels=1)[..., None], 3, 2))
    names = [path.relative_to(folder) for path in folder.rglob("*.*") if path.suffix != ".md"]
    (file := folder.parent / "captions.txt").write_text("".join(f"{n}\tx\n" for n in names))
    assert len(captions.captioned(pictures, file)) == 12


def test_a_picture_is_turned_as_img2dataset_says_beside_it(folder, tmp_path):
    lying, fields = array(7, 4, 9), {"exif": json.dumps({"Image Orientation": "Rotated 90 CW"})}
    (folder / "side.png").write_bytes(png(lying))
    before = picture_set(folder).hash
    (folder / "side.json").write_text(json.dumps(fields))
    (folder / "p1.json").write_text("{")
    for path in (folder, packed(folder, tmp_path / "set.tar")):
        pictures = picture_set(path)
        np.testing.assert_array_equal(held(pictures)["side"], np.rot90(lying, -1))
        assert pictures.sizes[pictures.ids.index("side")] == (9, 4)
        assert (pictures.notes, pictures.hash != before) == ({TURNED: 1}, True)


@pytest.mark.parametrize("case", BAD)
def test_bad_pictures_are_refused_by_name(case, folder):
    name, make, words = BAD[case]
    (folder / name).write_bytes(make())
    assert name in refused(lambda: picture_set(folder), words)


def test_a_picture_that_ends_early_is_refused_before_any_number(folder):
    path = folder / "p3.png"
    path.write_bytes(path.read_bytes()[:-40])
    assert "p3.png" in refused(lambda: held(picture_set(folder)), "broken")


def test_places_without_pictures_are_refused(tmp_path):
    refused(lambda: picture_set(tmp_path / "nowhere"), "not there")
    refused(lambda: picture_set(tmp_path), "no picture")
    (tmp_path / "a.png").write_bytes(png(array(0)))
    refused(lambda: picture_set(tmp_path / "a.png"), "tar")


@pytest.mark.parametrize("cut", [10, 700, 3000])
def test_a_tar_that_is_not_whole_is_refused(folder, tmp_path, cut):
    tar = packed(folder, tmp_path / "set.tar")
    with tarfile.open(tar) as archive:
        *_, third, last = archive.getmembers()
        end = last.offset_data + 512 * -(-last.size // 512)
    data = tar.read_bytes()
    header = data[: third.offset] + b"x" * 512 + data[third.offset + 512 :]
    for damaged in (data[: end - cut], data[:end], header, data + bytes(2**21)):
        tar.write_bytes(damaged)
        refused(lambda: picture_set(tar), "no complete tar")


def test_hostile_names_and_links_lead_nowhere(folder, tmp_path):
    tar = tmp_path / "set.tar"
    with tarfile.open(tar, "w") as archive:
        archive.add(folder / "p0.png", "../../p0.png")
    refused(lambda: picture_set(tar), "rename")
    (folder / "more").symlink_to(tmp_path)
    refused(lambda: picture_set(folder), "link")


def test_hidden_files_are_no_pictures(folder):
    (folder / ".p7.png.part").write_bytes(b"half")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "p8.png").write_bytes(b"half")
    (folder / "._p0.png").write_bytes(b"half")
    assert len(picture_set(folder)) == 7


# Captions


def of_texts(folder, pictures):
    for name in pictures.ids:
        (folder / f"{name}.txt").write_text(f" caption of\n{name} ")


def of_jsonl(file, pictures):
    file.write_text(
        "".join(
            json.dumps({"id": n, "caption": f"caption of {n}"}) + "\n" for n in pictures.ids[::-1]
        )
    )


def of_csv(file, pictures):
    file.write_text(
        "file_name,caption\n" + "".join(f"{n}.png,caption of {n}\n" for n in pictures.ids)
    )


def of_txt(file, pictures):
    file.write_text("".join(f"{n}\tcaption of {n}\n" for n in pictures.ids))


@pytest.mark.parametrize("write", [of_jsonl, of_csv, of_txt])
def test_captions_are_joined_by_id(folder, tmp_path, write):
    pictures = picture_set(folder)
    expected = [f"caption of {name}" for name in pictures.ids]
    file = tmp_path / f"captions.{write.__name__.removeprefix('of_')}"
    write(file, pictures)
    rows = captions.captioned(pictures, file)
    assert [row["caption"] for row in rows] == expected
    of_texts(folder, pictures)
    beside = captions.captioned(picture_set(folder))
    assert [row["caption"] for row in beside] == expected
    assert captions.hash_of(beside) == captions.hash_of(rows)
    in_tar = picture_set(packed(folder, tmp_path / "set.tar"))
    assert [row["caption"] for row in captions.captioned(in_tar)] == expected


BAD_CAPTIONS = {
    "a picture without": ("p0\ta\n", "6 of 7 pictures have no caption"),
    "two for one": ("p0\ta\np0.png\tb\n", "two captions for p0"),
    "an empty one": ("p0\t \n", "empty caption for p0"),
    "no tab": ("p0 a\n", "line 1"),
}


@pytest.mark.parametrize("case", BAD_CAPTIONS)
def test_captions_that_do_not_fit_are_refused(folder, tmp_path, case):
    text, words = BAD_CAPTIONS[case]
    file = tmp_path / "captions.txt"
    file.write_text(text)
    refused(lambda: captions.captioned(picture_set(folder), file), words)


def test_a_text_beside_a_picture_is_read_in_known_encodings_alone(folder):
    of_texts(folder, pictures := picture_set(folder))
    expected = captions.captioned(picture_set(folder))
    text = f" caption of\n{pictures.ids[2]} "
    (folder / f"{pictures.ids[2]}.txt").write_bytes(text.encode("utf-16"))
    assert captions.captioned(picture_set(folder)) == expected
    (folder / f"{pictures.ids[2]}.txt").write_bytes("Übung".encode("cp1252"))
    words = f"the text of {pictures.ids[2]} is not UTF-8, perhaps CP1252"
    refused(lambda: captions.captioned(picture_set(folder)), words)


def test_captions_without_a_picture_are_refused(folder, tmp_path):
    pictures = picture_set(folder)
    of_txt(file := tmp_path / "captions.txt", pictures)
    with file.open("a") as more:
        more.write("p8\tone more\n")
    refused(lambda: captions.captioned(pictures, file), "such as p8")
    (file := tmp_path / "a.csv").write_text("x,y\n1,2\n")
    refused(lambda: captions.captioned(pictures, file), "columns x, y")


def test_captions_over_the_context_are_counted():
    words = [" ".join(["red"] * n) for n in (1, 5, 6, 7, 50)]
    words += ["! " * 6, "! " * 7]  # "!" is token 0, as padding is
    # Six words, between start and end, are the most.
    assert captions.too_long(words, 8) == [False, False, False, True, True, False, True]


# COCO


@pytest.fixture
def copy_of_coco(tmp_path):
    """Eight pictures in COCO's own format, of different sizes, with two or three captions each."""
    root, images, annotations = tmp_path / "coco", [], []
    (root / "val2014").mkdir(parents=True)
    (root / "annotations").mkdir()
    for i in range(8):
        number, name = 1000 - 7 * i, f"COCO_val2014_{1000 - 7 * i:012d}.jpg"
        (root / "val2014" / name).write_bytes(png(array(i, 20 + i, 30), format="JPEG"))
        images.append({"id": number, "file_name": name, "height": 20 + i, "width": 30})
        for k in range(2 + i % 2):
            text = f"caption {k} of\n{number}."
            annotations.append({"id": 90 - 3 * i - k, "image_id": number, "caption": text})
    whole = {"info": {}, "images": images, "annotations": annotations}
    (root / "annotations" / "captions_val2014.json").write_text(json.dumps(whole))
    return root


def test_coco_draws_one_caption_of_each_image(copy_of_coco):
    drawn = coco.prompts(copy_of_coco, count=5)
    images = [prompt.fields["image_id"] for prompt in drawn]
    assert len(set(images)) == 5
    assert images == sorted(images)
    assert all(prompt.text.endswith(f"of {image}.") for prompt, image in zip(drawn, images))
    assert drawn == coco.prompts(copy_of_coco, count=5)
    assert {p.text for p in drawn} <= {p.text for p in coco.prompts(copy_of_coco, count=6)}
    others = [coco.prompts(copy_of_coco, count=5, seed=seed) for seed in range(1, 5)]
    assert all(other != drawn for other in others)
    refused(lambda: coco.prompts(copy_of_coco), "copy all 30,000")


def test_an_empty_caption_of_coco_is_passed_over(copy_of_coco, caplog):
    """The next by hash stands for it; where none is empty nothing changes."""
    before = coco.prompts(copy_of_coco, count=8)
    assert not caplog.text
    file = copy_of_coco / "annotations" / "captions_val2014.json"
    whole = json.loads(file.read_text())
    gone = before[3].fields
    of_image = [a for a in whole["annotations"] if a["image_id"] == gone["image_id"]]
    for annotation in of_image:
        if annotation["id"] == gone["caption_id"]:
            annotation["caption"] = " \n"
    file.write_bytes(json.dumps(whole, ensure_ascii=False).encode("utf-16"))
    after = coco.prompts(copy_of_coco, count=8)
    assert "1 empty captions are ignored" in caplog.text
    assert [p for i, p in enumerate(after) if i != 3] == [p for i, p in enumerate(before) if i != 3]
    left = [a["id"] for a in of_image if a["id"] != gone["caption_id"]]
    digest = {i: hashlib.sha256(f"0 caption {i}".encode()).hexdigest() for i in left}
    assert after[3].fields["caption_id"] == min(left, key=digest.get)
    assert after[3].text
    for annotation in of_image:
        annotation["caption"] = ""
    file.write_text(json.dumps(whole))
    assert len(coco.prompts(copy_of_coco, count=7)) == 7
    refused(lambda: coco.prompts(copy_of_coco, count=8), "captions of 7 images")
    file.write_bytes(b'{"images": "\xfc"}')
    refused(lambda: coco.prompts(copy_of_coco, count=8), "perhaps CP1252")


def test_cocos_reference_is_all_centred_squares_at_256(copy_of_coco):
    reference = coco.reference(copy_of_coco)
    assert (len(reference), reference.size) == (8, (256, 256))
    assert coco.departures(reference) == ["COCO-30k has 30,000 pictures"]
    name = reference.ids[0]
    with Image.open(copy_of_coco / "val2014" / f"{name}.jpg", formats=("JPEG",)) as image:
        w, h = image.size
        square = image.crop(((w - h) // 2, 0, (w - h) // 2 + h, h)).resize(
            (256, 256), Image.Resampling.BICUBIC
        )
    np.testing.assert_array_equal(held(reference)[name], np.asarray(square))
    (copy_of_coco / "val2014" / f"{name}.jpg").unlink()
    assert name in refused(lambda: coco.reference(copy_of_coco), "lacks 1")


def test_what_is_no_coco_is_refused(tmp_path):
    refused(lambda: coco.prompts(tmp_path), "not there")
    (tmp_path / "annotations").mkdir()
    for text in ("{", "[]", '{"images": [{}], "annotations": []}'):
        (tmp_path / "annotations" / "captions_val2014.json").write_text(text)
        with pytest.raises(UserError, match="damaged"):
            coco.prompts(tmp_path)

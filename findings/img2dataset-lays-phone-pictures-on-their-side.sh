#!/usr/bin/env bash
# A photo that a phone took upright is stored on its side, with a note in its EXIF of how to turn it.
#
# Guess: a shard that img2dataset writes holds the picture as browsers and cv2.imread show it.
# Behaviour: img2dataset decodes with cv2.IMREAD_UNCHANGED, which leaves the note out of account, and
# encodes anew, which drops it. The picture lies on its side for whoever reads the shard; its width
# and height are those of the side. What is left is a sentence in the JSON's field `exif`, itself a
# JSON in a string, in exifread's English: "Image Orientation": "Rotated 90 CW".
# Met by: a model trained on such shards learns a few per cent of its pictures (those of phones) on
# their side under captions that say "standing", and "left of" for what is above.
#
# Seen with img2dataset 1.47.0, exifread 3.5.1, opencv-python-headless 4.14.0.94, Python 3.11:
#   shard:  144 x 96, left [254.   0.   0.], right [  0.   0. 254.]
#   its own orientation: None; status success; JSON: 'Rotated 90 CW'
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -qq img2dataset==1.47.0 exifread==3.5.1 pillow==12.3.0 \
    opencv-python-headless==4.14.0.94
cd "$work"
cat > script.py <<'PYTHON'
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


def main():
    from importlib.metadata import version

    from img2dataset import download

    # Upright: 64 wide, 96 high, red above blue. Stored as a phone stores it: turned, with orientation 6.
    upright = Image.new("RGB", (64, 96), "blue")
    upright.paste("red", (0, 0, 64, 48))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save("phone.jpg", exif=exif, quality=95)
    shown = ImageOps.exif_transpose(Image.open("phone.jpg"))
    assert shown.size == (64, 96) and shown.getpixel((32, 8))[0] > 200, "the original is upright"
    Path("list.txt").write_text(f"file://{Path('phone.jpg').absolute()}\n")
    download(
        url_list="list.txt", input_format="txt", output_folder="out", output_format="webdataset",
        image_size=96, resize_mode="keep_ratio", processes_count=1, thread_count=1,
    )
    with tarfile.open(next(Path("out").glob("*.tar"))) as tar:
        files = {m.name.rpartition(".")[2]: tar.extractfile(m).read() for m in tar}
    picture, about = Image.open(io.BytesIO(files["jpg"])), json.loads(files["json"])
    left, right = (np.asarray(picture)[:, x].mean(0).round() for x in (4, -5))
    said = json.loads(about["exif"])["Image Orientation"]
    print("img2dataset", version("img2dataset"), "exifread", version("exifread"))
    print("guess:  64 x 96 or as high in proportion, red above blue")
    print(f"shard:  {picture.size[0]} x {picture.size[1]}, left {left}, right {right}")
    print(f"its own orientation: {picture.getexif().get(0x0112)}; status {about['status']}; JSON: {said!r}")
    assert picture.size[0] > picture.size[1], "it lies on its side"
    assert left[0] > 200 > right[0], "red is at the left"
    assert picture.getexif().get(0x0112) is None
    assert said == "Rotated 90 CW"


if __name__ == "__main__":
    main()
PYTHON
timeout 300 "$work/env/bin/python" script.py 2> log || { tail -20 log; exit 1; }

"""Decode some samples; report anomalies, and reasons for which training would skip them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import compress

from cascade.data.items import CHOOSE, Items, captions_of, fields_of, picture_of, stated_orientation
from cascade.data.preflight import several, too_many
from cascade.data.tars.index import Index
from cascade.data.tars.keys import CAPTIONS
from cascade.data.tars.open_tar import OpenTar, Placed
from cascade.data.transforms import Pictures
from cascade.doctor.finding import Finding, note, problem, some, spread, warning
from cascade.formats.rgb import BadSample, opened, orientation, suspicious

LOOKS = 64  # samples whose pictures are decoded
TINY = 64  # pixels of the shorter side
_SEEN_AS = 256  # pixels of the picture whose colours are checked

# What is read correctly, and worth knowing,
_PLAIN = ("not in RGB, and converted", "turned upright, as their EXIF says")
# and what may be wrong, with the remedy.
_ODD = {
    f"under {TINY} px": "leave them out: they teach a stage to blur",
    "nearly all white": "look at them: 16-bit pictures may have been written as 8-bit ones",
    "nearly all black": "look at them",
}
_READS = Items(Pictures(()), None, None, (), seed=0)  # the txt, as by default


def looks(read: Sequence[Index]) -> Iterator[Finding]:
    """Report oddities of a selection of samples, and reasons for which training skips some."""
    odd: Counter[str] = Counter()
    bad: Counter[str] = Counter()
    such: dict[str, str] = {}
    tars = [tar for tar in (OpenTar(found, {*CAPTIONS}) for found in read) if len(tar)]
    count = -(-LOOKS // max(1, len(tars)))
    places = [Placed(tar, i) for tar in tars for i in spread(range(len(tar)), count)]
    for sample in places:
        try:
            found = {*_oddities(sample)}
            odd.update(found)
        except BadSample as reason:
            found = {str(reason)}
            bad.update(found)
        for what in found:
            such.setdefault(what, f"{sample.shard}/{sample.key}")
    if places:
        yield note(f"{some(len(places), 'sample')} read as training reads them")
    level = problem if too_many(bad.total(), len(places)) else warning
    for what, number in (*bad.items(), *odd.items()):
        words, _, own = what.partition(": ")
        said = f"{words}: {number} of {len(places)}, such as {such[what]}"
        if what in _PLAIN:
            yield note(said)
        elif what in bad:
            yield level(said, own or "fetch or write them again, or train without them")
        else:
            yield warning(said, _ODD.get(what, CHOOSE))


def _oddities(sample: Placed) -> Iterator[str]:
    """Yield the oddities of a sample. Raises BadSample if it cannot be used."""
    image = opened(sample.read("picture"))
    side = min(image.size)
    square = picture_of(sample, min(side, _SEEN_AS))
    if sample.read("txt"):
        captions_of(sample, ["txt"])
        yield from several(sample, {}, _READS)
    turns = orientation(image, stated_orientation(sample.read("json")))
    if sample.read("json"):
        fields_of(sample)
    colours = (suspicious(square), suspicious(255 - square))
    there = (image.mode != "RGB", turns != 1, side < TINY, *colours)
    yield from compress((*_PLAIN, *_ODD), there)

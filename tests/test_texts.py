"""Claims about users' text: known encodings are read exactly, others refused; lines are lines."""

import pytest

from cascade.errors import UserError
from cascade.formats.texts import BadText, brief, decoded, encodable, lines, one_line, read

# All that str.splitlines takes for an end of a line, beside the line feed.
SEPARATORS = "\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
TEXTS = (
    "",
    "a red circle",
    "Übung über café",
    "中文说明",
    "привет, мир",
    "🙂 and\ttabs\r\n",
    "a\0b" * 3,
)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_what_a_codec_wrote_is_read_back(text, encoding):
    assert decoded(text.encode(encoding)) == text
    assert decoded(b"\xfe\xff" + text.encode("utf-16-be")) == text


@pytest.mark.parametrize(
    ("text", "encoding", "words"),
    [
        ("Übung über café", "cp1252", "perhaps CP1252: convert it with iconv -f CP1252 -t UTF-8"),
        ("café", "latin-1", "perhaps CP1252"),  # its end looks like UTF-8 that was cut
        ("“smart” – quotes", "cp1252", "perhaps CP1252"),
        ("中文说明", "gb18030", "GB18030, SHIFT_JIS or CP1251, by its language"),
        ("カタカナ", "shift_jis", "SHIFT_JIS"),
        ("привет", "cp1251", "CP1251"),
        ("a red circle", "utf-16-le", "iconv -f UTF-16LE -t UTF-8"),
        ("a red café", "utf-16-be", "iconv -f UTF-16BE -t UTF-8"),
        ("a red circle", "utf-32", "iconv -f UTF-32 -t UTF-8"),
    ],
)
def test_any_other_encoding_is_refused_with_a_guess(text, encoding, words):
    with pytest.raises(BadText, match=words) as caught:
        decoded(text.encode(encoding))
    assert "\n" not in str(caught.value)


def test_damage_is_told_from_another_encoding(tmp_path):
    whole = "naïve café\nüber\n".encode()
    for data, number in ((whole[:-5], 2), (whole.replace(b"\xa9", b"?", 1), 1)):
        (tmp_path / "a.txt").write_bytes(data)
        with pytest.raises(UserError, match=rf"a.txt, line {number}: UTF-8 with a damaged char"):
            read(tmp_path / "a.txt")
    with pytest.raises(BadText, match="damaged UTF-16"):
        decoded("ab".encode("utf-16")[:-1])
    (tmp_path / "a.txt").write_bytes(b"one\rtwo\rthree")
    with pytest.raises(UserError, match="carriage returns alone: convert it with tr"):
        read(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"cannot read .*gone"):
        read(tmp_path / "gone")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_ends_at_a_line_feed_and_nowhere_else(end):
    want = [f"one{s}two" for s in SEPARATORS] + ["", "last"]
    assert len("".join(want).splitlines()) == len(SEPARATORS) + 1  # Python's own rule
    assert lines(end.join(want)) == lines(end.join(want) + end) == want
    assert lines("") == []
    assert lines("a\n\n") == ["a", ""]
    assert lines("a\r\r\nb\r") == ["a\r", "b\r"]


def test_what_is_kept_and_shown_of_a_text():
    assert one_line(" a\u2028b \x85\r\n c\xa0d ") == "a b c d"
    assert one_line("half \ud83d") == encodable("half \ud83d") == "half ?"
    assert one_line(None) == one_line(3) == ""
    assert brief("short") == "short"
    shown = brief("a\nb" * 10**6)
    assert len(shown) < 80
    assert "\n" not in shown

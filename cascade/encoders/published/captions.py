"""Captions as DeepFloyd IF cleans them before its T5 reads them."""

import html
import re
import unicodedata
from urllib.parse import unquote_plus

_LONGEST = 10_000  # characters, more than any context length holds
_FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_ENDINGS = "com|co|ru|net|org|edu|gov|it"
# What is replaced, in this order, and by what.
_MARKUP = (
    (r"<person>", "person"),
    # Web addresses, but for what follows a question mark.
    (rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|[a-z0-9.-]+\.(?:{_ENDINGS})[\w/-]*\b/?(?!@))", ""),
    (r"<[^<>]*>", ""),  # tags
)
_BEFORE = (
    (r"@\w+\b", ""),  # names of users
    (r"[\u31c0-\u31ff\u3200-\u4dbf\u4dc0-\u9fff]+", ""),  # ideographs and their like
    (r"-+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    (r"&quot;?|&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # network addresses
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b|#\d{5,}\b|\b\d{6,}\b", ""),  # numbers of articles
    (rf"\S+\.(?:{_FILES})", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
_AFTER = (
    (r"\b[a-z]{1,3}\d{3,15}\b|\b[a-z]+\d+[a-z]+\b|\b\d+[a-z]+\d+\b", ""),  # codes, such as jc6640
    (r"(worldwide\s+)?(free\s+)?shipping|(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILES})(\simages?)?|\bpage\s+\d+\b", ""),
    (r"\b\d*[a-z]+\d+[a-z]+\d+[a-z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes, such as 30x40
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"'](.+)[\"']$", r"\1"),
    (r"^['_,:;-]|['_,:+-]$", ""),
    (r"^\.\S+$", ""),
)


def cleaned(caption: str) -> str:
    """A caption as IF's code cleans it, twice: in lower case, without what web pages add.

    Addresses, tags, file names, codes of articles and advertising are removed; dashes and quotes
    become those of ASCII. Unlike there, text that was decoded wrongly is not repaired.
    """
    return _once(_once(caption[:_LONGEST]))


def _once(caption: str) -> str:
    text = html.unescape(_replaced(unquote_plus(caption).strip().lower(), _MARKUP))
    text = "".join("-" if unicodedata.category(c) == "Pd" else c for c in text)
    text = _replaced(text, _BEFORE)
    if len(re.findall("[-_]", text)) > 3:  # words_joined_like_this
        text = re.sub("[-_]", " ", text)
    text = html.unescape(html.unescape(unicodedata.normalize("NFC", text)))
    return _replaced(text, _AFTER).strip()


def _replaced(text: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text

"""The sixteen languages of the study, in the order of the study: code, name, script, group.

The order is part of the science: `language` and `family` partitions are contiguous in it, and a
partition's index never depends on which data happens to be present. The group names are the
study's, not linguistic families (Italian and Spanish are Romance, Kazakh is Turkic, Vietnamese is
Austroasiatic).
"""

import functools
import re
import sys
from dataclasses import dataclass

import numpy as np

# Unicode ranges of the letters of each script (blocks, Unicode 15); letters outside of them count
# against a document's script share.
SCRIPTS: dict[str, tuple[tuple[int, int], ...]] = {
    "Devanagari": ((0x0900, 0x097F), (0xA8E0, 0xA8FF)),
    "Sinhala": ((0x0D80, 0x0DFF),),
    "Gujarati": ((0x0A80, 0x0AFF),),
    "Gurmukhi": ((0x0A00, 0x0A7F),),
    "Han": ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3134F)),
    "Latin": ((0x0041, 0x005A), (0x0061, 0x007A), (0x00C0, 0x024F), (0x1E00, 0x1EFF)),
    "Japanese": (
        (0x3040, 0x30FF),
        (0x31F0, 0x31FF),
        (0x3400, 0x4DBF),
        (0x4E00, 0x9FFF),
        (0xFF66, 0xFF9F),
    ),
    "Hangul": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xAC00, 0xD7AF)),
    "Arabic": ((0x0600, 0x06FF), (0x0750, 0x077F), (0xFB50, 0xFDFF), (0xFE70, 0xFEFC)),
    "Cyrillic": ((0x0400, 0x052F),),
}


@dataclass(frozen=True)
class Domain:
    """One language: c4 code, English name, script (key of SCRIPTS), group of the study."""

    code: str
    name: str
    script: str
    group: str


DOMAINS: tuple[Domain, ...] = (
    Domain("hi", "Hindi", "Devanagari", "Indian"),
    Domain("si", "Sinhala", "Sinhala", "Indian"),
    Domain("gu", "Gujarati", "Gujarati", "Indian"),
    Domain("pa", "Punjabi", "Gurmukhi", "Indian"),
    Domain("zh", "Chinese", "Han", "East Asian"),
    Domain("vi", "Vietnamese", "Latin", "East Asian"),
    Domain("ja", "Japanese", "Japanese", "East Asian"),
    Domain("ko", "Korean", "Hangul", "East Asian"),
    Domain("ar", "Arabic", "Arabic", "Middle Eastern"),
    Domain("fa", "Persian", "Arabic", "Middle Eastern"),
    Domain("ur", "Urdu", "Arabic", "Middle Eastern"),
    Domain("kk", "Kazakh", "Cyrillic", "Middle Eastern"),
    Domain("it", "Italian", "Latin", "Germanic"),
    Domain("en", "English", "Latin", "Germanic"),
    Domain("de", "German", "Latin", "Germanic"),
    Domain("es", "Spanish", "Latin", "Germanic"),
)
CODES: tuple[str, ...] = tuple(d.code for d in DOMAINS)
BY_CODE: dict[str, Domain] = {d.code: d for d in DOMAINS}

# The order in which groups are merged: n = 2 joins neighbours of this list (study, level1).
FAMILY_ORDER: tuple[str, ...] = ("Indian", "Middle Eastern", "East Asian", "Germanic")

# Letters: what is alphanumeric and no decimal digit.
_LETTERS = "[^\\W\\d_]"


@functools.cache
def _letter_kinds(script: str) -> np.ndarray:
    """Of every code point: 0 no letter, 1 a letter, 2 a letter of the script; (1114112,) uint8."""
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    ranges = "".join(f"{chr(a)}-{chr(b)}" for a, b in SCRIPTS[script])
    kinds = np.zeros(len(every), np.uint8)
    for kind, pattern in ((1, _LETTERS), (2, f"(?={_LETTERS})[{ranges}]")):
        kinds[[match.start() for match in re.finditer(pattern, every)]] = kind
    return kinds


def script_share(text: str, code: str) -> float:
    """Share in [0, 1] of the text's letters that belong to the script of domain `code`.

    A text without letters has share 0. A code outside the sixteen languages (a user's own domain)
    has no script to check and gives 1.
    """
    if code not in BY_CODE:
        return 1.0
    points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    _, letters, own = np.bincount(_letter_kinds(BY_CODE[code].script)[points], minlength=3).tolist()
    return own / (letters + own) if letters + own else 0.0

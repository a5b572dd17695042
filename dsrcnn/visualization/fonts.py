"""Fonts that show class names of any script: found on this machine when a name needs one."""

import functools
import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from unicodedata import category

import cv2
import numpy as np

_LOGGER = logging.getLogger(__name__)
_PLAIN = "DejaVu Sans"  # comes with Matplotlib: Latin, Greek, Cyrillic and more
_PLACEHOLDERS = "LastResort"  # fonts that have a box for every character
_BESIDE = "0123456789.()="  # scores and the like, in the font of the name
_INVISIBLE = ("Cc", "Cf", "Mn")  # control and format characters, and combining marks


class Font(NamedTuple):
    """A font file of this machine.

    Attributes:
        family: its name.
        path: of the file.
    """

    family: str
    path: str


class Label(NamedTuple):
    """How a name is drawn.

    Attributes:
        text: the name, or "class" and its number.
        font: None for OpenCV's own.
    """

    text: str
    font: Font | None


@functools.lru_cache(maxsize=64)
def image_labels(names: tuple[str, ...]) -> tuple[Label, ...]:
    """Choose how to draw each name with OpenCV or Pillow, whose fonts may differ by name.

    Names that no font has become "class" and their number, with a warning. Scripts are drawn
    character by character: letters are not joined as Arabic needs it.
    """
    others = tuple(name for name in names if not opencv_draws(name))
    fonts = dict(zip(others, find_fonts(others), strict=True))
    _warn([name for name in others if not fonts[name]])
    return tuple(
        Label(name, fonts.get(name))
        if name not in fonts or fonts[name]
        else Label(f"class {index}", None)
        for index, name in enumerate(names)
    )


@functools.lru_cache(maxsize=64)
def common_labels(names: tuple[str, ...]) -> tuple[list[str], Font | None]:
    """Choose how to draw all names with one font: that of OpenCV, or the one that has the most.

    Returns:
        The texts, "class" and the number for names that the font lacks; and the font, None for
        OpenCV's.
    """
    others = tuple(name for name in names if not opencv_draws(name))
    found = [font for font in find_fonts(others) if font]
    font = max(found, key=found.count) if found else None
    has = opencv_draws if font is None else functools.partial(_has, font)
    _warn([name for name in names if not has(name)])
    texts = [name if has(name) else f"class {index}" for index, name in enumerate(names)]
    return texts, font


@functools.lru_cache(maxsize=64)
def plot_labels(names: tuple[str, ...], kind: str = "class") -> tuple[list[str], list[str]]:
    """Choose how Matplotlib draws names.

    Args:
        names: to draw.
        kind: what they name, which stands before the number of a name that no font has.

    Returns:
        The texts, as in `image_labels`; and the font families to draw them with, of which each
        character takes the first that has it.
    """
    fonts = find_fonts(names)
    _warn([name for name, font in zip(names, fonts, strict=True) if font is None], kind)
    pairs = enumerate(zip(names, fonts, strict=True))
    texts = [name if font else f"{kind} {index}" for index, (name, font) in pairs]
    return texts, list(dict.fromkeys([_PLAIN, *(font.family for font in fonts if font)]))


def _warn(missing: Sequence[str], kind: str = "class") -> None:
    if missing:
        _LOGGER.warning(
            "No font of this machine shows the %s names %s, so they are drawn as numbers. "
            "Install one that does; Noto Sans has most scripts (Debian and Ubuntu: fonts-noto, for "
            "Chinese, Japanese and Korean fonts-noto-cjk).",
            kind,
            ", ".join(map(repr, missing)),
        )


@functools.cache
def opencv_draws(text: str) -> bool:
    """Whether OpenCV's font has all characters; version 4 has ASCII, version 5 many scripts.

    It draws others as question marks, one or one for each of their bytes; at bytes that are no
    character, as file names may have, it crashes.
    """
    if any(category(c) == "Cs" for c in text):
        return False
    return text.isascii() or all(c.isascii() or not _is_unknown(c) for c in _visible(text))


@functools.cache
def _is_unknown(character: str) -> bool:
    marks = (_drawn("?" * count) for count in range(1, 5))  # characters have up to four bytes
    return any(np.array_equal(_drawn(character), mark) for mark in marks)


@functools.lru_cache(maxsize=8)
def _drawn(text: str) -> np.ndarray:
    canvas = np.zeros((40, 120), np.uint8)
    cv2.putText(canvas, text, (2, 30), cv2.FONT_HERSHEY_SIMPLEX, 0.8, 255, 1)
    return canvas


@functools.lru_cache(maxsize=64)
def find_fonts(texts: tuple[str, ...]) -> tuple[Font | None, ...]:
    """Return a font for each text that has its characters and digits, Matplotlib's if possible."""
    found: dict[str, Font] = {}
    for font in _fonts() if texts else ():
        if len(found) == len(set(texts)):
            break
        found |= {text: font for text in texts if text not in found and _has(font, text)}
    return tuple(found.get(text) for text in texts)


@functools.cache
def _fonts() -> tuple[Font, ...]:
    from matplotlib import font_manager  # takes half a second

    plain = Font(_PLAIN, font_manager.findfont(_PLAIN))
    entries = [
        entry
        for entry in font_manager.fontManager.ttflist
        if not entry.name.replace(".", "").replace(" ", "").startswith(_PLACEHOLDERS)
    ]
    weights = font_manager.weight_dict

    def order(entry: font_manager.FontEntry) -> tuple:
        weight = weights.get(str(entry.weight), entry.weight)
        distance = abs(weight - 400) if isinstance(weight, (int, float)) else 400  # from regular
        return "Sans" not in entry.name, entry.style != "normal", distance, entry.fname

    rest = (Font(entry.name, entry.fname) for entry in sorted(entries, key=order))
    return tuple(dict.fromkeys([plain, *rest]))


def _has(font: Font, text: str) -> bool:
    """Whether a font has the visible characters of a text, and those of scores beside it."""
    from matplotlib import font_manager

    try:
        face = font_manager.get_font(font.path)
    except (OSError, RuntimeError):  # removed, or of a kind that cannot be read
        return False
    return all(face.get_char_index(ord(c)) for c in (*_visible(text), *_BESIDE))


def _visible(text: str) -> Iterator[str]:
    return (c for c in text if not c.isspace() and category(c) not in _INVISIBLE)

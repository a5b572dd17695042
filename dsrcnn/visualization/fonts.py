"""Fonts that show class names of any script: found on this machine when a name needs them."""

import functools
import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple
from unicodedata import category

_LOGGER = logging.getLogger(__name__)
_PLAIN = "DejaVu Sans"  # comes with Matplotlib: Latin, Greek, Cyrillic and more
_INVISIBLE = ("Cc", "Cf", "Mn")  # control and format characters, and combining marks
_PLACEHOLDERS = "Last Resort"  # a font that has a box for every character


class Font(NamedTuple):
    """A font file of this machine.

    Attributes:
        family: its name.
        path: of the file.
    """

    family: str
    path: str


@functools.cache
def find_font(text: str) -> Font | None:
    """Return a font that has all characters of `text`, Matplotlib's own if possible; None without.

    Scripts are drawn character by character, without joining letters as Arabic does.
    """
    return next((font for font in _fonts() if _has(font, text)), None)


@functools.cache
def _fonts() -> tuple[Font, ...]:
    from matplotlib import font_manager  # takes half a second

    plain = Font(_PLAIN, font_manager.findfont(_PLAIN))
    entries = font_manager.fontManager.ttflist
    found = {Font(e.name, e.fname) for e in entries if not e.name.startswith(_PLACEHOLDERS)}
    # Sans first, and regular before bold, whose file names are longer in most families.
    rest = sorted(found - {plain}, key=lambda f: ("Sans" not in f.family, len(f.path), f.path))
    return plain, *rest


def _has(font: Font, text: str) -> bool:
    """Whether a font has the visible characters of a text."""
    from matplotlib import font_manager

    try:
        face = font_manager.get_font(font.path)
    except (OSError, RuntimeError):  # removed, or of a kind that cannot be read
        return False
    visible = (c for c in text if not c.isspace() and category(c) not in _INVISIBLE)
    return all(face.get_char_index(ord(c)) for c in visible)


def shown_names(names: Sequence[str], font: Font | None = None) -> list[str]:
    """Replace names that cannot be drawn by "class" and their number, with a warning.

    Args:
        names: of all classes.
        font: which is used; None for any.
    """
    return [shown_name(name, index, font) for index, name in enumerate(names)]


@functools.cache
def shown_name(name: str, index: int, font: Font | None = None) -> str:
    """Return one of the names of `shown_names`, that of class `index`."""
    if name.isascii() or (_has(font, name) if font else find_font(name)):
        return name
    text = f"class {index}"
    _LOGGER.warning(
        "No font of this machine shows the class name %r, so it is drawn as %r. Install one, such "
        "as Noto Sans CJK (package fonts-noto-cjk of Debian and Ubuntu).",
        *(name, text),
    )
    return text


@functools.cache
def common_font(names: tuple[str, ...]) -> Font | None:
    """Return the font that shows most of `names`; None if all are ASCII, which need none."""
    others = [name for name in names if not name.isascii()]
    if not others:
        return None
    fonts = {_fonts()[0], *filter(None, map(find_font, others))}
    return max(sorted(fonts), key=lambda font: sum(_has(font, name) for name in others))


def font_families(texts: Iterable[str]) -> list[str]:
    """Return the families with which Matplotlib draws `texts`, each glyph by the first that can."""
    fonts = (find_font(text) for text in texts if not text.isascii())
    return list(dict.fromkeys([_PLAIN, *(font.family for font in fonts if font)]))

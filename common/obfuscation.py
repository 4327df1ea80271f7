"""Ways to write a text so that a person still reads it, or a machine decodes it, and a guard may not.

Each is a pure function of (text, seed): the same text and seed give the same result anywhere. The
suite uses them as modifiers of a benchmark (`xstest_prompt+homoglyph`), the recipes to add copies
of their training rows (`--augment homoglyph`).
"""

import base64
import random
from collections.abc import Callable, Iterable

from common.conversation import Messages, UserError

SHARE = 0.5  # of the letters that a function changes, where it does not change all
# Latin letters, and Cyrillic ones that look the same
LATIN = "aceijopsxyABCEHIJKMOPSTXY"
CYRILLIC = "асеіјорѕхуАВСЕНІЈКМОРЅТХУ"
HOMOGLYPHS = dict(zip(LATIN, CYRILLIC, strict=True))
LEET = dict(zip("aeiostAEIOST", "431057431057", strict=True))
ZERO_WIDTH = "\u200b\u200c\u200d\u2060"  # space, non-joiner, joiner, word joiner


def homoglyph(text: str, seed: int = 0) -> str:
    """Half of the Latin letters that have a Cyrillic double are written with it."""
    return _replace_some(text, HOMOGLYPHS, _draw("homoglyph", text, seed))


def leetspeak(text: str, seed: int = 0) -> str:
    """Half of the letters a, e, i, o, s and t are written as digits."""
    return _replace_some(text, LEET, _draw("leetspeak", text, seed))


def spaces(text: str, seed: int = 0) -> str:
    """Half of the words are spaced out, letter by letter; white space between words is kept."""
    draw = _draw("spaces", text, seed)
    lines = []
    for line in text.split("\n"):
        words = []
        for word in line.split(" "):
            if draw.random() < SHARE:
                word = " ".join(word)
            words.append(word)
        lines.append(" ".join(words))
    return "\n".join(lines)


def zero_width(text: str, seed: int = 0) -> str:
    """Behind half of the letters stands a character that is not seen."""
    draw = _draw("zero_width", text, seed)
    out = []
    for letter in text:
        out.append(letter)
        if letter.isalpha() and draw.random() < SHARE:
            out.append(draw.choice(ZERO_WIDTH))
    return "".join(out)


def base64_text(text: str, seed: int = 0) -> str:
    """The whole text in base64, of its UTF-8; nothing is drawn."""
    encoded = base64.b64encode(text.encode())
    return encoded.decode()


OBFUSCATIONS: dict[str, Callable[[str, int], str]] = {
    "homoglyph": homoglyph,
    "leetspeak": leetspeak,
    "spaces": spaces,
    "zero_width": zero_width,
    "base64": base64_text,
}


def check_obfuscations(names: Iterable[str], flag: str) -> None:
    """Raise UserError for a name that is none of OBFUSCATIONS."""
    for name in names:
        if name not in OBFUSCATIONS:
            raise UserError(f"{flag} {name}: expected some of {', '.join(OBFUSCATIONS)}")


def obfuscated(messages: Messages, name: str, seed: int = 0) -> list[dict[str, str]]:
    """A conversation with every turn but the system's obfuscated."""
    change = OBFUSCATIONS[name]
    out = []
    for turn in messages:
        content = turn["content"]
        if turn["role"] != "system":
            content = change(content, seed)
        out.append({"role": turn["role"], "content": content})
    return out


def _draw(name: str, text: str, seed: int) -> random.Random:
    return random.Random(f"{seed} {name} {text}")


def _replace_some(text: str, doubles: dict[str, str], draw: random.Random) -> str:
    out = []
    for letter in text:
        if letter in doubles and draw.random() < SHARE:
            letter = doubles[letter]
        out.append(letter)
    return "".join(out)

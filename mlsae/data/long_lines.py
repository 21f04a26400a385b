"""Read one text of a long line of JSON part by part, in memory for a part.

What is read is what `json.loads` gives; it is not asked, since it holds the line, its text and the
string at once, four bytes for each. The line is read twice: to its end, to know that it is JSON and
where the column is last, and again for the text.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator

_DEPTH = 100  # of arrays and objects in one another that are read here
_LONGEST_NUMBER = 4000  # digits; from 4,300 on, Python makes no number of them

# A run of a string that stands alone: it ends neither within an escape, nor between two that make
# one character (the high half of a pair ends a run only if what follows is seen to be no low one).
_RUN = re.compile(
    r"""(?:
    [^"\\\x00-\x1f]++
    | \\["\\/bfnrt]
    | \\u(?![dD][89abAB])[0-9a-fA-F]{4}
    | \\u[dD][89abAB][0-9a-fA-F]{2}(?=[^\\]|\\[^u]|\\u[0-9a-fA-F]{4})
    )*+""",
    re.VERBOSE,
)
_LONGEST_ESCAPE = 12  # characters: of a pair
_SPACE = re.compile(r"[ \t\n\r]*+")
_SCALAR = re.compile(
    r"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][-+]?[0-9]++)?+"
    r"|true|false|null|NaN|-?Infinity"
)
_LETTERS = 9  # of the longest of these words


class NotTextError(ValueError):
    """The line is not an object of JSON with a text in the column, as far as can be told here."""


def last_text(chunks: Iterator[bytes], column: str) -> int | None:
    """Of the texts that the object in `chunks`, a line of JSON, has in `column`, the number of the
    last one, which is the one that counts; None if there is no such column.

    Raises NotTextError when the line turns out to be something else: another value in the column,
    no JSON, no UTF-8, or what only `json.loads` can judge (half a pair of surrogates in UTF-8,
    numbers of thousands of digits, a hundred arrays in one another).
    """
    which = None
    try:
        for number, _ in _texts(_Line(chunks), column):
            which = number
    except UnicodeDecodeError as error:
        raise NotTextError(str(error)) from error
    return which


def parts_of_text(chunks: Iterator[bytes], column: str, which: int) -> Iterator[str]:
    """The parts of the text number `which` in the same line."""
    for number, part in _texts(_Line(chunks), column):
        if number == which:
            yield part


def _texts(line: _Line, column: str) -> Iterator[tuple[int, str]]:
    """The parts of the texts in `column`, with the number of the text, from 0; of each, an empty
    one first."""
    number = -1
    for key in _members(line):
        if key != column:
            _skip(line, 1)
            continue
        number += 1
        yield number, ""
        line.expect('"')
        for part in _string(line):
            yield number, part
    if line.next_char():
        raise NotTextError("there is more behind the object")


class _Line:
    """The characters of a line, read on as they are needed."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self.text, self.at = "", 0
        self._chunks = chunks
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def more(self) -> bool:
        """Read on, and forget what is before `at`. False at the end of the line."""
        for chunk in self._chunks:
            read = self._decoder.decode(chunk)
            if read:
                self.text, self.at = self.text[self.at :] + read, 0
                return True
        self._decoder.decode(b"", final=True)
        return False

    def next_char(self) -> str:
        """The character at `at`, after white space; "" at the end of the line."""
        while True:
            match = _SPACE.match(self.text, self.at)
            assert match, "white space may be empty"
            self.at = match.end()
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def expect(self, chars: str) -> str:
        """Go past the next character, one of `chars`, and return it. Raises NotTextError."""
        char = self.next_char()
        if not char or char not in chars:
            raise NotTextError(f"there is {char!r} where one of {chars!r} should be")
        self.at += 1
        return char


def _members(line: _Line) -> Iterator[str]:
    """The keys of an object; after each, the caller reads its value."""
    line.expect("{")
    if line.next_char() == "}":
        line.at += 1
        return
    while True:
        line.expect('"')
        key = "".join(_string(line))
        line.expect(":")
        yield key
        if line.expect(",}") == "}":
            return


def _string(line: _Line) -> Iterator[str]:
    """The parts of a string, of which the opening quote has been read."""
    while True:
        match = _RUN.match(line.text, line.at)
        assert match, "a run may be empty"
        if match.end() > line.at:
            line.at = match.end()
            yield json.loads(f'"{match.group()}"')
        left = len(line.text) - line.at
        if left and line.text[line.at] == '"':
            line.at += 1
            return
        if left >= _LONGEST_ESCAPE or not line.more():
            raise NotTextError("a string has no end, or what no string has")


def _skip(line: _Line, depth: int) -> None:
    """Read a value, whatever it is."""
    char = line.next_char()
    if depth > _DEPTH:
        raise NotTextError("arrays and objects are too deep in one another")
    if char == "{":
        for _ in _members(line):
            _skip(line, depth + 1)
    elif char == "[":
        line.at += 1
        if line.next_char() == "]":
            line.at += 1
            return
        _skip(line, depth + 1)
        while line.expect(",]") == ",":
            _skip(line, depth + 1)
    elif char == '"':
        line.at += 1
        for _ in _string(line):
            pass
    else:
        _skip_scalar(line)


def _skip_scalar(line: _Line) -> None:
    while len(line.text) - line.at < _LONGEST_NUMBER and line.more():
        pass
    match = _SCALAR.match(line.text, line.at, line.at + _LONGEST_NUMBER)
    if not match or match.end() == line.at + _LONGEST_NUMBER:
        raise NotTextError("there is no value, or a number too long")
    line.at = match.end()

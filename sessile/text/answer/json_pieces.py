"""JSON that comes in pieces: what of it is certain, and where it ceases to be JSON.

Readers look into the text that their owner holds, from a position on, and say how far they came; the rest is held until
more has come. Where that is does not depend on how the text was cut.
"""

import json
import re
from enum import Enum, auto

DEPTH_MAX = 128
WORD_CHARS_MAX = 512
"""Longest number. It is held until it ends, and so is bounded."""
NAME_CHARS_MAX = 256

_SPACE_RUN = re.compile(r"[ \t\r\n]*")
_PLAIN_RUN = re.compile(r'[^"\\\x00-\x1f]+')
_WORD_RUN = re.compile(r"[^\s\"{}\[\],:]+")
_WORD = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_HEX = "[0-9a-fA-F]"
_LOW = f"[dD][c-fC-F]{_HEX}{{2}}"
# Half a surrogate pair is JSON by the letter, but no text that could be sent on.
_ESCAPE = re.compile(rf'\\(?:["\\/bfnrt]|u(?![dD][89a-fA-F]){_HEX}{{4}}|u[dD][89abAB]{_HEX}{{2}}\\u{_LOW})')
_ESCAPE_BEGUN = re.compile(
    rf"\\(?:u(?:(?![dD][89a-fA-F]){_HEX}{{0,3}}|[dD]|[dD][89abAB]{_HEX}{{0,2}}"
    rf"|[dD][89abAB]{_HEX}{{2}}\\(?:u(?:[dD](?:[c-fC-F]{_HEX}?)?)?)?)?)?"
)


_CALL_KEYS = frozenset({"name", "arguments", "type", "id"})


class NotJson(ValueError):
    """The text is no JSON, or not what it should be. at: how far it was read; reason: a clause that says what is wrong.

    What came before is in the reader's `ready`.
    """

    def __init__(self, at: int, reason: str) -> None:
        super().__init__(reason)
        self.at = at
        self.reason = reason


class _Wants(Enum):
    VALUE = auto()
    VALUE_OR_END = auto()
    KEY = auto()
    KEY_OR_END = auto()
    COLON = auto()
    COMMA_OR_END = auto()
    STRING = auto()


class JsonValue:
    """One value. ready: what has been read of it, always the beginning of JSON; whoever takes it empties it.

    Control characters within strings, which models write and JSON forbids, become escapes.
    """

    def __init__(self) -> None:
        self.ready = ""
        self.is_done = False
        self._closers: list[str] = []
        self._wants = _Wants.VALUE
        self._is_key = False

    def read(self, text: str, at: int) -> int:
        """Read on from a position; how far it came. Raises NotJson."""
        while at < len(text) and not self.is_done:
            after = self._read_string(text, at) if self._wants is _Wants.STRING else self._read_token(text, at)
            if after == at:
                break
            at = after
        return at

    def _read_string(self, text: str, at: int) -> int:
        if run := _PLAIN_RUN.match(text, at):
            self.ready += run[0]
            return run.end()
        if text[at] == '"':
            self.ready += '"'
            self._wants = _Wants.COLON if self._is_key else _Wants.COMMA_OR_END
            self._is_key = False
            self._end_of_value()
            return at + 1
        if text[at] != "\\":
            self.ready += json.dumps(text[at])[1:-1]
            return at + 1
        if escape := _ESCAPE.match(text, at):
            self.ready += escape[0]
            return escape.end()
        if _ESCAPE_BEGUN.fullmatch(text, at):
            return at
        raise NotJson(at, "a string has an escape that JSON does not know")

    def _read_token(self, text: str, at: int) -> int:
        if (after := skip_space(text, at)) > at:
            self.ready += text[at:after]
            return after
        character, wants = text[at], self._wants
        if wants in (_Wants.VALUE, _Wants.VALUE_OR_END) and character not in "]},:":
            return self._begin_value(text, at)
        if wants in (_Wants.KEY, _Wants.KEY_OR_END) and character == '"':
            self._wants, self._is_key = _Wants.STRING, True
        elif wants is _Wants.COLON and character == ":":
            self._wants = _Wants.VALUE
        elif wants is _Wants.COMMA_OR_END and character == ",":
            self._wants = _Wants.KEY if self._closers[-1] == "}" else _Wants.VALUE
        elif wants in (_Wants.VALUE_OR_END, _Wants.KEY_OR_END, _Wants.COMMA_OR_END) and character == self._closers[-1]:
            self._closers.pop()
            self._wants = _Wants.COMMA_OR_END
            self._end_of_value()
        else:
            raise NotJson(at, f"{character!r} stands where JSON wants {_WANTED[wants]}")
        self.ready += character
        return at + 1

    def _begin_value(self, text: str, at: int) -> int:
        character = text[at]
        if character in "{[":
            if len(self._closers) == DEPTH_MAX:
                raise NotJson(at, f"it is nested more than {DEPTH_MAX} deep")
            self._closers.append("}" if character == "{" else "]")
            self._wants = _Wants.KEY_OR_END if character == "{" else _Wants.VALUE_OR_END
        elif character == '"':
            self._wants = _Wants.STRING
        else:
            return self._read_word(text, at)
        self.ready += character
        return at + 1

    def _read_word(self, text: str, at: int) -> int:
        run = _WORD_RUN.match(text, at)
        word = run[0] if run else text[at]
        if len(word) > WORD_CHARS_MAX:
            raise NotJson(at, f"a number has more than {WORD_CHARS_MAX} digits")
        if at + len(word) == len(text):
            return at  # it may go on
        if not _WORD.fullmatch(word):
            raise NotJson(at, f"{word[:20]!r} is no JSON value")
        self.ready += word
        self._wants = _Wants.COMMA_OR_END
        self._end_of_value()
        return at + len(word)

    def _end_of_value(self) -> None:
        self.is_done = not self._closers and self._wants is _Wants.COMMA_OR_END


_WANTED = {
    _Wants.VALUE: "a value",
    _Wants.VALUE_OR_END: "a value or the end of a list",
    _Wants.KEY: "a name in quotes",
    _Wants.KEY_OR_END: "a name in quotes or the end of an object",
    _Wants.COLON: "a colon",
    _Wants.COMMA_OR_END: "a comma or an end",
}


class _Step(Enum):
    OPEN = auto()
    KEY_OR_END = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    COMMA_OR_END = auto()


class CallObject:
    """`{"name": …, "arguments": {…}}`, in either order; "parameters" is another word for "arguments".

    name: once it is known. ready: arguments that have been read, always the beginning of a JSON object; whoever takes
    them empties it. Arguments written as a string of JSON, as some models do, are taken for what is in the string.
    """

    def __init__(self, *, only_known: bool) -> None:
        """only_known: an object with any other key than those of a call is none."""
        self.name: str | None = None
        self.ready = ""
        self.has_arguments = False
        self.is_done = False
        self._only_known = only_known
        self._step = _Step.OPEN
        self._value: JsonValue | None = None
        self._key: str | None = None
        self._gathered = ""

    def read(self, text: str, at: int) -> int:
        """Read on from a position; how far it came. Raises NotJson; what was read before stays in `ready`."""
        while not self.is_done:
            if self._value is None:
                at = skip_space(text, at)
                if at == len(text):
                    break
                at = self._read_mark(text, at)
                continue
            value = self._value
            try:
                at = value.read(text, at)
            finally:
                self._keep(value)
            if not value.is_done:
                break
            self._value = None
            self._end_value(at)
        return at

    @property
    def lacks_only_its_end(self) -> bool:
        """Whether name and arguments are complete, so that nothing but the last brace could be missing."""
        is_between = self._value is None and self._step is _Step.COMMA_OR_END
        return is_between and self.name is not None and self.has_arguments

    def _read_mark(self, text: str, at: int) -> int:
        character, step = text[at], self._step
        if step in (_Step.KEY_OR_END, _Step.KEY) and character == '"':
            self._value, self._key, self._gathered = JsonValue(), None, ""
            return at
        if step is _Step.VALUE:
            self._begin_value(character, at)
            return at
        if step is _Step.OPEN and character == "{":
            self._step = _Step.KEY_OR_END
        elif step is _Step.COLON and character == ":":
            self._step = _Step.VALUE
        elif step is _Step.COMMA_OR_END and character == ",":
            self._step = _Step.KEY
        elif step in (_Step.COMMA_OR_END, _Step.KEY_OR_END) and character == "}":
            self._end(at)
        else:
            raise NotJson(at, f"{character!r} does not belong there")
        return at + 1

    def _begin_value(self, character: str, at: int) -> None:
        if self._key == "name" and character != '"':
            raise NotJson(at, "its name is no string")
        if self._key == "arguments" and character not in '{"n':
            raise NotJson(at, "its arguments are no object")
        self.has_arguments = self.has_arguments or (self._key == "arguments" and character == "{")
        self._value, self._gathered = JsonValue(), ""

    def _keep(self, value: JsonValue) -> None:
        """Pass on what was read of arguments; gather everything else."""
        if self._key == "arguments" and self.has_arguments:
            self.ready += value.ready
        else:
            self._gathered += value.ready
        value.ready = ""

    def _end_value(self, at: int) -> None:
        if self._key is None:
            self._end_key(at)
            return
        if self._key == "name":
            self.name = json.loads(self._gathered)
            if not self.name or len(self.name) > NAME_CHARS_MAX:
                raise NotJson(at, f"its name has not 1 to {NAME_CHARS_MAX} characters")
        elif self._key == "arguments" and not self.has_arguments:
            self.has_arguments = True
            self.ready = _unwrapped(self._gathered, at)
        self._step = _Step.COMMA_OR_END

    def _end_key(self, at: int) -> None:
        key = json.loads(self._gathered)
        key = "arguments" if key == "parameters" else key
        if (key == "name" and self.name is not None) or (key == "arguments" and self.has_arguments):
            raise NotJson(at, f"its {key} is there twice")
        if self._only_known and key not in _CALL_KEYS:
            raise NotJson(at, f"{key[:40]!r} is nothing of a call")
        self._key, self._step = key, _Step.COLON

    def _end(self, at: int) -> None:
        if self.name is None:
            raise NotJson(at, "it has no name")
        if not self.has_arguments:
            self.has_arguments = True
            self.ready = "{}"
        self.is_done = True


def skip_space(text: str, at: int) -> int:
    """The position after the white space at a position."""
    run = _SPACE_RUN.match(text, at)
    return run.end() if run else at


def _unwrapped(literal: str, at: int) -> str:
    """Arguments that were written as a string of JSON, or as null."""
    written = (json.loads(literal) or "").strip() or "{}"
    inner = JsonValue()
    try:
        end = inner.read(written, 0)
    except NotJson as error:
        raise NotJson(at, f"its arguments are a string, and in it {error.reason}") from error
    if not inner.is_done or end != len(written) or written[0] != "{":
        raise NotJson(at, "its arguments are a string that is no JSON object")
    return inner.ready

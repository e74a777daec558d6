"""A Dockerfile as instructions, read so strictly that whatever is not understood ends the reading.

Only what our own Dockerfiles use is known: their steps are replayed by scripts/replay_image.py where no container
engine is at hand, and a step that was passed over would make that a proof of nothing.
"""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

WORDS = frozenset({
    "FROM", "ARG", "WORKDIR", "RUN", "COPY", "ENV", "USER", "VOLUME", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK",
    "ENTRYPOINT", "CMD",
})  # fmt: skip
_DIRECTIVE = re.compile(r"#\s*(syntax|escape|check)\s*=", re.IGNORECASE)
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Of whoever says nothing else."""
_NAME = re.compile(r"[A-Za-z_]\w*")


class NotFollowed(Exception):
    """An instruction that is not among those that can be replayed, with its line."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction, its lines joined. line: where it begins."""

    line: int
    word: str
    rest: str

    def refuse(self, reason: str) -> NotFollowed:
        """What to raise."""
        return NotFollowed(f"line {self.line}: {self.word} {self.rest[:60]}: {reason}")


@dataclass(frozen=True, slots=True)
class Copy:
    """stage: where from; None: the context. The last name is the target."""

    stage: str | None
    sources: tuple[str, ...]
    target: str


@dataclass(slots=True)
class Image:
    """What a stage's instructions said about whoever runs it, up to now."""

    base: str
    name: str | None
    environment: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    """Of the build; RUN sees them, the image does not."""
    workdir: str = "/"
    user: str = "root"
    volumes: list[str] = field(default_factory=list)
    port: int | None = None
    stop_signal: str = "SIGTERM"
    health: list[str] | None = None
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)


def instructions_of(text: str) -> list[Instruction]:
    """The instructions in order. Raises NotFollowed for a word that is not known, a directive or a here-document."""
    found: list[Instruction] = []
    begun, joined = 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#"):
            if _DIRECTIVE.match(line):
                raise NotFollowed(f"line {number}: {line}: directives are not followed")
            continue
        if not joined and not line.strip():
            continue
        begun = begun if joined else number
        joined += line.rstrip()
        if joined.endswith("\\"):
            joined = joined[:-1] + " "
            continue
        word, _, rest = joined.strip().partition(" ")
        found.append(Instruction(begun, word, rest.strip()))
        joined = ""
    if joined:
        raise NotFollowed(f"line {begun}: {joined[:60]}: the last line goes on")
    for each in found:
        if each.word not in WORDS or not each.rest:
            raise each.refuse("not among the instructions that are replayed")
        if "<<" in each.rest:
            raise each.refuse("here-documents are not followed")
    if not found or found[0].word != "FROM":
        raise NotFollowed("the first instruction must be FROM")
    return found


def words_of(instruction: Instruction) -> list[str]:
    """The words of an instruction whose variables nobody expands. Raises NotFollowed if there are some."""
    if "$" in instruction.rest:
        raise instruction.refuse("variables are followed in ENV and RUN alone")
    return shlex.split(instruction.rest)


def flags_of(instruction: Instruction) -> tuple[dict[str, str], str]:
    """The flags before the rest, by name."""
    flags, rest = {}, instruction.rest
    while rest.startswith("--"):
        flag, _, rest = rest.partition(" ")
        name, equals, value = flag.removeprefix("--").partition("=")
        if not equals:
            raise instruction.refuse(f"{flag}: a flag has a value")
        flags[name] = value
        rest = rest.lstrip()
    return flags, rest


def list_of(instruction: Instruction, text: str) -> list[str]:
    """A list in JSON. Raises NotFollowed for the form that a shell would run."""
    try:
        found = json.loads(text)
    except ValueError:
        raise instruction.refuse("only the form in JSON is followed") from None
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found) or not found:
        raise instruction.refuse("must be a list of texts")
    return found


def from_of(instruction: Instruction) -> Image:
    """The stage that begins here."""
    match words_of(instruction):
        case [base]:
            return Image(base, None)
        case [base, "AS" | "as", name]:
            return Image(base, name)
    raise instruction.refuse("must be FROM image, or FROM image AS name")


def copy_of(instruction: Instruction) -> Copy:
    """What COPY copies."""
    flags, rest = flags_of(instruction)
    if set(flags) - {"from"}:
        raise instruction.refuse("of its flags only --from is followed")
    if "$" in rest or rest.startswith("[") or any(letter in rest for letter in "*?"):
        raise instruction.refuse("only plain names are followed")
    *sources, target = shlex.split(rest)
    if not sources:
        raise instruction.refuse("needs a source and a target")
    return Copy(flags.get("from"), tuple(sources), target)


def context_rules(text: str) -> tuple[list[str], list[str]]:
    """What a .dockerignore lets in after leaving all out, and the names it leaves out of that. Raises NotFollowed."""
    first, *rest = text.split()
    let_in = [line.removeprefix("!") for line in rest if line.startswith("!")]
    left_out = [line.removeprefix("**/") for line in rest if line.startswith("**/")]
    if first != "*" or len(let_in) + len(left_out) != len(rest) or any("/" in name for name in let_in + left_out):
        raise NotFollowed(".dockerignore: only *, !name and **/name are followed")
    return let_in, left_out


def note(image: Image, instruction: Instruction, build_arguments: Mapping[str, str]) -> bool:
    """Take down what an instruction says about the image; False for FROM, RUN and COPY, which do something."""
    match instruction.word:
        case "ENV":
            for name, value in _pairs(instruction):
                image.environment[name] = _expanded(instruction, value, image)
        case "ARG":
            name, equals, value = shlex.split(instruction.rest)[0].partition("=")
            if not _NAME.fullmatch(name) or "$" in value or len(shlex.split(instruction.rest)) != 1:
                raise instruction.refuse("must be one name with a plain value")
            if equals or name in build_arguments:
                image.arguments[name] = build_arguments.get(name, value)
        case "WORKDIR":
            (place,) = _one(instruction)
            if not place.startswith("/"):
                raise instruction.refuse("must be absolute")
            image.workdir = place
        case "USER":
            (image.user,) = _one(instruction)
        case "VOLUME":
            image.volumes += _one(instruction)
        case "EXPOSE":
            (port,) = _one(instruction)
            if not port.isdigit():
                raise instruction.refuse("must be one port")
            image.port = int(port)
        case "STOPSIGNAL":
            (image.stop_signal,) = _one(instruction)
        case "HEALTHCHECK":
            flags, rest = flags_of(instruction)
            if set(flags) - {"interval", "timeout", "start-period", "retries"} or not rest.startswith("CMD "):
                raise instruction.refuse("must be times and CMD")
            image.health = list_of(instruction, rest.removeprefix("CMD "))
        case "ENTRYPOINT":
            image.entrypoint, image.command = list_of(instruction, instruction.rest), []
        case "CMD":
            image.command = list_of(instruction, instruction.rest)
        case _:
            return False
    return True


def _one(instruction: Instruction) -> list[str]:
    words = words_of(instruction)
    if len(words) != 1 or words[0].startswith("["):
        raise instruction.refuse("must be one word")
    return words


def _pairs(instruction: Instruction) -> list[tuple[str, str]]:
    pairs = [word.partition("=") for word in shlex.split(instruction.rest)]
    if not all(equals and _NAME.fullmatch(name) for name, equals, _ in pairs):
        raise instruction.refuse("must be NAME=value …")
    return [(name, value) for name, _, value in pairs]


def _expanded(instruction: Instruction, value: str, image: Image) -> str:
    known = {"PATH": PATH} | image.arguments | image.environment

    def value_of(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name not in known:
            raise instruction.refuse(f"${name} is not known")
        return known[name]

    if "$" in _VARIABLE.sub("", value):
        raise instruction.refuse("of expansions only $NAME and ${NAME} are followed")
    return _VARIABLE.sub(value_of, value)

"""What drafts do on a model that says something, recorded to be played where none does: on a GPU without weights.

`sessile bench speculate --record FILE` lets a model answer the bench's prompts, then asks the lookup at each place of
each answer: how long is the longest match, how many drafts follow from it, how many of these did the model go on to
say. Greedy output is the same with speculation and without, so that is what verifying would have come to, wherever a
step begins and however many of the drafts the pace of another device allows.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sessile.contract.drafting import DraftWish
from sessile.draft.drafter import LookupDrafter
from sessile.draft.pace import StepTimes
from sessile.draft.shelf import Shelf
from sessile.draft.weighing import MATCH_LENGTHS

RECORDED = Path(__file__).parent / "speculate_recorded.json"
"""Of SmolLM2-135M-Instruct; docs/BENCHMARKS.md has the command."""
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
MATCH_MAX = len(DIGITS) - 1
"""A longer match is recorded as this: above the last class of matches they are all alike."""
DRAFTS_MAX = MATCH_MAX
_ANY_TIMES = StepTimes((1, 2), (1, 1))

assert MATCH_LENGTHS[-1] <= MATCH_MAX, "a digit holds every class of matches"


@dataclass(frozen=True)
class RecordedAnswer:
    """One answer, place by place: the longest match there, the drafts looked up, how many of them were right."""

    prompt_tokens: int
    matches: tuple[int, ...]
    offered: tuple[int, ...]
    accepted: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.matches) == len(self.offered) == len(self.accepted)
        assert all(right <= made for made, right in zip(self.offered, self.accepted, strict=True))

    @property
    def tokens(self) -> int:
        """Of the answer."""
        return len(self.matches)

    def as_text(self) -> str:
        """Three digits a place, in base 36."""
        places = zip(self.matches, self.offered, self.accepted, strict=True)
        return "".join(DIGITS[number] for place in places for number in place)

    @classmethod
    def from_text(cls, prompt_tokens: int, text: str) -> "RecordedAnswer":
        """What `as_text` wrote."""
        numbers = [DIGITS.index(digit) for digit in text]
        return cls(prompt_tokens, tuple(numbers[0::3]), tuple(numbers[1::3]), tuple(numbers[2::3]))


@dataclass(frozen=True)
class Recording:
    """Answers by workload, and who gave them. drafts_max: most drafts that were looked up at a place."""

    model: str
    drafts_max: int
    workloads: Mapping[str, tuple[RecordedAnswer, ...]]

    def write(self, path: Path) -> None:
        """To a file of JSON, a line an answer."""
        parts = []
        for name, answers in self.workloads.items():
            lines = ",\n".join(json.dumps([answer.prompt_tokens, answer.as_text()]) for answer in answers)
            parts.append(f"{json.dumps(name)}: [\n{lines}\n]")
        head = f'"model": {json.dumps(self.model)},\n"drafts_max": {self.drafts_max},\n"workloads": '
        path.write_text("{" + head + "{" + ",\n".join(parts) + "}}\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Recording":
        """What `write` wrote."""
        kept = json.loads(path.read_text(encoding="utf-8"))
        workloads = {
            name: tuple(RecordedAnswer.from_text(*answer) for answer in answers)
            for name, answers in kept["workloads"].items()
        }
        return cls(kept["model"], kept["drafts_max"], workloads)


def recorded(
    shelf: Shelf, corpora: tuple[str, ...], prompt: Sequence[int], answer: Sequence[int], drafts_max: int
) -> RecordedAnswer:
    """Look up drafts at each place of an answer, as for a request that may use these corpora.

    The line learns at each place which sources are right, as in a step that begins there.
    """
    drafter = LookupDrafter(shelf, _ANY_TIMES)
    line = drafter.start(drafter.new_index(), DraftWish("", corpora, drafts_max))
    line.index.extend(np.array(prompt, "<i4").tobytes())
    matches, offered, accepted = [], [], []
    for place, token in enumerate(answer):
        matches.append(min(drafter.matches([line])[0], MATCH_MAX))
        # Behind the last token nobody knows what the model would say.
        drafts = list(drafter.draft([line], [drafts_max])[0])[: len(answer) - place]
        right = agreeing(drafts, answer[place:])
        drafter.settled(line, right)
        offered.append(len(drafts))
        accepted.append(right)
        line.index.extend(np.array([token], "<i4").tobytes())
    drafter.close()
    return RecordedAnswer(len(prompt), tuple(matches), tuple(offered), tuple(accepted))


def agreeing(drafts: Sequence[int], tokens: Sequence[int]) -> int:
    """How many drafts, from the first on, are what follows."""
    pairs = enumerate(zip(drafts, tokens, strict=False))
    return next((number for number, (draft, token) in pairs if draft != token), min(len(drafts), len(tokens)))

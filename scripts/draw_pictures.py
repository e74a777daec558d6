"""Draw the pictures of docs/SESSIONS.md and docs/SPECULATION.md: `python scripts/draw_pictures.py`.

Each is an SVG by itself, without a font or script from elsewhere, that turns dark with the reader's system. Lengths are
in pixels; a page of KV is drawn with four tokens.
"""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

TARGET = Path(__file__).resolve().parents[1] / "docs" / "pictures"

WIDTH = 720
TOKEN = 20
TOKENS_A_PAGE = 4
PAGE = TOKENS_A_PAGE * TOKEN + 8
PAGE_PITCH = PAGE + 10

LIGHT = {
    "ink": "#1f2328", "muted": "#5c656e", "kept": "#cfe4f4", "kept-edge": "#2f6f9f", "fresh": "#ffe0b0",
    "fresh-edge": "#a86200", "shared": "#d3ecd8", "shared-edge": "#2e7d4f", "torn": "#b3261e",
}  # fmt: skip
DARK = {
    "ink": "#e6e8ea", "muted": "#a3adb6", "kept": "#173a52", "kept-edge": "#6fb3e0", "fresh": "#4d3510",
    "fresh-edge": "#e7a84a", "shared": "#173f29", "shared-edge": "#6ccb93", "torn": "#f0857d",
}  # fmt: skip

RULES = """\
text { font: 14px system-ui, sans-serif; fill: var(--ink) }
.muted { fill: var(--muted); font-size: 13px }
.line { fill: none; stroke: var(--muted); stroke-width: 1.5 }
.tip { fill: var(--muted) }
.kept { fill: var(--kept); stroke: var(--kept-edge) }
.fresh { fill: var(--fresh); stroke: var(--fresh-edge) }
.shared { fill: var(--shared); stroke: var(--shared-edge) }
.torn { fill: none; stroke: var(--torn); stroke-dasharray: 4 3 }
.empty { fill: none; stroke: var(--muted); stroke-opacity: 0.4 }
.page { fill: none; stroke: var(--muted); stroke-width: 1.5 }"""


class Picture:
    """An SVG that is drawn from top to bottom. Kinds are classes of RULES."""

    def __init__(self, height: int, title: str) -> None:
        self._head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">'
        self._parts = [f"<title>{escape(title)}</title>", style()]

    def box(self, x: float, y: float, width: float, height: float, kind: str, label: str = "") -> None:
        """A rectangle, with a label in its middle."""
        self._parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="3"/>')
        if label:
            self.text(x + width / 2, y + height / 2 + 5, label, anchor="middle")

    def text(self, x: float, y: float, content: str, kind: str = "plain", anchor: str = "start") -> None:
        """A line of text whose foot is at y."""
        self._parts.append(f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(content)}</text>')

    def arrow(self, *points: tuple[float, float], dashed: bool = False) -> None:
        """A line through points, horizontal or vertical at its end, with a tip there."""
        (x0, y0), (x1, y1) = points[-2:]
        path = " ".join(f"{'L' if index else 'M'}{x} {y}" for index, (x, y) in enumerate(points))
        dashes = ' stroke-dasharray="4 3"' if dashed else ""
        self._parts.append(f'<path class="line" d="{path}"{dashes}/>')
        along_x, along_y = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
        back_x, back_y = x1 - 8 * along_x, y1 - 8 * along_y
        wing_x, wing_y = 4 * along_y, 4 * along_x
        corners = f"{x1},{y1} {back_x + wing_x},{back_y + wing_y} {back_x - wing_x},{back_y - wing_y}"
        self._parts.append(f'<polygon class="tip" points="{corners}"/>')

    def page(self, x: float, y: float, tokens: Sequence[str]) -> None:
        """A page of KV: its places from the left, each of a kind."""
        self.box(x, y, PAGE, TOKEN + 8, "page")
        for place, kind in enumerate([*tokens, *["empty"] * (TOKENS_A_PAGE - len(tokens))]):
            self.box(x + 4 + place * TOKEN + 1, y + 4, TOKEN - 2, TOKEN, kind)

    def pages(self, x: float, y: float, *pages: Sequence[str]) -> None:
        """Pages side by side."""
        for index, tokens in enumerate(pages):
            self.page(x + index * PAGE_PITCH, y, tokens)

    def legend(self, y: float, entries: Sequence[tuple[str, str]]) -> None:
        """What each kind means, in one line."""
        x = 10.0
        for kind, meaning in entries:
            self.box(x, y, 16, 16, kind)
            self.text(x + 22, y + 13, meaning, "muted")
            x += 22 + 6.7 * len(meaning) + 26

    def render(self) -> str:
        """The whole file."""
        return "\n".join([self._head, *self._parts, "</svg>", ""])


def style() -> str:
    """The colours of both schemes and the rules that use them."""
    light, dark = ("; ".join(f"--{name}: {value}" for name, value in scheme.items()) for scheme in (LIGHT, DARK))
    return (
        f"<style>\nsvg {{ {light} }}\n@media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}\n{RULES}\n</style>"
    )


def of(kind: str, count: int) -> list[str]:
    """So many tokens of a kind."""
    return [kind] * count


def turns() -> Picture:
    """What is sent and computed in three turns of a session."""
    picture = Picture(230, "Three turns: what a turn adds is sent and computed, all that came before stays in place")
    lengths = [("prompt", 150), ("answer", 90), ("question", 80), ("answer", 80), ("question", 80), ("answer", 80)]
    for turn in range(3):
        y = 12 + turn * 62
        picture.text(10, y + 21, f"turn {turn + 1}")
        x = 80.0
        for index, (label, width) in enumerate(lengths[: 2 * turn + 2]):
            kind = "kept" if index < 2 * turn else "fresh" if index == 2 * turn else "shared"
            picture.box(x, y, width - 3, 32, kind, label)
            x += width
        if turn:
            start = 80 + sum(width for _, width in lengths[: 2 * turn])
            picture.text(start - 6, y + 48, "neither sent nor computed again", "muted", "end")
    picture.legend(206, [("kept", "KV in place"), ("fresh", "sent and computed"), ("shared", "generated")])
    return picture


def handing_over() -> Picture:
    """Who holds the lease of a session's KV, and what there is between turns."""
    picture = Picture(240, "The lease of the KV goes from the session to the turn that runs, and back")
    for x, is_running in ((10, False), (400, True)):
        picture.text(x, 24, "while a turn runs" if is_running else "between turns")
        picture.box(x, 38, 140, 50, "kept", "session: tokens")
        picture.box(x + 170, 38, 140, 50, "fresh" if is_running else "empty", "request" if is_running else "no request")
        holder_x = x + (240 if is_running else 70)
        picture.arrow((holder_x, 88), (holder_x, 138))
        picture.text(holder_x + 8, 117, "lease", "muted")
        picture.pages(x + 124 * is_running, 140, of("kept", 4), of("kept", 3) + of("fresh", int(is_running)))
    picture.arrow((332, 56), (388, 56))
    picture.text(360, 47, "a turn", "muted", "middle")
    picture.arrow((388, 76), (332, 76))
    picture.text(360, 96, "its end", "muted", "middle")
    picture.text(10, 200, "no row of the batch is held; the pages may", "muted")
    picture.text(10, 218, "be reclaimed, the tokens stay", "muted")
    picture.text(400, 200, "the right to the pages has moved,", "muted")
    picture.text(400, 218, "the pages have not", "muted")
    return picture


def fork() -> Picture:
    """A fork: full pages shared, less than one copied."""
    picture = Picture(330, "A fork shares all full pages with its parent and copies the one that is partly filled")
    first, third = 170, 170 + 2 * PAGE_PITCH
    picture.text(10, 37, "before: one session")
    picture.pages(first, 18, of("kept", 4), of("kept", 4), of("kept", 2))
    picture.text(10, 119, "after the fork")
    picture.text(first, 146, "in the tree, read by both", "muted")
    picture.pages(first, 100, of("shared", 4), of("shared", 4))
    picture.page(third, 100, of("kept", 2))
    picture.text(third + PAGE + 10, 119, "parent")
    picture.page(third, 156, of("kept", 2))
    picture.text(third + PAGE + 10, 175, "fork")
    picture.arrow((third + 24, 128), (third + 24, 156))
    picture.text(third + 34, 147, "copy of 2 tokens", "muted")
    picture.text(10, 239, "both go on")
    picture.pages(first, 220, of("shared", 4), of("shared", 4), of("kept", 2) + of("fresh", 2), of("fresh", 3))
    picture.text(third + 2 * PAGE_PITCH, 239, "parent")
    picture.page(third, 260, of("kept", 2) + of("fresh", 1))
    picture.text(third + PAGE + 10, 279, "fork")
    entries = [("kept", "its own"), ("shared", "shared, never written"), ("fresh", "its own, new")]
    picture.legend(306, entries)
    return picture


def rewind() -> Picture:
    """A rewind, within own pages and into a shared one."""
    picture = Picture(330, "A rewind cuts a history; a page that others read is copied, not written")
    left = 150
    picture.text(10, 24, "KV of 10 tokens, cut to 6")
    picture.pages(left, 38, of("kept", 4), of("kept", 4), of("kept", 2))
    picture.arrow((left + 60, 70), (left + 60, 96))
    picture.pages(left, 98, of("kept", 4), of("kept", 2), of("torn", 2))
    picture.text(left + 2 * PAGE_PITCH + PAGE + 10, 117, "given back")
    picture.text(left + PAGE_PITCH, 144, "the next turn writes here", "muted")
    picture.text(10, 184, "the same, where a fork reads both full pages")
    picture.pages(left, 198, of("shared", 4), of("shared", 4), of("kept", 2))
    picture.arrow((left + 60, 230), (left + 60, 256))
    picture.pages(left, 258, of("shared", 4), of("kept", 2))
    picture.page(left + 3 * PAGE_PITCH, 258, of("shared", 4))
    picture.text(left + 3 * PAGE_PITCH, 250, "stays as it was, for the fork", "muted")
    picture.arrow((left + 3 * PAGE_PITCH, 272), (left + 2 * PAGE_PITCH - 8, 272), dashed=True)
    picture.text(left + 2 * PAGE_PITCH + 4, 266, "copy", "muted")
    picture.legend(306, [("kept", "its own"), ("shared", "shared, never written"), ("torn", "cut")])
    return picture


def roll_back() -> Picture:
    """A turn whose connection breaks."""
    picture = Picture(250, "A turn that is torn leaves its session as it was before")
    x = 170
    rows = [
        ("before the turn", [of("kept", 4), of("kept", 3)], "the history, as committed"),
        ("the turn runs", [of("kept", 4), of("kept", 3) + of("fresh", 1), of("fresh", 4)], ""),
        ("connection closes", [of("kept", 4), of("kept", 3) + of("torn", 1), of("torn", 4)], ""),
        ("after it", [of("kept", 4), of("kept", 3)], "the same history, in the same pages"),
    ]
    for row, (label, pages, remark) in enumerate(rows):
        y = 16 + row * 50
        picture.text(10, y + 19, label)
        picture.pages(x, y, *pages)
        if remark:
            picture.text(x + len(pages) * PAGE_PITCH + 10, y + 19, remark, "muted")
    picture.text(x + 3 * PAGE_PITCH + 10, 85, "its input and output", "muted")
    picture.text(x + 3 * PAGE_PITCH + 10, 135, "cut; the last page given back", "muted")
    picture.legend(222, [("kept", "committed"), ("fresh", "of the turn in flight"), ("torn", "rolled back")])
    return picture


def owners() -> Picture:
    """Whose a page may be, and how it gets from one owner to the next."""
    picture = Picture(300, "A page has one owner: nobody (free), a sequence, the tree, or limbo")
    picture.box(20, 60, 110, 50, "empty", "FREE")
    picture.box(240, 30, 230, 110, "kept")
    picture.text(355, 52, "a sequence", anchor="middle")
    picture.box(256, 66, 90, 34, "fresh", "request")
    picture.box(364, 66, 90, 34, "kept", "session")
    picture.text(355, 124, "one lease, handed to and fro", "muted", "middle")
    picture.box(580, 60, 120, 50, "shared", "TREE")
    picture.box(260, 220, 190, 50, "torn", "LIMBO")
    picture.arrow((130, 85), (238, 85))
    picture.text(184, 76, "draw", "muted", "middle")
    picture.arrow((470, 85), (578, 85))
    picture.text(524, 76, "publish", "muted", "middle")
    picture.arrow((355, 140), (355, 218))
    picture.text(364, 184, "release, cut", "muted")
    picture.arrow((640, 110), (640, 245), (452, 245))
    picture.text(632, 184, "evict", "muted", "end")
    picture.arrow((258, 245), (75, 245), (75, 112))
    picture.text(84, 236, "the last step that may", "muted")
    picture.text(84, 264, "touch it has settled", "muted")
    return picture


def drafts() -> Picture:
    """Four tokens one by one, and four in one step."""
    picture = Picture(260, "Without drafts a step gives one token; with drafts it gives those that agree, and one more")
    picture.text(10, 38, "without drafts")
    words = ["return", "self", ".", "pages"]
    for index, word in enumerate(words):
        picture.box(150 + index * 140, 18, 70, 30, "shared", word)
        picture.text(185 + index * 140, 66, f"step {index + 1}", "muted", "middle")
        if index < 3:
            picture.arrow((222 + index * 140, 33), (288 + index * 140, 33))
    picture.text(10, 122, "drafts, looked up")
    picture.text(10, 182, "what is sampled")
    guesses = ["return", "self", ".", "rows"]
    for index, (guess, word) in enumerate(zip(guesses, words, strict=True)):
        x = 150 + index * 78
        agrees = guess == word
        picture.box(x, 102, 70, 30, "fresh" if agrees else "torn", guess)
        picture.arrow((x + 35, 134), (x + 35, 160))
        picture.box(x, 162, 70, 30, "shared", word)
    picture.text(480, 122, "all verified in one step", "muted")
    picture.text(480, 182, "four tokens, as without drafts", "muted")
    entries = [("shared", "said"), ("fresh", "draft that agrees"), ("torn", "draft that does not: thrown away")]
    picture.legend(226, entries)
    return picture


PICTURES: dict[str, Callable[[], Picture]] = {
    "turns": turns,
    "handing-over": handing_over,
    "fork": fork,
    "rewind": rewind,
    "roll-back": roll_back,
    "owners": owners,
    "drafts": drafts,
}


if __name__ == "__main__":
    TARGET.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (TARGET / f"{name}.svg").write_text(draw().render(), "utf-8")

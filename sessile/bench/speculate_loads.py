"""The texts of `sessile bench speculate`: prompts of six kinds, and the corpora that a server would have for them.

Everything comes with Python itself, so the prompts are the same wherever the same Python runs: code of the standard
library, and the language reference that `pydoc` shows. The default model is small. Where it follows no instruction its
answer is begun for it, and it goes on from there: `begun_for_it` of a load says so.
"""

import ast
import importlib.util
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from sessile.contract.plan import Ints
from sessile.text.template import Message
from sessile.text.tokenizer import Tokenizer

PROMPTS = 32
"""Of each load: the largest batch."""
MODULES = (
    "textwrap", "shlex", "heapq", "bisect", "statistics", "random", "fractions", "calendar", "csv", "difflib",
    "fnmatch", "glob", "shutil", "tempfile", "copy", "gettext", "mimetypes", "netrc", "sched", "zipfile", "tarfile",
    "ast", "inspect", "pprint", "locale", "cmd", "configparser", "optparse", "string", "types",
)  # fmt: skip
"""Of the standard library, whose functions are edited."""
CODE_LETTERS_MIN, CODE_LETTERS_MAX = 500, 1_200
BEGUN_LINES = 4
"""Of an edited function, with which the answer is begun."""
PASSAGE_LETTERS_MIN, PASSAGE_LETTERS_MAX = 400, 900
BEGUN_WORDS = 4
"""Of a passage, with which an answer that quotes it is begun."""
RECORDS_SHOWN, RECORDS_ASKED, RECORDS_EARLIER = 2, 3, 200
DISTRACTORS = 64

QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "How do I bake bread without an oven?",
    "Why is the sky blue?",
    "Tell me a short story about a lighthouse keeper.",
    "What are the advantages of riding a bicycle to work?",
    "How does a refrigerator work?",
    "Write a letter to a friend who has moved away.",
    "What should I pack for a week in the mountains?",
    "Explain photosynthesis to a child.",
    "What makes a good teacher?",
    "How do I learn to play the piano as an adult?",
    "What is inflation?",
    "Describe a market on a Saturday morning.",
    "Why do we dream?",
    "Give me advice for a first job interview.",
    "How are mountains formed?",
    "What is the difference between weather and climate?",
    "Write a poem about autumn.",
    "How can I sleep better?",
    "What did people eat in the Middle Ages?",
    "Explain what a database is.",
    "How do vaccines work?",
    "What is the plot of Romeo and Juliet?",
    "How do I look after a houseplant?",
    "What is a good way to save money?",
    "Tell me about the history of chess.",
    "Why is the ocean salty?",
    "How do bees make honey?",
    "What would you ask a person from the future?",
    "Describe the taste of a lemon.",
    "How does one write a good letter of complaint?",
    "What is democracy?",
)
FIRST_NAMES = ("Ada", "Boris", "Chen", "Dana", "Emil", "Farah", "Greta", "Hugo", "Ines", "Jonas", "Kira", "Liam")
LAST_NAMES = ("Abel", "Baker", "Costa", "Dietz", "Engel", "Fisher", "Gomez", "Hahn", "Ivanov", "Jansen", "Klein")
CITIES = ("Oslo", "Porto", "Graz", "Lyon", "Turin", "Ghent", "Malmo", "Leeds", "Gdansk", "Bern")
GOODS = ("lamp", "chair", "kettle", "clock", "blanket", "mirror", "basket", "teapot", "shelf", "carpet")


@dataclass(frozen=True)
class Load:
    """Prompts of one kind. prompts: PROMPTS of them, token ids. documents: of the corpus that goes with them.

    begun_for_it: how an answer begins that the model does not begin itself. stop: what ends it, if not the model does.
    """

    prompts: list[list[int]]
    documents: list[Ints]
    begun_for_it: str = ""
    stop: tuple[bytes, ...] = ()


class Texts:
    """Makes prompts and documents with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def edit(self) -> Load:
        """A function to be written again with its name changed. The corpus is the modules that the functions are of."""
        prompts = []
        for name, code in itertools.islice(functions(), PROMPTS):
            # No line break behind it: the tokenizer joins it to the indentation that follows.
            begun = "\n".join(re.sub(rf"\b{name}\b", f"new_{name}", code).splitlines()[:BEGUN_LINES])
            ask = f"original.py:\n\n```python\n{code}```\n\nedited.py, the same with `{name}` renamed to `new_{name}`:"
            prompts.append(self._tokenizer.encode(f"{ask}\n\n```python\n{begun}"))
        documents = [self._document(module_text(name)) for name in MODULES]
        return Load(prompts, documents, f"no chat; the first {BEGUN_LINES} lines of the edited function", (b"```",))

    def documents(self) -> Load:
        """A question that a passage answers. The corpus is the reference that the passages are of."""
        prompts = []
        for name, passage in itertools.islice(passages(), PROMPTS):
            ask = f"Document:\n{passage}\n\nWhat does the document say about {name}? Quote it."
            begun = " ".join(passage.split(" ")[:BEGUN_WORDS])
            prompts.append(self._prompt(ask, f'The document says: "{begun}'))
        return Load(prompts, self.reference(), f'"The document says:" and the first {BEGUN_WORDS} words of the passage')

    def json(self) -> Load:
        """Lines of orders to be written as JSON, by example. The corpus is orders that were written before."""
        orders = Orders()
        prompts = []
        for _ in range(PROMPTS):
            shown = [orders.draw() for _ in range(RECORDS_SHOWN)]
            asked = [orders.draw() for _ in range(RECORDS_ASKED)]
            lines = "\n".join(order.line for order in shown + asked)
            known = "".join(f"{order.json},\n" for order in shown)
            prompts.append(self._tokenizer.encode(f"Orders:\n\n{lines}\n\nThe same orders as JSON:\n\n[\n{known}"))
        documents = [self._document(orders.draw().json) for _ in range(RECORDS_EARLIER)]
        return Load(prompts, documents, f"no chat; the first {RECORDS_SHOWN} orders", (b"\n]",))

    def chat(self) -> Load:
        """Questions about anything. The corpus is the reference, which has nothing to do with them."""
        return Load([self._prompt(question) for question in QUESTIONS], self.reference())

    def reference(self) -> list[Ints]:
        """The language reference, a document a topic."""
        return [self._document(topics[name]) for name in sorted(topics)]

    def distractors(self) -> list[list[Ints]]:
        """DISTRACTORS corpora of prose and code, about equally long."""
        documents = self.reference() + [self._document(module_text(name)) for name in MODULES]
        flat = np.concatenate(documents)
        return [[np.ascontiguousarray(piece)] for piece in np.array_split(flat, DISTRACTORS)]

    def _prompt(self, ask: str, begun: str = "") -> list[int]:
        """Token ids of a question and of how its answer begins."""
        if self._tokenizer.template is None:
            return self._tokenizer.encode(f"Question: {ask}\n\nAnswer: {begun}")
        message: Message = {"role": "user", "content": ask}
        return self._tokenizer.encode(self._tokenizer.render_chat([message]) + begun, add_special_tokens=False)

    def _document(self, text: str) -> Ints:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False), np.int32)


LOADS: dict[str, Callable[[Texts], Load]] = {
    "edit": Texts.edit, "documents": Texts.documents, "json": Texts.json, "chat": Texts.chat,
}  # fmt: skip
"""By name, those whose corpora do not depend on what the model says."""


def module_text(name: str) -> str:
    """The source of a module of the standard library."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, f"this Python has no source of {name}"
    return Path(spec.origin).read_text()


def functions() -> Iterator[tuple[str, str]]:
    """(name, code) of functions of MODULES, one of each in turn."""
    of_modules = [list(_functions_of(module_text(name))) for name in MODULES]
    for in_turn in itertools.zip_longest(*of_modules):
        yield from (function for function in in_turn if function is not None)


def _functions_of(source: str) -> Iterator[tuple[str, str]]:
    """Those of a length that suits a prompt.

    Without the string at the top, which the model would rather go on with than write again, and without comments.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("__"):
            if ast.get_docstring(node) is not None and len(node.body) > 1:
                del node.body[0]
            code = ast.unparse(node) + "\n"
            if CODE_LETTERS_MIN <= len(code) <= CODE_LETTERS_MAX:
                yield node.name, code


def passages() -> Iterator[tuple[str, str]]:
    """(topic, a paragraph or several in a row of plain prose in it) of the reference."""
    for name in sorted(topics):
        paragraphs = [" ".join(each.split()) for each in topics[name].split("\n\n")[1:] if not each.startswith(" ")]
        prose = [each for each in paragraphs if "::=" not in each and len(each) > BEGUN_WORDS * 10]
        passage = ""
        for paragraph in prose:
            if len(passage) + len(paragraph) <= PASSAGE_LETTERS_MAX:
                passage = f"{passage} {paragraph}".strip()
        if len(passage) >= PASSAGE_LETTERS_MIN:
            yield name, passage


@dataclass(frozen=True)
class Order:
    """An order as a line of words, and as JSON."""

    line: str
    json: str


class Orders:
    """Draws orders, the same ones every time."""

    def __init__(self) -> None:
        self._dice = np.random.default_rng(4)

    def draw(self) -> Order:
        """The next one."""
        number, count, price = (int(self._dice.integers(low, high)) for low, high in ((1000, 9999), (1, 9), (5, 99)))
        first, last, city, good = (self._pick(words) for words in (FIRST_NAMES, LAST_NAMES, CITIES, GOODS))
        record = {
            "order_number": number,
            "customer": {"first_name": first, "last_name": last, "city": city},
            "item": {"description": good, "quantity": count, "price_in_euros": price},
            "status": "accepted",
        }
        line = f"{number}: {first} {last} from {city} buys {count} {good}, {price} euros each"
        return Order(line, json.dumps(record, indent=2))

    def _pick(self, words: Sequence[str]) -> str:
        return words[int(self._dice.integers(len(words)))]

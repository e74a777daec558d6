"""Languages that clients write, and the one that models do: grammars, patterns, answers with calls in them."""

import json
from pathlib import Path
from random import Random

import orjson

from scripts.fuzzing.mutations import behind, mutated_bytes, mutated_json
from scripts.fuzzing.target import Target, refusing
from sessile.bench.grammar_schemas import SCHEMAS
from sessile.contract.messages import Grammar
from sessile.contract.model import ModelFacts
from sessile.core.stop import PatternMatcher
from sessile.errors import InvalidRequest
from sessile.grammar.compiler import GrammarCompiler
from sessile.grammar.following import CompiledGrammars
from sessile.server.tools import parsed_arguments
from sessile.text.answer.events import Answer
from sessile.text.answer.formats import AnswerFormat
from sessile.text.patterns import compile_pattern

EOS = 256
FACTS = ModelFacts(
    vocab_size=257, context_tokens=100, eos_ids=(EOS,),
    token_bytes=(*(bytes([byte]) for byte in range(256)), b"</s>"), special_ids=frozenset({EOS}),
)  # fmt: skip
FOLLOWED_TOKENS = 20
MATCHED = bytes(range(256)) + "abcABC é ab\n12. the END".encode()


class Grammars(Target):
    """A grammar of each kind, by the first byte: compiled, then followed for some tokens."""

    name = "grammar"
    kinds = ("json_schema", "regex", "ebnf")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._compiler = GrammarCompiler(FACTS)

    def seeds(self) -> list[bytes]:
        """Schemas of real tools, patterns, and rules of both notations."""
        schemas = [b"\x00" + json.dumps(schema).encode() for schema in SCHEMAS.values()]
        patterns = [r"(yes|no)!", r"\d{4}-\d{2}-\d{2}", r"[a-zé-]+@[a-z]{2,9}\.(com|org)", r"(?i:a)\p{L}*", r"(a|b)*c"]
        rules = ['root ::= item+\nitem ::= [a-z]+ " " ("x" | "y")? \n', 'root ::= "a" root | "b"{2,3}\n']
        rules += ['start: item+\nitem: /[a-z]+/ " " ("x" | "y")?\n', "start: WORD\nWORD: /a/ | /b/\n%ignore / /\n"]
        texts = ((1, patterns), (2, rules))
        return schemas + [bytes([number]) + text.encode() for number, some in texts for text in some]

    def run(self, raw: bytes) -> None:
        """Compile it, and draw an output from what it allows."""
        kind = self.kinds[raw[0] % len(self.kinds)] if raw else self.kinds[0]
        grammar = Grammar(kind, raw[1:].decode("utf-8", "replace"), "field")
        with refusing(InvalidRequest):
            store = CompiledGrammars(FACTS.vocab_size, threads=1)
            store.put(grammar, self._compiler.compile(grammar))
            line, dice = store.start(grammar), Random(0)
            for _ in range(FOLLOWED_TOKENS):
                _, words = store.masks([line], [[]])
                if line.failure:
                    break
                allowed = [token for token in range(FACTS.vocab_size) if int(words[0][token // 32]) >> token % 32 & 1]
                assert allowed, "a mask that allows nothing"
                token = dice.choice(allowed)
                if token == EOS:
                    break
                line.extend([token])
            line.failure.encode()

    def mutated(self, raw: bytes, rng: Random) -> bytes:
        """Schemas as JSON."""
        is_schema = bool(raw) and raw[0] % len(self.kinds) == 0
        return behind(1, mutated_json if is_schema and rng.random() < 0.8 else mutated_bytes)(raw, rng)


class Patterns(Target):
    """`stop_regex`: compiled here, matched in the core."""

    name = "pattern"

    def seeds(self) -> list[bytes]:
        """All that is supported."""
        texts = (r"\n\d+\.", r"(?:ab|c)+?d{2,3}", r"[^\n]*END", r"[a-zé-]\x41\u00e9", r"[]\-]\W", ".{0,99}!", "(a|b)*c")
        return [text.encode() for text in texts]

    def run(self, raw: bytes) -> None:
        """Compile it, and match a text."""
        with refusing(InvalidRequest):
            matcher = PatternMatcher([compile_pattern(raw.decode("utf-8", "replace"), param="stop_regex")])
            for start in range(0, len(MATCHED), 3):
                matcher.feed(MATCHED[start : start + 3])


class Answers(Target):
    """What a model says, in pieces, read for reasoning and calls; the first byte says in which format."""

    name = "answer"
    formats = tuple(
        AnswerFormat(tools, thought) for tools in ("hermes", "llama3", "pythonic") for thought in ("none", "think")
    )

    def seeds(self) -> list[bytes]:
        """A call in each format, with and without thought."""
        call = '<tool_call>\n{"name": "f", "arguments": {"a": [1, "x", null]}}\n</tool_call>'
        bare = '{"name": "g", "parameters": {"a": {"b": "\\u00e9"}}}; {"name": "f", "parameters": {}}'
        python = "[f(a=1, b='x', c=[True, None], d={'k': -2.5e3}), g()]"
        return [
            bytes([2 * number + thought]) + (("<think>so</think>\n" if thought else "well ") + text).encode()
            for number, text in enumerate((call, bare, python)) for thought in (0, 1)
        ]  # fmt: skip

    def run(self, raw: bytes) -> None:
        """The same answer however it is cut; its text can be sent."""
        form = self.formats[raw[0] % len(self.formats)] if raw else self.formats[0]
        text = raw[1:].decode("utf-8", "replace")
        told = []
        for size in (1, 5, len(text) + 1):
            reader, answer = form.reader("", tool_names=("f", "g")), Answer()
            for start in range(0, len(text), size):
                for event in reader.push(text[start : start + size]):
                    answer.add(event)
            for event in reader.finish():
                answer.add(event)
            told.append(answer)
        assert told[0] == told[1] == told[2], "the answer depends on how it was cut"
        for call in told[0].calls:
            assert parsed_arguments(call.arguments) == json.loads(orjson.dumps(orjson.Fragment(call.arguments)))
        orjson.dumps([told[0].content, told[0].reasoning, *(call.arguments for call in told[0].calls)])

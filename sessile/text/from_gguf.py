"""Build a tokenizer from the metadata of a GGUF file, which has a vocabulary and merges but no tokenizer.json.

How the text is split before the merges is only named there (`tokenizer.ggml.pre`); the rules behind the names are
those of the tokenizer.json files that the models were published with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from sessile.errors import StartupError
from sessile.gguf import GgufFile
from sessile.modelfile import shown
from sessile.text.template import ChatTemplate
from sessile.text.tokenizer import Tokenizer
from sessile.text.vocabulary import Vocabulary, byte_fallback_bytes, byte_level_bytes

# Values of tokenizer.ggml.token_type.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6

_MERGED_CHARS_MAX = 1024
"""Longest token that merges may build: looking for the merges of a token takes the square of its length."""

_TURN_ENDS = frozenset({"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>"})
"""Control tokens that end an answer even where older conversions name only the end of text as EOS."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Split:
    """How a byte-level vocabulary cuts text before its merges.

    pattern: None is GPT-2's. digits: each digit by itself, before all else. whole_words: a piece that is a token is
    not taken apart. add_bos: what holds where the file does not say. nfc: normalise first.
    """

    pattern: str | None = None
    digits: bool = False
    whole_words: bool = False
    add_bos: bool = False
    nfc: bool = False


_GPT2 = _Split()
_DIGITS = _Split(digits=True)
_SPLITS: Mapping[str, _Split] = {
    "gpt-2": _GPT2,
    "mpt": _GPT2,
    "olmo": _GPT2,
    "phi-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "codeshell": _DIGITS,
    "exaone": _DIGITS,
    "llama-bpe": _Split(_LLAMA3, whole_words=True, add_bos=True),
    "llama-v3": _Split(_LLAMA3, whole_words=True, add_bos=True),
    "llama3": _Split(_LLAMA3, whole_words=True, add_bos=True),
    "smaug-bpe": _Split(_LLAMA3, whole_words=True),
    "qwen2": _Split(_QWEN2, nfc=True),
    "deepseek-r1-qwen": _Split(_QWEN2),
    "stablelm2": _Split(_QWEN2),
    "tekken": _Split(_TEKKEN, whole_words=True, add_bos=True),
}


def tokenizer_from_gguf(file: GgufFile) -> Tokenizer:
    """The tokenizer that a GGUF file describes: byte-level BPE ("gpt2") or SentencePiece ("llama").

    Raises StartupError if the file has none, an unsupported one, or an inconsistent one.
    """
    return _Builder(file).build()


class _Builder:
    """The steps of building, around the checked vocabulary of one file."""

    def __init__(self, file: GgufFile) -> None:
        self._path = file.path
        self._metadata = file.metadata
        self._tokens: list[str] = self._array("tokens", str)
        self._types: list[int] = self._array("token_type", int)
        if len(self._types) != len(self._tokens):
            self._fail(f"{len(self._types)} token types for {len(self._tokens)} tokens", "Download it again.")

    def build(self) -> Tokenizer:
        kind = self._word("model")
        if kind == "gpt2":
            backend, add_bos, bytes_of = *self._byte_level(), byte_level_bytes
        elif kind == "llama":
            backend, add_bos, bytes_of = *self._sentencepiece(), byte_fallback_bytes
        else:
            self._fail(f"its tokenizer is {shown(kind)}; only 'gpt2' and 'llama' are supported", "Use another model.")
        added = self._add_tokens(backend)
        bos, eos = self._special("bos"), self._special("eos")
        front = [bos] if bos is not None and self._flag("add_bos_token", add_bos) else []
        back = [eos] if eos is not None and self._flag("add_eos_token", False) else []
        if front or back:
            backend.post_processor = self._post_processor(front, back)
        pieces = {id: token.encode() if id in added else bytes_of(token) for id, token in enumerate(self._tokens)}
        return Tokenizer(
            backend=backend,
            vocabulary=Vocabulary.build(pieces, (id for id, kind in enumerate(self._types) if kind == _CONTROL)),
            eos_ids=self._eos_ids(),
            bos_id=front[0] if front else None,
            template=self._template("tokenizer.chat_template"),
            tool_template=self._template("tokenizer.chat_template.tool_use"),
            strips_space=kind == "llama" and self._flag("add_space_prefix", True),
        )

    def _byte_level(self) -> tuple[tokenizers.Tokenizer, bool]:
        """Byte-level BPE as GPT-2 has it; and whether BOS is added by default."""
        name = self._word("pre")
        split = _SPLITS.get(name or "")
        if split is None:
            self._fail(
                f"its pre-tokenizer is {shown(name)}; supported are {', '.join(sorted(_SPLITS))}",
                "Use the model's hub folder (with tokenizer.json) instead.",
            )
        backend = tokenizers.Tokenizer(self._bpe(self._merges(), ignore_merges=split.whole_words))
        if split.nfc:
            backend.normalizer = normalizers.NFC()
        steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
        if split.pattern:
            steps.append(pre_tokenizers.Split(Regex(split.pattern), behavior="isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.pattern is None))
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
        backend.decoder = decoders.ByteLevel()
        return backend, split.add_bos

    def _sentencepiece(self) -> tuple[tokenizers.Tokenizer, bool]:
        """SentencePiece BPE with byte fallback, as Llama 2 and the first Mistral have it; BOS by default."""
        scores = self._array("scores", float)
        if len(scores) != len(self._tokens):
            self._fail(f"{len(scores)} scores for {len(self._tokens)} tokens", "Download it again.")
        if max(map(len, self._tokens)) > _MERGED_CHARS_MAX:
            self._fail(f"a token has more than {_MERGED_CHARS_MAX} characters", "Use another model.")
        merges = _merges_by_score(self._tokens, self._types, scores)
        unknown = next((self._tokens[id] for id, kind in enumerate(self._types) if kind == _UNKNOWN), None)
        backend = tokenizers.Tokenizer(self._bpe(merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
        prefix = [normalizers.Prepend("▁")] if self._flag("add_space_prefix", True) else []
        backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            + ([decoders.Strip(" ", 1, 0)] if prefix else [])
        )
        return backend, True

    def _add_tokens(self, backend: tokenizers.Tokenizer) -> frozenset[int]:
        """Have control and user-defined tokens matched whole in the text; return their ids."""
        byte_level = self._word("model") == "gpt2"
        added = {}
        for id, (token, kind) in enumerate(zip(self._tokens, self._types, strict=True)):
            if kind in (_CONTROL, _USER_DEFINED):
                added[id] = AddedToken(token, special=kind == _CONTROL, normalized=False)
            elif kind == _UNKNOWN and not byte_level:
                added[id] = AddedToken(token, special=True, normalized=False)
        backend.add_tokens(list(added.values()))
        return frozenset(added)

    def _post_processor(self, front: Sequence[int], back: Sequence[int]) -> processors.TemplateProcessing:
        names = [self._tokens[id] for id in front], [self._tokens[id] for id in back]
        try:
            return processors.TemplateProcessing(
                single=[*names[0], "$A", *names[1]],
                special_tokens=[(self._tokens[id], id) for id in dict.fromkeys([*front, *back])],
            )
        except ValueError as error:  # a name such as "$A" or "x:1", which means something else there
            self._fail(f"its BOS or EOS cannot be added ({shown(str(error))})", "Use the model's hub folder.")

    def _eos_ids(self) -> tuple[int, ...]:
        ends = {id for key in ("eos", "eot", "eom") if (id := self._special(key)) is not None}
        ends |= {
            id for id, (token, kind) in enumerate(zip(self._tokens, self._types, strict=True))
            if kind == _CONTROL and token in _TURN_ENDS
        }  # fmt: skip
        return tuple(sorted(ends))

    def _template(self, key: str) -> ChatTemplate | None:
        source = self._metadata.get(key)
        if source is None:
            return None
        if not isinstance(source, str):
            self._fail("its chat template is not text", "Download it again.")
        roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        ids = {name: self._special(key) for name, key in roles.items()}
        return ChatTemplate(source, {name: self._tokens[id] for name, id in ids.items() if id is not None})

    def _bpe(self, merges: list[tuple[str, str]], **settings: Any) -> models.BPE:
        ids = {token: id for id, token in enumerate(self._tokens)}
        if len(ids) != len(self._tokens):
            self._fail(f"{len(self._tokens) - len(ids)} tokens occur twice", "Download it again.")
        try:
            return models.BPE(vocab=ids, merges=merges, **settings)
        except Exception as error:  # the library raises bare Exception, for a merge of unknown tokens
            self._fail(f"its merges do not fit its tokens ({shown(str(error))})", "Download it again.")

    def _merges(self) -> list[tuple[str, str]]:
        pairs = []
        for merge in self._array("merges", str):
            left, _, right = merge.partition(" ")
            if not left or not right or " " in right:
                self._fail(f"the merge {shown(merge)} is not a pair of tokens", "Download it again.")
            pairs.append((left, right))
        return pairs

    def _special(self, key: str) -> int | None:
        """The id of a special token that the metadata names, checked; None if it names none."""
        id = self._get(f"{key}_token_id")
        if id is None:
            return None
        if not isinstance(id, int) or not 0 <= id < len(self._tokens):
            self._fail(f"the {key} token is {shown(id)} of {len(self._tokens)}", "Download it again.")
        return id

    def _flag(self, key: str, default: bool) -> bool:
        flag = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(flag, int):
            self._fail(f"tokenizer.ggml.{key} is {shown(flag)}, not true or false", "Download it again.")
        return bool(flag)

    def _word(self, key: str) -> str | None:
        word = self._get(key)
        if word is not None and not isinstance(word, str):
            self._fail(f"tokenizer.ggml.{key} is {shown(word)}, not text", "Download it again.")
        return word

    def _get(self, key: str) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}")

    def _array(self, key: str, element: type) -> list[Any]:
        values = self._get(key)
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, list) or not values or not isinstance(values[0], element):
            self._fail(f"it has no usable tokenizer.ggml.{key}", "Use a file that carries its tokenizer.")
        return values

    def _fail(self, problem: str, remedy: str) -> NoReturn:
        raise StartupError(f"cannot use the tokenizer of {self._path}: {problem}. {remedy}")


def _merges_by_score(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges that a SentencePiece vocabulary implies: every way to put a token together, best score first.

    SentencePiece merges the pair whose result scores best; ranking each pair by its result's score is the same.
    """
    known = {token for token, kind in zip(tokens, types, strict=True) if kind not in (_CONTROL, _UNKNOWN, _BYTE)}
    ranked = []
    for id, (token, score) in enumerate(zip(tokens, scores, strict=True)):
        if token not in known:
            continue
        for cut in range(1, len(token)):
            if token[:cut] in known and token[cut:] in known:
                ranked.append((-score, id, token[:cut], token[cut:]))
    ranked.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in ranked]

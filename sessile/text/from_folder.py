"""Build a tokenizer from a hub folder: tokenizer.json, with tokenizer_config.json and generation_config.json beside."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import tokenizers

from sessile.errors import StartupError
from sessile.modelfile import read_json, read_text, shown
from sessile.text.template import ChatTemplate
from sessile.text.tokenizer import Tokenizer
from sessile.text.vocabulary import Vocabulary, byte_fallback_bytes, byte_level_bytes

_TOKEN_ID_MAX = (1 << 22) - 1
"""The table of a vocabulary has a place for every id up to the highest, so that one huge id would fill the memory."""
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def tokenizer_from_folder(folder: Path) -> Tokenizer:
    """The tokenizer that a hub folder describes.

    Raises StartupError if it has none, a broken one, or one whose tokens do not stand for bytes.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        _fail(folder, "there is no tokenizer.json", "Save the model with a fast tokenizer, or use a GGUF file.")
    source = _read(path)
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise StartupError(f"cannot use {path}: {shown(str(error))}. Download it again.") from error
    backend.no_truncation()
    backend.no_padding()
    config = _read(folder / "tokenizer_config.json")
    specials = {name: token for name in _SPECIAL_NAMES if (token := _literal(config.get(name), folder)) is not None}
    front = backend.encode("", add_special_tokens=True).ids
    bos = backend.token_to_id(specials["bos_token"]) if "bos_token" in specials else None
    return Tokenizer(
        backend=backend,
        vocabulary=_vocabulary(backend, source, path),
        eos_ids=_eos_ids(folder, backend, specials.get("eos_token")),
        bos_id=bos if bos is not None and front[:1] == [bos] else None,
        template=_template(folder, config, specials),
        tool_template=_tool_template(folder, config, specials),
        strips_space=any(_strips_space(step) for step in _steps(source.get("decoder"))),
    )


def _vocabulary(backend: tokenizers.Tokenizer, source: Mapping[str, Any], path: Path) -> Vocabulary:
    kinds = {str(step.get("type")) for step in _steps(source.get("decoder"))}
    if "ByteLevel" in kinds:
        bytes_of = byte_level_bytes
    elif kinds & {"ByteFallback", "Metaspace"}:
        bytes_of = byte_fallback_bytes
    else:
        _fail(path, "it is neither byte-level nor byte-fallback BPE", "Use another model.")
    added = backend.get_added_tokens_decoder()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if (highest := max(vocabulary.values(), default=0)) > _TOKEN_ID_MAX:
        _fail(path, f"it has a token with the id {highest}; the highest we serve is {_TOKEN_ID_MAX}", "Repair it.")
    pieces = {id: bytes_of(token) for token, id in vocabulary.items()}
    pieces.update({id: token.content.encode() for id, token in added.items()})
    return Vocabulary.build(pieces, (id for id, token in added.items() if token.special))


def _steps(decoder: object) -> Iterator[Mapping[str, Any]]:
    """A decoder's steps, flattened. (The library has read it before and is lenient: what is no step is none.)"""
    if not isinstance(decoder, dict):
        return
    steps = decoder.get("decoders")
    if decoder.get("type") == "Sequence" and isinstance(steps, list):
        for step in steps:
            yield from _steps(step)
    else:
        yield decoder


def _strips_space(step: Mapping[str, Any]) -> bool:
    """Whether a decoder's step takes away the space that the encoder put before the text."""
    if step.get("type") == "Metaspace":
        return bool(step.get("prepend_scheme") != "never")
    return bool(step.get("type") == "Strip" and step.get("content") == " " and step.get("start") == 1)


def _eos_ids(folder: Path, backend: tokenizers.Tokenizer, eos_token: str | None) -> tuple[int, ...]:
    """What generation_config.json (else config.json) says ends an output, and the tokenizer's own EOS."""
    for name in ("generation_config.json", "config.json"):
        declared = _read(folder / name).get("eos_token_id")
        if declared is not None:
            break
    else:
        declared = []
    ids = declared if isinstance(declared, list) else [declared]
    if not all(type(id) is int and 0 <= id <= _TOKEN_ID_MAX for id in ids):
        _fail(folder / name, f"eos_token_id is {shown(declared)}", "Give a token id or a list of them.")
    own = backend.token_to_id(eos_token) if eos_token is not None else None
    return tuple(sorted({*ids, *([] if own is None else [own])}))


def _template(folder: Path, config: Mapping[str, Any], specials: Mapping[str, str]) -> ChatTemplate | None:
    """The chat template: a file of its own, or in tokenizer_config.json, alone or as the one named "default"."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return ChatTemplate(read_text(path), specials)
    return _named_template(folder, config.get("chat_template"), "default", specials)


def _tool_template(folder: Path, config: Mapping[str, Any], specials: Mapping[str, str]) -> ChatTemplate | None:
    """The chat template for prompts with tools, where it is not the one for all: by the name "tool_use"."""
    path = folder / "additional_chat_templates" / "tool_use.jinja"
    if path.is_file():
        return ChatTemplate(read_text(path), specials)
    source = config.get("chat_template")
    return _named_template(folder, source, "tool_use", specials) if isinstance(source, list) else None


def _named_template(folder: Path, source: object, name: str, specials: Mapping[str, str]) -> ChatTemplate | None:
    if isinstance(source, list):
        entries = [entry for entry in source if isinstance(entry, dict) and entry.get("name") == name]
        source = entries[-1].get("template") if entries else None
    if source is None:
        return None
    if not isinstance(source, str):
        _fail(folder / "tokenizer_config.json", "chat_template is not text", "Repair it.")
    return ChatTemplate(source, specials)


def _literal(token: Any, folder: Path) -> str | None:
    """The text of a special token, which is written as a string or as an object with content."""
    if isinstance(token, dict):
        token = token.get("content")
    if not isinstance(token, str):
        return None
    if any("\ud800" <= character <= "\udfff" for character in token):  # JSON can write them, no encoding has them
        _fail(folder / "tokenizer_config.json", f"the token {shown(token)} has half a surrogate pair", "Repair it.")
    return token


def _read(path: Path) -> Mapping[str, Any]:
    """A JSON object from a file; empty if there is no such file."""
    return read_json(path) if path.exists() else {}


def _fail(path: Path, problem: str, remedy: str) -> NoReturn:
    raise StartupError(f"cannot use {path}: {problem}. {remedy}")

"""Files that are read at the start or handed in: models, corpora, keys, settings, logs."""

import struct
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import torch

from scripts.fuzzing.mutations import behind, mutated_bytes, mutated_json
from scripts.fuzzing.target import Target, place_file, refusing
from sessile.config import Config, compose
from sessile.contract.corpora import Source
from sessile.contract.drafting import DraftWish
from sessile.contract.messages import pack_tokens
from sessile.corpora.build import copy_index, gather, open_index
from sessile.draft.corpus_file import CHECKSUM_BYTES, HEADER, HEADER_BYTES, checksum
from sessile.draft.corpus_index import CorpusIndex
from sessile.draft.drafter import LookupDrafter
from sessile.draft.pace import StepTimes
from sessile.draft.shelf import OPERATOR, Shelf
from sessile.errors import InvalidRequest, StartupError
from sessile.gguf import GgufFile
from sessile.keyfile import draw_key, read_keys
from sessile.model.layers import WeightFormat
from sessile.model.options import ModelOptions
from sessile.model.weights import load_model
from sessile.server.corpora.folder import Catalogue, Entry, StateFolder
from sessile.server.corpora.sources import LineCheck
from sessile.server.request_log import RequestLog
from sessile.sim.log_lines import EngineLine, read_log
from sessile.sim.replay import script_of, world_of
from sessile.text.load import load_tokenizer
from sessile.text.template import check_messages
from tests.unit.tiny_files import gguf_metadata, write_tiny_folder, write_tiny_gguf

FORM = WeightFormat(torch.float32, torch.device("cpu"))
VOCAB_SIZE = 260
FREE_DRAFTS = StepTimes((1, 64), (1_000_000, 1_000_001))


def read_model(path: Path) -> None:
    """Tokenizer, template and weights of a model, each read or refused."""
    with refusing(StartupError, InvalidRequest):
        tokenizer = load_tokenizer(path)
        tokenizer.facts(vocab_size=VOCAB_SIZE, context_tokens=64)
        tokenizer.decode(tokenizer.encode("abcd ef\n"))
        tokenizer.encode_chat(check_messages([{"role": "user", "content": "ab"}]))
    with refusing(StartupError):
        decoder = load_model(ModelOptions(str(path)), FORM, lambda stage, done: None).decoder
        assert decoder.embedding.shape == (decoder.config.vocab_size, decoder.config.hidden_size)


class Gguf(Target):
    """A GGUF file: its table, all metadata, and the model in it."""

    name = "gguf"

    def seeds(self) -> list[bytes]:
        """A model of each kind of tokenizer."""
        paths = (write_tiny_gguf(self.folder / "seed", gguf_metadata(kind)) for kind in ("gpt2", "llama"))
        written = [path.read_bytes() for path in paths]
        return [*written, written[0][:1500]]

    def run(self, raw: bytes) -> None:
        """Read all of it."""
        path = place_file(self.folder / "model.gguf", raw)
        with refusing(StartupError):
            file = GgufFile(path)
            for key in file.metadata:
                assert file.metadata[key] is not None
            for tensor in file.tensors.values():
                assert int(tensor.raw[-1]) >= 0
        read_model(path)


class Folder(Target):
    """A hub folder in which one file is another: the first byte says which."""

    name = "folder"
    files = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
             "model.safetensors.index.json", "model.safetensors")  # fmt: skip

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        write_tiny_folder(folder)
        self._whole = {name: (folder / name).read_bytes() for name in self.files}

    def seeds(self) -> list[bytes]:
        """Each file as it is."""
        return [bytes([number]) + self._whole[name] for number, name in enumerate(self.files)]

    def run(self, raw: bytes) -> None:
        """Read the folder with the one file in place, then put the old one back."""
        name = self.files[raw[0] % len(self.files)] if raw else self.files[0]
        place_file(self.folder / name, raw[1:])
        try:
            read_model(self.folder)
        finally:
            place_file(self.folder / name, self._whole[name])

    def mutated(self, raw: bytes, rng: Random) -> bytes:
        """JSON as JSON, the header of safetensors too, and its length as it then is."""
        number = raw[0] % len(self.files) if raw else 0
        if self.files[number] != "model.safetensors" or rng.random() < 0.3:
            return behind(1, mutated_json)(raw, rng)
        (length,) = struct.unpack_from("<Q", raw.ljust(9, b"\0"), 1)
        header = mutated_json(raw[9 : 9 + length], rng)
        return raw[:1] + struct.pack("<Q", len(header)) + header + raw[9 + length :]


class Index(Target):
    """An index file whose checksum is right: whoever writes one can reckon it. What was taken is searched."""

    name = "index"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._shelf = Shelf()
        self._drafter = LookupDrafter(self._shelf, FREE_DRAFTS)
        self._context = [1, 2, 3, 4, 1, 2, 3]

    def seeds(self) -> list[bytes]:
        """Indexes of some, of one and of no document."""
        numbers = np.random.default_rng(0)
        texts = [[1, 2, 3, 4, 5, 1, 2, 3, 9], numbers.integers(0, 20, 100), []]
        written = []
        for documents in (texts, texts[:1], []):
            CorpusIndex.build([np.array(each, np.int32) for each in documents]).save(self.folder / "seed")
            written.append((self.folder / "seed").read_bytes())
        return written

    def run(self, raw: bytes) -> None:
        """Open it as the builder and the engine do, then draft from it."""
        path = place_file(self.folder / "docs.corpus", signed(raw))
        with refusing(InvalidRequest):
            index = open_index(Source(str(path), "index"), raw[HEADER.size - 24 : HEADER.size])
            copy_index(Source(str(path), "index"), self.folder / "copy.corpus")
            self._shelf.put(OPERATOR, "docs", index)
            sequence = self._drafter.new_index()
            sequence.extend(pack_tokens(self._context))
            line = self._drafter.start(sequence, DraftWish("", None, 8))
            self._drafter.limits([line], [8], 1)
            (drafts,) = self._drafter.draft([line], [8])
            assert all(0 <= draft for draft in drafts)
            self._shelf.remove(OPERATOR, "docs")

    def close(self) -> None:
        """End the drafter's threads."""
        self._drafter.close()


def signed(raw: bytes) -> bytes:
    """The file with the checksum of what it has, where there is one to be had."""
    if len(raw) < HEADER_BYTES:
        return raw
    head, body = raw[: HEADER.size], raw[HEADER_BYTES:]
    tokens, positions = HEADER.unpack(head)[4:6]
    second = -(-4 * tokens // 64) * 64
    if len(body) < second + 4 * positions:
        return raw
    sections = np.frombuffer(body, np.int32, tokens), np.frombuffer(body, np.int32, positions, second)
    return head + checksum(head, *sections) + raw[HEADER.size + CHECKSUM_BYTES : HEADER_BYTES] + body


class Upload(Target):
    """Lines of documents as they come in, cut anywhere, then as a file that the builder reads; and plain text."""

    name = "upload"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (folder / "model").mkdir()
        self._tokenizer = load_tokenizer(write_tiny_folder(folder / "model"))

    def seeds(self) -> list[bytes]:
        """A string, objects, blank lines, letters beyond ASCII."""
        return [b'"one"\n{"text": "two", "n": 1}\n\n"three"', '{"text": "é\\u00e9 😀"}\n'.encode(), b"plain\ntext\n"]

    def run(self, raw: bytes) -> None:
        """Both ways take the same lines."""
        check, taken = LineCheck(), False
        with refusing(InvalidRequest):
            for start in range(0, len(raw), 7):
                check.feed(raw[start : start + 7])
            check.end()
            taken = True
        path = place_file(self.folder / "docs.jsonl", raw)
        for kind in ("jsonl", "text"):
            source = Source(str(path), kind)
            with refusing(InvalidRequest):
                gathered = gather(
                    self._tokenizer, [source], tokens_max=1 << 20, is_cancelled=bool, report=lambda stage, share: None
                )
                assert kind == "text" or taken, "a file is read that the upload refused"
                CorpusIndex.build(gathered.take())


class Log(Target):
    """A request log, from its lines to the messages that are replayed."""

    name = "log"

    def seeds(self) -> list[bytes]:
        """A log of every kind of line."""
        from scripts.fuzzing.wire import conversation  # it needs none of what this module imports

        log = RequestLog(self.folder / "seed")
        for note, message in conversation():
            getattr(log, note)(message)
        log.close()
        return [(self.folder / "seed").read_bytes()]

    def run(self, raw: bytes) -> None:
        """All but the run of the simulator."""
        path = place_file(self.folder / "log", raw)
        with refusing(StartupError):
            lines = read_log(path)
            world_of(next(line for line in lines if isinstance(line, EngineLine)), [])
            assert script_of(lines) is not None

    def mutated(self, raw: bytes, rng: Random) -> bytes:
        """One line or two of it, as JSON or as bytes."""
        lines = raw.split(b"\n")
        for _ in range(rng.choice([1, 1, 2])):
            at = rng.randrange(len(lines))
            lines[at] = (mutated_json if rng.random() < 0.8 else mutated_bytes)(lines[at], rng)
        return b"\n".join(lines)


class Keys(Target):
    """The keys file."""

    name = "keys"

    def seeds(self) -> list[bytes]:
        """All fields of a tenant, and a key of each role."""
        tenants = "tenants:\n  ops:\n  acme: {weight: 2, requests_max: 64, sessions-max: 1000, shares_prefixes: true}\n"
        limits = "  umbra:\n    corpora_tokens_max: 10\n    held_tokens_max: null\n    remembers: false\n"
        return [(tenants + limits + "keys:\n" + draw_key("ops", "admin")[1] + draw_key("acme", "user")[1]).encode()]

    def run(self, raw: bytes) -> None:
        """Read it."""
        with refusing(StartupError, is_sent=False):
            read_keys(place_file(self.folder / "keys.yaml", raw))


class Settings(Target):
    """The YAML file of settings, the environment, and what the server hands its engine, by the first byte."""

    name = "settings"

    def seeds(self) -> list[bytes]:
        """Some of each."""
        file = b"\x00rows-max: 4\nspeculate: on\nhost: 127.0.0.1\nkv-memory: 1G\nstall_timeout_s: 3\n"
        return [file, b"\x01SESSILE_ROWS_MAX=7\nSESSILE_MODEL=default\n", b"\x02" + Config().to_json().encode()]

    def run(self, raw: bytes) -> None:
        """Compose the configuration."""
        kind, rest = raw[:1], raw[1:]
        with refusing(StartupError, is_sent=False):
            if kind == b"\x00":
                compose(file=place_file(self.folder / "sessile.yaml", rest))
            elif kind == b"\x01":
                lines = [line.partition("=") for line in rest.decode("utf-8", "surrogateescape").splitlines()]
                compose(environment={name: value for name, _, value in lines})
            else:
                Config.from_json(rest.decode("utf-8", "replace"))

    def mutated(self, raw: bytes, rng: Random) -> bytes:
        """What is JSON, as JSON."""
        return behind(1, mutated_json if raw[:1] == b"\x02" else mutated_bytes)(raw, rng)


class Kept(Target):
    """The catalogue of corpora that outlives a server."""

    name = "catalogue"

    def seeds(self) -> list[bytes]:
        """One with two entries."""
        entry = Entry(
            id="docs", tenant="", file="0" * 24 + ".corpus", tokens=1, documents=1, bytes=8, tokenizer="t",
            checksum="c", created_s=1,
        )  # fmt: skip
        return [msgspec.json.encode(Catalogue(version=1, corpora=[entry, entry]))]

    def run(self, raw: bytes) -> None:
        """Open the folder that has it."""
        (self.folder / "state").mkdir(exist_ok=True)
        place_file(self.folder / "state" / "catalogue.json", raw)
        with refusing(StartupError):
            kept = StateFolder(self.folder / "state", is_kept=True)
            try:
                for entry in kept.entries:
                    assert kept.index(entry.file).parent == self.folder / "state" / "indexes"
            finally:
                kept.close()

    def mutated(self, raw: bytes, rng: Random) -> bytes:
        """As JSON."""
        return mutated_json(raw, rng)

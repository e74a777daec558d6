"""Messages between processes: what is no message is refused as such, what is one says the same when it is sent on."""

import contextlib
from io import BytesIO
from random import Random
from typing import Any

import msgspec
from msgspec import inspect

from scripts.fuzzing.mutations import behind, mutated_bytes, mutated_json
from scripts.fuzzing.target import Target
from sessile.contract.corpora import FRAME_HEAD, FromBuilder, ToBuilder, read_frame, write_frame
from sessile.contract.messages import (
    Batch,
    Branch,
    Cancel,
    CancelAll,
    CloseSession,
    CommittedTurn,
    Done,
    DropTurn,
    EngineReady,
    Flush,
    ForkSession,
    FromEngine,
    OpenSession,
    RestoreSession,
    RewindSession,
    Sampling,
    Submit,
    ToEngine,
    pack_tokens,
)

KINDS = (ToEngine, FromEngine, ToBuilder, FromBuilder)
READY = EngineReady(
    model_name="m", model_path="m", architecture="llama", dtype="float32", device="cpu", vocab_size=260,
    context_tokens=512, page_size=16, pages_total=64, rows_max=8, chunk_tokens=64, queue_max=100, kv_bytes=1,
    weight_bytes=1, start_s=0.0,
)  # fmt: skip


def conversation() -> list[tuple[str, Any]]:
    """Each kind of message that a request log takes down, with the method that does."""
    opened = OpenSession(op=1, session="s", tenant="acme")
    tree = OpenSession(op=2, session="b", tenant="acme", branching=True)
    sampling = Sampling(seed=1, max_new_tokens=9)
    prompt = pack_tokens(list(range(100)))
    turn = CommittedTurn(rid="root", tokens=pack_tokens([1, 2, 3]), input_end=2)
    sent = [
        opened, tree,
        Submit(key=1, tokens=prompt, sampling=sampling, tenant="acme", session="s", rid="r"),
        Submit(key=2, tokens=prompt, sampling=sampling, tenant="acme", session="b", rid="t", branch=Branch(parent="r")),
        Submit(key=3, tokens=prompt, sampling=sampling, group=7, priority=1),
        Cancel(3), CancelAll(3), Flush(4),
        RewindSession(op=5, session="s", tenant="acme", to_tokens=40),
        ForkSession(op=6, session="s", child="c", tenant="acme", at_turn=1),
        DropTurn(7, "b", "t", "acme"), CloseSession(8, "b", "acme"),
        RestoreSession(op=9, opening=opened, tokens=prompt, turn_ends=(44,), nodes=(turn,)),
    ]  # fmt: skip
    ended = Batch(step=1, done=[Done(key=1, reason="stop", completion_tokens=5), Done(key=2, reason="length")])
    ready = ("note_ready", READY)
    return [ready, *(("note_sent", each) for each in sent), ("note_batch", ended), ready]


class Wire(Target):
    """A message of each of the four unions, by the first byte; and the same bytes as a frame of a pipe."""

    name = "wire"

    def __init__(self, folder: Any) -> None:
        super().__init__(folder)
        self._decoders = [msgspec.msgpack.Decoder(kind) for kind in KINDS]
        self._encoder = msgspec.msgpack.Encoder()

    def seeds(self) -> list[bytes]:
        """Every message with no more in it than must be, and those of a conversation."""
        found = [bytes([0]) + self._encoder.encode(message) for _, message in conversation()[1:-2]]
        for number, kind in enumerate(KINDS):
            for member in inspect.type_info(kind).types:  # type: ignore[attr-defined]
                found.append(bytes([number]) + msgspec.msgpack.encode(least(member)))
        return found

    def run(self, raw: bytes) -> None:
        """Decode, encode, decode."""
        number = raw[0] % len(KINDS) if raw else 0
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            message = self._decoders[number].decode(raw[1:])
            again = self._decoders[number].decode(self._encoder.encode(message))
            assert repr(again) == repr(message), "what was sent on is another message"  # NaN is not itself
            pipe = BytesIO()
            write_frame(pipe, message)
            pipe.seek(0)
            assert repr(read_frame(pipe, KINDS[number])) == repr(message)
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            read_frame(BytesIO(FRAME_HEAD.pack(len(raw)) + raw), KINDS[number])

    def mutated(self, raw: bytes, rng: Random) -> bytes:
        """As values where they are some, else as bytes."""
        if rng.random() < 0.5:
            return behind(1, mutated_bytes)(raw, rng)
        try:
            values = msgspec.json.encode(msgspec.msgpack.decode(raw[1:]))
            return raw[:1] + msgspec.msgpack.encode(msgspec.json.decode(mutated_json(values, rng)))
        except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError):
            return behind(1, mutated_bytes)(raw, rng)


def least(kind: Any) -> Any:
    """A value of a type with no more in it than must be."""
    match kind:
        case inspect.StructType():
            fields = {each.encode_name: least(each.type) for each in kind.fields if each.required}
            return fields | ({kind.tag_field: kind.tag} if kind.tag_field else {})
        case inspect.UnionType():
            return least(kind.types[0])
        case inspect.IntType():
            return 1
        case inspect.FloatType():
            return 1.0
        case inspect.StrType():
            return "a"
        case inspect.BytesType():
            return b"abcd"
        case inspect.BoolType():
            return True
        case inspect.ListType() | inspect.VarTupleType():
            return [least(kind.item_type)]
        case inspect.TupleType():
            return [least(each) for each in kind.item_types]
        case inspect.DictType():
            return {least(kind.key_type): least(kind.value_type)}
        case inspect.NoneType() | inspect.AnyType():
            return None
    raise TypeError(f"no value of {kind}")

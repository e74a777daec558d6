"""What happened, in words: the last events of a failing seed, one line each."""

from typing import Any

import msgspec
import numpy as np

from sessile.contract.messages import Batch, Submit, unpack_tokens
from sessile.contract.plan import StepPlan, StepResult
from sessile.core.events import plan_in_words

Event = tuple[int, str, object]
"""Turn of the loop, verb, and the message, batch, plan or result it is about."""


def narrate(event: Event) -> str:
    """One event as one line."""
    turn, verb, subject = event
    if isinstance(subject, StepPlan):
        text = plan_in_words(
            subject.step, subject.rows, subject.starts, subject.query_counts, subject.draft_counts, subject.flags,
            subject.bind_rows, subject.table_rows, subject.table_starts, subject.table_counts, subject.table_pages,
            subject.copies,
        )  # fmt: skip
    elif isinstance(subject, StepResult):
        text = f"{subject.step}: tokens {subject.tokens.tolist()}, emitted {subject.emitted.tolist()}"
        text += f", faulty {subject.faulty.tolist()}" if subject.faulty.any() else ""
    elif isinstance(subject, Batch):
        text = _batch(subject)
    elif isinstance(subject, Submit):
        text = f"Submit {_set_fields(subject, 'tokens', 'sampling')} tokens={unpack_tokens(subject.tokens).tolist()} "
        text += _set_fields(subject.sampling)
    else:
        text = str(subject)
    return f"turn {turn}: {verb} {text}"


def _batch(batch: Batch) -> str:
    parts = [f"effects of {batch.step}:"]
    tokens = unpack_tokens(batch.delta_tokens).tolist()
    counts = np.frombuffer(batch.delta_counts, "<i4").tolist()
    for key, count in zip(np.frombuffer(batch.delta_keys, "<i8").tolist(), counts, strict=True):
        parts.append(f"{key} says {tokens[:count]};")
        tokens = tokens[count:]
    parts += [f"{scores.key} scores from {scores.start};" for scores in batch.scores]
    parts += [f"done {_set_fields(done)};" for done in batch.done]
    parts += [f"{reply};" for reply in batch.replies]
    parts += [f"{gone};" for gone in batch.gone]
    return " ".join(parts)


def _set_fields(struct: msgspec.Struct, *hidden: str) -> str:
    """Fields that differ from their defaults."""
    shown: dict[str, Any] = {}
    for field in msgspec.structs.fields(struct):
        value = getattr(struct, field.name)
        if field.name not in hidden and value != field.default:
            shown[field.name] = value
    return " ".join(f"{name}={value!r}" for name, value in shown.items())

"""What happened, in words: the last events of a failing seed, one line each."""

from typing import Any

import msgspec
import numpy as np

from sessile.contract.messages import Batch, Submit, unpack_tokens
from sessile.contract.plan import SAMPLE, StepPlan, StepResult

Event = tuple[int, str, object]
"""Turn of the loop, verb, and the message, batch, plan or result it is about."""


def narrate(event: Event) -> str:
    """One event as one line."""
    turn, verb, subject = event
    if isinstance(subject, StepPlan):
        text = _plan(subject)
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


def _plan(plan: StepPlan) -> str:
    parts = []
    for row, start, count, drafts, flags in zip(
        plan.rows, plan.starts, plan.query_counts, plan.draft_counts, plan.flags, strict=True
    ):
        kind = ("samples" if flags & SAMPLE else "fills") + (f" with {drafts} drafts" if drafts else "")
        parts.append(f"row {row} {kind} {count} at {start}")
    runs = list(zip(plan.table_rows.tolist(), plan.table_starts.tolist(), plan.table_counts.tolist(), strict=True))
    pages = plan.table_pages.tolist()
    copies = f"; copies {plan.copies.tolist()}" if len(plan.copies) else ""
    return f"{plan.step}: {'; '.join(parts)}; binds {plan.bind_rows.tolist()}; runs {runs} of pages {pages}{copies}"


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

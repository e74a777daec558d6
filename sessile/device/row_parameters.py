"""What the device remembers of each batch row between steps: how it samples, what it saw, its last token."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sessile.contract.plan import (
    BIND_FREQUENCY,
    BIND_MIN_NEW_TOKENS,
    BIND_MIN_P,
    BIND_PRESENCE,
    BIND_REPETITION,
    BIND_SEED_HIGH,
    BIND_SEED_LOW,
    BIND_TEMPERATURE,
    BIND_TOP_K,
    BIND_TOP_P,
    Ints,
    StepPlan,
)
from sessile.device.staging import to_device
from sessile.errors import PlanError


@dataclass
class SeenTokens:
    """Token counts of a row with a penalty: prompt bool[vocab] (occurs), output float32[vocab] (how often)."""

    prompt: Tensor
    output: Tensor


@dataclass(frozen=True)
class TokenCounter:
    """Counts the first few of a row's tokens as its output, in memory that is taken beforehand.

    tokens int64[n]; emitted int32: how many of them count, read when they are counted; the rest is room to compute in.
    """

    seen: SeenTokens
    tokens: Tensor
    emitted: Tensor
    places: Tensor
    is_emitted: Tensor
    weights: Tensor

    @classmethod
    def of(cls, tokens: Tensor, emitted: Tensor, seen: SeenTokens) -> "TokenCounter":
        """Take the memory. tokens: any integers, as they are now."""
        places = torch.arange(tokens.numel(), dtype=torch.int32, device=tokens.device)
        is_emitted = torch.empty_like(places, dtype=torch.bool)
        weights = torch.empty_like(places, dtype=torch.float32)
        return cls(seen, tokens.to(torch.int64), emitted, places, is_emitted, weights)

    def count(self) -> None:
        """Count them."""
        torch.lt(self.places, self.emitted, out=self.is_emitted)
        self.weights.copy_(self.is_emitted)
        self.seen.output.index_add_(0, self.tokens, self.weights)


class RowParameters:
    """Columns indexed by batch row; host columns are numpy, what the device reads each step is on the device.

    Rare things (bias, bans, penalties) are kept only for the rows that have them, so that the others pay nothing.
    """

    def __init__(self, rows_max: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self.last_tokens: Tensor = torch.zeros(rows_max, dtype=torch.int64, device=device)
        self.temperatures = np.zeros(rows_max, np.float32)
        self.top_ps = np.ones(rows_max, np.float32)
        self.min_ps = np.zeros(rows_max, np.float32)
        self.top_ks = np.zeros(rows_max, np.int64)
        self.seeds = np.zeros(rows_max, np.int64)
        self.min_new_tokens = np.zeros(rows_max, np.int64)
        self.adjusted = np.zeros(rows_max, np.bool_)
        """Whether the row's logits are changed before sampling: penalties, bias or bans."""
        self.adjusted_rows = 0
        """How many they are, those that draining rows had included."""
        self.penalties: dict[int, tuple[float, float, float]] = {}
        """Of rows that have one: repetition, frequency, presence."""
        self.seen: dict[int, SeenTokens] = {}
        self.biases: dict[int, tuple[Tensor, Tensor]] = {}
        self.bans: dict[int, Tensor] = {}

    def apply(self, plan: StepPlan) -> None:
        """Give each row that the plan binds to its new occupant, but for its last token: see `clear_last_tokens`."""
        if not plan.bind_rows.size and not (plan.bias_tokens.size or plan.ban_tokens.size or plan.seen_tokens.size):
            return
        ends = {
            "bias": np.cumsum(plan.bias_counts),
            "ban": np.cumsum(plan.ban_counts),
            "seen": np.cumsum(plan.prompt_counts + plan.output_counts),
        }
        sizes = {"bias": plan.bias_tokens.size, "ban": plan.ban_tokens.size, "seen": plan.seen_tokens.size}
        for name, total in sizes.items():
            if (int(ends[name][-1]) if plan.bind_rows.size else 0) != total:
                raise PlanError(f"step {plan.step}: the counts of {name} tokens do not add up to the {total} given")
        for index, row in enumerate(plan.bind_rows.tolist()):
            self._bind(row, plan.bind_ints[index], plan.bind_floats[index])
            bias = slice(int(ends["bias"][index] - plan.bias_counts[index]), int(ends["bias"][index]))
            if bias.stop > bias.start:
                self.biases[row] = (self._ids(plan.bias_tokens[bias]), self._floats(plan.bias_values[bias]))
            ban = slice(int(ends["ban"][index] - plan.ban_counts[index]), int(ends["ban"][index]))
            if ban.stop > ban.start and self.min_new_tokens[row] > 0:
                self.bans[row] = self._ids(plan.ban_tokens[ban])
            if row in self.penalties:
                seen_end = int(ends["seen"][index])
                output_start = seen_end - int(plan.output_counts[index])
                prompt = plan.seen_tokens[output_start - int(plan.prompt_counts[index]) : output_start]
                self.seen[row] = self._count(prompt, plan.seen_tokens[output_start:seen_end])
            self.adjusted[row] = row in self.biases or row in self.bans or row in self.penalties
        self.adjusted_rows = int(np.count_nonzero(self.adjusted))

    def clear_last_tokens(self, rows: Ints) -> None:
        """Forget what was sampled last for rows that get a new occupant."""
        self.last_tokens[torch.from_numpy(rows.astype(np.int64))] = 0

    def _bind(self, row: int, ints: npt.NDArray[np.int32], floats: npt.NDArray[np.float32]) -> None:
        for kept in (self.penalties, self.seen, self.biases, self.bans):
            kept.pop(row, None)
        self.temperatures[row] = floats[BIND_TEMPERATURE]
        self.top_ps[row] = floats[BIND_TOP_P]
        self.min_ps[row] = floats[BIND_MIN_P]
        self.top_ks[row] = ints[BIND_TOP_K]
        self.min_new_tokens[row] = ints[BIND_MIN_NEW_TOKENS]
        low, high = int(ints[BIND_SEED_LOW]), int(ints[BIND_SEED_HIGH])
        self.seeds[row] = (high << 32) | (low & 0xFFFFFFFF)
        penalties = float(floats[BIND_REPETITION]), float(floats[BIND_FREQUENCY]), float(floats[BIND_PRESENCE])
        if penalties != (1.0, 0.0, 0.0):
            self.penalties[row] = penalties

    def _count(self, prompt: npt.NDArray[np.int32], output: npt.NDArray[np.int32]) -> SeenTokens:
        occurs = torch.zeros(self._vocab_size, dtype=torch.bool, device=self._device)
        occurs[self._ids(prompt)] = True
        counts = torch.zeros(self._vocab_size, dtype=torch.float32, device=self._device)
        ids = self._ids(output)
        return SeenTokens(occurs, counts.index_add_(0, ids, torch.ones_like(ids, dtype=torch.float32)))

    def _ids(self, tokens: npt.NDArray[np.int32]) -> Tensor:
        return to_device(tokens.astype(np.int64), self._device)

    def _floats(self, values: npt.NDArray[np.float32]) -> Tensor:
        return to_device(values, self._device)

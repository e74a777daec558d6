"""From logits to a step's tokens: adjust, draw, verify drafts, remember. Rows pay only for what they asked for."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sessile.contract.plan import StepPlan
from sessile.device.inputs import SamplePositions
from sessile.device.row_parameters import RowParameters
from sessile.device.staging import to_device
from sessile.kernels.sampling import sample


@dataclass(frozen=True)
class Sampled:
    """What the sampling rows chose, row by row, on the device.

    tokens int64[m]: a token for each place, beyond a rejected draft meaningless. emitted int64[rows]: how many of a
    row's places count: 1 + accepted drafts. faulty bool[rows]: a place of the row had logits that are not finite.
    """

    tokens: Tensor
    emitted: Tensor
    faulty: Tensor


class Sampler:
    """Samples for the rows of a plan and keeps their last tokens and token counts up to date."""

    def __init__(self, parameters: RowParameters) -> None:
        self._parameters = parameters

    def run(self, plan: StepPlan, places: SamplePositions, logits: Tensor, flat_tokens: Tensor) -> Sampled:
        """Choose a token at each of m places, and accept each row's drafts while they equal what was chosen.

        logits float32[m, vocab], raw, unchanged; flat_tokens int64[t]: the step's input tokens.
        """
        finite = torch.isfinite(logits.sum(dim=-1))
        adjusted = self.adjust(plan, places, logits, flat_tokens)
        tokens = self._draw(plan, places, adjusted)
        tokens = torch.where(finite, tokens, 0)
        emitted = accepted_counts(places, tokens, flat_tokens) + 1
        self._remember(plan, places, tokens, emitted)
        return Sampled(tokens, emitted, ~_all_by_row(places, finite))

    def _draw(self, plan: StepPlan, places: SamplePositions, logits: Tensor) -> Tensor:
        parameters, device = self._parameters, logits.device
        rows = plan.rows[places.row_indices]
        warm = np.flatnonzero(parameters.temperatures[rows] > 0)
        if not warm.size:
            return logits.argmax(dim=-1)
        columns = (parameters.temperatures, parameters.top_ks, parameters.top_ps, parameters.min_ps, parameters.seeds)
        chosen = [torch.from_numpy(column[rows[warm]]).to(device) for column in columns]
        indices = plan.output_indices[places.row_indices[warm]] + places.depths[warm]
        chosen.append(torch.from_numpy(indices.astype(np.int64)).to(device))
        if warm.size == rows.size:
            return sample(logits, *chosen)
        tokens = logits.argmax(dim=-1)
        index = torch.from_numpy(warm).to(device)
        tokens[index] = sample(logits[index], *chosen)
        return tokens

    def adjust(self, plan: StepPlan, places: SamplePositions, logits: Tensor, flat_tokens: Tensor) -> Tensor:
        """Logits with penalties, then bias, then bans, then masks, copied only if a row has any."""
        rows = plan.rows[places.row_indices]
        touched = np.flatnonzero(self._parameters.adjusted[rows]).tolist()
        if not touched and not plan.mask_queries.size:
            return logits
        logits = logits.clone()
        for place in touched:
            row, depth, flat = int(rows[place]), int(places.depths[place]), int(places.flat[place])
            output_index = int(plan.output_indices[places.row_indices[place]]) + depth
            self._adjust_place(row, logits[place], flat_tokens[flat - depth + 1 : flat + 1], output_index)
        if plan.mask_queries.size:
            _apply_masks(plan, places, logits)
        return logits

    def _adjust_place(self, row: int, logits: Tensor, drafts: Tensor, output_index: int) -> None:
        """Change the logits [vocab] of one place in place; drafts: those before it, taken as accepted."""
        parameters = self._parameters
        if row in parameters.penalties:
            repetition, frequency, presence = parameters.penalties[row]
            seen = parameters.seen[row]
            counts = seen.output
            if drafts.numel():
                counts = counts.index_add(0, drafts, torch.ones_like(drafts, dtype=torch.float32))
            if repetition != 1.0:
                penalised = torch.where(logits > 0, logits / repetition, logits * repetition)
                logits.copy_(torch.where(seen.prompt | (counts > 0), penalised, logits))
            logits.sub_(counts * frequency + (counts > 0) * presence)
        if row in parameters.biases:
            ids, values = parameters.biases[row]
            logits.index_add_(0, ids, values)
        if row in parameters.bans and output_index < parameters.min_new_tokens[row]:
            logits[parameters.bans[row]] = float("-inf")

    def _remember(self, plan: StepPlan, places: SamplePositions, tokens: Tensor, emitted: Tensor) -> None:
        """Keep each row's last emitted token, and count what rows with a penalty emitted."""
        device = tokens.device
        rows = plan.rows[places.row_indices[places.firsts]].astype(np.int64)
        firsts = torch.from_numpy(places.firsts).to(device)
        self._parameters.last_tokens[torch.from_numpy(rows).to(device)] = tokens[firsts + emitted - 1]
        for index, row in enumerate(rows.tolist()):
            if row in self._parameters.seen:
                first = int(places.firsts[index])
                own = tokens[first : first + int(emitted[index])]
                self._parameters.seen[row].output.index_add_(0, own, torch.ones_like(own, dtype=torch.float32))


def accepted_counts(places: SamplePositions, tokens: Tensor, flat_tokens: Tensor) -> Tensor:
    """How many drafts of each sampling row equal the tokens chosen before them, up to the first that does not: int64.

    A draft is right if the token drawn at its place, with that place's own noise, is the draft: so speculation
    changes no output.
    """
    rows = places.firsts.size
    if places.flat.size == rows:
        return torch.zeros(rows, dtype=torch.int64, device=tokens.device)
    device = tokens.device
    depths = torch.from_numpy(places.depths).to(device)
    row_of_place = torch.from_numpy(np.searchsorted(places.firsts, np.arange(places.flat.size), "right") - 1).to(device)
    following = np.flatnonzero(places.depths)  # places that follow a draft
    drafts = flat_tokens[torch.from_numpy(places.flat[following]).to(device)]
    wrong_depths = torch.full((rows,), int(places.depths.max()) + 1, dtype=torch.int64, device=device)
    after = torch.from_numpy(following).to(device)
    is_wrong = tokens[after - 1] != drafts
    wrong_depths.scatter_reduce_(0, row_of_place[after[is_wrong]], depths[after[is_wrong]], "amin")
    drafts_of_row = torch.zeros(rows, dtype=torch.int64, device=device).scatter_reduce_(0, row_of_place, depths, "amax")
    return torch.minimum(wrong_depths - 1, drafts_of_row)


def _apply_masks(plan: StepPlan, places: SamplePositions, logits: Tensor) -> None:
    """Make what the plan's masks leave out impossible, in place; logits float32[≥ m, vocab]."""
    device = logits.device
    masked = to_device(np.searchsorted(places.flat, plan.mask_queries), device)
    words = to_device(plan.mask_words.reshape(plan.mask_queries.size, -1), device)
    ids = torch.arange(logits.shape[-1], device=device)
    is_allowed = (words[:, ids // 32] >> (ids % 32)) & 1
    logits[masked] = logits[masked].masked_fill(is_allowed == 0, float("-inf"))


def _all_by_row(places: SamplePositions, finite: Tensor) -> Tensor:
    """Whether all places of each sampling row are finite, bool[rows]."""
    if places.flat.size == places.firsts.size:
        return finite
    row_of_place = np.searchsorted(places.firsts, np.arange(places.flat.size), "right") - 1
    index = torch.from_numpy(row_of_place).to(finite.device)
    ones = torch.ones(places.firsts.size, dtype=torch.int64, device=finite.device)
    return ones.scatter_reduce_(0, index, finite.to(torch.int64), "amin").bool()

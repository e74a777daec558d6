"""The engine's section of the configuration."""

from dataclasses import dataclass

from sessile.options import option


@dataclass(frozen=True)
class EngineOptions:
    """Settings of the step loop."""

    overlap: str = option(
        "on",
        "Plan and launch the next step while the device runs the current one; off: one after the other, for debugging.",
        choices=("on", "off"),
    )
    step_limit_ms: float | None = option(
        None,
        "Longest step aimed at: prompt chunks are cut so that steps stay under it, which bounds how long a stream can"
        " stall. 0: never cut. Default: 250 on a CPU, 100 on a GPU.",
        unit="ms",
        low=0,
        high=60_000,
    )
    speculate: str = option(
        "off",
        "Look up what may come next in the conversation, in corpora and in requests that may be remembered, and let the"
        " model verify it: the same output in fewer steps, where text repeats. A request may say no, or how much. auto:"
        " on where the step times measured at the start say that it can pay. Off by default, because what it gains"
        " depends on the texts.",
        choices=("on", "off", "auto"),
    )
    drafts_max: int = option(
        7,
        "Most tokens looked up for a request in a step. On a CPU, rows of up to 8 tokens with their drafts are attended"
        " in place; longer ones are read like a prompt.",
        unit="tokens",
        low=1,
        high=255,
    )

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

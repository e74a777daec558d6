"""What the user chooses about the device."""

from dataclasses import dataclass

from sessile.options import option


@dataclass(frozen=True)
class DeviceOptions:
    """Settings of the device that a user may change."""

    device: str = option("auto", "Where the model runs. This version runs on the CPU.", choices=("auto", "cpu"))
    kv_memory: str = option(
        "auto",
        "Memory for KV, as bytes or with a suffix (512M, 4G). More keeps more sessions and prefixes warm. auto: a "
        "quarter of what is free, at most 8G and at most a full context for every row.",
    )
    threads: int | None = option(
        None, "Threads that compute; default: the cores this process may use.", unit="threads", low=1, high=1024
    )

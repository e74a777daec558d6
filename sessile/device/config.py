"""What the user chooses about the device."""

from dataclasses import dataclass

from sessile.options import option


@dataclass(frozen=True)
class DeviceOptions:
    """Settings of the device that a user may change."""

    device: str = option(
        "auto",
        "Where the model runs. auto: on the first CUDA GPU, or on the CPU where there is none.",
        choices=("auto", "cpu", "cuda"),
    )
    kv_memory: str = option(
        "auto",
        "Memory for KV, as bytes or with a suffix (512M, 4G). More keeps more sessions and prefixes warm. auto: at "
        "most a full context for every row, and on a CPU a quarter of what is free but no more than 8G, on a GPU nine "
        "tenths of what the weights leave, less 2G to compute in.",
    )
    kv_dtype: str = option(
        "auto",
        "What K and V are kept in. model: --dtype. int8: half of that, with a scale for each head of a token, by the "
        "C++ kernels on a CPU. auto: int8 where those compute in bfloat16, else as the model.",
        choices=("auto", "model", "int8"), aliases=("kv-cache-dtype",),
    )  # fmt: skip
    cpu_kernels: str = option(
        "auto",
        "What computes on the CPU. native: the C++ kernels of `make compile`. numba: kernels compiled at the first "
        "start. auto: native where they are built and suit the model.",
        choices=("auto", "native", "numba"),
    )
    attention: str = option(
        "auto",
        "What attends with prompts on a GPU. triton: our own kernels. fa3: FlashAttention-3 in steps of many tokens, "
        "and no start without it. auto: FlashAttention-3 where a package brings it and it suits model and GPU. All "
        "other attention is our own.",
        choices=("auto", "triton", "fa3"),
    )
    threads: int | None = option(
        None, "Threads that compute; default: the cores this process may use.", unit="threads", low=1, high=1024
    )

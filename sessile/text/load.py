"""Find the tokenizer of a model, by the same names that `--model` takes."""

from pathlib import Path

from sessile.errors import StartupError
from sessile.gguf import GgufFile, default_gguf_path
from sessile.text.from_folder import tokenizer_from_folder
from sessile.text.from_gguf import tokenizer_from_gguf
from sessile.text.tokenizer import Tokenizer


def load_tokenizer(model: str | Path) -> Tokenizer:
    """The tokenizer of a model: "default", the path of a GGUF file, or of a hub folder.

    Raises StartupError, in one line with the remedy, if there is none or it cannot be read.
    """
    if model == "default":
        return tokenizer_from_gguf(GgufFile(default_gguf_path()))
    path = Path(model).expanduser()
    if path.is_dir():
        return tokenizer_from_folder(path)
    if path.is_file() and path.suffix == ".gguf":
        return tokenizer_from_gguf(GgufFile(path))
    wrong = f"{path} is no .gguf file" if path.is_file() else f"no model at {path}"
    raise StartupError(f"{wrong}. Give --model a hub folder, a .gguf file, or 'default'.")

"""Write a model's tokenizer as a folder that transformers reads: `python scripts/clients/write_tokenizer.py FOLDER`.

Load generators count tokens with a tokenizer of their own and would fetch one. This is the one that the engine uses,
whatever file it comes from.
"""

import json
import sys
from pathlib import Path

from sessile.text.load import load_tokenizer
from sessile.text.tokenizer import Tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json, which AutoTokenizer.from_pretrained takes without a network."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.backend.id_to_token(tokenizer.eos_ids[0]),
        "pad_token": tokenizer.backend.id_to_token(tokenizer.eos_ids[0]),
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.template is not None:
        config["chat_template"] = tokenizer.template.source
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), "utf-8")


if __name__ == "__main__":
    write_tokenizer(load_tokenizer(sys.argv[2] if len(sys.argv) > 2 else "default"), Path(sys.argv[1]))

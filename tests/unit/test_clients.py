"""What `make clients` gives other people's clients: a tokenizer that is ours, and each script a server."""

import runpy
from pathlib import Path

import pytest
import transformers

from sessile.text.load import load_tokenizer
from sessile.text.template import Message

CLIENTS = Path(__file__).resolve().parents[2] / "scripts" / "clients"
TEXTS = ["Hello, world!", "  two  spaces\n\tand a tab", "naïve café, 東京, 🙂", "<|im_start|>user\nhi<|im_end|>\n", ""]
ASK = [Message(role="user", content="hi")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    runpy.run_path(str(CLIENTS / "write_tokenizer.py"))["write_tokenizer"](load_tokenizer("default"), path)
    return path


def test_transformers_reads_the_tokenizer_that_is_written_and_agrees(folder: Path) -> None:
    ours, theirs = load_tokenizer("default"), transformers.AutoTokenizer.from_pretrained(folder)
    assert [theirs.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    assert [theirs.decode(ours.encode(text)) for text in TEXTS] == TEXTS
    assert theirs.apply_chat_template(ASK, tokenize=False, add_generation_prompt=True) == ours.render_chat(ASK)
    assert theirs.eos_token_id in ours.eos_ids


def test_so_do_we(folder: Path) -> None:
    assert load_tokenizer(folder).encode(TEXTS[2]) == load_tokenizer("default").encode(TEXTS[2])


def test_every_script_is_run() -> None:
    scripts = {path.stem for path in CLIENTS.glob("*.py")} - {"run", "checks", "write_tokenizer"}
    assert set(runpy.run_path(str(CLIENTS / "run.py"))["CLIENTS"]) == scripts

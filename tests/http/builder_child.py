"""The builder as a process, with the tokenizer of the fake engine."""

import sys

from sessile.corpora.builder import run_builder
from tests.http.fake_engine import byte_tokenizer

if __name__ == "__main__":
    sys.stdin.buffer.readline()
    sys.exit(run_builder(byte_tokenizer()))

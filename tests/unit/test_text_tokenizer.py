"""Our tokenizers say what transformers' say, from a GGUF file and from hub folders."""

import json
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from sessile.errors import InvalidRequest, StartupError
from sessile.gguf import default_gguf_path
from sessile.text.load import load_tokenizer
from sessile.text.tokenizer import Tokenizer
from tests.unit.gguf_writer import write_gguf
from tests.unit.text_samples import samples, without_numbers

CHAT = "<|im_start|>user\nHi 42<|im_end|>\n<|im_start|>assistant\n"
SAMPLES = [*samples(), CHAT, "a<|im_end|>b", " <|endoftext|> "]
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return load_tokenizer("default")


@pytest.fixture(scope="module")
def smollm2_of_transformers() -> Any:
    path = default_gguf_path()
    return transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


@pytest.fixture(scope="module")
def smollm2_folder(smollm2_of_transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as it was published: tokenizer.json takes digits one by one, which transformers' GGUF loader forgets."""
    folder = tmp_path_factory.mktemp("smollm2")
    backend = Backend.from_str(smollm2_of_transformers.backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    save(backend, folder, bos_token="<|im_start|>", eos_token="<|im_end|>")
    return folder


def save(backend: Backend, folder: Path, **specials: str) -> None:
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **specials).save_pretrained(folder)


def trained(kind: str) -> Backend:
    """A tiny tokenizer of one of the families we serve, trained on the samples."""
    special = ["<unk>", "<s>", "</s>", "<|endoftext|>"]
    if kind == "sentencepiece":
        backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        alphabet = list("▁abcdefghijklmnopqrstuvwxyz")
    else:
        backend = Backend(models.BPE())
        steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "qwen2")]
        if kind == "qwen2":
            backend.normalizer = normalizers.NFC()
            steps.insert(0, pre_tokenizers.Split(Regex(QWEN2), behavior="isolated"))
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
        backend.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=special, initial_alphabet=alphabet, limit_alphabet=300, show_progress=False
    )
    backend.train_from_iterator(samples(50), trainer)
    if kind == "sentencepiece":  # the bytes were passed in as special tokens only to get into the vocabulary
        backend = without_special_bytes(backend)
    if kind != "qwen2":
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return backend


def without_special_bytes(backend: Backend) -> Backend:
    source = json.loads(backend.to_str())
    source["added_tokens"] = [token for token in source["added_tokens"] if not token["content"].startswith("<0x")]
    return Backend.from_str(json.dumps(source))


def test_the_default_model_agrees_with_transformers_gguf_loader(
    smollm2: Tokenizer, smollm2_of_transformers: Any
) -> None:
    for text in map(without_numbers, SAMPLES):
        assert smollm2.encode(text) == smollm2_of_transformers.encode(text), text


def test_the_default_model_agrees_with_its_published_tokenizer(smollm2: Tokenizer, smollm2_folder: Path) -> None:
    published = transformers.AutoTokenizer.from_pretrained(smollm2_folder)
    from_folder = load_tokenizer(smollm2_folder)
    for text in SAMPLES:
        ids = published.encode(text)
        assert smollm2.encode(text) == ids, text
        assert from_folder.encode(text) == ids, text
        for skip in (False, True):
            expected = published.decode(ids, skip_special_tokens=skip)
            assert smollm2.decode(ids, skip_special_tokens=skip) == expected, text
            assert from_folder.decode(ids, skip_special_tokens=skip) == expected, text


def test_bytes_of_every_token_of_the_default_model_are_what_transformers_decodes(
    smollm2: Tokenizer, smollm2_of_transformers: Any
) -> None:
    table = smollm2.vocabulary.token_bytes
    assert len(table) == 49_152
    for token in range(0, 49_152, 7):
        assert table[token].decode(errors="replace") == smollm2_of_transformers.decode([token])
    added = smollm2_of_transformers.added_tokens_decoder
    assert smollm2.vocabulary.special_ids == {token for token, said in added.items() if said.special}


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "sentencepiece"])
def test_a_hub_folder_agrees_with_transformers(tmp_path: Path, kind: str) -> None:
    save(trained(kind), tmp_path, bos_token="<s>", eos_token="</s>")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    for text in [*SAMPLES, "a <think>b</s> c"]:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False), text
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip), text
    assert ours.bos_id == (None if kind == "qwen2" else 1)
    assert ours.eos_ids == (2,)


def gguf_of(backend: Backend, path: Path, **values: Any) -> Path:
    """The vocabulary of a tokenizer as a GGUF file."""
    source = json.loads(backend.to_str())
    added = {token["id"]: 3 if token["special"] else 4 for token in source["added_tokens"]}
    vocabulary = backend.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    kinds = [added.get(id, 6 if token.startswith("<0x") else 1) for id, token in enumerate(tokens)]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in source["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **{f"tokenizer.ggml.{key}": value for key, value in values.items()},
    }
    return write_gguf(path, {key: value for key, value in metadata.items() if value is not None})


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "tekken"])
def test_each_named_split_of_a_gguf_file_agrees_with_transformers(tmp_path: Path, pre: str) -> None:
    path = gguf_of(trained("gpt2"), tmp_path / "tiny.gguf", model="gpt2", pre=pre, add_bos_token=True)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    ours = load_tokenizer(path)
    for text in [*SAMPLES, "a <think>b</s> c"]:
        normal = unicodedata.normalize("NFC", text)  # Qwen2 normalises; transformers' GGUF loader forgets it
        assert ours.encode(text if pre == "qwen2" else normal) == theirs.encode(normal), text
    assert ours.bos_id == 1


def test_a_sentencepiece_gguf_file_agrees_with_transformers(tmp_path: Path) -> None:
    backend = trained("sentencepiece")
    size = backend.get_vocab_size(with_added_tokens=True)
    path = gguf_of(
        backend, tmp_path / "tiny.gguf", model="llama", merges=None, scores=[-float(id) for id in range(size)]
    )
    ours = load_tokenizer(path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in SAMPLES:
        # Before a space and after a special token transformers' Metaspace puts no other space; the tokenizer.json of
        # Llama 2 and llama.cpp do, and so do we.
        ids = theirs.encode(text)
        if text and not text.startswith((" ", "▁")) and not ours.vocabulary.special_ids.intersection(ids[1:]):
            assert ours.encode(text) == ids, text
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    assert ours.decode(ours.encode("  two spaces")) == "  two spaces"


def test_special_tokens_in_text_are_taken_as_such(smollm2: Tokenizer) -> None:
    ids = smollm2.encode(CHAT)
    assert ids[0] == 1
    assert ids.count(1) == 2
    assert ids.count(2) == 1
    assert smollm2.decode(ids) == "user\nHi 42\nassistant\n"


def test_a_bos_that_prompts_never_start_with_is_none(smollm2: Tokenizer) -> None:
    assert smollm2.bos_id is None
    assert smollm2.encode("Hi") == smollm2.encode("Hi", add_special_tokens=False)


def test_facts_cover_the_vocabulary_of_the_model_whether_padded_or_not(smollm2: Tokenizer) -> None:
    facts = smollm2.facts(vocab_size=49_280, context_tokens=8192)
    assert len(facts.token_bytes) == facts.vocab_size == 49_280
    assert facts.token_bytes[49_152:] == (b"",) * 128
    assert facts.eos_ids == (2,)
    assert 2 in facts.special_ids
    small = smollm2.facts(vocab_size=10, context_tokens=8192)
    assert len(small.token_bytes) == 10
    assert max(small.special_ids) == 9


def test_half_a_surrogate_pair_is_refused(smollm2: Tokenizer) -> None:
    with pytest.raises(InvalidRequest) as caught:
        smollm2.encode("a\ud800b")
    assert caught.value.param == "text"


def test_text_that_not_even_an_unknown_token_stands_for_is_refused(tmp_path: Path) -> None:
    save(trained("gpt2"), tmp_path)
    source = json.loads((tmp_path / "tokenizer.json").read_text())
    source["model"] |= {"unk_token": "nobody " * 100, "merges": []}
    del source["model"]["vocab"]["~"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(source))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("abc")) == "abc"
    with pytest.raises(InvalidRequest, match="cannot encode this text: .*nobody") as caught:
        tokenizer.encode("a~c")
    assert caught.value.param == "text" and len(str(caught.value)) < 300
    with pytest.raises(InvalidRequest, match="cannot encode this text"):
        tokenizer.encode_all(["abc", "a~c"])


def test_end_tokens_come_from_the_generation_config_and_the_tokenizer(tmp_path: Path) -> None:
    save(trained("gpt2"), tmp_path, eos_token="</s>")
    (tmp_path / "config.json").write_text('{"eos_token_id": 9}')
    assert load_tokenizer(tmp_path).eos_ids == (2, 9)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert load_tokenizer(tmp_path).eos_ids == (2, 5, 7)


def spoil_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": ')


FOLDER_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
    "half a file": (spoil_json, "not JSON"),
    "another schema": (lambda folder: (folder / "tokenizer.json").write_text('{"model": {}}'), "tokenizer.json"),
    "binary settings": (lambda folder: (folder / "tokenizer_config.json").write_bytes(b"\xff\xfe"), "not UTF-8"),
    "a list of settings": (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "not a JSON object"),
    "a broken template": (lambda folder: (folder / "chat_template.jinja").write_text("{% if %}"), "not valid Jinja"),
    "a strange end": (
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": "x"}'), "eos_token_id",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_a_folder_without_a_usable_tokenizer_is_refused_in_one_line(tmp_path: Path, fault: str) -> None:
    save(trained("gpt2"), tmp_path, eos_token="</s>")
    spoil, expected = FOLDER_FAULTS[fault]
    spoil(tmp_path)
    with pytest.raises(StartupError) as caught:
        load_tokenizer(tmp_path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


GGUF_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown split": ({"pre": "klingon"}, "'klingon'; supported are"),
    "no split": ({"pre": None}, "pre-tokenizer is None"),
    "another model": ({"model": "t5"}, "only 'gpt2' and 'llama'"),
    "no tokens": ({"tokens": None}, "no usable tokenizer.ggml.tokens"),
    "numbers for tokens": ({"tokens": [1, 2]}, "no usable tokenizer.ggml.tokens"),
    "fewer types than tokens": ({"token_type": [1, 1]}, "2 token types for"),
    "a merge of one": ({"merges": ["ab"]}, "'ab' is not a pair"),
    "a merge of strangers": ({"merges": ["qqqq zzzz"]}, "do not fit its tokens"),
    "an end outside": ({"eos_token_id": 10**6}, "the eos token is 1000000"),
}


@pytest.mark.parametrize("fault", GGUF_FAULTS)
def test_a_gguf_file_without_a_usable_tokenizer_is_refused_in_one_line(tmp_path: Path, fault: str) -> None:
    values, expected = GGUF_FAULTS[fault]
    path = gguf_of(trained("gpt2"), tmp_path / "tiny.gguf", **{"model": "gpt2", "pre": "gpt-2", **values})
    with pytest.raises(StartupError) as caught:
        load_tokenizer(path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="no model at"):
        load_tokenizer(tmp_path / "nowhere")


def test_text_is_loaded_without_torch_or_transformers() -> None:
    code = "import sys; import sessile.text.load; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"

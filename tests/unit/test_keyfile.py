"""The keys file: what it says, and that whatever is wrong with it is one line that names file and line."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sessile.cli import main
from sessile.config import Config
from sessile.core.limits import TenantPolicy
from sessile.errors import StartupError
from sessile.keyfile import POLICY_FIELDS, KeyFile, draw_key, read_keys
from sessile.server.corpora.budget import CorpusLimits
from sessile.server.keys import Caller

A, B = hashlib.sha256(b"a").hexdigest(), hashlib.sha256(b"b").hexdigest()
ReadText = Callable[[str], KeyFile]

GOOD = f"""
tenants:
  acme:
    weight: 2
    requests_max: 64
    tokens-max: 200000
    sessions_max: 100
    held_tokens_max: 1000000
    shares_prefixes: true
  umbra:
keys:
  - sha256: {A}
    tenant: acme
    role: admin
  - {{sha256: "{B.upper()}", tenant: umbra}}
"""


@pytest.fixture
def read(tmp_path: Path) -> ReadText:
    def read_text(text: str) -> KeyFile:
        path = tmp_path / "keys.yaml"
        path.write_text(text, encoding="utf-8")
        return read_keys(path)

    return read_text


def test_tenants_have_the_limits_that_the_file_says(read: ReadText) -> None:
    acme, umbra = read(GOOD).policies
    assert acme == TenantPolicy(
        "acme", weight=2, requests_max=64, tokens_max=200_000, sessions_max=100, held_tokens_max=1_000_000,
        shares_prefixes=True,
    )  # fmt: skip
    assert umbra == TenantPolicy("umbra")


def test_limits_of_corpora_go_to_the_server_and_no_others_do(read: ReadText) -> None:
    text = GOOD.replace("    weight: 2\n", "    corpora_tokens_max: 0\n")
    file = read(text.replace("  umbra:", "  umbra: {corpora-bytes-max: 99}"))
    assert file.ring.corpus_limits == {"acme": CorpusLimits(tokens_max=0), "umbra": CorpusLimits(bytes_max=99)}
    assert file.policies[1] == TenantPolicy("umbra")
    assert read(GOOD).ring.corpus_limits == {}


def test_keys_stand_for_tenants_and_roles(read: ReadText) -> None:
    ring = read(GOOD).ring
    assert ring.caller_with("a") == Caller("acme", is_admin=True)
    assert ring.caller_with("b") == Caller("umbra", is_admin=False)
    assert ring.caller_with("c") is None
    assert ring.caller_with(A) is None, "the hash of a key is no key"
    assert ring.tenants == ("acme", "umbra")


def test_several_keys_may_stand_for_one_tenant(read: ReadText) -> None:
    ring = read(f"tenants: {{t: }}\nkeys:\n- {{sha256: {A}, tenant: t}}\n- {{sha256: {B}, tenant: t}}").ring
    assert ring.caller_with("a") == ring.caller_with("b") == Caller("t", is_admin=False)


def test_a_hash_that_looks_like_a_number_is_a_hash(read: ReadText) -> None:
    digits = "1" * 64
    (key,) = read(f"tenants: {{t: }}\nkeys: [{{sha256: {digits}, tenant: t}}]").ring.keys
    assert key.digest == bytes.fromhex(digits)


def test_the_file_can_set_every_limit_that_a_tenant_has() -> None:
    assert set(POLICY_FIELDS) == {
        "weight", "requests_max", "tokens_max", "sessions_max", "held_tokens_max", "shares_prefixes", "remembers"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says", "line"),
    [
        ("tenants: {t: }", "keys is missing", 1),
        (f"keys:\n- {{sha256: {A}, tenant: t}}", "tenants is missing", 1),
        ("tenants: {t: }\nkeys: []", "keys lists none: `sessile key`", 2),
        ("tenants: {}\nkeys: []", "tenants names none", 1),
        ("tenants: [t]\nkeys: []", "tenants must be lines of the form name: value", 1),
        ("tenants: {t: }\nkeys: {a: b}", "keys must be a list", 2),
        ("tenants: {t: }\nkeys: []\ncolour: red", "the file has no field 'colour'", 3),
        ("tenants:\n  t:\n    wieght: 2\nkeys: []", "tenant t has no field 'wieght'; did you mean weight?", 3),
        ("tenants:\n  t:\n    weight: 0\nkeys: []", "t: weight must be a whole number from 1 to 1000, got '0'", 3),
        ("tenants:\n  t:\n    weight: 1001\nkeys: []", "weight must be a whole number from 1 to 1000", 3),
        ("tenants:\n  t:\n    weight: null\nkeys: []", "weight must be a whole number", 3),
        ("tenants:\n  t:\n    requests_max: 1.5\nkeys: []", "requests_max must be a whole number", 3),
        ("tenants:\n  t:\n    requests_max: -1\nkeys: []", "requests_max must be a whole number", 3),
        ("tenants:\n  t:\n    tokens_max: 9999999999999999999\nkeys: []", "tokens_max must be a whole number", 3),
        ("tenants:\n  t:\n    corpora_tokens_max: -1\nkeys: []", "corpora_tokens_max must be a whole number from 0", 3),
        ("tenants:\n  t:\n    tokens_max: [1]\nkeys: []", "tokens_max must be a single value", 3),
        ("tenants:\n  t:\n    shares_prefixes: yes\nkeys: []", "shares_prefixes must be true or false, got 'yes'", 3),
        ("tenants:\n  t:\n    weight: 1\n    weight: 2\nkeys: []", "weight is set twice", 4),
        ("tenants:\n  t: 3\nkeys: []", "tenant t must be lines of the form", 2),
        ("tenants:\n  t: \n  t: \nkeys: []", "t is set twice", 3),
        ("tenants:\n  'a b': \nkeys: []", "tenant 'a b': a name has", 2),
        ("tenants:\n  '': \nkeys: []", "tenant '': a name has", 2),
        (f"tenants: {{acme: }}\nkeys:\n- sha256: {A}\n  tenant: amce", "'amce' is not declared under tenants; did", 4),
        (f"tenants: {{t: }}\nkeys:\n- sha256: {A}", "the key has no tenant", 3),
        ("tenants: {t: }\nkeys:\n- tenant: t", "the key has no sha256", 3),
        ("tenants: {t: }\nkeys:\n- key: sk-1\n  tenant: t", "a key has no field 'key'", 3),
        (f"tenants: {{t: }}\nkeys:\n- {{sha256: {A[1:]}, tenant: t}}", "sha256 must be 64 hexadecimal digits", 3),
        ("tenants: {t: }\nkeys:\n- {sha256: , tenant: t}", "sha256 must be 64 hexadecimal digits", 3),
        (f"tenants: {{t: }}\nkeys:\n- {{sha256: {A}, tenant: t, role: root}}", "role must be user or admin, got", 3),
        (
            f"tenants: {{t: }}\nkeys:\n- {{sha256: {A}, tenant: t}}\n- {{sha256: {A.upper()}, tenant: t}}",
            "this key is listed already, on line 3", 4,
        ),
        ("tenants: {t: }\nkeys: [3]", "a key must be lines of the form name: value", 2),
        ("just text", "the file must be lines of the form", 1),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_that_names_file_and_line(
    read: ReadText, tmp_path: Path, text: str, says: str, line: int
) -> None:
    with pytest.raises(StartupError) as refusal:
        read(text)
    message = str(refusal.value)
    assert says in message
    assert message.endswith(f"(keys file {tmp_path / 'keys.yaml'}, line {line})") and "\n" not in message


@pytest.mark.parametrize("text", ["", "# nothing", "a: [", "\x00", "[" * 5000])
def test_a_file_that_says_nothing_is_refused_in_one_line(read: ReadText, tmp_path: Path, text: str) -> None:
    with pytest.raises(StartupError, match="empty|not YAML") as refusal:
        read(text)
    assert str(tmp_path / "keys.yaml") in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_key_in_place_of_its_hash_is_not_repeated(read: ReadText) -> None:
    with pytest.raises(StartupError) as refusal:
        read("tenants: {t: }\nkeys: [{sha256: sk-sessile-secret, tenant: t}]")
    assert "secret" not in str(refusal.value)


def test_a_missing_file_ends_the_start_with_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["serve", "--keys", str(tmp_path / "none.yaml")]) == 2
    error = capsys.readouterr().err
    assert error == f"sessile: cannot read the keys file {tmp_path / 'none.yaml'}: No such file or directory\n"


def test_the_server_gets_the_hashes_and_the_engine_the_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, Any] = {}

    def run_server(*arguments: object, **named: object) -> int:
        given.update(named)
        return 0

    monkeypatch.setattr("sessile.server.run.serve", run_server)
    (tmp_path / "keys.yaml").write_text(GOOD)
    assert main(["serve", "--keys", str(tmp_path / "keys.yaml")]) == 0
    assert given["key_ring"].caller_with("a") == Caller("acme", is_admin=True)
    acme, _ = Config.from_json(given["engine_config"]).tenants
    assert (acme.name, acme.weight, acme.sessions_max) == ("acme", 2, 100)
    assert A not in given["engine_config"] and A not in repr(given["settings"])


def test_a_drawn_key_is_valid_with_the_entry_that_comes_with_it(read: ReadText) -> None:
    key, entry = draw_key("acme", "admin")
    assert read(f"tenants:\n  acme:\nkeys:\n{entry}").ring.caller_with(key) == Caller("acme", is_admin=True)
    assert draw_key("acme", "admin")[0] != key
    assert key not in entry


def test_the_command_prints_the_entry_and_shows_the_key_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["key", "--tenant", "acme"]) == 0
    output = capsys.readouterr()
    key = output.err.split()[-1]
    assert output.out == f"  - sha256: {hashlib.sha256(key.encode()).hexdigest()}\n    tenant: acme\n    role: user\n"


@pytest.mark.parametrize("argv", [["key"], ["key", "--tenant", "a b"], ["key", "--tenant", "a", "--role", "root"]])
def test_a_key_for_nobody_is_refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert main(argv) == 2
    assert capsys.readouterr().out == ""

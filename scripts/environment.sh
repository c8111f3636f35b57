# Sourced by the other scripts: `prepare_environment EXTRAS` makes the virtual environment and puts it on PATH.
#
# The environment is .venv in the repository, or $COMPRESS_VENV. It is installed anew only when pyproject.toml or
# constraints.txt have changed.

root="$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

heading() {
    printf '\n=== %s ===\n' "$*"
}

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# Print the first Python that is new enough and can make virtual environments. Each one is run, not only looked up: a
# version manager may put names on PATH that do not work.
find_python() {
    local candidate old="" bare=""
    for candidate in python3.13 python3.12 python3.11 python3; do
        if ! "$candidate" -c '' >/dev/null 2>&1; then
            continue
        elif ! "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            old="$candidate"
        elif ! "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            bare="$candidate"
        else
            printf '%s\n' "$candidate"
            return
        fi
    done
    if [[ -n "$bare" ]]; then
        fail "$bare: expected a Python with the venv module, got one without." \
            "Install it, on Debian and Ubuntu with: apt-get install ${bare}-venv."
    elif [[ -n "$old" ]]; then
        fail "python: expected version 3.11 or newer, got $("$old" --version 2>&1)." \
            "Install Python 3.11, 3.12 or 3.13 and put it on PATH."
    fi
    fail "python: expected python3 on PATH, got none. Install Python 3.11, 3.12 or 3.13."
}

prepare_environment() {
    local extras="$1" venv="${COMPRESS_VENV:-$root/.venv}" python base stamp wanted
    [[ "$venv" == /* ]] || venv="$PWD/$venv"
    python="$venv/bin/python"
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        base="$(find_python)"
        heading "Virtual environment $venv ($("$base" --version))"
        "$base" -m venv "$venv"
        "$python" -m pip --version >/dev/null 2>&1 ||
            fail "$venv: expected a working virtual environment, got a broken one. Remove it and run this again."
    fi
    stamp="$venv/.compress-${extras//,/-}"
    wanted="$(
        "$python" -c 'import hashlib, sys; from pathlib import Path
print(hashlib.sha256(b"\0".join([*(Path(p).read_bytes() for p in sys.argv[2:]), sys.argv[1].encode()])).hexdigest())' \
            "$root" "$root/pyproject.toml" "$root/constraints.txt"
    )"
    if [[ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]]; then
        heading "Install compress[$extras] (several minutes the first time)"
        # Modules are compiled as they are imported, not all that there are.
        "$python" -m pip install -q -q --no-compile --disable-pip-version-check -c "$root/constraints.txt" -e "$root[$extras]"
        printf '%s\n' "$wanted" >"$stamp"
    fi
    export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv"
}

# Sourced by run_train.sh and scripts/test.sh: sets $PYTHON to an interpreter that has all requirements.
#
# Tried in this order: the active environment, if it has the packages that pyproject.toml requires; `.venv`, if
# complete; a new `.venv`, installed from requirements.txt (an incomplete or broken one is deleted first).

_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
_venv="$_root/.venv"

_has_requirements() { "$1" "$_root/scripts/check_environment.py" "${@:2}" 2>/dev/null; }

_base_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return 0
        fi
    done
    echo "error: no Python 3.10 or newer with the venv module on PATH; install one and try again" >&2
    return 1
}

_make_venv() {
    local base fresh
    base="$(_base_python)" || return 1
    rm -rf "$_venv"
    echo "One-time set-up: installing requirements.txt into .venv (a minute or two)" >&2
    "$base" -m venv "$_venv" || { rm -rf "$_venv"; return 1; }
    "$_venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$_root/requirements.txt" >&2 &&
        "$_venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
            -e "$_root" >&2 || { rm -rf "$_venv"; echo "error: the set-up failed (see above)" >&2; return 1; }
    echo "Set-up done." >&2
}

_setup() {
    local active
    active="$(command -v python3 || command -v python || true)"
    if [ -n "$active" ] && _has_requirements "$active" "$@"; then
        PYTHON="$active"
        return 0
    fi
    PYTHON="$_venv/bin/python"
    if _has_requirements "$PYTHON" "$@"; then return 0; fi
    # Of two commands started at once, the second must wait until the first has installed `.venv`.
    (
        if command -v flock >/dev/null 2>&1; then flock 9; fi
        _has_requirements "$PYTHON" "$@" || _make_venv
    ) 9>"$_root/.venv.lock" || return 1
    _has_requirements "$PYTHON" "$@" || { echo "error: .venv still lacks a requirement; delete it and try again" >&2; return 1; }
}

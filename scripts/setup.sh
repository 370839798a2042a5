# Sourced by run_train.sh and scripts/test.sh: sets $PYTHON to an interpreter that has all requirements.
#
# Tried in this order: the active environment, if it has the packages that pyproject.toml requires; `.venv`, if its
# set-up was finished and asked for the same, or if somebody else made it and it is complete; a set-up of `.venv`.
# `.venv/set-up` is "unfinished" from the first command of a set-up to the last, then a checksum of what was asked. An
# unfinished or broken `.venv` is deleted; one that was finished and asked for something else is updated in place.
# `.venv/extras` lists the extras of pyproject.toml that were added to it, one a line.

_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
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

# A checksum of what a set-up installs: the locked packages (`--dev`: and those of the tests), this checkout and its
# folder, and how.
_asked() {
    {
        echo "$_root $*"
        cat "$_root"/requirements*.txt "$_root/pyproject.toml" "$_root/scripts/setup.sh"
    } | cksum
}

_recorded() { cat "$_venv/set-up" 2>/dev/null; }

_usable() {
    local recorded
    recorded="$(_recorded)"
    if [ -n "$recorded" ]; then
        [ "$recorded" = "$(_asked)" ] || [ "$recorded" = "$(_asked --dev)" ] || return 1
    else # not made here
        [ -x "$_venv/bin/titan-moe" ] || return 1
    fi
    _has_requirements "$_venv/bin/python" "$@"
}

_pip() { "$_venv/bin/python" -m pip "$1" --quiet --disable-pip-version-check "${@:2}" >&2; }

# torch comes in several builds. The registries' build has the hashes of requirements-torch.txt. pip may also be set up to
# take another one (for CPUs only, or for another CUDA), which has a label: 2.13.0+cpu. Its files have other hashes.
_install_torch() {
    local pin wheels="$_venv/wheels" wheel
    pin="$(sed -n 's/^\(torch==[^ ;]*\).*/\1/p' "$_root/requirements-torch.txt")"
    rm -rf "$wheels"
    _pip download --no-deps --dest "$wheels" "$pin" || return 1
    wheel="$(echo "$wheels"/torch-*)"
    case "$wheel" in
    *+* | *%2B*) _pip install "$wheel" ;;
    *) _pip install --require-hashes --no-deps --find-links "$wheels" -r "$_root/requirements-torch.txt" ;;
    esac && rm -rf "$wheels"
}

_install() {
    local files=(-r "$_root/requirements.txt") extra
    if [ "${1:-}" = --dev ]; then
        files+=(-r "$_root/requirements-dev.txt")
    else
        for extra in $(_extras); do files+=(-r "$_root/requirements-$extra.txt"); done
    fi
    _pip install --require-hashes --no-deps "${files[@]}" && _install_torch &&
        _pip install --no-deps --no-build-isolation -e "$_root"
}

_extras() { cat "$_venv/extras" 2>/dev/null; }

_has_extra() { [ "$(_recorded)" = "$(_asked --dev)" ] || _extras | grep -qx "$1"; }

# Whether $PYTHON is the `.venv` that a set-up has made. Another environment is its owner's, and nothing is installed into it.
_is_own() { [ "$(dirname "$(dirname "$PYTHON")")" = "$_venv" ] && [ -n "$(_recorded)" ]; }

# Installs the packages of an extra, by version and hash, into the `.venv` of a set-up.
_add_extra() {
    (
        "$PYTHON" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)' 2>/dev/null ||
            echo "warning: no locks on this file system; start no second set-up before this one ends" >&2
        if _has_extra "$1"; then exit 0; fi
        echo "This configuration needs the packages of requirements-$1.txt: installing them into .venv (once)" >&2
        _pip install --require-hashes --no-deps -r "$_root/requirements-$1.txt" ||
            { echo "error: they could not be installed (see above)" >&2; exit 1; }
        echo "$1" >>"$_venv/extras" || exit 1
        echo "Installed." >&2
    ) 9>"$_root/.venv.lock"
}

_make_venv() {
    local base recorded asked
    base="$(_base_python)" || return 1
    recorded="$(_recorded)"
    asked="$(_asked "$@")"
    if [ "$recorded" = "$(_asked --dev)" ]; then asked="$recorded"; fi # a broken one keeps what it had
    if [ -z "$recorded" ] || [ "$recorded" = unfinished ] || [ "$recorded" = "$asked" ] ||
        ! "$_venv/bin/python" -c 'import pip' 2>/dev/null; then
        rm -rf "$_venv"
    fi
    echo "One-time set-up: installing its requirements into .venv (some minutes)" >&2
    mkdir -p "$_venv" && echo unfinished >"$_venv/set-up" || return 1
    [ -x "$_venv/bin/python" ] || "$base" -m venv "$_venv" || return 1
    if [ "$asked" = "$(_asked --dev)" ]; then _install --dev; else _install; fi || { echo "error: the set-up failed (see above)" >&2; return 1; }
    echo "$asked" >"$_venv/set-up.new" && mv "$_venv/set-up.new" "$_venv/set-up" || return 1
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
    if _usable "$@"; then return 0; fi
    # Of two commands started at once, the second must wait until the first has installed `.venv`. Python locks, as macOS
    # has no flock command; the lock belongs to the open file, and so lasts until this subshell ends.
    (
        [ -z "$active" ] || "$active" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)' 2>/dev/null ||
            echo "warning: no locks on this file system; start no second set-up before this one ends" >&2
        _usable "$@" || _make_venv "$@"
    ) 9>"$_root/.venv.lock" || return 1
    _has_requirements "$PYTHON" "$@" || { echo "error: .venv still lacks a requirement; delete it and try again" >&2; return 1; }
}

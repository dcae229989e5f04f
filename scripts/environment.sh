# Sourced by run_all.sh and run_tests.sh: finds or makes the Python environment of requirements.lock.
#
#   PYTHON=...          the interpreter to build with (3.11 or newer), or with --no-install the one to run with
#   BACKDOOR_VENV=dir   where the environment lives (default: .venv beside run_all.sh)
#   --no-install        install nothing: run with $PYTHON, else the environment if there is one, else python3
#
# `dir/backdoor-erasure.lock` tells in which state an environment is: empty from before its first file until after its
# last, then the SHA-256 of the lock it was made from. An environment made by hand is completed in place; from then on
# it is treated like the others: made anew when requirements.lock changes or an installation was cut short.

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $*"; exit 2; }

# Sets `python` (the interpreter to run) and `arguments` (what is left of the command line).
# usage: prepare_environment ROOT run|test [ARGUMENT...]
prepare_environment() {
    local root=$1 purpose=$2 venv="${BACKDOOR_VENV:-$1/.venv}" install=yes argument
    shift 2
    arguments=()
    for argument in "$@"; do
        if [[ $argument == --no-install ]]; then install=no; else arguments+=("$argument"); fi
    done
    # run_tests.sh changes directory before it uses these.
    [[ $venv == /* ]] || venv="$PWD/$venv"
    if [[ $install == yes && " ${arguments[*]-} " =~ \ (-h|--help)\  ]] && ! environment_ready "$root" "$venv"; then
        brief_help "$root" "$purpose"
        exit 0
    fi
    if [[ ${PYTHON:-} == */* && $PYTHON != /* ]]; then PYTHON="$PWD/$PYTHON"; fi
    if [[ $install == no ]]; then
        use_python_at_hand "$venv" "$purpose"
    else
        python="$venv/bin/python"
        environment_ready "$root" "$venv" || build_environment "$root" "$venv"
    fi
}

# What can be said before there is an environment to say more: nobody wants several GB for an answer.
brief_help() {
    sed -n '/^# Runs/,/^[^#]/s/^# //p' "$0"
    if [[ $2 == run ]]; then sed -n '/^| option/,/^$/p' "$1/README.md"; fi
    echo "(in full once the environment is there, which any command without --help makes)"
}

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

use_python_at_hand() {
    local venv=$1 purpose=$2 modules="torch torchvision numpy scipy matplotlib seaborn click pandas jinja2 sklearn
        safetensors tqdm PIL transformers"
    if [[ $purpose == test ]]; then modules+=" pytest xdist"; fi
    if [[ -n ${PYTHON:-} ]]; then python=$PYTHON
    elif [[ -x $venv/bin/python ]]; then python="$venv/bin/python"
    else python=python3; fi
    is_recent "$python" || fail "$python is not Python 3.11 or newer; set PYTHON=... to one that is"
    # shellcheck disable=SC2086  # one argument per module
    "$python" -P - $modules >&2 <<'PYTHON' || exit 2
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        reason = " ".join(str(error).split())
        sys.exit(f"error: {sys.executable} cannot import {name} ({reason}); leave out --no-install to have it installed")
PYTHON
}

# Complete, made from today's lock, still runnable, and of the version PYTHON asks for.
environment_ready() {
    local root=$1 venv=$2 wanted=""
    [[ -x $venv/bin/python && -f $venv/backdoor-erasure.lock ]] || return 1
    if [[ -n ${PYTHON:-} ]]; then wanted=$("$PYTHON" -c "$version_code" 2>/dev/null) || return 1; fi
    [[ $("$venv/bin/python" -c "$state_code" "$root/requirements.lock" "$wanted" 2>/dev/null) \
        == "$(cat "$venv/backdoor-erasure.lock")" ]]
}
version_code='import sys; print("%d.%d" % sys.version_info[:2])'
state_code='
import hashlib, sys
lock, wanted = sys.argv[1:]
if wanted in ("", "%d.%d" % sys.version_info[:2]):
    print(hashlib.sha256(open(lock, "rb").read()).hexdigest())'

build_environment() {
    local root=$1 venv=$2 base="" by_hand=no candidate marker
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python; do
        if is_recent "$candidate"; then base=$candidate; break; fi
        [[ -z ${PYTHON:-} ]] || fail "PYTHON=$PYTHON is not Python 3.11 or newer"
    done
    [[ -n $base ]] || fail "Python 3.11 or newer is needed and none was found; install it or set PYTHON=..."
    marker="$venv/backdoor-erasure.lock"
    if [[ ! -f $marker ]]; then
        if [[ -f $venv/pyvenv.cfg ]]; then by_hand=yes
        # Asked again after the listing: another first run may have begun in between, and its marker comes first.
        elif [[ -e $venv && -n $(ls -A "$venv") && ! -f $marker ]]; then
            fail "$venv is not a Python environment; remove it or set BACKDOOR_VENV=... to another place"
        fi
    fi
    mkdir -p "$venv" || fail "cannot create $venv"

    # The lock is taken by Python because flock(1) is not everywhere. It belongs to descriptor 9, shared by this shell
    # and its pip: a killed run releases it, and an installation still going on keeps it.
    exec 9>>"$marker"
    if ! "$base" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null; then
        say "Waiting for another run that is installing into $venv ..."
        "$base" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
    fi
    environment_ready "$root" "$venv" || install_lock "$root" "$venv" "$base" "$by_hand"
    exec 9>&-
}

install_lock() {
    local root=$1 venv=$2 base=$3 by_hand=$4 pip
    say "Installing requirements.lock into $venv (several GB, mostly torch; about 2 minutes on a fast connection) ..."
    : > "$venv/backdoor-erasure.lock"
    pip=("$venv/bin/python" -m pip)
    if [[ $by_hand == no ]]; then
        find "$venv" -mindepth 1 -maxdepth 1 ! -name backdoor-erasure.lock -exec rm -rf {} +
        if ! "$base" -m venv "$venv" >/dev/null 2>&1; then
            # Debian's Python has no ensurepip: the pip outside then installs into the environment.
            "$base" -m venv --without-pip "$venv" || fail "$base -m venv $venv failed"
            pip=("$base" -m pip --python "$venv/bin/python")
        fi
    fi
    if ! "${pip[@]}" install --quiet --disable-pip-version-check --no-input --progress-bar off --only-binary :all: \
        --require-hashes -r "$root/requirements.lock" >&2; then
        say "error: the installation failed, see above; run the command again to retry"
        exit 1
    fi
    "$venv/bin/python" -c "$state_code" "$root/requirements.lock" "" > "$venv/backdoor-erasure.lock"
}

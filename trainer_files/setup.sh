#!/usr/bin/env bash
# Creates the virtual environment .venv and installs the requirements:
#   bash trainer_files/setup.sh          for training and evaluation
#   bash trainer_files/setup.sh dev      for the tests too
# Later calls return at once unless the requirements changed. PYTHON_BIN picks the
# interpreter (Python 3.10 to 3.14). A torch already in .venv is kept if it fits.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case ${1:-} in
    ''|dev) ;;
    --help|-h) sed -n '2,6s/^# //p' trainer_files/setup.sh; exit 0 ;;
    *) echo "error: unknown argument '$1'; give dev or nothing" >&2; exit 2 ;;
esac
requirements=requirements.txt
[ "${1:-}" = dev ] && requirements=requirements-dev.txt
stamp=.venv/.$(cat requirements*.txt | cksum | cut -d' ' -f1)-$requirements
ready() { [ -e "$stamp" ] || [ -e "${stamp%requirements*}requirements-dev.txt" ]; }     # dev has everything
ready && exit 0

candidates=(python3.12 python3.11 python3.13 python3.14 python3.10 python3)
[ -z "${PYTHON_BIN:-}" ] || candidates=("$PYTHON_BIN")
test='import sys; print("fits" if (3, 10) <= sys.version_info[:2] <= (3, 14) else "it is " + sys.version.split()[0])'
python= said=
for candidate in "${candidates[@]}"; do
    said=$("$candidate" -c "$test" 2>&1) || true
    if [ "$said" = fits ]; then python=$candidate; break; fi
done
if [ -z "$python" ] && [ -n "${PYTHON_BIN:-}" ]; then
    said=$(head -n 1 <<< "${said#trainer_files/setup.sh: line [0-9]*: }")
    echo "error: PYTHON_BIN=$PYTHON_BIN does not start Python 3.10 to 3.14${said:+ ($said)}; name one that does, or leave it out" >&2
    exit 2
fi
if [ -z "$python" ]; then
    echo "error: no Python 3.10 to 3.14 found; install one (Debian, Ubuntu: apt install python3 python3-venv) or set PYTHON_BIN" >&2
    exit 2
fi

if command -v flock > /dev/null; then       # several jobs or machines may come here at once
    exec 9>> .venv.lock
    flock -n 9 || { echo "== waiting: another process makes .venv"; flock 9 || true; }      # or there are no locks
    ready && exit 0
fi
if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
    echo "== making .venv with $("$python" --version)"
    if ! "$python" -m venv --clear .venv; then
        rm -rf .venv
        echo "error: $python cannot make a virtual environment; on Debian or Ubuntu: apt install python3-venv" >&2
        exit 2
    fi
fi
echo "== installing $requirements into .venv (several GB and some minutes the first time)"
quiet=(--quiet)
[ ! -t 1 ] || quiet=()      # in a terminal, pip shows its progress
# visdom 0.2, the last version for Python 3.10 and 3.11, comes as source; building it needs pkg_resources, which
# newer setuptools no longer have.
.venv/bin/python -m pip install ${quiet[@]+"${quiet[@]}"} --disable-pip-version-check 'setuptools>=77,<81' wheel
.venv/bin/python -m pip install ${quiet[@]+"${quiet[@]}"} --disable-pip-version-check --no-build-isolation -r "$requirements"
touch "$stamp"
echo "== ready: $(.venv/bin/python -c 'import torch; print("torch", torch.__version__, "with", torch.cuda.device_count(), "CUDA devices")')"

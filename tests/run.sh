#!/usr/bin/env bash
# Runs the tests; installs what they need into .venv the first time.
#   bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash trainer_files/setup.sh dev
echo "== running the tests, two at a time"
exec env OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist worksteal "$@"

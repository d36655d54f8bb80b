#!/usr/bin/env bash
# What only a GPU can show, within 9 minutes: bash benchmarks/gpu.sh [DIR] [--real DIR] [--rehearse]
# Each part has a time limit, the most valuable come first, and each result goes to DIR/gpu.jsonl at
# once, so a run that is stopped early keeps what it had. --real: folder of the small real data.
# --rehearse: tiny, on the CPU, to try the script.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1:-} in ''|--*) out=runs/gpu ;; *) out=$1; shift ;; esac
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
[ ! -s "$out/gpu.jsonl" ] || { echo "error: $out/gpu.jsonl holds figures; name another folder" >&2; exit 2; }

# part SECONDS ARGUMENTS...: one part, ended when its time is up.
part() {
    local seconds=$1
    shift
    case " $* " in *" --rehearse "*) seconds=1000 ;; esac
    echo "== $1 (at most $seconds s)"
    timeout --signal=TERM --kill-after=5 "$seconds" "$python" -m benchmarks.gpu "$@" --out "$out"
    local status=$?
    [ $status -eq 0 ] || echo "{\"part\": \"$1\", \"name\": \"ended\", \"failed\": \"exit status $status after at most $seconds s\"}" >> "$out/gpu.jsonl"
}

mkdir -p "$out"
part 110 smoke "$@"
part 150 speed "$@"
part 30 loading "$@"
part 45 repeat "$@"
part 150 compiled "$@"
part 50 sequence "$@"
"$python" -m benchmarks.gpu table --out "$out" | tee "$out/gpu.txt"
if grep -q '"failed"' "$out/gpu.jsonl"; then exit 1; fi

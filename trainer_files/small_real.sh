#!/usr/bin/env bash
# Learns cityscapes, camvid and idd-lite one after another on small real data, with the method and
# with fine-tuning:
#   bash trainer_files/small_real.sh DATA [NAME=value ...]
here=$(dirname "${BASH_SOURCE[0]}")/..
[ -e "$here/train.py" ] || here=${SLURM_SUBMIT_DIR:-.}      # sbatch runs a copy
[ -e "$here/train.py" ] || { echo "error: no train.py in $here: call sbatch in the folder that holds it" >&2; exit 2; }
cd "$here"
export DOMAINS=${DOMAINS:-cityscapes camvid idd-lite} OUT=${OUT:-runs/small_real} HEIGHT=${HEIGHT:-128}
export EPOCHS=${EPOCHS:-60 12 7} WORKERS=${WORKERS:-0}
case ${1:-} in ''|-*|*=*) ;; *) export DATA=$1; shift ;; esac
METHODS=${METHODS:-mdil fine-tune}
source trainer_files/common.sh
read_arguments "Trains on three small real domains, with the method and with fine-tuning; results in $OUT." "$@"

compared=()
for method in $METHODS; do
    echo "== $method: $DOMAINS, one after another"
    learn_sequence "$method" --method "$method"
    compared+=("$method=$OUT/$method")
done
run "$PYTHON" -m mdil compare "${compared[@]}" "${data[@]}" --out "$OUT"

#!/usr/bin/env bash
# The fastest known way to a stated mIoU on one domain, from random weights, on two processor
# cores. docs/record.md lists its history. SEED=1, 2, ... repeats it with other seeds.
here=$(dirname "${BASH_SOURCE[0]}")/..
[ -e "$here/train.py" ] || here=${SLURM_SUBMIT_DIR:-.}      # sbatch runs a copy
[ -e "$here/train.py" ] || { echo "error: no train.py in $here: call sbatch in the folder that holds it" >&2; exit 2; }
cd "$here"
export DATA=${DATA:-runs/speedrun/data} OUT=${OUT:-runs/speedrun} DOMAINS=${DOMAINS:-cityscapes} HEIGHT=${HEIGHT:-64}
export BATCH=${BATCH:-3} WORKERS=${WORKERS:-0} EPOCHS=${EPOCHS:-8} RECIPE=${RECIPE:-fast}
export TRAIN_ARGS=${TRAIN_ARGS:---class-weights computed --val-every 1000}
source trainer_files/common.sh
read_arguments "Trains one network the fastest way we know; results in $OUT/seed$SEED." "$@"

if [ "$DATA" = runs/speedrun/data ] && [ ! -e "$DATA" ]; then
    run "$PYTHON" -m mdil toy-roads --out "$DATA" --train 400 --val 100 --height "$HEIGHT" --width "$WIDTH"
fi
SECONDS=0
run_train "$OUT/seed$SEED" "$(epochs_of 1)" --domains "$DOMAINS" ${first[@]+"${first[@]}"}
[ -n "$DRY_RUN" ] || echo "== $SECONDS seconds, including startup and validation"

#!/usr/bin/env bash
# A demo on synthetic roads that the project draws itself: learns three domains one after another
# with the method and with plain fine-tuning, and shows what each forgets.
here=$(dirname "${BASH_SOURCE[0]}")/..
[ -e "$here/train.py" ] || here=${SLURM_SUBMIT_DIR:-.}      # sbatch runs a copy
[ -e "$here/train.py" ] || { echo "error: no train.py in $here: call sbatch in the folder that holds it" >&2; exit 2; }
cd "$here"
export DATA=${DATA:-runs/demo/data} OUT=${OUT:-runs/demo} HEIGHT=${HEIGHT:-64} WORKERS=${WORKERS:-0}
# Small batches and a higher learning rate than the published 5e-4 partly make up for the few epochs.
export EPOCHS=${EPOCHS:-9 4 3} BATCH=${BATCH:-3} EVALUATE=${EVALUATE:-last}
export TRAIN_ARGS=${TRAIN_ARGS:---lr 2e-3 --class-weights computed --val-every 2}
source trainer_files/common.sh
read_arguments "Trains on three toy domains, with the method and with fine-tuning; results in $OUT." "$@"

echo "== drawing the toy roads into $DATA"
run "$PYTHON" -m mdil toy-roads --out "$DATA" --train 96 --val 24 --height "$HEIGHT" --width "$WIDTH"
for method in mdil fine-tune; do
    echo "== $method: $DOMAINS, one after another"
    learn_sequence "$method" --method "$method"
done
echo "== comparing"
run "$PYTHON" -m mdil compare "mdil=$OUT/mdil" "fine-tune=$OUT/fine-tune" "${data[@]}" --out "$OUT"

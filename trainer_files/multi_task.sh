#!/usr/bin/env bash
#SBATCH --job-name=multi-task
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# Joint training on all DOMAINS at once.
here=$(dirname "${BASH_SOURCE[0]}")/..
[ -e "$here/train.py" ] || here=${SLURM_SUBMIT_DIR:-.}      # sbatch runs a copy
[ -e "$here/train.py" ] || { echo "error: no train.py in $here: call sbatch in the folder that holds it" >&2; exit 2; }
cd "$here"
source trainer_files/common.sh
read_arguments "Trains on all DOMAINS together (multi-task); results in OUT/multi-task." "$@"
set_metric
# shellcheck disable=SC2086
run_train "$OUT/multi-task/all" "$(epochs_of 1)" --method multi-task --domains $DOMAINS ${first[@]+"${first[@]}"}
evaluate_states "$OUT/multi-task/results.json" "$(state_of "$OUT/multi-task/all")"
write_report "$OUT/multi-task"

#!/usr/bin/env bash
#SBATCH --job-name=single-task
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# Trains a separate network for each of DOMAINS: the baseline of Delta_m%.
here=$(dirname "${BASH_SOURCE[0]}")/..
[ -e "$here/train.py" ] || here=${SLURM_SUBMIT_DIR:-.}      # sbatch runs a copy
[ -e "$here/train.py" ] || { echo "error: no train.py in $here: call sbatch in the folder that holds it" >&2; exit 2; }
cd "$here"
source trainer_files/common.sh
read_arguments "Trains a separate network for each of DOMAINS (single-task); results in OUT/single-task." "$@"
set_metric
check_data "$OUT/single-task"
step=0
for domain in $DOMAINS; do
    step=$((step + 1))
    run_train "$OUT/single-task/$domain" "$(epochs_of $step)" --method single-task --domains "$domain" \
        ${first[@]+"${first[@]}"}
    evaluate_states "$OUT/single-task/$domain/results.json" "$(state_of "$OUT/single-task/$domain")"
    write_report "$OUT/single-task/$domain"
done

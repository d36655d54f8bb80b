#!/usr/bin/env bash
#SBATCH --job-name=multi-task
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# Joint training on all DOMAINS at once, by every method of METHODS.
here=$(dirname "${BASH_SOURCE[0]}")/..
[ -e "$here/train.py" ] || here=${SLURM_SUBMIT_DIR:-.}      # sbatch runs a copy
[ -e "$here/train.py" ] || { echo "error: no train.py in $here: call sbatch in the folder that holds it" >&2; exit 2; }
cd "$here"
source trainer_files/common.sh
METHODS=${METHODS:-multi-task}
read_arguments "Trains on all DOMAINS together by every method of METHODS=\"$METHODS\" (multi-task-mixed, ...); results in OUT/<method>." "$@"
[ -n "${METHODS// /}" ] || refuse "METHODS is empty: name methods, such as multi-task-mixed"
for method in $METHODS; do
    case $method in multi-task*) ;; *) refuse "METHODS: $method learns one domain after another; use multi-task-mixed or another multi-task" ;; esac
done
case $EPOCHS in *[0-9]\ *[0-9]*) refuse "EPOCHS=\"$EPOCHS\": all domains train together; give one number" ;; esac
set_metric
for method in $METHODS; do
    [ -e "$OUT/$method/all/opts.json" ] || check_data "$OUT/$method"
    # shellcheck disable=SC2086
    run_train "$OUT/$method/all" "$(epochs_of 1)" --method "$method" --domains $DOMAINS ${first[@]+"${first[@]}"}
    evaluate_states "$OUT/$method/results.json" "$(state_of "$OUT/$method/all")"
    write_report "$OUT/$method"
done

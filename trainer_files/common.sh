# Shared by the scripts of this folder: settings from the environment, sequences of steps.
# Sourced, not run.
set -euo pipefail

DATA=${DATA:-data}                              # --data-root
OUT=${OUT:-runs}                                # results go to $OUT/<name>/
DOMAINS=${DOMAINS:-cityscapes BDD IDD}          # in the order learnt
EPOCHS=${EPOCHS:-}                              # one number, or one for each domain; else train.py's
BATCH=${BATCH:-6}
HEIGHT=${HEIGHT:-512}
WIDTH=${WIDTH:-$((2 * HEIGHT))}
SEED=${SEED:-0}
GPUS=${GPUS:-1}                                 # more than 1: torchrun
WORKERS=${WORKERS:-4}
EVALUATE=${EVALUATE:-every}                     # after every step, or after the last
ENCODER=${ENCODER:-}                            # ImageNet encoder for the first step
RECIPE=${RECIPE:-}                              # --recipe of train.py
SELECT=${SELECT:-best}                          # epoch that is evaluated and gone on from: best or last
METRIC=${METRIC:-}                              # plain or published mIoU of eval.py; else by the recipe
TRAIN_ARGS=${TRAIN_ARGS:-}                      # further options of train.py
DRY_RUN=${DRY_RUN:-}

settings_help="Settings, from the environment (NAME=value bash $0) or as arguments (NAME=value):
  DATA=$DATA  OUT=$OUT  DOMAINS=\"$DOMAINS\"  EPOCHS=\"${EPOCHS:-150}\"  BATCH=$BATCH
  HEIGHT=$HEIGHT  WIDTH=$WIDTH  SEED=$SEED  GPUS=$GPUS  WORKERS=$WORKERS  ENCODER=$ENCODER
  RECIPE=${RECIPE:-corrected} (or released)  SELECT=$SELECT (or last)  METRIC=${METRIC:-plain, or published with --recipe released}
  EVALUATE=$EVALUATE (every: after every step; last: after the last)  TRAIN_ARGS=\"$TRAIN_ARGS\"
  PYTHON  interpreter (default: .venv/bin/python, made by trainer_files/setup.sh)
Options: --help, --dry-run (prints the commands), --recipe NAME (as RECIPE=NAME). Steps already finished are skipped, a
broken one goes on where it stopped. Runs as it is, or under SLURM: sbatch [options] $0"

# Reads NAME=value arguments, --dry-run and --help; $1: what the script does.
read_arguments() {
    local about=$1 argument
    shift
    while [ $# -gt 0 ]; do
        argument=$1
        shift
        case $argument in
            --recipe) RECIPE=${1-none}; shift $(($# > 0)) ;;
            --recipe=*) RECIPE=${argument#*=} ;;
            --help|-h) printf '%s\n\n%s\n' "$about" "$settings_help"; exit 0 ;;
            --dry-run) DRY_RUN=1 ;;
            DATA=*|OUT=*|DOMAINS=*|EPOCHS=*|BATCH=*|HEIGHT=*|SEED=*|GPUS=*|WORKERS=*|EVALUATE=*|ENCODER=*|RECIPE=*|SELECT=*|METRIC=*|TRAIN_ARGS=*|PYTHON=*|METHODS=*|RECIPES=*)
                printf -v "${argument%%=*}" '%s' "${argument#*=}"
                [ "${argument%%=*}" = HEIGHT ] && WIDTH=$((2 * HEIGHT)) ;;
            WIDTH=*) WIDTH=${argument#*=} ;;
            *) echo "error: unknown argument '$argument'; --help lists them" >&2; exit 2 ;;
        esac
    done
    check_words
    [ -n "${PYTHON:-}" ] || { [ -n "$DRY_RUN" ] && PYTHON=python; } || { bash trainer_files/setup.sh && PYTHON=.venv/bin/python; }
}

# Refuses settings that are none of their words.
check_words() {
    case $RECIPE in ''|corrected|released) ;; *) echo "error: --recipe $RECIPE is not corrected or released" >&2; exit 2 ;; esac
    case $SELECT in best|last) ;; *) echo "error: SELECT=$SELECT is not best or last" >&2; exit 2 ;; esac
    case $METRIC in ''|plain|published) ;; *) echo "error: METRIC=$METRIC is not plain or published" >&2; exit 2 ;; esac
}

# Prints a command and, unless it is a dry run, runs it. A signal (SLURM's early warning,
# Ctrl-C, kill) is passed on; train.py then finishes its batch, saves and ends, and so does
# the script with status 75. Under SLURM the job is put back into the queue.
run() {
    printf '+'; printf ' %q' "$@"; printf '\n'
    [ -z "$DRY_RUN" ] || return 0
    local child status=0 signalled=
    "$@" &
    child=$!
    trap 'signalled=1; pass_signal USR1 $child' USR1
    trap 'signalled=1; pass_signal TERM $child' TERM INT
    while :; do
        status=0
        wait "$child" || status=$?
        kill -0 "$child" 2>/dev/null || break
    done
    trap - USR1 TERM INT
    if [ -n "$signalled" ]; then
        if [ -n "${SLURM_JOB_ID:-}" ] && command -v scontrol > /dev/null; then
            echo "== interrupted; back into the queue"
            scontrol requeue "$SLURM_JOB_ID"
        fi
        exit 75
    fi
    [ "$status" -eq 0 ] || exit "$status"
}

# Several processes: the launcher's children take the signal, the launcher itself would die of it.
pass_signal() {
    if [ "$GPUS" -gt 1 ]; then pkill -USR1 -P "$2" || true; else kill -"$1" "$2" 2>/dev/null || true; fi
}

# One step: run_train SAVEDIR EPOCHS ARGUMENTS...; without EPOCHS, as many as train.py does.
run_train() {
    local savedir=$1 epochs=$2
    shift 2
    local launcher=("$PYTHON")
    [ "$GPUS" -gt 1 ] && launcher=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$GPUS")
    # shellcheck disable=SC2086
    run "${launcher[@]}" train.py --savedir "$savedir" ${epochs:+--num-epochs "$epochs"} --batch-size "$BATCH" \
        --data-root "$DATA" --height "$HEIGHT" --width "$WIDTH" --seed "$SEED" --num-workers "$WORKERS" --resume \
        ${RECIPE:+--recipe "$RECIPE"} "$@" $TRAIN_ARGS
}

# The file of a step that counts: state_of SAVEDIR.
state_of() {
    if [ "$SELECT" = last ]; then echo "$1/checkpoint.pth.tar"; else echo "$1/model_best.pth.tar"; fi
}

# Sets the metric of what is trained with the arguments "$@": METRIC, or that of the recipe.
set_metric() {
    metric=()
    case "${METRIC:-by recipe} $* ${RECIPE:+--recipe $RECIPE} $TRAIN_ARGS " in
        plain*|*' --no-published-metric '*) ;;
        published*|*' --recipe released '*|*' --published-metric '*) metric=(--published-metric) ;;
    esac
}

# Epochs of step $1: the only number of EPOCHS, or the step's own.
epochs_of() {
    local all
    [ -n "$EPOCHS" ] || return 0
    read -ra all <<< "$EPOCHS"
    echo "${all[$((${#all[@]} == 1 ? 0 : $1 - 1))]}"
}

# A method's whole sequence over DOMAINS into $OUT/$1, evaluated as EVALUATE says:
# learn_sequence NAME ARGUMENTS-OF-TRAIN...
learn_sequence() {
    local name=$1 step=0 domain savedir states=() learnt=() start=()
    shift
    set_metric "$@"
    for domain in $DOMAINS; do
        step=$((step + 1))
        learnt+=("$domain")
        savedir=$OUT/$name/step$step-$domain
        start=()
        [ "$step" -eq 1 ] && [ -n "$ENCODER" ] && start=(--state "$ENCODER")
        [ "$step" -gt 1 ] && start=(--state "${states[-1]}")
        run_train "$savedir" "$(epochs_of $step)" --domains "${learnt[@]}" "${start[@]}" "$@"
        states+=("$(state_of "$savedir")")
        [ "$EVALUATE" = last ] || evaluate_states "$OUT/$name/results.json" "${states[@]}"
    done
    [ "$EVALUATE" != last ] || evaluate_states "$OUT/$name/results.json" "${states[@]}"
    run "$PYTHON" -m mdil report "$OUT/$name" --data-root "$DATA"
}

# Evaluates checkpoints in step order: evaluate_states JSON STATE...
evaluate_states() {
    local json=$1
    shift
    run "$PYTHON" eval.py --state "$@" --data-root "$DATA" --height "$HEIGHT" --width "$WIDTH" \
        --num-workers "$WORKERS" --json "$json" --per-class ${metric[@]+"${metric[@]}"}
}

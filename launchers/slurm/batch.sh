# What every job does, below the lines that `submit` puts before this: CODE, EXCLUDE and EXCLUDED, GRACE and WAIT, CONFIG,
# STATUS (of a training), WORK and PIECE (where its finished pieces lie, and a pattern of their names) and the command in
# "$@". Starts one process per GPU, hands on the wish to stop, and decides what comes after.

id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
id=${id:-$SLURM_JOB_ID}
began=$(date +%s)
say() { echo "$(date -u +%FT%TZ) job $id: $*"; }

# USR1 comes before the time limit, TERM when another job takes the hosts. srun itself would not outlive a TERM.
told= step= code=75
trap 'told=${told:-$SECONDS}; say "told to stop"; kill -USR1 "$step" 2>/dev/null' USR1 TERM

# The finished pieces at the start of every attempt. Three in a row that add none, and the job is held, whoever it was
# that began it again; but for a job that may have nothing to do.
attempts=3
begun=$CODE/../begun_$id
pieces() {
    find "${WORK[@]}" -regextype posix-extended -regex ".*/($PIECE)" -printf '%p %s\n' 2>/dev/null | sort | cksum
}
barren() { [[ -n $PIECE && $(tail -n $attempts "$begun" 2>/dev/null | grep -cxF "$(pieces)") == "$attempts" ]]; }
overrides=("${@:3}") # after `python` and its file
hold() {
    local why="held: $attempts attempts in a row left nothing new in ${WORK[*]}; $1. TIME must hold the start, a piece of \
work and GRACE=$GRACE seconds, and hosts must last as long; the log of job $id tells more. Then submit it again"
    say "$why"
    [[ -n $STATUS ]] && python "$CODE/launchers/slurm/held.py" "$why" "${overrides[@]}"
    exit 1
}

# What a training wrote in this attempt; an older word may be another attempt's.
word() {
    [[ -z $STATUS ]] && return
    python - "$STATUS" "$began" <<'PYTHON' 2>/dev/null
import json, sys
status = json.load(open(sys.argv[1]))
if status["time"] >= float(sys.argv[2]):
    print("lost" if status["cause"] == "lost" else status["state"])
PYTHON
}

again() {
    trap '' TERM USR1 # Slurm ends what it requeues by TERM; what follows is still to be done
    local state
    for _ in {1..30}; do # its controller may be away for minutes
        state=$(squeue --noheader --jobs="$id" --format=%T 2>/dev/null)
        if [[ $state == RUNNING ]]; then
            barren && hold "the last one: $1"
            say "$1: requeued"
            scontrol requeue "$id" && code=0 && break
        elif [[ -n $state ]]; then # cancelled by a person, or requeued by Slurm itself, which noticed first
            say "$1, but Slurm says $state: not requeued here"
            break
        else
            say "$1, but Slurm does not answer"
        fi
        sleep 10
    done
    if [[ -f $EXCLUDE ]]; then
        scontrol update JobId="$id" ExcNodeList="$({ echo "$EXCLUDED"; sed 's/#.*//' "$EXCLUDE"; } | xargs | tr ' ' ',')"
    fi
    exit "$code"
}

# This script runs on the first host, as rank 0 does.
MASTER_ADDR=$(hostname)
MASTER_PORT=$(python -c 'import socket; print(socket.create_server(("", 0)).getsockname()[1])')
export MASTER_ADDR MASTER_PORT PYTHONPATH=$CODE TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$GRACE
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it from sbatch
fi

barren && hold "Slurm itself began it again"
pieces >>"$begun"
say "start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST: $CONFIG" # not the command, which may hold secrets
# A process that ends leaves the others time to say why and on which host: they are not killed at once.
srun --mpi=none --kill-on-bad-exit=0 --wait="$WAIT" bash "$CODE/launchers/slurm/task.sh" "$@" &
step=$!
[[ -n $told ]] && kill -USR1 "$step" # told before there was anybody to tell
while kill -0 "$step" 2>/dev/null; do
    if [[ -z $told ]]; then
        wait "$step" # a signal ends `wait`, not the step
    elif ((SECONDS - told > GRACE - 30)) && [[ $(word) == preempted ]]; then
        again "preempted" # it has saved: whatever W&B and alerts still wait for, there is no time left
    else
        sleep 2
    fi
done
wait "$step"
code=$?
trap '' TERM USR1

word=$(word)
say "ended with $code, status.json says '$word'"
[[ $code == 0 || $word == finished || $word == stopped ]] && exit 0
[[ $word == preempted || (-z $STATUS && $code == 75) ]] && again "preempted"
# A training that still says that it runs has lost rank 0, which would have said otherwise.
[[ $word == lost || $word == running ]] && again "a process is lost"
# 138 and 143: USR1 and TERM met a process that did not listen yet, and had nothing to save.
[[ -z $word ]] && [[ -n $told || $code == 138 || $code == 143 ]] && again "told to stop before it began"
timeout --signal=KILL 60 srun --mpi=none --overlap --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 true || again "a host is lost"
exit "$code"

#!/usr/bin/env bash
# Trains on a Cloud TPU VM slice (one host or a pod), from any machine with gcloud:
#
#     export TPU_NAME=cmd ZONE=us-east5-b          # and PROJECT, if it is not gcloud's default
#     export SLICE="--accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e --spot"
#     ./launch/tpu_pod.sh create                   # asks for the slice, and waits for it
#     ./launch/tpu_pod.sh setup                    # copies this checkout to ~/cmd_jax of every worker, and installs it
#     ./launch/tpu_pod.sh start train --config=ucf101:autoencoder --workdir=gs://my-bucket/runs/ucf101
#     ./launch/tpu_pod.sh logs                     # the last lines of every worker
#     ./launch/tpu_pod.sh stop                     # every worker saves and ends; the same `start` resumes
#     ./launch/tpu_pod.sh delete
#     ./launch/tpu_pod.sh keep train --config=...  # create, setup, start: again after each preemption, until the end
#
# SLICE holds flags of `gcloud compute tpus queued-resources create`, like --spot, --service-account, --network.
# The workdir is in a bucket (gs://, s3://), for which that service account has the rights (docs/many-devices.md), or in
# a folder that all workers share under one path (Filestore or other NFS). EXTRAS=tpu,s3 for s3:// (default tpu,gcs).
# `start` leaves one supervisor (launch/local.py) running on each worker. When a process dies, all supervisors notice
# within processes.peer_timeout and start theirs again, RESTARTS times at most (default 3); STEP_TIMEOUT=SECONDS ends a
# job without progress. After a slice was remade, or its machines started anew, it needs `setup` and `start` again:
# `keep` does that, until the job ends by itself or by `stop`, and looks every POLL seconds (default 60). Ctrl-C ends it
# alone; called again, it goes on with what runs.
# PYTHON names a Python >= 3.11 on the workers, and PREPARE is what `setup` runs on each first: images with Ubuntu 22.04
# have 3.10, and there PYTHON=python3.12 needs a PREPARE that installs it (docs/many-devices.md has one).
# Several workers need your SSH key in an agent (ssh-add).
#
# Preemption and maintenance, by the documentation of Compute Engine and systemd (Cloud TPU's own says no more than that
# the slice goes): a machine is asked by ACPI to shut down, at best 30 s before it is off (not spot: 120 s), and systemd
# sends SIGTERM to all processes at once. So training saves, where its last step and the save take less, and nothing has
# to ask the metadata server.
#
# Tried: its syntax, its error messages and, with a stand-in for gcloud, the commands it sends, a preemption and the
# restart after it; gcloud 528 takes the flags. Never run on a TPU.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "$1" >&2; exit 2; }
say() { echo "$(date +%H:%M:%S) $1"; }

action="${1:-}"
case "$action" in
    create | setup | logs | stop | delete) [ $# -eq 1 ] || fail "argument=$2: not used with $action; leave it out" ;;
    start | keep) shift ;;
    *) fail "argument=$action: not known; use create, setup, start, logs, stop, keep or delete (see the head of $0)" ;;
esac
needed=(TPU_NAME ZONE)
case "$action" in create | keep) needed+=(SLICE) ;; esac
for name in "${needed[@]}"; do
    [ -n "${!name:-}" ] || fail "$name=: missing; set it, as the head of $0 shows"
done
case "$action" in start | keep)
    [[ " $* " == *" --config="* ]] || fail "--config=: missing; write $0 $action train --config=... --workdir=..."
    workdir="$(printf '%s\n' "$@" | sed -n 's/^--workdir=//p' | tail -n 1)"
    [[ "$workdir" =~ ^(/|(gs|s3)://[^/]) ]] ||
        fail "--workdir=$workdir: not a place that all workers share; give gs://BUCKET/..., s3://BUCKET/... or /..."
esac
place=("--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})
poll="${POLL:-60}"
command -v gcloud > /dev/null || fail "gcloud=: not found; install the Google Cloud CLI"

alive=-oServerAliveInterval=15  # a machine that vanishes must not hold us for ever
queued() { gcloud compute tpus queued-resources "$@" "${place[@]}"; }
on_all_workers() {
    gcloud compute tpus tpu-vm ssh "$TPU_NAME" --worker=all --command="$1" "${place[@]}" --ssh-flag="$alive"
}
# For the workers. A process number of before the last start of the machine says nothing.
running='running() {
    read -r pid boot < launch.pid && [ "$boot" = "$(cat /proc/sys/kernel/random/boot_id)" ] && kill -0 "$pid"
} 2> /dev/null'

had=""  # whether the slice was there: what fails before is for the user, what fails later is tried again
create() {
    local state
    while :; do
        state="$(queued list --filter="name~/$TPU_NAME\$" --format="value(state.state)")" ||
            { [ -n "$had" ] || exit 2; state=unknown; }
        [ "$state" != ACTIVE ] || { had=1; return; }
        say "$TPU_NAME: ${state:-not there}"
        case "$state" in
            "") queued create "$TPU_NAME" --node-id="$TPU_NAME" $SLICE --async || [ -n "$had" ] || exit 2 ;;
            FAILED | SUSPENDED) queued delete "$TPU_NAME" --force --quiet || true ;;  # SUSPENDED: it was preempted
        esac
        sleep "$poll"
    done
}

setup() {
    local folder code=0
    folder="$(mktemp -d)"
    tar czf "$folder/cmd_jax.tar.gz" --exclude=__pycache__ --exclude=.venv \
        pyproject.toml requirements.txt README.md LICENSE cmd_jax configs launch &&
        gcloud compute tpus tpu-vm scp "$folder/cmd_jax.tar.gz" "$TPU_NAME:" --worker=all "${place[@]}" \
            --scp-flag="$alive" &&
        on_all_workers "set -e; ${PREPARE:-:}; mkdir -p cmd_jax; tar xzf cmd_jax.tar.gz -C cmd_jax; cd cmd_jax
            ${PYTHON:+export PYTHON=$PYTHON;} . launch/install.sh ${EXTRAS:-tpu,gcs}" || code=$?
    rm -r "$folder"
    return "$code"
}

start() {  # runs_already COMMAND...: that is the exit code where something runs already
    local flags="--processes=1 --distributed=auto --restarts=${RESTARTS:-3}" runs_already=$1
    flags+=" ${STEP_TIMEOUT:+--step-timeout=$STEP_TIMEOUT}"
    shift
    # The shell around the supervisor writes down its exit code, but not where the machine shuts down: that ends both.
    on_all_workers "cd cmd_jax || exit 2
        $running
        if running; then echo \"\$(hostname): runs already; stop it first\" >&2; exit $runs_already; fi
        rm -f launch.pid launch.code
        . .venv/bin/activate; . launch/env.sh
        nohup setsid bash -c 'python launch/local.py \"\$@\" &
            echo \$! \$(cat /proc/sys/kernel/random/boot_id) > launch.pid; wait \$!; echo \$? > launch.code' \
            launch $flags -- $(printf '%q ' "$@") > launch.log 2>&1 < /dev/null &
        until [ -s launch.pid ]; do sleep 0.1; done"
}

look() {  # -> how it is on the workers, each answer once: "launch: running", "launch: ended CODE", "launch: gone"
    on_all_workers "$running
        if ! cd cmd_jax 2> /dev/null; then echo launch: gone
        elif running; then echo launch: running
        elif [ -s launch.code ]; then echo launch: ended \$(cat launch.code)
        else echo launch: gone; fi" | grep '^launch: ' | sort -u
}

case "$action" in
    create) create ;;
    setup) setup ;;
    start) start 2 "$@" ;;
    logs) on_all_workers 'cd cmd_jax && echo "== $(hostname)" && tail -n 20 launch.log' ;;
    stop) on_all_workers "$running
        cd cmd_jax && running && kill -TERM \"\$pid\" && echo \"\$(hostname): asked to save and end\"" ;;
    delete) queued delete "$TPU_NAME" --force --quiet ;;
    keep)
        create
        states="launch: gone"
        while :; do
            case "$states" in
                *gone*)
                    if setup && start 0 "$@"; then say "$TPU_NAME: started"
                    else say "$TPU_NAME: not started on all workers yet"; fi ;;
                *running*) ;;
                "") say "$TPU_NAME: not all workers answer" ;;
                *) say "$TPU_NAME: ${states//$'\n'/, }"; exit "${states##* }" ;;
            esac
            sleep "$poll"
            create
            states="$(look)" || states=""
        done
        ;;
esac

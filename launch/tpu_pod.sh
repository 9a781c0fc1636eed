#!/usr/bin/env bash
# Trains on a Cloud TPU VM slice (one host or a pod), from any machine with gcloud:
#
#     export TPU_NAME=cmd ZONE=us-east5-b          # and PROJECT, if it is not gcloud's default
#     ./launch/tpu_pod.sh setup                    # copies this checkout to ~/cmd_jax of every worker, and installs it
#     ./launch/tpu_pod.sh start train --config=configs/ucf101.py:autoencoder --workdir=/mnt/runs/ucf101
#     ./launch/tpu_pod.sh logs                     # the last lines of every worker
#     ./launch/tpu_pod.sh stop                     # every worker saves and ends; the same `start` resumes
#
# Made before: the slice itself (gcloud compute tpus tpu-vm create $TPU_NAME --accelerator-type=... --version=...), and
# a folder that all workers share under one path (Filestore or other NFS), which holds the workdir and the data.
# `start` leaves one supervisor (launch/local.py) running on each worker. When a process dies, all supervisors notice
# within processes.peer_timeout and start theirs again, RESTARTS times at most (default 3); STEP_TIMEOUT=SECONDS ends a
# job without progress. A worker that was preempted or remade needs `setup` and `start` again.
# PYTHON names a Python >= 3.11 on the workers: images with Ubuntu 22.04 have 3.10, so there first install one, like
# python3.12, and set PYTHON=python3.12. Several workers need your SSH key in an agent (ssh-add).
#
# Tried: its syntax, its error messages and, with a stand-in for gcloud, the commands it sends. Never run on a TPU.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "$1" >&2; exit 2; }
on_all_workers() {
    gcloud compute tpus tpu-vm ssh "$TPU_NAME" --worker=all --command="$1" "${place[@]}"
}

action="${1:-}"
case "$action" in
    setup | logs | stop) [ $# -eq 1 ] || fail "argument=$2: not used with $action; leave it out" ;;
    start) shift ;;
    *) fail "argument=$action: not known; use setup, start, logs or stop (see the head of $0)" ;;
esac
for name in TPU_NAME ZONE; do
    [ -n "${!name:-}" ] || fail "$name=: missing; set it, like TPU_NAME=cmd ZONE=us-east5-b $0 $action"
done
place=("--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})
command -v gcloud > /dev/null || fail "gcloud=: not found; install the Google Cloud CLI"

case "$action" in
    setup)
        archive="$(mktemp -d)/cmd_jax.tar.gz"
        trap 'rm -r "$(dirname "$archive")"' EXIT
        tar czf "$archive" --exclude=__pycache__ --exclude=.venv \
            pyproject.toml requirements.txt README.md LICENSE cmd_jax configs launch
        gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:cmd_jax.tar.gz" --worker=all "${place[@]}"
        on_all_workers "set -e; mkdir -p cmd_jax; tar xzf cmd_jax.tar.gz -C cmd_jax; cd cmd_jax
            ${PYTHON:+export PYTHON=$PYTHON;} . launch/install.sh tpu"
        ;;
    start)
        [[ " $* " == *" --config="* ]] || fail "--config=: missing; write $0 start train --config=... --workdir=/..."
        [[ " $* " == *" --workdir=/"* ]] || fail "--workdir=: missing or relative; name a folder that all workers share"
        flags="--processes=1 --distributed=auto --restarts=${RESTARTS:-3} ${STEP_TIMEOUT:+--step-timeout=$STEP_TIMEOUT}"
        on_all_workers "cd cmd_jax || exit 2
            if [ -e launch.pid ] && kill -0 \$(cat launch.pid) 2> /dev/null; then
                echo \"\$(hostname): runs already; stop it first\" >&2; exit 2
            fi
            . .venv/bin/activate; . launch/env.sh
            nohup setsid python launch/local.py $flags -- $(printf '%q ' "$@") > launch.log 2>&1 < /dev/null &
            echo \$! > launch.pid"
        ;;
    logs) on_all_workers 'cd cmd_jax && echo "== $(hostname)" && tail -n 20 launch.log' ;;
    stop) on_all_workers 'cd cmd_jax && kill -TERM "$(cat launch.pid)" && echo "$(hostname): asked to save and end"' ;;
esac

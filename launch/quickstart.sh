#!/usr/bin/env bash
# From nothing to generated videos on a CPU: ./launch/quickstart.sh [--resume | --anew]
# Installs into .venv and shows videos of the shipped weights; then trains the three stages small on generated clips,
# scores them and puts their videos below the shipped ones, in the same gallery. RUN names another folder than
# runs/quickstart, VENV another environment, PYTHON the interpreter to make it with.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$SECONDS
RUN="${RUN:-runs/quickstart}"
choice="${1:-}"
case "$choice" in "" | --resume | --anew) ;; *)
    echo "argument=$choice: not known; use --resume or --anew" >&2
    exit 2 ;;
esac

case "$RUN" in *://*)
    echo "RUN=$RUN: the quickstart is of this machine; cmd-jax train takes --workdir=$RUN" >&2
    exit 2 ;;
esac

if [ -d "$RUN" ]; then
    echo "$RUN is there already:"
    for stage in autoencoder content motion; do
        if [ -e "$RUN/$stage/summary.json" ]; then echo "  $stage: trained"
        elif [ -d "$RUN/$stage/checkpoints" ]; then echo "  $stage: begun"
        else echo "  $stage: not begun"; fi
    done
    [ ! -e "$RUN/index.html" ] || echo "  gallery: $PWD/$RUN/index.html"
    if [ -z "$choice" ] && [ -t 0 ]; then
        read -r -p "Resume it, or start anew (deletes it)? [resume/anew] " answer
        case "$answer" in a | anew) choice=--anew ;; *) choice=--resume ;; esac
    elif [ -z "$choice" ]; then
        echo "resuming it; to start anew: ./launch/quickstart.sh --anew"
    fi
    if [ "$choice" = --anew ]; then
        rm -rf "${RUN:?}"/{autoencoder,content,motion,samples,shipped,index.html,motion.log,probe.jsonl,latents}
    fi
fi

. launch/env.sh
. launch/install.sh ""  # without an argument it would see those of this script
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
installed=$SECONDS
echo "installed after $((installed - started)) s"
gallery() { python -m cmd_jax.report.collect "$RUN/index.html" "$@"; }
is_trained() { [ -e "$RUN/$1/summary.json" ]; }
train=(cmd-jax train --workdir="$RUN")
# A training that was asked to stop saves and exits with 0.
finish() { is_trained "$1" || { echo "stopped; ./launch/quickstart.sh --resume goes on"; exit 0; }; }
# The first N of 48 classes, in an order in which neighbours differ in shape, colour and direction.
classes() { echo "--config.sampling.classes=$(for ((i = 0; i < $1; i++)); do echo $((37 * i % 48)); done | paste -sd,)"; }

beside=""  # the process that trains in the background; Ctrl-C reaches it by itself, and a second signal would end its save
trap 'wait; beside=""; exit 130' INT
trap 'exit 143' TERM
trap '[ -z "$beside" ] || { kill -TERM "$beside" && wait "$beside"; } 2>/dev/null || true' EXIT

echo "== videos of the shipped weights =="
rm -rf "$RUN/samples" "$RUN/shipped"
cmd-jax sample --config=configs/quickstart.py:sample,size=long --workdir="$RUN/shipped" "$(classes 24)"
gallery "$RUN/shipped/samples"
shown=$((SECONDS - installed))
echo "first videos $shown s after the installation: open $PWD/$RUN/index.html"

echo "== training small: autoencoder, then content and motion =="
# XLA spreads few of these small operations over the cores; two devices, half of the batch each, keep both busy.
is_trained autoencoder || XLA_FLAGS="--xla_force_host_platform_device_count=2 ${XLA_FLAGS:-}" \
    "${train[@]}" --config=configs/quickstart.py:autoencoder
finish autoencoder

# The other two need the autoencoder only: side by side, each on half of the cores, they are done sooner.
read -r first second < <(python -c "
import os
cores = sorted(map(str, os.sched_getaffinity(0))) if hasattr(os, 'sched_getaffinity') else []
print(','.join(cores[::2]), ','.join(cores[1::2]))")
if [ -n "$second" ] && ! is_trained content && ! is_trained motion; then
    echo "motion trains in the background and writes to $RUN/motion.log"
    taskset -c "$second" "${train[@]}" --config=configs/quickstart.py:motion > "$RUN/motion.log" 2>&1 &
    beside=$!
    taskset -c "$first" "${train[@]}" --config=configs/quickstart.py:content
    finish content
    code=0
    wait "$beside" || code=$?
    beside=""
    tail -n 1 "$RUN/motion.log"
    [ "$code" = 0 ] || exit "$code"
fi
for stage in content motion; do
    is_trained "$stage" || "${train[@]}" --config="configs/quickstart.py:$stage"
    finish "$stage"
done

echo "== scores of what was trained here =="
cmd-jax evaluate --config=configs/quickstart.py:sample --workdir="$RUN" "$(classes 48)"
gallery "$RUN/shipped/samples" "$RUN/samples"
echo "first videos after $shown s, all of it $((SECONDS - installed)) s, not counting the installation"
echo "open $PWD/$RUN/index.html"

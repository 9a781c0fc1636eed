#!/usr/bin/env bash
# From nothing to generated videos on a CPU: ./launch/quickstart.sh [--resume | --anew]
# Installs into .venv, trains the three stages small on generated clips, scores their videos and those of the shipped
# weights, and prints the path of one gallery. RUN names another folder than runs/quickstart, VENV another environment,
# PYTHON the interpreter to make it with.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$SECONDS
RUN="${RUN:-runs/quickstart}"
choice="${1:-}"
case "$choice" in "" | --resume | --anew) ;; *)
    echo "argument=$choice: not known; use --resume or --anew" >&2
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
        rm -rf "${RUN:?}"/{autoencoder,content,motion,samples,shipped,index.html,probe.jsonl} "${RUN:?}"/latents-*.npz
    fi
fi

. launch/env.sh
. launch/install.sh
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
echo "installed after $((SECONDS - started)) s"
trap 'exit 130' INT TERM
for stage in autoencoder content motion; do
    echo "== $stage =="
    if [ -e "$RUN/$stage/summary.json" ]; then echo "trained before"; continue; fi
    cmd-jax train --config="configs/quickstart.py:$stage" --workdir="$RUN"
    # A training that was asked to stop saves and exits with 0.
    [ -e "$RUN/$stage/summary.json" ] || { echo "stopped; ./launch/quickstart.sh --resume goes on"; exit 0; }
done
rm -rf "$RUN/samples" "$RUN/shipped"
echo "== scores of what was trained here =="
cmd-jax evaluate --config=configs/quickstart.py:sample --workdir="$RUN"
echo "== scores of the shipped weights =="
cmd-jax evaluate --config=configs/quickstart.py:sample,size=long --workdir="$RUN/shipped"
python -m cmd_jax.report.collect "$RUN/index.html" "$RUN/samples" "$RUN/shipped/samples"
echo "all of it took $((SECONDS - started)) s; open $PWD/$RUN/index.html"

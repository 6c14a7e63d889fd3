#!/bin/bash
# Train a recipe on several hosts over SSH: HOSTS="node1 node2" GPUS=8 docs/launch/ssh.sh RECIPE [flags of the recipe]
# FOLDER (default: the current one) is the checkout on every host, VENV (default: .venv) an environment inside it.
set -euo pipefail

if [ $# -eq 0 ] || [ -z "${HOSTS:-}" ]; then
    echo "usage: HOSTS=\"node1 node2\" GPUS=8 $0 RECIPE [flags of the recipe]" >&2
    exit 2
fi

read -r -a hosts <<< "$HOSTS"
folder=${FOLDER:-$PWD}
run_id="titan-$(date +%s)"
launch=(
    torchrun --nnodes "${#hosts[@]}" --nproc-per-node "${GPUS:-8}"
    --rdzv-backend c10d --rdzv-endpoint "${hosts[0]}:${PORT:-29500}" --rdzv-id "$run_id" "$@"
)
remote="cd $(printf %q "$folder") && source $(printf %q "${VENV:-.venv}")/bin/activate && exec env TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280$(printf ' %q' "${launch[@]}")"

stop() { # SIGTERM: each run finishes its step, saves a checkpoint and ends
    for host in "${hosts[@]}"; do
        ssh "$host" "pkill -TERM -f 'rdzv-id[ ]$run_id'" < /dev/null || true
    done
}
trap stop INT TERM

pids=()
for host in "${hosts[@]}"; do
    ssh "$host" "bash -c $(printf %q "$remote")" < /dev/null & # in the background: Ctrl-C does not end it
    pids+=($!)
done
status=0
for pid in "${pids[@]}"; do
    until wait "$pid"; do
        code=$?
        kill -0 "$pid" 2> /dev/null && continue # a signal interrupted the wait
        status=$code
        break
    done
done
exit "$status"

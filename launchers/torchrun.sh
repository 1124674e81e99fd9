#!/usr/bin/env bash
# A job on plain hosts, by torchrun: the same line on each of them, in a folder that all of them see.
#
#   HOSTS=node1,node2 [PROCESSES=8] [PORT=29500] launchers/torchrun.sh train.py +experiment=txt2img_laion name=NAME
#
#   HOSTS      names or addresses of all hosts; rank 0 is on the first
#   PROCESSES  on each host: one for each GPU where it is not set, or one where there is none
#   PORT       where the first host listens; another one for another job at the same time
#
# Nothing is started again by itself: a host that was lost ends the job everywhere, and the same line goes on.
set -euo pipefail
here=$(dirname "$0")
. "$here/env.sh"

this=$(python "$here/this_host.py" "${HOSTS:-}")
read -r number count first interface <<<"$this"
# Where a host's own name stands for 127.0.0.1, as it often does, Gloo tells its peers that address.
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
exec python -m torch.distributed.run --nnodes "$count" --node-rank "$number" --nproc-per-node "$PROCESSES" \
    --rdzv-backend static --master-addr "$first" --master-port "${PORT:-29500}" --max-restarts 0 "$@"

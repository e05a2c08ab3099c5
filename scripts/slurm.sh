#!/bin/bash
# A run as a SLURM job, one `accelerate launch` a node, through as many time limits as it needs:
#
#     RUN=runs/mine sbatch --nodes 4 scripts/slurm.sh --config configs/cc12m.yaml --data '/data/cc12m/{0000..1242}.tar'
#
# Two minutes before the limit all ranks save and end, and the job goes back into the queue; started again, it resumes.
# A run that fails is not queued again. What is chosen by variables of the shell:
#
#     RUN              the run folder, which all nodes must see
#     LAUNCH_CONFIG    configs/accelerate/eight_gpus.yaml, or fsdp2.yaml to shard the model over all GPUs
#     SCRIPT           scripts/pretrain.py
#
#SBATCH --job-name=contrastive
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# To this shell alone. A checkpoint that takes longer than this to write needs more.
#SBATCH --signal=B:USR1@120

set -euo pipefail

RUN=${RUN:?say where the run is kept: RUN=runs/mine sbatch scripts/slurm.sh ...}
export LAUNCH_CONFIG=${LAUNCH_CONFIG:-configs/accelerate/eight_gpus.yaml}
export SCRIPT=${SCRIPT:-scripts/pretrain.py}
export GPUS=${SLURM_GPUS_ON_NODE:?ask for GPUs, as --gpus-per-node 8 does}
FIRST_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
FIRST_NODE=${FIRST_NODE%%$'\n'*}
PORT=$((20000 + SLURM_JOB_ID % 12000)) # below those that the kernel hands out
export FIRST_NODE PORT
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # which srun does not take from sbatch by itself

ended() { # wait for a process, also through signals that this shell handles; return its exit status
    while kill -0 "$1" 2>/dev/null; do wait "$1" || true; done
    wait "$1"
}

on_node() { # on each node: the launcher, whose ranks are told what this shell is told
    local launcher=
    # To the ranks only: a launcher that is stopped kills them half a minute later, saved or not.
    trap 'if [ -n "$launcher" ]; then pkill -USR1 -P "$launcher" || true; fi' USR1
    trap 'if [ -n "$launcher" ]; then pkill -TERM -P "$launcher" || true; fi' TERM
    (
        trap '' USR1 # SLURM may signal every process: only ranks in training heed it
        exec accelerate launch --config_file "$LAUNCH_CONFIG" --num_machines "$SLURM_NNODES" \
            --num_processes "$((SLURM_NNODES * GPUS))" --machine_rank "$SLURM_NODEID" \
            --main_process_ip "$FIRST_NODE" --main_process_port "$PORT" "$SCRIPT" "$@"
    ) &
    launcher=$!
    ended "$launcher"
}
export -f ended on_node

stopping=
step=
trap 'stopping=yes; if [ -n "$step" ]; then kill -USR1 "$step"; fi' USR1
# shellcheck disable=SC2016 # the shell on the node expands it
srun --kill-on-bad-exit=1 bash -c 'on_node "$@"' on_node --out "$RUN" --resume auto "$@" &
step=$!
status=0
ended "$step" || status=$?
if [ "$status" -ne 0 ] && [ -n "$stopping" ]; then # the ranks were stopped: a run that reached its end says 0
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

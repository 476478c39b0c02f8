#!/usr/bin/env bash
# sbatch recipes/accelerate/slurm.sh outputs/large recipes/voice_prompts/pretrain.yaml --max_steps 400000
#
# One process per GPU, started by srun itself: torchrun would kill them 30 s after a signal, too soon for a large
# checkpoint. Before the time limit, and when the job is preempted, Slurm sends SIGTERM; the run makes its update, saves,
# and exits with code 143; then this script puts the job back in the queue, and the next start goes on from the newest
# whole checkpoint. So the one command above is all there is to type.
#SBATCH --job-name=pretrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# --gpus-per-node, not --gpus-per-task: a process sees all GPUs of its node and takes number LOCAL_RANK.
# --signal: seconds that an update and a checkpoint need; without B: it goes to the processes, not to this shell.
set -uo pipefail

output_dir=${1:?"usage: sbatch $0 OUTPUT_DIR [recipe.yaml] [--key value ...]"}
shift
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
export PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun doesn't take it from the job
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # two jobs on a node don't meet
export MASTER_ADDR MASTER_PORT
# Where nodes have several networks, the one that is meant (gloo takes that of the host's name):
# export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0
# FSDP instead of DDP, what fsdp.yaml sets:
# export ACCELERATE_USE_FSDP=true FSDP_VERSION=2 FSDP_AUTO_WRAP_POLICY=TRANSFORMER_BASED_WRAP \
#     FSDP_RESHARD_AFTER_FORWARD=true FSDP_STATE_DICT_TYPE=FULL_STATE_DICT

started=$(mktemp)
# exec: the signal must reach Python, not a shell that waits for it. One process that fails ends all.
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=${SLURM_NTASKS_PER_NODE:-$SLURM_NTASKS}
    exec "$PYTHON" run_pretrain.py "$@"
' run_pretrain "$@" --output_dir "$output_dir" --resume_from_checkpoint auto
code=$?

# A run that saved nothing since its start would come back forever.
saved=$(find "$output_dir" -path '*/checkpoint-*/complete.json' -newer "$started" -print -quit 2> /dev/null)
rm -f "$started"
if [ "$code" -eq 143 ] && [ -n "$saved" ]; then
    echo "stopped after $saved: back to the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

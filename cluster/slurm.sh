#!/usr/bin/env bash
# sbatch cluster/slurm.sh jobs/<job>.toml, from the repository root and the project's Python environment.
#SBATCH --job-name=dtrpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@180
# The signal reaches every `ray start --block` before the time limit: they drain, a checkpoint can finish.
set -euo pipefail
job=${1:?usage: sbatch cluster/slurm.sh jobs/<job>.toml}

export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=100
[[ -s $RAY_AUTH_TOKEN_PATH ]] || { echo "no token: run 'ray get-auth-token --generate'" >&2; exit 1; }
spill=${SLURM_TMPDIR:-/tmp}/ray_spill_$SLURM_JOB_ID

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
export RAY_ADDRESS=$ip:6379

# Without --overlap the steps below would wait for each other's GPUs.
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
  ray start --head --block --node-ip-address="$ip" --port=6379 --dashboard-host=127.0.0.1 \
  --object-spilling-directory="$spill" &
timeout 120 bash -c 'until ray health-check --address "$RAY_ADDRESS"; do sleep 2; done'
if ((SLURM_JOB_NUM_NODES > 1)); then
  workers=$((SLURM_JOB_NUM_NODES - 1))
  srun --overlap --nodes="$workers" --ntasks="$workers" --exclude="$head" \
    ray start --block --address="$RAY_ADDRESS" --object-spilling-directory="$spill" &
fi

python jobs/run.py train "$job"

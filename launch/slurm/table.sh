#!/usr/bin/env bash
# Runs the rows of a table of the paper on SLURM, with one job per row.
#
#   bash launch/slurm/table.sh configs/tables/table_1.yaml --nodes=1 --gpus-per-node=8
#   bash launch/slurm/table.sh configs/tables/table_2.yaml --nodes=2 --gpus-per-node=8 --time=24:00:00
#
# Arguments after the table go to sbatch. A row that uses the stages of another row (key `after` of the
# table's file) starts when that row is finished. Each job runs stage.sbatch and writes the table anew.
set -euo pipefail

table=${1:?"usage: launch/slurm/table.sh TABLE [options of sbatch]"}
shift
python=${PROXYKD_PYTHON:-$PWD/.venv-launch/bin/python}
rows=$("$python" -m proxykd_jax.tables --table "$table" --list)
declare -A jobs
while read -r row after; do
  options=("$@" --parsable --job-name="$row")
  if [[ -n $after ]]; then
    options+=(--dependency="afterok:${jobs[$after]}")
  fi
  job=$(sbatch "${options[@]}" launch/slurm/stage.sbatch tables "$table" --only "$row")
  jobs[$row]=${job%%;*} # with several clusters sbatch appends the cluster's name
  echo "$row ${jobs[$row]}"
done <<<"$rows"

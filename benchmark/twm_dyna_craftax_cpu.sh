#!/usr/bin/env bash
# The `cpu` preset on two cores, one seed, and PPO alone for the same steps, two seeds: about 40 and 2 x 4 minutes when the
# machine is idle. RUNS says where the run folders go; a run that was interrupted goes on with
# `python twm_dyna_craftax.py --resume RUN_FOLDER`, then start this again.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${RUNS:-runs/twm_dyna_craftax_cpu} results=benchmark/results

measure() { # NAME SCRIPT SEEDS FLAGS...
  local command="python $2.py --preset cpu ${*:4}"
  for seed in $3; do
    compgen -G "$runs/$2__cpu__s${seed}__*" > /dev/null || $command --seed "$seed" --runs-dir "$runs"
    if ! compgen -G "$runs/$2__cpu__s${seed}__*/eval.json" > /dev/null; then # it was asked to stop
      echo "seed $seed is not finished: go on with --resume, then start this again" >&2 && exit 1
    fi
  done
  python benchmark/results.py "$1" "$command --seed SEED" "$runs/$2"__cpu__*
}

measure twm_dyna_craftax_cpu twm_dyna_craftax 1
measure ppo_cnnrnn_craftax_100k ppo_cnnrnn_craftax "1 2" --total-steps 100000
python benchmark/plot.py docs/media/twm_dyna_craftax_cpu.png \
  reward_percent,episodic_return,real_entropy \
  "world model=$results/twm_dyna_craftax_cpu.json" "PPO=$results/ppo_cnnrnn_craftax_100k.json"
python benchmark/plot.py docs/media/twm_dyna_craftax_panels.png panels \
  "world model=$results/twm_dyna_craftax_cpu.json"

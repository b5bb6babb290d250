#!/usr/bin/env bash
# One million environment steps of the `cpu` preset, a run per seed: about an hour each on two idle cores. RUNS says where
# the run folders go, SEEDS which seeds; an interrupted run goes on with `python ppo_cnnrnn_craftax.py --resume RUN_FOLDER`,
# then repeat the last lines.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${RUNS:-runs/ppo_cnnrnn_craftax_cpu}
command="python ppo_cnnrnn_craftax.py --preset cpu"
for seed in ${SEEDS:-1 2}; do
  compgen -G "$runs/*__s${seed}__*" > /dev/null || $command --seed "$seed" --runs-dir "$runs"
done
python benchmark/results.py ppo_cnnrnn_craftax_cpu "$command --seed SEED" "$runs"/ppo_cnnrnn_craftax__cpu__*
python benchmark/plot.py docs/media/ppo_cnnrnn_craftax_cpu.png reward_percent,score_percent,real_entropy \
  "PPO, cpu preset=benchmark/results/ppo_cnnrnn_craftax_cpu.json"
python benchmark/plot.py docs/media/ppo_cnnrnn_craftax_achievements.png achievements \
  "PPO, cpu preset=benchmark/results/ppo_cnnrnn_craftax_cpu.json"

#!/usr/bin/env bash
# The ablation without GRU: 200,000 environment steps of the `cpu` preset with and without it, a run per seed.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${RUNS:-runs/ppo_cnnrnn_craftax_no_gru}
command="python ppo_cnnrnn_craftax.py --preset cpu --no-gru --total-steps 200000"
for seed in ${SEEDS:-1 2}; do
  compgen -G "$runs/*__s${seed}__*" > /dev/null || $command --seed "$seed" --runs-dir "$runs"
done
python benchmark/results.py ppo_cnnrnn_craftax_no_gru "$command --seed SEED" "$runs"/ppo_cnnrnn_craftax__cpu__*
python benchmark/plot.py docs/media/ppo_cnnrnn_craftax_no_gru.png reward_percent,score_percent,real_entropy \
  "with GRU=benchmark/results/ppo_cnnrnn_craftax_cpu.json" "without=benchmark/results/ppo_cnnrnn_craftax_no_gru.json"

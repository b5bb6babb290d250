#!/usr/bin/env bash
# The `cpu` preset for one million environment steps, the same with its earlier, narrow encoder, that for 200,000 steps, the
# preset for as many, and the narrow one without GRU, a run per seed: about 50, 40, 8, 10 (computed) and 6 minutes a run on
# one idle core. RUNS says where the run folders go, SEEDS which seeds; an interrupted run goes on with
# `python ppo_cnnrnn_craftax.py --resume RUN_FOLDER`, then start this again.
set -euo pipefail
cd "$(dirname "$0")/.."
results=benchmark/results

measure() { # NAME FLAGS...
  local name=$1 runs=${RUNS:-runs}/$1 command="python ppo_cnnrnn_craftax.py --preset cpu ${*:2}"
  for seed in ${SEEDS:-1 2}; do
    compgen -G "$runs/*__s${seed}__*" > /dev/null || $command --seed "$seed" --runs-dir "$runs"
    if ! compgen -G "$runs/*__s${seed}__*/eval.json" > /dev/null; then # it was asked to stop
      echo "seed $seed is not finished: go on with --resume, then start this again" >&2 && exit 1
    fi
  done
  python benchmark/results.py "$name" "$command --seed SEED" "$runs"/ppo_cnnrnn_craftax__cpu__*
}

measure ppo_cnnrnn_craftax_cpu
measure ppo_cnnrnn_craftax_narrow --encoder-channels 48 32
measure ppo_cnnrnn_craftax_200k --encoder-channels 48 32 --total-steps 200000
measure ppo_cnnrnn_craftax_200k_wide --total-steps 200000
measure ppo_cnnrnn_craftax_no_gru --encoder-channels 48 32 --no-gru --total-steps 200000
python benchmark/plot.py docs/media/ppo_cnnrnn_craftax_cpu.png reward_percent,score_percent,real_entropy \
  "PPO, cpu preset=$results/ppo_cnnrnn_craftax_cpu.json" "narrow encoder=$results/ppo_cnnrnn_craftax_narrow.json" \
  "narrow, 200k steps=$results/ppo_cnnrnn_craftax_200k.json" "narrow, without GRU=$results/ppo_cnnrnn_craftax_no_gru.json"
python benchmark/plot.py docs/media/ppo_cnnrnn_craftax_achievements.png achievements \
  "PPO, cpu preset=$results/ppo_cnnrnn_craftax_cpu.json" "narrow encoder=$results/ppo_cnnrnn_craftax_narrow.json"

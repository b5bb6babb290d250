#!/usr/bin/env bash
# Students of the exact teacher of digits, one mixture component per image, for docs/emd_imagenet.md: EMD-8 and
# Diff-Instruct for UPDATES updates, and Diff-Instruct for 4 times as many, which cost what EMD-8 costs (39 and 9 network
# evaluations an update). A run per seed, one thread each, 33 minutes in all on a busy core. RUNS says where run folders
# go, SEEDS which seeds; start it again after an interruption: runs that were finished are kept.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
runs=${RUNS:-runs/emd_imagenet_digits} updates=${UPDATES:-400}
command="python emd_imagenet.py --preset smoke --no-train-teacher --teacher gmm --dropout 0 --batch-size 32"
command+=" --micro-batch-size 32 --score-lr 2e-3 --anneal-learning-rate --ema 0.99 --classifier-steps 600"
command+=" --heun-steps 16 --eval-samples 1000 --eval-batch-size 500 --log-every 50 --save-every 10000 --media-every 0"

folders=()
distil() { # LABEL UPDATES FLAGS...
  for seed in ${SEEDS:-1 2 3}; do
    local folder=$runs/$1/s$seed
    if ! grep -qs '"eval/' "$folder"/*/metrics.jsonl; then
      rm -rf "$folder"
      $command --seed "$seed" --total-steps "$2" --eval-every "$2" --runs-dir "$folder" "${@:3}"
    fi
    folders+=("$1=$(echo "$folder"/*)")
  done
}

distil EMD-8 "$updates" --k 8
distil Diff-Instruct "$updates" --corrector eps --k 1
distil Diff-Instruct-longer $((4 * updates)) --corrector eps --k 1
python benchmark/results.py emd_imagenet_digits "$command --seed SEED FLAGS, see $(basename "$0")" "${folders[@]}"

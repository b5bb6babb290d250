#!/usr/bin/env bash
# The table of docs/emd_imagenet.md on Fashion-MNIST: one teacher, then students that start from it. EMD-16 takes UPDATES
# updates; EMD-4 takes 3 times and Diff-Instruct 8 times as many, which cost the same (71, 23 and 9 forward passes each) and
# are scored every UPDATES updates too, so that equal updates and equal work are both in the curves. JOBS runs at once, one
# thread each. RUNS says where run folders go, SEEDS which seeds; a run whose folder exists is not started again (finish
# an interrupted one with --resume).
set -euo pipefail
cd "$(dirname "$0")/.."
export runs=${RUNS:-runs/emd_imagenet_cpu} updates=${UPDATES:-1500} OMP_NUM_THREADS=1
seeds=${SEEDS:-1 2} script="python emd_imagenet.py --preset cpu"
[ -d "$runs/teacher" ] || OMP_NUM_THREADS=$(nproc) $script --total-steps 0 --runs-dir "$runs/teacher"
teacher=$(echo "$runs"/teacher/*/teacher)
export command="$script --no-train-teacher --teacher $teacher --eval-every $updates"

distil() { # LABEL SEED FLAGS...
  compgen -G "$runs/$1/*__s$2__*" > /dev/null || $command --seed "$2" --runs-dir "$runs/$1" "${@:3}"
}
export -f distil
{
  for seed in $seeds; do
    echo "EMD-16 $seed --k 16 --total-steps $updates"
    echo "EMD-4 $seed --k 4 --total-steps $((3 * updates))"
    echo "Diff-Instruct $seed --corrector eps --k 1 --total-steps $((8 * updates))"
  done
  for cancel in none last; do echo "EMD-16-cancel-$cancel 1 --k 16 --cancel $cancel --total-steps $updates"; done
  for corrector in eps x-z; do echo "EMD-16-$corrector 1 --k 16 --corrector $corrector --total-steps $updates"; done
  for level in -6 -4 0; do echo "EMD-16-lambda$level 1 --k 16 --lambda-star $level --total-steps $updates"; done
} | xargs -P "${JOBS:-2}" -I {} bash -c 'set -euo pipefail; distil {}'

folders=()
for folder in "$runs"/[!t]*/*__s*; do folders+=("$(basename "$(dirname "$folder")")=$folder"); done
python benchmark/results.py emd_imagenet_cpu "$command --seed SEED FLAGS, see $(basename "$0")" "${folders[@]}"
python benchmark/teacher_student.py docs/media/emd_imagenet_teacher_student.gif "$(echo "$runs"/EMD-16/*__s1__*)"

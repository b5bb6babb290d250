#!/usr/bin/env bash
# Students on Fashion-MNIST for docs/emd_imagenet.md: one teacher, then students that start from it. Each kind takes
# UPDATES updates; EMD-4 3 times and Diff-Instruct 8 times as many in runs of their own, which cost what EMD-16 costs
# (71, 23 and 9 forward passes each): the step size falls towards the end of a run, so equal updates and equal work need
# different runs. Then one change at a time: cancellation and corrector of EMD-16, cancellation over time and initial
# level of EMD-4 (the preset's is -2). JOBS runs at once, one thread each: two to three hours on two idle cores. RUNS
# says where run folders go, SEEDS which seeds. Start it again after an interruption: runs that were finished are kept,
# others go on with --resume.
set -euo pipefail
shopt -s extglob
cd "$(dirname "$0")/.."
export runs=${RUNS:-runs/emd_imagenet_cpu} updates=${UPDATES:-1500} OMP_NUM_THREADS=1
export script="python emd_imagenet.py"

go() { # DIRECTORY FILE TEXT FLAGS...: starts the run of a directory, or goes on with it, until its FILE holds TEXT
  finished() { grep -qs "$3" "$1"/*/"$2"; }
  finished "$@" && return
  if folder=$(compgen -G "$1/*"); then $script --resume "$folder"; else $script --runs-dir "$1" "${@:4}"; fi
  finished "$@" # a run that was asked to stop ends without an error
}
distil() { # LABEL SEED UPDATES FLAGS...
  go "$runs/$1/s$2" metrics.jsonl "step.:.$3,..eval/" $command --seed "$2" --total-steps "$3" "${@:4}"
}
export -f go distil

go "$runs/teacher" teacher/config.json . --preset cpu --total-steps 0
export command="--preset cpu --no-train-teacher --teacher $(echo "$runs"/teacher/*/teacher) --eval-every $updates --log-every 100"
{
  for seed in ${SEEDS:-1 2}; do
    echo "EMD-16 $seed $updates --k 16"
    echo "EMD-4 $seed $updates --k 4 --eval-every 250"
    for cancel in none last; do echo "EMD-4-cancel-$cancel $seed $updates --k 4 --cancel $cancel --eval-every 250"; done
    echo "EMD-4-longer $seed $((3 * updates)) --k 4"
    echo "Diff-Instruct $seed $updates --corrector eps --k 1"
    echo "Diff-Instruct-longer $seed $((8 * updates)) --corrector eps --k 1"
  done
  for cancel in none last; do echo "EMD-16-cancel-$cancel 1 $updates --k 16 --cancel $cancel"; done
  for corrector in eps x-z; do echo "EMD-16-$corrector 1 $updates --k 16 --corrector $corrector"; done
  for level in -6 -4 0; do echo "EMD-4-lambda$level 1 $updates --k 4 --lambda-star $level"; done
} | xargs -P "${JOBS:-2}" -I {} bash -c 'set -euo pipefail; distil {}'

publish() { # NAME LABELS: the runs of these labels (a pattern) as a result file
  local folders=()
  for folder in "$runs"/$2/s*/*; do folders+=("$(basename "$(dirname "$(dirname "$folder")")")=$folder"); done
  python benchmark/results.py "$1" "$script $command --seed SEED FLAGS, see $(basename "$0")" "${folders[@]}"
}
publish emd_imagenet_cpu "*"
publish emd_imagenet_cancel "EMD-4?(-cancel-*)"

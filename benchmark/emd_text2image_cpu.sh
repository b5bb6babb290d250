#!/usr/bin/env bash
# The tables of docs/emd_text2image.md on drawn shapes: one teacher, then students of it. EMD-8 takes UPDATES updates; EMD-4
# takes 2 times and Diff-Instruct 4 times as many, which cost about the same (39, 23 and 9 forward passes each) and are scored
# every UPDATES updates too, so that equal updates and equal work are both in the curves. Then Diff-Instruct from a guided
# teacher, once with the lower 60 per cent of its timesteps alone. JOBS runs at once, one thread each: about an hour on two
# idle cores. RUNS says where run folders go, SEEDS which seeds. Start it again after an interruption: runs that were finished
# are kept, others go on with --resume.
set -euo pipefail
cd "$(dirname "$0")/.."
export runs=${RUNS:-runs/emd_text2image_cpu} updates=${UPDATES:-750} OMP_NUM_THREADS=1
export script="python emd_text2image.py"

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

go "$runs/teacher" teacher/model_index.json . --preset cpu --total-steps 0
python -c "import emd_text2image; print(*emd_text2image.grammar(), sep='\n')" > "$runs/prompts.txt"
export command="--preset cpu --no-train-teacher --teacher $(echo "$runs"/teacher/*/teacher) --prompts $runs/prompts.txt"
command+=" --eval-every $updates --log-every 100"
{
  for seed in ${SEEDS:-1 2}; do
    echo "EMD-8 $seed $updates --k 8"
    echo "EMD-4 $seed $((2 * updates)) --k 4"
    echo "Diff-Instruct $seed $((4 * updates)) --corrector eps --k 1"
  done
  for how in 1.5 2 3 "2 --t-max 600"; do
    echo "Diff-Instruct-guidance-${how// /} 1 $updates --corrector eps --k 1 --guidance $how"
  done
} | xargs -P "${JOBS:-2}" -I {} bash -c 'set -euo pipefail; distil {}'

folders=()
for folder in "$runs"/*/s*/*; do folders+=("$(basename "$(dirname "$(dirname "$folder")")")=$folder"); done
python benchmark/results.py emd_text2image_cpu "$script $command --seed SEED FLAGS, see $(basename "$0")" "${folders[@]}"

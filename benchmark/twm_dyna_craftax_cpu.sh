#!/usr/bin/env bash
# The `cpu` preset on two cores, one seed: about an hour when the machine is idle. RUNS says where the run folder goes;
# a run that was interrupted goes on with `python twm_dyna_craftax.py --resume RUN_FOLDER`, then repeat the last line.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${RUNS:-runs/twm_dyna_craftax_cpu}
command="python twm_dyna_craftax.py --preset cpu"
[ -d "$runs" ] || $command --runs-dir "$runs"
python benchmark/results.py twm_dyna_craftax_cpu "$command" "$runs"/twm_dyna_craftax__cpu__*
python benchmark/plot.py docs/media/twm_dyna_craftax_panels.png panels \
  "world model, cpu preset=benchmark/results/twm_dyna_craftax_cpu.json"

"""Curves of any set of run folders or result files, as one picture.

    python benchmark/plot.py OUT.png KEY[,KEY...] LABEL=FILE_OR_FOLDER[,FILE_OR_FOLDER...] [LABEL=...]

Each label is one line: the mean over its runs, with their spread (minimum to maximum) shaded. KEY is a logged key, with
its group or without, or `achievements` for all 22 of them; reward_percent also shows published levels at 1M steps as
dotted lines.
"""

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ppo_cnnrnn_craftax import ACHIEVEMENTS

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

PUBLISHED = {"paper, world model": 67.4, "human": 65.0, "paper, PPO": 55.5, "DreamerV3": 53.2}  # reward % at 1M steps


def curves(path: Path) -> list[dict[str, list]]:
    if path.is_dir():
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        keys = {key for line in lines for key in line}
        return [{key.split("/")[-1]: [line.get(key) for line in lines] for key in keys}]
    return [run["curve"] for run in json.loads(path.read_text())["runs"]]


def main(out: str, keys: str, *lines: str) -> None:
    names = [key.split("/")[-1] for key in keys.replace("achievements", ",".join(ACHIEVEMENTS)).split(",")]
    rows = -(-len(names) // 6)
    columns = -(-len(names) // rows)
    width, height = (5.0, 3.6) if rows == 1 else (3.0, 2.2)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for i, (axis, name) in enumerate(zip(axes.flat, names, strict=False)):
        for line in lines:
            label, _, paths = line.partition("=")
            runs = [curve for path in paths.split(",") for curve in curves(Path(path)) if name in curve]
            if not runs:
                sys.exit(f"plot.py: {label} has no {name}")
            points = [  # what a run logged now and then only, such as evaluations, joins its own points
                np.array([(t, v) for t, v in zip(run["step"], run[name], strict=True) if v is not None], float).T
                for run in runs
            ]
            steps = np.array(sorted(set.intersection(*[set(x) for x, _ in points])))
            grid = np.array([np.interp(steps, x, y) for x, y in points])
            axis.plot(steps, grid.mean(0), label=f"{label} (n={len(runs)})")
            if len(runs) > 1:
                axis.fill_between(steps, grid.min(0), grid.max(0), alpha=0.2)
        if name == "reward_percent":
            for label, level in PUBLISHED.items():
                axis.axhline(level, color="grey", linestyle=":", linewidth=0.8)
                axis.text(axis.get_xlim()[1], level, f" {label}, 1M", fontsize=6, va="center")
        axis.set_xlabel("steps" if rows == 1 else "")
        axis.locator_params(axis="x", nbins=6)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
        if i == 0:
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])

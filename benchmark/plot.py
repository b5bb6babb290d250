"""Curves of any set of run folders or result files, as one picture.

    python benchmark/plot.py OUT.png panels runs                          # what a W&B report would show, of all runs
    python benchmark/plot.py OUT.png reward_percent,score_percent PPO=benchmark/results/ppo_cnnrnn_craftax_cpu.json
    python benchmark/plot.py OUT.png real_entropy+imagined_entropy ours=runs/A,runs/B theirs=runs/C

A panel is a logged key, with its group or without, or several with + between them, each in its own dashes; `panels`
stands for the PANELS below of which there are data, `achievements` for all 22 of them. LABEL=PATH,PATH is one line: the
mean over its runs, where all of them have values, with their spread (minimum to maximum) shaded. Without LABEL= runs of
one name (of a run folder: script and preset) are one line. PATH is a run folder, a folder of such, or a result file.
Dotted: published levels at 1M steps of Craftax-Classic.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ppo_cnnrnn_craftax import ACHIEVEMENTS

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

PUBLISHED = {
    "reward_percent": {"paper, world model": 67.4, "human, Crafter": 65.0, "paper, PPO": 55.5, "DreamerV3": 47.2},
    "score_percent": {"human, Crafter": 50.5, "paper, world model": 27.9, "paper, PPO": 16.8},
}
PANELS = {  # of all four scripts; each docs page names those of its script
    "reward": "charts/reward_percent",
    "score": "charts/score_percent",
    "return": "charts/episodic_return",
    "entropy": "losses/real_entropy+losses/imagined_entropy",
    "value loss": "losses/real_value_loss+losses/imagined_value_loss",
    "imagined events a step": "losses/imagined_reward_rate+losses/imagined_done_rate",
    "token loss": "losses/world_model_token_loss+world_model/heldout_token_loss",
    "token accuracy": "world_model/heldout_token_accuracy+world_model/heldout_changed_token_accuracy",
    "denoising loss": "losses/denoising",
    "generator loss": "losses/generator",
    "chain": "chain/z_norm+chain/delta_cosine",
    "Frechet distance": "eval/frechet_to_data+eval/frechet_to_teacher",
    "speed": "perf/SPS",
    "updates a second": "perf/updates_per_second",
    "seconds": "perf/seconds_collect+perf/seconds_policy_real+perf/seconds_tokenizer+perf/seconds_world_model"
    "+perf/seconds_imagination",
}
DASHES = ("-", "--", "-.", ":", (0, (1, 4)))


def read(path: Path) -> list[tuple[str, dict[str, list]]]:
    """Name and curves of every run: values by key without group, None where a line of the log has none."""
    if not path.is_dir():
        return [(run["label"], run["curve"]) for run in json.loads(path.read_text())["runs"] if "curve" in run]
    if not (path / "metrics.jsonl").exists():
        return [run for log in sorted(path.glob("*/metrics.jsonl")) for run in read(log.parent)]
    lines = (path / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines if line.endswith("}")]  # the last one may be half written
    keys = sorted({key for line in lines for key in line})
    curve = {key.split("/")[-1]: [line.get(key) for line in lines] for key in keys}
    return [(path.resolve().name.rsplit("__", 2)[0], curve)]


def groups(lines: list[str]) -> dict[str, list[dict]]:
    """The runs of every line of the picture."""
    found = {}
    for line in lines:
        label, _, paths = line.rpartition("=")
        for path in paths.split(","):
            for name, curve in read(Path(path)):
                found.setdefault(label or name, []).append(curve)
    return found


def mean_and_spread(runs: list[dict], key: str) -> np.ndarray:
    """Float[4, N]: steps, mean, minimum, maximum of runs that have the key, from the last one's first step to the first
    one's last. Each run counts at the steps of all, interpolated between its own.
    """
    pairs = [[(t, v) for t, v in zip(run["step"], run[key], strict=True) if v is not None] for run in runs]
    points = [np.array(pair, float).T for pair in pairs]
    steps = np.unique(np.concatenate([x for x, _ in points]))
    steps = steps[(steps >= max(x[0] for x, _ in points)) & (steps <= min(x[-1] for x, _ in points))]
    values = np.array([np.interp(steps, x, y) for x, y in points])
    return np.stack([steps, values.mean(0), values.min(0), values.max(0)])


def draw(axis: plt.Axes, keys: list[str], lines: dict[str, list[dict]]) -> None:
    for i, (label, runs) in enumerate(lines.items()):
        for key, dashes in zip(keys, DASHES, strict=False):
            if having := [run for run in runs if key in run]:
                steps, mean, low, high = mean_and_spread(having, key)
                if not len(steps):
                    sys.exit(f"plot.py: the runs of {label} have no steps of {key} in common")
                style = {"color": f"C{i}", "linestyle": dashes, "linewidth": 1, "marker": "." if len(steps) < 3 else ""}
                axis.plot(steps, mean, **style, label=f"{label} (n={len(having)})" if key == keys[0] else None)
                if len(having) > 1:
                    axis.fill_between(steps, low, high, color=f"C{i}", alpha=0.2)
    for i, (label, level) in enumerate(PUBLISHED.get(keys[0], {}).items()):
        axis.axhline(level, color="grey", linestyle=":", linewidth=0.8)
        where = {"va": ("bottom", "top")[i % 2], "transform": axis.get_yaxis_transform()}
        axis.text(1, level, f" {label}, 1M", fontsize=6, **where)
    if len(keys) > 1:
        names = [Line2D([], [], color="grey", linestyle=dashes) for _, dashes in zip(keys, DASHES, strict=False)]
        axis.add_artist(axis.legend(names, keys, fontsize=5, handlelength=3))
    axis.locator_params(axis="x", nbins=5)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.grid(alpha=0.3)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT.png")
    parser.add_argument("panels", metavar="PANEL[,PANEL...]")
    parser.add_argument("lines", metavar="[LABEL=]PATH[,PATH...]", nargs="+")
    flags = parser.parse_args(argv)
    lines, panels = groups(flags.lines), {}
    asked = [ACHIEVEMENTS if panel == "achievements" else [panel] for panel in flags.panels.split(",")]
    for panel in itertools.chain(*asked):
        for title, text in (PANELS if panel == "panels" else {panel.split("/")[-1]: panel}).items():
            keys = [key.split("/")[-1] for key in text.split("+")]
            without = [label for label, runs in lines.items() if not any(set(keys) & set(run) for run in runs)]
            if without and panel != "panels":
                sys.exit(f"plot.py: {without[0]} has no {panel}")
            if len(without) < len(lines):
                panels[title] = keys
    if not panels:
        sys.exit("plot.py: there is nothing to draw: no run has any of these keys")
    rows = -(-len(panels) // 6)
    columns = -(-len(panels) // rows)
    width, height = (5.0, 3.6) if rows == 1 else (3.4, 2.6)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, keys) in zip(axes.flat, panels.items(), strict=False):
        draw(axis, keys, lines)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("steps" if rows == 1 else "")
    named = {text: line for axis in axes.flat for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    axes.flat[0].legend(named.values(), named, fontsize=7)
    figure.tight_layout()
    figure.savefig(flags.out, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])

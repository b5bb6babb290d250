"""Turn run folders into one result file.

    python benchmark/results.py NAME "COMMAND" [LABEL=]RUN_FOLDER ...

Writes benchmark/results/NAME.json: command, commit, hardware, and for every run its seed, steps, wall time, last logged
values, evaluation and curves. Everything is read from the run folders' metrics.jsonl, args.json and eval.json. The
summary has minimum, mean and maximum over the runs of a label (without one: script and preset) of what a few headline
metrics were when they were last logged; of the Craftax scripts that is the window of about 100,000 steps.
"""

import datetime
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

CURVES = ("charts/", "achievements/", "world_model/", "losses/", "chain/", "eval/", "perf/")
POINTS = 150  # of a curve at most
HEADLINES = ("reward_percent", "score_percent", "frechet_to_data", "kid_to_data", "spread_ratio")
HEADLINES += ("accuracy_mean", "accuracy_all", "diversity_ratio", "seconds_per_image")


def hardware() -> dict:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return {
        "cpu": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "gpu": gpu.splitlines() or None,
    }


def output_of(*command: str) -> str:
    """In this repository; none where there is no such program, or no repository."""
    options = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
    return subprocess.run(command, **options).stdout.strip() if shutil.which(command[0]) else ""


def commit_of(script: Path) -> str | None:
    """The first commit that held exactly this script, which a run folder keeps a copy of."""
    blob = output_of("git", "hash-object", str(script.resolve()))
    search = "git", "log", "--reverse", "--format=%H", f"--find-object={blob}"
    found = output_of(*search).splitlines() if blob else []
    return found[0] if found else None


def rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def wall_seconds(lines: list[dict]) -> float:
    """Of the phases and of compiling, which is counted apart (JAX), or of the updates (EM Distillation)."""
    seconds, before = 0.0, 0
    for line in lines:
        seconds += sum(value for key, value in line.items() if key.startswith("perf/seconds_"))
        seconds += line.get("perf/compile_seconds", 0.0)
        if speed := line.get("perf/updates_per_second"):
            seconds += (line["step"] - before) / speed
            before = line["step"]
    return seconds


def run_of(folder: Path, args: dict, steps: int, **measured: Any) -> dict:
    """An entry of a result file: what was measured, and of which run."""
    run = {"label": folder.resolve().name.rsplit("__", 2)[0], "seed": args["seed"]}
    run |= {"commit": commit_of(next(folder.glob("*.py"))), "steps": steps}
    run["settings"] = {name: value for name, value in args.items() if name not in ("runs_dir", "resume", "eval_only")}
    return run | measured


def read_run(folder: Path, label: str = "") -> dict:
    """A long curve is thinned, but for its evaluations and its last point. Raises SystemExit for the log of no run."""
    args = json.loads((folder / "args.json").read_text())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines if line.endswith("}")]  # the last one may be half written
    if not lines:
        sys.exit(f"results.py: {folder} has logged nothing")
    if any(line["step"] < before["step"] for before, line in itertools.pairwise(lines)):
        sys.exit(f"results.py: the steps of {folder} go back, as if two processes had written them")
    keys = sorted({key for line in lines for key in line if key.startswith(CURVES)})
    last = {key.split("/")[1]: value for line in lines for key, value in line.items() if "/" in key}
    evaluation = folder / "eval.json"
    every = -(-len(lines) // POINTS)
    shown = [
        line
        for left, line in zip(range(len(lines) - 1, -1, -1), lines, strict=True)
        if left % every == 0 or any(key.startswith("eval/") for key in line)
    ]
    curve = {key.split("/")[1]: [rounded(line.get(key)) for line in shown] for key in keys}
    scores = json.loads(evaluation.read_text()) if evaluation.exists() else None
    run = run_of(folder, args, lines[-1]["step"], wall_seconds=round(wall_seconds(lines)), metrics=last)
    run |= {"evaluation": scores, "curve": {"step": [line["step"] for line in shown], **curve}}
    return run | ({"label": label} if label else {})


def write(name: str, commands: list[str], runs: list[dict], summary: dict) -> None:
    result = {
        "name": name,
        "commands": commands,
        "commit": output_of("git", "rev-parse", "HEAD") or None,
        "date": datetime.date.today().isoformat(),
    }
    result |= {"hardware": hardware(), "runs": runs, "summary": summary}
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")


def main(name: str, command: str, *folders: str) -> None:
    runs = [read_run(Path(folder), label) for label, _, folder in (text.rpartition("=") for text in folders)]
    summary = {}
    for label in dict.fromkeys(run["label"] for run in runs):
        metrics = [run["metrics"] for run in runs if run["label"] == label]
        summary[label] = {"runs": len(metrics)}
        for key in HEADLINES:
            if values := [one[key] for one in metrics if key in one]:
                summary[label][key] = [min(values), statistics.mean(values), max(values)]
    write(name, [command], runs, summary)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])

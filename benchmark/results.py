"""Turn run folders into one result file: python benchmark/results.py NAME "COMMAND" RUN_FOLDER [RUN_FOLDER ...]

Writes benchmark/results/NAME.json: command, commit, hardware, and for every run its seed, steps, wall time, last logged
values, evaluation and curves. Everything is read from the run folders' metrics.jsonl, args.json and eval.json.
"""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

CURVES = (
    "charts/",
    "achievements/",
    "world_model/",
    "losses/world_model_",
    "losses/real_",
    "losses/imagined_",
    "perf/",
)


def hardware() -> dict:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "gpu": None,
    }


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()


def commit_of(script: Path) -> str | None:
    """The first commit that held exactly this script, which a run folder keeps a copy of."""
    found = git("log", "--reverse", "--format=%H", f"--find-object={git('hash-object', str(script))}").splitlines()
    return found[0] if found else None


def read_run(folder: Path) -> dict:
    args = json.loads((folder / "args.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = sorted({key for line in lines for key in line if key.startswith(CURVES)})
    evaluation = folder / "eval.json"
    return {
        "label": folder.name.rsplit("__", 2)[0],
        "seed": args["seed"],
        "commit": commit_of(next(folder.glob("*.py"))),
        "steps": lines[-1]["step"],
        # A phase is timed without compilation, which is counted apart.
        "wall_seconds": round(
            sum(value for line in lines for key, value in line.items() if key.startswith("perf/seconds_"))
            + sum(line["perf/compile_seconds"] for line in lines)
        ),
        "settings": {name: value for name, value in args.items() if name not in ("runs_dir", "resume", "eval_only")},
        "metrics": {key.split("/")[1]: value for key, value in lines[-1].items() if "/" in key},
        "evaluation": json.loads(evaluation.read_text()) if evaluation.exists() else None,
        "curve": {
            "step": [line["step"] for line in lines],
            **{key.split("/")[1]: [line.get(key) for line in lines] for key in keys},
        },
    }


def write(name: str, commands: list[str], runs: list[dict], summary: dict) -> None:
    result = {
        "name": name,
        "commands": commands,
        "commit": git("rev-parse", "HEAD"),
        "date": datetime.date.today().isoformat(),
    }
    result |= {"hardware": hardware(), "runs": runs, "summary": summary}
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")


def main(name: str, command: str, *folders: str) -> None:
    runs = [read_run(Path(folder)) for folder in folders]
    rewards = [run["metrics"]["reward_percent"] for run in runs]
    summary = {"seeds": len(runs), "reward_percent_mean": statistics.mean(rewards)}
    write(name, [command], runs, summary | {"reward_percent_min": min(rewards), "reward_percent_max": max(rewards)})


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])

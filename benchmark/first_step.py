"""How long a new user waits: a fresh virtual environment, then the `cpu` preset until it tells of its first iteration.

    python benchmark/first_step.py SCRATCH_FOLDER

The folder must not exist. The run is started twice, with an empty compilation cache (cold; the environment's textures
are made as well) and again (warm), and ended after its first line of progress. Then the README's first command runs to
its end, as it stands there, in a clone with a home of its own (readme). benchmark/results/first_step.json holds
seconds of the wall clock, processor seconds of all threads, and the load of the machine, since others may share it.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
import results


def timed(command: list[str], until: str = "", **environment: str) -> dict[str, float]:
    """Runs the command to its end, or until it prints a line that starts with `until`."""
    started, metrics = time.perf_counter(), {}
    environment = {**os.environ, **environment, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        print(line, end="", flush=True)
        if until and line.startswith(until):
            metrics["wall_seconds"] = time.perf_counter() - started
            process.kill()
    _, status, used = os.wait4(process.pid, 0)
    if not metrics and status:
        sys.exit(f"first_step.py: {' '.join(command)} failed")
    metrics.setdefault("wall_seconds", time.perf_counter() - started)
    metrics |= {"processor_seconds": used.ru_utime + used.ru_stime, "load": os.getloadavg()[1]}
    return {name: round(value, 1) for name, value in metrics.items()}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="SCRATCH_FOLDER", type=Path)
    folder = parser.parse_args(argv).folder.resolve()
    folder.mkdir(parents=True)
    started = time.perf_counter()
    venv.create(folder / "venv", with_pip=True)
    made, python = time.perf_counter() - started, str(folder / "venv" / "bin" / "python")
    metrics = {"install": timed([python, "-m", "pip", "install", "-q", "-r", str(ROOT / "requirements.txt")])}
    metrics["install"]["wall_seconds"] += round(made, 1)
    run = [python, str(ROOT / "twm_dyna_craftax.py"), "--preset", "cpu", "--runs-dir", str(folder / "runs")]
    for kind in ("cold", "warm"):
        metrics[kind] = timed(run, "step ", JAX_COMPILATION_CACHE_DIR=str(folder / "cache"))
    home, clone = folder / "home", folder / "clone"
    home.mkdir()
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    command = re.search(r"^python3 -m venv .*twm_dyna_craftax\.py.*$", (clone / "README.md").read_text(), re.M)[0]
    metrics["readme"] = timed(["bash", "-c", f"cd {shlex.quote(str(clone))} && {command}"], HOME=str(home))
    steps = {"install": 0, "cold": 2304, "warm": 2304, "readme": 9216}
    runs = [{"label": name, "seed": 1, "steps": steps[name], "metrics": m} for name, m in metrics.items()]
    results.write("first_step", ["python benchmark/first_step.py SCRATCH_FOLDER"], runs, metrics)


if __name__ == "__main__":
    main(sys.argv[1:])

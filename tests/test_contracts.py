"""What the project promises about its files: every flag is read, every key is documented, copies are equal, importing
is free. Most of this reads sources; nothing is compiled.
"""

import ast
import dataclasses
import errno
import io
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections import defaultdict

import numpy as np
import pytest
from conftest import ROOT, SCRIPT, documented_keys, metrics_of, run_main

import emd_imagenet as emd
import emd_text2image as t2i
import ppo_cnnrnn_craftax as ppo
import twm_dyna_craftax as twm

SCRIPTS, DOCS = sorted(ROOT.glob("*.py")), ROOT / "docs"
MODULES = pytest.mark.parametrize("module", [twm, ppo, emd, t2i], ids=lambda module: module.__name__)

# Which scripts carry a copy of which shared block. A script that comes later is added to the blocks it shares.
CRAFTAX = {"twm_dyna_craftax.py", "ppo_cnnrnn_craftax.py"}
EMD = {"emd_imagenet.py", "emd_text2image.py"}
ALL = CRAFTAX | EMD
EXPECTED_BLOCKS = {
    "common flags": ALL,
    "policy flags": CRAFTAX,
    "derived settings": CRAFTAX,
    "command line": ALL,
    "craftax agent": CRAFTAX,
    "run folder": ALL,
    "craftax run": CRAFTAX,
    "estimator": EMD,
    "training": EMD,
    "main": EMD,
}
BLOCK = re.compile(r"^ *# --- shared block: (.+?) ---\n(.*?)^ *# --- end shared block: \1 ---$", re.M | re.S)


def test_deviations_in_the_code_are_those_of_the_page():
    names = {
        path: set(re.findall(r"DEVIATION\(([^)]+)\)", path.read_text())) for path in [*SCRIPTS, *DOCS.glob("*.md")]
    }
    for script in SCRIPTS:
        told = names[DOCS / f"{script.stem}.md"] or names[DOCS / "twm_dyna_craftax.md"]  # the agent underneath: there
        assert names[script] == told != set(), script.name


def test_shared_blocks_are_byte_identical():
    copies = defaultdict(dict)  # block name -> {script: text}
    for script in SCRIPTS:
        text = script.read_text()
        blocks = BLOCK.findall(text)
        assert len(blocks) == text.count("# --- shared block:") == text.count("# --- end shared block:"), script.name
        for name, block in blocks:
            assert script.name not in copies[name], f"{script.name} holds shared block '{name}' twice"
            copies[name][script.name] = block
    found = {name: set(scripts) for name, scripts in copies.items()}
    assert found == EXPECTED_BLOCKS, "a block was added, lost or renamed: put it right there or in EXPECTED_BLOCKS"
    for name, by_script in copies.items():
        assert len(set(by_script.values())) == 1, f"shared block '{name}' differs between {sorted(by_script)}"


@MODULES
def test_every_flag_is_read_by_the_algorithm(module):
    """As args.NAME outside Args, the presets, and the functions that only check or print settings."""
    tree = ast.parse((ROOT / f"{module.__name__}.py").read_text())
    read = set()
    for part in tree.body:
        if isinstance(part, ast.Assign):  # PRESETS
            continue
        if isinstance(part, ast.ClassDef) and part.name == "Args":  # its properties read, its fields do not
            part.body = [node for node in part.body if isinstance(node, ast.FunctionDef)]
        if isinstance(part, ast.FunctionDef) and part.name in ("check_args", "check_policy_args", "dry_run"):
            continue
        for node in ast.walk(part):
            owner = getattr(node, "value", None)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
                read |= {node.attr} if name in ("args", "self") else set()
    flags = set(module.Args.__dataclass_fields__)
    assert not flags - read, f"no part of the script reads {sorted(flags - read)}"


@MODULES
def test_every_preset_names_itself_and_is_valid(module):
    for name, preset in module.PRESETS.items():
        assert preset.preset == name
        module.check_args(dataclasses.replace(preset, dry_run=True))  # what a run needs beside it may be missing


def help_text(module, capsys, monkeypatch) -> str:
    """--help as a text that does not depend on the terminal: one line a flag, boxes and colours removed."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit) as end:
        module.parse_args(["--help"])
    assert end.value.code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    text = re.sub(r"[^\x00-\x7f]|-{5,}", " ", text)  # box drawing
    words = " ".join(text[text.index("--help") :].split())  # what stands before it is the script's docstring
    return re.sub(r" (--[a-z-]+(?:,| [\[A-Z{]))", r"\n\1", words).strip() + "\n"


@MODULES
def test_help_is_the_snapshot(module, capsys, monkeypatch):
    text, snapshot = help_text(module, capsys, monkeypatch), ROOT / "tests" / f"help_{module.__name__}.txt"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        snapshot.write_text(text)
    expected = snapshot.read_text() if snapshot.exists() else ""
    for field in module.Args.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in text, field
    how = "UPDATE_SNAPSHOTS=1 python -m pytest tests/test_contracts.py -k help"
    assert text == expected, f"--help changed. If that was meant, run\n    {how}\nand commit {snapshot.name}."


# --- Dependencies ---
def requirements(lines) -> dict[str, str]:
    """'jax>=0.10,<0.11  # why' -> {'jax': '>=0.10,<0.11'}, the parts of a range in order."""
    found = {}
    for line in lines:
        line = re.sub(r"\s|#.*", "", line)
        if line and not line.startswith("-"):
            name, parts = re.fullmatch(r"([A-Za-z0-9_.\[\]-]+?)([<>=!~].*)?", line).groups()
            found[re.sub(r"[-_.]+", "-", name).lower()] = ",".join(sorted((parts or "").split(",")))
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_inline_metadata_equals_the_requirements(script):
    metadata = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", script.read_text(), re.M)
    assert metadata, f"{script.name} has no PEP 723 metadata"
    metadata = tomllib.loads("".join(line[2:] + "\n" for line in metadata.group(1).splitlines()))
    path = ROOT / "requirements.txt"
    assert path.exists(), "there is no requirements.txt"
    inline, common = requirements(metadata["dependencies"]), requirements(path.read_text().splitlines())
    assert inline
    for name, versions in inline.items():
        assert name in common, f"{name} of {script.name} is not in requirements.txt"
        assert versions == common[name], f"{name}{versions} in {script.name} but {name}{common[name]} in {path.name}"
    assert metadata["requires-python"] == ">=3.11"


# --- Logged keys ---
SOMETIMES = {"perf/peak_device_memory_gb"}  # documented, but logged only where the device tells its memory


def test_logged_keys_are_the_documented_keys(smoke_run):
    logged = {key for line in metrics_of(smoke_run.folder) for key in line if key != "step"}
    logged |= set(twm.episode_charts(np.ones((3, 25))))  # short runs may finish no episode
    logged = {re.sub("^achievements/.*", "achievements/*", key) for key in logged}
    page = ROOT / "docs" / f"{SCRIPT.stem}.md"
    assert page.exists(), f"there is no {page.relative_to(ROOT)}"
    documented = documented_keys(SCRIPT.stem)
    assert not logged - documented, f"logged but not documented: {sorted(logged - documented)}"
    for path in (smoke_run.folder / "media").iterdir():
        name = re.sub(r"_[0-9]+\.", "_*.", path.name)
        assert f"`{name}`" in page.read_text(), f"the page does not tell what media/{name} shows"
    extra = documented - logged - SOMETIMES
    assert not extra, f"documented but never logged: {sorted(extra)}"


# --- Importing ---
JAX_IDLE = "from jax._src import xla_bridge\nassert not xla_bridge._backends"
TORCH_IDLE = "import torch\nassert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()"
NOT_IMPORTED = {twm: ["wandb", "craftax", "torch", "matplotlib"], emd: ["wandb", "sklearn", "jax"]}
NOT_IMPORTED[t2i] = ["wandb", "jax", "torchvision"]
NOT_IMPORTED[ppo] = NOT_IMPORTED[twm]


@MODULES
def test_importing_opens_no_device_and_imports_neither_environment_nor_tracker(module):
    program = f"""
import sys
sys.argv = ["x", "--nonsense"]
import {module.__name__}
{JAX_IDLE if module in (twm, ppo) else TORCH_IDLE}
for name in {NOT_IMPORTED[module]}:
    assert name not in sys.modules, name + " was imported"
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


def test_a_run_without_track_imports_no_tracker(smoke_run):
    """smoke_run puts a module named wandb first on the path that ends the process when it is imported."""
    assert smoke_run.code == 0 and "wandb was imported" not in smoke_run.out
    poison = smoke_run.folder.parents[1] / "poison"
    environment = {**os.environ, "PYTHONPATH": str(poison)}
    result = subprocess.run([sys.executable, "-c", "import wandb"], env=environment, capture_output=True, timeout=300)
    assert result.returncode == 99  # the trap works


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
@pytest.mark.parametrize("module", [twm, ppo])
def test_memory_that_jax_frees_is_there_for_its_next_array(module):
    """Arrays of 64 MB, made and freed in turn by threads of JAX: of 20, most cost no page faults (else 16,384)."""
    program = f"""
import resource
import {module.__name__} as module
import jax
module.start_jax(module.PRESETS["smoke"])
make = jax.jit(lambda i: jax.numpy.full(2**24, i))
for i in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    make(float(i)).block_until_ready()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert np.median([int(line) for line in result.stdout.split()]) < 1000


# --- Signals ---
class Interrupted(io.RawIOBase):
    """Output whose first write is interrupted by SIGTERM."""

    written = b""

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        first, self.written = not self.written, self.written + bytes(data)
        if first:
            os.kill(os.getpid(), signal.SIGTERM)
        return len(data)


@MODULES
def test_a_signal_in_the_middle_of_a_print_asks_to_stop(module, monkeypatch):
    """print is not reentrant: a handler that prints would raise here."""
    run, raw = module.Run.__new__(module.Run), Interrupted()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    run.stop, run.folder = False, "FOLDER"
    run.on_signal(run.request_stop)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(raw)))
    try:
        print("step 24", flush=True)
        assert run.stop and raw.written == b"step 24\n"
        assert {signal.getsignal(number) for number in before} == {signal.SIG_DFL}, "a second one ends the process"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@MODULES
@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EFBIG", "EACCES"])
def test_what_cannot_be_written_for_lack_of_room_is_one_sentence(module, name, monkeypatch, capsys, tmp_path):
    """Wherever it happens: in a log, a picture, an evaluation. Another error of the system keeps its traceback."""

    def fail(*inputs):
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)), "runs/RUN/metrics.jsonl")

    monkeypatch.setattr(module, "train", fail)
    flags = ["--preset", "smoke", "--runs-dir", tmp_path]
    if name == "EACCES":
        with pytest.raises(PermissionError):
            run_main(module, capsys, *flags)
    else:
        code, _, error = run_main(module, capsys, *flags)
        (line,) = error.splitlines()
        assert code == 2 and line.startswith(f"{module.__name__}.py: error: [Errno ")
        assert line.endswith("'runs/RUN/metrics.jsonl'; make room, then --resume the run")


def test_the_readme_knows_the_scripts_and_their_lengths():
    table = dict(re.findall(r"^\| `(\w+\.py)` \|.*\| (\d+) \| \[docs\]", (ROOT / "README.md").read_text(), re.M))
    assert table == {script.name: str(len(script.read_text().splitlines())) for script in SCRIPTS}

"""Every command in README, docs, docstrings and benchmark scripts is one that its program takes: it is parsed by the
program's own parser and, for the four scripts, passes check_args. What a test runs as a whole is named in RUN_BY.
"""

import argparse
import dataclasses
import importlib
import inspect
import itertools
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

import plot

PAGES = [ROOT / "README.md", ROOT / "benchmark" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
SCRIPTS, BENCHMARKS = sorted(ROOT.glob("*.py")), sorted(ROOT.glob("benchmark/*.py"))
SHELL = sorted(ROOT.glob("benchmark/*.sh"))
RUN_BY = {  # other commands, and the file that runs them
    ".venv/bin/pip install -q -r requirements.txt": None,  # benchmark/first_step.py runs the README's line as a whole
    "python3 -m venv .venv": ".ci/run",
    ".venv/bin/pip install -q -r requirements-dev.txt": ".ci/run",
    ".venv/bin/python -m pytest -q -n auto --dist loadfile": ".ci/run",
    '.venv/bin/pip install "jax[cuda13]>=0.10,<0.11"': None,  # not run: needs a GPU
}
PROGRAM = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:(?:\.venv/bin/)?python|accelerate launch|uv run) ((?:benchmark/)?\w+\.py)\b(.*)"
)


def commands_of(text: str) -> list[str]:
    """Commands of fenced bash blocks, of code in a line, and of a docstring's indented lines."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S)
    rest = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    found = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    starts = r"\.venv/bin/|python |accelerate launch |uv run |bash |benchmark/\w+\.sh"
    found += re.findall(rf"`((?:[A-Z_]+=\S+ )*(?:{starts})[^`]*)`", rest)
    found += re.findall(r"^    ((?:python|accelerate) .*)$", rest, re.M)
    return [part.strip() for line in found for part in line.split("&&")]


class Parsed(Exception):
    """The benchmark's own parser took the words."""


def parse(program: str, words: list[str], monkeypatch) -> None:
    """Raises what the program's parser raises, SystemExit mostly. Folders of runs may be any name."""
    module = importlib.import_module(program.removeprefix("benchmark/").removesuffix(".py"))
    if script := {"benchmark/emd_speed.py": "emd", "benchmark/perfect_model.py": "twm"}.get(program):
        module = getattr(module, script)  # it takes the flags of this one
    if hasattr(module, "parse_args"):
        for flag, folder in itertools.pairwise(words):
            if flag in ("--resume", "--eval-only") and not os.path.exists(f"{folder}/args.json"):
                os.makedirs(folder)
                with open(f"{folder}/args.json", "w") as file:
                    json.dump(dataclasses.asdict(module.PRESETS["smoke"]), file)
        args = module.parse_args([word for word in words if word != "..."])
        with monkeypatch.context() as patched:
            patched.setattr(type(ROOT), "exists", lambda path: True)  # files of the reader may have any name
            return None if "..." in words else module.check_args(args)  # three dots: to be completed by the reader
    if "argparse" not in inspect.getsource(module):
        return inspect.signature(module.main).bind(*words)
    real = argparse.ArgumentParser.parse_args

    def stop(parser, argv=None, namespace=None):
        real(parser, argv, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [program, *words])
    with pytest.raises(Parsed):
        module.main(*[words][: len(inspect.signature(module.main).parameters)])


def check(command: str, monkeypatch) -> None:
    program = PROGRAM.fullmatch(command)
    assert program, f"no test accounts for: {command}"
    try:
        parse(program[1], shlex.split(program[2], comments=True), monkeypatch)
    except (SystemExit, Exception) as error:
        pytest.fail(f"refused: {command}\n{error}", pytrace=False)


SOURCES = [*PAGES, *SCRIPTS, *BENCHMARKS]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_is_one_that_its_program_takes(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = path.read_text()
    commands = commands_of(re.search(r'"""(.*?)"""', text, re.S)[1] if path.suffix == ".py" else text)
    assert commands or path.name == "plain.py", "this file gives no command"
    for command in commands:
        if command in RUN_BY:
            assert RUN_BY[command] is None or command in (ROOT / RUN_BY[command]).read_text(), command
        elif command.endswith(".sh"):
            assert (ROOT / command.removeprefix("bash ")).exists(), command
        else:
            check(command, monkeypatch)


STUB = """#!{python}
import json, os, sys
with open({log!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
words = dict(zip(sys.argv, sys.argv[1:]))
if "--runs-dir" in words:  # what the rest of the shell script looks for
    name = os.path.basename(sys.argv[1])[:-3] + "__cpu__s" + words.get("--seed", "1") + "__time"
    folder = os.path.join(words["--runs-dir"], name)
    os.makedirs(os.path.join(folder, "teacher"))
    last = {{"step": int(words.get("--total-steps", 0)), "eval/x": 0}}
    for path in ("metrics.jsonl", "eval.json", "teacher/config.json", "teacher/model_index.json"):
        with open(os.path.join(folder, path), "w") as file:
            file.write(json.dumps(last))
"""


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_benchmark_scripts_give_flags_that_exist(path, monkeypatch, tmp_path):
    """They run as they are, with a `python` that only writes down what it was asked for."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(STUB.format(python=sys.executable, log=str(tmp_path / "log")))
    (tmp_path / "bin" / "python").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "RUNS": str(tmp_path / "runs")}
    result = subprocess.run(["bash", str(path)], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    asked = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert any(program == "benchmark/results.py" for program, *_ in asked)
    monkeypatch.chdir(tmp_path)
    for program, *words in asked:
        if program == "-c":
            exec(words[0], {})
        else:
            check(shlex.join(["python", program, *words]), monkeypatch)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_flags_that_a_page_names_exist(path):
    """In code within a line; on a script's page they are that script's."""
    own = [script for script in SCRIPTS if script.stem == path.stem] or SCRIPTS
    flags = {
        name.replace("_", "-") for one in own for name in importlib.import_module(one.stem).Args.__dataclass_fields__
    }
    flags |= {f"no-{flag}" for flag in flags} | {"help"}
    spans = re.findall(r"`(--[^`]*)`", re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S))
    named = {flag for span in spans for flag in re.findall(r"--([a-z][a-z0-9-]*)", span)}
    assert not named - flags, f"{path.name} names flags that do not exist: {sorted(named - flags)}"


def test_the_table_of_settings_is_that_of_the_presets():
    page, module = (ROOT / "docs" / "twm_dyna_craftax.md").read_text(), importlib.import_module("twm_dyna_craftax")
    rows = re.findall(r"^\| `--([a-z-]+)` \| (.*?) \| (.*?) \| .*? \|$", page, re.M)
    assert {"total-steps", "gamma", "wm-updates", "burn-in"} < {flag for flag, *_ in rows}
    for flag, *told in rows:
        for preset, text in zip(("paper", "cpu"), told, strict=True):
            value = getattr(module.PRESETS[preset], flag.replace("-", "_"))
            words = {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
            words = " ".join(map(str, words)) if isinstance(words, tuple) else str(words)
            assert text.replace(",", "") == words.removesuffix(".0"), f"--{flag} of {preset}"


def test_pages_list_the_panels_that_the_plot_draws():
    for script in SCRIPTS:
        page = (ROOT / "docs" / f"{script.stem}.md").read_text()
        documented = set(re.findall(r"^\| `([a-z_]+/\w+)`", page, re.M))
        drawn = {key for panel in plot.PANELS.values() for key in panel.split("+")} & documented
        listed = re.search(r"^Panels of a report: (.*?)\n\n", page, re.M | re.S)
        assert listed and set(re.findall(r"`([a-z_]+/\w+)`", listed[1])) == drawn, script.stem


HEADINGS = ["Usage", "Explanation of the logged metrics", "Implementation details", "Results", "Known limits"]


def test_pages_have_the_five_headings_and_no_broken_link():
    for script in SCRIPTS:
        page = (ROOT / "docs" / f"{script.stem}.md").read_text()
        assert re.findall(r"^## (.*)$", page, re.M) == HEADINGS, script.stem
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"

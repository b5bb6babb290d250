"""The model-free baseline as a whole. What it shares with twm_dyna_craftax.py in marked blocks is tested there."""

import functools
import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT, metrics_of, steps_saved

import ppo_cnnrnn_craftax as ppo
import twm_dyna_craftax as twm

SCRIPT = ROOT / "ppo_cnnrnn_craftax.py"


def run(folder, *flags):
    command = [sys.executable, str(SCRIPT), *map(str, flags)]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    assert process.returncode == 0, process.stdout + process.stderr
    return sorted((folder / "runs").glob("*__*"))[-1], process.stdout


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return run(tmp_path_factory.mktemp("ppo"), "--preset", "smoke")


def test_a_run_leaves_the_files_it_promises(smoke):
    folder, out = smoke
    assert folder.name.startswith("ppo_cnnrnn_craftax__smoke__s1__")
    assert [line["step"] for line in metrics_of(folder)] == [24, 48, 72, 96]
    assert steps_saved(folder) == [72, 96]
    media = {"rollout_48.mp4", "rollout_96.mp4", "eval_stochastic_96.mp4", "eval_greedy_96.mp4"}
    assert {path.name for path in (folder / "media").iterdir()} == media
    assert json.loads((folder / "eval.json").read_text())["episodes"] == 4
    assert sum(line.startswith("step ") and "ETA" in line for line in out.splitlines()) == 4


def test_two_and_two_iterations_equal_four(smoke, tmp_path):
    folder, _ = run(tmp_path, "--preset", "smoke", "--total-steps", 48, "--eval-episodes", 0)
    run(tmp_path, "--resume", folder, "--total-steps", 96)
    for one, other in zip(metrics_of(folder), metrics_of(smoke[0]), strict=True):
        for name in one.keys() | other.keys():
            assert name.startswith("perf/") or one[name] == other[name], (one["step"], name)


def test_logged_keys_are_the_documented_keys(smoke):
    page = (ROOT / "docs" / "ppo_cnnrnn_craftax.md").read_text()
    logged = {key for line in metrics_of(smoke[0]) for key in line} | set(ppo.episode_charts(np.ones((3, 25))))
    logged = {re.sub("^achievements/.*", "achievements/*", key) for key in logged}
    documented = set(re.findall(r"^\| `([a-z_/*A-Z]+)`", page, re.M))
    assert documented == logged | {"perf/peak_device_memory_gb"}


@pytest.mark.parametrize("preset", ["paper", "cpu", "smoke"])
def test_its_policy_is_the_world_model_agents(preset):
    """A comparison of the two scripts compares agents of one size, in the paper's setting and on a CPU."""
    shapes = []
    for script in (ppo, twm):
        policy = jax.eval_shape(functools.partial(script.init_policy, script.PRESETS[preset]), jax.random.PRNGKey(0))
        shapes.append(jax.tree.map(lambda leaf: leaf.shape, policy.params))
    assert shapes[0] == shapes[1]
    for name in ("num_envs", "num_steps", "learning_rate", "gamma", "gae_lambda", "update_epochs", "entropy_coef"):
        assert getattr(ppo.PRESETS[preset], name) == getattr(twm.PRESETS[preset], name), name


def test_dry_run_tells_parameters_and_time():
    command = [sys.executable, str(SCRIPT), "--preset", "smoke", "--dry-run"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
    for word in ("parameters", "FLOP", "memory", "ETA"):
        assert word in out


def test_bad_input_ends_with_one_sentence():
    command = [sys.executable, str(SCRIPT), "--preset", "smoke", "--num-minibatches", "3"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 2 and "--num-minibatches 3" in process.stderr and "Traceback" not in process.stderr
    assert len(process.stderr.strip().splitlines()) == 1

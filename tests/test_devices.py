"""Two and four virtual CPU devices, and two processes, give the numbers of one."""

import json
import os
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT, metrics_of, only, run_script, start_script, state_of, steps_saved

# Two iterations, the second with imagination; one minibatch, whose four environments split over four devices.
FLAGS = ("--preset", "smoke", "--total-steps", 48, "--num-minibatches", 1, "--media-every", 0, "--eval-episodes", 0)
BEYOND = ("--wm-action-in-cells", "--wm-rewarded-actions", "--wm-average-decay", 0.9)


def run_on(devices, folder, flags):
    environment = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    run = run_script(folder, *FLAGS, *flags, environment=environment)
    assert run.code == 0, run.err
    return run.folder


@pytest.fixture(scope="module")
def one_device(request, tmp_path_factory):
    """Flags, and the folder of their run on one device."""
    return request.param, run_on(1, tmp_path_factory.mktemp("one"), request.param)


def assert_equal_metrics(one_folder, other_folder):
    ones, others = metrics_of(one_folder), metrics_of(other_folder)
    assert len(ones) == len(others) == 2
    for one, other in zip(ones, others, strict=True):
        names = [name for name in one if not name.startswith("perf/")]
        assert set(names) == {name for name in other if not name.startswith("perf/")}
        for name in names:
            np.testing.assert_allclose(other[name], one[name], rtol=1e-3, atol=1e-5, err_msg=f"{name} {one['step']}")


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("one_device", [(), BEYOND], ids=["paper", "beyond"], indirect=True, scope="module")
def test_several_devices_equal_one(one_device, devices, tmp_path):
    """Sums are taken in another order, so the last bits differ; Adam's first steps divide small gradients by their own
    size, which enlarges that a little.
    """
    flags, single = one_device
    several = run_on(devices, tmp_path, flags)
    assert_equal_metrics(single, several)
    assert any(name.startswith("losses/imagined_") for name in metrics_of(several)[1])

    one, other = state_of(single), state_of(several)  # which one device can read, too
    np.testing.assert_array_equal(one.codebook.codes, other.codebook.codes)
    assert one.codebook.size == other.codebook.size > 0
    for name in ("tokens", "actions", "dones", "frames"):
        np.testing.assert_array_equal(getattr(one.replay.steps, name), getattr(other.replay.steps, name), err_msg=name)
    np.testing.assert_allclose(one.replay.steps.rewards, other.replay.steps.rewards, atol=1e-6)
    weights = ((state.policy.params, state.model.params, state.wm_average) for state in (one, other))
    for a, b in zip(*map(jax.tree.leaves, weights), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def run_program(program, devices):
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr


def test_the_second_device_takes_part():
    """Else the test above would compare one device with itself."""
    program = """
import jax, twm_dyna_craftax as twm
args = twm.PRESETS["smoke"]
assert jax.device_count() == 2
replay = twm.init_replay(args)
assert len(replay.steps.frames.sharding.device_set) == 2
assert replay.steps.frames.addressable_shards[0].data.shape[1] == args.num_envs // 2
batch = jax.jit(lambda x: twm.split_batch(x * 2, axis=1))(jax.numpy.ones((3, 4)))
assert batch.addressable_shards[0].data.shape == (3, 2)
policy, env = twm.init_policy(args, jax.random.PRNGKey(0)), twm.init_env(args, jax.random.PRNGKey(1))
params = jax.device_put(policy.params, twm.on_devices(None))
for greedy in (False, False, True):  # one program takes first and later steps, of training and of evaluation
    env = twm.collect(args, params, env, jax.random.PRNGKey(2), greedy)[0]
assert twm.collect._cache_size() == 1
"""
    run_program(program, devices=2)


def test_pictures_do_not_depend_on_the_number_of_devices():
    """Four sequences, which eight devices cannot share."""
    program = """
import dataclasses, types, jax, jax.numpy as jnp, twm_dyna_craftax as twm
args, key, shown = dataclasses.replace(twm.PRESETS["smoke"], num_envs=8), jax.random.PRNGKey(0), {}
codebook = twm.Codebook(jnp.zeros((args.codebook_size, 147), jnp.uint8), jnp.int32(1))
replay, model = twm.init_replay(args).replace(filled=jnp.int32(8)), twm.init_world_model(args, key)
state = types.SimpleNamespace(codebook=codebook, replay=replay, wm_average=model.params)
rollout = types.SimpleNamespace(frames=jnp.zeros((6, 8, *twm.FRAME), jnp.uint8))
run = types.SimpleNamespace(media=lambda step, name, frames, scale=4: shown.update({name: frames.shape}))
twm.write_media(args, run, 24, state, rollout, key)
assert shown["imagined_vs_true"] == (4 * 2 * 67, (args.context + 1) * 67, 3), shown
"""
    run_program(program, devices=8)


# --- Several processes ---
def start_two(folder, script, *flags):
    """Two processes of one device each, which find each other through the environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
    environments = [environment | {"JAX_PROCESS_ID": str(index)} for index in range(2)]
    return [start_script(folder, *flags, "--distributed", script=script, environment=one) for one in environments]


def finish(processes):
    """Outputs of the first process and of the second one, both of which must end well."""
    try:
        ends = [process.communicate(timeout=900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(map("\n".join, ends))
    return [out for out, _ in ends]


@pytest.mark.parametrize("script", ["twm_dyna_craftax.py", "ppo_cnnrnn_craftax.py"])
def test_two_processes_stop_together_go_on_and_equal_one(script, tmp_path):
    """With evaluation, media, a falling step size and, where there is one, a world model beyond the paper's; a signal
    that reaches one of them stops both, saved.
    """
    flags, script = ["--preset", "smoke", "--total-steps", 48, "--anneal-learning-rate"], ROOT / script
    flags += BEYOND * (script.name == "twm_dyna_craftax.py")
    (tmp_path / "one").mkdir()
    one = run_script(tmp_path / "one", *flags, script=script)
    assert one.code == 0, one.err

    processes = start_two(tmp_path, script, *flags)
    first_lines = iter(processes[0].stdout.readline, "")
    assert any("2 iterations" in line for line in first_lines), processes[0].stderr.read()
    processes[1].send_signal(signal.SIGTERM)
    out, silent = finish(processes)
    folder = only(tmp_path / "runs")
    assert "stopped and saved at step 24" in out and "step 24" not in silent
    assert steps_saved(folder) == [24] and len(metrics_of(folder)) == 1

    finish(start_two(tmp_path, script, "--resume", folder))
    assert only(tmp_path / "runs") == folder and steps_saved(folder) == [24, 48]
    assert_equal_metrics(one.folder, folder)
    assert {path.name for path in (folder / "media").iterdir()} == {
        path.name for path in (one.folder / "media").iterdir()
    }
    ones, twos = (json.loads((run / "eval.json").read_text()) for run in (one.folder, folder))
    for mode in ("stochastic", "greedy"):
        assert ones[mode].pop("achievements") == twos[mode].pop("achievements")
        assert twos[mode] == pytest.approx(ones[mode], rel=1e-3)

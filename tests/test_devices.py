"""Two and four virtual CPU devices give the numbers of one."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT, metrics_of, run_script, state_of

# Two iterations, the second with imagination; one minibatch, whose four environments split over four devices.
FLAGS = ("--preset", "smoke", "--total-steps", 48, "--num-minibatches", 1, "--media-every", 0, "--eval-episodes", 0)


def run_on(devices, folder):
    environment = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    run = run_script(folder, *FLAGS, environment=environment)
    assert run.code == 0, run.err
    return run.folder


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    return run_on(1, tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("devices", [2, 4])
def test_several_devices_equal_one(devices, one_device, tmp_path):
    """Sums are taken in another order, so the last bits differ; Adam's first steps divide small gradients by their own
    size, which enlarges that a little.
    """
    several = run_on(devices, tmp_path)
    ones, twos = metrics_of(one_device), metrics_of(several)
    assert len(ones) == len(twos) == 2
    for one, other in zip(ones, twos, strict=True):
        names = [name for name in one if not name.startswith("perf/")]
        assert set(names) == {name for name in other if not name.startswith("perf/")}
        for name in names:
            np.testing.assert_allclose(other[name], one[name], rtol=1e-3, atol=1e-5, err_msg=f"{name} {one['step']}")
    assert any(name.startswith("losses/imagined_") for name in twos[1])

    one, other = state_of(one_device), state_of(several)  # which one device can read, too
    np.testing.assert_array_equal(one.codebook.codes, other.codebook.codes)
    assert one.codebook.size == other.codebook.size > 0
    for name in ("tokens", "actions", "dones", "frames"):
        np.testing.assert_array_equal(getattr(one.replay.steps, name), getattr(other.replay.steps, name), err_msg=name)
    np.testing.assert_allclose(one.replay.steps.rewards, other.replay.steps.rewards, atol=1e-6)
    for name in ("policy", "model"):
        pair = (jax.tree.leaves(getattr(state, name).params) for state in (one, other))
        for a, b in zip(*pair, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4, err_msg=name)


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
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr

"""The replay: what it keeps, and that its windows are uniform and never cross the place where it is written."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import twm_dyna_craftax as twm

ENVS, STEPS, WINDOW = 3, 4, 4


def steps_at(step):
    """Four steps, every field of which tells the step and the environment it comes from."""
    t, b = np.meshgrid(step + np.arange(STEPS), np.arange(ENVS), indexing="ij")
    frames = np.broadcast_to((t + 50 * b)[..., None, None, None] % 256, (STEPS, ENVS, 63, 63, 3)).astype(np.uint8)
    tokens = np.broadcast_to((t + 1000 * b)[..., None], (STEPS, ENVS, 81)).astype(np.uint16)
    actions, rewards, dones = ((t + b) % 17).astype(np.uint8), (t + 1000 * b).astype(np.float32), (t + b) % 5 == 0
    return jax.tree.map(jnp.asarray, twm.Steps(tokens, actions, rewards, dones, frames))


def filled_replay(tiny, replay_size, steps):
    replay = twm.init_replay(tiny(num_envs=ENVS, num_steps=STEPS, replay_size=replay_size))
    for step in range(0, steps, STEPS):
        replay = twm.add_to_replay(replay, steps_at(step))
    return replay


# Capacities in steps of every environment: 11 (35 // 3) is no multiple of the rollout's 4, 12 is one.
CASES = {
    "first": (35, 8),
    "nearly full": (35, 8),
    "just wrapped": (35, 12),
    "wrapped often": (35, 48),
    "even": (36, 24),
}


@pytest.mark.parametrize("case", CASES)
def test_it_keeps_exactly_the_latest_steps(tiny, case):
    replay_size, steps = CASES[case]
    replay, capacity = filled_replay(tiny, replay_size, steps), replay_size // ENVS
    kept = range(max(0, steps - capacity), steps)
    assert replay.filled == len(kept) and replay.head == steps % capacity
    assert replay.steps.actions.shape == (capacity, ENVS)
    model = {}  # where a list written round and round holds what, by the plainest rule
    for step in range(steps):
        model[step % capacity] = step
    for row, step in model.items():
        found, expected = jax.tree.leaves(replay.steps), jax.tree.leaves(steps_at(step))
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one[row], other[0])


@pytest.mark.parametrize("recent", [WINDOW, 6, 1000])
@pytest.mark.parametrize("case", CASES)
def test_windows_are_uniform_over_the_newest_steps_and_never_cross_the_write_head(tiny, case, recent):
    replay_size, steps = CASES[case]
    replay, capacity = filled_replay(tiny, replay_size, steps), replay_size // ENVS
    sample = jax.jit(twm.sample_windows, static_argnums=(2, 3))
    replay = replay.replace(steps=replay.steps.replace(frames=None))
    windows = jax.device_get(sample(replay, jax.random.PRNGKey(7), 20_000, WINDOW, recent))
    env, step = np.divmod(windows.rewards.astype(int), 1000)  # Int[batch, T]
    assert (env == env[:, :1]).all(), "a window changes environment"
    np.testing.assert_array_equal(step, step[:, :1] + np.arange(WINDOW), err_msg="a window is not consecutive")
    np.testing.assert_array_equal(windows.tokens, np.broadcast_to((step + 1000 * env)[..., None], (20_000, WINDOW, 81)))
    np.testing.assert_array_equal(windows.actions, (step + env) % 17)
    np.testing.assert_array_equal(windows.dones, (step + env) % 5 == 0)
    assert windows.frames is None
    oldest = max(0, steps - min(capacity, recent))
    possible = [(b, start) for b in range(ENVS) for start in range(oldest, steps - WINDOW + 1)]
    drawn = Counter(zip(env[:, 0].tolist(), step[:, 0].tolist(), strict=True))
    assert set(drawn) <= set(possible)
    # 20,000 draws over at most 27 cells: a cell missed, or drawn half as often, has a probability below 1e-20
    assert stats.chisquare([drawn[cell] for cell in possible]).pvalue > 1e-3


def test_windows_bring_their_own_frames(tiny):
    replay = filled_replay(tiny, 35, 48)
    windows = jax.device_get(twm.sample_windows(replay, jax.random.PRNGKey(0), 50, WINDOW, 48))
    env, step = np.divmod(windows.rewards.astype(int), 1000)
    assert windows.frames.shape == (50, WINDOW, 63, 63, 3)
    np.testing.assert_array_equal(windows.frames.min((2, 3, 4)), (step + 50 * env) % 256)
    np.testing.assert_array_equal(windows.frames.max((2, 3, 4)), (step + 50 * env) % 256)


def test_different_keys_draw_different_windows(tiny):
    replay = filled_replay(tiny, 35, 48)
    one, same, other = (twm.sample_windows(replay, jax.random.PRNGKey(k), 50, WINDOW, 48) for k in (1, 1, 2))
    one, same, other = (np.divmod(np.asarray(x.rewards[:, 0], int), 1000) for x in (one, same, other))
    np.testing.assert_array_equal(one, same)
    for part in (0, 1):  # environments and steps
        assert not np.array_equal(one[part], other[part])


def test_the_papers_replay_fits_into_two_gigabytes():
    replay = jax.eval_shape(lambda: twm.init_replay(twm.PRESETS["paper"]))  # shapes only
    assert replay.steps.actions.shape == (128_000 // 48, 48)
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(replay)) < 2e9


def test_rewarded_actions_are_counted_from_the_first_step_of_an_episode_across_rollouts(tiny):
    """Against counting by hand, over a ring that wraps; a health term is no achievement."""
    args, rng = (
        tiny(num_envs=ENVS, num_steps=STEPS, replay_size=10 * ENVS, wm_rewarded_actions=True),
        np.random.default_rng(0),
    )
    replay, counts = twm.init_replay(args), np.zeros((ENVS, twm.NUM_ACTIONS), int)
    for _ in range(12):
        steps = steps_at(0)
        actions = rng.integers(4, 7, (STEPS, ENVS)).astype(np.uint8)
        rewards = rng.choice([-0.1, 0.1, 1.0, 1.1, 2.0], (STEPS, ENVS)).astype(np.float32)
        dones = rng.random((STEPS, ENVS)) < 0.1
        steps = twm.add_rewarded(replay, steps.replace(actions=actions, rewards=rewards, dones=dones))
        replay = twm.add_to_replay(replay, steps)
        for t in range(STEPS):
            np.testing.assert_array_equal(steps.rewarded[t], counts)
            counts[np.arange(ENVS), actions[t]] += rewards[t] >= 1
            counts[dones[t]] = 0
    assert counts.max() > 1 and replay.steps.rewarded.shape == (10, ENVS, twm.NUM_ACTIONS)

"""The auto-reset environment against the stock one of Craftax, and what collecting makes of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import twm_dyna_craftax as twm

# Eight at a time: of more, XLA's CPU backend (jax 0.10.2) makes other worlds from the ninth on than of the same keys
# alone, so the stock environment itself then depends on where in the batch a world is made.
ENVS, STEPS, DEATHS_EVERY = 8, 260, 6  # 2,080 environment steps


@pytest.fixture(scope="module")
def stock():
    """Craftax-Classic-Pixels-v1 as the package offers it, with its own auto-reset: batched reset, step after step."""
    from craftax.craftax_classic.envs.craftax_pixels_env import CraftaxClassicPixelsEnv

    env = CraftaxClassicPixelsEnv()
    step = jax.jit(lambda *batch: jax.lax.map(lambda one: env.step(*one, env.default_params), batch))
    return jax.jit(jax.vmap(functools.partial(env.reset, params=env.default_params))), step


@pytest.fixture(scope="module")
def step():
    return jax.jit(twm.env_step)


def set_fields(state, where, **values):
    """The state with fields replaced in the environments Bool[B] named."""
    new = {}
    for name, value in values.items():
        old = getattr(state, name)
        chosen = where.reshape(-1, *[1] * (old.ndim - 1))
        new[name] = jnp.where(chosen, jnp.asarray(value, old.dtype), old)
    return state.replace(**new)


def doom(state, rng, number):
    """A few environments shall end with the next step or soon, each for another reason."""
    dying = np.zeros((3, ENVS), bool)
    for cause in dying:
        cause[rng.choice(ENVS, size=1)] = True
    starved, drowned_in_lava, timed_out = dying
    # needs that are long unmet take one health at the next step
    state = set_fields(state, starved, player_health=1, player_food=0, player_drink=0, player_recover=-15.5)
    if number % 2:
        return set_fields(state, timed_out, timestep=9_999)
    lava = jnp.full(state.map.shape[1:], 14, state.map.dtype)  # BlockType.LAVA, everywhere
    return set_fields(state, drowned_in_lava, map=lava)


def assert_equal_trees(one, other, message):
    ones, others = jax.tree.leaves_with_path(one), jax.tree.leaves(other)
    for (path, a), b in zip(ones, others, strict=True):
        # Whole numbers are equal; floats may differ in a last bit: two programs may round a cosine differently.
        atol = 2e-7 * (1 + np.abs(b)) if jnp.issubdtype(b.dtype, jnp.floating) else 0
        assert a.shape == b.shape and (np.abs(np.asarray(a, float) - np.asarray(b, float)) <= atol).all(), (
            f"{message}{jax.tree_util.keystr(path)}"
        )


def assert_equal_frames(frames, stock_frames, message):
    """The stock pixels, rounded to whole numbers: half of one away at most, and a last bit."""
    assert frames.dtype == jnp.uint8
    assert np.abs(np.asarray(frames, float) - np.asarray(stock_frames) * 255).max() <= 0.5 + 1e-3, message


def test_it_equals_the_stock_auto_reset_transition_by_transition(stock, step):
    stock_reset, stock_step = stock
    rng, ends, at_once, dark, unlocked = np.random.default_rng(0), 0, 0, 0, 0
    keys = jax.random.split(jax.random.PRNGKey(0), ENVS)
    (expected_frame, expected), (state, frame) = stock_reset(keys), twm.env_reset(keys)
    assert_equal_trees(state, expected, "reset: ")
    assert_equal_frames(frame, expected_frame, "reset")
    night = np.arange(ENVS) % 4 == 0  # some start at dusk, whose pixels carry noise
    state, expected = (set_fields(s, night, timestep=190) for s in (state, expected))
    for t in range(STEPS):
        if t % DEATHS_EVERY == 0:
            state = doom(state, np.random.default_rng(t), t // DEATHS_EVERY)
            expected = doom(expected, np.random.default_rng(t), t // DEATHS_EVERY)
        actions = jnp.asarray(rng.integers(0, twm.NUM_ACTIONS, ENVS))
        keys = jax.random.split(jax.random.PRNGKey(1000 + t), ENVS)
        expected_frame, expected, expected_rewards, expected_dones, info = stock_step(keys, expected, actions)
        state, frame, rewards, dones, achievements = step(state, actions, keys)
        np.testing.assert_array_equal(dones, expected_dones, err_msg=f"step {t}")
        np.testing.assert_allclose(rewards, expected_rewards, atol=1e-6, err_msg=f"step {t}")
        assert_equal_frames(frame, expected_frame, f"step {t}")
        assert_equal_trees(state, expected, f"step {t}: ")
        # The stock info counts the achievements of an episode that ended, in percent, and 0 elsewhere.
        counted = np.stack([info[f"Achievements/{name}"] for name in twm.ACHIEVEMENTS], axis=1)
        np.testing.assert_array_equal((achievements * dones[:, None]) * 100, counted, err_msg=f"step {t}")
        ends, at_once = ends + int(dones.sum()), max(at_once, int(dones.sum()))
        dark, unlocked = dark + int((state.light_level < 0.5).sum()), unlocked + int((counted > 0).sum())
    assert ends >= 30 and at_once >= 2, "too few forced deaths, or never two at once"
    assert dark > 20 and unlocked > 0, "the comparison saw no night, or no achievement"


def test_the_step_compiles_once(step):
    """A reset leaves weakly typed numbers where a step leaves strong ones; both must be one program's inputs."""
    keys = jax.random.split(jax.random.PRNGKey(0), ENVS)
    state, _ = twm.env_reset(keys)
    for _ in range(3):
        state = step(state, jnp.zeros(ENVS, jnp.int32), keys)[0]
    assert step._cache_size() == 1


def test_environments_that_end_together_get_different_worlds(step):
    keys = jax.random.split(jax.random.PRNGKey(5), ENVS)
    state, _ = twm.env_reset(keys)
    state = set_fields(state, np.ones(ENVS, bool), timestep=9_999)
    state, frames, _, dones, _ = step(state, jnp.zeros(ENVS, jnp.int32), keys)
    assert dones.all() and (state.timestep == 0).all()
    maps = {np.asarray(one).tobytes() for one in state.map}
    assert len(maps) == ENVS
    assert len({np.asarray(one).tobytes() for one in frames}) > ENVS // 2


def test_achievements_of_the_last_step_count(step):
    """A table is placed with the very step that ends the episode."""
    keys = jax.random.split(jax.random.PRNGKey(5), ENVS)
    state, _ = twm.env_reset(keys)
    everyone = np.ones(ENVS, bool)
    state = set_fields(state, everyone, map=2, player_position=32)  # BlockType.GRASS everywhere, in the middle
    state = state.replace(inventory=set_fields(state.inventory, everyone, wood=9), mob_map=state.mob_map & False)
    ending = np.arange(ENVS) % 2 == 0
    state = set_fields(state, ending, timestep=9_999)
    place_table = jnp.full(ENVS, 8, jnp.int32)
    after, _, rewards, dones, achievements = step(state, place_table, keys)
    np.testing.assert_array_equal(dones, ending)
    expected = np.arange(22) == twm.ACHIEVEMENTS.index("place_table")
    np.testing.assert_array_equal(achievements, np.broadcast_to(expected, (ENVS, 22)))
    np.testing.assert_allclose(rewards, 1.0, atol=1e-6)
    np.testing.assert_array_equal(after.achievements.any(1), ~ending)  # the next episode starts without


def test_the_names_of_achievements_and_the_number_of_actions_are_craftaxs():
    from craftax.craftax_classic.constants import Achievement, Action

    assert [one.name.lower() for one in sorted(Achievement, key=lambda one: one.value)] == list(twm.ACHIEVEMENTS)
    assert len(Action) == twm.NUM_ACTIONS


# --- Collecting ---
def test_rollouts_are_one_unbroken_sequence(rollouts):
    for i, one in enumerate(rollouts.all):
        rollout = one.rollout
        np.testing.assert_array_equal(rollout.frames[0], one.before.frame)
        np.testing.assert_array_equal(rollout.resets[0], one.before.reset)
        np.testing.assert_array_equal(rollout.hidden[0], one.before.hidden)
        np.testing.assert_array_equal(rollout.resets[1:], rollout.dones[:-1])  # a reset is the done of a step earlier
        np.testing.assert_array_equal(one.after.reset, rollout.dones[-1])
        if i % 4:  # else the fixture changes the clock in between
            np.testing.assert_array_equal(one.before.frame, rollouts.all[i - 1].after.frame)
    assert rollouts.all[0].rollout.resets[0].all()
    policy = jax.jit(twm.Policy(rollouts.args).apply)
    last = rollouts.all[1]
    inputs = last.after.frame[None], last.after.reset[None], last.after.hidden
    np.testing.assert_allclose(
        last.rollout.last_value[0], policy({"params": rollouts.params}, *inputs)[1][0], rtol=1e-4, atol=1e-5
    )


def test_records_hold_return_length_and_achievements_of_finished_episodes(rollouts):
    totals = np.zeros(rollouts.args.num_envs)
    finished = 0
    for one in rollouts.all:
        rewards, dones = np.asarray(one.rollout.rewards, np.float64), np.asarray(one.rollout.dones)
        lengths = np.asarray(one.before.state.timestep).astype(int)
        for t in range(len(rewards)):
            totals, lengths = totals + rewards[t], lengths + 1
            record = one.records[t]
            np.testing.assert_array_equal(record[:, 0], dones[t])
            assert (record[~dones[t]] == 0).all()
            np.testing.assert_allclose(record[dones[t], 1], totals[dones[t]], rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(record[dones[t], 2], lengths[dones[t]])
            finished += dones[t].sum()
            totals, lengths = np.where(dones[t], 0, totals), np.where(dones[t], 0, lengths)
        np.testing.assert_allclose(one.after.episode_return, totals, rtol=1e-5, atol=1e-5)
    assert finished >= 3


def test_the_score_is_the_geometric_mean_of_success_rates():
    rates = np.array([0.5, 0.01, *[0.0] * 20])
    assert twm.score_percent(rates) == pytest.approx(np.exp((np.log(51) + np.log(2)) / 22) - 1, rel=1e-6)
    assert twm.score_percent(np.ones(22)) == pytest.approx(100, rel=1e-6)


def test_charts_accumulate_over_the_run_and_over_the_window():
    sums = np.zeros((3, 25))
    sums[0, :4], sums[1, :4], sums[2, :4] = (
        (10, 30, 1000, 5),
        (2, 8, 300, 2),
        (1, 3, 100, 1),
    )  # run, then two iterations
    charts = twm.episode_charts(sums)
    assert charts["charts/episodes"] == 10
    assert charts["charts/episodic_return"] == 3 and charts["charts/episodic_length"] == 100
    assert charts["charts/reward_percent"] == pytest.approx(100 / 22 * 11 / 3)
    assert charts["charts/score_percent"] == pytest.approx(51 ** (1 / 22) - 1)  # the run's rate: 5 of 10
    assert charts["charts/score_percent_window"] == pytest.approx(101 ** (1 / 22) - 1)  # the window's: 3 of 3
    assert charts["achievements/collect_wood"] == 1 and charts["achievements/eat_cow"] == 0
    sums[2] = 0
    assert "charts/episodic_return" not in twm.episode_charts(sums)  # no mean over no episodes
    assert twm.episode_charts(np.zeros((3, 25))) == {"charts/episodes": 0}


def test_the_window_forgets_its_oldest_iteration_and_the_run_forgets_nothing():
    sums = np.zeros((3, 25))  # the run, then a window of two iterations
    for i in (1, 2, 4):
        sums = twm.add_episodes(sums, np.full((2, 3, 25), i / 6))  # six records, i in all
    np.testing.assert_allclose(sums[:, 0], [7, 2, 4], rtol=1e-6)

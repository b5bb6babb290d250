"""benchmark/chances.py: what it calls a chance is what the environment then unlocks; its shares are those of a
hand-made record.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import chances
import ppo_cnnrnn_craftax as ppo

PICKAXE, STONE_PICKAXE = (ppo.ACHIEVEMENTS.index(f"make_{name}_pickaxe") for name in ("wood", "stone"))


@pytest.fixture(scope="module")
def workshop():
    """Four environments whose player stands beside a table: with wood and stone, without wood, without stone, and
    with both but a stone pickaxe already made.
    """
    args = ppo.PRESETS["smoke"]
    carry = ppo.init_env(args, jax.random.PRNGKey(0))
    state, each = carry.state, jnp.arange(4)
    x, y = state.player_position.T
    inventory = state.inventory.replace(wood=jnp.array([1, 0, 1, 1]), stone=jnp.array([1, 1, 0, 1]))
    world = state.map.at[each, x + 1, y + 1].set(11)  # BlockType.CRAFTING_TABLE
    had = state.achievements.at[3, STONE_PICKAXE].set(True)
    state = state.replace(inventory=inventory, map=world, achievements=had)
    state = jax.tree.map(lambda new, old: new.astype(old.dtype), state, carry.state)
    return args, carry.replace(state=state, frame=ppo.render(state))


@pytest.fixture(scope="module")
def played(workshop):
    """Four times play() from there on, joined in time, the carry after it, and what the first frames' policy says."""
    args, carry = workshop
    params = ppo.init_policy(args, jax.random.PRNGKey(2)).params
    logits, _, _ = ppo.Policy(args).apply({"params": params}, carry.frame[None], carry.reset[None], carry.hidden)
    parts = []
    for key in jax.random.split(jax.random.PRNGKey(3), 4):
        carry, steps = chances.play(args, params, carry, key)
        parts.append(jax.device_get(steps))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, carry, jax.nn.softmax(logits[0])


def test_a_chance_needs_a_table_the_materials_and_that_it_is_still_missing(workshop, played):
    steps, _, probabilities = played
    assert steps["chance"][0][:, STONE_PICKAXE].tolist() == [True, False, False, False]
    assert steps["chance"][0][:, PICKAXE].tolist() == [True, False, True, True]
    # The action is the one that makes it, and no other.
    np.testing.assert_allclose(steps["taken"][0, 0, STONE_PICKAXE], probabilities[0, 12], rtol=1e-4)
    np.testing.assert_allclose(steps["taken"][0, [0, 2, 3], PICKAXE], probabilities[[0, 2, 3], 11], rtol=1e-4)
    inventory = [int(leaf[0]) for leaf in jax.tree.leaves(workshop[1].state.inventory)]
    assert steps["shown"][0, 0].tolist() == [9, 9, 9, 9, *inventory] and sum(inventory) == 2


def test_what_is_called_a_chance_is_what_the_environment_unlocks(played):
    steps, carry, _ = played
    later = np.concatenate([steps["unlocked"][1:], np.asarray(carry.state.achievements, bool)[None]])
    new = np.where(steps["done"][..., None], steps["at_end"] > 0, later) & ~steps["unlocked"]
    assert new.sum() >= 3 and not (new & ~steps["chance"]).any()
    assert (steps["taken"][new] > 0).all() and (steps["taken"][~steps["chance"]] == 0).all()
    assert (steps["taken"] < 1 + 1e-6).all()


def test_whole_episodes_start_and_end_within():
    done = np.array([[0, 0], [1, 0], [0, 1], [1, 0], [0, 0], [0, 0]], bool)
    assert chances.whole_episodes(done)[:, 0].tolist() == [-1, -1, 1, 1, -1, -1]
    assert chances.whole_episodes(done)[:, 1].tolist() == [-1] * 6


def test_knowledge_of_what_is_told_of_noise_and_of_the_rare():
    rng, known = np.random.default_rng(0), np.arange(3000) % 2 == 0
    noise, held_out = rng.normal(size=(3000, 5)), np.arange(3000) % 3 == 0
    assert chances.knowledge(noise + 5 * known[:, None], known, held_out) > 0.99
    assert abs(chances.knowledge(noise, known, held_out) - 0.5) < 0.05
    assert chances.knowledge(noise, np.arange(3000) == 0, held_out) is None


def test_the_table_of_a_hand_made_record():
    steps_in_all, envs = 60, 6
    done = np.zeros((steps_in_all, envs), bool)
    done[9::10] = True  # six episodes of ten steps an environment, of which the first began before
    chance, unlocked, taken, at_end = (np.zeros((steps_in_all, envs, 22)) for _ in range(4))
    chance[10:50:20, :, STONE_PICKAXE] = 1  # two of the five whole ones, at their first step
    taken[10, :, STONE_PICKAXE], taken[30, :, STONE_PICKAXE] = 0.5, 0.1
    unlocked[11:20, :, STONE_PICKAXE] = 1
    at_end[19, :, STONE_PICKAXE] = 1
    chance[0], at_end[9] = 1, 1  # of the first one
    hidden = unlocked[..., STONE_PICKAXE, None] + np.random.default_rng(0).normal(size=(steps_in_all, envs, 3)) / 10
    steps = {"done": done, "chance": chance.astype(bool), "taken": taken, "unlocked": unlocked.astype(bool)}
    result = chances.table(steps | {"at_end": at_end, "hidden": hidden, "shown": np.zeros((steps_in_all, envs, 4))})
    row = result["achievements"]["make_stone_pickaxe"]
    assert result["episodes"] == 5 * envs and row["unlocked"] == 0.2 and row["chance"] == 0.4
    assert row["taken"] == pytest.approx(0.3) and row["remembered"] > 0.99 and row["shown"] == 0.5
    assert result["achievements"]["collect_coal"] == {
        "unlocked": 0, "chance": 0, "taken": None, "remembered": None, "shown": None,
    }  # fmt: skip


def test_a_run_folder_is_asked_from_the_command_line(smoke_run, monkeypatch, capsys):
    written = {}
    monkeypatch.setattr(chances.results, "commit_of", lambda script: None)
    monkeypatch.setattr(chances.results, "write", lambda *parts: written.update(zip("ncrs", parts, strict=True)))
    chances.main([str(smoke_run.folder), "try", "--rollouts", "90"])
    assert written["c"] == [f"python benchmark/chances.py runs/{smoke_run.folder.name} try --rollouts 90"]
    (run,) = json.loads(json.dumps(written["r"], allow_nan=False))
    assert run["steps"] == 96 and run["seed"] == 1 and run["metrics"]["episodes"] > 0
    assert [*run["metrics"]["achievements"]] == ppo.ACHIEVEMENTS
    sapling = run["metrics"]["achievements"]["collect_sapling"]  # grass is where an episode begins
    assert sapling["chance"] > 0.5 and 0 < sapling["taken"] < 0.2 and 0 <= sapling["unlocked"] <= sapling["chance"]
    assert "collect_sapling" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no whole episode"):
        chances.main([str(smoke_run.folder), "try", "--rollouts", "1"])

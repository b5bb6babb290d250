"""benchmark/perfect_model.py: its states are those of the rollout, and its rollouts are the environment's own."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import metrics_of, only, run_main

import perfect_model
import twm_dyna_craftax as twm


@pytest.fixture(scope="module")
def played(tiny):
    """A replay of three rollouts of one policy, and the carry before each of them and after the last."""
    args = tiny(imagination_steps=6, imagination_envs=4, burn_in=5)
    start = jax.random.PRNGKey(3)
    policy, carries, replay = twm.init_policy(args, start), [twm.init_env(args, start)], None
    for key in jax.random.split(start, 3):
        carry, rollout, _ = twm.collect(args, policy.params, carries[-1], key, False)
        states = perfect_model.states_of(args, carries[-1].state, rollout.actions, key)
        steps = twm.Steps(states, rollout.actions, rollout.rewards, rollout.dones, rollout.frames)
        empty = jax.tree.map(lambda leaf: jnp.zeros((16, *leaf.shape[1:]), leaf.dtype), steps)
        replay = replay or twm.Replay(empty, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
        replay = twm.add_to_replay(replay, steps)
        carries.append(carry)
    return args, policy, replay, carries


def test_the_replay_holds_the_states_that_were_rendered(played):
    _, _, replay, carries = played
    rows = (jnp.arange(16) + replay.head) % 16  # from the oldest step, the third of the first rollout
    states, frames = jax.tree.map(lambda ring: ring[rows], (replay.steps.tokens, replay.steps.frames))
    assert (jax.jit(jax.vmap(twm.render))(states) == frames).all()
    for row, carry in ((4, carries[1]), (10, carries[2])):
        for leaf, real in zip(jax.tree.leaves(states), jax.tree.leaves(carry.state), strict=True):
            assert (leaf[row] == real).all()


def test_a_rollout_starts_in_a_replayed_state_and_follows_the_environment(played):
    args, policy, replay, _ = played
    (rollout, advantages, targets), rates = perfect_model.true_batch(args, policy, replay, jax.random.PRNGKey(4))
    key_windows, key_rollout = jax.random.split(jax.random.PRNGKey(4))
    windows = twm.sample_windows(replay, key_windows, args.imagination_envs, args.burn_in + 1, args.replay_size)
    assert (rollout.frames[0] == windows.frames[:, -1]).all() and len(np.unique(rollout.frames[0].sum((1, 2, 3)))) > 1
    state = jax.tree.map(lambda leaf: leaf[:, -1], windows.tokens)
    for t, key in enumerate(jax.random.split(key_rollout, args.imagination_steps)):
        assert (rollout.frames[t] == twm.render(state)).all()
        keys = jax.random.split(jax.random.split(key)[1], args.imagination_envs)
        state, _, rewards, dones, _ = jax.jit(twm.env_step)(state, rollout.actions[t], keys)
        assert (rollout.rewards[t] == rewards).all() and (rollout.dones[t] == dones).all()
    assert rates["reward_rate"] == (np.asarray(rollout.rewards) >= 0.5).mean()
    assert advantages.shape == targets.shape == (args.imagination_steps, args.imagination_envs)
    # With five frames of burn-in from a state of zeros, the policy's values are those of the whole sequence of frames.
    resets = jnp.concatenate([jnp.zeros((1, 4), bool), windows.dones.T[:-1]])
    frames = windows.frames.swapaxes(0, 1)
    values = twm.Policy(args).apply({"params": policy.params}, frames, resets, jnp.zeros((4, args.gru_size)))[1]
    np.testing.assert_allclose(rollout.values[0], values[-1], atol=1e-5)


@pytest.mark.parametrize("flag", ["--resume", "--eval-only", "--dry-run", "--wm-rewarded-actions"])
def test_flags_that_mean_nothing_here_are_refused_before_a_run_is_touched(flag, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps(dataclasses.asdict(twm.PRESETS["smoke"])))
    named = [str(folder)] if flag in ("--resume", "--eval-only") else ["--preset", "smoke", "--runs-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["perfect_model.py", flag, *named])
    with pytest.raises(twm.UserError, match=f"{flag} .* means nothing here"):
        perfect_model.main()
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "args.json"]


def test_the_command_imagines_from_its_warmup_on_and_leaves_a_run_folder(tmp_path, capsys):
    flags = ["--preset", "smoke", "--total-steps", 72, "--warmup-steps", 48, "--eval-episodes", 0]
    code, out, err = run_main(perfect_model, capsys, *flags, "--runs-dir", tmp_path)
    assert code == 0 and "step 72 of 72" in out, err
    assert only(tmp_path).name.startswith("twm_dyna_craftax__perfect-smoke__s1__")
    lines = metrics_of(only(tmp_path))
    assert [line["step"] for line in lines] == [24, 48, 72]
    assert ["losses/imagined_loss" in line for line in lines] == [False, True, True]
    for line in lines[1:]:
        assert line["losses/imagined_approx_kl"] == pytest.approx(0, abs=1e-5)  # a single step on each rollout
        assert 0 <= line["losses/imagined_reward_rate"] < 1 and line["losses/imagined_grad_norm"] > 0

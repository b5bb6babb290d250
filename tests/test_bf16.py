"""--dtype bf16: networks compute in bf16, all that is kept or compared stays fp32, and training goes the same way."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import twm_dyna_craftax as twm

STEPS = 200


def learn_policy(args, rollouts):
    """Losses of 200 PPO gradient steps, round and round the same rollouts; the mean over six policies, since after 150
    steps one alone is led elsewhere by its last bit: its loss then differs by 7 % between bf16 and fp32 (deviation
    over eight policies), without a bias.
    """
    runs = []
    for seed in range(6):
        policy, logs = twm.init_policy(args, jax.random.PRNGKey(seed)), []
        while len(logs) < STEPS:
            for one in rollouts.all:
                batch = one.rollout, *twm.advantages_and_targets(args, policy.value_norm, one.rollout)
                for index in range(args.num_minibatches):
                    policy, log = twm.ppo_step(args, policy, batch, args.num_envs // args.num_minibatches, index)
                    logs.append(log)
        runs.append(jax.device_get(logs[:STEPS]))
    return policy, jax.tree.map(lambda *losses: np.mean(losses, axis=0), *runs)


def learn_world_model(args, rollouts):
    """Losses of 200 world-model gradient steps on a replay of the rollouts."""
    empty = jnp.zeros((args.codebook_size, 147), jnp.uint8), jnp.zeros((), jnp.int32)
    codebook, replay = twm.Codebook(*empty), twm.init_replay(dataclasses.replace(args, replay_size=512))
    for one in rollouts.all:
        codebook, tokens = twm.grow_codebook(args, codebook, one.rollout.frames)
        steps = one.rollout.actions.astype(jnp.uint8), one.rollout.rewards, one.rollout.dones, one.rollout.frames
        replay = twm.add_to_replay(replay, twm.Steps(tokens, *steps))
    model, logs = twm.init_world_model(args, jax.random.PRNGKey(0)), []
    for key in jax.random.split(jax.random.PRNGKey(1), STEPS):
        model, log = twm.world_model_step(args, args.codebook_size, model, codebook.size, replay, key)
        logs.append(log)
    return model, logs


CASES = [
    (learn_policy, {"value_loss": 0.1, "entropy": 0.01, "loss": 0.1}),
    (learn_world_model, {"token_loss": 0.02, "reward_loss": 0.1, "done_loss": 0.1}),
]


@pytest.mark.parametrize("learn, tolerances", CASES)
def test_losses_follow_fp32_over_200_steps(learn, tolerances, rollouts, tiny):
    """Means over fifty steps each; those of PPO, where a different action probability changes what is learnt next,
    stay within a tenth, as do those of rewards and ends, which are rare; tokens within a fiftieth.
    """
    curves = []
    for dtype in ("fp32", "bf16"):
        learner, logs = learn(tiny(dtype=dtype, learning_rate=1e-3), rollouts)
        curves.append({name: np.array([float(log[name]) for log in logs]) for name in tolerances})
        assert {leaf.dtype for leaf in jax.tree.leaves((learner.params, learner.value_norm))} == {np.dtype("float32")}
        assert all(leaf.dtype == np.float32 for log in logs for leaf in log.values())
    first = next(iter(curves[0].values()))
    assert first[-20:].mean() < 0.8 * first[:20].mean()  # there was something to follow
    for name, tolerance in tolerances.items():
        fp32, bf16 = (curve[name].reshape(4, -1).mean(1) for curve in curves)
        print(name, fp32, bf16 / fp32 - 1)
        np.testing.assert_allclose(bf16, fp32, rtol=tolerance, err_msg=name)
        assert not np.array_equal(curves[0][name], curves[1][name])  # bf16 was used


def test_what_softmax_and_gae_read_is_not_rounded_to_bf16(rollouts, tiny):
    args, one = tiny(dtype="bf16"), rollouts.all[0].rollout
    logits, values, _ = twm.Policy(args).apply(
        {"params": twm.init_policy(args, jax.random.PRNGKey(0)).params}, one.frames, one.resets, one.hidden[0]
    )
    inputs = jnp.zeros((1, 2, 81), jnp.int32), jnp.zeros((1, 2), jnp.int32), None
    params = twm.init_world_model(args, jax.random.PRNGKey(0)).params
    outputs = twm.WorldModel(args).apply({"params": params}, inputs, args.codebook_size, args.codebook_size)
    for output in (logits, values, *outputs):
        assert output.dtype == jnp.float32
        assert not np.array_equal(output, output.astype(jnp.bfloat16).astype(jnp.float32))


def test_attention_weights_of_many_keys_sum_to_one_in_bf16():
    """Their sum stays fp32: rounded to bf16, attention to 1,640 equal values is up to 0.8 % off."""
    query, key = (jax.random.normal(jax.random.PRNGKey(i), (n, 16), jnp.bfloat16) for i, n in enumerate((1000, 1640)))
    attended = twm.attend(query, key, jnp.ones((1640, 16), jnp.bfloat16))
    assert attended.dtype == jnp.bfloat16
    np.testing.assert_array_equal(attended.astype(jnp.float32), 1)

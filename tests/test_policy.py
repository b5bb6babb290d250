"""PPO: advantages, value targets, the recurrent policy, its loss, and the sizes that the paper names."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import with_clear_preferences

import twm_dyna_craftax as twm


def random_rollout(T, B, seed=0):
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(2, T, B)).astype(np.float32)
    last_value = rng.normal(size=B).astype(np.float32)
    dones = (rng.random((T, B)) < 0.3).astype(np.float32)
    return rewards, values, last_value, dones


def brute_force_advantages(rewards, values, last_value, dones, gamma, gae_lambda):
    """[GAE] Eq. (16) as it stands, in float64: the discounted sum of an episode's own temporal-difference errors."""
    rewards, values, last_value = (np.asarray(x, np.float64) for x in (rewards, values, last_value))
    steps, environments = rewards.shape
    result = np.zeros((steps, environments))
    for b in range(environments):
        for t in range(steps):
            for k in range(t, steps):
                after = last_value[b] if k == steps - 1 else values[k + 1, b]
                delta = rewards[k, b] + (0 if dones[k, b] else gamma * after) - values[k, b]
                result[t, b] += (gamma * gae_lambda) ** (k - t) * delta
                if dones[k, b]:
                    break
    return result


def test_gae_equals_a_brute_force_sum_over_each_episode():
    rollout = random_rollout(T=23, B=5)
    advantages, targets = twm.compute_gae(*rollout, gamma=0.9, gae_lambda=0.7)
    expected = brute_force_advantages(*rollout, gamma=0.9, gae_lambda=0.7)
    # float32 keeps 7 digits; the sums are of order 1
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(targets, expected + rollout[1], rtol=1e-5, atol=1e-5)


def test_gae_does_not_see_the_next_episode():
    rewards, values, last_value, dones = random_rollout(T=7, B=3)
    dones[:], dones[3] = 0, 1
    before, _ = twm.compute_gae(rewards, values, last_value, dones, gamma=0.9, gae_lambda=0.7)
    rewards[4:] += 100.0
    values[4:] -= 10.0
    after, _ = twm.compute_gae(rewards, values, last_value, dones, gamma=0.9, gae_lambda=0.7)
    np.testing.assert_array_equal(before[:4], after[:4])
    assert not np.isclose(before[4:], after[4:]).any()  # and the change was a change


@pytest.mark.parametrize("n", [0, 1, 2, 40])
def test_value_norm_matches_its_closed_form_after_n_minibatches(n):
    rng, decay = np.random.default_rng(n), 0.95
    minibatches = [rng.normal(loc=3, scale=2, size=(6, 2)).astype(np.float32) for _ in range(n)]
    norm = twm.ValueNorm(*jnp.zeros(3))
    for targets in minibatches:
        norm = norm.update(jnp.asarray(targets), decay)
    weights = np.array([(1 - decay) * decay ** (n - 1 - i) for i in range(n)])
    mean = weights @ [x.mean() for x in minibatches] / max(1 - decay**n, 0.01) if n else 0.0
    deviation = max(weights @ [x.std() for x in minibatches] / max(1 - decay**n, 0.1), 0.1) if n else 0.1
    np.testing.assert_allclose(norm.statistics(), (mean, deviation), rtol=1e-5)


def test_gru_equals_the_textbook_formula_in_numpy():
    size, inputs = 3, np.random.default_rng(0).normal(size=(5, 2, 4)).astype(np.float32)
    hidden = np.random.default_rng(1).normal(size=(2, size)).astype(np.float32)
    gru, resets = twm.GRU(size, jnp.float32), np.zeros((5, 2), bool)
    params = gru.init(jax.random.PRNGKey(0), inputs, resets, hidden)["params"]
    outputs, last = gru.apply({"params": params}, inputs, resets, hidden)
    kernel, bias = params["Dense_0"]["kernel"], params["Dense_0"]["bias"] + 0.0
    w, u, bias = np.split(np.asarray(kernel), 3, 1), np.split(np.asarray(params["recurrent"]), 3, 1), np.split(bias, 3)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    for t, x in enumerate(inputs):
        r = sigmoid(x @ w[0] + bias[0] + hidden @ u[0])
        z = sigmoid(x @ w[1] + bias[1] + hidden @ u[1])
        n = np.tanh(x @ w[2] + bias[2] + r * (hidden @ u[2]))
        hidden = (1 - z) * n + z * hidden
        np.testing.assert_allclose(outputs[t], hidden, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(last, outputs[-1])
    for gate in u:  # each recurrent kernel is orthogonal
        np.testing.assert_allclose(gate.T @ gate, np.eye(size), atol=1e-5)


def test_gru_with_a_reset_inside_equals_two_separate_sequences():
    inputs = np.random.default_rng(0).normal(size=(7, 2, 4)).astype(np.float32)
    hidden = np.random.default_rng(1).normal(size=(2, 3)).astype(np.float32)
    gru, resets, never = twm.GRU(3, jnp.float32), np.zeros((7, 2), bool), np.zeros((7, 2), bool)
    resets[3] = True
    variables = gru.init(jax.random.PRNGKey(0), inputs, resets, hidden)
    outputs, last = gru.apply(variables, inputs, resets, hidden)
    first, _ = gru.apply(variables, inputs[:3], never[:3], hidden)
    second, second_last = gru.apply(variables, inputs[3:], never[3:], np.zeros_like(hidden))
    np.testing.assert_allclose(outputs, np.concatenate([first, second]), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(last, second_last, rtol=1e-6, atol=1e-7)
    assert np.abs(outputs - gru.apply(variables, inputs, never, hidden)[0])[3:].max() > 1e-2  # the reset did something


@pytest.mark.parametrize("encoder", ["cells", "impala"])
def test_policy_with_a_reset_inside_equals_two_separate_sequences(tiny, encoder):
    args = tiny(encoder=encoder, encoder_channels=(4, 4), gru_size=8, tower_size=8)
    frames = np.random.default_rng(0).integers(0, 256, (5, 2, 63, 63, 3), np.uint8)
    hidden = np.random.default_rng(1).normal(size=(2, 8)).astype(np.float32)
    resets, never = np.zeros((5, 2), bool), np.zeros((5, 2), bool)
    resets[2, 1] = True  # of the second environment only
    params = twm.init_policy(args, jax.random.PRNGKey(0)).params
    params = with_clear_preferences(params)
    apply = jax.jit(lambda *inputs: twm.Policy(args).apply({"params": params}, *inputs))
    whole, first, second = (
        apply(frames, resets, hidden),
        apply(frames[:2], never[:2], hidden),
        apply(frames[2:], never[2:], np.zeros_like(hidden)),
    )
    unbroken = apply(frames, never, hidden)
    for i in range(2):  # logits, values
        np.testing.assert_allclose(whole[i][:2], first[i], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(whole[i][2:, 1], second[i][:, 1], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(whole[i][:, 0], unbroken[i][:, 0], rtol=1e-4, atol=1e-5)
        assert np.abs(whole[i] - unbroken[i])[2:, 1].max() > 1e-4  # ten times the tolerance
    np.testing.assert_allclose(whole[2][1], second[2][1], rtol=1e-4, atol=1e-5)


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_paper_networks_have_the_papers_sizes():
    paper, key = twm.PRESETS["paper"], jax.random.PRNGKey(0)
    policy = jax.eval_shape(lambda: twm.init_policy(paper, key)).params  # shapes only: nothing is allocated
    assert count(policy) == 54_535_896
    assert count(policy["ImpalaEncoder_0"]) == 556_742
    assert count(jax.eval_shape(lambda: twm.init_world_model(paper, key)).params) == 1_699_972


def test_paper_encoder_ends_at_eight_by_eight():
    encoder = twm.Encoder(twm.PRESETS["paper"])
    frames = jax.ShapeDtypeStruct((2, 63, 63, 3), jnp.float32)
    outputs, _ = jax.eval_shape(lambda x: encoder.init_with_output(jax.random.PRNGKey(0), x), frames)
    assert outputs.shape == (2, 8 * 8 * 128)


def test_cells_are_the_patches_of_the_map_in_row_major_order():
    frame = np.arange(63 * 63 * 3, dtype=np.float32).reshape(1, 63, 63, 3)
    expected = [frame[0, 7 * r : 7 * r + 7, 7 * c : 7 * c + 7].ravel() for r in range(9) for c in range(9)]
    np.testing.assert_array_equal(twm.to_cells(jnp.asarray(frame))[0], expected)


def test_actions_come_with_their_own_logprobs_and_greedy_takes_the_likeliest(tiny):
    args = tiny()
    params = twm.init_policy(args, jax.random.PRNGKey(0)).params
    params = with_clear_preferences(params)
    frame = jnp.asarray(np.random.default_rng(0).integers(0, 256, (64, 63, 63, 3), np.uint8))
    inputs = frame, jnp.zeros(64, bool), jnp.zeros((64, args.gru_size))
    apply, act = jax.jit(twm.Policy(args).apply), jax.jit(twm.act, static_argnums=0)
    logits, values, hidden = apply({"params": params}, inputs[0][None], inputs[1][None], inputs[2])
    expected = jax.nn.log_softmax(logits[0])
    for greedy in (False, True):
        actions, logprobs, value, after = act(args, params, *inputs, jax.random.PRNGKey(3), greedy)
        np.testing.assert_allclose(logprobs, expected[np.arange(64), actions], rtol=1e-5)
        np.testing.assert_allclose(value, values[0], rtol=1e-5)
        np.testing.assert_allclose(after, hidden, rtol=1e-5)
        likeliest = actions == logits[0].argmax(-1)
        assert likeliest.all() == greedy


def hand_made(args, rollout, seed):
    """The rollout with values and log-probabilities of another policy, so that ratios and errors are not trivial."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(scale=0.4, size=rollout.values.shape).astype(np.float32)
    return rollout.replace(logprobs=rollout.logprobs + noise, values=rollout.values - noise)


def test_ppo_loss_and_advantages_equal_numpy(rollouts):
    args, rollout = rollouts.args, hand_made(rollouts.args, rollouts.all[1].rollout, seed=0)
    rewards = np.random.default_rng(4).normal(size=rollout.rewards.shape).astype(np.float32)
    rollout = rollout.replace(rewards=jnp.asarray(rewards))
    norm = twm.ValueNorm(jnp.float32(0.3), jnp.float32(0.6), jnp.float32(0.5))
    mean, std = 0.6, 1.2
    advantages, targets = twm.advantages_and_targets(args, norm, rollout)
    values, last_value = np.asarray(rollout.values) * std + mean, np.asarray(rollout.last_value[0]) * std + mean
    inputs = rewards, values, last_value, np.asarray(rollout.dones), args.gamma, args.gae_lambda
    raw = brute_force_advantages(*inputs)
    np.testing.assert_allclose(targets, raw + values, rtol=1e-4, atol=1e-5)
    expected = (raw - raw.mean()) / raw.std()
    np.testing.assert_allclose(advantages, expected, rtol=1e-4, atol=1e-4)

    _, logs = jax.jit(twm.ppo_loss, static_argnums=1)(rollouts.params, args, norm, rollout, advantages, targets)
    apply = jax.jit(lambda *x: twm.Policy(args).apply({"params": rollouts.params}, *x))
    logits, new_values, _ = apply(rollout.frames, rollout.resets, rollout.hidden[0])
    log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)
    taken = np.take_along_axis(log_probs, np.asarray(rollout.actions)[..., None], axis=-1)[..., 0]
    ratio = np.exp(taken - np.asarray(rollout.logprobs))
    assert (np.abs(ratio - 1) > 0.2).mean() > 0.2  # clipping has something to do
    policy_loss = -np.minimum(ratio * expected, np.clip(ratio, 0.8, 1.2) * expected).mean()
    value_loss = ((np.asarray(new_values) - (raw + values - mean) / std) ** 2).mean()
    entropy = -(np.exp(log_probs) * log_probs).sum(-1).mean()
    np.testing.assert_allclose(logs["policy_loss"], policy_loss, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(logs["value_loss"], value_loss, rtol=1e-3)
    np.testing.assert_allclose(logs["entropy"], entropy, rtol=1e-4)
    total = policy_loss + args.value_coef * value_loss - args.entropy_coef * entropy
    np.testing.assert_allclose(logs["loss"], total, rtol=1e-3)
    np.testing.assert_allclose(logs["clip_fraction"], (np.abs(ratio - 1) > 0.2).mean(), rtol=1e-5)
    np.testing.assert_allclose(logs["approx_kl"], (ratio - 1 - np.log(ratio)).mean(), rtol=1e-3)


def test_the_ratio_is_one_in_the_first_minibatch_and_moves_afterwards(rollouts):
    """Only if replaying a rollout as one sequence, in minibatches, with its resets and its first hidden state, gives
    what the policy did step by step.
    """
    args, one = rollouts.args, rollouts.all[1]
    assert one.rollout.resets[1:].any(), "choose a rollout with an episode end inside"
    assert np.abs(one.rollout.hidden).max() > 1e-3, "choose a rollout that starts amid an episode"
    state = twm.init_policy(args, jax.random.PRNGKey(0)).replace(params=rollouts.params)
    advantages, targets = twm.advantages_and_targets(args, state.value_norm, one.rollout)
    size = args.num_envs // args.num_minibatches
    for index in range(args.num_minibatches):  # each first, from the policy that acted
        fresh = jax.tree.map(jnp.copy, state)
        after, logs = twm.ppo_step(args, fresh, (one.rollout, advantages, targets), size, index)
        assert abs(logs["approx_kl"]) < 1e-6 and logs["clip_fraction"] == 0
    _, logs = twm.ppo_step(args, after, (one.rollout, advantages, targets), size, 0)
    assert logs["approx_kl"] > 1e-6


@pytest.mark.parametrize("frames", [200, 1])
def test_minibatches_are_whole_environments_in_order(rollouts, frames):
    args, rollout = dataclasses.replace(rollouts.args, micro_batch_frames=frames), rollouts.all[1].rollout
    state = twm.init_policy(args, jax.random.PRNGKey(0))
    advantages, targets = twm.advantages_and_targets(args, state.value_norm, rollout)
    part = jax.tree.map(lambda leaf: leaf[:, 2:], (rollout, advantages, targets))  # the second of two pairs
    norm = state.value_norm.update(part[2], args.value_norm_decay)
    _, expected = jax.jit(twm.ppo_loss, static_argnums=1)(state.params, args, norm, *part)
    _, logs = twm.ppo_step(args, state, (rollout, advantages, targets), 2, 1)
    for name in ("loss", "policy_loss", "value_loss", "entropy"):
        np.testing.assert_allclose(logs[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_step_on_small_groups_is_the_step_on_all_of_them(rollouts):
    rollout, after = rollouts.all[1].rollout, {}
    steps, envs = rollout.rewards.shape
    for frames in (steps, steps * envs):
        args = dataclasses.replace(rollouts.args, micro_batch_frames=frames)
        assert twm.gradient_group(args, envs, steps) == frames // steps
        state = twm.init_policy(args, jax.random.PRNGKey(0)).replace(params=jax.tree.map(jnp.copy, rollouts.params))
        batch = rollout, *twm.advantages_and_targets(args, state.value_norm, rollout)
        after[frames] = twm.ppo_step(args, state, batch, envs)
    (one_by_one, logs), (at_once, expected) = after.values()
    for name in expected:
        np.testing.assert_allclose(logs[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=name)
    # Adam's first moment is a tenth of the clipped gradient: no division by its size yet.
    moments = [optax.tree.get(learner.opt_state, "mu") for learner in (one_by_one, at_once)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), *moments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one_by_one.value_norm, at_once.value_norm)


def test_groups_fill_the_devices_and_divide_the_batch(monkeypatch):
    paper, fits = twm.PRESETS["paper"], {}
    for devices in (1, 2, 8):
        monkeypatch.setattr(jax, "device_count", lambda devices=devices: devices)
        envs = paper.num_envs // (8 if devices < 8 else 6)
        fits[devices] = [
            twm.gradient_group(paper, envs, paper.num_steps),
            twm.gradient_group(paper, paper.imagination_envs, paper.imagination_steps),
            twm.gradient_group(dataclasses.replace(paper, micro_batch_frames=1), envs, paper.num_steps),
        ]
    assert fits == {1: [2, 8, 1], 2: [2, 16, 2], 8: [8, 48, 8]}


@pytest.mark.parametrize("anneal", [False, True])
def test_the_learning_rate_falls_to_zero_an_iteration_at_a_time(anneal, tiny, monkeypatch):
    """A constant gradient makes each of Adam's steps as long as the learning rate, whatever its size."""
    args = tiny(learning_rate=0.5, anneal_learning_rate=anneal, total_steps=10 * 24, update_epochs=3, max_grad_norm=1e9)
    adam, steps = twm.policy_adam(args), []

    def ppo_step(args, policy, *_):
        update, opt_state = adam.update(jnp.float32(3.0), policy.opt_state)
        steps.append(-float(update))
        return policy.replace(opt_state=opt_state), {}

    monkeypatch.setattr(twm, "ppo_step", ppo_step)
    monkeypatch.setattr(twm, "advantages_and_targets", lambda *_: (None, None))
    learner = twm.Learner(jnp.zeros(()), adam.init(jnp.zeros(())), None)
    for iteration in range(10):
        learner, _ = twm.ppo_update(args, learner, None, jnp.int32(iteration))
    expected = 0.5 * (1 - np.arange(10) / 10 if anneal else np.ones(10))
    np.testing.assert_allclose(steps, expected.repeat(3 * args.num_minibatches), rtol=1e-4)

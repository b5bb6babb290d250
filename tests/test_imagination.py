"""Imagination: a world model that knows a toy world by heart must reproduce it, and the policy must learn from it as
from real experience.
"""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TOY_CODES, TOY_MODES, metrics_of, toy_frame, toy_step, with_clear_preferences

import twm_dyna_craftax as twm


@pytest.fixture(scope="module")
def dream(toy):
    """The toy, memorised: logits far apart, so that sampling cannot miss. With a policy, and windows to start from."""
    batches = [toy.windows(16, toy.args.context + 1, seed=i, with_frames=False) for i in range(150)]
    model, logs = toy.train(toy.init(seed=1), batches)
    assert logs["token_accuracy"] > 0.999 and logs["loss"] < 0.05, f"the toy was not learnt: {logs}"
    params = jax.tree.map(lambda leaf: leaf, model.params)
    for name in (
        "token_kernel",
        "token_bias",
        "reward_out",
        "done_out",
    ):  # the last layers: softmax at temperature 1/40
        params[name] = jax.tree.map(lambda leaf: leaf * 40, params[name])
    toy.params = params
    policy = twm.init_policy(toy.args, jax.random.PRNGKey(2))
    toy.policy = policy.replace(params=with_clear_preferences(policy.params))
    toy.start = toy.windows(batch=12, length=toy.args.burn_in + 1, seed=100)
    imagine = jax.jit(twm.imagine, static_argnums=(0, 1))
    toy.imagine = lambda policy, windows, key, params=params: imagine(
        toy.args, 256, policy, params, toy.codebook, windows, key
    )
    return toy


def modes_of(dream, frames):
    """Toy frames UInt8[..., 63, 63, 3] -> their modes; fails if a frame is none of the toy's six."""
    known = np.asarray(twm.decode(dream.codebook, jnp.asarray(toy_frame(np.arange(TOY_MODES)))))
    frames = np.asarray(frames)
    same = (frames[..., None, :, :, :] == known).all((-1, -2, -3))  # Bool[..., 6]
    assert (same.sum(-1) == 1).all(), "a frame is none of the toy's"
    return same.argmax(-1)


@pytest.fixture(scope="module")
def rollout(dream):
    return jax.device_get(dream.imagine(dream.policy, dream.start, jax.random.PRNGKey(3)))


def test_an_imagined_rollout_reproduces_the_toy_exactly(dream, rollout):
    np.testing.assert_array_equal(rollout.frames[0], dream.start.frames[:, -1])  # it starts at the last real frame
    modes = modes_of(dream, rollout.frames)  # Int[T, B]
    mode = modes[0]
    for t in range(dream.args.imagination_steps):
        np.testing.assert_array_equal(modes[t], mode, err_msg=f"frame {t}")
        mode, reward, done = toy_step(mode, rollout.actions[t])
        np.testing.assert_array_equal(rollout.rewards[t], reward, err_msg=f"reward {t}")
        np.testing.assert_array_equal(rollout.dones[t], done, err_msg=f"done {t}")
    np.testing.assert_array_equal(rollout.resets[1:], rollout.dones[:-1])
    np.testing.assert_array_equal(rollout.resets[0], dream.start.dones[:, -2])
    assert rollout.dones[:-1].any() and rollout.rewards.any() and len(np.unique(rollout.actions)) > 4


def test_the_world_model_sees_all_that_was_imagined_before(dream):
    """The toy needs no memory; a model with random weights, of which the likeliest outputs are taken, tells whether an
    imagined step saw the steps before it: it must be what the whole forward pass over the imagined sequence says.
    """
    args = dream.args
    params = jax.tree.map(lambda leaf: leaf * 5, twm.init_world_model(args, jax.random.PRNGKey(7)).params)
    sharp = {name: jax.tree.map(lambda leaf: leaf * 1e4, params[name]) for name in ("token_kernel", "token_bias")}
    rollout = dream.imagine(dream.policy, dream.start, jax.random.PRNGKey(3), {**params, **sharp})
    codes = np.asarray(dream.codebook.codes[:TOY_CODES])
    cells = np.stack([twm.to_cells(frames) for frames in rollout.frames], axis=1)  # UInt8[B, T, 81, 147]
    tokens = (cells[..., None, :] == codes).all(-1).argmax(-1)  # Int[B, T, 81]

    def likeliest(tokens, actions):
        apply = jax.jit(twm.WorldModel(args).apply, static_argnums=(2, 4))
        return apply({"params": params}, (tokens, actions, None), 256, TOY_CODES, True)[0].argmax(-1)

    actions = np.asarray(rollout.actions.T)
    seen = (likeliest(tokens, actions)[:, :-1] == tokens[:, 1:]).mean((0, 2))  # of each step after the first
    blind = [(likeliest(tokens[:, t : t + 1], actions[:, t : t + 1])[:, 0] == tokens[:, t + 1]).mean() for t in (0, 1)]
    assert seen.min() > 0.995  # all but ties
    assert blind[0] > 0.995 and blind[1] < 0.9  # without memory it would show from the second step on


def test_drawn_tokens_follow_the_softmax_and_are_in_use():
    codes, size, draws = 300, 280, 200_000
    logits = jax.random.normal(jax.random.PRNGKey(0), (2, codes)) * jnp.array([[1.0], [4.0]])
    logits = jnp.where(jnp.arange(codes) < size, logits, -1e30)
    repeated = jnp.broadcast_to(logits, (draws, 2, codes))
    drawn = np.asarray(jax.jit(twm.draw_tokens)(jax.random.PRNGKey(1), repeated, size))
    assert drawn.shape == (draws, 2) and drawn.max() < size
    for row in range(2):
        expected = draws * np.asarray(jax.nn.softmax(logits[row]))[:size]
        counts = np.bincount(drawn[:, row], minlength=size)
        common = expected >= 5
        statistic = np.square(counts - expected)[common] / expected[common]
        assert abs(statistic.sum() - common.sum()) < 5 * np.sqrt(2 * common.sum())  # chi-square
        rare = expected[~common].sum()
        assert abs(counts[~common].sum() - rare) < 5 * np.sqrt(rare) + 1
    assert abs(np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1]) < 0.02


@pytest.mark.parametrize(("number", "code"), [(0.0, 3), (1 - 2**-23, 6)])
def test_the_ends_of_the_random_numbers_draw_no_code_without_weight(monkeypatch, number, code):
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.full(shape, number))
    logits = jnp.full((5, 16), -1e30).at[:, 3:7].set(jnp.linspace(-2, 3, 20).reshape(5, 4))
    np.testing.assert_array_equal(twm.draw_tokens(jax.random.PRNGKey(0), logits, 7), code)
    logits = jnp.where(jnp.arange(300) < 280, jax.random.normal(jax.random.PRNGKey(0), (1000, 300)), -1e30)
    assert twm.draw_tokens(jax.random.PRNGKey(0), logits, 280).max() < 280  # though sums of the others round up


def test_replayed_actions_reproduce_the_toy_exactly(dream):
    windows = dream.windows(batch=48, length=dream.args.context + 1, seed=200)
    moves = (windows.tokens[:, 1:] != windows.tokens[:, :-1]).any(-1)  # Bool[B, T - 1]
    assert (moves[:, 0] != moves[:, 1]).any() and moves.any(0).all()  # each action matters for itself
    wrong = windows.replace(tokens=windows.tokens.at[:, 1:].set(0))  # nothing to copy from
    key = jax.random.PRNGKey(0)
    tokens = twm.replay_actions(dream.args, 256, 1, dream.params, dream.codebook.size, wrong, key)
    np.testing.assert_array_equal(tokens, windows.tokens)


def test_given_frames_are_true_and_the_following_ones_go_on_from_them(dream):
    windows = dream.windows(batch=8, length=dream.args.context + 1, seed=300)
    highest = toy_frame(np.full(8, TOY_MODES - 1))  # for the second frame: one that no action leads away from
    assert (windows.tokens[:, -1] != highest).any(-1).sum() >= 3  # some windows would have gone on otherwise
    windows = windows.replace(tokens=windows.tokens.at[:, 1].set(highest.astype(np.uint16)))
    key = jax.random.PRNGKey(0)
    tokens = twm.replay_actions(dream.args, 256, 2, dream.params, dream.codebook.size, windows, key)
    np.testing.assert_array_equal(tokens[:, :2], windows.tokens[:, :2])
    np.testing.assert_array_equal(tokens[:, 2], highest)


def test_the_gru_is_warmed_up_with_resets_one_frame_after_each_end(dream):
    """By hand, one frame at a time: the state is zeroed before a frame whose predecessor ended an episode."""
    policy = jax.jit(lambda *x: twm.Policy(dream.args).apply({"params": dream.policy.params}, *x))
    ends = np.zeros((12, dream.args.burn_in + 1), bool)
    ends[:3, 0], ends[3:6, 1], ends[6:9, 2] = True, True, True
    windows = dream.start.replace(dones=jnp.asarray(ends))
    found = jax.device_get(dream.imagine(dream.policy, windows, jax.random.PRNGKey(3)))
    without_ends = dream.start.replace(dones=jnp.zeros_like(windows.dones))
    unbroken = jax.device_get(dream.imagine(dream.policy, without_ends, jax.random.PRNGKey(3)))
    hidden, never = np.zeros((12, dream.args.gru_size), np.float32), np.zeros((1, 12), bool)
    for t in range(dream.args.burn_in):
        if t:
            hidden = np.where(ends[:, t - 1, None], 0, hidden)
        hidden = policy(windows.frames[:, t][None], never, hidden)[2]
    np.testing.assert_allclose(found.hidden[0], hidden, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(
        found.resets[0], ends[:, -2]
    )  # what ended with the last frame but one; not ends[:, -1]
    moved = np.abs(found.hidden[0] - unbroken.hidden[0]).max(1) > 1e-4
    np.testing.assert_array_equal(moved, np.arange(12) < 3)  # by the one end that a frame of the burn-in follows


def test_predicted_ends_reset_the_gru_and_what_was_sampled_is_what_the_policy_said(dream, rollout):
    """The policy run once over the imagined sequence, by hand, gives the recorded values and log-probabilities."""
    policy = jax.jit(lambda *x: twm.Policy(dream.args).apply({"params": dream.policy.params}, *x))
    hidden, values, logprobs = rollout.hidden[0], [], []
    for t in range(dream.args.imagination_steps):
        hidden = np.where(rollout.resets[t][:, None], 0, hidden)
        logits, value, hidden = policy(rollout.frames[t][None], np.zeros((1, 12), bool), hidden)
        values.append(value[0])
        logprobs.append(jax.nn.log_softmax(logits[0])[np.arange(12), rollout.actions[t]])
    np.testing.assert_allclose(rollout.values, values, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(rollout.logprobs, logprobs, rtol=1e-3, atol=1e-4)
    mode = toy_step(modes_of(dream, rollout.frames[-1]), rollout.actions[-1])[0]
    last = twm.decode(dream.codebook, jnp.asarray(toy_frame(mode)))
    hidden = np.where(rollout.dones[-1][:, None], 0, hidden)
    value = policy(last[None], np.zeros((1, 12), bool), hidden)[1][0]
    np.testing.assert_allclose(rollout.last_value[0], value, rtol=1e-3, atol=1e-4)


def test_a_predicted_end_cuts_the_advantage(dream, rollout):
    t, b = np.argwhere(rollout.dones[:-1])[0]
    norm = twm.ValueNorm(*jnp.zeros(3))
    _, before = twm.advantages_and_targets(dream.args, norm, rollout)
    rewards = rollout.rewards.copy()
    rewards[t + 1 :, b] += 50.0
    _, after = twm.advantages_and_targets(dream.args, norm, rollout.replace(rewards=rewards))
    np.testing.assert_array_equal(before[: t + 1, b], after[: t + 1, b])
    assert (np.abs(before[t + 1 :, b] - after[t + 1 :, b]) > 1).all()


def filled_replay(dream):
    args = dream.args
    windows = dream.windows(batch=args.num_envs, length=args.replay_size // args.num_envs, seed=400)
    return twm.add_to_replay(twm.init_replay(args), jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), windows))


def test_rollouts_start_from_the_newest_steps_alone_if_asked_to(dream):
    replay, starts = filled_replay(dream), []
    rows = np.arange(len(replay.steps.actions), dtype=np.uint8)  # frames that tell where they are in the replay
    frames = jnp.broadcast_to(rows[:, None, None, None, None], replay.steps.frames.shape)
    replay = replay.replace(steps=replay.steps.replace(frames=frames))
    for recent in (dream.args.replay_size, dream.args.num_envs * (dream.args.burn_in + 1)):
        args = dataclasses.replace(dream.args, imagination_recent=recent)
        inputs = dream.policy, dream.params, dream.codebook, replay, jax.random.PRNGKey(5)
        (rollout, *_), _ = twm.imagined_batch(args, 256, *inputs)
        starts.append(np.unique(rollout.frames[0]))
    assert len(starts[0]) > 2 and starts[1].tolist() == [rows[-1]]


def test_the_imagined_update_is_on_policy(dream):
    """The log-probabilities of the rollout are those of the loss: ratio 1, nothing clipped; and it moves the policy."""
    args, replay = dream.args, filled_replay(dream)
    before = jax.device_get(dream.policy.params)
    policy = jax.tree.map(jnp.copy, dream.policy)
    key = jax.random.PRNGKey(5)
    batch, _ = twm.imagined_batch(args, 256, policy, dream.params, dream.codebook, replay, key)
    policy, logs = twm.ppo_step(args, policy, batch, args.imagination_envs)
    assert abs(logs["approx_kl"]) < 1e-6 and logs["clip_fraction"] == 0
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, jax.device_get(policy.params))
    # Adam's first step moves each parameter that has a gradient by about the learning rate.
    assert args.learning_rate / 2 < max(jax.tree.leaves(moved)) < 2 * args.learning_rate
    assert float(policy.value_norm.weight) == pytest.approx(1 - args.value_norm_decay)


def test_imagination_begins_after_the_warmup(smoke_run):
    """warmup_steps is 48 there, an iteration 24; a step counts once it was taken."""
    for line in metrics_of(smoke_run.folder):
        imagined = any(key.startswith("losses/imagined_") for key in line)
        assert imagined == (line["step"] >= 48), line["step"]


@pytest.mark.parametrize("decay", [0.0, 0.75])
def test_the_averaged_weights_imagine(tiny, monkeypatch, decay):
    """The mean moves at every gradient step and goes on in the next iteration; imagined rollouts, held-out losses and
    pictures get it, the gradient steps the weights themselves. At decay 0 it is them.
    """
    args, seen = tiny(wm_updates=2, imagination_updates=1, warmup_steps=0, wm_average_decay=decay), {}
    state = jax.eval_shape(lambda: twm.init_state(args))
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
    pictures = jnp.zeros((args.num_steps, args.num_envs, *twm.FRAME), jnp.uint8)
    rollout = twm.Rollout(pictures, *[jnp.zeros(pictures.shape[:2])] * (len(dataclasses.fields(twm.Rollout)) - 1))

    def step(args, vocab, model, size, replay, key):  # weights 1, 2, 3, ...
        return model.replace(params=jax.tree.map(lambda leaf: leaf + 1, model.params)), {}

    def saw(name, position, result):
        return lambda *inputs: (seen.setdefault(name, []).append(inputs[position]), result)[1]

    stubs = {"collect": lambda *_: (state.env, rollout, None), "add_episodes": lambda sums, records: sums}
    stubs |= {"ppo_update": lambda *_: (state.policy, {}), "grow_codebook": lambda *_: (state.codebook, None)}
    stubs |= {
        "add_to_replay": lambda replay, new: replay,
        "world_model_step": step,
        "ppo_step": lambda args, policy, *_: (policy, {}),
    }
    stubs |= {"heldout_loss": saw("heldout", 0, (None, {})), "imagined_batch": saw("imagination", 3, (None, {}))}
    stubs["replay_actions"] = saw("pictures", 3, jnp.zeros((4, args.context + 1, 81), jnp.int32))
    for name, stub in stubs.items():
        monkeypatch.setattr(twm, name, stub)
    for _ in range(2):
        state, _, _ = twm.train_iteration(args, state, jax.random.PRNGKey(0))
    twm.write_media(args, SimpleNamespace(media=lambda *_: None), 0, state, rollout, jax.random.PRNGKey(0))
    means = [(1 - decay) * 1]
    for weights in (2, 3, 4):
        means.append(decay * means[-1] + (1 - decay) * weights)
    values = {name: [np.unique(tree["token_table"]).tolist() for tree in trees] for name, trees in seen.items()}
    first, second = [means[1]], [means[3]]
    assert values == {"heldout": [[0.0], first], "imagination": [first, second], "pictures": [second]}
    assert np.unique(state.model.params["token_table"]) == 4


def test_imagined_rewards_are_counted_like_real_ones(tiny):
    """A world model that pays for the first step of an episode that has not achieved anything, whatever is done: its
    blocks do nothing, the reward head reads one dimension, which is high only while no action has achieved something.
    """
    args = tiny(context=8, imagination_steps=8, wm_rewarded_actions=True, wm_layers=1)
    params = jax.tree.map(jnp.zeros_like, twm.init_world_model(args, jax.random.PRNGKey(0)).params)
    params["norm"]["scale"] = jnp.ones_like(params["norm"]["scale"])
    never, ever = 1.0, -100.0
    table = jnp.full(params["rewarded_table"].shape[:2], ever).at[:, 0].set(never)
    params["rewarded_table"] = params["rewarded_table"].at[:, :, 0].set(table)
    params["reward_hidden"]["kernel"] = params["reward_hidden"]["kernel"].at[0, 0].set(1.0)
    params["reward_out"]["kernel"] = params["reward_out"]["kernel"].at[0, 1].set(100.0)
    params["reward_out"]["bias"] = jnp.array([0.0, -50.0])
    policy, batch = twm.init_policy(args, jax.random.PRNGKey(1)), 16  # ends come with probability 1/2
    shape = batch, args.burn_in + 1
    rewarded = jnp.zeros((*shape, twm.NUM_ACTIONS), jnp.uint8).at[::2, -1, 5].set(3)
    nothing = jnp.zeros((*shape, 81), jnp.uint16), jnp.zeros(shape, jnp.uint8), jnp.zeros(shape), jnp.zeros(shape, bool)
    windows = twm.Steps(*nothing, jnp.zeros((*shape, *twm.FRAME), jnp.uint8), rewarded)
    codebook = twm.Codebook(jnp.zeros((args.codebook_size, 147), jnp.uint8), jnp.int32(1))
    imagine = jax.jit(twm.imagine, static_argnums=(0, 1))
    rollout = jax.device_get(imagine(args, 256, policy, params, codebook, windows, jax.random.PRNGKey(2)))
    achieved = np.arange(batch) % 2 == 0
    for t in range(args.imagination_steps):
        np.testing.assert_array_equal(rollout.rewards[t], ~achieved, err_msg=f"step {t}")
        achieved = (achieved | (rollout.rewards[t] > 0)) & ~rollout.dones[t]
    assert 0.3 < rollout.dones.mean() < 0.7

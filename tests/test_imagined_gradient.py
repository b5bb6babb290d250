"""benchmark/imagined_gradient.py: its statistics, and that each variant has from the world model what it says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import imagined_gradient
import twm_dyna_craftax as twm


def test_signal_and_noise_are_those_of_pairs():
    gradients = np.random.default_rng(0).normal(size=(5, 3)) + 1
    mean, signal, noise = imagined_gradient.moments(jnp.array(g) for g in gradients)
    pairs = [gradients[i] @ gradients[j] for i in range(5) for j in range(5) if i != j]
    np.testing.assert_allclose(mean, gradients.mean(0), rtol=1e-5)
    np.testing.assert_allclose(signal, np.mean(pairs), rtol=1e-4)
    np.testing.assert_allclose(noise, gradients.var(0, ddof=1).sum(), rtol=1e-4)  # the unbiased variance


@pytest.fixture(scope="module", params=[False, True], ids=["", "told what was achieved"])
def rollouts(tiny, request):
    """A state with a grown codebook, a replay of its states, and the rollouts of three variants from one key."""
    args = tiny(imagination_steps=4, imagination_envs=4, burn_in=2, context=4, wm_rewarded_actions=request.param)
    state = twm.init_state(args)
    _, rollout, _ = twm.collect(args, state.policy.params, state.env, jax.random.PRNGKey(1), False)
    state = state.replace(codebook=twm.grow_codebook(args, state.codebook, rollout.frames)[0])
    if args.wm_rewarded_actions:  # every action has achieved something once before the rollouts; counts matter a lot
        once = jnp.ones_like(state.replay.steps.rewarded)
        state = state.replace(replay=state.replay.replace(steps=state.replay.steps.replace(rewarded=once)))
        state.wm_average["rewarded_table"] = 50 * state.wm_average["rewarded_table"]
    replay, vocab = imagined_gradient.play(args, state), twm.live_vocabulary(args, state.codebook)
    variants = ("environment", "expected rewards", "all")
    key = jax.random.PRNGKey(2)
    drawn = {v: imagined_gradient.mixed_batch(args, vocab, v, state, replay, key) for v in variants}
    return args, state, replay, vocab, drawn


def tokens_of(codebook, frames):
    patches = twm.to_cells(frames).reshape(-1, codebook.codes.shape[1]).astype(jnp.float32)
    distance, code = twm.nearest_code(codebook, patches)
    return np.asarray(distance).reshape(*frames.shape[:2], -1), code.reshape(*frames.shape[:2], -1)


def test_variants_differ_in_what_they_say(rollouts):
    args, state, replay, vocab, drawn = rollouts
    real, expected, model = (drawn[variant][0][0] for variant in ("environment", "expected rewards", "all"))
    for field in ("frames", "actions", "dones", "resets", "values"):
        assert (getattr(real, field) == getattr(expected, field)).all()  # one key: one course of events
    played = {frame.tobytes() for frame in np.asarray(replay.steps.frames).reshape(-1, 63, 63, 3)}
    assert all(frame.tobytes() in played for frame in np.asarray(real.frames[0]))
    assert (real.frames[0] == model.frames[0]).all() and (real.frames[1] != model.frames[1]).any()
    assert tokens_of(state.codebook, model.frames[1:])[0].max() == 0  # imagined frames consist of codes

    # Expected rewards are the probabilities of the true frames' sequence; drawn ones are 0 or 1.
    tokens, rewarded, size = tokens_of(state.codebook, real.frames)[1].swapaxes(0, 1), None, state.codebook.size
    if args.wm_rewarded_actions:
        key, length = jax.random.split(jax.random.PRNGKey(2))[0], args.burn_in + 1
        counts = [twm.sample_windows(replay, key, args.imagination_envs, length, args.replay_size).rewarded[:, -1]]
        for t in range(args.imagination_steps - 1):
            counts.append(twm.count_rewarded(counts[-1], real.actions[t], real.rewards[t], real.dones[t]))
        rewarded = jnp.stack(counts, axis=1)
        assert rewarded.max() > 0
    inputs = tokens, real.actions.T, rewarded
    logits = twm.WorldModel(args).apply({"params": state.wm_average}, inputs, vocab, size)[1]
    np.testing.assert_allclose(expected.rewards.T, jax.nn.softmax(logits)[..., 1], atol=1e-5)
    assert set(np.unique(model.rewards)) <= {0.0, 1.0} and ((real.rewards * 10) % 1 < 1e-5).all()


def test_what_was_achieved_before_is_carried_on(rollouts):
    args, state, replay, *_ = rollouts
    counts = replay.steps.rewarded
    assert (counts is None) != args.wm_rewarded_actions
    if counts is not None:
        assert (counts[0] == 1).all()  # not 0: the worlds go on from the state's
        again = twm.add_rewarded(state.replay, jax.tree.map(lambda ring: ring[: args.num_steps], replay.steps))
        assert (again.rewarded == counts[: args.num_steps]).all()


def test_the_gradient_is_that_of_the_policy_loss_in_adams_units(rollouts):
    args, state, _, _, drawn = rollouts
    (rollout, advantages, targets), _ = drawn["environment"]
    policy = state.policy

    def loss(params):
        return twm.ppo_loss(params, args, policy.value_norm, rollout, advantages, targets)[1]["policy_loss"]

    plain = jnp.concatenate([x.ravel() for x in jax.tree.leaves(jax.grad(loss)(policy.params))])
    ours = imagined_gradient.policy_gradient(
        dataclasses.replace(args, micro_batch_frames=8), policy, drawn["environment"][0]
    )
    assert np.abs(plain).max() > 0
    np.testing.assert_allclose(ours * 1e-5, plain, atol=1e-6)  # before the first step Adam's moments are 0


def test_every_variant_is_compared_with_the_environment(rollouts, monkeypatch, capsys):
    args, state, *_, drawn = rollouts
    monkeypatch.setattr(imagined_gradient, "VARIANTS", {name: imagined_gradient.VARIANTS[name] for name in drawn})
    table = imagined_gradient.measure(args, state, batches=2)
    assert list(table) == list(drawn) == [line[:22].strip() for line in capsys.readouterr().out.splitlines()]
    for name, row in table.items():
        assert row["signal_to_noise"] == pytest.approx(row["signal"] / row["noise"], rel=1e-3)
        assert ("projection" in row) == (name != "environment")
        found = min(row["signal"], table["environment"]["signal"]) > 0
        assert ("cosine" in row) == (found and name != "environment")
    assert table["all"]["reward_rate"] * 16 * 2 % 1 == pytest.approx(
        0, abs=1e-3
    )  # of 2 batches of 4 rollouts of 4 steps


def test_a_run_folder_is_measured_from_the_command_line(smoke_run, monkeypatch):
    written, asked, results = {}, [], imagined_gradient.results
    monkeypatch.setattr(results, "commit_of", lambda script: None)
    monkeypatch.setattr(results, "write", lambda *parts: written.update(zip("ncrs", parts, strict=True)))
    monkeypatch.setattr(imagined_gradient, "measure", lambda *given: asked.append(given) or {"all": {"cosine": 0.5}})
    imagined_gradient.main([str(smoke_run.folder), "try", "--batches", "3"])
    args, state, batches = asked[0]
    assert batches == 3 and int(state.iteration) == 4 and args.preset == "smoke"
    (run,) = written["r"]
    assert run["metrics"] == {"all": {"cosine": 0.5}} and run["steps"] == 96
    command = f"python benchmark/imagined_gradient.py runs/{smoke_run.folder.name} try --batches 3"
    assert written["c"] == [command]
    for flags in (["--batches", "1"], ["--batches", "0"]):
        with pytest.raises(SystemExit, match=r"--batches . is too few: give two or more"):
            imagined_gradient.main([str(smoke_run.folder), "try", *flags])

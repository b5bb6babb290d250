"""The benchmark's plain formulations give the scripts' numbers, and its floors count what they say."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import with_clear_preferences

import environment_speed
import plain
import speed
import twm_dyna_craftax as twm

ROLLOUT = "frames resets actions logprobs values rewards dones".split()


@pytest.fixture(scope="module")
def data():
    """Frames of 60 patches, some of which are about as far apart as the tokenizer's limit, and steps on them; no
    dropout, heads that have an opinion.
    """
    args, rng = dataclasses.replace(twm.PRESETS["smoke"], wm_dropout=0.0), np.random.default_rng(0)
    shape, prototypes = (args.num_steps, args.num_envs), rng.integers(40, 216, (20, 147))
    patches = np.clip(prototypes[rng.integers(0, 20, 60)] + rng.normal(scale=13, size=(60, 147)), 0, 255)
    painted = twm.Codebook(jnp.asarray(patches, jnp.uint8), jnp.int32(60))
    frames = jax.jit(twm.decode)(painted, rng.integers(0, 60, (*shape, 81)))
    dones, actions = rng.random(shape) < 0.2, rng.integers(0, twm.NUM_ACTIONS, shape)
    resets = np.concatenate([np.ones((1, args.num_envs), bool), dones[:-1]])
    values, rewards = rng.normal(size=(2, *shape)).astype(np.float32)
    logprobs = (-np.log(twm.NUM_ACTIONS) + 0.2 * rng.normal(size=shape)).astype(np.float32)  # ratios beside 1
    hidden = rng.normal(size=(1, args.num_envs, args.gru_size)).astype(np.float32)
    steps = frames, resets, actions, logprobs, values, rewards, dones, hidden, values[:1]
    rollout = twm.Rollout(*map(jnp.asarray, steps))
    empty = twm.Codebook(jnp.zeros((args.codebook_size, 147), jnp.uint8), jnp.int32(0))
    codebook, tokens = twm.grow_codebook(args, empty, rollout.frames)
    policy = twm.init_policy(args, jax.random.PRNGKey(0))
    model = twm.init_world_model(args, jax.random.PRNGKey(2))
    new = twm.Steps(tokens, rollout.actions.astype(jnp.uint8), rollout.rewards, rollout.dones, rollout.frames)
    replay = twm.add_to_replay(twm.init_replay(args), new)
    fixture = {"args": args, "rollout": rollout, "empty": empty, "codebook": codebook, "tokens": tokens}
    fixture["policy"] = policy.replace(params=with_clear_preferences(policy.params))
    # More opinion, and it would soon draw frames of one code alone, in which normalised cells are nothing but rounding.
    fixture["model"] = model.replace(params=jax.tree.map(lambda leaf: leaf * 1.5, model.params))
    return SimpleNamespace(**fixture, replay=replay, key=jax.random.PRNGKey(3))


def copy(tree):
    return jax.tree.map(jnp.copy, tree)  # for functions that consume it


def assert_trees_close(found, expected, rtol, atol):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("encoder, channels", [("cells", (16, 16)), ("impala", (4, 4, 8))])
@pytest.mark.parametrize("gru, norm", [(True, "channel"), (False, "channel"), (True, "frame")])
def test_the_plain_policy(data, encoder, channels, gru, norm):
    args = dataclasses.replace(data.args, encoder=encoder, encoder_channels=channels, encoder_norm=norm, gru=gru)
    params = with_clear_preferences(twm.init_policy(args, jax.random.PRNGKey(5)).params)
    inputs = data.rollout.frames, data.rollout.resets, data.rollout.hidden[0]
    found = jax.jit(plain.policy, static_argnums=0)(args, params, *inputs)
    expected = jax.jit(lambda params, *x: twm.Policy(args).apply({"params": params}, *x))(params, *inputs)
    assert_trees_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_plain_policy_updates(data):
    args, rollout = data.args, data.rollout
    batch = rollout, *twm.advantages_and_targets(args, data.policy.value_norm, rollout)
    size = args.num_envs // args.num_minibatches
    halves = [jax.tree.map(lambda leaf, i=i: leaf[:, i * size : (i + 1) * size], batch) for i in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *halves)
    found = jax.jit(plain.policy_updates, static_argnums=0)(args, data.policy, stacked)
    expected = copy(data.policy)
    for i in range(2):
        expected, _ = twm.ppo_step(args, expected, batch, size, i)
    # Adam divides by the size of a gradient: of the smallest ones, rounding decides the direction.
    assert_trees_close(found.value_norm, expected.value_norm, rtol=1e-5, atol=1e-6)
    assert_trees_close(found.params, expected.params, rtol=1e-3, atol=1e-4)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), expected.params, data.policy.params)
    assert max(jax.tree.leaves(moved)) > 5e-4


def test_the_plain_tokenizer(data):
    frames = data.rollout.frames
    codebook, tokens = jax.jit(plain.grow_codebook, static_argnums=0)(data.args, data.empty, frames)
    np.testing.assert_array_equal(codebook.codes, data.codebook.codes)
    np.testing.assert_array_equal(tokens, data.tokens)
    assert codebook.size == data.codebook.size > 10
    frames = frames.reshape(-1, *twm.FRAME)
    found = jax.jit(plain.encode)(data.codebook, frames)
    np.testing.assert_array_equal(found, jax.jit(speed.our_encoding)(data.codebook, frames))


def test_the_plain_world_model_step(data):
    args, vocab, size = data.args, 256, data.codebook.size
    found, loss = jax.jit(plain.world_model_step, static_argnums=0)(args, data.model, size, data.replay, data.key)
    expected, logs = twm.world_model_step(args, vocab, copy(data.model), size, data.replay, data.key)
    np.testing.assert_allclose(loss, logs["loss"], rtol=1e-5)
    # The first moment is a tenth of the clipped gradient; parameters move by its sign, whatever its size.
    assert_trees_close(found.opt_state[1][0].mu, expected.opt_state[1][0].mu, rtol=1e-3, atol=1e-6)


def test_the_plain_imagined_rollout(data, monkeypatch):
    args, vocab = data.args, 256
    monkeypatch.setattr(twm, "draw_tokens", lambda key, logits, size: jax.random.categorical(key, logits))
    rest = data.model.params, data.codebook, data.replay, data.key
    found = jax.jit(plain.imagined_rollout, static_argnums=(0, 1))(args, vocab, data.policy.params, *rest)
    rollout = jax.jit(speed.our_rollout, static_argnums=(0, 1))(args, vocab, data.policy, *rest)
    assert_trees_close(found, [getattr(rollout, name) for name in ROLLOUT], rtol=1e-3, atol=1e-4)
    assert len(np.unique(found[0][1:].reshape(-1, 63 * 63 * 3), axis=0)) > 1


def test_dropout_of_the_plain_world_model_drops(data):
    args = dataclasses.replace(data.args, wm_dropout=0.5)
    run = jax.jit(plain.world_model_step, static_argnums=0)
    losses = [run(args, data.model, data.codebook.size, data.replay, data.key)[1] for args in (args, data.args)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("preset", ["paper", "cpu"])
def test_floors_count_the_products_that_the_compiler_counts(preset, monkeypatch):
    """The compiler counts element-wise arithmetic too, leaves out products with padding, and counts a loop once: so
    heads are computed all at once here.
    """
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    args = twm.PRESETS[preset]
    params = jax.eval_shape(lambda: twm.init_policy(args, jax.random.PRNGKey(0))).params
    frames, resets = jax.ShapeDtypeStruct((1, 8, *twm.FRAME), jnp.uint8), jax.ShapeDtypeStruct((1, 8), bool)
    hidden = jax.ShapeDtypeStruct((8, args.gru_size), jnp.float32)
    forward = jax.jit(lambda params, *x: twm.Policy(args).apply({"params": params}, *x))
    counted = forward.lower(params, frames, resets, hidden).cost_analysis()["flops"]
    assert 0.85 < 8 * speed.policy_flops(args)[0] / counted < 1.1

    params = jax.eval_shape(lambda: twm.init_world_model(args, jax.random.PRNGKey(0))).params
    tokens = jax.ShapeDtypeStruct((1, args.context, 81), jnp.int32)
    inputs = tokens, jax.ShapeDtypeStruct((1, args.context), jnp.int32), None
    apply = jax.jit(lambda params, inputs: twm.WorldModel(args).apply({"params": params}, inputs, 512, 400))
    counted = apply.lower(params, inputs).cost_analysis()["flops"]
    assert 0.85 < twm.world_model_flop(args, 512, args.context) / counted < 1.0


def test_exponents_are_slopes_in_log_log():
    sizes = [1, 2, 4, 8]
    np.testing.assert_allclose(speed.exponent(sizes, [3 * size**1.5 for size in sizes]), 1.5, rtol=1e-6)
    np.testing.assert_allclose(speed.exponent(sizes, [7.0] * 4), 0.0, atol=1e-9)


def test_every_timed_program_takes_the_arguments_it_is_given():
    """Traced only, at the sizes of the smallest preset; the studies of growth as they are."""
    args = twm.PRESETS["smoke"]
    parts = speed.parts_of(args, speed.setup(args)).values()
    studies = speed.growth_programs().values()
    programs = [program for part in parts for program in (part.ours, part.plain)]
    for program in [*programs, *(program for study in studies for program in study.values())]:
        function, *inputs = program.largest or (program.function, *program.static, *program.data())
        function.eval_shape(*inputs)
    assert len(programs) == 2 * len(set(speed.GOALS) - {"iteration"} | {"rollout", "policy_forward"})


def test_the_command_measures_a_part_and_writes_it(monkeypatch, capsys):
    written = {}
    monkeypatch.setattr(speed.results, "write", lambda *fields: written.update(zip("ncrs", fields, strict=True)))
    monkeypatch.setattr(speed, "machine_rates", lambda: np.array([[1e11, 5e10], [1e10, 5e9]]))
    monkeypatch.setattr(sys, "argv", "speed.py --preset smoke --only encoding --rounds 2".split())
    speed.main()
    machine, encoding = written["r"][-2:]
    assert (machine["label"], encoding["label"]) == ("smoke/machine", "smoke/encoding")
    assert "peak_gb" not in machine["metrics"]  # so that a part alone does not pass for all
    row = encoding["metrics"]
    assert 0 < row["seconds_spread"]["min"] <= row["seconds"] <= row["seconds_spread"]["max"]
    assert row["floor_seconds"] == max(row["flops_seconds"], row["bytes_seconds"]) > 0
    assert row["cpu_over_floor"] == row["cpu_seconds"] / (2 * row["floor_seconds"]) > 0
    assert row["compile_seconds"] > 0 and row["program_gb"] > 0
    assert any(line.startswith("encoding") for line in capsys.readouterr().out.splitlines())


def test_a_part_alone_leaves_the_memory_of_all_parts(monkeypatch, tmp_path):
    def write(name, commands, runs, summary):
        content = json.dumps({"commands": commands, "runs": runs, "summary": summary})
        (tmp_path / "benchmark" / "results" / f"{name}.json").write_text(content)
        written.update({run["label"]: run["metrics"] for run in runs})

    written = {}
    (tmp_path / "benchmark" / "results").mkdir(parents=True)
    monkeypatch.setattr(speed, "ROOT", tmp_path)
    monkeypatch.setattr(speed.results, "write", write)
    speed.add_results({"machine": {"gflops": 400.0, "peak_gb": 6.0}, "growth": {"seconds": 1.0}}, "paper", 3, 1)
    speed.add_results({"machine": {"gflops": 300.0}, "encoding": {"seconds": 2.0}}, "paper", 3, 1)
    assert written["paper/machine"] == {"gflops": 300.0, "peak_gb": 6.0}
    assert written["paper/growth"] == {"seconds": 1.0} and written["paper/encoding"] == {"seconds": 2.0}


def test_the_two_auto_resets_are_timed_in_turns_at_equal_work(monkeypatch, capsys):
    written, results = {}, environment_speed.results
    monkeypatch.setattr(results, "write", lambda *parts: written.update(zip("ncrs", parts, strict=True)))
    for name, value in (("NUM_ENVS", 4), ("STEPS", 3), ("ROUNDS", 3)):
        monkeypatch.setattr(environment_speed, name, value)
    environment_speed.main()
    ours, stock = (run["metrics"]["steps_per_second"] for run in written["r"])
    assert [run["label"] for run in written["r"]] == ["ours", "stock"] and len(ours) == len(stock) == 3
    assert all(run["steps"] == 36 for run in written["r"])
    ratios = sorted(a / b for a, b in zip(ours, stock, strict=True))
    found = [written["s"][f"ratio_{name}"] for name in ("min", "median", "max")]
    assert found == ratios and written["s"]["ours"] == sorted(ours)[1]
    assert json.loads(capsys.readouterr().out) == written["s"]

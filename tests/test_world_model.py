"""The transformer world model: who sees whom, cached decoding, unused codes, dropout, and that it can learn."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import twm_dyna_craftax as twm

T = 3


@pytest.fixture(scope="module")
def small(tiny):
    """Two layers, so that what one layer may see cannot leak through the next; weights large enough to show effects."""
    args = tiny(context=T, wm_layers=2, imagination_steps=T)
    params = twm.init_world_model(args, jax.random.PRNGKey(0)).params
    return args, jax.tree.map(lambda leaf: leaf * 3, params)


@pytest.fixture(scope="module")
def forward(small):
    args, params = small
    apply = jax.jit(twm.WorldModel(args).apply, static_argnums=(2, 4))
    return lambda tokens, actions, size=200: apply({"params": params}, (tokens, actions, None), 256, size, True)


def random_sequences(batch, seed=0, size=200):
    rng = np.random.default_rng(seed)
    return rng.integers(0, size, (batch, T, 81)), rng.integers(0, twm.NUM_ACTIONS, (batch, T))


def test_no_block_sees_a_later_one_and_every_slot_sees_its_whole_block(forward):
    """Every single token of a block is changed in turn, one per row of the batch: 81 cells, then the action."""
    tokens, actions = random_sequences(1)
    for t in range(T):
        changed, moved = np.repeat(tokens, 83, axis=0), np.repeat(actions, 83, axis=0)  # the last row stays as it is
        changed[np.arange(81), t, np.arange(81)] += 1
        moved[81, t] = (moved[81, t] + 1) % twm.NUM_ACTIONS
        for outputs in forward(changed, moved):  # Float[83, T, 81, V], Float[83, T, 2], Float[83, T, 2]
            outputs = np.where(np.asarray(outputs) < -1e20, 0, outputs)  # codes not in use
            difference = np.abs(outputs[:82] - outputs[82]).max(-1)  # [82 changes, T] or [82 changes, T, 81 slots]
            # The same sums over the same numbers in the same program: rounding hardly differs.
            assert difference[:, :t].max(initial=0) < 1e-5, f"block {t} is seen by an earlier one"
            assert difference[:, t:].min() > 1e-4, f"not every slot of block {t} or later sees all of block {t}"


def numpy_world_model(args, params, tokens, actions):
    """The definition, with a dense mask, in float64: pre-LN blocks, rotary positions on the flat index, tanh GELU."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    heads, head = args.wm_heads, args.wm_size // args.wm_heads

    def norm(p, x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    def dense(p, x):
        return x @ p["kernel"] + p["bias"]

    def rotate(x):  # [S, heads, D]: each half pair (i, i + D / 2) is a complex number
        frequency = 10_000.0 ** (-np.arange(head // 2) / (head // 2))
        turned = (x[..., : head // 2] + 1j * x[..., head // 2 :]) * np.exp(
            1j * np.arange(len(x))[:, None, None] * frequency
        )
        return np.concatenate([turned.real, turned.imag], axis=-1)

    x = np.concatenate([params["token_table"][tokens], params["action_table"][actions][:, None]], axis=1)
    x = x.reshape(-1, args.wm_size)
    block = np.arange(len(x)) // 82
    for i in range(args.wm_layers):
        p = params[f"blocks_{i}"]
        q, k, v = np.moveaxis(dense(p["qkv"], norm(p["norm1"], x)).reshape(len(x), 3, heads, head), 1, 0)
        scores = np.einsum("qhd,khd->hqk", rotate(q), rotate(k)) / np.sqrt(head)
        scores = np.where(block[None, :] <= block[:, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + dense(p["out"], np.einsum("hqk,khd->qhd", weights, v).reshape(x.shape))
        up = dense(p["up"], norm(p["norm2"], x))
        x = x + dense(p["down"], up / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3))))
    x = norm(params["norm"], x).reshape(-1, 82, args.wm_size)
    cells = np.maximum(dense(params["token_hidden"], x[:, :-1]), 0)
    logits = cells @ params["token_kernel"] + params["token_bias"]
    heads_of = [(params[f"{name}_hidden"], params[f"{name}_out"]) for name in ("reward", "done")]
    return [logits, *(dense(out, np.maximum(dense(hidden, x[:, -1]), 0)) for hidden, out in heads_of)]


def test_it_equals_the_definition_in_numpy(small, forward):
    args, params = small
    tokens, actions = random_sequences(2)
    found = forward(tokens, actions, size=256)
    for row in range(2):
        for one, expected in zip(found, numpy_world_model(args, params, tokens[row], actions[row]), strict=True):
            np.testing.assert_allclose(one[row], expected, atol=1e-4 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("steps, longer", [(T, False), (T, True), (20, True)])  # whether caches are read too far
def test_cached_decoding_equals_the_whole_forward_pass(small, forward, steps, longer):
    """Down to the last of the paper's twenty steps, which fills the caches."""
    (args, params), rng = small, np.random.default_rng(0)
    args = dataclasses.replace(args, context=steps)
    tokens, actions = rng.integers(0, 200, (2, steps, 81)), rng.integers(0, twm.NUM_ACTIONS, (2, steps))
    whole = forward(tokens, actions)
    step = jax.jit(lambda *x, length: twm.WorldModel(args).apply({"params": params}, *x, length, method="step"),
                   static_argnums=(1,), static_argnames="length")  # fmt: skip
    # What is left in unused slots must not matter.
    caches = jax.tree.map(lambda cache: jnp.full_like(cache, 5.0), twm.empty_caches(args, 2))
    for t in range(steps):
        length = steps if longer else t + 1
        outputs, caches = step((tokens[:, t], actions[:, t], None), 256, 200, caches, t, length=length)
        for one, expected in zip(outputs, whole, strict=True):
            np.testing.assert_allclose(one[:, 0], expected[:, t], rtol=1e-4, atol=1e-4)


def test_it_is_told_how_often_each_action_has_achieved_something(tiny):
    """In whole sequences, one step at a time and in the loss; counts that differ in one action of one step change what
    is said of that step, and of no earlier one.
    """
    args, rng = tiny(context=T, imagination_steps=T, wm_rewarded_actions=True), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf * 5, twm.init_world_model(args, jax.random.PRNGKey(0)).params)
    windows = windows_of(rng.integers(0, 200, (2, T + 1, 81)), rng.integers(0, twm.NUM_ACTIONS, (2, T + 1)))
    counts = jnp.asarray(rng.integers(0, 12, (2, T + 1, twm.NUM_ACTIONS)).astype(np.uint8))
    tokens, actions = windows.tokens[:, :-1].astype(int), windows.actions[:, :-1]
    apply = jax.jit(twm.WorldModel(args).apply, static_argnums=(2, 4))
    whole = apply({"params": params}, (tokens, actions, counts[:, :-1]), 256, 200, True)
    other = apply({"params": params}, (tokens, actions, counts[:, :-1].at[0, 1, 3].add(1)), 256, 200, True)
    for one, changed in zip(whole, other, strict=True):
        differs = np.abs(one - changed).reshape(2, T, -1).max(-1) > 1e-4
        assert not differs[1].any() and not differs[0, 0] and differs[0, 1]
    caches = twm.empty_caches(args, 2)
    for t in range(T):
        inputs = tokens[:, t], actions[:, t], counts[:, t]
        outputs, caches = twm.WorldModel(args).apply({"params": params}, inputs, 256, 200, caches, t, T, method="step")
        for one, expected in zip(outputs, whole, strict=True):
            np.testing.assert_allclose(one[:, 0], expected[:, t], rtol=1e-3, atol=1e-3)
    logs = twm.world_model_loss(params, args, 256, 200, windows.replace(rewarded=counts), None)[1]
    logprobs = jax.nn.log_softmax(whole[1])
    labels = (windows.rewards[:, :-1, None] >= 0.5).astype(int)
    np.testing.assert_allclose(logs["reward_loss"], -np.take_along_axis(logprobs, labels, -1).mean(), rtol=1e-4)


def test_rotary_positions_matter_only_as_differences():
    query, key = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

    def product(i, j):
        return (twm.rope(query, jnp.array([i])) * twm.rope(key, jnp.array([j]))).sum()

    np.testing.assert_allclose(product(7, 3), product(104, 100), rtol=1e-3, atol=1e-4)
    assert abs(product(7, 3) - product(3, 7)) > 1e-2  # and they do matter


def windows_of(tokens, actions, seed=0):
    rng = np.random.default_rng(seed)
    rewards = rng.choice([0.0, 1.0, -0.1, 0.1, 0.9], actions.shape).astype(np.float32)
    dones = rng.random(actions.shape) < 0.3
    arrays = tokens.astype(np.uint16), actions.astype(np.uint8), rewards, dones
    return twm.Steps(*map(jnp.asarray, arrays), None)


def test_the_loss_is_three_cross_entropies_on_the_right_labels(small, forward):
    args, params = small
    rng = np.random.default_rng(1)
    tokens, actions = rng.integers(0, 200, (4, T + 1, 81)), rng.integers(0, 17, (4, T + 1))
    tokens[:, 1:, :40] = tokens[:, :1, :40]  # some cells do not change
    windows = windows_of(tokens, actions)
    loss, logs = jax.jit(twm.world_model_loss, static_argnums=(1, 2))(params, args, 256, 200, windows, None)
    logits, reward, done = (jax.nn.log_softmax(x) for x in forward(tokens[:, :-1], actions[:, :-1]))
    labels = tokens[:, 1:]
    unlocked = (np.asarray(windows.rewards)[:, :-1] >= 0.5).astype(int)  # health terms of 0.1 are dropped
    ended = np.asarray(windows.dones)[:, :-1].astype(int)
    pick = lambda x, label: -np.take_along_axis(np.asarray(x), label[..., None], -1).mean()  # noqa: E731
    expected = {
        "token_loss": pick(logits, labels),
        "reward_loss": pick(reward, unlocked),
        "done_loss": pick(done, ended),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(logs[name], value, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(loss, sum(expected.values()), rtol=1e-4)
    weighted = dataclasses.replace(args, wm_inventory_weight=3.0)  # two cells more for each of 18 among 81
    heavier, same = jax.jit(twm.world_model_loss, static_argnums=(1, 2))(params, weighted, 256, 200, windows, None)
    np.testing.assert_allclose(heavier - loss, 2 * 18 / 81 * pick(logits[:, :, 63:], labels[:, :, 63:]), rtol=1e-3)
    assert same["token_loss"] == logs["token_loss"] and same["loss"] == heavier
    right, changed = np.asarray(logits).argmax(-1) == labels, labels != tokens[:, :-1]
    np.testing.assert_allclose(logs["token_accuracy"], right.mean(), rtol=1e-5)
    np.testing.assert_allclose(logs["changed_token_accuracy"], right[changed].mean(), rtol=1e-5)


@pytest.mark.parametrize("in_cells", [False, True])
def test_without_attention_a_cell_knows_the_action_only_if_that_is_added_to_it(tiny, in_cells):
    args = tiny(context=T, imagination_steps=T, wm_action_in_cells=in_cells)
    params = twm.init_world_model(args, jax.random.PRNGKey(0)).params
    blocks = {
        name: block | {"out": jax.tree.map(jnp.zeros_like, block["out"])}
        for name, block in params.items()
        if "blocks" in name
    }
    apply = jax.jit(twm.WorldModel(args).apply, static_argnums=(2, 4))
    inputs = jnp.zeros((1, T, 81), jnp.int32), jnp.arange(T)[None] % 2, None
    cells, reward, _ = apply({"params": params | blocks}, inputs, 256, 200, True)
    assert (np.abs(cells[0, 0] - cells[0, 1]).max() > 1e-4) == in_cells
    assert np.abs(reward[0, 0] - reward[0, 1]).max() > 1e-4  # read at the action's own token


def test_heads_at_once_as_on_a_gpu_equal_one_after_another(tiny, monkeypatch):
    args = tiny(context=T, imagination_steps=T, codebook_size=256, wm_dropout=0.1)
    params = twm.init_world_model(args, jax.random.PRNGKey(0)).params
    rng = np.random.default_rng(2)
    windows = windows_of(rng.integers(0, 200, (4, T + 1, 81)), rng.integers(0, 17, (4, T + 1)))

    def results(backend):
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        grad = jax.jit(lambda p: jax.value_and_grad(twm.world_model_loss, has_aux=True)(
            p, args, 256, 200, windows, jax.random.PRNGKey(1)))  # fmt: skip
        return str(grad.trace(params).jaxpr), *grad(params)

    program, (loss, _), gradients = results("gpu")
    program_on_cpu, (expected, _), expected_gradients = results("cpu")
    assert program != program_on_cpu  # so that two ways are compared
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), gradients, expected_gradients)


def test_a_larger_output_vocabulary_gives_the_same_loss_and_gradients(tiny):
    args = tiny(context=T, imagination_steps=T, codebook_size=600, wm_dropout=0.0)
    params = twm.init_world_model(args, jax.random.PRNGKey(0)).params
    rng = np.random.default_rng(1)
    windows = windows_of(rng.integers(0, 200, (4, T + 1, 81)), rng.integers(0, 17, (4, T + 1)))
    grad = jax.jit(jax.value_and_grad(twm.world_model_loss, has_aux=True), static_argnums=(1, 2))
    results = [grad(params, args, vocab, 200, windows, None) for vocab in (256, 512, 600)]
    for (loss, _), gradients in results[1:]:
        np.testing.assert_allclose(loss, results[0][0][0], rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), gradients, results[0][1])
    assert np.abs(results[2][1]["token_kernel"][:, 200:]).max() == 0  # codes not in use learn nothing
    assert np.abs(results[2][1]["token_kernel"][:, :200]).max() > 1e-4


def test_codes_that_are_not_in_use_are_never_sampled(small):
    args, params = small
    params = jax.tree.map(lambda leaf: leaf / 30, params)  # near the uniform distribution
    eager = {**params, "token_bias": jnp.where(jnp.arange(args.codebook_size) < 5, 0.0, 50.0)}  # they would win
    rng = np.random.default_rng(2)
    windows = windows_of(rng.integers(0, 5, (8, T + 1, 81)), rng.integers(0, 17, (8, T + 1)))
    tokens = twm.replay_actions(args, 256, 1, eager, jnp.int32(5), windows, jax.random.PRNGKey(0))
    codes, counts = np.unique(np.asarray(tokens)[:, 1:], return_counts=True)  # the first frame is given
    assert codes.tolist() == [0, 1, 2, 3, 4]  # all that are in use, and no other
    assert counts.max() < 2 * counts.min()  # nor does one of them get what others were drawn


def test_dropout_acts_in_training_only(tiny):
    rng = np.random.default_rng(3)
    windows = windows_of(rng.integers(0, 200, (4, T + 1, 81)), rng.integers(0, 17, (4, T + 1)))
    loss = jax.jit(twm.world_model_loss, static_argnums=(1, 2))
    rates = (0.0, 0.1, 0.9)
    settings = [tiny(context=T, imagination_steps=T, wm_dropout=rate) for rate in rates]
    params = jax.tree.map(lambda leaf: leaf * 3, twm.init_world_model(settings[0], jax.random.PRNGKey(0)).params)
    without = [loss(params, args, 256, 200, windows, None)[0] for args in settings]
    trained = [[loss(params, args, 256, 200, windows, jax.random.PRNGKey(k))[0] for k in (1, 2)] for args in settings]
    np.testing.assert_allclose(without, without[0], rtol=1e-6)  # the rate does not matter
    np.testing.assert_allclose(trained[0], without[0], rtol=1e-6)  # nor does the key, at rate 0
    for one, other in trained[1:]:
        assert abs(one - other) > 1e-5 and abs(one - without[0]) > 1e-5


@pytest.mark.parametrize("rows", [82, 2 * 2 * 82])
def test_dropout_reaches_attention_weights_and_residual_branches(small, rows, monkeypatch):
    """With either of the two (a mask of weights has a step's rows, a branch all tokens') off, the other acts."""
    args, params = small
    setup = twm.TransformerBlock.setup

    def without(self):
        setup(self)
        drop = self.drop
        self.drop = lambda x, deterministic: x if len(x) == rows else drop(x, deterministic)

    monkeypatch.setattr(twm.TransformerBlock, "setup", without)
    block = twm.TransformerBlock(args)
    x = np.random.default_rng(0).normal(size=(2 * 2 * 82, args.wm_size)).astype(np.float32)
    apply = functools.partial(block.apply, {"params": params["blocks_0"]}, x, 2, False)
    one, other = (apply(rngs={"dropout": jax.random.PRNGKey(k)}) for k in (1, 2))
    assert np.abs(one - other).max() > 1e-3


def test_it_overfits_sixteen_windows(toy):
    """Deterministic transitions: all three losses can vanish, and do."""
    model = toy.init(seed=0)
    windows = toy.windows(batch=16, length=toy.args.context + 1, seed=0, with_frames=False)
    assert 0 < windows.rewards.mean() < 1 and 0 < windows.dones.mean() < 1
    _, first = toy.train(model, [windows])
    _, last = toy.train(model, [windows] * 100)
    assert first["token_loss"] > 2
    assert last["token_loss"] < 0.02 and last["token_accuracy"] > 0.9999
    assert last["reward_loss"] < 0.02 and last["done_loss"] < 0.02

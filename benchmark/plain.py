"""What the Craftax scripts compute, written the plain way: the yardstick of speed.py, equal to the scripts by
tests/test_speed.py. Nothing is cached, skipped, stored for later or taken out of a loop.

Parameters, optimisers and random keys are the scripts', so a plain function and its counterpart give the same numbers
(dropout apart: the masks are drawn in another order). Axes are those of twm_dyna_craftax.py: B environments or
sequences, T steps, S tokens, K codes, d and D widths.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

import environment_speed
import twm_dyna_craftax as twm


def dense(p: dict, x: Array) -> Array:
    return x @ p["kernel"] + p["bias"]


def normalise(x: Array, axes: tuple[int, ...], epsilon: float, p: dict | None = None) -> Array:
    x = (x - x.mean(axes, keepdims=True)) * lax.rsqrt(x.var(axes, keepdims=True) + epsilon)
    return x * p["scale"] + p["bias"] if p else x


# --- Policy ---
def encode_pixels(args: twm.Args, params: dict, x: Array) -> Array:
    """Either encoder as convolutions of the frame. Float[N, 63, 63, 3] -> Float[N, F]."""

    def conv(p, x, stride=1, padding="SAME"):
        layout = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, p["kernel"], (stride, stride), padding, dimension_numbers=layout) + p["bias"]

    def norm(number, x):
        axes = (1, 2, 3) if args.encoder_norm == "frame" else (1, 2)
        return normalise(x, axes, 1e-6, params[f"GroupNorm_{number + cells}"])

    cells = args.encoder == "cells"
    params = params["CellEncoder_0" if cells else "ImpalaEncoder_0"]
    if cells:
        first = params["Dense_0"]["kernel"].reshape(twm.CELL, twm.CELL, 3, -1)
        x = conv(params["Dense_0"] | {"kernel": first}, normalise(x, (1, 2), 1e-6), twm.CELL, "VALID")
        x = jax.nn.relu(x)
    for i in range(0, 3 * (len(args.encoder_channels) - cells), 3):
        x = conv(params[f"Conv_{i}"], norm(i, x))
        x = x if cells else lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
        for j in (i + 1, i + 2):
            x = x + conv(params[f"Conv_{j}"], norm(j, jax.nn.relu(x)))
    return jax.nn.relu(x).reshape(len(x), -1)


def policy(args: twm.Args, params: dict, frames: Array, resets: Array, hidden: Array) -> tuple[Array, Array, Array]:
    """UInt8[T, B, 63, 63, 3], Bool[T, B], Float[B, D] -> logits Float[T, B, A], values Float[T, B], hidden."""
    features = encode_pixels(args, params, frames.reshape(-1, *twm.FRAME) / 255.0).reshape(*resets.shape, -1)
    if args.gru:
        x = jax.nn.relu(dense(params["Dense_0"], normalise(features, (-1,), 1e-6, params["LayerNorm_0"])))

        def cell(hidden, step):
            x, reset = step
            hidden = jnp.where(reset[:, None], 0.0, hidden)
            from_x = jnp.split(dense(params["GRU_0"]["Dense_0"], x), 3, axis=-1)
            from_h = jnp.split(hidden @ params["GRU_0"]["recurrent"], 3, axis=-1)
            reset, update = (jax.nn.sigmoid(a + b) for a, b in zip(from_x[:2], from_h[:2], strict=True))
            hidden = (1 - update) * jnp.tanh(from_x[2] + reset * from_h[2]) + update * hidden
            return hidden, hidden

        hidden, outputs = lax.scan(cell, hidden, (x, resets))
        features = jnp.concatenate([features, jax.nn.relu(outputs)], axis=-1)

    def tower(i, j):  # numbers of its first dense layer and of its first norm
        x = jax.nn.relu(dense(params[f"Dense_{i}"], normalise(features, (-1,), 1e-6, params[f"LayerNorm_{j}"])))
        for k in (i + 1, i + 2):
            x = x + jax.nn.relu(dense(params[f"Dense_{k}"], x))
        return dense(params[f"Dense_{i + 3}"], normalise(x, (-1,), 1e-6, params[f"LayerNorm_{j + 1}"]))

    first = int(args.gru)
    return tower(first, first), tower(first + 4, first + 2)[..., 0], hidden


def act(args: twm.Args, params: dict, frame: Array, reset: Array, hidden: Array, key: Array) -> tuple:
    """Actions Int[B], logprobs, values, hidden."""
    logits, values, hidden = policy(args, params, frame[None], reset[None], hidden)
    actions = jax.random.categorical(key, logits[0])
    logprobs = (jax.nn.one_hot(actions, twm.NUM_ACTIONS) * jax.nn.log_softmax(logits[0])).sum(-1)
    return actions, logprobs, values[0], hidden


def collect(args: twm.Args, params: dict, carry: twm.EnvCarry, key: Array) -> tuple:
    """num_steps steps of Craftax's own environment, which makes a new world for everyone at every step. Returns the
    first seven fields of twm.Rollout.
    """

    def step(carry, key):
        (state, frame, reset, hidden), (key_act, key_env) = carry, jax.random.split(key)
        actions, logprobs, values, hidden = act(args, params, frame, reset, hidden, key_act)
        keys = jax.random.split(key_env, args.num_envs)
        state, (pixels, rewards, dones) = environment_speed.stock_step(state, actions, keys)
        outputs = (frame, reset, actions, logprobs, values, rewards, dones)
        return (state, jnp.round(pixels * 255).astype(jnp.uint8), dones, hidden), outputs

    start = carry.state, carry.frame, carry.reset, carry.hidden
    return lax.scan(step, start, jax.random.split(key, args.num_steps))[1]


def policy_updates(args: twm.Args, learner: twm.Learner, batches: tuple[twm.Rollout, Array, Array]) -> twm.Learner:
    """One PPO step per element of axis 0 of (rollout, advantages, targets), in a loop that the compiler sees."""

    def loss(params, norm, rollout, advantages, targets):
        logits, values, _ = policy(args, params, rollout.frames, rollout.resets, rollout.hidden[0])
        log_probs = jax.nn.log_softmax(logits)
        logprobs = (jax.nn.one_hot(rollout.actions, twm.NUM_ACTIONS) * log_probs).sum(-1)
        ratio = jnp.exp(logprobs - rollout.logprobs)
        clipped = jnp.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
        mean, std = norm.statistics()
        value_loss = jnp.square(values - (targets - mean) / std).mean()
        entropy = -(jnp.exp(log_probs) * log_probs).sum(-1).mean()
        policy_loss = -jnp.minimum(ratio * advantages, clipped * advantages).mean()
        return policy_loss + args.value_coef * value_loss - args.entropy_coef * entropy

    def step(learner, batch):
        norm = learner.value_norm.update(batch[2], args.value_norm_decay)
        return adam_step(args, learner, jax.grad(loss)(learner.params, norm, *batch), norm), None

    return lax.scan(step, learner, batches)[0]


def adam_step(args: twm.Args, learner: twm.Learner, grads: Any, norm: Any = None) -> twm.Learner:
    """norm: the policy's new statistics; None: the learner is the world model."""
    adam = twm.adam(args, args.wm_learning_rate) if norm is None else twm.policy_adam(args)
    updates, opt_state = adam.update(grads, learner.opt_state)
    return twm.Learner(optax.apply_updates(learner.params, updates), opt_state, norm)


# --- Tokenizer ---
def encode(codebook: twm.Codebook, frames: Array) -> Array:
    """Nearest code of every cell by subtraction, a frame at a time. UInt8[N, 63, 63, 3] -> Int[N, 81]."""
    in_use = jnp.arange(len(codebook.codes)) < codebook.size

    def one_frame(patches):  # Float[81, 147]
        difference = patches[:, None] - codebook.codes.astype(jnp.float32)  # Float[81, K, 147]
        return jnp.where(in_use, jnp.square(difference).sum(-1), jnp.inf).argmin(-1)

    return lax.map(one_frame, twm.to_cells(frames).astype(jnp.float32))


def grow_codebook(args: twm.Args, codebook: twm.Codebook, frames: Array) -> tuple[twm.Codebook, Array]:
    """The greedy rule, one patch after the other. UInt8[T, B, 63, 63, 3] -> codebook, tokens Int[T, B, 81]."""
    limit, number = args.code_distance * 255**2, jnp.arange(args.codebook_size)

    def one_patch(codebook, patch):
        distance = jnp.square(patch.astype(jnp.float32) - codebook.codes.astype(jnp.float32)).sum(-1)  # Float[K]
        far = jnp.where(number < codebook.size, distance, jnp.inf).min() > limit
        add = far & (codebook.size < args.codebook_size)
        row = jnp.minimum(codebook.size, args.codebook_size - 1)
        codes = codebook.codes.at[row].set(jnp.where(add, patch, codebook.codes[row]))
        return twm.Codebook(codes, codebook.size + add), None

    def one_step(codebook, frames):
        codebook, _ = lax.scan(one_patch, codebook, twm.to_cells(frames).reshape(-1, twm.CELL * twm.CELL * 3))
        return codebook, encode(codebook, frames)

    return lax.scan(one_step, codebook, frames)


# --- World model ---
def world_model(args: twm.Args, params: dict, tokens: Array, actions: Array, size: Array, key: Array | None) -> tuple:
    """Attention of all tokens to all tokens under a mask, logits for all K codes. tokens Int[B, T, 81], actions
    Int[B, T]; key: of dropout -> logits Float[B, T, 81, K], reward and done logits Float[B, T, 2].
    """
    heads, half = args.wm_heads, args.wm_size // args.wm_heads // 2
    draws = iter(jax.random.split(key, 1 + 3 * args.wm_layers) if key is not None else ())

    def drop(x, shape=None):
        if key is None:
            return x
        return x * jax.random.bernoulli(next(draws), 1 - args.wm_dropout, shape or x.shape) / (1 - args.wm_dropout)

    def rotate(x):  # Float[B, S, heads, 2 half]
        angle = jnp.arange(x.shape[1])[:, None, None] * 10_000.0 ** (-jnp.arange(half) / half)
        left, right = x[..., :half], x[..., half:]
        return jnp.concatenate(
            [left * jnp.cos(angle) - right * jnp.sin(angle), left * jnp.sin(angle) + right * jnp.cos(angle)], axis=-1
        )

    x = jnp.concatenate([params["token_table"][tokens], params["action_table"][actions][:, :, None]], axis=2)
    x = drop(x.reshape(len(x), -1, args.wm_size))  # Float[B, S, d]
    step = jnp.arange(x.shape[1]) // twm.BLOCK
    visible = step[None, :] <= step[:, None]  # Bool[S, S]
    for i in range(args.wm_layers):
        p = params[f"blocks_{i}"]
        qkv = dense(p["qkv"], normalise(x, (-1,), 1e-5, p["norm1"])).reshape(*x.shape[:2], 3, heads, 2 * half)
        query, key_, value = rotate(qkv[:, :, 0]), rotate(qkv[:, :, 1]), qkv[:, :, 2]
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key_) / math.sqrt(2 * half)
        weights = drop(jax.nn.softmax(jnp.where(visible, scores, -1e30)), visible.shape)
        x = x + drop(dense(p["out"], jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)))
        x = x + drop(dense(p["down"], jax.nn.gelu(dense(p["up"], normalise(x, (-1,), 1e-5, p["norm2"])))))
    x = normalise(x, (-1,), 1e-5, params["norm"]).reshape(len(x), -1, twm.BLOCK, args.wm_size)
    cells = jax.nn.relu(dense(params["token_hidden"], x[:, :, :-1]))
    logits = cells @ params["token_kernel"] + params["token_bias"]
    logits = jnp.where(jnp.arange(args.codebook_size) < size, logits, -1e30)
    reward, done = (
        dense(params[f"{name}_out"], jax.nn.relu(dense(params[f"{name}_hidden"], x[:, :, -1])))
        for name in ("reward", "done")
    )
    return logits, reward, done


def world_model_loss(params: dict, args: twm.Args, size: Array, windows: twm.Steps, key: Array | None) -> Array:
    """The three cross-entropies, against one-hot labels. windows: [B, T + 1] steps."""
    tokens = windows.tokens.astype(jnp.int32)
    outputs = world_model(args, params, tokens[:, :-1], windows.actions[:, :-1], size, key)
    labels = tokens[:, 1:], windows.rewards[:, :-1] >= 0.5, windows.dones[:, :-1]

    def cross_entropy(logits, label):
        return -(jax.nn.one_hot(label.astype(jnp.int32), logits.shape[-1]) * jax.nn.log_softmax(logits)).sum(-1).mean()

    return sum(map(cross_entropy, outputs, labels))


def world_model_step(
    args: twm.Args, model: twm.Learner, size: Array, replay: twm.Replay, key: Array
) -> tuple[twm.Learner, Array]:
    """One gradient step on the windows that the script would draw; returns the loss as well."""
    key_windows, key_dropout = jax.random.split(key)
    windows = twm.sample_windows(replay, key_windows, args.wm_batch_size, args.context + 1, args.replay_size)
    key_dropout = key_dropout if args.wm_dropout else None
    loss, grads = jax.value_and_grad(world_model_loss)(model.params, args, size, windows, key_dropout)
    return adam_step(args, model, grads), loss


def imagined_rollout(
    args: twm.Args, vocab: int, params: dict, wm_params: dict, codebook: twm.Codebook, replay: twm.Replay, key: Array
) -> tuple:
    """Every step runs the world model over the whole context again. Returns the first seven fields of twm.Rollout."""
    key_windows, key = jax.random.split(key)
    windows = twm.sample_windows(replay, key_windows, args.imagination_envs, args.burn_in + 1, args.replay_size)
    batch, frames = args.imagination_envs, windows.frames.swapaxes(0, 1)
    resets = jnp.concatenate([jnp.zeros((1, batch), bool), windows.dones.T[:-1]])
    hidden = jnp.zeros((batch, args.gru_size))
    if args.burn_in:
        hidden = policy(args, params, frames[:-1], resets[:-1], hidden)[2]

    def step(carry, inputs):
        (frame, reset, hidden, tokens, past), (t, key) = carry, inputs
        key_act, key_token, key_reward, key_done = jax.random.split(key, 4)
        actions, logprobs, values, hidden = act(args, params, frame, reset, hidden, key_act)
        past = past.at[:, t].set(actions)
        logits, reward, done = (x[:, t] for x in world_model(args, wm_params, tokens, past, codebook.size, None))
        sampled = jax.random.categorical(key_token, logits[..., :vocab])  # no code in use lies beyond vocab
        rewards = jax.random.categorical(key_reward, reward).astype(jnp.float32)
        dones = jax.random.categorical(key_done, done).astype(bool)
        tokens = tokens.at[:, t + 1].set(sampled, mode="drop")  # the last one is no input
        outputs = (frame, reset, actions, logprobs, values, rewards, dones)
        return (twm.decode(codebook, sampled), dones, hidden, tokens, past), outputs

    steps = args.imagination_steps
    tokens = jnp.zeros((batch, steps, twm.BLOCK - 1), jnp.int32).at[:, 0].set(windows.tokens[:, -1].astype(jnp.int32))
    carry = frames[-1], resets[-1], hidden, tokens, jnp.zeros((batch, steps), jnp.int32)
    return lax.scan(step, carry, (jnp.arange(steps), jax.random.split(key, steps)))[1]

"""How far the policy gradient of imagined rollouts is from that of real ones, and which part of the world model it is.

    python benchmark/imagined_gradient.py RUN_FOLDER NAME    # a run of twm_dyna_craftax.py

The newest checkpoint's policy plays three rollouts in the run's own worlds. From their states start batches of rollouts
that are as many and as long as the run's imagined ones; what happens in them is the environment's doing, or in part the
world model's: VARIANTS. The gradient of the policy loss (without value loss and entropy bonus) of each batch is divided
by the root of Adam's second moments, as its step would be. For every variant results/NAME.json has

signal      |E g|^2, without bias from noise: the mean product of two different batches' gradients
noise       E |g - E g|^2 of one batch
cosine      between E g and that of the environment's rollouts, whose draws are others, without bias from noise;
            left out where too few batches give a signal below 0
projection  of E g on the latter, as a multiple of it: how much of the true step is taken
"""

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import perfect_model
import results
import twm_dyna_craftax as twm

VARIANTS = {  # whose frames, ends and rewards a rollout has
    "environment": ("environment", "environment", "environment"),
    "environment again": ("environment", "environment", "environment"),
    "ends": ("environment", "model", "environment"),
    "rewards": ("environment", "environment", "sampled"),
    "expected rewards": ("environment", "environment", "expected"),
    "next frames": ("next", "environment", "environment"),  # drawn by the model, but from true frames before
    "all": ("model", "model", "sampled"),
    "all, expected rewards": ("model", "model", "expected"),
}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def mixed_batch(
    args: twm.Args, vocab: int, variant: str, state: twm.TrainState, replay: twm.Replay, key: Array
) -> tuple[tuple, dict]:
    """imagined_batch() of the script from a replay of environment states, in which the environment and the world model
    run side by side: both meet the policy's actions, and `variant` says whose outcomes count.
    """
    frames_of, ends_of, rewards_of = VARIANTS[variant]
    key_windows, key_rollout = jax.random.split(key)
    policy, batch = state.policy, args.imagination_envs
    start, rewarded = perfect_model.starts(args, policy, replay, key_windows)

    def encode(frames: Array) -> Array:
        patches = twm.to_cells(frames).reshape(-1, state.codebook.codes.shape[1]).astype(jnp.float32)
        return twm.nearest_code(state.codebook, patches)[1].reshape(batch, -1)

    def step(carry, inputs):
        (world, frame, reset, hidden, tokens, rewarded, caches), (t, key) = carry, inputs
        key_act, key_world, key_token, key_reward, key_done = jax.random.split(key, 5)
        actions, logprobs, values, next_hidden = twm.act(args, policy.params, frame, reset, hidden, key_act, False)
        world, true_frame, true_rewards, dones, _ = twm.env_step(world, actions, jax.random.split(key_world, batch))
        model = functools.partial(twm.WorldModel(args).apply, {"params": state.wm_average}, method="step")
        size, length = state.codebook.size, args.imagination_steps
        (logits, reward, done), caches = model((tokens, actions, rewarded), vocab, size, caches, t, length)
        drawn = twm.draw_tokens(key_token, logits[:, 0], size)
        next_frame = true_frame if frames_of == "environment" else twm.decode(state.codebook, drawn)
        tokens = drawn if frames_of == "model" else encode(true_frame)
        if ends_of == "model":
            dones = jax.random.categorical(key_done, done[:, 0]).astype(bool)
        sampled = jax.random.categorical(key_reward, reward[:, 0]).astype(jnp.float32)
        expected = nn.softmax(reward[:, 0])[:, 1]
        rewards = {"environment": true_rewards, "sampled": sampled, "expected": expected}[rewards_of]
        if rewarded is not None:  # a history that the frames belong to
            achieved = sampled if frames_of == "model" else true_rewards
            rewarded = twm.count_rewarded(rewarded, actions, achieved, dones)
        outputs = (frame, reset, actions, logprobs, values, rewards, dones)
        return (world, next_frame, dones, next_hidden, tokens, rewarded, caches), outputs

    tokens, caches = encode(start.frame), twm.empty_caches(args, batch)
    carry = (start.state, start.frame, start.reset, start.hidden, tokens, rewarded, caches)
    inputs = jnp.arange(args.imagination_steps), jax.random.split(key_rollout, args.imagination_steps)
    carry, outputs = jax.lax.scan(step, carry, inputs)
    last_value = twm.act(args, policy.params, *carry[1:4], key, False)[2]
    rollout = twm.Rollout(*outputs, start.hidden[None], last_value[None])
    achieved = rollout.rewards >= 0.5 if rewards_of == "environment" else rollout.rewards  # real ones follow health too
    rates = {"reward_rate": achieved.mean(), "done_rate": rollout.dones.mean()}
    return (rollout, *twm.advantages_and_targets(args, policy.value_norm, rollout)), rates


def play(args: twm.Args, state: twm.TrainState, rollouts: int = 3) -> twm.Replay:
    """A replay that holds exactly `rollouts` new rollouts, with environment states in the place of tokens."""
    env, earlier, rows = state.env, state.replay, rollouts * args.num_steps
    replay = twm.init_replay(dataclasses.replace(args, replay_size=rows * args.num_envs))
    states = jax.tree.map(lambda leaf: jnp.zeros((rows, *leaf.shape), leaf.dtype), env.state)
    replay = replay.replace(steps=replay.steps.replace(tokens=states))
    for key in jax.random.split(jax.random.PRNGKey(1), rollouts):
        before = env.state
        env, rollout, _ = twm.collect(args, state.policy.params, env, key, False)
        states, actions = perfect_model.states_of(args, before, rollout.actions, key), rollout.actions.astype(jnp.uint8)
        new = twm.Steps(states, actions, rollout.rewards, rollout.dones, rollout.frames)
        new = twm.add_rewarded(earlier, new) if args.wm_rewarded_actions else new
        replay = earlier = twm.add_to_replay(replay, new)
    return replay


def policy_gradient(args: twm.Args, policy: twm.Learner, batch: tuple) -> Array:
    """That of the policy loss on a batch, over the root of Adam's second moments: Float[parameters]."""
    args = dataclasses.replace(args, value_coef=0.0, entropy_coef=0.0)
    group = twm.gradient_group(args, args.imagination_envs, args.imagination_steps)
    groups, grads = args.imagination_envs // group, jax.tree.map(jnp.zeros_like, policy.params)
    for i in range(groups):
        grads, _ = twm.add_gradient(args, group, policy.params, policy.value_norm, batch, grads, i)
    second = optax.tree.get(policy.opt_state, "nu")
    scaled = jax.tree.map(lambda grad, nu: grad.ravel() / groups / (jnp.sqrt(nu.ravel()) + 1e-5), grads, second)
    return jnp.concatenate(jax.tree.leaves(scaled))


def moments(gradients: Iterable[Array]) -> tuple[Array, float, float]:
    """Mean, signal and noise (see above) of two independent gradients or more, one at a time."""
    total, squares, count = 0.0, 0.0, 0
    for gradient in gradients:
        total, squares, count = total + gradient, squares + float(gradient @ gradient), count + 1
    signal = (float(total @ total) - squares) / (count * (count - 1))
    return total / count, signal, squares / count - signal


def measure(args: twm.Args, state: twm.TrainState, batches: int) -> dict:
    replay, vocab, table, reference = play(args, state), twm.live_vocabulary(args, state.codebook), {}, None
    for index, variant in enumerate(VARIANTS):
        started, rates = time.perf_counter(), []

        def gradients(variant=variant, index=index, rates=rates):
            for key in jax.random.split(jax.random.PRNGKey(index), batches):
                batch, rate = mixed_batch(args, vocab, variant, state, replay, key)
                rates.append(rate)
                yield policy_gradient(args, state.policy, batch)

        mean, signal, noise = moments(gradients())
        reference = reference or (mean, signal)
        row = {"signal": signal, "noise": noise, "signal_to_noise": signal / noise}
        if variant != "environment":  # its draws are the reference's own
            row["projection"] = float(mean @ reference[0]) / reference[1]
            if min(signal, reference[1]) > 0:
                row["cosine"] = float(mean @ reference[0]) / (signal * reference[1]) ** 0.5
        row |= twm.mean_of(rates) | {"seconds": time.perf_counter() - started}
        table[variant] = {name: results.rounded(value) for name, value in row.items()}
        print(f"{variant:22}", "  ".join(f"{name} {value:.3g}" for name, value in row.items()), flush=True)
    return table


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="RUN_FOLDER")
    parser.add_argument("name", help="of the result file")
    parser.add_argument("--batches", type=int, default=40, help="of rollouts, two at least, for each variant")
    flags = parser.parse_args(argv)
    folder, started = Path(flags.folder), time.perf_counter()
    if flags.batches < 2:  # noise is what two of them differ by
        sys.exit(f"imagined_gradient.py: --batches {flags.batches} is too few: give two or more")
    try:
        args = twm.parse_args(["--eval-only", flags.folder])
        state = twm.load_checkpoint("--eval-only", folder, twm.init_state(args))
    except twm.UserError as error:
        sys.exit(f"imagined_gradient.py: {error}")
    metrics, steps = measure(args, state, flags.batches), int(state.iteration) * args.num_envs * args.num_steps
    seconds = round(time.perf_counter() - started)
    run = results.run_of(folder, dataclasses.asdict(args), steps, metrics=metrics, wall_seconds=seconds)
    command = f"python benchmark/imagined_gradient.py runs/{folder.name} {flags.name} --batches {flags.batches}"
    results.write(flags.name, [command], [run], {})


if __name__ == "__main__":
    main(sys.argv[1:])

"""What imagination can give at best: twm_dyna_craftax.py with Craftax itself in place of its world model.

    python benchmark/perfect_model.py --preset cpu --seed 1    # the flags of twm_dyna_craftax.py

Imagined rollouts start where they start there, from the same warmup on, as many, as long, with the same GRU burn-in
and the same policy update; but their frames, rewards and ends are those of the real environment, whose states the
replay holds. These extra environment steps are not counted. So what this agent gains over PPO is what a perfect world
model could give, and what an agent with a learned one falls short of it is that model's fault. Flags of the tokenizer
and of the world model have no effect, but that --context limits --imagination-steps; --wm-rewarded-actions and those of
a run that exists are refused. There are no checkpoints: args.json, metrics.jsonl, a copy of the script and the
evaluation are written, in a folder whose preset begins with "perfect-".
"""

import dataclasses
import functools
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import twm_dyna_craftax as twm


@functools.partial(jax.jit, static_argnums=0)
def states_of(args: twm.Args, state: Any, actions: Array, key: Array) -> Any:
    """The environment states in which collect(args, ..., key, ...) took actions Int[T, B], from `state` on: [T, B]."""

    def step(state, inputs):
        actions, key = inputs
        keys = jax.random.split(jax.random.split(key)[1], args.num_envs)  # as collect draws them
        return twm.env_step(state, actions, keys)[0], state

    return jax.lax.scan(step, state, (actions, jax.random.split(key, args.num_steps)))[1]


def starts(args: twm.Args, policy: twm.Learner, replay: twm.Replay, key: Array) -> tuple[twm.EnvCarry, Array | None]:
    """Replayed states, their frames, and the GRU warmed up on the frames before them, as in imagine() of the script;
    and their Steps.rewarded, if the replay has it.
    """
    recent = args.imagination_recent // args.num_envs
    windows = twm.sample_windows(replay, key, args.imagination_envs, args.burn_in + 1, recent)
    batch, frames = len(windows.actions), windows.frames.swapaxes(0, 1)
    resets = jnp.concatenate([jnp.zeros((1, batch), bool), windows.dones.T[:-1]])
    hidden = jnp.zeros((batch, args.gru_size))
    if args.burn_in:
        hidden = twm.Policy(args).apply({"params": policy.params}, frames[:-1], resets[:-1], hidden)[2]
    # The replay has states in the place of tokens.
    state, rewarded = jax.tree.map(lambda leaf: leaf[:, -1], (windows.tokens, windows.rewarded))
    return twm.EnvCarry(state, frames[-1], resets[-1], hidden, jnp.zeros(batch)), rewarded


@functools.partial(jax.jit, static_argnums=0)
def true_batch(args: twm.Args, policy: twm.Learner, replay: twm.Replay, key: Array) -> tuple[tuple, dict]:
    """imagined_batch() of the script, but what happens is what the environment does from the replayed state on."""
    key_windows, key_rollout = jax.random.split(key)
    sizes = dataclasses.replace(args, num_envs=args.imagination_envs, num_steps=args.imagination_steps)
    start, _ = starts(args, policy, replay, key_windows)
    rollout = twm.collect(sizes, policy.params, start, key_rollout, False)[1]
    rates = {"reward_rate": (rollout.rewards >= 0.5).mean(), "done_rate": rollout.dones.mean()}
    return (rollout, *twm.advantages_and_targets(args, policy.value_norm, rollout)), rates


def main() -> None:
    args = twm.parse_args()
    for name in ("wm_rewarded_actions", "resume", "eval_only", "dry_run"):
        twm.require(args, name, not getattr(args, name), "means nothing here: leave it out")
    twm.start_jax(args)
    twm.check_args(args)
    args = dataclasses.replace(args, preset=f"perfect-{args.preset}")
    run, env_steps = twm.Run(args), args.num_envs * args.num_steps
    run.on_signal(signal.SIG_DFL)  # nothing could be resumed
    start, base_key = twm.init_state(args), jax.random.fold_in(jax.random.PRNGKey(args.seed), 1_000_000)
    policy, env, sums = start.policy, start.env, start.episode_sums  # the policy and the worlds of the script's own run
    rows = args.replay_size // args.num_envs
    states = jax.tree.map(lambda leaf: jnp.zeros((rows, *leaf.shape), leaf.dtype), env.state)
    replay = start.replay.replace(steps=start.replay.steps.replace(tokens=states))
    for iteration in range(args.num_iterations):
        clock, step = twm.Clock(), (iteration + 1) * env_steps
        key_collect = jax.random.fold_in(base_key, iteration)  # keys are those of the script's iteration
        key_imagine = jax.random.fold_in(key_collect, 3_000_000)
        before = env.state
        env, rollout, records = twm.collect(args, policy.params, env, key_collect, False)
        sums = twm.add_episodes(sums, records)
        clock.lap("collect", sums)
        policy, real = twm.ppo_update(args, policy, rollout, jnp.array(iteration))
        clock.lap("policy_real")
        states, actions = states_of(args, before, rollout.actions, key_collect), rollout.actions.astype(jnp.uint8)
        new = twm.Steps(states, actions, rollout.rewards, rollout.dones, rollout.frames)
        replay = twm.add_to_replay(replay, new)
        clock.lap("replay", replay)
        log = []
        for key in jax.random.split(key_imagine, args.imagination_updates if step >= args.warmup_steps else 0):
            batch, rates = true_batch(args, policy, replay, key)
            policy, one = twm.ppo_step(args, policy, batch, args.imagination_envs)
            log.append(one | rates)
        clock.lap("imagination", policy)
        logs = {f"losses/real_{name}": value for name, value in real.items()}
        logs |= {f"losses/imagined_{name}": value for name, value in twm.mean_of(log).items()}
        logs |= twm.episode_charts(sums) | clock.summary(env_steps)
        run.log(step, logs)
        print(f"step {step:,} of {args.total_steps:,}  return {logs.get('charts/episodic_return', 0):.2f}", flush=True)
    if args.eval_episodes:
        twm.evaluate(args, run, policy.params, args.num_iterations * env_steps)


if __name__ == "__main__":
    try:
        main()
    except twm.UserError as error:
        sys.exit(f"perfect_model.py: {error}")

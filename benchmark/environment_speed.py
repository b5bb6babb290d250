"""Steps per second of this project's auto-reset and of Craftax's own, at 48 environments under a random policy.

    python benchmark/environment_speed.py

Both run in one process, in turns, so that a busy machine slows both; writes benchmark/results/environment_speed.json.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from craftax.craftax_classic.envs.craftax_pixels_env import CraftaxClassicPixelsEnv

import results
import twm_dyna_craftax as script

NUM_ENVS, STEPS, ROUNDS = 48, 96, 5
stock = CraftaxClassicPixelsEnv()


def ours_step(state, actions, keys):
    state, frames, rewards, dones, _ = script.env_step(state, actions, keys)
    return state, (frames, rewards, dones)


def stock_step(state, actions, keys):
    step = jax.vmap(stock.step, in_axes=(0, 0, 0, None))
    frames, state, rewards, dones, _ = step(keys, state, actions, stock.default_params)
    return state, (frames, rewards, dones)


def roll(step, num_envs, steps):
    def one(state, key):
        key_action, key_env = jax.random.split(key)
        actions = jax.random.randint(key_action, (num_envs,), 0, script.NUM_ACTIONS)
        return step(state, actions, jax.random.split(key_env, num_envs))

    return jax.jit(lambda state, key: jax.lax.scan(one, state, jax.random.split(key, steps)))


def main() -> None:
    start, _ = script.env_reset(jax.random.split(jax.random.PRNGKey(0), NUM_ENVS))
    rolls = {"ours": roll(ours_step, NUM_ENVS, STEPS), "stock": roll(stock_step, NUM_ENVS, STEPS)}
    # Compiles, and leaves the start; waits, or the first round would still share the cores with it.
    states = jax.block_until_ready({name: run(start, jax.random.PRNGKey(1))[0] for name, run in rolls.items()})
    speed = {name: [] for name in rolls}
    for round_ in range(ROUNDS):
        for name, run in rolls.items():
            begin = time.perf_counter()
            states[name], outputs = run(states[name], jax.random.PRNGKey(2 + round_))
            jax.block_until_ready(outputs)
            speed[name].append(NUM_ENVS * STEPS / (time.perf_counter() - begin))
    ratios = [ours / theirs for ours, theirs in zip(speed["ours"], speed["stock"], strict=True)]
    runs = [
        {"label": name, "seed": 0, "steps": ROUNDS * NUM_ENVS * STEPS, "metrics": {"steps_per_second": values}}
        for name, values in speed.items()
    ]
    summary = {name: statistics.median(values) for name, values in speed.items()}
    summary |= {"ratio_median": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
    results.write("environment_speed", ["python benchmark/environment_speed.py"], runs, summary)
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()

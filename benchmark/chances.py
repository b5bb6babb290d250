"""Why an agent does not unlock an achievement: had it no chance, did it not take it, or had it forgotten?

    python benchmark/chances.py RUN_FOLDER NAME

The run's newest policy plays on, sampling its actions as in training. At every step the environment itself is asked
what each of the 17 actions would unlock, luck of the moment included: a chance is a step at which some action would
unlock what this episode has not unlocked yet. Of episodes that begin and end meanwhile, which favours short ones, for
each of the 22 achievements:

- unlocked: share of episodes that unlock it
- chance: share of episodes with a chance at one step or more
- taken: the policy's probability of an action that unlocks it, mean over the steps with a chance
- remembered: what the GRU's state knows of it. Area under the ROC curve of a logistic regression that tells from that
  state whether it is unlocked; fitted on two thirds of the environments, measured on the others. 0.5 knows nothing.
- shown: the same from what the frame shows of the player: vitals and inventory

The last two are null where one of the answers is rarer than one step in a hundred. Writes results/NAME.json.
"""

import argparse
import dataclasses
import functools
import importlib
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import ppo_cnnrnn_craftax as ppo
import results


def unlockable(state: Any, keys: Array) -> Array:
    """States of B environments, keys UInt32[B, 2] -> Bool[B, 17, 22]: action a, taken now, would unlock what is
    still locked.
    """
    env = ppo.craftax_classic()

    def after(key, state, action):
        return env.step_env(key, state, action, env.default_params)[1].achievements.astype(bool)

    each_action = jax.vmap(after, in_axes=(None, None, 0))
    achieved = jax.vmap(each_action, in_axes=(0, 0, None))(keys, state, jnp.arange(ppo.NUM_ACTIONS))
    return achieved & ~state.achievements.astype(bool)[:, None]


@functools.partial(jax.jit, static_argnums=0)
def play(args: Any, params: Any, carry: ppo.EnvCarry, key: Array) -> tuple[ppo.EnvCarry, dict[str, Array]]:
    """collect() of the scripts, step by step: what was known and possible before each action. [T, B, ...]."""

    def step(carry, key):
        key_env = jax.random.split(jax.random.split(key, 1)[0])[1]  # as collect and env_step draw them
        keys = jax.vmap(jax.random.split)(jax.random.split(key_env, args.num_envs))[:, 0]
        logits, _, hidden = ppo.Policy(args).apply(
            {"params": params}, carry.frame[None], carry.reset[None], carry.hidden
        )
        chances = unlockable(carry.state, keys)
        vitals = [getattr(carry.state, f"player_{name}") for name in ("health", "food", "drink", "energy")]
        seen = {
            "chance": chances.any(1),
            "taken": jnp.einsum("ba,baz->bz", jax.nn.softmax(logits[0]), chances),
            "unlocked": carry.state.achievements.astype(bool),
            "hidden": hidden,
            "shown": jnp.column_stack(vitals + jax.tree.leaves(carry.state.inventory)),
        }
        one_step = dataclasses.replace(args, num_steps=1)
        after, rollout, records = ppo.collect(one_step, params, carry, key, False)
        return after, seen | {"done": rollout.dones[0], "at_end": records[0, :, 3:]}

    return jax.lax.scan(step, carry, jax.random.split(key, args.num_steps))


def whole_episodes(done: np.ndarray) -> np.ndarray:
    """done Bool[T, B] -> Int[T, B]: a number for each episode that starts and ends within, -1 outside of these."""
    ended = np.cumsum(done, axis=0) - done  # before each step
    number = np.where(ended < done.sum(0), ended, 0)
    return np.where(number > 0, number + (np.arange(done.shape[1]) * (number.max() + 1)), -1)


def knowledge(features: np.ndarray, known: np.ndarray, held_out: np.ndarray) -> float | None:
    """Float[N, D], Bool[N], Bool[N] -> area under the ROC curve on the held-out rows."""
    if min(known.mean(), 1 - known.mean()) < 0.01 or len({*known[held_out]} & {*known[~held_out]}) < 2:
        return None
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    probe.fit(features[~held_out], known[~held_out])
    return float(roc_auc_score(known[held_out], probe.decision_function(features[held_out])))


def table(steps: dict[str, np.ndarray]) -> dict:
    """Of play(), joined in time: a row for each achievement, and how many whole episodes they describe."""
    episode = whole_episodes(steps["done"])
    inside, rows = episode >= 0, {}
    index = np.unique(episode[inside], return_inverse=True)[1]  # Int[N]
    environment = np.broadcast_to(np.arange(episode.shape[1]), episode.shape)[inside]
    drawn = np.random.default_rng(0).permutation(inside.sum())[:10_000]  # enough for a probe
    held_out = environment[drawn] % 3 == 0
    at_end = steps["at_end"][inside & steps["done"]]  # Float[E, 22]
    for z, name in enumerate(ppo.ACHIEVEMENTS):
        chance, unlocked = steps["chance"][..., z][inside], steps["unlocked"][..., z][inside]
        rows[name] = {
            "unlocked": float(at_end[:, z].mean()),
            "chance": float((np.bincount(index, chance) > 0).mean()),
            "taken": float(steps["taken"][..., z][inside][chance].mean()) if chance.any() else None,
            "remembered": knowledge(steps["hidden"][inside][drawn], unlocked[drawn], held_out),
            "shown": knowledge(steps["shown"][inside][drawn], unlocked[drawn], held_out),
        }
    return {"episodes": len(at_end), "achievements": rows}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="RUN_FOLDER", help="of ppo_cnnrnn_craftax.py or twm_dyna_craftax.py")
    parser.add_argument("name", help="of the result file")
    parser.add_argument("--rollouts", type=int, default=25, help="of the run's own length and environments")
    flags = parser.parse_args(argv)
    folder, started = Path(flags.folder).resolve(), time.perf_counter()
    if (name := folder.name.split("__")[0]) not in ("ppo_cnnrnn_craftax", "twm_dyna_craftax"):
        sys.exit(f"chances.py: {flags.folder} is no run folder of a Craftax script: name one")
    script = importlib.import_module(name)
    try:
        args = script.parse_args(["--eval-only", str(folder)])
        state = script.load_checkpoint("--eval-only", folder, script.init_state(args))
    except script.UserError as error:
        sys.exit(f"chances.py: {error}")
    carry, parts = state.env, []
    for key in jax.random.split(jax.random.PRNGKey(7), flags.rollouts):
        carry, steps = play(args, state.policy.params, carry, key)
        parts.append(jax.device_get(steps))
    metrics = table({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    if not metrics["episodes"]:
        sys.exit("chances.py: no whole episode in these steps: give more --rollouts")
    print(f"{metrics['episodes']} episodes")
    for name, row in metrics["achievements"].items():
        print(f"{name:20}", "  ".join(f"{key} {'-' if x is None else f'{x:.2f}'}" for key, x in row.items()))
    steps, seconds = int(state.iteration) * args.num_envs * args.num_steps, round(time.perf_counter() - started)
    run = results.run_of(folder, dataclasses.asdict(args), steps, metrics=metrics, wall_seconds=seconds)
    command = f"python benchmark/chances.py runs/{folder.name} {flags.name} --rollouts {flags.rollouts}"
    results.write(flags.name, [command], [run], {})


if __name__ == "__main__":
    main(sys.argv[1:])

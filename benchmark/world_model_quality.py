"""How good the world model of a run of twm_dyna_craftax.py is, on real steps that no training has seen.

    python benchmark/world_model_quality.py RUN_FOLDER [RUN_FOLDER ...]    # finished or still running

The run's newest checkpoint is taken. Its own policy plays in new worlds; their frames are tokenised with the run's
codebook, to which nothing is added. Then, in results/NAME.json:

cells, frames   the next frame from true frames and actions, up to `context` of them, in windows within one episode:
                share of cells, of frames with all cells right. accuracy: of the likeliest codes; sampled: expected of
                codes drawn as in imagination. Two baselines: copy of the last frame; scroll, a copy of the last frame
                that moves as the player really did
action          the same where a move scrolled the map, with the true actions and with those of another window
reward, done    probability of an achievement, of an episode end, against what happened; also across episode ends
actions         how often the policy takes each action and what for, in the real world and in the imagined one: a model
                whose imagined rewards are easier to get than real ones teaches its policy to get those
curve           over imagined steps: frames after a single true one, under the true actions, beside copying that one;
                rewards and ends in rollouts of the policy inside the world model, beside what really followed the
                frames that they start from

And in the media folder NAME_curves.png, NAME_strips.png and NAME.gif: true sequences, each above its imagined copy
under the same actions (frames with a green border were seen, red ones were imagined).
Axes: N windows, T steps, B environments, L = 81 cells of a frame.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import sys
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import imageio.v3 as imageio
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from craftax.craftax_classic.constants import Action
from flax import struct
from jax import Array

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import results
import twm_dyna_craftax as twm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MAP_ROWS, MAP_COLUMNS = 7, 9  # of the 9 x 9 cells of a frame; the inventory is below
PLAYER = MAP_ROWS // 2 * twm.GRID + MAP_COLUMNS // 2  # the cell in the middle of the map
ITEMS = MAP_ROWS * twm.GRID + 4  # the inventory's first cells are health, food, drink, energy: hidden clocks move them
SCROLLED = "changed map, scrolled there"  # cells that show what a neighbouring cell showed before a move
BIN_EDGES = (0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1)  # of probabilities; events are rare


# --- Held-out steps ---
@struct.dataclass
class HeldOut:
    """Real steps [T, B], or windows of them [N, T], and what their frames do not tell."""

    steps: twm.Steps
    repeats: Array  # Bool[T, B]: the step achieved something, but nothing that its episode had not unlocked before
    creatures: Array  # Bool[T, B]: the frame shows one
    position: Array  # Int[T, B, 2]: row and column of the player, who stands in the middle of the map
    noisy: Array  # Bool[T, B]: so dark that the renderer adds noise
    unknown: Array  # Bool[T, B, L]: cells that the tokenizer would have made a code of


def creatures_in_view(state: Any) -> Array:
    """Bool[B]: a zombie, cow, skeleton or arrow is on the visible map, perhaps in the dark."""
    shown = []
    for mobs in (state.zombies, state.cows, state.skeletons, state.arrows):
        cell = mobs.position - state.player_position[:, None] + jnp.array([MAP_ROWS // 2, MAP_COLUMNS // 2])
        inside = ((cell >= 0) & (cell < jnp.array([MAP_ROWS, MAP_COLUMNS]))).all(-1)  # Bool[B, mobs]
        shown.append((inside & mobs.mask.astype(bool)).any(-1))
    return functools.reduce(jnp.logical_or, shown)


def step_and_repeats(state: Any, actions: Array, keys: Array) -> tuple[Any, Array, Array, Array, Array]:
    """twm.env_step, with HeldOut.repeats in place of the achievements. The same step is also taken from a state that
    has forgotten its achievements, on which nothing else depends: what it unlocks is all that the step achieved.
    """
    forgetful = state.replace(achievements=jnp.zeros_like(state.achievements))
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), state, forgetful)
    outputs = jax.lax.map(lambda one: twm.env_step(one, actions, keys), both)
    achieved, before = outputs[-1][1], state.achievements.astype(bool)  # Bool[B, 22]
    repeats = achieved.any(-1) & ~(achieved & ~before).any(-1)
    return *jax.tree.map(lambda leaf: leaf[0], outputs[:-1]), repeats


@functools.partial(jax.jit, static_argnums=0)
def collect(args: twm.Args, params: Any, codebook: twm.Codebook, carry: twm.EnvCarry, key: Array) -> HeldOut:
    """The steps that twm.collect takes."""

    def step(carry, key):
        key_act, key_env = jax.random.split(key)
        actions, _, _, hidden = twm.act(args, params, carry.frame, carry.reset, carry.hidden, key_act, False)
        keys = jax.random.split(key_env, args.num_envs)
        state, frame, rewards, dones, repeats = step_and_repeats(carry.state, actions, keys)
        patches = twm.to_cells(carry.frame).astype(jnp.float32)  # Float[B, L, 147]
        distance, tokens = twm.nearest_code(codebook, patches.reshape(-1, patches.shape[-1]))
        tokens = tokens.reshape(args.num_envs, -1).astype(jnp.uint16)
        held_out = HeldOut(
            steps=twm.Steps(tokens, actions.astype(jnp.uint8), rewards, dones, carry.frame),
            repeats=repeats,
            creatures=creatures_in_view(carry.state),
            position=carry.state.player_position,
            noisy=carry.state.light_level < 0.5,
            unknown=distance.reshape(tokens.shape) > args.code_distance * 255**2,
        )
        return twm.EnvCarry(state, frame, dones, hidden, carry.episode_return), held_out

    return jax.lax.scan(step, carry, jax.random.split(key, args.num_steps))[1]


def cut_windows(held_out: HeldOut, length: int, stride: int) -> HeldOut:
    """Windows [N, length] of the steps [T, B] of all environments, one every `stride` steps."""
    starts = np.arange(0, len(held_out.repeats) - length + 1, stride)
    rows = starts[:, None] + np.arange(length)
    return jax.tree.map(lambda leaf: leaf[rows].swapaxes(1, 2).reshape(-1, length, *leaf.shape[2:]), held_out)


def in_batches(function: Any, steps: twm.Steps, key: Array, size: int) -> Any:
    """function(part of the steps, key) in parts of one size, for which it is compiled; the last part wraps around."""
    count, parts = len(steps.actions), []
    for start in range(0, count, size):
        part = jax.tree.map(lambda leaf, start=start: leaf[np.arange(start, start + size) % count], steps)
        parts.append(jax.device_get(function(part, jax.random.fold_in(key, start))))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)


# --- One step, from true frames ---
@struct.dataclass
class Prediction:
    """What the world model says of each step of windows [N, T + 1] but the last."""

    likeliest: Array  # UInt16[N, T, L] tokens of the next frame
    logprob: Array  # Float[N, T, L] of its true tokens
    reward: Array  # Float[N, T]: probability of an achievement
    done: Array  # Float[N, T]: probability of an episode end


@functools.partial(jax.jit, static_argnums=(0, 1))
def predict(args: twm.Args, vocab: int, params: Any, size: Array, steps: twm.Steps) -> Prediction:
    """Without dropout, step t from all steps of its window up to t."""
    tokens = steps.tokens.astype(jnp.int32)
    inputs = jax.tree.map(lambda leaf: leaf[:, :-1], (tokens, steps.actions, steps.rewarded))
    logits, reward, done = twm.WorldModel(args).apply({"params": params}, inputs, vocab, size)
    logprob = jnp.take_along_axis(nn.log_softmax(logits), tokens[:, 1:, :, None], axis=-1)[..., 0]
    likeliest = logits.argmax(-1).astype(jnp.uint16)
    return Prediction(likeliest, logprob, nn.softmax(reward)[..., 1], nn.softmax(done)[..., 1])


def frame_groups(windows: HeldOut) -> dict[str, np.ndarray]:
    """Bool[N, T]: which of the frames to be predicted, all but the first of windows [N, T + 1], belong to a group."""
    moved = (np.diff(windows.position, axis=1) != 0).any(-1)
    creatures, noisy = windows.creatures[:, 1:], windows.noisy[:, 1:]
    groups = {"all": np.ones_like(moved), "with creatures": creatures, "without creatures": ~creatures}
    return groups | {"after a move": moved, "after no move": ~moved, "in noise": noisy, "without noise": ~noisy}


def scroll(windows: HeldOut) -> tuple[np.ndarray, np.ndarray]:
    """Where the content of each cell was in the frame before, if only the view moved, Int[N, T, L]; and whether that
    was in view, Bool[N, T, L]. Player and inventory stay in their cells; new in view is copied from the same cell.
    """
    cell = np.arange(twm.GRID**2)
    row, column = np.divmod(cell, twm.GRID)
    move = np.diff(windows.position.astype(int), axis=1)  # Int[N, T, 2]
    before = row + move[..., :1], column + move[..., 1:]
    in_view = (before[0] >= 0) & (before[0] < MAP_ROWS) & (before[1] >= 0) & (before[1] < MAP_COLUMNS)
    scrolls = (row < MAP_ROWS) & (cell != PLAYER)
    return np.where(scrolls & in_view, before[0] * twm.GRID + before[1], cell), in_view | ~scrolls


def cell_groups(windows: HeldOut) -> dict[str, np.ndarray]:
    """Bool[N, T, L]: cells of these frames. After a move, what is new in view can only be guessed."""
    tokens, in_view = windows.steps.tokens, scroll(windows)[1]
    changed = tokens[:, 1:] != tokens[:, :-1]
    on_map = np.broadcast_to(np.arange(twm.GRID**2) < MAP_ROWS * twm.GRID, changed.shape)
    frames = {name: np.broadcast_to(group[..., None], changed.shape) for name, group in frame_groups(windows).items()}
    groups = {"changed": changed, "unchanged": ~changed, "map": on_map, "inventory": ~on_map}
    groups["changed inventory"] = changed & ~on_map
    groups["changed items"] = changed & (np.arange(twm.GRID**2) >= ITEMS)
    groups[SCROLLED] = changed & on_map & frames["after a move"] & in_view
    groups["changed map, new in view"] = changed & ~in_view
    groups["changed map, no move"] = changed & on_map & frames["after no move"]
    return frames | groups | {f"changed, {name}": changed & group for name, group in frames.items() if name != "all"}


def means(groups: dict[str, np.ndarray], **values: np.ndarray) -> dict[str, dict]:
    """The size of every group that has members, and the means of values over it. All arrays are of one shape."""
    return {
        name: {"count": group.sum(), **{key: value[group].mean() for key, value in values.items()}}
        for name, group in groups.items()
        if group.any()
    }


def token_metrics(windows: HeldOut, predicted: Prediction, shuffled: Prediction, actions: np.ndarray) -> dict:
    """Of windows [N, T + 1] within one episode. shuffled: the prediction for `actions` Int[N, T + 1] in place of the
    true ones; compared where the two differ. A model that does not look at the action gets the same with both.
    """
    cells, frames, logprob = cell_groups(windows), frame_groups(windows), predicted.logprob
    last, true = windows.steps.tokens[:, :-1], windows.steps.tokens[:, 1:]
    right = {"accuracy": predicted.likeliest == true, "sampled": np.exp(logprob), "copy": last == true}
    right["scroll"] = np.take_along_axis(last, scroll(windows)[0], axis=-1) == true
    whole = {name: value.all(-1) for name, value in right.items()} | {"sampled": np.exp(logprob.sum(-1))}
    other = cells[SCROLLED] & (actions != windows.steps.actions)[:, :-1, None]
    at = np.arange(true.shape[1])[:, None]
    seen = {f"{t + 1}": cells["changed"] & (at == t) for t in range(true.shape[1])}
    return {
        "cells": means(cells, **right, loss=-logprob),
        "frames": means(frames, **whole),
        "action": means({SCROLLED: other}, true=right["accuracy"], shuffled=shuffled.likeliest == true),
        "changed cells, by frames seen": means(seen, accuracy=right["accuracy"]),
    }


def event_metrics(probability: np.ndarray, happened: np.ndarray) -> dict:
    """Predicted probabilities of an event against whether it happened, arrays of one shape. precision and recall take
    0.5 and more for a yes; sampled_ ones are expected if the outcome is drawn, as in imagination; None: of nothing.
    """
    p, y = probability.ravel().astype(np.float64), happened.ravel()
    yes, at = p >= 0.5, np.digitize(p, BIN_EDGES[1:-1])
    edges = enumerate(itertools.pairwise(BIN_EDGES))
    bins = means({f"{low} to {high}": at == i for i, (low, high) in edges}, predicted=p, true=y)
    gaps = [row["count"] * abs(row["predicted"] - row["true"]) for row in bins.values()]
    return {
        "steps": y.size,
        "events": y.sum(),
        "true_rate": y.mean(),
        "predicted_rate": p.mean(),
        "precision": y[yes].mean() if yes.any() else None,
        "recall": yes[y].mean() if y.any() else None,
        "sampled_precision": p[y].sum() / p.sum(),
        "sampled_recall": p[y].mean() if y.any() else None,
        "brier": np.square(p - y).mean(),
        "brier_of_the_true_rate": y.mean() * (1 - y.mean()),
        "expected_calibration_error": sum(gaps) / y.size,
        "bins": bins,
    }


def reward_metrics(windows: HeldOut, probability: np.ndarray) -> dict:
    """event_metrics of achievements, Float[N, T], and the mean probability of one at steps that unlock one, that only
    repeat what was unlocked before (which no frame tells, so the world model cannot know), and at all others.
    """
    unlocks, repeats = windows.steps.rewards[:, :-1] >= 0.5, windows.repeats[:, :-1]
    kinds = {"unlocks": unlocks, "repeats": repeats & ~unlocks, "neither": ~unlocks & ~repeats}
    return event_metrics(probability, unlocks) | {"kinds": means(kinds, predicted=probability)}


def action_metrics(real: tuple, promised: np.ndarray, imagined: tuple) -> dict:
    """For each action by its name: its share of real and of imagined steps, and the achievements per such
    step. real, imagined: actions Int and achievements Bool of one shape. promised: the probability of an achievement
    that the world model gives a real step, from true frames.
    """
    (taken, unlocks), (dreamt, rewards), table = real, imagined, {}
    for action in Action:
        one, other = taken == action.value, dreamt == action.value
        rates = {"true": unlocks[one], "promised": promised[one], "imagined": rewards[other]}
        rates = {name: values.mean() if values.size else None for name, values in rates.items()}
        table[action.name] = {"real_share": one.mean(), "imagined_share": other.mean(), **rates}
    return table


# --- Many steps ---
def open_loop_curves(true: np.ndarray, imagined: np.ndarray) -> dict[str, np.ndarray]:
    """Tokens [N, 1 + T, L] whose first frame was given. Curves Float[T], beside what copying that frame gets: all
    cells, those that differ from it (copying gets none), whole frames.
    """
    right, copied = imagined[:, 1:] == true[:, 1:], true[:, :1] == true[:, 1:]
    curves = {"accuracy": right.mean((0, 2)), "copy": copied.mean((0, 2))}
    curves["changed_accuracy"] = (right & ~copied).sum((0, 2)) / np.maximum((~copied).sum((0, 2)), 1)
    return curves | {"exact": right.all(-1).mean(0), "exact_copy": copied.all(-1).mean(0)}


imagine = jax.jit(twm.imagine, static_argnums=(0, 1))


def measure(args: twm.Args, state: twm.TrainState, held_out: HeldOut, key: Array) -> tuple[dict, dict, np.ndarray]:
    """One world model on steps [T, B]: metrics, curves, true and imagined frames UInt8[N, 2, T, 63, 63, 3] to draw."""
    live = twm.live_vocabulary(args, state.codebook), state.wm_average, state.codebook.size
    key_shuffle, key_replay, key_imagine = jax.random.split(key, 3)

    def said(part, key):
        return predict(args, *live, part)

    def replayed(part, key):
        return twm.replay_actions(args, live[0], 1, *live[1:], part, key)

    def dreamt(part, key):
        rollout = imagine(args, live[0], state.policy, live[1], state.codebook, part, key)
        return rollout.rewards.T, rollout.dones.T, rollout.actions.T

    run = functools.partial(in_batches, size=args.wm_batch_size)
    windows = cut_windows(held_out, args.context + 1, args.context)
    predicted = run(said, windows.steps, key)
    metrics = {"steps": held_out.repeats.size, "episodes": held_out.steps.dones.sum(), "codes": state.codebook.size}
    metrics |= {"unknown_patches": held_out.unknown.mean(), "reward": reward_metrics(windows, predicted.reward)}
    metrics["done"] = event_metrics(predicted.done, windows.steps.dones[:, :-1])

    real, promised = (windows.steps.actions[:, :-1], windows.steps.rewards[:, :-1] >= 0.5), predicted.reward

    within = ~windows.steps.dones[:, :-1].any(1)  # Bool[N]: of one episode
    twm.require(args, "num_steps", within.any(), "leaves no window within one episode: give more")
    windows, predicted = jax.tree.map(lambda leaf: leaf[within], (windows, predicted))
    steps = windows.steps
    actions = steps.actions[np.asarray(jax.random.permutation(key_shuffle, len(steps.actions)))]
    metrics |= token_metrics(windows, predicted, run(said, steps.replace(actions=actions), key), actions)
    imagined = run(replayed, steps, key_replay)
    curves = {"step": np.arange(1, args.context + 1), **open_loop_curves(steps.tokens, imagined)}

    starts = cut_windows(held_out, args.burn_in + args.imagination_steps, args.imagination_steps).steps
    given = jax.tree.map(lambda leaf: leaf[:, : args.burn_in + 1], starts)
    rewards, dones, dreamt_actions = run(dreamt, given, key_imagine)  # [N, T] each
    metrics["actions"] = action_metrics(real, promised, (dreamt_actions, rewards > 0))
    rates = {"imagined_reward_rate": rewards, "real_reward_rate": starts.rewards[:, args.burn_in :] >= 0.5}
    rates |= {"imagined_done_rate": dones, "real_done_rate": starts.dones[:, args.burn_in :]}
    metrics |= {name: value.mean() for name, value in rates.items()}
    curves |= {name: value.mean(0) for name, value in rates.items()}
    rounds = max(1, 20 // args.context)  # of four sequences, evenly spaced, not chosen
    few = np.linspace(0, len(imagined) - 1, 4 * rounds).astype(int).reshape(4, rounds).T.ravel()
    return metrics, curves, np.stack([windows.steps.frames[few], twm.decode(state.codebook, imagined[few])], axis=1)


# --- Output ---
def plain(tree: Any) -> Any:
    """For JSON: arrays as lists, floats with five digits."""
    if isinstance(tree, dict):
        return {name: plain(value) for name, value in tree.items()}
    tree = tree.tolist() if hasattr(tree, "tolist") else tree
    if isinstance(tree, list):
        return [plain(value) for value in tree]
    return float(f"{tree:.5g}") if isinstance(tree, float) else tree


def print_table(title: str, rows: dict[str, dict]) -> None:
    print(f"{title:<36}" + "".join(f"{name:>12}" for name in next(iter(rows.values()), {})))
    for name, row in rows.items():
        print(f"  {name:<34}" + "".join(f"{math.nan if value is None else value:>12.6g}" for value in row.values()))


def draw_curves(path: Path, runs: list[dict]) -> None:
    """Every curve over imagined steps, a colour for each run; dashed: copying, or the real rate."""
    panels = {"all cells": ("accuracy", "copy"), "changed cells": ("changed_accuracy",)}
    panels |= {"whole frames": ("exact", "exact_copy")}
    panels |= {f"{name} rate": (f"imagined_{name}_rate", f"real_{name}_rate") for name in ("reward", "done")}
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.2))
    for axis, (title, keys) in zip(axes, panels.items(), strict=True):
        for i, run in enumerate(runs):
            for key, line in zip(keys, (".-", ".--"), strict=False):
                values = run["curve"][key]
                axis.plot(range(1, len(values) + 1), values, line, color=f"C{i}", label=f"{key}, {name_of(run)}")
        axis.set(title=title, xlabel="imagined step", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=5)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def name_of(run: dict) -> str:
    return f"{run['label']}, seed {run['seed']}, at {run['steps']:,} steps"


def draw_sequences(folder: Path, name: str, frames: np.ndarray, scale: int = 2) -> None:
    """UInt8[N, 2, T, 63, 63, 3], N a multiple of 4: four sequences at a time as name.gif, four as name_strips.png."""
    side = twm.FRAME[0] + 4
    framed = np.full((*frames.shape[:3], side, side, 3), (40, 160, 60), np.uint8)
    framed[:, 1, 1:] = (220, 40, 40)
    framed[..., 2:-2, 2:-2, :] = frames
    framed = framed.repeat(scale, axis=-3).repeat(scale, axis=-2)
    strips = framed[:4].reshape(-1, *framed.shape[2:])  # UInt8[8, T, H, W, 3]
    imageio.imwrite(folder / f"{name}_strips.png", np.concatenate(np.concatenate(strips, axis=1), axis=1))
    rounds = framed.reshape(-1, 4, *framed.shape[1:]).transpose(0, 3, 2, 4, 1, 5, 6)  # [N / 4, T, 2, H, 4, W, 3]
    images = rounds.reshape(-1, 2 * side * scale, 4 * side * scale, 3)
    imageio.imwrite(folder / f"{name}.gif", images, duration=500, loop=0)  # milliseconds a frame


def load(folder: Path) -> tuple[twm.Args, twm.TrainState]:
    """Settings and newest checkpoint of a run folder, without making a state first: its shapes are enough."""
    args, where = twm.parse_args(["--eval-only", str(folder)]), twm.on_devices(None)
    like = jax.eval_shape(lambda: twm.init_state(args))
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), like)
    return args, twm.load_checkpoint("--eval-only", folder, like).replace(replay=None)


def measure_run(folder: Path, num_envs: int, num_steps: int, seed: int) -> tuple[dict, np.ndarray]:
    """An entry of the result file, and frames for draw_sequences. Raises UserError."""
    started, (args, state) = time.perf_counter(), load(folder)
    twm.start_jax(args)
    least = max(args.context + 1, args.burn_in + args.imagination_steps)
    trained, settings = int(state.iteration) * args.num_envs * args.num_steps, dataclasses.asdict(args)
    args = dataclasses.replace(args, num_envs=num_envs, num_steps=num_steps)
    twm.require(args, "num_steps", num_steps >= least, f"holds no window: give at least {least}")
    key_env, key_collect, key = jax.random.split(jax.random.PRNGKey(seed), 3)
    held_out = collect(args, state.policy.params, state.codebook, twm.init_env(args, key_env), key_collect)
    if args.wm_rewarded_actions:
        nothing_before = twm.init_replay(dataclasses.replace(args, replay_size=num_envs))
        held_out = held_out.replace(steps=twm.add_rewarded(nothing_before, held_out.steps))
    metrics, curves, frames = measure(args, state, jax.device_get(held_out), key)
    run = results.run_of(folder, settings, trained, wall_seconds=time.perf_counter() - started)
    return plain(run | {"metrics": metrics, "curve": curves}), frames


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="RUN_FOLDER")
    parser.add_argument("--name", help="of the result file and of the pictures (none: that of the first run folder)")
    parser.add_argument("--num-envs", type=int, default=32, help="environments, each with worlds of its own")
    parser.add_argument("--num-steps", type=int, default=500, help="held-out steps of each environment")
    parser.add_argument("--seed", type=int, default=20_000_000, help="of worlds and samples: one that no run used")
    parser.add_argument("--media", type=Path, help="folder for the pictures (none: media/ of the first run folder)")
    flags, runs = parser.parse_args(argv), []
    first = Path(flags.folders[0]).resolve()
    flags.name, flags.media = flags.name or first.name, flags.media or first / "media"
    flags.media.mkdir(parents=True, exist_ok=True)
    for i, folder in enumerate(flags.folders):
        try:
            run, frames = measure_run(Path(folder), flags.num_envs, flags.num_steps, flags.seed)
        except twm.UserError as error:
            sys.exit(f"world_model_quality.py: {error}")
        draw_sequences(flags.media, flags.name + (f"_{i + 1}" if len(flags.folders) > 1 else ""), frames)
        print(f"{name_of(run)}, on {run['metrics']['steps']:,} held-out steps")
        for name in ("cells", "frames", "action", "changed cells, by frames seen"):
            print_table(name, run["metrics"][name])
        print_table("reward, by what the step does", run["metrics"]["reward"]["kinds"])
        print_table("achievements, by action", run["metrics"]["actions"])
        for name in ("reward", "done"):
            print_table(f"{name}, by predicted probability", run["metrics"][name]["bins"])
        runs.append(run)
    draw_curves(flags.media / f"{flags.name}_curves.png", runs)
    summary = {name_of(run): {key: run["metrics"][key]["all"] for key in ("cells", "frames")} for run in runs}
    command = [f"runs/{Path(word).name}" if word in flags.folders else word for word in argv]
    results.write(flags.name, [" ".join(["python benchmark/world_model_quality.py", *command])], runs, summary)


if __name__ == "__main__":
    main(sys.argv[1:])

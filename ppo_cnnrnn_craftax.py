# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax>=0.10,<0.11", "flax>=0.12,<0.13", "optax>=0.2.8,<0.3", "craftax>=1.6.1,<1.7", "orbax-checkpoint>=0.12,<0.13",
#   "numpy>=2.0,<3", "tyro>=1.0,<2", "imageio>=2.37,<3", "imageio-ffmpeg>=0.6,<1", "wandb>=0.25,<1",
# ]
# ///
"""PPO with a CNN encoder and a GRU on Craftax-Classic pixels (the model-free baseline).
Papers: [TWM] "Improving Transformer World Models for Data-Efficient RL" arXiv:2502.01591, Sec. on the model-free agent,
[PPO] arXiv:1707.06347, [GAE] arXiv:1506.02438. Details, deviations, results: docs/ppo_cnnrnn_craftax.md

    python ppo_cnnrnn_craftax.py --total-steps 1000000        # the paper's setting, 1M environment steps
    python ppo_cnnrnn_craftax.py --preset cpu                 # smaller; another encoder, gamma, lambda, annealing
    python ppo_cnnrnn_craftax.py --preset smoke               # a minute: learns nothing, touches everything
    python ppo_cnnrnn_craftax.py --resume runs/RUN_FOLDER     # goes on where that run stopped
    python ppo_cnnrnn_craftax.py --eval-only runs/RUN_FOLDER  # scores that run's policy: eval.json and a video

Axes: B environments, T steps, H W C pixels, D hidden size, A actions.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import errno
import functools
import gc
import json
import logging
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import imageio.v3 as imageio
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from flax import struct
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")  # ffmpeg is started by fork and exec: harmless

# --- Settings ---


@dataclass(frozen=True)
class Args:
    # --- shared block: common flags ---
    preset: str = "paper"  # starting point: paper, cpu, smoke, ... (PRESETS); every flag beside it wins over it
    seed: int = 1  # seed of everything random: on a CPU two runs from one seed are equal
    runs_dir: str = "runs"  # folder in which <script>__<preset>__s<seed>__<time> is made
    resume: str = ""  # run folder to go on with, from its newest checkpoint and its settings (empty: a new run)
    eval_only: str = ""  # run folder whose newest checkpoint is evaluated, without training (empty: train)
    dry_run: bool = False  # print settings, parameter counts, the plan and its estimated cost, then stop
    track: bool = False  # log to Weights & Biases as well
    wandb_mode: Literal["online", "offline"] = "online"  # offline needs no account; `wandb sync` uploads later
    wandb_project: str = "one-file-papers"  # Weights & Biases project
    dtype: Literal["fp32", "bf16"] = "fp32"  # precision in networks; parameters, softmax, losses, statistics stay fp32
    distributed: bool = False  # join the other processes of a multi-process job first
    # --- end shared block: common flags ---

    # --- shared block: policy flags ---
    total_steps: int = 1_000_000  # environment steps over the whole run, all environments together
    num_envs: int = 48  # environments stepped in parallel (B)
    num_steps: int = 96  # environment steps per rollout and environment (T)
    encoder: Literal["impala", "cells"] = "impala"  # the paper's residual CNN, or a CNN aligned with the 9x9 map cells
    encoder_channels: tuple[int, ...] = (64, 64, 128)  # of the stages; of cells: the 7x7 convolution, then the stages
    encoder_norm: Literal["channel", "frame"] = "channel"  # what CNN layers normalise: each channel, or all together
    gru: bool = True  # without it the policy has no memory: its towers read the CNN alone
    gru_size: int = 256  # units of the GRU
    tower_size: int = 2048  # width of the actor's and of the critic's tower
    learning_rate: float = 4.5e-4  # Adam step size of the policy
    anneal_learning_rate: bool = False  # an iteration at a time, to 0 at --total-steps (unknown whether the paper does)
    max_grad_norm: float = 0.5  # every gradient is clipped to this global norm
    gamma: float = 0.925  # discount
    gae_lambda: float = 0.625  # lambda of GAE
    clip_coef: float = 0.2  # PPO clip range of the probability ratio
    value_coef: float = 2.0  # weight of the squared error of normalised values
    entropy_coef: float = 0.01  # weight of the entropy bonus
    update_epochs: int = 4  # passes over a real rollout
    num_minibatches: int = 8  # per epoch; must divide --num-envs: sequences stay whole
    micro_batch_frames: int = 200  # most frames (or a rollout) of one gradient on a device; larger batches take a mean
    value_norm_decay: float = 0.95  # decay (beta) of the running mean and deviation of value targets
    save_every: int = 10  # iterations between checkpoints (the last iteration always saves)
    media_every: int = 20  # iterations between videos and pictures (0: none but the evaluation's)
    eval_episodes: int = 48  # episodes of the final evaluation, stochastic and greedy each (0: none)
    # --- end shared block: policy flags ---

    # --- shared block: derived settings ---
    @property
    def num_iterations(self) -> int:
        return self.total_steps // (self.num_envs * self.num_steps)

    @property
    def window_iterations(self) -> int:  # that the windowed charts look back
        return max(1, round(100_000 / (self.num_envs * self.num_steps)))

    @property
    def compute_dtype(self) -> Any:
        return {"fp32": jnp.float32, "bf16": jnp.bfloat16}[self.dtype]

    # --- end shared block: derived settings ---


# fmt: off
PRESETS = {
    "paper": Args(),
    "cpu": Args(
        preset="cpu", num_steps=48, encoder="cells", encoder_channels=(192, 32), tower_size=512,
        anneal_learning_rate=True, gamma=0.95, gae_lambda=0.65, update_epochs=3, micro_batch_frames=1000,
        save_every=40, media_every=100,
    ),
    "smoke": Args(
        preset="smoke", total_steps=96, num_envs=4, num_steps=6, encoder="cells", encoder_channels=(16, 16),
        gru_size=32, tower_size=32, update_epochs=1, num_minibatches=2, save_every=1, media_every=2, eval_episodes=4,
    ),
}
# fmt: on


# --- shared block: command line ---
class UserError(Exception):
    """Something the user can put right: main() prints it as one sentence and exits with code 2."""


def parse_args(argv: list[str] | None = None) -> Args:
    """Defaults are the settings of the run that --resume or --eval-only names, else of --preset; flags given beside
    them win. So --help shows the values of the preset named beside it.
    """
    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flags in (["--preset"], ["--resume"], ["--eval-only", "--eval_only"]):
        first.add_argument(*flags, default="")
    known = first.parse_known_args(argv)[0]
    if known.resume and known.eval_only:
        raise UserError("--resume and --eval-only exclude each other: give one of them.")
    if (known.preset or "paper") not in PRESETS:
        raise UserError(f"--preset {known.preset} does not exist: choose one of {', '.join(PRESETS)}.")
    default = PRESETS[known.preset or "paper"]
    if folder := known.resume or known.eval_only:
        try:
            saved = json.loads((Path(folder) / "args.json").read_text())
            saved = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
            for name, value in saved.items():
                if type(value) is not type(getattr(default, name, None)):
                    raise ValueError(f"{name} is {value!r}")
            if known.preset not in ("", saved.get("preset")):
                raise ValueError(f"it is a run of --preset {saved.get('preset')}, not {known.preset}")
            own = {"resume": "", "eval_only": "", "dry_run": False, "distributed": False}
            default = Args(**saved | own | ({"track": False} if known.eval_only else {}))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            reason = f"its args.json cannot be used ({type(error).__name__}: {error})"
            flag, way_out = "--resume" if known.resume else "--eval-only", f"name a folder of {Path(__file__).name}"
            raise UserError(f"{flag} {folder}: {reason}; {way_out}.") from error
    return tyro.cli(Args, args=argv, default=default, description=__doc__)


def require(args: Args, name: str, holds: bool, reason: str) -> None:
    if not holds:
        raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} {reason}.")


# --- end shared block: command line ---


def check_args(args: Args) -> None:
    check_policy_args(args, ("eval_episodes",))


# --- shared block: craftax agent ---
def check_policy_args(args: Args, divisible: tuple[str, ...]) -> None:
    """Refuse numbers out of range, and `divisible` batches that devices do not divide. Raises UserError."""
    may_be_0 = "seed media_every eval_episodes warmup_steps imagination_updates burn_in".split()
    for name, value in dataclasses.asdict(args).items():
        low = 0 if name in may_be_0 or isinstance(value, float) else 1
        high = {"seed": 2**32 - 1, "gamma": 1, "gae_lambda": 1, "value_norm_decay": 1}.get(name, math.inf)
        for number in (value or (0,)) if isinstance(value, tuple) else (value,):
            fits = type(number) not in (int, float) or (low <= number <= high and math.isfinite(number))
            require(args, name, fits, f"is out of range: give numbers from {low} to {high}")
    envs, minibatches, rollout = args.num_envs, args.num_minibatches, args.num_envs * args.num_steps
    require(args, "total_steps", args.total_steps >= rollout, f"is less than one rollout: give at least {rollout}")
    require(args, "max_grad_norm", args.max_grad_norm > 0, "lets no gradient through: give a number above 0")
    require(args, "eval_episodes", args.eval_episodes > 0 or not args.eval_only, "leaves nothing to evaluate")
    if folder := args.resume or args.eval_only:
        before = json.loads((Path(folder) / "args.json").read_text())
        for name in ("num_steps", "seed")[: 2 if args.resume else 1]:  # an evaluation may have another seed
            reason = f"is not what args.json says ({before.get(name)}), and a run keeps it: leave it out"
            require(args, name, getattr(args, name) == before.get(name), reason)
    devices = jax.device_count()
    for name in ("num_envs", *divisible):
        reason = f"does not split evenly over {devices} devices: make it a multiple, or hide devices"
        require(args, name, getattr(args, name) % devices == 0, reason)
    fits = max(n for n in range(1, min(envs, minibatches) + 1) if envs // devices % n == 0)
    reason = f"does not divide --num-envs {envs} into groups that {devices} devices can share: try {fits}"
    require(args, "num_minibatches", fits == minibatches, reason)


@functools.cache
def on_devices(axis: int | None) -> NamedSharding:
    """Placement of an array: its batch `axis` split over all devices, or (None) a copy on each."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "data"))


def on_host(tree: Any) -> Any:
    """Outside jit: every leaf whole, in numpy, also when other processes hold parts of it."""
    return jax.device_get(jax.device_put(tree, on_devices(None)))


def split_batch(tree: Any, axis: int) -> Any:
    """Inside jit: compute every leaf of `tree` split over all devices along `axis`."""
    return jax.lax.with_sharding_constraint(tree, on_devices(axis)) if jax.device_count() > 1 else tree


# --- Environment ---
ACHIEVEMENTS = (  # ids 0 to 21 of Craftax-Classic
    "collect_wood place_table eat_cow collect_sapling collect_drink make_wood_pickaxe make_wood_sword place_plant "
    "defeat_zombie collect_stone place_stone eat_plant defeat_skeleton make_stone_pickaxe make_stone_sword wake_up "
    "place_furnace collect_coal collect_iron collect_diamond make_iron_pickaxe make_iron_sword"
).split()
NUM_ACTIONS = 17
GRID, CELL = 9, 7  # a frame is 9 x 9 cells of 7 x 7 pixels; the inventory is the last two rows of cells
FRAME = (GRID * CELL, GRID * CELL, 3)


@functools.cache
def craftax_classic():
    """Craftax-Classic-Pixels-v1 without auto-reset. Imported late: Craftax puts arrays on a device when imported."""
    with jax.ensure_compile_time_eval():  # also when the first call comes from inside jit
        from craftax.craftax_classic.envs.craftax_pixels_env import CraftaxClassicPixelsEnvNoAutoReset

        return CraftaxClassicPixelsEnvNoAutoReset()


def render(state: Any) -> Array:
    """UInt8[B, 63, 63, 3]. DEVIATION(uint8): frames are rounded to 1/255 at once, so that policy, tokenizer and replay
    see the same ones, within 1/510 of the renderer's floats, which daylight tints at all hours.
    """
    return jnp.round(jax.vmap(craftax_classic().get_obs)(state) * 255).astype(jnp.uint8)


@jax.jit
def env_reset(keys: Array) -> tuple[Any, Array]:
    """keys UInt32[B, 2] -> states of fresh worlds, their first frames UInt8[B, 63, 63, 3]."""
    env = craftax_classic()
    state = jax.vmap(lambda key: env.reset_env(key, env.default_params)[1])(keys)
    # Weak types become strong, so that states from reset and from step share one compiled program.
    state = jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, leaf.dtype), state)
    return state, render(state)


def env_step(state: Any, actions: Array, keys: Array) -> tuple[Any, Array, Array, Array, Array]:
    """One step of B environments with same-step auto-reset, equal to the stock one transition by transition: when an
    episode ends, the frame is the first of a fresh world, reward and done are those of the finished step. Making a
    world costs as much as seven steps, so only environments that are done get one, each its own.
    actions Int[B], keys UInt32[B, 2] -> state, frames UInt8[B, 63, 63, 3], rewards Float[B], dones Bool[B],
    achievements Bool[B, 22], read before the reset.
    """

    def step_local(state, actions, keys):  # the environments of one device
        env = craftax_classic()
        key_step, key_reset = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        step = jax.vmap(env.step_env, in_axes=(0, 0, 0, None))  # its own frame goes unused, so XLA never renders it
        _, state, rewards, dones, _ = step(key_step, state, actions, env.default_params)
        achievements = state.achievements.astype(bool)

        def reset_one(carry):
            state, waiting = carry
            i = jnp.argmax(waiting)
            fresh = env.reset_env(key_reset[i], env.default_params)[1]
            return jax.tree.map(lambda leaf, new: leaf.at[i].set(new), state, fresh), waiting.at[i].set(False)

        state, _ = jax.lax.while_loop(lambda carry: carry[1].any(), reset_one, (state, dones))
        return state, render(state), rewards.astype(jnp.float32), dones, achievements

    if jax.device_count() > 1:
        spec = PartitionSpec("data")
        step_local = jax.shard_map(step_local, mesh=on_devices(0).mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return step_local(state, actions, keys)


# --- Policy network ---
def to_cells(frames: Array) -> Array:
    """[N, 63, 63, 3] -> [N, 81, 147], cells in row-major order."""
    grid = frames.reshape(-1, GRID, CELL, GRID, CELL, 3).swapaxes(2, 3)
    return grid.reshape(-1, GRID * GRID, CELL * CELL * 3)


class Encoder(nn.Module):
    """[TWM] residual CNN: each stage is norm, conv, pool (63 -> 32 -> 16 -> 8) and two residual blocks of one conv.
    Float[N, 63, 63, 3] -> Float[N, 8 * 8 * channels[-1]].
    DEVIATION(cells): a CNN that knows the map grid, since two cores cannot pay for 3x3 convolutions on 63x63 pixels. A
    7x7 convolution of stride 7, written as a product, reads each cell of the normalised frame; then stages without
    pooling. -> Float[N, 81 * channels[-1]].
    """

    args: Args

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cells, dtype, stages = self.args.encoder == "cells", self.args.compute_dtype, self.args.encoder_channels
        settings = {"dtype": dtype, "kernel_init": nn.initializers.xavier_normal()}
        each_channel = functools.partial(nn.GroupNorm, num_groups=None, group_size=1, epsilon=1e-6, dtype=dtype)
        all_channels = functools.partial(each_channel, num_groups=1, group_size=None)
        norm = each_channel if self.args.encoder_norm == "channel" else all_channels
        if cells:
            first, *stages = stages
            x = to_cells(each_channel(use_bias=False, use_scale=False)(x))
            x = nn.relu(nn.Dense(first, **settings)(x)).reshape(len(x), GRID, GRID, -1)
        for features in stages:
            x = nn.Conv(features, (3, 3), **settings)(norm()(x))
            x = x if cells else nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
            for _ in range(2):
                x = x + nn.Conv(features, (3, 3), **settings)(norm()(nn.relu(x)))
        return nn.relu(x).reshape(len(x), -1)


class GRU(nn.Module):
    """GRU over a sequence; its state is zeroed before each frame that starts an episode. The input side, which has
    the bias, is one product over the whole sequence.
    inputs Float[T, B, F], resets Bool[T, B], hidden Float[B, D] -> outputs Float[T, B, D], hidden.
    """

    size: int
    dtype: Any

    @nn.compact
    def __call__(self, inputs: Array, resets: Array, hidden: Array) -> tuple[Array, Array]:
        def orthogonal_gates(key, shape):
            orthogonal = nn.initializers.orthogonal()
            return jnp.concatenate([orthogonal(k, (shape[0], shape[0])) for k in jax.random.split(key, 3)], axis=1)

        projected = nn.Dense(3 * self.size, dtype=self.dtype, kernel_init=nn.initializers.lecun_normal())(inputs)
        recurrent = self.param("recurrent", orthogonal_gates, (self.size, 3 * self.size)).astype(self.dtype)

        def cell(hidden, step):
            x, reset = step
            hidden = jnp.where(reset[:, None], 0.0, hidden)  # Float[B, D]
            x_reset, x_update, x_new = jnp.split(x.astype(jnp.float32), 3, axis=-1)
            h_reset, h_update, h_new = jnp.split((hidden.astype(self.dtype) @ recurrent).astype(jnp.float32), 3, -1)
            update = nn.sigmoid(x_update + h_update)
            new = jnp.tanh(x_new + nn.sigmoid(x_reset + h_reset) * h_new)
            hidden = (1 - update) * new + update * hidden
            return hidden, hidden

        hidden, outputs = jax.lax.scan(cell, hidden, (projected, resets))
        return outputs, hidden


class Policy(nn.Module):
    """Actor and critic over a time-major sequence (one step: T = 1). frames UInt8[T, B, 63, 63, 3], resets Bool[T, B],
    hidden Float[B, D] -> logits Float[T, B, A], normalised values Float[T, B], hidden Float[B, D].
    """

    args: Args

    @nn.compact
    def __call__(self, frames: Array, resets: Array, hidden: Array) -> tuple[Array, Array, Array]:
        args, dtype = self.args, self.args.compute_dtype

        def dense(features, scale, dtype=dtype):
            return nn.Dense(features, kernel_init=nn.initializers.orthogonal(scale), dtype=dtype)

        name = {"impala": "ImpalaEncoder_0", "cells": "CellEncoder_0"}[args.encoder]  # Flax draws initial weights by it
        pixels = frames.reshape(-1, *frames.shape[2:]).astype(dtype) / 255
        features = Encoder(args, name=name)(pixels).reshape(*frames.shape[:2], -1)  # Float[T, B, F]
        if args.gru:
            x = nn.relu(dense(args.gru_size, math.sqrt(2))(nn.LayerNorm(dtype=dtype)(features)))
            outputs, hidden = GRU(args.gru_size, dtype)(x, resets, hidden)
            # [TWM] the towers read the CNN's features beside the GRU's outputs, never the GRU alone.
            features = jnp.concatenate([features, nn.relu(outputs).astype(dtype)], axis=-1)

        def tower(outputs, out_scale):  # two residual layers at constant width
            x = nn.relu(dense(args.tower_size, math.sqrt(2))(nn.LayerNorm(dtype=dtype)(features)))
            for _ in range(2):
                x = x + nn.relu(dense(args.tower_size, 0.01)(x))
            return dense(outputs, out_scale, jnp.float32)(nn.LayerNorm(dtype=dtype)(x))

        return tower(NUM_ACTIONS, 0.01), tower(1, 1.0)[..., 0], hidden


# --- PPO ---
def compute_gae(
    rewards: Array, values: Array, last_value: Array, dones: Array, gamma: float, gae_lambda: float
) -> tuple[Array, Array]:
    """Advantages and value targets, [GAE] Sec. 3. Inputs Float[T, B], time-major; last_value Float[B].
    dones[t]: the episode ended with the action taken at t, so nothing after t counts for it.
    """
    next_values = jnp.concatenate([values[1:], last_value[None]])  # Float[T, B]
    alive = 1.0 - dones  # Float[T, B]
    deltas = rewards + gamma * next_values * alive - values  # Float[T, B]

    def backward(advantage, inputs):
        delta, alive_t = inputs
        # `alive_t` cuts the carry itself: masking only the output would leak the next episode into t-1.
        advantage = delta + gamma * gae_lambda * alive_t * advantage  # Float[B]
        return advantage, advantage

    _, advantages = jax.lax.scan(backward, jnp.zeros_like(last_value), (deltas, alive), reverse=True)
    return advantages, advantages + values


@struct.dataclass
class ValueNorm:
    """Running mean and deviation of value targets: decayed sums from 0, corrected by the decayed weight."""

    mean_sum: Array
    std_sum: Array
    weight: Array

    @functools.partial(jax.jit, static_argnums=2)
    def update(self, targets: Array, decay: float) -> "ValueNorm":
        new = ValueNorm(targets.mean(), targets.std(), 1.0)
        return jax.tree.map(lambda old, value: decay * old + (1 - decay) * value, self, new)

    def statistics(self) -> tuple[Array, Array]:
        """Mean and standard deviation, with floors that hold them near 0 and at 0.1 before the first updates."""
        mean = self.mean_sum / jnp.maximum(self.weight, 0.01)
        return mean, jnp.maximum(self.std_sum / jnp.maximum(self.weight, 0.1), 0.1)


@struct.dataclass
class Learner:
    """Parameters and optimiser state of one network; only the policy has a value_norm."""

    params: Any
    opt_state: Any
    value_norm: ValueNorm | None = None


@struct.dataclass
class Rollout:
    """T steps of B environments, real or imagined. Axis 1 of every leaf is B."""

    frames: Array  # UInt8[T, B, 63, 63, 3]
    resets: Array  # Bool[T, B]: frame t is the first of its episode, which is dones[t-1]
    actions: Array  # Int[T, B]
    logprobs: Array  # Float[T, B]
    values: Array  # Float[T, B], normalised
    rewards: Array  # Float[T, B]
    dones: Array  # Bool[T, B]: the episode ended with action t
    hidden: Array  # Float[1, B, D]: GRU state before the first frame
    last_value: Array  # Float[1, B]: normalised value of the frame after the last step


def adam(args: Args, learning_rate: float | Array) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.adam(learning_rate, eps=1e-5))


def policy_adam(args: Args) -> optax.GradientTransformation:
    """Its state holds the learning rate, which ppo_update sets."""
    return optax.inject_hyperparams(adam)(args, args.learning_rate)


@functools.partial(jax.jit, static_argnums=0)
def init_policy(args: Args, key: Array) -> Learner:
    frames = jnp.zeros((1, 1, *FRAME), jnp.uint8)
    params = Policy(args).init(key, frames, jnp.zeros((1, 1), bool), jnp.zeros((1, args.gru_size)))["params"]
    return Learner(params, policy_adam(args).init(params), ValueNorm(*jnp.zeros(3)))


def act(args: Args, params: Any, frame: Array, reset: Array, hidden: Array, key: Array, greedy: Array) -> tuple:
    """One step in B environments: actions Int[B] (the likeliest if greedy), logprobs, normalised values, hidden."""
    logits, values, hidden = Policy(args).apply({"params": params}, frame[None], reset[None], hidden)
    actions = jnp.where(greedy, logits[0].argmax(-1), jax.random.categorical(key, logits[0]))
    logprobs = jnp.take_along_axis(nn.log_softmax(logits[0]), actions[:, None], axis=-1)[:, 0]
    return actions, logprobs, values[0], hidden


@functools.partial(jax.jit, static_argnums=0)
def advantages_and_targets(args: Args, norm: ValueNorm, rollout: Rollout) -> tuple[Array, Array]:
    """GAE on denormalised values. Advantages are normalised once, over the whole rollout. Float[T, B] each."""
    mean, std = norm.statistics()
    values, last_value = rollout.values * std + mean, rollout.last_value[0] * std + mean
    advantages, targets = compute_gae(rollout.rewards, values, last_value, rollout.dones, args.gamma, args.gae_lambda)
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8), targets


def ppo_loss(params: Any, args: Args, norm: ValueNorm, rollout: Rollout, advantages: Array, targets: Array) -> tuple:
    """[PPO] Eq. (9) with a squared error on normalised values, differentiated through the whole sequence."""
    logits, values, _ = Policy(args).apply({"params": params}, rollout.frames, rollout.resets, rollout.hidden[0])
    log_probs = nn.log_softmax(logits)  # Float[T, B, A]
    log_ratio = jnp.take_along_axis(log_probs, rollout.actions[..., None], axis=-1)[..., 0] - rollout.logprobs
    ratio = jnp.exp(log_ratio)  # Float[T, B]
    clipped = jnp.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -jnp.minimum(ratio * advantages, clipped * advantages).mean()
    mean, std = norm.statistics()
    value_loss = jnp.square(values - (targets - mean) / std).mean()
    entropy = -(jnp.exp(log_probs) * log_probs).sum(-1).mean()
    loss = policy_loss + args.value_coef * value_loss - args.entropy_coef * entropy
    logs = {"loss": loss, "policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
    logs["approx_kl"] = (ratio - 1 - log_ratio).mean()
    logs["clip_fraction"] = (jnp.abs(ratio - 1) > args.clip_coef).mean()
    return loss, logs


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def add_gradient(
    args: Args, envs: int, params: Any, norm: ValueNorm, batch: tuple[Rollout, Array, Array], grads: Any, index: int
) -> tuple[Any, dict]:
    """grads + those of ppo_loss on the index-th `envs` environments, and its logs."""
    take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=index * envs, slice_size=envs, axis=1)
    new, logs = jax.grad(ppo_loss, has_aux=True)(params, args, norm, *split_batch(jax.tree.map(take, batch), axis=1))
    return jax.tree.map(jnp.add, grads, new), logs


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def end_step(args: Args, policy: Learner, norm: ValueNorm, grads: Any, logs: list[dict]) -> tuple[Learner, dict]:
    """Adam, on the mean of as many gradients as there are logs."""
    grads, logs = jax.tree.map(lambda x: x / len(logs), grads), jax.tree.map(lambda *x: sum(x) / len(x), *logs)
    updates, opt_state = policy_adam(args).update(grads, policy.opt_state)
    logs["grad_norm"] = optax.tree.norm(grads)
    return Learner(optax.apply_updates(policy.params, updates), opt_state, norm), logs


def ppo_step(
    args: Args, policy: Learner, batch: tuple[Rollout, Array, Array], envs: int, index: int = 0
) -> tuple[Learner, dict]:
    """One gradient step on the index-th `envs` environments of (rollout, advantages, targets), on whose targets the
    statistics move first. Its gradient is the mean over groups of environments that are small enough for the memory. A
    Python loop, because XLA's CPU backend runs the gradient of a convolution many times slower inside lax.scan.
    """
    group = gradient_group(args, envs, len(batch[1]))
    norm = policy.value_norm.update(batch[2][:, index * envs : (index + 1) * envs], args.value_norm_decay)
    grads, logs = jax.jit(optax.tree.zeros_like)(policy.params), []
    for i in range(envs // group):
        grads, log = add_gradient(args, group, policy.params, norm, batch, grads, index * (envs // group) + i)
        logs.append(log)
    return end_step(args, policy, norm, grads, logs)


def gradient_group(args: Args, envs: int, steps: int) -> int:
    """The most environments whose frames may enter one gradient: a part of `envs` that devices can share."""
    devices = jax.device_count()
    sizes = [size for size in range(devices, envs + 1, devices) if envs % size == 0]
    return max((size for size in sizes if size // devices * steps <= args.micro_batch_frames), default=sizes[0])


def ppo_update(args: Args, policy: Learner, rollout: Rollout, iteration: Array) -> tuple[Learner, dict[str, float]]:
    """Epochs over a real rollout in minibatches of whole environments, in fixed order, with this iteration's step."""
    rate = args.learning_rate * jnp.where(args.anneal_learning_rate, 1 - iteration / args.num_iterations, 1.0)
    policy = policy.replace(opt_state=optax.tree.set(policy.opt_state, learning_rate=rate))
    batch, logs = (rollout, *advantages_and_targets(args, policy.value_norm, rollout)), []
    for index in args.update_epochs * [*range(args.num_minibatches)]:
        policy, log = ppo_step(args, policy, batch, args.num_envs // args.num_minibatches, index)
        logs.append(log)
    return policy, mean_of(logs)


def mean_of(logs: list[dict]) -> dict[str, float]:
    """Means over gradient steps. The host waits for the device here, not at every step."""
    logs = jax.device_get(logs)
    return {name: float(np.mean([log[name] for log in logs])) for name in (logs[0] if logs else ())}


# --- Collecting ---
@struct.dataclass
class EnvCarry:
    """What B environments hand from one rollout to the next. Axis 0 of every leaf is B."""

    state: Any  # Craftax's EnvState
    frame: Array  # UInt8[B, 63, 63, 3]
    reset: Array  # Bool[B]: frame is the first of its episode
    hidden: Array  # Float[B, D]: GRU state before frame
    episode_return: Array  # Float[B], so far


def init_env(args: Args, key: Array) -> EnvCarry:
    state, frame = env_reset(jax.device_put(jax.random.split(key, args.num_envs), on_devices(0)))
    rest = jnp.ones(args.num_envs, bool), jnp.zeros((args.num_envs, args.gru_size)), jnp.zeros(args.num_envs)
    return jax.device_put(EnvCarry(state, frame, *rest), on_devices(0))


@functools.partial(jax.jit, static_argnums=0)
def collect(args: Args, params: Any, carry: EnvCarry, key: Array, greedy: bool) -> tuple[EnvCarry, Rollout, Array]:
    """num_steps steps of every environment with one policy. Besides the rollout it returns, for each step that ended
    an episode, its record (1, return, length, 22 achievements), and zeros for the others: Float[T, B, 25].
    """

    def step(carry, key):
        key_act, key_env = jax.random.split(key)
        now = (carry.frame, carry.reset, carry.hidden)
        actions, logprobs, values, hidden = act(args, params, *now, key_act, greedy)
        length, keys = carry.state.timestep + 1, jax.random.split(key_env, args.num_envs)
        state, frame, rewards, dones, achievements = env_step(carry.state, actions, keys)
        returns = carry.episode_return + rewards
        record = jnp.column_stack([jnp.ones_like(returns), returns, length, achievements]) * dones[:, None]
        outputs = (carry.frame, carry.reset, actions, logprobs, values, rewards, dones)
        return EnvCarry(state, frame, dones, hidden, jnp.where(dones, 0.0, returns)), (outputs, record)

    after, (outputs, records) = jax.lax.scan(step, carry, jax.random.split(key, args.num_steps))
    last_value = act(args, params, after.frame, after.reset, after.hidden, key, greedy)[2]  # its action goes unused
    return after, Rollout(*outputs, carry.hidden[None], last_value[None]), records


def add_episodes(sums: Array, records: Array) -> Array:
    """Append to sums of episode records: row 0 over the whole run, then of the latest iterations. Float[1 + W, 25]."""
    new = records.sum((0, 1))[None]
    return jnp.concatenate([sums[:1] + new, sums[2:], new])


def episode_charts(sums: Array) -> dict[str, float]:
    """Logged values of add_episodes' sums; an average over no episodes is left out."""
    total, window, newest = np.asarray(sums[0]), np.asarray(sums[1:].sum(0)), np.asarray(sums[-1])
    charts = {"charts/episodes": float(total[0])}
    if newest[0]:
        charts["charts/episodic_return"] = float(newest[1] / newest[0])
        charts["charts/episodic_length"] = float(newest[2] / newest[0])
    if window[0]:
        rates = window[3:] / window[0]
        charts["charts/reward_percent"] = float(100 / len(ACHIEVEMENTS) * window[1] / window[0])
        charts["charts/score_percent"] = score_percent(total[3:] / total[0])
        charts["charts/score_percent_window"] = score_percent(rates)
        charts |= {f"achievements/{name}": float(rate) for name, rate in zip(ACHIEVEMENTS, rates, strict=True)}
    return charts


def score_percent(rates: np.ndarray) -> float:
    """Crafter score: shifted geometric mean of the achievement rates Float[22] in [0, 1], in percent."""
    return float(np.expm1(np.mean(np.log1p(100 * rates))))


# --- end shared block: craftax agent ---


# --- Training ---
@struct.dataclass
class TrainState:
    """All that a checkpoint holds. Random keys are derived from seed and iteration, so they are not in it."""

    iteration: Array
    policy: Learner
    env: EnvCarry
    episode_sums: Array


def init_state(args: Args) -> TrainState:
    key_policy, key_env = jax.random.split(jax.random.PRNGKey(args.seed))
    everywhere = jnp.zeros((), jnp.int32), init_policy(args, key_policy), jnp.zeros((1 + args.window_iterations, 25))
    iteration, policy, sums = jax.device_put(everywhere, on_devices(None))
    return TrainState(iteration, policy, init_env(args, key_env), sums)


def train_iteration(args: Args, state: TrainState, key: Array) -> tuple[TrainState, Rollout, dict]:
    clock = Clock()
    env, rollout, records = collect(args, state.policy.params, state.env, key, False)
    sums = add_episodes(state.episode_sums, records)
    clock.lap("collect", sums)
    policy, log = ppo_update(args, state.policy, rollout, state.iteration)
    clock.lap("policy_real")
    logs = {f"losses/real_{name}": value for name, value in log.items()}
    logs |= episode_charts(sums) | clock.summary(args.num_envs * args.num_steps)
    return TrainState(state.iteration + 1, policy, env, sums), rollout, logs


def write_media(args: Args, run: "Run", step: int, state: TrainState, rollout: Rollout, key: Array) -> None:
    run.media(step, "rollout", on_host(rollout.frames[:, 0]))


def dry_run(args: Args) -> None:
    """Print the size of the policy and the plan, with the arithmetic of one forward pass as XLA counts it."""
    state, key = jax.eval_shape(lambda: init_state(args)), jax.random.PRNGKey(0)
    act_once, now = jax.jit(functools.partial(act, args, greedy=False)), state.env
    forward = act_once.lower(state.policy.params, now.frame, now.reset, now.hidden, key).cost_analysis()["flops"]
    updates = args.update_epochs * args.num_minibatches
    tflop = forward * args.num_steps * (1 + 3 * args.update_epochs) / 1e12  # a gradient costs three forward passes
    print(f"policy     {sum(leaf.size for leaf in jax.tree.leaves(state.policy.params)):,} parameters")
    print(f"iteration  {args.num_envs * args.num_steps} environment steps, {updates} gradient steps, {tflop:.4g} TFLOP")
    print(f"run        {args.num_iterations} iterations, {tflop * args.num_iterations:.4g} TFLOP")
    print(f"checkpoint {size_in_bytes(state) / 1e9:.3f} GB")


# --- shared block: run folder ---
class Run:
    """The run folder: args.json, a copy of the script, metrics.jsonl, checkpoints/, media/; and W&B with --track.
    step: where a resumed run goes on; lines logged beyond it are forgotten, since they will be computed again. writes:
    of several processes, one does. The first Ctrl-C or SIGTERM only sets `stop`, a second one ends the process.
    Raises UserError.
    """

    def __init__(self, args: Args, step: int = 0, writes: bool = True):
        new, name = not (args.resume or args.eval_only), f"{Path(__file__).stem}__{args.preset}__s{args.seed}__"
        self.folder = Path(args.resume or args.eval_only or f"{args.runs_dir}/{name}{time.strftime('%Y%m%d-%H%M%S')}")
        while new and writes and self.folder.exists():  # of a run that was started in this second
            time.sleep(0.5)
            self.folder = self.folder.with_name(name + time.strftime("%Y%m%d-%H%M%S"))
        self.writes, self.stop, self.wandb, self.lines = writes, False, None, self.folder / "metrics.jsonl"
        self.args, self.step, self.begun = args, step, False
        if not args.eval_only:
            self.on_signal(self.request_stop)
        if not writes:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=not new)
            (self.folder / "media").mkdir(exist_ok=True)
            self.lines.touch()
            if new:
                self.begin()
        except OSError as error:
            way_out = "make it writable" + f", or change --runs-dir {args.runs_dir}" * new
            raise UserError(f"{self.folder} cannot be written to ({error.strerror}): {way_out}.") from error
        if args.track:
            import wandb

            name = self.folder.resolve().name  # also the id: a resumed run goes on in the same W&B run
            where = {"project": args.wandb_project, "mode": args.wandb_mode, "dir": str(self.folder)}
            try:
                wandb.init(id=name, name=name, resume="allow", config=dataclasses.asdict(args), **where)
                wandb.define_metric("*", step_metric="step")  # W&B's own counter would drop what a resumed run repeats
            except wandb.errors.Error as error:
                raise UserError(f"--track True ({error}): log in, or give --wandb-mode offline.") from error
            self.wandb = wandb

    def begin(self) -> None:
        """A new run does this at once, a resumed one before its first line: a refused --resume changes nothing."""
        self.begun, lines = True, self.lines.read_text().splitlines(True)
        (self.folder / "args.json").write_text(json.dumps(dataclasses.asdict(self.args), indent=2))
        (self.folder / Path(__file__).name).write_bytes(Path(__file__).read_bytes())
        whole = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= self.step]
        self.lines.write_text("".join(whole))

    def on_signal(self, handler: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handler)

    def request_stop(self, number: int, frame: Any) -> None:
        self.stop = True
        self.on_signal(signal.SIG_DFL)
        text = f"stopping after this iteration; go on with --resume {self.folder}; once more to stop at once\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())  # print is not reentrant

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl. A value that is not finite raises UserError before it can be saved."""
        for name, value in metrics.items():
            if not math.isfinite(value):
                way_out = f"try a lower learning rate, from the start or with --resume {self.folder}"
                raise UserError(f"{name} is {value} at step {step}: training has diverged; {way_out}.")
        if self.writes:
            if not self.begun:
                self.begin()
            with self.lines.open("a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self.wandb:
            self.wandb.log({"step": step, **metrics})

    def media(self, step: int, name: str, frames: np.ndarray, scale: int = 4) -> None:
        """Write UInt8[H, W, 3] as media/<name>_<step>.png, UInt8[T, H, W, 3] as .mp4, enlarged `scale` times."""
        if self.writes:
            frames = np.asarray(frames).repeat(scale, axis=-3).repeat(scale, axis=-2)
            path = self.folder / "media" / f"{name}_{step}.{'png' if frames.ndim == 3 else 'mp4'}"
            imageio.imwrite(path, frames, **({} if frames.ndim == 3 else {"fps": 10, "macro_block_size": 2}))
            if self.wandb:
                kind = self.wandb.Image if frames.ndim == 3 else self.wandb.Video
                self.wandb.log({"step": step, f"media/{name}": kind(str(path))})


# --- end shared block: run folder ---


# --- shared block: craftax run ---
def checkpoints(folder: Path) -> ocp.CheckpointManager:
    """Orbax writes a checkpoint aside and renames it when it is whole; the last two are kept."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    handlers = {"state": ocp.StandardCheckpointHandler()}
    return ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options, item_handlers=handlers)


def save_checkpoint(folder: Path, step: int, state: Any) -> None:
    """Everything that moves. Raises UserError when it cannot be written; earlier checkpoints then stay as they are."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    reason = ""
    with contextlib.redirect_stderr(None):  # an error is told once, in one sentence
        try:
            if jax.process_index() == 0:  # a damaged one would not be written again, a killed one would stay
                for path in [*folder.glob(f"checkpoints/{step}"), *folder.glob("checkpoints/*.orbax-checkpoint-tmp*")]:
                    shutil.rmtree(path)
            multihost_utils.sync_global_devices("no checkpoint of this step")
            with checkpoints(folder) as manager:
                manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state)), force=True)
        except (OSError, ValueError) as error:
            code = re.search(r"os_error_code='(\d+)'", str(error))
            reason = os.strerror(int(code[1])) if code else repr(str(error)[-200:])
        if reason:
            gc.collect()  # abandoned coroutines complain when they are collected
    if reason:
        raise UserError(f"checkpoint {step} of {folder} was not written ({reason}): make room, then --resume {folder}.")


def load_checkpoint(flag: str, folder: Path, like: Any) -> Any:
    """The newest checkpoint that can be read, placed and shaped as `like`. Raises UserError if there is none."""
    problem = "there is none"
    if (folder / "checkpoints").is_dir():
        with checkpoints(folder) as manager:
            for step in sorted(manager.all_steps(), reverse=True):
                try:
                    stored = manager.item_metadata(step).state
                    if size_in_bytes(stored) != size_in_bytes(like):  # Orbax refuses too, but not silently
                        raise ValueError("its arrays have other sizes")
                    return manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like))).state
                except Exception as error:  # Orbax raises many types for a damaged or foreign checkpoint
                    problem = f"step {step}: {type(error).__name__}: {str(error)[:200]!r}"
                    print(f"warning: a checkpoint of {folder} cannot be used, {problem}", file=sys.stderr)
    way_out = f"name a run of {Path(__file__).name}, without flags that change a size"
    raise UserError(f"{flag} {folder}: no checkpoint fits these settings ({problem}); {way_out}.")


def size_in_bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


class Clock:
    """Seconds of each phase of an iteration, tracing and compilation apart."""

    compiling = 0.0  # seconds that this process has spent on it

    def __init__(self):
        self.logs, self.compiled_before, self.last = {}, Clock.compiling, time.perf_counter() - Clock.compiling

    @staticmethod
    def listen(event: str, seconds: float, **_: Any) -> None:
        Clock.compiling += seconds if event.startswith("/jax/core/compile/") else 0.0

    def lap(self, phase: str, wait_for: Any = None) -> None:
        jax.block_until_ready(wait_for)
        now = time.perf_counter() - Clock.compiling
        self.logs[f"perf/seconds_{phase}"], self.last = max(0.0, now - self.last), now

    def summary(self, env_steps: int) -> dict[str, float]:
        logs = self.logs | {"perf/SPS": env_steps / max(sum(self.logs.values()), 1e-9)}
        logs["perf/compile_seconds"] = Clock.compiling - self.compiled_before
        logs["perf/peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if stats := jax.local_devices()[0].memory_stats():  # none on a CPU
            logs["perf/peak_device_memory_gb"] = stats["peak_bytes_in_use"] / 2**30
        return logs


jax.monitoring.register_event_duration_secs_listener(Clock.listen)


def evaluate(args: Args, run: Run, params: Any, step: int) -> None:
    """First episodes in worlds that are the same for every run, with stochastic and with greedy actions. Writes
    eval.json and a video of one episode of each.
    """
    args = dataclasses.replace(args, num_envs=args.eval_episodes)
    result = {"step": step, "episodes": args.num_envs}
    for mode in ("stochastic", "greedy"):
        key_env, key = jax.random.split(jax.random.PRNGKey(0))
        carry, rows, frames, part = init_env(args, key_env), np.zeros((args.num_envs, 25)), [], 0
        while not rows[:, 0].all():  # until every environment has ended an episode
            part += 1
            carry, rollout, records = collect(args, params, carry, jax.random.fold_in(key, part), mode == "greedy")
            records, video = on_host((records, rollout.frames[:, 0]))
            for row, frame in zip(records, video, strict=True):
                frames += [] if rows[0, 0] else [frame]
                rows = np.where(rows[:, :1] == 0, row, rows)  # Float[n, 25]: the first episode's record
        run.media(step, f"eval_{mode}", np.stack(frames))
        returns, rates = rows[:, 1], rows[:, 3:].mean(0)
        result[mode] = {
            "return_mean": returns.mean(),
            "return_standard_error": returns.std(ddof=min(1, len(rows) - 1)) / math.sqrt(len(rows)),
            "reward_percent": 100 / len(ACHIEVEMENTS) * returns.mean(),
            "score_percent": score_percent(rates),
            "length_mean": rows[:, 2].mean(),
            "achievements": dict(zip(ACHIEVEMENTS, rates.tolist(), strict=True)),
        }
        if run.wandb:
            scores = {f"eval/{mode}_{name}": x for name, x in result[mode].items() if name != "achievements"}
            run.wandb.log({"step": step, **scores})
    text = json.dumps(result, indent=2, default=float)
    if run.writes:
        (run.folder / "eval.json").write_text(text)
    print(text)


def start_jax(args: Args) -> None:
    """Join other processes, of which the first one prints; keep freed memory and compiled programs."""
    if sys.platform == "linux":  # else glibc returns large arrays to the system, and new ones cost page faults
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-8, 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX
            ctypes.CDLL(None).mallopt(option, value)
    if args.distributed and not args.dry_run:
        try:  # JAX itself reads JAX_COORDINATOR_ADDRESS, and asks launchers that it knows
            given = {name: os.environ.get(f"JAX_{name.upper()}") for name in ("num_processes", "process_id")}
            jax.distributed.initialize(**{name: int(value) for name, value in given.items() if value})
            multihost_utils.sync_global_devices("all are here")  # the first exchange must not wait for a compilation
        except (ValueError, RuntimeError) as error:
            way_out = "use a known launcher, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
            raise UserError(f"--distributed True: the processes cannot join ({error}); {way_out}.") from error
        sys.stdout = open(os.devnull, "w") if jax.process_index() > 0 else sys.stdout  # noqa: SIM115
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "jax_compilation_cache"))


def train(args: Args) -> None:
    """Train from the start or from --resume, with logs, media and checkpoints on the way, then evaluate."""
    env_steps, base_key = args.num_envs * args.num_steps, jax.random.fold_in(jax.random.PRNGKey(args.seed), 1_000_000)
    resumed = load_checkpoint("--resume", Path(args.resume), init_state(args)) if args.resume else None
    first = int(resumed.iteration) if resumed else 0
    run = Run(args, step=first * env_steps, writes=jax.process_index() == 0)
    folder = multihost_utils.broadcast_one_to_all(np.frombuffer(str(run.folder).encode(), np.uint8))
    run.folder = Path(bytes(folder).decode())  # its time is the first process's
    kept = sum(path.name.isdigit() for path in run.folder.glob("checkpoints/*"))  # two stay, for a moment three
    needed = max(1, 3 - kept) * size_in_bytes(jax.eval_shape(lambda: init_state(args)))
    if run.writes and (free := shutil.disk_usage(run.folder).free) < needed:
        reason = f"has {free / 1e9:.1f} GB free but checkpoints may take {needed / 1e9:.1f} GB more"
        raise UserError(f"the disk of {run.folder} {reason}: make room, or change --runs-dir of a new run.")
    state = resumed or init_state(args)
    print(f"{run.folder}: {args.num_iterations} iterations of {env_steps} environment steps", flush=True)
    started = time.perf_counter()
    for iteration in range(first, args.num_iterations):
        # The key depends on the iteration alone: a resumed run draws what the uninterrupted one would have drawn.
        key, step = jax.random.fold_in(base_key, iteration), (iteration + 1) * env_steps
        state, rollout, logs = train_iteration(args, state, key)
        run.log(step, logs)
        left, last = args.num_iterations - iteration - 1, iteration + 1 == args.num_iterations
        hours, minutes = divmod(int((time.perf_counter() - started) / (iteration + 1 - first) * left) // 60, 60)
        shown = ("charts/episodic_return", "charts/reward_percent", "charts/score_percent", "perf/SPS")
        text = "  ".join(f"{key.split('/')[1]} {logs[key]:.2f}" for key in shown if key in logs)
        with contextlib.suppress(BrokenPipeError):  # Ctrl-C ends the reader of `... | tee LOG` as well
            print(f"step {step:,} of {args.total_steps:,}  {text}  ETA {hours}:{minutes:02} h", flush=True)
        stop = multihost_utils.process_allgather(np.array(run.stop)).any()
        if (iteration + 1) % args.save_every == 0 or last or stop:
            save_checkpoint(run.folder, step, state)
        if args.media_every and ((iteration + 1) % args.media_every == 0 or last):
            write_media(args, run, step, state, rollout, jax.random.fold_in(key, 1_000_000))
        if stop:
            print(f"stopped and saved at step {step:,}; go on with: python {Path(__file__).name} --resume {run.folder}")
            return
    if args.eval_episodes:
        run.on_signal(signal.SIG_DFL)  # all is saved
        evaluate(args, run, state.policy.params, int(state.iteration) * env_steps)


def main() -> None:
    try:
        args = parse_args()
        start_jax(args)
        check_args(args)
        if args.dry_run:
            print(json.dumps(dataclasses.asdict(args), indent=2))
            dry_run(args)
        elif args.eval_only:
            state = load_checkpoint("--eval-only", Path(args.eval_only), init_state(args))
            run = Run(args, writes=jax.process_index() == 0)
            evaluate(args, run, state.policy.params, int(state.iteration) * args.num_envs * args.num_steps)
        else:
            train(args)
    except (UserError, OSError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not (full or isinstance(error, UserError) or error.errno == errno.EPIPE):
            raise
        print(f"{Path(__file__).name}: error: {error}{'; make room, then --resume the run' * full}", file=sys.stderr)
        sys.exit(2)


# --- end shared block: craftax run ---


if __name__ == "__main__":
    main()

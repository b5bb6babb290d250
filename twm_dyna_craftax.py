# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax>=0.10,<0.11", "flax>=0.12,<0.13", "optax>=0.2.8,<0.3", "craftax>=1.6.1,<1.7", "orbax-checkpoint>=0.12,<0.13",
#   "numpy>=2.0,<3", "tyro>=1.0,<2", "imageio>=2.37,<3", "imageio-ffmpeg>=0.6,<1", "wandb>=0.25,<1",
# ]
# ///
"""Dyna with a transformer world model on Craftax-Classic pixels (the paper's best agent, M5).
Papers: [TWM] "Improving Transformer World Models for Data-Efficient RL" arXiv:2502.01591, [PPO] arXiv:1707.06347,
[GAE] arXiv:1506.02438, [RoPE] arXiv:2104.09864. Details, deviations, results: docs/twm_dyna_craftax.md

    python twm_dyna_craftax.py --total-steps 1000000        # the paper's setting, 1M environment steps
    python twm_dyna_craftax.py --preset cpu                 # smaller; another encoder, gamma, lambda, annealing
    python twm_dyna_craftax.py --preset cpu-late            # with a longer warmup and a few additions to the paper
    python twm_dyna_craftax.py --preset smoke               # a minute or two: learns nothing, touches everything
    python twm_dyna_craftax.py --resume runs/RUN_FOLDER     # goes on where that run stopped
    python twm_dyna_craftax.py --eval-only runs/RUN_FOLDER  # scores that run's policy: eval.json and a video

Every iteration ([TWM] Algorithm 1): 1 collect real steps, 2 PPO on them, 3 grow the tokenizer and train the world
model on the replay, 4 after a warmup, PPO on rollouts imagined by the world model.
Axes: B environments or sequences, T steps, H W C pixels, D hidden size, A actions; L = 81 cells (patches) of a frame,
S tokens (82 a step: the cells, then the action), K codes, V codes that the output layer computes (live <= V <= K).
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

    codebook_size: int = 4096  # largest number of codes (K)
    code_distance: float = 0.75  # a patch farther than this squared distance from every code becomes one (tau)
    context: int = 20  # steps that the world model sees (T_WM), 82 tokens each
    wm_layers: int = 3  # transformer layers
    wm_heads: int = 8  # attention heads
    wm_size: int = 128  # width of the residual stream (d)
    wm_dropout: float = 0.1  # on embeddings, attention weights and residual branches, in training only
    wm_learning_rate: float = 1e-3  # Adam step size of the world model, constant
    wm_batch_size: int = 16  # sequences of context + 1 frames per gradient step
    wm_average_decay: float = 0.0  # decay per gradient step of the mean of its weights that imagines (the paper: 0)
    wm_action_in_cells: bool = False  # add the action to each cell of its step, beside its own token (the paper: no)
    wm_rewarded_actions: bool = False  # tell it the actions that have achieved something in the episode (the paper: no)
    wm_inventory_weight: float = 1.0  # cells that each of the 18 inventory cells counts for in the token loss
    wm_updates: int = 1500  # world-model gradient steps per iteration (12,000: perhaps the paper's slow variant)
    replay_size: int = 128_000  # transitions kept, first in first out, all environments together
    warmup_steps: int = 200_000  # environment steps before the policy learns from imagined rollouts (T_BP)
    imagination_updates: int = 150  # imagined rollouts, one policy update each, per iteration (0: never imagine)
    imagination_envs: int = 48  # rollouts imagined at once
    imagination_steps: int = 20  # length of an imagined rollout, at most context
    imagination_recent: int = 128_000  # newest transitions of the replay from which imagined rollouts start
    burn_in: int = 5  # real frames that warm up the GRU before an imagined rollout

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
        preset="cpu", total_steps=100_000, num_steps=48, encoder="cells", encoder_channels=(192, 32), tower_size=512,
        anneal_learning_rate=True, gamma=0.95, gae_lambda=0.65, update_epochs=3, codebook_size=1024, context=6,
        wm_layers=2, wm_heads=3, wm_size=96, wm_updates=150, warmup_steps=40_000, imagination_updates=5,
        imagination_envs=144, imagination_steps=6, micro_batch_frames=1000, save_every=10, media_every=10,
    ),
    "smoke": Args(
        preset="smoke", total_steps=96, num_envs=4, num_steps=6, encoder="cells", encoder_channels=(16, 16),
        gru_size=32, tower_size=32, update_epochs=1, num_minibatches=2, codebook_size=256, context=4, wm_layers=1,
        wm_heads=2, wm_size=32, wm_batch_size=4, wm_updates=2, replay_size=64, warmup_steps=48,
        imagination_updates=2, imagination_envs=4, imagination_steps=4, burn_in=2, save_every=1, media_every=2,
        eval_episodes=4,
    ),
}
PRESETS["cpu-late"] = dataclasses.replace(  # where imagination pays at that size: with flags that the paper has not
    PRESETS["cpu"], preset="cpu-late", total_steps=200_000, warmup_steps=100_000, wm_updates=200,
    wm_action_in_cells=True, wm_rewarded_actions=True, wm_average_decay=0.99, wm_inventory_weight=20.0,
    imagination_updates=25, imagination_recent=13_824, eval_episodes=480,
)
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
    """Refuse settings that cannot work, before anything is compiled. Raises UserError."""
    check_policy_args(args, ("wm_batch_size", "imagination_envs", "eval_episodes"))
    window, rollout = max(args.context, args.burn_in) + 1, args.num_envs * args.num_steps
    require(args, "wm_dropout", args.wm_dropout < 1, "drops everything: give a number below 1")
    require(args, "wm_average_decay", args.wm_average_decay < 1, "never moves: give a number below 1")
    reason = f"does not split into --wm-heads {args.wm_heads} heads of even size, as rotary positions need"
    require(args, "wm_size", args.wm_size % (2 * args.wm_heads) == 0, f"{reason}: try {32 * args.wm_heads}")
    reason = f"is more than the world model can see: give at most --context {args.context}"
    require(args, "imagination_steps", args.imagination_steps <= args.context, reason)
    reason = f"is less than --context {args.context} and --burn-in {args.burn_in} need: give at least {window}"
    require(args, "num_steps", args.num_steps >= window, reason)
    require(args, "replay_size", args.replay_size >= rollout, f"cannot hold one rollout: give at least {rollout}")
    fewest = args.num_envs * (args.burn_in + 1)
    reason = f"is less than --burn-in {args.burn_in} needs: give at least {fewest}"
    require(args, "imagination_recent", args.imagination_recent >= fewest, reason)
    require(args, "codebook_size", args.codebook_size <= 65_536, "does not fit into 16-bit tokens: give at most 65536")


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


# --- Tokenizer ---
@struct.dataclass
class Codebook:
    """[TWM] nearest-neighbour tokenizer: patches met so far, in the order of their insertion, never changed."""

    codes: Array  # UInt8[K, 147]
    size: Array  # Int[]: rows in use


def nearest_code(codebook: Codebook, patches: Array) -> tuple[Array, Array]:
    """Squared distance to, and index of, the nearest code in use (the first of equals) for Float[N, 147] patches.
    Pixels are whole numbers 0..255, which bf16 and TF32 hold too, so |e|^2 - 2 p e is exact in whatever precision a
    device multiplies, and in whatever order it sums up, in fp32.
    """
    group = min(256, len(codebook.codes))  # codes compared at once; only groups that hold codes in use are

    def search(i, best):
        start = jnp.minimum(i * group, len(codebook.codes) - group)
        codes = jax.lax.dynamic_slice_in_dim(codebook.codes, start, group).astype(jnp.float32)
        in_use = start + jnp.arange(group) < codebook.size
        distance = jnp.where(in_use, jnp.square(codes).sum(-1) - 2 * (patches @ codes.T), jnp.inf)  # Float[N, group]
        closest, index = distance.min(-1), start + distance.argmin(-1)
        return jnp.minimum(closest, best[0]), jnp.where(closest < best[0], index, best[1])

    nothing = jnp.full(len(patches), jnp.inf), jnp.zeros(len(patches), jnp.int32)
    distance, index = jax.lax.fori_loop(0, -(-codebook.size // group), search, nothing)
    return distance + jnp.square(patches).sum(-1), index


@functools.partial(jax.jit, static_argnums=0)
def grow_codebook(args: Args, codebook: Codebook, frames: Array) -> tuple[Codebook, Array]:
    """Offer all patches of UInt8[T, B, 63, 63, 3] frames in order (step, environment, row, column): one farther than
    tau from every code, those just added included, becomes a code while there is room. Returns the codebook and the
    tokens UInt16[T, B, 81]. One product with all codes per step, then one pass over the step's patches per added code,
    equals the sequential rule: no patch before the first far one can become a code.
    """
    limit = args.code_distance * 255**2

    def one_step(codebook, frames):
        patches = to_cells(frames).reshape(-1, CELL * CELL * 3).astype(jnp.float32)  # Float[B * 81, 147]

        def room_and_far(carry):
            return (carry[0].size < args.codebook_size) & (carry[1] > limit).any()

        def add_first_far(carry):
            codebook, distance, index = carry
            patch = patches[jnp.argmax(distance > limit)]
            new_distance = jnp.square(patches - patch).sum(-1)
            index = jnp.where(new_distance < distance, codebook.size, index)
            codes = codebook.codes.at[codebook.size].set(patch.astype(jnp.uint8))
            return Codebook(codes, codebook.size + 1), jnp.minimum(distance, new_distance), index

        carry = codebook, *nearest_code(codebook, patches)
        codebook, _, index = jax.lax.while_loop(room_and_far, add_first_far, carry)
        return codebook, index.reshape(len(frames), -1).astype(jnp.uint16)

    return jax.lax.scan(one_step, codebook, frames)


def decode(codebook: Codebook, tokens: Array) -> Array:
    """Int[..., 81] tokens -> UInt8[..., 63, 63, 3] frames."""
    grid = codebook.codes[tokens].reshape(-1, GRID, GRID, CELL, CELL, 3).swapaxes(2, 3)
    return grid.reshape(*tokens.shape[:-1], *FRAME)


def live_vocabulary(args: Args, codebook: Codebook) -> int:
    """V: a power of two from 256 on, or K, that holds all codes in use. Others are masked: V changes only the cost."""
    return min(args.codebook_size, max(256, 1 << (int(codebook.size) - 1).bit_length()))


# --- World model ---
BLOCK = GRID * GRID + 1  # tokens of one step: 81 cells, then the action


def rope(x: Array, position: Array) -> Array:
    """[RoPE] rotate Float[..., S, D] by Int[S] positions; dimension i is paired with i + D / 2."""
    half = x.shape[-1] // 2
    angle = position[:, None] * 10_000.0 ** (-jnp.arange(half) / half)  # Float[S, D / 2]
    cos, sin = jnp.tile(jnp.cos(angle), 2), jnp.concatenate([-jnp.sin(angle), jnp.sin(angle)], axis=-1)
    return x * cos.astype(x.dtype) + jnp.roll(x, half, axis=-1) * sin.astype(x.dtype)


def attend(query: Array, key: Array, value: Array, visible: Any = True, keep: Any = 1.0) -> Array:
    """Softmax attention, weights in fp32, divided by their sum after the product with the values: that touches D
    numbers a query instead of one a key. Float[..., S, D] each; visible Bool[keys]; keep Float[queries, keys]: dropout.
    """
    query = query / math.sqrt(query.shape[-1])
    scores = jnp.einsum("...qd,...kd->...qk", query, key, preferred_element_type=jnp.float32)
    scores = jnp.where(visible, scores, -1e30)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    total, weights = weights.sum(-1, keepdims=True), (weights * keep).astype(value.dtype)
    out = jnp.einsum("...qk,...kd->...qd", weights, value, preferred_element_type=jnp.float32)
    return (out / total).astype(value.dtype)


class TransformerBlock(nn.Module):
    """Pre-LN transformer layer on Float[B * S, d]: on a CPU gradients are faster so than on Float[B, S, d]."""

    args: Args

    def setup(self):
        args, dtype = self.args, self.args.compute_dtype
        dense = functools.partial(nn.Dense, dtype=dtype, kernel_init=nn.initializers.normal(0.02))
        self.norm1, self.norm2 = (nn.LayerNorm(epsilon=1e-5, dtype=dtype) for _ in range(2))
        self.qkv, self.out = dense(3 * args.wm_size), dense(args.wm_size)
        self.up, self.down = dense(4 * args.wm_size), dense(args.wm_size)
        self.drop = nn.Dropout(args.wm_dropout)

    def heads(self, x: Array, position: Array) -> tuple[Array, Array, Array]:
        """Rotated queries and keys, and values: Float[heads, B, S, D] each."""
        heads = self.args.wm_heads
        qkv = self.qkv(self.norm1(x)).reshape(-1, len(position), 3, heads, x.shape[-1] // heads)
        query, key, value = jnp.moveaxis(qkv, (2, 3), (0, 1))
        return rope(query, position), rope(key, position), value

    def merge(self, x: Array, attended: Array, deterministic: bool) -> Array:
        """The two residual branches, after attention."""
        x = x + self.drop(self.out(jnp.moveaxis(attended, 0, 2).reshape(x.shape)), deterministic)
        return x + self.drop(self.down(nn.gelu(self.up(self.norm2(x)))), deterministic)

    def __call__(self, x: Array, length: int, deterministic: bool) -> Array:
        """[TWM] block-causal attention: a token sees all tokens of its own step and of earlier ones. Only what is
        visible is computed, one step's queries at a time. The gradient computes weights anew instead of storing them;
        on a CPU, whose caches can hold the weights of one head, heads follow one another.
        """
        ends = range(BLOCK, length * BLOCK + 1, BLOCK)
        keeps = [self.drop(jnp.ones((BLOCK, end)), deterministic) for end in ends]  # one mask for batch and heads

        @jax.checkpoint
        def one_head(head: tuple[Array, Array, Array]) -> Array:
            query, key, value = head  # Float[B, S, D]
            seen = [(query[:, end - BLOCK : end], key[:, :end], value[:, :end]) for end in ends]
            return jnp.concatenate([attend(*part, keep=keep) for part, keep in zip(seen, keeps, strict=True)], axis=1)

        at_once = None if jax.default_backend() == "cpu" else self.args.wm_heads
        heads = self.heads(x, jnp.arange(length * BLOCK))
        return self.merge(x, jax.lax.map(one_head, heads, batch_size=at_once), deterministic)

    def step(self, x: Array, cache: Array, t: Array, length: int) -> tuple[Array, Array]:
        """Step t alone, Float[B * 82, d], attending to cache Float[2, heads, B, S, D]: its first `length` > t steps."""
        query, key, value = self.heads(x, t * BLOCK + jnp.arange(BLOCK))
        cache = jax.lax.dynamic_update_slice_in_dim(cache, jnp.stack([key, value]), t * BLOCK, axis=3)
        key, value = cache[:, :, :, : length * BLOCK]
        visible = jnp.arange(length * BLOCK) < (t + 1) * BLOCK
        return self.merge(x, attend(query, key, value, visible), True), cache


class WorldModel(nn.Module):
    """[TWM] transformer with block teacher forcing: from step t's cells and action it predicts, in parallel, the 81
    tokens of frame t+1, and at the action's position the reward class and whether the episode ended. Outputs, fp32:
    token logits Float[B, T, 81, V], -1e30 for codes not in use; reward logits, done logits Float[B, T, 2].
    """

    args: Args

    def setup(self):
        args, dtype = self.args, self.args.compute_dtype
        normal, lecun = nn.initializers.normal(0.02), nn.initializers.lecun_normal()
        self.token_table = self.param("token_table", normal, (args.codebook_size, args.wm_size))
        self.action_table = self.param("action_table", normal, (NUM_ACTIONS, args.wm_size))
        if args.wm_rewarded_actions:  # "do" has eleven achievements; what is booked on another is seldom more than one
            self.rewarded_table = self.param("rewarded_table", normal, (NUM_ACTIONS, 12, args.wm_size))
        self.blocks = [TransformerBlock(args) for _ in range(args.wm_layers)]
        self.norm, self.drop = nn.LayerNorm(epsilon=1e-5, dtype=dtype), nn.Dropout(args.wm_dropout)
        hidden = [nn.Dense(args.wm_size, dtype=dtype) for _ in range(3)]
        self.token_hidden, self.reward_hidden, self.done_hidden = hidden
        self.token_kernel = self.param("token_kernel", lecun, (args.wm_size, args.codebook_size))
        self.token_bias = self.param("token_bias", nn.initializers.zeros, (args.codebook_size,))
        self.reward_out, self.done_out = (nn.Dense(2, dtype=jnp.float32) for _ in range(2))

    def embed(self, tokens: Array, actions: Array, rewarded: Array | None) -> Array:
        """Int[B, T, 81], Int[B, T], UInt8[B, T, 17] -> Float[B * T * 82, d]."""
        cells, action = self.token_table[tokens], self.action_table[actions][:, :, None]
        cells = cells + action if self.args.wm_action_in_cells else cells
        if self.args.wm_rewarded_actions:
            table = self.rewarded_table[jnp.arange(NUM_ACTIONS), jnp.minimum(rewarded, 11)]  # Float[B, T, 17, d]
            action = action + table.sum(2, keepdims=True)
        x = jnp.concatenate([cells, action], axis=2)
        return x.reshape(-1, x.shape[-1]).astype(self.args.compute_dtype)

    def read_out(self, x: Array, batch: int, vocab: int, size: Array) -> tuple[Array, Array, Array]:
        x = self.norm(x).reshape(batch, -1, BLOCK, x.shape[-1])
        cells, action = nn.relu(self.token_hidden(x[:, :, :-1].reshape(-1, x.shape[-1]))), x[:, :, -1]
        kernel = self.token_kernel[:, :vocab].astype(x.dtype)
        logits = jnp.matmul(cells, kernel, preferred_element_type=jnp.float32) + self.token_bias[:vocab]
        logits = logits.reshape(batch, -1, BLOCK - 1, vocab)
        logits = jnp.where(jnp.arange(vocab) < size, logits, -1e30)
        reward, done = nn.relu(self.reward_hidden(action)), nn.relu(self.done_hidden(action))
        return logits, self.reward_out(reward), self.done_out(done)

    def __call__(self, inputs: tuple, vocab: int, size: Array, deterministic: bool = True) -> tuple:
        """Whole sequences at once. inputs: tokens Int[B, T, 81], actions Int[B, T], and rewarded UInt8[B, T, 17] with
        --wm-rewarded-actions, else None.
        """
        x = self.drop(self.embed(*inputs), deterministic)
        for block in self.blocks:
            x = block(x, inputs[0].shape[1], deterministic)
        return self.read_out(x, len(inputs[0]), vocab, size)

    def step(self, inputs: tuple, vocab: int, size: Array, caches: tuple, t: Array, length: int) -> tuple[tuple, tuple]:
        """Step t alone: inputs without the axis T, and each layer's cache Float[2, heads, B, S, D] of steps before, of
        which only the first `length` > t are read. Returns outputs with T = 1, caches.
        """
        x, new = self.embed(*jax.tree.map(lambda leaf: leaf[:, None], inputs)), []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block.step(x, cache, t, length)
            new.append(cache)
        return self.read_out(x, len(inputs[0]), vocab, size), tuple(new)


def empty_caches(args: Args, batch: int) -> tuple[Array, ...]:
    """One of each layer: of arrays in one, XLA would copy all at every step."""
    shape = (2, args.wm_heads, batch, args.context * BLOCK, args.wm_size // args.wm_heads)
    return split_batch(tuple(jnp.zeros(shape, args.compute_dtype) for _ in range(args.wm_layers)), axis=2)


@functools.partial(jax.jit, static_argnums=0)
def init_world_model(args: Args, key: Array) -> Learner:
    tokens, actions = jnp.zeros((1, 1, BLOCK - 1), jnp.int32), jnp.zeros((1, 1), jnp.int32)
    rewarded = jnp.zeros((1, 1, NUM_ACTIONS), jnp.uint8) if args.wm_rewarded_actions else None
    params = WorldModel(args).init(key, (tokens, actions, rewarded), args.codebook_size, 1)["params"]
    return Learner(params, adam(args, args.wm_learning_rate).init(params))


def world_model_loss(params: Any, args: Args, vocab: int, size: Array, windows: "Steps", key: Array | None) -> tuple:
    """[TWM] cross-entropies of next tokens, reward class (1 from 0.5 on: an achievement, less health lost) and
    termination over windows of T + 1 frames, also across episode ends, whose next frame is the first of a new world.
    --wm-inventory-weight enters "loss" only. key: of dropout; None: without.
    """
    tokens, rewards, dones = windows.tokens.astype(jnp.int32), windows.rewards[:, :-1], windows.dones[:, :-1]
    inputs = jax.tree.map(lambda leaf: leaf[:, :-1], (tokens, windows.actions, windows.rewarded))
    apply = functools.partial(WorldModel(args).apply, rngs={} if key is None else {"dropout": key})
    logits, reward, done = apply({"params": params}, inputs, vocab, size, key is None)
    cross_entropy, labels = optax.softmax_cross_entropy_with_integer_labels, tokens[:, 1:]  # Int[B, T, 81]
    token_losses = cross_entropy(logits, labels)  # Float[B, T, 81]
    logs = {"token_loss": token_losses.mean()}
    logs["reward_loss"] = cross_entropy(reward, (rewards >= 0.5).astype(jnp.int32)).mean()
    logs["done_loss"] = cross_entropy(done, dones.astype(jnp.int32)).mean()
    weights = jnp.ones(GRID**2).at[-2 * GRID :].set(args.wm_inventory_weight)  # the inventory: the last two rows
    logs["loss"] = loss = (weights * token_losses).mean() + logs["reward_loss"] + logs["done_loss"]
    best, changed = logits.max(-1), labels != inputs[0]  # on a CPU an argmax would take 4 % of the step
    right = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0] == best
    logs["token_accuracy"] = right.mean()
    logs["changed_token_accuracy"] = (right & changed).sum() / jnp.maximum(changed.sum(), 1)
    return loss, logs


# --- Replay ---
@struct.dataclass
class Steps:
    """Transitions along two axes: [N, B] in the replay, batch-major [B, T] when drawn from it."""

    tokens: Array  # UInt16[..., 81]
    actions: Array  # UInt8[...]
    rewards: Array  # Float[...]
    dones: Array  # Bool[...]
    frames: Array | None  # UInt8[..., 63, 63, 3]; None where tokens are enough, as in benchmarks
    rewarded: Array | None = None  # UInt8[..., 17]: how often each action has achieved something in the episode before


@struct.dataclass
class Replay:
    """The latest N steps of every environment, in a ring along axis 0."""

    steps: Steps
    head: Array  # Int[]: where the next step goes
    filled: Array  # Int[]


@functools.partial(jax.jit, static_argnums=0)
def init_replay(args: Args) -> Replay:
    shape = (args.replay_size // args.num_envs, args.num_envs)
    tokens, frames = jnp.zeros((*shape, BLOCK - 1), jnp.uint16), jnp.zeros((*shape, *FRAME), jnp.uint8)
    rewarded = jnp.zeros((*shape, NUM_ACTIONS), jnp.uint8) if args.wm_rewarded_actions else None
    steps = Steps(tokens, jnp.zeros(shape, jnp.uint8), jnp.zeros(shape), jnp.zeros(shape, bool), frames, rewarded)
    return Replay(split_batch(steps, axis=1), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def count_rewarded(counts: Array, actions: Array, rewards: Array, dones: Array) -> Array:
    """Steps.rewarded of the next step, UInt8[B, 17], from that of a step and what happens in it."""
    counts = counts + (jax.nn.one_hot(actions, NUM_ACTIONS) * (rewards >= 0.5)[:, None]).astype(jnp.uint8)
    return jnp.where(dones[:, None], jnp.uint8(0), counts)


@jax.jit
def add_rewarded(replay: Replay, new: Steps) -> Steps:
    """[T, B] steps with their field `rewarded`, counted on from the newest in the replay: before they are added."""
    last = jax.tree.map(lambda ring: ring[replay.head - 1], replay.steps)

    def one(counts, step):
        return count_rewarded(counts, step.actions, step.rewards, step.dones), counts

    first = count_rewarded(last.rewarded, last.actions, last.rewards, last.dones)
    return new.replace(rewarded=jax.lax.scan(one, first, new)[1])


@functools.partial(jax.jit, donate_argnums=0)
def add_to_replay(replay: Replay, new: Steps) -> Replay:
    """Append [T, B] steps over the oldest ones."""
    capacity, steps = replay.steps.actions.shape[0], new.actions.shape[0]
    rows = (replay.head + jnp.arange(steps)) % capacity
    ring = jax.tree.map(lambda old, values: old.at[rows].set(values), replay.steps, new)
    return Replay(ring, (replay.head + steps) % capacity, jnp.minimum(replay.filled + steps, capacity))


def sample_windows(replay: Replay, key: Array, batch: int, length: int, recent: int) -> Steps:
    """[batch, length] of the newest `recent` steps of every environment: windows uniform over environments and start
    times, none across the write head.
    """
    (capacity, num_envs), (key_env, key_start) = replay.steps.actions.shape, jax.random.split(key)
    env, usable = jax.random.randint(key_env, (batch, 1), 0, num_envs), jnp.minimum(replay.filled, recent)
    start = jax.random.randint(key_start, (batch, 1), 0, usable - length + 1)  # steps after the oldest one
    rows = (replay.head - usable + start + jnp.arange(length)) % capacity
    return split_batch(jax.tree.map(lambda ring: ring[rows, env], replay.steps), axis=0)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def world_model_step(
    args: Args, vocab: int, model: Learner, size: Array, replay: Replay, key: Array
) -> tuple[Learner, dict]:
    """One gradient step on fresh windows of the replay."""
    key_windows, key_dropout = jax.random.split(key)
    windows = sample_windows(replay, key_windows, args.wm_batch_size, args.context + 1, args.replay_size)
    grads, logs = jax.grad(world_model_loss, has_aux=True)(model.params, args, vocab, size, windows, key_dropout)
    updates, opt_state = adam(args, args.wm_learning_rate).update(grads, model.opt_state)
    logs["grad_norm"] = optax.tree.norm(grads)
    return Learner(optax.apply_updates(model.params, updates), opt_state), logs


heldout_loss = jax.jit(world_model_loss, static_argnums=(1, 2))
move_average = jax.jit(optax.incremental_update)  # of new and old parameters, new ones weighted by a step size


# --- Imagination ---
def draw_tokens(key: Array, logits: Array, size: Array) -> Array:
    """A code Int[...] in use from each softmax of Float[..., V] logits, by inversion: one random number a token, where
    jax.random.categorical needs one a code, which is slow on a CPU.
    """
    sums = jnp.cumsum(jnp.exp(logits - logits.max(-1, keepdims=True)), axis=-1)
    drawn = (sums <= jax.random.uniform(key, logits.shape[:-1])[..., None] * sums[..., -1:]).sum(-1)
    return jnp.minimum(drawn, size - 1)  # sums over codes not in use may still round up


def imagine(
    args: Args, vocab: int, policy: Learner, wm_params: Any, codebook: Codebook, windows: Steps, key: Array
) -> Rollout:
    """[TWM] a rollout of the policy inside the world model. The GRU is warmed up on the windows' first burn_in frames;
    the world model starts from the frame after them alone. A predicted end resets the GRU, and the frame sampled with
    it counts as the first of an episode.
    """
    batch, frames = len(windows.actions), windows.frames.swapaxes(0, 1)
    resets = jnp.concatenate([jnp.zeros((1, batch), bool), windows.dones.T[:-1]])  # frame t starts one if t-1 ended it
    hidden = jnp.zeros((batch, args.gru_size))
    if args.burn_in:
        hidden = Policy(args).apply({"params": policy.params}, frames[:-1], resets[:-1], hidden)[2]

    def step(carry, inputs, length):
        (frame, reset, hidden, tokens, rewarded, caches), (t, key) = carry, inputs
        key_act, key_token, key_reward, key_done = jax.random.split(key, 4)
        actions, logprobs, values, next_hidden = act(args, policy.params, frame, reset, hidden, key_act, False)
        model = functools.partial(WorldModel(args).apply, {"params": wm_params}, method="step")
        (logits, reward, done), caches = model((tokens, actions, rewarded), vocab, codebook.size, caches, t, length)
        tokens = draw_tokens(key_token, logits[:, 0], codebook.size)  # Int[B, 81]
        rewards = jax.random.categorical(key_reward, reward[:, 0]).astype(jnp.float32)
        dones = jax.random.categorical(key_done, done[:, 0]).astype(bool)
        if rewarded is not None:
            rewarded = count_rewarded(rewarded, actions, rewards, dones)
        outputs = (frame, reset, actions, logprobs, values, rewards, dones)
        return (decode(codebook, tokens), dones, next_hidden, tokens, rewarded, caches), outputs

    keys = jax.random.split(key, args.imagination_steps)
    tokens, rewarded = jax.tree.map(lambda leaf: leaf[:, -1], (windows.tokens, windows.rewarded))
    carry = (frames[-1], resets[-1], hidden, tokens.astype(jnp.int32), rewarded, empty_caches(args, batch))
    pieces, quarter = [], -(-args.imagination_steps // 4)
    for start in range(0, args.imagination_steps, quarter):  # each quarter reads no more of the caches than it fills
        end = min(start + quarter, args.imagination_steps)
        inputs = jnp.arange(start, end), keys[start:end]
        carry, outputs = jax.lax.scan(functools.partial(step, length=end), carry, inputs)
        pieces.append(outputs)
    outputs = jax.tree.map(lambda *parts: jnp.concatenate(parts), *pieces)
    last_value = act(args, policy.params, *carry[:3], key, False)[2]  # its action goes unused
    return Rollout(*outputs, hidden[None], last_value[None])


@functools.partial(jax.jit, static_argnums=(0, 1))
def imagined_batch(
    args: Args, vocab: int, policy: Learner, wm_params: Any, codebook: Codebook, replay: Replay, key: Array
) -> tuple[tuple[Rollout, Array, Array], dict]:
    """An imagined rollout from random places among the newest imagination_recent steps, its advantages and targets; and
    its rates.
    """
    key_windows, key_rollout = jax.random.split(key)
    recent = args.imagination_recent // args.num_envs
    windows = sample_windows(replay, key_windows, args.imagination_envs, args.burn_in + 1, recent)
    rollout = imagine(args, vocab, policy, wm_params, codebook, windows, key_rollout)
    rates = {"reward_rate": rollout.rewards.mean(), "done_rate": rollout.dones.mean()}
    return (rollout, *advantages_and_targets(args, policy.value_norm, rollout)), rates


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def replay_actions(
    args: Args, vocab: int, given: int, wm_params: Any, size: Array, windows: Steps, key: Array
) -> Array:
    """The world model's own frames under the actions of windows: it sees their first `given` frames, then its samples.
    Windows of at most context + 1 steps -> tokens Int[B, T, 81], the first `given` of them true.
    """
    true, steps = windows.tokens.astype(jnp.int32), windows.actions.shape[1] - 1

    def step(carry, inputs):
        (tokens, caches), (t, key) = carry, inputs
        model = functools.partial(WorldModel(args).apply, {"params": wm_params}, method="step")
        now = jax.tree.map(lambda leaf: leaf[:, t], (windows.actions, windows.rewarded))
        (logits, _, _), caches = model((tokens, *now), vocab, size, caches, t, steps)
        tokens = jnp.where(t + 1 < given, true[:, t + 1], draw_tokens(key, logits[:, 0], size))
        return (tokens, caches), tokens

    carry = true[:, 0], empty_caches(args, len(true))
    _, tokens = jax.lax.scan(step, carry, (jnp.arange(steps), jax.random.split(key, steps)))
    return jnp.concatenate([true[:, :1], tokens.swapaxes(0, 1)], axis=1)


# --- Training ---
@struct.dataclass
class TrainState:
    """All that a checkpoint holds. Random keys are derived from seed and iteration, so they are not in it."""

    iteration: Array
    policy: Learner
    env: EnvCarry
    episode_sums: Array
    codebook: Codebook
    model: Learner
    wm_average: Any  # running mean of the world model's parameters over its gradient steps
    replay: Replay


def init_state(args: Args) -> TrainState:
    key = jax.random.PRNGKey(args.seed)
    (key_policy, key_env), key_model = jax.random.split(key), jax.random.fold_in(key, 2_000_000)
    codebook = Codebook(jnp.zeros((args.codebook_size, CELL * CELL * 3), jnp.uint8), jnp.zeros((), jnp.int32))
    replicated = functools.partial(jax.device_put, device=on_devices(None))
    sums, iteration = replicated((jnp.zeros((1 + args.window_iterations, 25)), jnp.zeros((), jnp.int32)))
    policy, model = replicated((init_policy(args, key_policy), init_world_model(args, key_model)))
    env, replay, average = init_env(args, key_env), init_replay(args), jax.tree.map(jnp.copy, model.params)
    return TrainState(iteration, policy, env, sums, replicated(codebook), model, average, replay)


def train_iteration(args: Args, state: TrainState, key: Array) -> tuple[TrainState, Rollout, dict]:
    """[TWM] Algorithm 1, one round; the phases are Python loops over jitted steps."""
    clock, logs, env_steps = Clock(), {}, args.num_envs * args.num_steps
    key_model, key_imagine = (jax.random.fold_in(key, n) for n in (2_000_000, 3_000_000))

    # 1. Collect real steps, with the draws of ppo_cnnrnn_craftax.py: without imagination the agent is PPO, bit for bit.
    env, rollout, records = collect(args, state.policy.params, state.env, key, False)
    sums = add_episodes(state.episode_sums, records)
    clock.lap("collect", sums)

    # 2. PPO on them.
    policy, logs["losses/real"] = ppo_update(args, state.policy, rollout, state.iteration)
    clock.lap("policy_real")

    # 3a. Grow the tokenizer with every new frame, append frames and tokens to the replay.
    codebook, tokens = grow_codebook(args, state.codebook, rollout.frames)
    new = Steps(tokens, rollout.actions.astype(jnp.uint8), rollout.rewards, rollout.dones, rollout.frames)
    new = add_rewarded(state.replay, new) if args.wm_rewarded_actions else new
    vocab, size = live_vocabulary(args, codebook), codebook.size
    # Before any training on them, without dropout: the last context + 1 steps of wm_batch_size environments.
    windows = jax.tree.map(lambda x: x[-args.context - 1 :, : args.wm_batch_size].swapaxes(0, 1), new)
    logs["world_model/heldout"] = mean_of([heldout_loss(state.wm_average, args, vocab, size, windows, None)[1]])
    replay = add_to_replay(state.replay, new)
    clock.lap("tokenizer", replay)

    # 3b. Train the world model.
    model, average, log = state.model, state.wm_average, []
    for key in jax.random.split(key_model, args.wm_updates):
        model, one = world_model_step(args, vocab, model, size, replay, key)
        average = move_average(model.params, average, 1 - args.wm_average_decay)
        log.append(one)
    logs["losses/world_model"] = mean_of(log)
    clock.lap("world_model")

    # 4. PPO on imagined rollouts, once the warmup is over.
    warm, log = (int(state.iteration) + 1) * env_steps >= args.warmup_steps, []
    for key in jax.random.split(key_imagine, args.imagination_updates if warm else 0):
        batch, rates = imagined_batch(args, vocab, policy, average, codebook, replay, key)
        policy, one = ppo_step(args, policy, batch, args.imagination_envs)  # one step on all of it: ratio 1
        log.append(one | rates)
    logs["losses/imagined"] = mean_of(log)
    clock.lap("imagination")

    logs = {f"{group}_{name}": value for group, log in logs.items() for name, value in log.items()}
    logs |= {"world_model/codes": float(size), "world_model/replay_steps": float(replay.filled * args.num_envs)}
    state = TrainState(state.iteration + 1, policy, env, sums, codebook, model, average, replay)
    return state, rollout, episode_charts(sums) | logs | clock.summary(env_steps)


def write_media(args: Args, run: "Run", step: int, state: TrainState, rollout: Rollout, key: Array) -> None:
    """The codebook, one environment's rollout, and four true sequences, each above its imagined copy under the same
    actions: true frames have a green border, imagined ones a red one.
    """
    codebook, video = on_host((state.codebook, rollout.frames[:, 0]))
    in_use = codebook.codes[: codebook.size]
    codes = np.zeros((-(-len(in_use) // 32) * 32, CELL + 1, CELL + 1, 3), np.uint8)
    codes[: len(in_use), :-1, :-1] = in_use.reshape(-1, CELL, CELL, 3)
    run.media(step, "codebook", codes.reshape(-1, 32, *codes.shape[1:]).swapaxes(1, 2).reshape(-1, 32 * (CELL + 1), 3))
    run.media(step, "rollout", video)
    given, (key_windows, key_tokens) = max(1, args.context // 4), jax.random.split(key)
    batch = math.lcm(4, jax.device_count())
    windows = sample_windows(state.replay, key_windows, batch, args.context + 1, args.replay_size)
    vocab, size = live_vocabulary(args, state.codebook), state.codebook.size
    tokens = replay_actions(args, vocab, given, state.wm_average, size, windows, key_tokens)
    frames = jnp.stack([windows.frames, decode(state.codebook, tokens)], axis=1)
    frames = on_host(frames[:4])  # UInt8[4, 2, T, 63, 63, 3]
    framed = np.full((*frames.shape[:3], GRID * CELL + 4, GRID * CELL + 4, 3), (40, 160, 60), np.uint8)
    framed[:, 1, given:] = (220, 40, 40)
    framed[..., 2:-2, 2:-2, :] = frames
    run.media(step, "imagined_vs_true", np.concatenate(np.concatenate(framed.reshape(-1, *framed.shape[2:]), 1), 1), 2)


def world_model_flop(args: Args, vocab: int, steps: int) -> int:
    """FLOP of the products of a forward pass over one sequence. A token meets those of its own and of earlier steps."""
    layer = 24 * steps * BLOCK * args.wm_size**2 + 2 * args.wm_size * BLOCK**2 * steps * (steps + 1)
    return args.wm_layers * layer + 2 * steps * (BLOCK - 1) * args.wm_size * (args.wm_size + vocab)


def dry_run(args: Args) -> None:
    """Print parameters, memory and arithmetic of a run, and its time at the speed of one measured gradient step."""
    state, key, vocab = jax.eval_shape(lambda: init_state(args)), jax.random.PRNGKey(0), min(args.codebook_size, 512)
    real, dreamt = args.num_envs * args.num_steps, args.imagination_envs * args.imagination_steps
    replay = init_replay(dataclasses.replace(args, replay_size=real)).replace(filled=jnp.int32(args.num_steps))
    train_step = world_model_step.lower(args, vocab, state.model, jnp.int32(vocab), replay, key).compile()
    model, _ = jax.block_until_ready(train_step(init_world_model(args, key), jnp.int32(vocab), replay, key))
    start = time.perf_counter()
    jax.block_until_ready(train_step(model, jnp.int32(vocab), replay, key))
    seconds = time.perf_counter() - start
    flop = 3 * args.wm_batch_size * world_model_flop(args, vocab, args.context)  # a backward pass counts as two
    env, act_once = state.env, jax.jit(functools.partial(act, args, greedy=False))
    policy = act_once.lower(state.policy.params, env.frame, env.reset, env.hidden, key).cost_analysis()["flops"]
    frame = policy / args.num_envs  # one policy forward
    dream = args.imagination_envs * world_model_flop(args, vocab, args.imagination_steps)
    dream += (4 * dreamt + args.burn_in * args.imagination_envs) * frame
    rounds, warmup = args.num_iterations, max(0, args.warmup_steps - 1) // real
    plan = {  # iterations, gradient steps in each, FLOP in each
        "collect": (rounds, 0, real * frame),
        "PPO, real": (rounds, args.update_epochs * args.num_minibatches, 3 * args.update_epochs * real * frame),
        "world model": (rounds, args.wm_updates, args.wm_updates * flop),
        "PPO, imagined": (max(0, rounds - warmup), args.imagination_updates, args.imagination_updates * dream),
    }
    sizes = {"policy": state.policy.params, "world model": state.model.params, "codebook": state.codebook.codes}
    for name, tree in sizes.items():
        print(f"{name:<14} {sum(leaf.size for leaf in jax.tree.leaves(tree)):,} parameters")
    for name, (iterations, updates, work) in plan.items():
        print(f"{name:<14} {iterations} iterations of {updates} gradient steps, {work / 1e12:.4g} TFLOP each")
    inputs = args, vocab, state.policy, state.model.params, state.codebook, replay, key
    batch, params = jax.eval_shape(imagined_batch, *inputs)[0], state.policy.params
    group = gradient_group(args, args.imagination_envs, args.imagination_steps)
    gradient = add_gradient.lower(args, group, params, state.policy.value_norm, batch, params, 0).compile()
    programs = train_step, imagined_batch.lower(*inputs).compile(), gradient
    step_gb, *dream_gb = (program.memory_analysis().temp_size_in_bytes / 1e9 for program in programs)
    print(f"memory         state {size_in_bytes(state) / 1e9:.2f} GB, replay included; on top of it")
    print(f"               a world-model step {step_gb:.2f} GB, or an imagined update {max(dream_gb):.2f} GB")
    tokens = args.wm_batch_size * args.context * BLOCK
    eta = sum(n * work for n, _, work in plan.values()) / flop * seconds
    print(f"tokens         {tokens:,} in a world-model step, {tokens * args.wm_updates:,} in an iteration")
    print(f"measured       a world-model step: {seconds:.2f} s, {flop / seconds / 1e9:.1f} GFLOP/s")
    print(f"ETA            {eta / 3600:.1f} h at that speed, the environment's own time not included")


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

"""Where the time of the Craftax scripts goes: each part beside its floor and beside a plain formulation of the same.

    python benchmark/speed.py                            # all parts, at cpu shapes and at paper shapes
    python benchmark/speed.py --preset cpu --only encoding growth --rounds 9
    python benchmark/speed.py --grow                     # cost against context, environments, codebook and replay

Prints tables and adds to benchmark/results/speed_<hardware>.json; --grow also draws docs/media/speed_growth.png.

Everything runs in one process: the two formulations of a part in turns, round by round, so that a busy machine slows
both. The plain ones are in plain.py; where one would take minutes it does a stated share of the work, and its seconds
are divided by that share. The floor of a part is the larger of its arithmetic over the speed of a large matrix product
and its bytes over the speed of a large copy, both measured in the same rounds. Arithmetic is counted by hand: products
and convolutions only, each needed number computed once, a backward pass as two forward ones. Bytes are parameters,
optimiser state, inputs and results, each read or written once; what lies between them could stay in a cache.
"cpu_over" is the same ratio in processor seconds of this process, which other programs do not lengthen; it does not see
whether both cores had work.
"""

import argparse
import dataclasses
import functools
import json
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import jax

if __name__ == "__main__":  # before anything is compiled; with a cache, seconds of compilation would mean nothing
    jax.config.update("jax_enable_compilation_cache", False)
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import environment_speed
import plain
import results
import twm_dyna_craftax as twm

ENCODED = 16 * 20  # frames of a batch that the public implementation tokenises for each gradient step
CODES = 384  # in use before the collection that is timed; one collection of a young agent adds about 80
# What a plain formulation does in one call, where that is less than the whole.
PLAIN = {
    "paper": {
        "policy_update": (12, 3),  # steps and environments of each of its two batches
        "imagined_update": (4, 9),
        "growth": 3,  # steps
        "encoding": 40,  # frames
        "world_model_step": 2,  # sequences
        "imagined_rollout": 4,  # environments
    },
    "cpu": {"growth": 6, "world_model_step": 8, "imagined_rollout": 36},
}
# Seconds of a public JAX implementation of the paper on two idle cores, tokenising apart from the other parts.
PUBLIC = {"encoding": 14.0, "world_model_step": 30.0, "imagined_rollout": 1.3, "policy_forward": 0.33}
GOALS = {  # at paper shapes on two cores: part -> [(quantity, relation, limit)]
    "environment": [("plain_over_ours", ">=", 6.0)],
    "encoding": [("seconds", "<=", 0.7)],
    "growth": [("seconds", "<=", 5.0)],
    "world_model_step": [("seconds", "<=", 8.0), ("seconds", "<=", 6.0), ("over_floor", "<=", 2.5)],
    "imagined_rollout": [("seconds", "<=", 0.6)],
    "policy_update": [("over_floor", "<=", 2.0)],
    "imagined_update": [("over_floor", "<=", 2.0)],
    "iteration": [("loop_overhead", "<=", 0.05), ("peak_gb", "<=", 8.0)],
}
SHORT = {"wm_updates": 8, "imagination_updates": 2, "warmup_steps": 0}  # of the whole iteration that is run


def clocks() -> np.ndarray:
    """Seconds on the wall, and of processors for this process alone."""
    return np.array([time.perf_counter(), time.process_time()])


# --- What is timed ---
class Program:
    """A jitted function and where its arguments come from. data() gives them anew at every call, because the scripts'
    steps consume their learner; keep(output) puts the new one in its place. units: how much of what seconds are
    reported for one call does. largest: of a function that is a Python loop, its largest jitted one with its arguments.
    """

    def __init__(
        self, function: Callable, static: tuple, data: Callable[[], tuple], units=1.0, keep=lambda out: None, largest=()
    ):
        jitted = largest or hasattr(function, "lower")
        self.function = function if jitted else jax.jit(function, static_argnums=tuple(range(len(static))))
        self.static, self.data, self.units, self.keep, self.held = static, data, units, keep, 0.0
        self.samples, self.cpu_samples, self.largest = [], [], largest

    def compile(self) -> None:
        """And run once, which the rounds then leave out."""
        begin = time.perf_counter()
        program, *inputs = self.largest or (self.function, *self.static, *self.data())
        program = program.lower(*inputs).compile()
        self.compiled = functools.partial(self.function, *self.static) if self.largest else program
        self.compile_seconds, memory = time.perf_counter() - begin, program.memory_analysis()
        sizes = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
        self.gigabytes = self.held + (sum(sizes) - memory.alias_size_in_bytes) / 1e9
        self.run()

    def run(self) -> None:
        inputs, begin = self.data(), clocks()
        output = jax.block_until_ready(self.compiled(*inputs))
        self.last = (clocks() - begin) / self.units
        self.keep(output)

    def sample(self) -> None:
        self.run()
        self.samples.append(self.last[0])
        self.cpu_samples.append(self.last[1])


def policy_flops(args: twm.Args) -> tuple[float, float]:
    """Products of a forward pass on one frame, and of one with its backward pass, which needs no gradient of pixels."""
    channels = args.encoder_channels
    if args.encoder == "cells":
        first = 2 * 81 * 147 * channels[0]
        flops = first + sum(2 * 81 * 9 * (before + 2 * after) * after for before, after in pairwise(channels))
        features = 81 * channels[-1]
    else:
        first, flops, side = 2 * 63**2 * 27 * channels[0], 0, 63
        for before, after in pairwise((3, *channels)):
            flops += 2 * 9 * side**2 * before * after
            side = -(-side // 2)
            flops += 2 * (2 * 9 * side**2 * after**2)
        features = side**2 * channels[-1]
    if args.gru:
        flops += 2 * features * args.gru_size + 2 * 6 * args.gru_size**2
        features += args.gru_size
    width = args.tower_size
    flops += 2 * (2 * features * width + 4 * width**2) + 2 * width * (twm.NUM_ACTIONS + 1)
    return flops, 3 * flops - first


def setup(args: twm.Args) -> SimpleNamespace:
    """Fresh learners, one rollout (of a tiny policy, which is as random), and what a run keeps after collecting it."""
    key_policy, key_model, key_env, key_roll, key_codes = jax.random.split(jax.random.PRNGKey(args.seed), 5)
    tiny = dataclasses.replace(args, encoder="cells", encoder_channels=(8, 8), tower_size=32)
    before, tiny_params = twm.init_env(args, key_env), twm.init_policy(tiny, key_policy).params
    env, rollout, _ = twm.collect(tiny, tiny_params, before, key_roll, False)
    noise = jax.random.randint(key_codes, (args.codebook_size, 147), 0, 256).astype(jnp.uint8)  # far from all frames
    codebook = twm.Codebook(noise, jnp.int32(min(CODES, args.codebook_size // 2)))
    grown, tokens = twm.grow_codebook(args, codebook, rollout.frames)
    steps = twm.Steps(tokens, rollout.actions.astype(jnp.uint8), rollout.rewards, rollout.dones, rollout.frames)
    data = SimpleNamespace(env=env, ours=env.state, stock=env.state, rollout=rollout, codebook=codebook, grown=grown)
    data.policy, data.model = twm.init_policy(args, key_policy), twm.init_world_model(args, key_model)
    data.targets = twm.advantages_and_targets(args, data.policy.value_norm, rollout)
    data.full, data.vocab = codebook.replace(size=jnp.int32(args.codebook_size)), twm.live_vocabulary(args, grown)
    data.replay, data.key = twm.add_to_replay(twm.init_replay(args), steps), jax.random.PRNGKey(7)
    return data


def our_rollout(args, vocab, policy, wm_params, codebook, replay, key):
    """Most of twm.imagined_batch."""
    key_windows, key_rollout = jax.random.split(key)
    windows = twm.sample_windows(replay, key_windows, args.imagination_envs, args.burn_in + 1, args.replay_size)
    return twm.imagine(args, vocab, policy, wm_params, codebook, windows, key_rollout)


@jax.jit
def our_encoding(codebook, frames):
    """UInt8[N, 63, 63, 3] -> Int[N, 81]."""
    patches = twm.to_cells(frames).reshape(-1, 147).astype(jnp.float32)
    return twm.nearest_code(codebook, patches)[1].reshape(len(frames), -1)


def parts_of(args: twm.Args, data: SimpleNamespace) -> dict[str, SimpleNamespace]:
    """All parts of an iteration at the shapes of a preset. Arrays are arguments of the programs, never constants."""
    parts, less, key = {}, PLAIN.get(args.preset, {}), data.key
    replace, bytes_of = dataclasses.replace, twm.size_in_bytes
    steps, envs, dreamt, dreams = args.num_steps, args.num_envs, args.imagination_steps, args.imagination_envs
    sequences, context, vocab, size = args.wm_batch_size, args.context, data.vocab, data.grown.size
    forward, gradient = policy_flops(args)
    learner, params, pixels = bytes_of(data.policy), bytes_of(data.policy.params), 63 * 63 * 3

    def add(name: str, unit: str, ours: tuple, other: tuple, flops: float, bytes: float) -> None:
        """ours, other: arguments of Program; flops, bytes: the least that one unit needs."""
        ours, other = Program(*ours), Program(*other)
        parts[name] = SimpleNamespace(unit=unit, ours=ours, plain=other, flops=flops, bytes=bytes)

    def put(name):
        return lambda out: setattr(data, name, out[0])

    # 1. The environment alone, and with the policy.
    roll, unit = environment_speed.roll, f"step of {envs} environments"
    state = 2 * bytes_of((data.env.state, data.env.frame))  # read and written
    ours = (roll(environment_speed.ours_step, envs, steps), (), lambda: (data.ours, key), steps, put("ours"))
    other = (roll(environment_speed.stock_step, envs, steps), (), lambda: (data.stock, key), steps, put("stock"))
    add("environment", unit, ours, other, 0, state)
    now = data.env.frame, data.env.reset, data.env.hidden, key
    ours = twm.act, (args,), lambda: (data.policy.params, *now, False)
    other = plain.act, (args,), lambda: (data.policy.params, *now)
    add("policy_forward", f"{envs} frames", ours, other, envs * forward, params + envs * pixels)
    some = replace(args, num_steps=min(steps, 12)) if args.preset == "paper" else args
    ours = twm.collect, (some,), lambda: (data.policy.params, data.env, key, False), some.num_steps
    other = plain.collect, (some,), lambda: (data.policy.params, data.env, key), some.num_steps
    add("rollout", f"{unit} and policy, {some.num_steps} a call", ours, other, envs * forward, params + state)

    # 2. Updates of the policy. The plain ones do two steps inside a compiled loop.
    def two_batches(name, batch, shape):  # Axis 0: two batches of the first steps and environments, as less says
        steps, envs = less.get(name, shape)
        cut = jax.tree.map(lambda leaf: leaf[:steps, :envs], batch)
        inputs = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), cut)
        return plain.policy_updates, (args,), lambda: (data.policy, inputs), 2 * steps * envs / (shape[0] * shape[1])

    real, group = (data.rollout, *data.targets), envs // args.num_minibatches

    def gradient_of(batch, envs):  # most of a policy update
        group = twm.gradient_group(args, envs, len(batch[1]))
        return twm.add_gradient, args, group, data.policy.params, data.policy.value_norm, batch, data.policy.params, 0

    ours = (twm.ppo_step, (args,), lambda: (data.policy, real, group), 1, put("policy"), gradient_of(real, group))
    other, count = two_batches("policy_update", real, (steps, group)), steps * group
    add("policy_update", f"step on {count} frames", ours, other, count * gradient, 2 * learner + count * pixels)

    def repeat(leaf):  # real steps in place of imagined ones
        return jnp.resize(leaf, (min(len(leaf), dreamt), dreams, *leaf.shape[2:]))

    dream = jax.tree.map(repeat, data.rollout)
    count, targets = dreamt * dreams, twm.advantages_and_targets(args, data.policy.value_norm, dream)

    batch = (dream, *targets)
    ours = (twm.ppo_step, (args,), lambda: (data.policy, batch, dreams), 1, put("policy"), gradient_of(batch, dreams))
    other = two_batches("imagined_update", (dream, *targets), (dreamt, dreams))
    add("imagined_update", f"step on {count} frames", ours, other, count * gradient, 2 * learner + count * pixels)

    # 3. The tokenizer.
    frames = jnp.resize(data.rollout.frames, (ENCODED, *twm.FRAME))
    few = frames[: less.get("encoding", ENCODED)]
    ours, other = (our_encoding, (), lambda: (data.full, frames)), (plain.encode, (), lambda: (data.full, few))
    flops, codes = 2 * 147 * 81 * ENCODED * args.codebook_size, bytes_of(data.full)
    other = (*other, len(few) / ENCODED)
    add("encoding", f"{ENCODED} frames, {args.codebook_size} codes", ours, other, flops, frames.size + codes)
    every, first, old = data.rollout.frames, data.rollout.frames[: less.get("growth", steps)], int(data.codebook.size)
    ours = twm.grow_codebook, (args,), lambda: (data.codebook, every)
    other = plain.grow_codebook, (args,), lambda: (data.codebook, first), len(first) / steps
    unit = f"{steps * envs} frames, {old} to {int(size)} codes"
    add("growth", unit, ours, other, 2 * 147 * 81 * steps * envs * old, every.size)

    # 4. The world model: the plain one on fewer sequences.
    fewer = replace(args, wm_batch_size=less.get("world_model_step", sequences))
    inputs, count = lambda: (data.model, size, data.replay, key), sequences * context * twm.BLOCK
    ours = (twm.world_model_step, (args, vocab), inputs, 1, put("model"))
    other = plain.world_model_step, (fewer,), inputs, fewer.wm_batch_size / sequences
    flops, bytes = 3 * sequences * twm.world_model_flop(args, vocab, context), 2 * bytes_of(data.model) + 2 * count
    add("world_model_step", f"step on {count} tokens, {vocab} codes", ours, other, flops, bytes)
    fewer = replace(args, imagination_envs=less.get("imagined_rollout", dreams))
    rest = lambda: (data.model.params, data.grown, data.replay, key)  # noqa: E731
    ours = our_rollout, (args, vocab), lambda: (data.policy, *rest()), dreamt
    other = plain.imagined_rollout, (fewer, vocab), lambda: (data.policy.params, *rest())
    other = (*other, dreamt * fewer.imagination_envs / dreams)
    flops = twm.world_model_flop(args, vocab, dreamt) / dreamt + forward * (1 + (args.burn_in + 1) / dreamt)
    cache = 4 * 2 * args.wm_layers * dreams * twm.BLOCK * args.wm_size * (dreamt + 1) / 2  # read at a step, on average
    bytes = params + bytes_of(data.model.params) + cache + dreams * pixels
    add("imagined_rollout", f"step of {dreams} environments", ours, other, dreams * flops, bytes)
    return parts


# --- A whole iteration ---
def phases(args: twm.Args) -> dict[str, dict[str, int]]:
    """Phase of train_iteration -> how many units of which parts it takes. The held-out check and the replay, which
    belong to the tokenizer's phase, are left out.
    """
    dreams = args.imagination_updates
    return {
        "collect": {"rollout": args.num_steps},
        "policy_real": {"policy_update": args.update_epochs * args.num_minibatches},
        "tokenizer": {"growth": 1},
        "world_model": {"world_model_step": args.wm_updates},
        "imagination": {"imagined_rollout": dreams * args.imagination_steps, "imagined_update": dreams},
    }


def short_iteration(args: twm.Args, data: SimpleNamespace) -> dict[str, float]:
    """twm.train_iteration with few updates; seconds of its phases by its own clock."""
    args = dataclasses.replace(args, **SHORT)
    sums = jnp.zeros((1 + args.window_iterations, 25))
    average = jax.tree.map(jnp.copy, data.model.params)
    state = twm.TrainState(jnp.int32(0), data.policy, data.env, sums, data.codebook, data.model, average, data.replay)
    state, _, logs = twm.train_iteration(args, state, data.key)
    data.policy, data.model, data.replay = state.policy, state.model, state.replay  # the old ones are consumed
    return {phase: logs[f"perf/seconds_{phase}"] for phase in phases(args)}


def loop_seconds(learner: twm.Learner, rest: tuple, key: jax.Array, calls: int = 200) -> float:
    """Seconds per turn of the scripts' Python loops around an empty program with a step's arguments and results, the
    collection of its logs included: what a loop costs beside its kernels.
    """
    empty = jax.jit(lambda learner, rest, key: (learner, key[0]), donate_argnums=0, keep_unused=True)
    learner, _ = jax.block_until_ready(empty(jax.tree.map(jnp.copy, learner), rest, key))
    begin, logs = time.perf_counter(), []
    for one in jax.random.split(key, calls):
        learner, log = empty(learner, rest, one)
        logs.append({name: log for name in "abcdefghi"})
    twm.mean_of(logs)
    return (time.perf_counter() - begin) / calls


def compose(args: twm.Args, data: SimpleNamespace, rows: dict) -> dict:
    """An iteration after the warmup, from one measured unit of each part times their numbers."""
    counts = [count for phase in phases(args).values() for count in phase.items()]
    totals = ("seconds", "floor_seconds", "plain_seconds")
    row = {"unit": "whole, composed"} | {key: sum(n * rows[name][key] for name, n in counts) for key in totals}
    row["over_floor"] = row["seconds"] / row["floor_seconds"]
    row["plain_over_ours"] = row["plain_seconds"] / row["seconds"]
    row["loop_seconds"] = loops = {
        "policy_update": loop_seconds(data.policy, (data.rollout, *data.targets), data.key),
        "world_model_step": loop_seconds(data.model, (data.grown.size, data.replay), data.key),
        "imagined_update": loop_seconds(data.policy, (data.model.params, data.grown, data.replay), data.key),
    }
    row["loop_overhead"] = sum(loops[name] * n for name, n in counts if name in loops) / row["seconds"]
    return row | {"peak_gb": rows["machine"]["peak_gb"]}


# --- Measuring ---
@jax.jit
def product(x):
    return x @ x


@functools.partial(jax.jit, donate_argnums=0)
def add_one(x):
    return x + 1  # in place: no time goes into new pages


def machine_rates() -> np.ndarray:
    """FLOP/s of a product of two 4096 x 4096 fp32 matrices, bytes/s of a copy of 0.5 GB (read and written); both by
    the wall and by processors. Float[2, 2].
    """
    rates = []
    for function, x, work in ((product, jnp.ones((4096, 4096)), 2 * 4096**3), (add_one, jnp.zeros(2**27), 2**30)):
        x = jax.block_until_ready(function(x))
        begin = clocks()
        jax.block_until_ready(function(x))
        rates.append(work / (clocks() - begin))
    return np.array(rates)


def peak_memory(reset: bool = False) -> float:
    """Largest resident memory of this process in GB; on Linux, since the last reset."""
    if not Path("/proc/self/clear_refs").exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9


def spread(samples: list[float]) -> dict[str, float]:
    return {"min": min(samples), "max": max(samples)}


def measure(preset: str, only: list[str], rounds: int) -> dict[str, dict]:
    """Part -> its numbers, seconds per unit."""
    args = twm.PRESETS[preset]
    data = setup(args)
    parts, every = parts_of(args, data), not only
    if unknown := set(only) - set(parts):
        sys.exit(f"--only {' '.join(unknown)}: choose from {', '.join(parts)}")
    parts = {name: part for name, part in parts.items() if every or name in only}
    peak = [peak_memory(reset=True)]
    for kind in ("ours", "plain"):  # ours first, for its memory
        for name, part in parts.items():
            getattr(part, kind).compile()
            print(f"{preset}: compiled {name}, {kind}", flush=True)
        peak.append(peak_memory())
    run_whole = every and preset != "paper"  # whose policy updates alone take minutes
    if run_whole:
        short_iteration(args, data)  # compiles
    rates, whole = [], []
    for number in range(rounds):
        rates.append(machine_rates())
        for part in parts.values():
            part.ours.sample()
            part.plain.sample()
        whole += [short_iteration(args, data)] if run_whole else []
        print(f"{preset}: round {number + 1} of {rounds}", flush=True)
    (flops, cpu_flops), (bandwidth, cpu_bandwidth) = np.median(rates, axis=0).tolist()
    rows = {"machine": {"gflops": flops / 1e9, "copy_gb_per_s": bandwidth / 1e9}}
    rows["machine"] |= {"peak_gb": peak[1]} if every else {}  # that of some parts is another number
    for name, part in parts.items():
        ours, other = part.ours.samples, part.plain.samples
        row = {"unit": part.unit, "seconds": statistics.median(ours), "seconds_spread": spread(ours)}
        row |= {"flops_seconds": part.flops / flops, "bytes_seconds": part.bytes / bandwidth}
        row["floor_seconds"] = max(row["flops_seconds"], row["bytes_seconds"])
        row["cpu_seconds"] = statistics.median(part.ours.cpu_samples)
        row["cpu_over_floor"] = row["cpu_seconds"] / max(part.flops / cpu_flops, part.bytes / cpu_bandwidth)
        row |= {"over_floor": row["seconds"] / row["floor_seconds"], "plain_seconds": statistics.median(other)}
        row |= {"plain_spread": spread(other), "plain_share": part.plain.units / part.ours.units}
        row["plain_over_ours"] = statistics.median(b / a for a, b in zip(ours, other, strict=True))
        for kind, program in (("", part.ours), ("plain_", part.plain)):
            row |= {f"{kind}program_gb": program.gigabytes, f"{kind}compile_seconds": program.compile_seconds}
        if preset == "paper" and name in PUBLIC:
            row |= {"public_seconds": PUBLIC[name], "public_over_ours": PUBLIC[name] / row["seconds"]}
        rows[name] = row
    if every:
        rows["iteration"] = compose(args, data, rows)
    if run_whole:
        rows["iteration"]["short"] = SHORT | {
            phase: {
                "measured": statistics.median(one[phase] for one in whole),
                "composed": sum(n * rows[name]["seconds"] for name, n in counts.items()),
            }
            for phase, counts in phases(dataclasses.replace(args, **SHORT)).items()
        }
    return rows


def show(preset: str, rows: dict) -> None:
    machine = rows["machine"]
    print(f"\n{preset}: matrix products {machine['gflops']:.0f} GFLOP/s, copies {machine['copy_gb_per_s']:.1f} GB/s")
    if "peak_gb" in machine:
        print(f"largest resident memory, the script's own parts alone: {machine['peak_gb']:.2f} GB")
    columns = "seconds floor_seconds over_floor cpu_over_floor plain_seconds plain_over_ours plain_share".split()
    columns += ["public_seconds", "program_gb", "compile_seconds"]
    print(f"{'':<16}", *(f"{name.replace('_seconds', ''):>9.9}" for name in columns), "  (spread) unit")
    for name, row in list(rows.items())[1:]:
        values = (f"{row[column]:>9.3g}" if column in row else f"{'-':>9}" for column in columns)
        ends = "({min:.3g} to {max:.3g})".format(**row["seconds_spread"]) if "seconds_spread" in row else ""
        print(f"{name:<16}", *values, "", ends, row["unit"])
    for name, goals in GOALS.items() if preset == "paper" else ():
        for quantity, relation, limit in goals if name in rows else ():
            value = rows[name][quantity]
            met = value <= limit if relation == "<=" else value >= limit
            print(f"goal {name}: {quantity} {relation} {limit:g}: {value:.3g}, {'met' if met else 'MISSED'}")
    if "iteration" in rows:
        print(f"loops beside their kernels: {100 * rows['iteration']['loop_overhead']:.3f} % of an iteration")
        print("short iteration:", json.dumps(rows["iteration"].get("short")))


# --- Growth of cost ---
def growth_programs() -> dict[str, dict[int, Program]]:
    """What grows -> its size -> a program, at the cpu preset's shapes: a world-model step against context and replay, a
    step of environments and policy against their number, the encoding of a batch against the codes in use.
    """
    args = dataclasses.replace(twm.PRESETS["cpu"], codebook_size=4096)
    changed = functools.partial(dataclasses.replace, args)
    data = setup(changed(replay_size=args.num_envs * args.num_steps))
    frames = jnp.resize(data.rollout.frames, (ENCODED, *twm.FRAME))

    def model_step(args, replay):
        inputs = lambda: (data.model, data.grown.size, replay, data.key)  # noqa: E731
        return Program(twm.world_model_step, (args, data.vocab), inputs, 1, lambda out: setattr(data, "model", out[0]))

    def encoding(codes):
        return Program(our_encoding, (), lambda: (twm.Codebook(data.full.codes[:codes], jnp.int32(codes)), frames))

    def rollout(args):
        inputs = data.policy.params, twm.init_env(args, data.key), data.key, False
        return Program(twm.collect, (args,), lambda: inputs, args.num_steps)

    def full_replay(size):
        replay = twm.init_replay(changed(replay_size=size))
        program = model_step(args, replay.replace(filled=jnp.int32(len(replay.steps.actions))))
        program.held = replay.steps.frames.nbytes / 1e9  # which this program does not read
        return program

    return {
        "context": {n: model_step(changed(context=n), data.replay) for n in (3, 6, 12, 24)},
        "environments": {n: rollout(changed(num_envs=n, num_steps=32)) for n in (12, 24, 48, 96)},
        "codebook": {n: encoding(n) for n in (512, 1024, 2048, 4096)},
        "replay": {n: full_replay(n) for n in (16_000, 32_000, 64_000, 128_000)},
    }


def exponent(sizes: list[float], values: list[float]) -> float:
    """Slope of a straight line through the logarithms: values grow as size to this power."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def grow(rounds: int, picture: Path) -> dict[str, dict]:
    studies = growth_programs()
    for name, programs in studies.items():
        print(f"grow: {name}", flush=True)
        for program in programs.values():
            program.compile()
    for _ in range(rounds):
        for programs in studies.values():
            for program in programs.values():
                program.sample()
    rows = {}
    for name, programs in studies.items():
        sizes, values = list(programs), list(programs.values())
        curves = {
            "seconds": [statistics.median(program.samples) for program in values],
            "gigabytes": [program.gigabytes for program in values],
        }
        rows[name] = {"sizes": sizes, **curves}
        rows[name] |= {f"{key}_exponent": exponent(sizes, curve) for key, curve in curves.items()}
        print(name, json.dumps(rows[name]))
    draw(rows, picture)
    return rows


def draw(rows: dict[str, dict], picture: Path) -> None:
    """Four small panels, both axes logarithmic, everything relative to the smallest size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    what = {"context": "world-model step", "environments": "rollout step", "codebook": "encoding 320 frames"}
    figure, axes = plt.subplots(1, 4, figsize=(12, 2.8))
    for axis, (name, row) in zip(axes, rows.items(), strict=True):
        sizes = np.array(row["sizes"])
        for key, label in (("seconds", "time"), ("gigabytes", "memory")):
            values = np.array(row[key]) / row[key][0]
            axis.loglog(sizes, values, marker="o", label=f"{label}, exponent {row[f'{key}_exponent']:.2f}")
        axis.loglog(sizes, sizes / sizes[0], color="grey", linestyle=":", linewidth=0.8)
        axis.set_xticks(sizes, [str(size) for size in sizes], fontsize=7)
        axis.minorticks_off()
        axis.set_title(f"{what.get(name, 'world-model step')} against {name}", fontsize=8)
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative to the smallest", fontsize=8)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


# --- Command line ---
def add_results(rows: dict[str, dict], group: str, rounds: int, seconds: float) -> None:
    """Put rows into this machine's file; what other commands measured there stays."""
    kind = results.hardware()["cpu"] if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
    name = "speed_" + re.sub(r"\W+", "_", f"{kind} {results.hardware()['cores']} cores").lower()
    path, command = ROOT / "benchmark" / "results" / f"{name}.json", " ".join(["python", *sys.argv])
    old = json.loads(path.read_text()) if path.exists() else {"commands": [], "runs": [], "summary": {}}
    common = {
        "seed": 0,
        "steps": rounds,
        "wall_seconds": round(seconds),
        "commit": results.output_of("git", "rev-parse", "HEAD"),
    }
    before = {run["label"]: run["metrics"] for run in old["runs"]}
    rows = {f"{group}/{part}": row for part, row in rows.items()}
    runs = [{"label": label, **common, "metrics": before.get(label, {}) | row} for label, row in rows.items()]
    labels = {run["label"] for run in runs}
    runs = [run for run in old["runs"] if run["label"] not in labels] + runs
    keys = "seconds", "over_floor", "cpu_over_floor", "plain_over_ours", "seconds_exponent", "gigabytes_exponent"
    summary = {run["label"]: {k: run["metrics"][k] for k in keys if k in run["metrics"]} for run in runs}
    results.write(name, [*(one for one in old["commands"] if one != command), command], runs, summary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", choices=list(twm.PRESETS), default=["cpu", "paper"])
    parser.add_argument("--rounds", type=int, default=5, help="turns that every part takes; medians are over them")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these parts alone (default: all)")
    parser.add_argument("--grow", action="store_true", help="measure how cost grows, instead of the parts")
    options = parser.parse_args()
    twm.start_jax(twm.Args())  # it sets how memory is kept
    begin = time.perf_counter()
    if options.grow:
        rows = grow(options.rounds, ROOT / "docs" / "media" / "speed_growth.png")
        add_results(rows, "grow", options.rounds, time.perf_counter() - begin)
        return
    for preset in options.preset:
        rows = measure(preset, options.only, options.rounds)
        show(preset, rows)
        add_results(rows, preset, options.rounds, time.perf_counter() - begin)


if __name__ == "__main__":
    main()

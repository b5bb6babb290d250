"""What several test files share: the script as a module, tiny settings, runs of the command line, a toy world."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

# Before jax is imported: the numbers below are those of a CPU, and processes that tests start share compiled programs.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch: test files run side by side, one a core
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "jax_compilation_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

ROOT = Path(__file__).resolve().parents[1]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

import twm_dyna_craftax as twm  # noqa: E402

SCRIPT = ROOT / "twm_dyna_craftax.py"


@pytest.fixture(scope="module", autouse=True)
def drop_programs():
    """Forget a file's compiled programs: they hold thousands of memory mappings, and beyond 65,530 a process dies."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def tiny():
    """Settings of the smoke preset with some of them changed."""
    return lambda **changes: dataclasses.replace(twm.PRESETS["smoke"], **changes)


# --- The command line ---
def start_script(
    folder: Path, *flags: str, environment: dict[str, str] | None = None, script: Path = SCRIPT
) -> subprocess.Popen:
    """The script as a user starts it, in `folder`, where a module named wandb ends whoever imports it."""
    (folder / "poison").mkdir(exist_ok=True)
    (folder / "poison" / "wandb.py").write_text('import os\nprint("wandb was imported", flush=True)\nos._exit(99)\n')
    environment = {**os.environ, "PYTHONPATH": str(folder / "poison"), **(environment or {})}
    command = [sys.executable, str(script), *map(str, flags)]
    options = {"cwd": folder, "env": environment, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **options)


def start_two_processes(script: str, *flags: str) -> list[subprocess.Popen]:
    """A PyTorch script in two processes that share its batches; they end with 1 if they leave their process group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "import runpy, sys, torch; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__'); "
    program += "sys.exit(torch.distributed.is_initialized())"  # threads that a process group leaves may abort the exit
    command = [sys.executable, "-c", program, *map(str, (ROOT / script, *flags, "--distributed"))]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environments = [os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    return [subprocess.Popen(command, env=own, stderr=subprocess.PIPE, text=True) for own in environments]


def assert_two_processes_equal_one(one: Path, two: Path, evaluate) -> None:
    """A run in one process, not evaluated, and the same in two, whose scores evaluate(folder) makes again in one."""

    def scores():
        found = json.loads((two / "eval.json").read_text())
        del found["student"]["seconds_per_image"], found["teacher"]["seconds_per_image"]
        return found

    shared = scores()
    (two / "eval.json").unlink()
    evaluate(two)
    assert scores() == shared
    for a, b in zip(metrics_of(one), metrics_of(two)[:-1], strict=True):
        for key in a:
            if not key.startswith("perf/"):
                assert b[key] == pytest.approx(a[key], rel=2e-3, abs=1e-5), key


def assert_golden(script: str, run: Path, keys: dict[int, list[str]]) -> None:
    """The logged `keys` of a run at some steps are those of the script's golden file, so that a change of results is
    never unnoticed. UPDATE_GOLDEN=1 writes them anew.
    """
    golden, lines = Path(__file__).with_name(f"golden_{script}.json"), metrics_of(run)
    by_step = {line["step"]: line for line in reversed(lines)}  # not an evaluation, which comes after its step's line
    found = {f"{key} at {step}": by_step[step][key] for step in keys for key in keys[step]}
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(json.dumps(found, indent=2) + "\n")
    how = "UPDATE_GOLDEN=1 python -m pytest -k golden"
    assert golden.exists(), f"{golden.name} is missing; write it with\n    {how}"
    # Other processors sum in another order: 1e-3 leaves room for that, and for no real change.
    assert found == pytest.approx(json.loads(golden.read_text()), rel=1e-3, abs=1e-5), (
        "The smoke run gives other numbers. Updating them is right only if this change was meant to alter the "
        "algorithm, its settings, its random draws, or the versions it runs on, and the reason is in the commit "
        f"message; a change that was to make it faster or shorter has a bug. To update:\n    {how}"
    )


def run_script(folder: Path, *flags: str, **options) -> SimpleNamespace:
    """Runs it to its end: exit code, stdout, stderr and the run folder that it made, if it made one."""
    process = start_script(folder, *flags, **options)
    out, err = process.communicate(timeout=900)
    made = sorted((folder / "runs").glob("*__*"))
    return SimpleNamespace(code=process.returncode, out=out, err=err, folder=made[-1] if made else None)


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory):
    """One whole smoke run of four iterations, uninterrupted; most tests of runs look at this one. Do not change it."""
    run = run_script(tmp_path_factory.mktemp("smoke"), "--preset", "smoke")
    assert run.code == 0, run.out + run.err
    return run


@pytest.fixture(scope="session")
def half_run(tmp_path_factory):
    """The first two of the smoke run's iterations. Do not change it: copy it."""
    run = run_script(tmp_path_factory.mktemp("half"), "--preset", "smoke", "--total-steps", 48, "--eval-episodes", 0)
    assert run.code == 0, run.out + run.err
    return run


def run_main(script, capsys, *flags) -> tuple[int, str, str]:
    """main() of a script's module, in this process: exit code, stdout, stderr."""
    argv, handlers = sys.argv, {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    capsys.readouterr()
    sys.argv, code, message = [Path(script.__file__).name, *map(str, flags)], 0, ""
    try:
        script.main()
    except SystemExit as end:  # as the interpreter does: a text is printed and exits with 1
        code, message = (1, f"{end.code}\n") if isinstance(end.code, str) else (end.code or 0, "")
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    out, err = capsys.readouterr()
    return code, out, err + message


@pytest.fixture
def call_main(monkeypatch, capsys, tmp_path):
    """run_main of twm_dyna_craftax.py: call_main(flags...). Run folders go below tmp_path / "runs"."""
    monkeypatch.chdir(tmp_path)
    return lambda *flags: run_main(twm, capsys, *flags)


@pytest.fixture
def stub_iteration(monkeypatch):
    """Replaces the iteration by one that only counts, so that a test of the loop around it takes no time."""

    def iteration(args, state, key):
        logs = {"losses/stub": float(state.iteration), "perf/SPS": 1.0}
        return state.replace(iteration=state.iteration + 1, episode_sums=state.episode_sums + 1.0), None, logs

    monkeypatch.setattr(twm, "train_iteration", iteration)
    return ("--preset", "smoke", "--media-every", "0", "--eval-episodes", "0")  # flags that suit it


def only(folder: Path) -> Path:
    """What a folder holds, if it holds one thing."""
    (found,) = folder.iterdir()
    return found


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def documented_keys(script: str) -> set[str]:
    """Logged names in the first column of the tables of a script's page."""
    cells = re.findall(r"^\|([^|]*)\|", (ROOT / "docs" / f"{script}.md").read_text(), re.M)
    return {key for cell in cells for key in re.findall(r"`([a-z_]+/[\w.*]+)`", cell)}


def assert_same_tensors(a: dict, b: dict) -> None:
    """Of a whole checkpoint of a PyTorch script: every bit."""
    assert a.keys() == b.keys() and len(a) > 100
    for name in a:
        assert a[name].equal(b[name]), name


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def state_of(folder: Path):
    """The newest checkpoint of a run folder, as numpy arrays."""
    args = twm.parse_args(["--resume", str(folder)])
    return jax.device_get(twm.load_checkpoint("--resume", folder, twm.init_state(args)))


# --- Real experience ---
def with_clear_preferences(params):
    """A fresh policy chooses almost uniformly whatever it sees, because the actor's last layer starts at 0.01 of the
    usual size: tests of what it sees need this one.
    """
    return jax.tree.map(lambda leaf: leaf * 50 if leaf.shape[-1] == twm.NUM_ACTIONS else leaf, params)


@pytest.fixture(scope="session")
def rollouts():
    """Twelve rollouts of the smoke preset, by day and by night, some of whose episodes end on the way."""
    args = twm.PRESETS["smoke"]
    params = with_clear_preferences(twm.init_policy(args, jax.random.PRNGKey(0)).params)
    carry, made = twm.init_env(args, jax.random.PRNGKey(1)), []
    for i in range(12):
        start = np.array([0, 200, 9_990, 100])  # step of the day; darkest about 210; the 10,000th step is the last
        if i % 4 == 0:
            timestep = jnp.asarray(start + 40 * (i // 4) * (start < 9_000), carry.state.timestep.dtype)
            carry = carry.replace(state=carry.state.replace(timestep=timestep))
        before = carry
        carry, rollout, records = twm.collect(args, params, carry, jax.random.PRNGKey(100 + i), False)
        made.append(SimpleNamespace(before=before, after=carry, rollout=rollout, records=np.asarray(records)))
    assert sum(int(one.rollout.dones.sum()) for one in made) >= 3
    return SimpleNamespace(args=args, params=params, all=made)


# --- A toy world ---
# Its mode, 0 to 5, only grows: to the strength of an action, if that is more. So what happens is a function of the
# frame and the action, and can be learnt in seconds: an earlier action in view never contradicts the latest one.
TOY_MODES = 6
TOY_CODES = 2 * TOY_MODES  # two kinds of cells
TOY_PATTERN = np.random.default_rng(0).choice(2, size=81, p=[0.7, 0.3])


def toy_frame(mode):
    """Int[...] mode of the toy -> its tokens Int[..., 81]."""
    return np.asarray(mode)[..., None] + TOY_MODES * TOY_PATTERN


def toy_step(mode, action):
    """Everything that happens in the toy: next mode, reward, done. Each depends on mode and action, none on chance."""
    mode, action = np.asarray(mode), np.asarray(action).astype(int)
    strength = np.maximum(action - 11, 0)  # of the actions 12 to 16: 1 to 5
    return np.maximum(mode, strength), (action % 3 == 1) & (mode < 3), action % 4 == 2


@pytest.fixture(scope="session")
def toy(tiny):
    """Sixteen sequences of the toy world, a world model that has memorised all of it, and how its losses fell."""
    args = tiny(context=3, imagination_steps=3, wm_layers=2, burn_in=2, imagination_envs=6)
    rng = np.random.default_rng(1)
    codes = np.zeros((args.codebook_size, 147), np.uint8)
    codes[:TOY_CODES] = rng.integers(0, 256, (TOY_CODES, 147))
    codebook = twm.Codebook(jnp.asarray(codes), jnp.int32(TOY_CODES))

    def windows(batch, length, seed, with_frames=True):
        rng = np.random.default_rng(seed)
        actions = rng.integers(0, twm.NUM_ACTIONS, (batch, length))
        mode, modes, rewards, dones = rng.integers(0, TOY_MODES, batch), [], [], []
        for t in range(length):
            modes.append(mode)
            mode, reward, done = toy_step(mode, actions[:, t])
            rewards.append(reward)
            dones.append(done)
        modes, rewards, dones = (np.stack(x, axis=1) for x in (modes, rewards, dones))
        tokens = toy_frame(modes)
        frames = twm.decode(codebook, jnp.asarray(tokens.reshape(-1, 81))).reshape(batch, length, 63, 63, 3)
        frames = frames if with_frames else None
        arrays = tokens.astype(np.uint16), actions.astype(np.uint8), rewards.astype(np.float32), dones
        return twm.Steps(*map(jnp.asarray, arrays), frames)

    def init(seed):
        """A fresh model whose heads look at actions from the start: to find out that one of 82 tokens matters takes
        thousands of steps, to learn what it means a hundred. Done by a common part of all action embeddings that the
        slowest rotary dimension of every head asks for.
        """
        model = twm.init_world_model(args, jax.random.PRNGKey(seed))
        params, heads, size = model.params, args.wm_heads, args.wm_size // args.wm_heads
        params["action_table"] = params["action_table"].at[:, 0].add(0.1)
        for i in range(args.wm_layers):
            qkv, slowest = params[f"blocks_{i}"]["qkv"], size // 2 - 1
            kernel = qkv["kernel"].reshape(-1, 3, heads, size).at[0, 1, :, slowest].set(2.0)  # keys
            bias = qkv["bias"].reshape(3, heads, size).at[0, :, slowest].set(5.0)  # queries
            params[f"blocks_{i}"]["qkv"] = {"kernel": kernel.reshape(len(kernel), -1), "bias": bias.reshape(-1)}
        return model

    @jax.jit
    def update(model, windows):
        inputs = model.params, args, 256, codebook.size, windows, None
        grads, logs = jax.grad(twm.world_model_loss, has_aux=True)(*inputs)
        updates, opt_state = twm.adam(args, 5e-3).update(grads, model.opt_state)
        return twm.Learner(jax.tree.map(jnp.add, model.params, updates), opt_state), logs

    def train(model, batches):
        for batch in batches:
            model, logs = update(model, batch)
        return model, jax.device_get(logs)

    return SimpleNamespace(args=args, codebook=codebook, windows=windows, init=init, train=train)

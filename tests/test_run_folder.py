"""What a run leaves behind, that it goes on where it stopped, and that nothing is lost when it is stopped badly."""

import dataclasses
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import ROOT, SCRIPT, metrics_of, state_of, steps_saved

import twm_dyna_craftax as twm


def assert_equal_states(one, other):
    leaves, others = jax.tree.leaves_with_path(one), jax.tree.leaves(other)
    for (path, a), b in zip(leaves, others, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def without_perf(line):
    return {key: value for key, value in line.items() if not key.startswith("perf/")}


# --- What a run leaves behind ---
def test_a_run_leaves_the_files_it_promises(smoke_run):
    folder = smoke_run.folder
    assert folder.name.startswith("twm_dyna_craftax__smoke__s1__")
    saved = json.loads((folder / "args.json").read_text())
    assert saved == json.loads(json.dumps(dataclasses.asdict(twm.PRESETS["smoke"])))
    assert (folder / SCRIPT.name).read_bytes() == SCRIPT.read_bytes()
    lines = metrics_of(folder)
    assert [line["step"] for line in lines] == [24, 48, 72, 96]
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert steps_saved(folder) == [72, 96]  # the last two
    names = {f"{name}_{step}.png" for name in ("codebook", "imagined_vs_true") for step in (48, 96)}
    names |= {"rollout_48.mp4", "rollout_96.mp4"}
    names |= {"eval_stochastic_96.mp4", "eval_greedy_96.mp4"}
    assert {path.name for path in (folder / "media").iterdir()} == names
    assert all(path.stat().st_size > 100 for path in (folder / "media").iterdir())


def test_the_evaluation_holds_all_it_should(smoke_run):
    result = json.loads((smoke_run.folder / "eval.json").read_text())
    assert result["step"] == 96 and result["episodes"] == 4
    for mode in ("stochastic", "greedy"):
        one = result[mode]
        assert set(one["achievements"]) == set(twm.ACHIEVEMENTS)
        assert all(rate * 4 == round(rate * 4) for rate in one["achievements"].values())  # shares of four episodes
        assert one["reward_percent"] == pytest.approx(one["return_mean"] / 22 * 100)
        assert one["score_percent"] == pytest.approx(twm.score_percent(np.array(list(one["achievements"].values()))))
        assert one["return_standard_error"] >= 0 and one["length_mean"] > 1
    assert result["stochastic"] != result["greedy"]
    assert json.loads(smoke_run.out[smoke_run.out.index("{") :]) == result  # it is printed, too


def test_the_evaluation_counts_first_episodes_only(tiny, tmp_path, monkeypatch):
    """Two environments: one ends episodes at steps 2 and 3, the other at step 5. Parts of three steps."""
    ends, returns = np.zeros((6, 2)), np.zeros((6, 2))
    ends[1, 0] = ends[2, 0] = ends[4, 1] = 1
    returns[1, 0], returns[2, 0], returns[4, 1] = 3, 100, 5
    parts, videos, tracked = [], {}, {}

    def collect(args, params, carry, key, greedy):
        part = slice(3 * len(parts) % 6, 3 * len(parts) % 6 + 3)
        parts.append(greedy)
        records = np.concatenate([ends[part, :, None], returns[part, :, None], np.zeros((3, 2, 23))], axis=-1)
        return carry, SimpleNamespace(frames=np.zeros((3, 2, 1, 1, 3), np.uint8)), records * ends[part, :, None]

    monkeypatch.setattr(twm, "init_env", lambda args, key: None)
    monkeypatch.setattr(twm, "collect", collect)
    run = SimpleNamespace(folder=tmp_path, writes=True, media=lambda step, name, video: videos.update({name: video}))
    run.wandb = SimpleNamespace(log=tracked.update)
    twm.evaluate(tiny(eval_episodes=2), run, None, 7)
    result = json.loads((tmp_path / "eval.json").read_text())
    assert parts == [False, False, True, True] and result["step"] == 7 and result["episodes"] == 2
    for mode in ("stochastic", "greedy"):
        assert result[mode]["return_mean"] == 4  # of 3 and 5
        assert result[mode]["return_standard_error"] == pytest.approx(1)
        assert len(videos[f"eval_{mode}"]) == 2  # the first environment's first episode
        assert tracked[f"eval/{mode}_return_mean"] == 4 and tracked["step"] == 7
    assert len(tracked) == 1 + 2 * 5


def test_it_reports_speed_and_time_left_on_the_way(smoke_run):
    lines = [line for line in smoke_run.out.splitlines() if line.startswith("step ")]
    assert len(lines) == 4 and all("SPS" in line and "ETA" in line for line in lines)


def test_eval_only_gives_the_numbers_of_the_run_again(smoke_run, tmp_path, call_main):
    folder = tmp_path / "copy"
    shutil.copytree(smoke_run.folder, folder)
    (folder / "eval.json").unlink()
    code, _, err = call_main("--eval-only", folder)
    assert code == 0, err
    assert json.loads((folder / "eval.json").read_text()) == json.loads((smoke_run.folder / "eval.json").read_text())
    for name in ("args.json", "metrics.jsonl", SCRIPT.name):
        assert (folder / name).read_bytes() == (smoke_run.folder / name).read_bytes(), f"{name} was changed"
    assert not (tmp_path / "runs").exists()


def test_pictures_show_what_they_say(tiny):
    """With a full codebook of 40 codes, which fill one row of 32 and part of the next, and an empty replay."""
    args, shown = tiny(codebook_size=40), {}
    codes = np.random.default_rng(0).integers(1, 256, (40, 147), np.uint8)
    state = twm.init_state(args)
    state = state.replace(
        codebook=twm.Codebook(jax.numpy.asarray(codes), jax.numpy.int32(40)),
        replay=state.replay.replace(filled=jax.numpy.int32(16)),
    )
    rollout = SimpleNamespace(frames=np.random.default_rng(1).integers(0, 256, (6, 4, 63, 63, 3), np.uint8))
    run = SimpleNamespace(media=lambda step, name, frames, scale=4: shown.update({name: np.asarray(frames)}))
    twm.write_media(args, run, 24, state, rollout, jax.random.PRNGKey(0))

    tiles = shown["codebook"].reshape(2, 8, 32, 8, 3).swapaxes(1, 2).reshape(64, 8, 8, 3)[:, :7, :7]
    np.testing.assert_array_equal(tiles[:40], codes.reshape(40, 7, 7, 3))
    assert (tiles[40:] == 0).all()
    np.testing.assert_array_equal(shown["rollout"], rollout.frames[:, 0])
    strips = shown["imagined_vs_true"].reshape(4, 2, 67, args.context + 1, 67, 3).swapaxes(2, 3)
    green, red = strips[..., 0, 0, 1] > 128, strips[..., 0, 0, 0] > 128  # of the border, [sequence, true or not, time]
    given = max(1, args.context // 4)
    assert green[:, 0].all() and green[:, 1, :given].all() and not green[:, 1, given:].any()
    np.testing.assert_array_equal(red, ~green)
    assert (strips[:, 0, :, 2:-2, 2:-2] == 0).all()  # true frames come from the replay
    first = twm.decode(twm.Codebook(codes, 40), np.zeros((1, 81), int))[0]  # imagined ones from tokens: given, 0
    np.testing.assert_array_equal(strips[:, 1, 0, 2:-2, 2:-2], np.broadcast_to(first, (4, 63, 63, 3)))
    assert (strips[:, 1, :, 2:-2, 2:-2] > 0).all()


# --- Equal runs ---
def test_two_and_two_iterations_equal_four_bit_for_bit(smoke_run, half_run, tmp_path, call_main):
    """Another process, stopped in between: so two runs from one seed are equal, too."""
    assert steps_saved(half_run.folder) == [24, 48]
    folder = tmp_path / "resumed"
    shutil.copytree(half_run.folder, folder)
    code, _, err = call_main("--resume", folder, "--total-steps", 96, "--eval-episodes", 4)
    assert code == 0, err
    assert_equal_states(state_of(folder), state_of(smoke_run.folder))
    assert [without_perf(line) for line in metrics_of(folder)] == [
        without_perf(line) for line in metrics_of(smoke_run.folder)
    ]
    assert (folder / "eval.json").read_bytes() == (smoke_run.folder / "eval.json").read_bytes()
    assert not (tmp_path / "runs").exists()  # it went on in the same folder


def test_another_seed_gives_another_run(tiny):
    one, other = (jax.device_get(twm.init_state(tiny(seed=seed))) for seed in (1, 2))
    assert not np.array_equal(one.env.frame, other.env.frame)
    for name in ("policy", "model"):
        pairs = zip(*(jax.tree.leaves(getattr(state, name).params) for state in (one, other)), strict=True)
        assert any(not np.array_equal(a, b) for a, b in pairs), name
    assert_equal_states(one, jax.device_get(twm.init_state(tiny(seed=1))))


def test_every_iteration_of_every_seed_has_a_key_of_its_own(call_main, stub_iteration, monkeypatch):
    keys, stub = [], twm.train_iteration

    def iteration(args, state, key):
        keys.append(tuple(np.asarray(key).tolist()))
        return stub(args, state, key)

    monkeypatch.setattr(twm, "train_iteration", iteration)
    for seed in (1, 2):
        assert call_main(*stub_iteration, "--seed", seed)[0] == 0
    assert len(keys) == len(set(keys)) == 8


# --- Stopped runs ---
def resumes(call_main, flags, folder, steps):
    """The run goes on to its end, and its metrics and checkpoints are those of a run that never stopped."""
    code, out, err = call_main("--resume", folder, *flags[2:])
    assert code == 0, err
    assert [line["step"] for line in metrics_of(folder)] == steps
    assert [line["losses/stub"] for line in metrics_of(folder)] == [float(i) for i in range(len(steps))]
    assert steps_saved(folder)[-1] == steps[-1]
    assert int(state_of(folder).iteration) == len(steps)
    return out, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_iteration_saves_and_says_how_to_resume(
    call_main, stub_iteration, monkeypatch, tmp_path, number
):
    stub = twm.train_iteration

    def interrupted(args, state, key):
        if int(state.iteration) == 1:
            os.kill(os.getpid(), number)
        return stub(args, state, key)

    monkeypatch.setattr(twm, "train_iteration", interrupted)
    code, out, err = call_main(*stub_iteration, "--save-every", 100)
    (folder,) = (tmp_path / "runs").iterdir()
    assert code == 0, err
    assert steps_saved(folder) == [48]
    assert f"--resume {folder.relative_to(tmp_path)}" in out.splitlines()[-1]
    monkeypatch.setattr(twm, "train_iteration", stub)
    resumes(call_main, stub_iteration, folder, [24, 48, 72, 96])


class Unread(io.TextIOBase):
    """Standard output after the end of what read it."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def test_a_signal_that_ends_the_reader_of_the_output_too_saves_all_the_same(
    call_main, stub_iteration, monkeypatch, tmp_path
):
    stub = twm.train_iteration

    def interrupted(args, state, key):
        if int(state.iteration) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        if int(state.iteration) == 1:
            monkeypatch.setattr(sys, "stdout", Unread())
        return stub(args, state, key)

    monkeypatch.setattr(twm, "train_iteration", interrupted)
    code, _, err = call_main(*stub_iteration, "--save-every", 100)
    assert code == 2 and "Broken pipe" in err and "Traceback" not in err
    (folder,) = (tmp_path / "runs").iterdir()
    assert steps_saved(folder) == [72]


def test_a_signal_ends_the_final_evaluation_at_once(call_main, stub_iteration, monkeypatch):
    seen = []
    monkeypatch.setattr(twm, "evaluate", lambda *_: seen.append(signal.getsignal(signal.SIGTERM)))
    assert call_main(*stub_iteration, "--eval-episodes", 4)[0] == 0
    assert seen == [signal.SIG_DFL]


def test_a_run_does_not_go_on_with_rollouts_of_another_length_or_another_seed(call_main, stub_iteration, tmp_path):
    folder = finished_stub_run(call_main, stub_iteration, tmp_path)
    for flag in ("--resume", "--eval-only"):
        code, _, err = call_main(flag, folder, "--num-steps", 7, "--eval-episodes", 4)
        assert code == 2 and "--num-steps 7 is not what args.json says (6)" in err
    code, _, err = call_main("--resume", folder, "--seed", 7)
    assert code == 2 and "--seed 7 is not what args.json says (1)" in err


def test_what_a_killed_save_left_goes_with_the_next(call_main, stub_iteration, tmp_path):
    folder = finished_stub_run(call_main, stub_iteration, tmp_path)
    left = folder / "checkpoints" / "36.orbax-checkpoint-tmp"
    left.mkdir()
    (left / "part").write_bytes(b"of a checkpoint")
    code, _, err = call_main("--resume", folder, "--total-steps", 240, "--eval-episodes", 0)
    assert code == 0 and not left.exists(), err


KILLED_DRIVER = """
import os, signal, sys
sys.path.insert(0, {root!r})
import twm_dyna_craftax as twm

def iteration(args, state, key):
    logs = {{"losses/stub": float(state.iteration), "perf/SPS": 1.0}}
    return state.replace(iteration=state.iteration + 1, episode_sums=state.episode_sums + 1.0), None, logs

def kill(event, arguments):
    if event == {event!r} and "checkpoints" in str(arguments[0]) and "/{name}" in str(arguments[0]):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
twm.train_iteration = iteration
twm.main()
"""


@pytest.mark.parametrize(
    "event, name, left",
    [
        ("os.rename", "72.", [24, 48]),  # all is written, nothing renamed yet
        ("shutil.rmtree", "24", [24, 48, 72]),  # the new one is whole, the oldest one is about to go
    ],
)
def test_kill_9_in_the_middle_of_a_save_leaves_a_resumable_folder(
    call_main, stub_iteration, tmp_path, event, name, left
):
    driver = KILLED_DRIVER.format(root=str(ROOT), event=event, name=name)
    command = [sys.executable, "-c", driver, *stub_iteration]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert process.returncode == -signal.SIGKILL, process.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert steps_saved(folder) == left
    if event == "os.rename":
        assert any(path.name.startswith("72") for path in (folder / "checkpoints").iterdir())  # it was amid the save
    assert metrics_of(folder)[-1]["step"] == 72
    resumes(call_main, stub_iteration, folder, [24, 48, 72, 96])
    assert steps_saved(folder) == [72, 96]


def finished_stub_run(call_main, stub_iteration, tmp_path):
    code, _, err = call_main(*stub_iteration)
    assert code == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    return folder


def truncate(checkpoint):
    for path in checkpoint.rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)


def hollow_out(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def scramble(checkpoint):
    """The largest file, which holds array data, gets other bytes of the same number."""
    path = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [truncate, hollow_out, scramble])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(call_main, stub_iteration, tmp_path, damage):
    folder = finished_stub_run(call_main, stub_iteration, tmp_path)
    damage(folder / "checkpoints" / "96")
    _, err = resumes(call_main, (*stub_iteration, "--total-steps", 120), folder, [24, 48, 72, 96, 120])
    assert any("96" in line and str(folder) in line for line in err.splitlines()), f"it is not named: {err}"


def test_when_all_checkpoints_are_damaged_it_says_so(call_main, stub_iteration, tmp_path):
    folder = finished_stub_run(call_main, stub_iteration, tmp_path)
    for step in (72, 96):
        truncate(folder / "checkpoints" / str(step))
    code, _, err = call_main("--resume", folder, "--total-steps", 120)
    assert code == 2 and f"--resume {folder}" in err and "Traceback" not in err
    assert len(metrics_of(folder)) == 4


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_earlier_checkpoints(
    call_main, stub_iteration, monkeypatch, tmp_path
):
    stub = twm.train_iteration

    def diverging(args, state, key):
        state, rollout, logs = stub(args, state, key)
        return state, rollout, logs | {"losses/real_loss": float("nan") if int(state.iteration) == 3 else 1.0}

    monkeypatch.setattr(twm, "train_iteration", diverging)
    code, _, err = call_main(*stub_iteration)
    (folder,) = (tmp_path / "runs").iterdir()
    assert code == 2 and "losses/real_loss is nan at step 72" in err and str(folder.name) in err
    assert len(err.strip().splitlines()) == 1
    assert steps_saved(folder) == [24, 48] and metrics_of(folder)[-1]["step"] == 48
    monkeypatch.setattr(twm, "train_iteration", stub)
    code, _, err = call_main("--resume", folder, *stub_iteration[2:])
    assert code == 0, err
    assert [line["step"] for line in metrics_of(folder)] == [24, 48, 72, 96]


def test_a_full_disk_is_noticed_before_the_run(call_main, stub_iteration, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    code, _, err = call_main(*stub_iteration)
    assert code == 2 and "--runs-dir" in err and len(err.strip().splitlines()) == 1


def test_a_resumed_run_needs_room_for_one_more_checkpoint_and_is_refused_unchanged(
    call_main, stub_iteration, monkeypatch, tmp_path
):
    folder = finished_stub_run(call_main, stub_iteration, tmp_path)
    size = twm.size_in_bytes(jax.eval_shape(lambda: twm.init_state(twm.parse_args(["--resume", str(folder)]))))
    usage, before = shutil.disk_usage(tmp_path), (folder / "args.json").read_bytes()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size - 1))
    code, _, err = call_main("--resume", folder, "--total-steps", 120)
    assert code == 2 and f"the disk of {folder} has" in err
    assert (folder / "args.json").read_bytes() == before
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size + 1))
    assert call_main("--resume", folder, "--total-steps", 120)[0] == 0
    assert (folder / "args.json").read_bytes() != before


FULL_DRIVER = """
import resource, signal, sys
sys.path.insert(0, {root!r})
import twm_dyna_craftax as twm

def iteration(args, state, key):
    if state.iteration == 2:  # from here on no file may grow beyond 100 kB
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    logs = {{"losses/stub": float(state.iteration), "perf/SPS": 1.0}}
    return state.replace(iteration=state.iteration + 1, episode_sums=state.episode_sums + 1.0), None, logs

twm.train_iteration = iteration
twm.main()
"""


def test_a_disk_that_fills_up_loses_no_earlier_checkpoint(call_main, stub_iteration, tmp_path):
    command = [sys.executable, "-c", FULL_DRIVER.format(root=str(ROOT)), *stub_iteration]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    (folder,) = (tmp_path / "runs").iterdir()
    assert process.returncode == 2 and "checkpoint 72" in process.stderr and "File too large" in process.stderr
    assert "--resume" in process.stderr and len(process.stderr.strip().splitlines()) == 1
    assert steps_saved(folder) == [24, 48]
    resumes(call_main, stub_iteration, folder, [24, 48, 72, 96])


def test_the_evaluation_of_a_finished_run_tells_the_steps_it_really_has(
    call_main, stub_iteration, monkeypatch, tmp_path
):
    folder, steps = finished_stub_run(call_main, stub_iteration, tmp_path), []
    monkeypatch.setattr(twm, "evaluate", lambda args, run, params, step: steps.append(step))
    code, _, err = call_main("--resume", folder, "--total-steps", 48, "--eval-episodes", 4)
    assert code == 0, err
    assert steps == [96]


# --- Weights & Biases ---
TRACKED_DRIVER = """
import sys
import numpy as np
sys.path.insert(0, {root!r})
import twm_dyna_craftax as twm

def iteration(args, state, key):
    return state.replace(iteration=state.iteration + 1), None, {{"losses/stub": 1.5, "perf/SPS": 1.0}}

def write_media(args, run, step, state, rollout, key):
    run.media(step, "rollout", np.zeros((5, 16, 16, 3), np.uint8))

twm.train_iteration, twm.write_media = iteration, write_media
twm.main()
"""


def test_tracking_works_offline_without_an_account(stub_iteration, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"]}
    driver = TRACKED_DRIVER.format(root=str(ROOT))
    flags = [*stub_iteration, "--media-every", "2", "--track", "--wandb-mode", "offline"]
    command = [sys.executable, "-c", driver, *flags]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    (log,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    assert folder.name in log.name  # the run folder's name is the W&B id, so a resumed run goes on in it
    assert b"losses/stub" in log.read_bytes() and b"media/rollout" in log.read_bytes()
    assert len(metrics_of(folder)) == 4

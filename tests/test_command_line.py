"""Bad input ends with exit code 2 and one sentence that names the flag, before anything is computed or written."""

import dataclasses
import json

import jax
import pytest
from conftest import SCRIPT, steps_saved

import twm_dyna_craftax as twm

OUT_OF_PLACE = {  # flags beside --preset smoke (4 environments x 6 steps, context 4) -> what the message must name
    "minibatches that do not divide": (["--num-minibatches", "3"], ["--num-minibatches 3", "--num-envs 4"]),
    "negative total": (["--total-steps", "-5"], ["--total-steps -5"]),
    "no total": (["--total-steps", "0"], ["--total-steps 0"]),
    "less than a rollout": (["--total-steps", "23"], ["--total-steps 23", "24"]),
    "no steps": (["--num-steps", "0"], ["--num-steps 0"]),
    "negative environments": (["--num-envs", "-4"], ["--num-envs -4"]),
    "negative learning rate": (["--learning-rate", "-0.1"], ["--learning-rate -0.1"]),
    "learning rate nan": (["--wm-learning-rate", "nan"], ["--wm-learning-rate nan"]),
    "infinite clip": (["--max-grad-norm", "inf"], ["--max-grad-norm inf"]),
    "clip to nothing": (["--max-grad-norm", "0"], ["--max-grad-norm 0.0", "no gradient"]),
    "gamma above 1": (["--gamma", "1.5"], ["--gamma 1.5"]),
    "lambda above 1": (["--gae-lambda", "1.01"], ["--gae-lambda 1.01"]),
    "decay above 1": (["--value-norm-decay", "2"], ["--value-norm-decay 2"]),
    "all dropped": (["--wm-dropout", "1"], ["--wm-dropout 1"]),
    "frozen average": (["--wm-average-decay", "1"], ["--wm-average-decay 1"]),
    "odd head size": (["--wm-size", "6", "--wm-heads", "2"], ["--wm-size 6", "--wm-heads 2"]),
    "heads that do not divide": (["--wm-heads", "3"], ["--wm-size 32", "--wm-heads 3"]),
    "imagination beyond the context": (["--imagination-steps", "5"], ["--imagination-steps 5", "--context 4"]),
    "context beyond the rollout": (["--context", "6"], ["--num-steps 6", "--context"]),
    "burn-in beyond the rollout": (["--burn-in", "6"], ["--num-steps 6", "--burn-in"]),
    "codebook too large": (["--codebook-size", "70000"], ["--codebook-size 70000"]),
    "replay too small": (["--replay-size", "20"], ["--replay-size 20", "24"]),
    "starts too recent": (["--imagination-recent", "11"], ["--imagination-recent 11", "12"]),
    "no channels": (["--encoder-channels"], ["--encoder-channels"]),
    "a channel of size 0": (["--encoder-channels", "16", "0"], ["--encoder-channels"]),
    "negative period": (["--media-every", "-1"], ["--media-every -1"]),
    "negative seed": (["--seed", "-1"], ["--seed -1"]),
    "a seed too large": (["--seed", "1" + 30 * "0"], ["--seed 1000"]),
    "two folders": (["--resume", "one", "--eval-only", "two"], ["--resume", "--eval-only"]),
    "unknown preset": (["--preset", "large"], ["--preset large", "paper", "cpu", "smoke"]),
    "missing resume folder": (["--resume", "nowhere"], ["--resume nowhere"]),
    "missing eval folder": (["--eval-only", "nowhere"], ["--eval-only nowhere"]),
}


def assert_refused(result, named):
    """Exit code 2; on stderr one line, without a traceback, that names all that it should."""
    code, _, err = result
    assert code == 2, err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1, err
    for text in named:
        assert text in err, err


@pytest.mark.parametrize("case", OUT_OF_PLACE)
def test_bad_flags_are_refused_in_one_sentence(case, call_main, monkeypatch, tmp_path):
    flags, named = OUT_OF_PLACE[case]
    monkeypatch.setattr(twm, "train", lambda args: pytest.fail("it was not refused"))
    assert_refused(call_main("--preset", "smoke", *flags), named)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--nonsense", "1"], "--nonsense"),
        (["--seed", "one"], "--seed"),
        (["--dtype", "fp64"], "--dtype"),
        (["--encoder", "resnet"], "--encoder"),
        (["--wandb-mode", "sometimes"], "--wandb-mode"),
        (["--gamma"], "--gamma"),
    ],
)
def test_what_the_flag_parser_refuses(flags, named, call_main, monkeypatch, tmp_path):
    monkeypatch.setattr(twm, "train", lambda args: pytest.fail("it was not refused"))
    code, out, err = call_main("--preset", "smoke", *flags)
    assert code == 2 and named in err and "Traceback" not in out + err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, named",
    [
        ({"num-envs": 4, "num-minibatches": 1}, "--num-envs"),
        ({"num-envs": 6, "num-minibatches": 3}, "--num-minibatches 3 does not divide --num-envs 6"),
        ({"wm-batch-size": 4}, "--wm-batch-size 4"),
        ({"imagination-envs": 4}, "--imagination-envs 4"),
    ],
)
def test_batches_that_devices_do_not_divide_are_refused(flags, named, call_main, monkeypatch):
    monkeypatch.setattr(twm, "train", lambda args: pytest.fail("it was not refused"))
    monkeypatch.setattr(jax, "device_count", lambda *_: 3)
    good = {"num-envs": 3, "num-minibatches": 1, "wm-batch-size": 3, "imagination-envs": 3, "eval-episodes": 3}
    flags = [part for flag, value in (good | flags).items() for part in (f"--{flag}", value)]
    assert_refused(call_main("--preset", "smoke", *flags), ["3 devices", named])


@pytest.mark.parametrize("environment", [{}, {"JAX_NUM_PROCESSES": "two"}])
def test_processes_that_cannot_find_each_other_are_refused(environment, call_main, monkeypatch, tmp_path):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert_refused(call_main("--preset", "smoke", "--distributed"), ["--distributed", "JAX_COORDINATOR_ADDRESS"])
    assert not list(tmp_path.iterdir())


def test_flags_beside_a_preset_win_over_it(call_main, monkeypatch):
    seen = []
    monkeypatch.setattr(twm, "train", seen.append)
    assert call_main("--preset", "smoke", "--gamma", "0.5", "--total-steps", "240")[0] == 0
    assert seen[0].gamma == 0.5 and seen[0].num_iterations == 10 and seen[0].num_envs == 4
    assert call_main("--total-steps", "1000000")[0] == 0
    assert seen[1].preset == "paper" and seen[1].num_iterations == 217 and seen[1].gamma == 0.925


@pytest.mark.parametrize(
    "content",
    ["{", "{}", "[]", "3", '{"no_such_flag": 1}', '{"num_envs": "four"}', '{"num_envs": null}', '{"gamma": [0, 1]}'],
)
def test_broken_settings_of_a_run_folder_are_refused(content, call_main, monkeypatch, tmp_path):
    monkeypatch.setattr(twm, "train", lambda args: pytest.fail("it was not refused"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").write_text(content)
    named = "args.json says (None)" if content == "{}" else "--resume run"
    assert_refused(call_main("--resume", "run"), [named])


def test_another_preset_beside_resume_is_refused(call_main, monkeypatch, tmp_path):
    monkeypatch.setattr(twm, "train", lambda args: pytest.fail("it was not refused"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").write_text(json.dumps(dataclasses.asdict(twm.PRESETS["smoke"])))
    assert_refused(call_main("--resume", "run", "--preset", "cpu"), ["--resume run", "--preset smoke, not cpu"])


def test_two_runs_of_one_second_do_not_share_a_folder(call_main, monkeypatch, stub_iteration, tmp_path):
    seconds = iter(("12", "12", "12", "13"))
    monkeypatch.setattr(twm.time, "strftime", lambda _: next(seconds))
    for _ in range(2):
        assert call_main(*stub_iteration)[0] == 0
    assert sorted(path.name[-2:] for path in (tmp_path / "runs").iterdir()) == ["12", "13"]


@pytest.mark.parametrize("below", ["file", "file/deeper"])
def test_a_place_that_cannot_be_written_is_refused(below, call_main, tmp_path, stub_iteration):
    (tmp_path / "file").write_text("")
    assert_refused(call_main(*stub_iteration, "--runs-dir", below), [f"--runs-dir {below}"])


@pytest.fixture
def stub_run(call_main, stub_iteration, tmp_path):
    code, _, err = call_main(*stub_iteration, "--total-steps", 24)
    assert code == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    return folder


def test_a_folder_without_checkpoints_is_refused(stub_run, call_main, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").write_text((stub_run / "args.json").read_text())
    assert_refused(call_main("--resume", "run", "--total-steps", 48), ["--resume run"])
    assert_refused(call_main("--eval-only", "run", "--eval-episodes", 4), ["--eval-only run"])
    assert_refused(call_main("--eval-only", stub_run), ["--eval-episodes 0"])


@pytest.mark.parametrize("flags", [["--gru-size", 16], ["--wm-layers", 2], ["--replay-size", 100]])
def test_a_checkpoint_of_other_sizes_is_refused_and_kept(flags, stub_run, call_main):
    code, _, err = call_main("--resume", stub_run, "--total-steps", 48, *flags)
    assert code == 2 and f"--resume {stub_run}" in err.splitlines()[-1] and "Traceback" not in err
    assert "other sizes" in err  # noticed before Orbax tries, which would leave traces of its threads on the screen
    assert steps_saved(stub_run) == [24]
    assert call_main("--resume", stub_run, "--total-steps", 48)[0] == 0  # the refused call did not change its settings


def test_a_checkpoint_of_another_program_is_refused(stub_run, call_main):
    import shutil

    shutil.rmtree(stub_run / "checkpoints")
    twm.save_checkpoint(stub_run, 24, {"weights": jax.numpy.ones((3, 4)), "step": jax.numpy.int32(7)})
    code, _, err = call_main("--resume", stub_run, "--total-steps", 48)
    assert code == 2 and f"--resume {stub_run}" in err.splitlines()[-1] and "Traceback" not in err


def test_dry_run_starts_nothing(call_main, monkeypatch, tmp_path):
    monkeypatch.setattr(twm, "train", lambda args: pytest.fail("it started"))
    code, out, err = call_main("--preset", "smoke", "--dry-run")
    assert code == 0, err
    assert not (tmp_path / "runs").exists()
    args = twm.PRESETS["smoke"]
    policy = jax.eval_shape(lambda: twm.init_policy(args, jax.random.PRNGKey(0))).params
    parameters = sum(leaf.size for leaf in jax.tree.leaves(policy))
    for word in (f"{parameters:,}", "FLOP", "memory", "an imagined update", "ETA"):
        assert word in out, f"it does not tell {word}"


def test_messages_name_the_script(call_main):
    assert call_main("--preset", "large")[2].startswith(f"{SCRIPT.name}: error: ")


def test_a_resumed_run_keeps_its_settings(stub_run, call_main, monkeypatch):
    seen = []
    monkeypatch.setattr(twm, "train", seen.append)
    call_main("--resume", stub_run, "--gamma", "0.5")
    saved = json.loads((stub_run / "args.json").read_text())
    assert seen[0].gamma == 0.5 and seen[0].num_envs == saved["num_envs"] == 4 and seen[0].resume == str(stub_run)

"""benchmark/results.py on small run folders with known times and curves."""

import json

import pytest

import results


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run folder of a script, to be filled by `log`."""
    (tmp_path / "a__cpu__s3__time").mkdir()
    monkeypatch.setattr(results, "commit_of", lambda script: "abc")
    (tmp_path / "a__cpu__s3__time" / "a.py").write_text("")
    (tmp_path / "a__cpu__s3__time" / "args.json").write_text('{"seed": 3, "runs_dir": "x", "gamma": 0.9}')
    return tmp_path / "a__cpu__s3__time"


def log(folder, lines, end=""):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end)


def test_wall_time_is_that_of_the_phases_or_of_the_updates():
    phases = {"perf/seconds_collect": 2.0, "perf/seconds_policy_real": 3.0, "perf/compile_seconds": 10.0}
    assert results.wall_seconds([{"step": 10, **phases}, {"step": 20, **phases}]) == 30
    # 4 updates at 2 a second, an evaluation between two lines, 6 more at 3 a second
    updates = [(4, {"perf/updates_per_second": 2.0}), (7, {"eval/kid": 1}), (10, {"perf/updates_per_second": 3.0})]
    assert results.wall_seconds([{"step": step, **line} for step, line in updates]) == pytest.approx(4)


def test_a_long_curve_keeps_its_evaluations_and_its_end(folder):
    lines = [{"step": step, "losses/x": step} for step in range(1, 1001)]
    lines[500:500] = [{"step": 500, "eval/kid": 5.0}]
    log(folder, lines, end='{"step": 1001, "loss')  # still being written
    curve = results.read_run(folder)["curve"]
    assert 100 < len(curve["step"]) <= results.POINTS + 1 and curve["step"][-1] == 1000
    assert [(t, v) for t, v in zip(curve["step"], curve["kid"], strict=True) if v is not None] == [(500, 5.0)]
    assert curve["step"] == sorted(curve["step"])
    log(folder, lines[:20])
    assert results.read_run(folder)["curve"]["x"] == list(range(1, 21))


def test_a_run_is_told_with_what_it_logged_last(folder):
    log(folder, [{"step": 1, "charts/a": 1, "losses/b": 2}, {"step": 2, "charts/a": 3}])
    (folder / "eval.json").write_text('{"stochastic": 1}')
    run = results.read_run(folder)
    assert (run["label"], run["seed"], run["steps"], run["commit"]) == ("a__cpu", 3, 2, "abc")
    assert run["metrics"] == {"a": 3, "b": 2} and run["evaluation"] == {"stochastic": 1}
    assert run["settings"] == {"seed": 3, "gamma": 0.9} and results.read_run(folder, "mine")["label"] == "mine"


@pytest.mark.parametrize("steps, reason", [([], "logged nothing"), ([2, 4, 3, 4], "go back")])
def test_logs_of_no_run_or_of_two_are_refused(folder, steps, reason):
    log(folder, [{"step": step, "losses/x": 1} for step in steps])
    with pytest.raises(SystemExit, match=reason):
        results.read_run(folder)


def test_the_summary_is_of_the_runs_of_a_label(folder, monkeypatch):
    written = {}
    monkeypatch.setattr(results, "write", lambda *parts: written.update(summary=parts[-1]))
    log(folder, [{"step": 1, "charts/reward_percent": 7}])
    results.main("name", "command", f"mine={folder}", f"mine={folder}", str(folder))
    assert written["summary"] == {
        "mine": {"runs": 2, "reward_percent": [7, 7, 7]},
        "a__cpu": {"runs": 1, "reward_percent": [7, 7, 7]},
    }

"""benchmark/plot.py on small run folders and result files with known curves."""

import json
import sys

import numpy as np
import pytest

import plot


def run_folder(parent, name, steps, **keys):
    """A run folder whose metrics.jsonl holds group__key=values, None for lines without the key."""
    (parent / name).mkdir(parents=True)
    lines = []
    for i, step in enumerate(steps):
        values = {key.replace("__", "/"): value[i] for key, value in keys.items() if value[i] is not None}
        lines.append(json.dumps({"step": step, **values}) + "\n")
    (parent / name / "metrics.jsonl").write_text("".join(lines) + '{"step": 99, "charts/rew')  # still being written
    return parent / name


@pytest.fixture
def runs(tmp_path):
    """Two seeds of one script, of other steps and lengths, and a run of another script that evaluates now and then."""
    a = run_folder(tmp_path / "runs", "one__cpu__s1__t", [0, 10, 20], charts__reward_percent=[0, 10, 20])
    b = run_folder(tmp_path / "runs", "one__cpu__s2__t", [5, 15, 25, 35], charts__reward_percent=[1, 3, 5, 7])
    c = {"charts__reward_percent": [2, 2, 2], "losses__real_entropy": [3, 2, 1]}
    c["losses__imagined_entropy"] = [None, 2, 1]
    run_folder(tmp_path / "runs", "two__smoke__s1__t", [1, 2, 3], **c)
    return a, b


def test_mean_and_spread_are_of_the_steps_that_all_runs_cover(runs):
    (line,) = plot.groups([f"both={runs[0]},{runs[1]}"]).values()
    steps, mean, low, high = plot.mean_and_spread(line, "reward_percent")
    np.testing.assert_array_equal(steps, [5, 10, 15, 20])
    np.testing.assert_allclose([low, high], [[1, 2, 3, 4], [5, 10, 15, 20]], rtol=1e-12)
    np.testing.assert_allclose(mean, [3, 6, 9, 12], rtol=1e-12)


def test_runs_are_one_line_by_label_or_by_name(runs, tmp_path):
    """A folder of run folders, and a result file with runs of two labels."""
    lines = plot.groups([str(tmp_path / "runs")])
    assert {label: len(line) for label, line in lines.items()} == {"one__cpu": 2, "two__smoke": 1}
    curve = {"step": [1, 2], "reward_percent": [None, 4]}
    result = {"runs": [{"label": label, "curve": curve} for label in ("a", "b", "a")]}
    (tmp_path / "result.json").write_text(json.dumps(result))
    lines = plot.groups([str(tmp_path / "result.json")])
    assert {label: len(line) for label, line in lines.items()} == {"a": 2, "b": 1}
    lines = plot.groups([f"mine={tmp_path / 'result.json'},{runs[0]}"])
    assert {label: len(line) for label, line in lines.items()} == {"mine": 4}
    np.testing.assert_array_equal(plot.mean_and_spread(lines["mine"][:3], "reward_percent"), [[2], [4], [4], [4]])


def test_the_picture_has_the_lines_the_spread_and_the_published_levels(runs, tmp_path):
    axes = plot.plt.figure().subplots(2)
    lines = plot.groups([str(tmp_path / "runs")])
    plot.draw(axes[0], ["reward_percent"], lines)
    drawn = [line.get_label() for line in axes[0].lines if not line.get_label().startswith("_")]
    assert drawn == ["one__cpu (n=2)", "two__smoke (n=1)"] and len(axes[0].collections) == 1  # one spread
    levels = [line.get_ydata()[0] for line in axes[0].lines if line.get_linestyle() == ":"]
    assert levels == list(plot.PUBLISHED["reward_percent"].values())
    plot.draw(axes[1], ["real_entropy", "imagined_entropy"], lines)
    assert [list(line.get_xdata()) for line in axes[1].lines] == [[1, 2, 3], [2, 3]]  # a colour, two kinds of dashes


def test_panels_are_those_with_data(runs, tmp_path, monkeypatch):
    drawn = []
    draw = plot.draw
    monkeypatch.setattr(plot, "draw", lambda axis, keys, lines: drawn.append(keys[0]) or draw(axis, keys, lines))
    plot.main([str(tmp_path / "out.png"), "panels", str(tmp_path / "runs")])
    assert drawn == ["reward_percent", "real_entropy"] and (tmp_path / "out.png").stat().st_size > 1000
    names = []
    monkeypatch.setattr(plot.plt.Axes, "legend", lambda axis, lines, labels, **how: names.append([*labels]))
    run_folder(tmp_path / "runs", "three__cpu__s1__t", [1, 2], losses__real_entropy=[1, 1])  # in the second panel only
    monkeypatch.setattr(plot.plt.Axes, "add_artist", lambda axis, artist: None)
    plot.main([str(tmp_path / "out.png"), "panels", str(tmp_path / "runs")])
    assert names[-1] == ["one__cpu (n=2)", "two__smoke (n=1)", "three__cpu (n=1)"]
    with pytest.raises(SystemExit, match="one__cpu has no losses/real_entropy"):  # asked for by name
        plot.main([str(tmp_path / "no.png"), "losses/real_entropy", str(tmp_path / "runs")])


def test_achievements_are_all_of_them_or_one(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot, "draw", lambda axis, keys, lines: drawn.append(keys[0]))
    monkeypatch.setattr(plot.plt.Axes, "legend", lambda *inputs, **how: None)
    values = {f"achievements__{name}": [0.5] for name in plot.ACHIEVEMENTS}
    run = run_folder(tmp_path, "one__cpu__s1__t", [1], **values)
    plot.main([str(tmp_path / "out.png"), "achievements/wake_up,achievements", str(run)])
    assert drawn == ["wake_up", *(name for name in plot.ACHIEVEMENTS if name != "wake_up")]


def test_teacher_stands_beside_the_student_in_order_of_steps(tmp_path):
    """Pictures of one grey each, 4 x 6 enlarged four times; step 1000 comes after step 50."""
    import imageio.v3 as imageio

    import teacher_student

    (tmp_path / "media").mkdir()
    for name, grey in {
        "teacher_50": 9,
        "samples_1000": 200,
        "samples_50": 100,
        "samples_500": 150,
        "panel_50": 0,
    }.items():
        imageio.imwrite(tmp_path / "media" / f"{name}.png", np.full((16, 24, 3), grey, np.uint8))
    frames = teacher_student.frames(tmp_path / "media")
    assert frames.shape == (3, 16, 24 + 16 + 24, 3)
    assert (frames[:, :, :24] == 9).all() and (frames[:, :, 24:40] == 255).all()
    np.testing.assert_array_equal(frames[:, 0, 40:, 0], np.repeat([[100], [150], [200]], 24, axis=1))
    assert teacher_student.frames(tmp_path / "media", count=2, width=12)[:, 0, -1, 0].tolist() == [100, 200]
    assert teacher_student.frames(tmp_path / "media", width=12).shape == (3, 8, 12 + 16 + 12, 3)
    teacher_student.main([str(tmp_path / "out.gif"), str(tmp_path)])
    assert imageio.imread(tmp_path / "out.gif").shape == frames.shape


def test_the_wait_for_the_first_line_ends_with_it():
    import first_step

    program = "import time; print(sum(range(10**7))); print('step 1', flush=True); time.sleep(60)"
    metrics = first_step.timed([sys.executable, "-c", program], "step ")
    assert metrics["processor_seconds"] > 0 and metrics["wall_seconds"] < 50 and set(metrics) >= {"load"}
    assert first_step.timed([sys.executable, "-c", "print('step 1')"])["wall_seconds"] < 50
    with pytest.raises(SystemExit, match="failed"):
        first_step.timed([sys.executable, "-c", "raise SystemExit(1)"])

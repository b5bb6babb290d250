"""benchmark/world_model_quality.py: what it reports of hand-made states, frames and predictions is known beforehand."""

import dataclasses
import json
from types import SimpleNamespace

import imageio.v3 as imageio
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import twm_dyna_craftax as twm
import world_model_quality as quality

N, T, L = 5, 3, 81


def held_out(tokens, position=None, **changes):
    """Windows of tokens Int[N, T + 1, 81] in which nothing else happens."""
    shape = tokens.shape[:2]
    nothing = np.zeros(shape, bool)
    steps = twm.Steps(tokens.astype(np.uint16), np.zeros(shape, np.uint8), np.zeros(shape, np.float32), nothing, None)
    position = np.full((*shape, 2), 30) if position is None else position
    windows = quality.HeldOut(steps, nothing, nothing, position, nothing, np.zeros(tokens.shape, bool))
    return windows.replace(**changes)


def said(likeliest, probability=1.0):
    """Predictions of tokens, each true one with this probability."""
    rates = np.zeros(likeliest.shape[:2])
    return quality.Prediction(likeliest.astype(np.uint16), np.full(likeliest.shape, np.log(probability)), rates, rates)


@pytest.fixture
def windows():
    """Random frames of which about half of the cells change at a step."""
    return held_out(np.random.default_rng(0).integers(0, 2, (N, T + 1, L)))


# --- One step ---
def test_a_perfect_model_is_right_everywhere(windows):
    tokens, actions = windows.steps.tokens, windows.steps.actions
    metrics = quality.token_metrics(windows, said(tokens[:, 1:]), said(tokens[:, 1:]), actions)
    for group in [*metrics["cells"].values(), *metrics["frames"].values()]:
        assert group["accuracy"] == 1 and group["sampled"] == 1
    assert metrics["cells"]["all"]["count"] == N * T * L and metrics["frames"]["all"]["count"] == N * T
    assert metrics["cells"]["all"]["loss"] == 0
    almost = tokens[:, 1:].copy()
    almost[0, 0, 5] += 1  # one cell of one frame
    metrics = quality.token_metrics(windows, said(almost, probability=0.99), said(almost), actions)
    assert metrics["cells"]["all"]["accuracy"] == pytest.approx(1 - 1 / (N * T * L))
    assert metrics["frames"]["all"]["accuracy"] == pytest.approx(1 - 1 / (N * T))
    assert metrics["cells"]["all"]["sampled"] == pytest.approx(0.99)
    assert metrics["frames"]["all"]["sampled"] == pytest.approx(0.99**L)
    assert metrics["cells"]["all"]["loss"] == pytest.approx(-np.log(0.99))


def test_copying_is_right_where_nothing_changes(windows):
    tokens, actions = windows.steps.tokens, windows.steps.actions
    metrics = quality.token_metrics(windows, said(tokens[:, :-1]), said(tokens[:, :-1]), actions)
    cells, changed = metrics["cells"], (tokens[:, 1:] != tokens[:, :-1]).mean()
    assert cells["all"]["copy"] == cells["all"]["accuracy"] == pytest.approx(1 - changed)
    assert cells["changed"]["copy"] == 0 and cells["unchanged"]["copy"] == 1
    assert cells["map"]["count"] == N * T * 63 and cells["inventory"]["count"] == N * T * 18
    seen = metrics["changed cells, by frames seen"]
    assert list(seen) == ["1", "2", "3"]
    assert sum(row["count"] for row in seen.values()) == cells["changed"]["count"]


def view(world, position):
    """What Craftax shows of a world Int[rows, columns] at a position: 7 x 9 cells, the player, then the inventory."""
    row, column = position
    grid = world[row - 3 : row + 4, column - 4 : column + 5].copy()
    grid[3, 4] = 1000  # the player
    return np.concatenate([grid.ravel(), np.arange(18)])


def test_a_walk_is_explained_by_scrolling():
    """Every cell of the world is another one, so that a move changes all of the map but the player's cell."""
    world, walk = np.arange(2000, 2000 + 60 * 60).reshape(60, 60), [(30, 30), (30, 31), (29, 31), (29, 31)]
    tokens = np.stack([view(world, position) for position in walk])[None]
    windows = held_out(tokens, position=np.array(walk)[None])
    metrics = quality.token_metrics(windows, said(tokens[:, 1:]), said(tokens[:, 1:]), windows.steps.actions)
    cells = metrics["cells"]
    # To the right 7 cells come into view, upwards 9. Where the player stood, the frame before showed the player.
    assert cells["changed map, new in view"]["count"] == 7 + 9 and cells["changed map, new in view"]["scroll"] == 0
    assert cells[quality.SCROLLED]["count"] == 62 - 7 + 62 - 9
    assert cells[quality.SCROLLED]["scroll"] == pytest.approx(1 - 2 / (124 - 16))
    assert cells[quality.SCROLLED]["copy"] == 0 and cells["unchanged"]["scroll"] == 1  # the player stays in its cell
    assert (
        cells["inventory"]["scroll"] == 1 and "changed inventory" not in cells and "changed map, no move" not in cells
    )
    assert metrics["frames"]["after a move"]["count"] == 2 and metrics["frames"]["after no move"]["scroll"] == 1


def test_what_changes_without_a_move_has_its_own_groups():
    tokens = np.zeros((1, 3, L), int)
    tokens[0, 1:, 20] = 1  # on the map, at the first step
    tokens[0, 2, [66, 67, 80]] = 1  # in the inventory, at the second: energy and two items
    flags = np.array([[True, False, True]])  # of frames; the first one is not predicted
    windows = held_out(tokens, creatures=flags, noisy=~flags)
    groups = {name: np.argwhere(group).tolist() for name, group in quality.cell_groups(windows).items()}
    assert groups["changed map, no move"] == [[0, 0, 20]]
    assert groups["changed inventory"] == [[0, 1, 66], [0, 1, 67], [0, 1, 80]]
    assert groups["changed items"] == [[0, 1, 67], [0, 1, 80]]
    assert groups["changed, with creatures"] == groups["changed, without noise"] == groups["changed inventory"]
    assert groups["changed, without creatures"] == groups["changed, in noise"] == groups["changed map, no move"]
    assert not groups[quality.SCROLLED] and not groups["changed map, new in view"]


def test_shuffled_actions_are_compared_where_they_differ():
    world, walk = np.arange(3600).reshape(60, 60), [(30, 30), (30, 31), (30, 32)]
    tokens = np.stack([view(world, position) for position in walk])[None]
    windows = held_out(tokens, position=np.array(walk)[None])
    wrong, actions = tokens[:, 1:].copy(), np.array([[0, 4, 9]])  # the second step's action is another one
    wrong[0, :, :9] = 0  # and the model then misses the top row
    metrics = quality.token_metrics(windows, said(tokens[:, 1:]), said(wrong), actions)["action"][quality.SCROLLED]
    assert metrics == {"count": 55, "true": 1, "shuffled": pytest.approx(1 - 8 / 55)}  # the ninth came into view


# --- Events ---
def test_calibration_is_what_one_computes_by_hand():
    probability, happened = np.array([0.0005, 0.2, 0.2, 0.6, 0.9]), np.array([False, False, True, True, True])
    metrics = quality.event_metrics(probability, happened)
    assert metrics["bins"] == {
        "0 to 0.001": {"count": 1, "predicted": 0.0005, "true": 0},
        "0.1 to 0.3": {"count": 2, "predicted": 0.2, "true": 0.5},
        "0.3 to 1": {"count": 2, "predicted": 0.75, "true": 1},
    }
    assert metrics["expected_calibration_error"] == pytest.approx((1 * 0.0005 + 2 * 0.3 + 2 * 0.25) / 5)
    assert metrics["brier"] == pytest.approx((0.0005**2 + 0.2**2 + 0.8**2 + 0.4**2 + 0.1**2) / 5)
    assert metrics["brier_of_the_true_rate"] == pytest.approx(0.6 * 0.4)
    assert metrics["precision"] == 1 and metrics["recall"] == pytest.approx(2 / 3)
    assert metrics["sampled_precision"] == pytest.approx(1.7 / 1.9005)
    assert metrics["sampled_recall"] == pytest.approx(1.7 / 3)
    never = quality.event_metrics(np.full(4, 0.1), np.zeros(4, bool))
    assert never["precision"] is None and never["recall"] is None and never["sampled_precision"] == 0


def test_rewards_are_told_apart_by_what_the_step_does():
    windows = held_out(np.zeros((1, 5, L), int), repeats=np.array([[False, True, False, True, False]]))
    windows.steps.rewards[0] = [1.0, 0.9, -0.1, 0.0, 1.0]  # the second step unlocks one and repeats another
    kinds = quality.reward_metrics(windows, np.array([[0.5, 0.7, 0.1, 0.4]]))["kinds"]
    expected = {"unlocks": (2, 0.6), "repeats": (1, 0.4), "neither": (1, 0.1)}
    assert kinds == {name: {"count": n, "predicted": pytest.approx(p)} for name, (n, p) in expected.items()}


def test_what_a_policy_does_in_both_worlds_is_told_apart_by_action():
    taken, unlocks = np.array([[5, 5, 6, 0]]), np.array([[True, False, False, False]])
    dreamt, rewards = np.array([[5, 5], [5, 5], [6, 6]]), np.array([[True, True], [True, False], [False, True]])
    table = quality.action_metrics((taken, unlocks), np.array([[0.9, 0.3, 0.1, 0.0]]), (dreamt, rewards))
    assert len(table) == twm.NUM_ACTIONS
    assert [*table["DO"].values()] == pytest.approx([0.5, 4 / 6, 0.5, 0.6, 0.75])
    assert [*table["SLEEP"].values()] == pytest.approx([0.25, 2 / 6, 0.0, 0.1, 0.5])
    assert table["NOOP"]["imagined"] is None and table["LEFT"]["real_share"] == 0


# --- Held-out steps ---
def test_creatures_are_seen_on_the_map_only():
    def mobs(*positions):  # of one kind in each of the worlds
        return SimpleNamespace(position=jnp.array(positions), mask=jnp.ones((len(positions), 1), bool))

    none = SimpleNamespace(position=jnp.full((6, 1, 2), 20), mask=jnp.zeros((6, 1), bool))  # there, but not alive
    corners = mobs([[17, 16]], [[16, 16]], [[23, 24]], [[24, 24]], [[17, 15]], [[23, 25]])
    seen = [True, False, True, False, False, False]
    state = SimpleNamespace(player_position=jnp.full((6, 2), 20), zombies=none, cows=none, skeletons=none, arrows=none)
    assert not quality.creatures_in_view(state).any()
    for kind in ("zombies", "cows", "skeletons", "arrows"):
        one = SimpleNamespace(**{**vars(state), kind: corners})
        np.testing.assert_array_equal(quality.creatures_in_view(one), seen, err_msg=kind)


@pytest.fixture(scope="module")
def real(rollouts):
    """A rollout of the smoke preset with an episode end inside, once more, with a codebook that lacks most of it."""
    index = next(i for i, one in enumerate(rollouts.all) if one.rollout.dones[:-2].any())
    before = rollouts.all[index].before
    codebook, _ = twm.grow_codebook(
        dataclasses.replace(rollouts.args, codebook_size=4), init_codebook(), before.frame[None]
    )
    collected = quality.collect(rollouts.args, rollouts.params, codebook, before, jax.random.PRNGKey(100 + index))
    return SimpleNamespace(held_out=jax.device_get(collected), codebook=codebook, like=rollouts.all[index])


def init_codebook():
    return twm.Codebook(jnp.zeros((256, 147), jnp.uint8), jnp.int32(0))


def test_held_out_steps_are_those_of_the_script(real, rollouts):
    rollout, steps = real.like.rollout, real.held_out.steps
    for name in ("frames", "actions", "rewards", "dones"):
        np.testing.assert_array_equal(getattr(steps, name), getattr(rollout, name), err_msg=name)
    never = dataclasses.replace(rollouts.args, code_distance=1e6)  # so far that nothing is added
    _, tokens = twm.grow_codebook(never, real.codebook, rollout.frames)
    np.testing.assert_array_equal(steps.tokens, tokens)
    assert steps.tokens.max() < int(real.codebook.size) == 4 and real.held_out.unknown.any()
    shown = twm.to_cells(np.asarray(rollout.frames).reshape(-1, *twm.FRAME)).astype(float)
    distance = np.square(shown - real.codebook.codes[steps.tokens.reshape(-1, L)]).sum(-1) / 255**2
    np.testing.assert_array_equal(real.held_out.unknown.reshape(-1, L), distance > rollouts.args.code_distance)
    start = real.like.before.state
    np.testing.assert_array_equal(real.held_out.position[0], start.player_position)
    np.testing.assert_array_equal(real.held_out.noisy[0], start.light_level < 0.5)


def test_a_repeated_achievement_is_found(rollouts):
    """Four players plant a sapling on grass. Two have done so before; the last one has no sapling."""
    state = twm.init_env(rollouts.args, jax.random.PRNGKey(1)).state
    grass, plant = 2, 10  # of Craftax's blocks and actions
    place = twm.ACHIEVEMENTS.index("place_plant")
    state = state.replace(
        map=jnp.full_like(state.map, grass),
        mob_map=jnp.zeros_like(state.mob_map),
        inventory=state.inventory.replace(sapling=jnp.array([1, 1, 1, 0], state.inventory.sapling.dtype)),
        achievements=state.achievements.at[:, place].set(jnp.array([False, True, True, True])),
    )
    keys = jax.random.split(jax.random.PRNGKey(0), 4)
    step = jax.jit(quality.step_and_repeats)
    _, _, rewards, dones, repeats = step(state, jnp.full(4, plant), keys)
    assert not dones.any()
    np.testing.assert_array_equal(rewards >= 0.5, [True, False, False, False])
    np.testing.assert_array_equal(repeats, [False, True, True, False])


def test_windows_and_batches_keep_every_step_in_its_place():
    steps = np.arange(11 * 2).reshape(11, 2)  # [T, B]: 2 t + b
    windows = quality.cut_windows(quality.HeldOut(None, steps, None, None, None, None), 4, 3).repeats
    assert windows.shape == (6, 4)
    assert windows.tolist() == [[2 * (s + i) + b for i in range(4)] for s in (0, 3, 6) for b in (0, 1)]
    part = twm.Steps(None, windows, None, None, None)
    sizes = []

    def double(part, key):
        sizes.append(len(part.actions))
        return 2 * part.actions

    np.testing.assert_array_equal(quality.in_batches(double, part, jax.random.PRNGKey(0), size=4), 2 * windows)
    assert sizes == [4, 4]


# --- A world model on the toy ---
def test_predictions_are_those_of_the_loss(toy):
    """The script's own losses and accuracies, computed from the same windows, are the means of what is predicted."""
    steps = toy.windows(6, toy.args.context + 1, seed=7, with_frames=False)
    params, size = toy.init(seed=3).params, toy.codebook.size
    predicted = jax.device_get(quality.predict(toy.args, 256, params, size, steps))
    _, logs = jax.jit(twm.world_model_loss, static_argnums=(1, 2, 5))(params, toy.args, 256, size, steps, None)
    windows = held_out(np.asarray(steps.tokens)).replace(steps=jax.device_get(steps))
    metrics = quality.token_metrics(windows, predicted, predicted, windows.steps.actions)
    for name, group, key in (
        ("token_accuracy", "all", "accuracy"),
        ("changed_token_accuracy", "changed", "accuracy"),
        ("token_loss", "all", "loss"),
    ):
        assert metrics["cells"][group][key] == pytest.approx(float(logs[name]), rel=1e-4), name
    for probability, happened, name in (
        (predicted.reward, windows.steps.rewards[:, :-1] >= 0.5, "reward_loss"),
        (predicted.done, windows.steps.dones[:, :-1], "done_loss"),
    ):
        loss = -np.log(np.where(happened, probability, 1 - probability)).mean()
        assert loss == pytest.approx(float(logs[name]), rel=1e-4), name


def test_open_loop_curves_of_known_frames():
    true = np.zeros((2, 4, L), int)
    true[0, 1:, :27], true[0, 3, 27:54] = 1, 1  # a third of the first window's cells changes, later two thirds
    perfect = quality.open_loop_curves(true, true)
    for name in ("accuracy", "changed_accuracy", "exact"):
        np.testing.assert_array_equal(perfect[name], [1, 1, 1], err_msg=name)
    np.testing.assert_allclose(perfect["copy"], [5 / 6, 5 / 6, 4 / 6])
    np.testing.assert_allclose(perfect["exact_copy"], [0.5, 0.5, 0.5])
    frozen = quality.open_loop_curves(true, true[:, :1].repeat(4, axis=1))
    np.testing.assert_array_equal(frozen["accuracy"], frozen["copy"])
    np.testing.assert_array_equal(frozen["exact"], frozen["exact_copy"])
    np.testing.assert_array_equal(frozen["changed_accuracy"], [0, 0, 0])


def test_a_toy_learnt_by_heart_is_measured_as_perfect(toy, monkeypatch):
    """All of measure(), on a model that knows the toy: the real one is replaced by the toy's rules, and a policy's
    rollouts by the real steps.
    """
    args, T = toy.args, 25
    steps = jax.tree.map(lambda leaf: np.asarray(leaf).swapaxes(0, 1), toy.windows(8, T, seed=11))  # [T, B]
    steps = steps.replace(dones=steps.dones & (np.arange(T) % 7 == 6)[:, None])
    flat = np.zeros(steps.actions.shape, bool)
    position = np.zeros((*flat.shape, 2), int)
    real = quality.HeldOut(steps, flat, flat, position, flat, np.zeros(steps.tokens.shape, bool))

    def predict(args, vocab, params, size, part):
        happened = [(part.rewards >= 0.5)[:, :-1].astype(float), part.dones[:, :-1].astype(float)]
        return quality.Prediction(part.tokens[:, 1:], np.zeros(part.tokens[:, 1:].shape), *happened)

    def imagine(args, vocab, policy, params, codebook, part, key):
        assert part.actions.shape == (args.wm_batch_size, args.burn_in + 1)
        ones = jnp.ones((args.imagination_steps, len(part.actions)))
        return SimpleNamespace(rewards=ones, dones=0 * ones, actions=0 * ones)

    monkeypatch.setattr(quality, "predict", predict)
    monkeypatch.setattr(quality, "imagine", imagine)
    monkeypatch.setattr(twm, "replay_actions", lambda args, vocab, given, params, size, part, key: part.tokens)
    state = SimpleNamespace(codebook=toy.codebook, wm_average=None, policy=None)
    metrics, curves, frames = quality.measure(args, state, real, jax.random.PRNGKey(0))
    assert metrics["cells"]["all"]["accuracy"] == metrics["frames"]["all"]["accuracy"] == 1
    assert metrics["steps"] == 8 * T and metrics["episodes"] == steps.dones.sum()
    for event, happened in (("reward", steps.rewards[:24] >= 0.5), ("done", steps.dones[:24])):
        assert metrics[event]["steps"] == happened.size and metrics[event]["events"] == happened.sum() > 0
        assert metrics[event]["precision"] == metrics[event]["recall"] == 1 and metrics[event]["brier"] == 0
    doing = {name: row["true"] for name, row in metrics["actions"].items() if row["true"] is not None}
    assert doing == {name: metrics["actions"][name]["promised"] for name in doing} and max(doing.values()) > 0
    assert metrics["actions"]["NOOP"]["imagined_share"] == metrics["actions"]["NOOP"]["imagined"] == 1
    assert 0 < metrics["frames"]["all"]["count"] < 8 * 24  # windows with an end are left out
    assert (curves["exact"] == 1).all() and (curves["copy"] < 1).any()
    assert (curves["imagined_reward_rate"] == 1).all() and (curves["imagined_done_rate"] == 0).all()
    starts = np.arange(0, T - args.burn_in - 2, args.imagination_steps) + args.burn_in
    for t in range(args.imagination_steps):
        assert curves["real_reward_rate"][t] == pytest.approx((steps.rewards[starts + t] >= 0.5).mean())
        assert curves["real_done_rate"][t] == pytest.approx(steps.dones[starts + t].mean())
    np.testing.assert_array_equal(frames[:, 0], frames[:, 1])


# --- The command ---
def test_a_run_folder_is_measured_from_the_command_line(smoke_run, tmp_path, monkeypatch, capsys):
    written = {}
    monkeypatch.setattr(quality.results, "commit_of", lambda script: None)
    monkeypatch.setattr(quality.results, "write", lambda *parts: written.update(zip("ncrs", parts, strict=True)))
    flags = ["--num-envs", "4", "--num-steps", "6", "--name", "try", "--media", str(tmp_path)]
    quality.main([str(smoke_run.folder), *flags])
    assert written["c"][0].startswith(f"python benchmark/world_model_quality.py runs/{smoke_run.folder.name} --num")
    (run,) = json.loads(json.dumps(written["r"], allow_nan=False))
    args = twm.PRESETS["smoke"]
    assert run["label"] == "twm_dyna_craftax__smoke" and run["seed"] == 1 and run["steps"] == args.total_steps
    assert [*written["s"]] == [f"twm_dyna_craftax__smoke, seed 1, at {args.total_steps} steps"]
    assert run["metrics"]["steps"] == 24 and run["metrics"]["codes"] > 0
    assert all(len(run["curve"][key]) == args.context for key in ("accuracy", "exact", "imagined_reward_rate"))
    assert "changed" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"try.gif", "try_strips.png", "try_curves.png"}
    gif, strips = imageio.imread(tmp_path / "try.gif"), imageio.imread(tmp_path / "try_strips.png")
    assert gif.shape[1:3] == (2 * 134, 4 * 134) and 1 < len(gif) <= 5 * (args.context + 1)  # equal frames are joined
    assert strips.shape == (8 * 134, (args.context + 1) * 134, 3)
    green, red = (40, 160, 60), (220, 40, 40)
    assert (strips[::134, ::134] == green).all(-1).tolist() == [[True] * 5, [True] + [False] * 4] * 4
    assert (strips[134::268, 134::134] == red).all()


def test_what_cannot_be_measured_ends_with_a_sentence(smoke_run, tmp_path):
    for folder, flags, sentence in (
        (tmp_path, [], "args.json cannot be used"),
        (smoke_run.folder, ["--num-steps", "5"], "--num-steps 5 holds no window: give at least 6"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            quality.main([str(folder), *flags, "--media", str(tmp_path)])

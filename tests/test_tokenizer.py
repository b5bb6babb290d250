"""The nearest-neighbour tokenizer against the sequential greedy rule, written as a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import twm_dyna_craftax as twm

LIMIT = 0.75 * 255**2  # the paper's squared distance, on pixels of 0..255


def patches_of(frames):
    """UInt8[T, B, 63, 63, 3] -> Int[T, B * 81, 147], in the order (environment, row, column) of every step."""
    steps, batch = frames.shape[:2]
    cells = np.asarray(frames).astype(np.int64).reshape(steps, batch, 9, 7, 9, 7, 3).transpose(0, 1, 2, 4, 3, 5, 6)
    return cells.reshape(steps, batch * 81, 147)


def greedy(frames, codes, capacity):
    """[TWM] the rule itself: patch by patch, each compared with the codes so far, in whole numbers. A step's tokens are
    read when all of its patches have been offered. Returns the codes and the tokens [T, B, 81].
    """
    codes, tokens = [np.asarray(code, np.int64) for code in codes], []
    for patches in patches_of(frames):
        for patch in patches:
            nearest = min((np.square(patch - np.array(codes)).sum(-1)).min(), np.inf) if codes else np.inf
            if nearest > LIMIT and len(codes) < capacity:
                codes.append(patch)
        table = np.array(codes)
        tokens.append([np.square(patch - table).sum(-1).argmin() for patch in patches])  # argmin: the first of equals
    return np.array(codes, np.uint8).reshape(-1, 147), np.array(tokens).reshape(*frames.shape[:2], 81)


def empty(args, codes=()):
    table = np.zeros((args.codebook_size, 147), np.uint8)
    table[: len(codes)] = np.asarray(codes, np.uint8).reshape(-1, 147)
    return twm.Codebook(jnp.asarray(table), jnp.int32(len(codes)))


def in_use(codebook):
    return np.asarray(codebook.codes)[: int(codebook.size)]


@pytest.fixture(scope="module")
def craftax_frames(rollouts):
    """By day and by night: UInt8[72, 4, 63, 63, 3]."""
    return np.concatenate([one.rollout.frames for one in rollouts.all])


@pytest.fixture(scope="module")
def random_frames():
    """Patches around 60 prototypes, with noise such that many are about as far apart as the limit."""
    rng = np.random.default_rng(0)
    prototypes = rng.integers(40, 216, (60, 147))
    patches = prototypes[rng.integers(0, 60, 12 * 3 * 81)] + rng.normal(scale=13, size=(12 * 3 * 81, 147))
    frames = np.clip(patches, 0, 255).astype(np.uint8).reshape(12, 3, 9, 9, 7, 7, 3).transpose(0, 1, 2, 4, 3, 5, 6)
    return frames.reshape(12, 3, 63, 63, 3)


def test_growth_equals_the_greedy_loop_on_craftax_frames(tiny, craftax_frames):
    args = tiny()
    codes, tokens = greedy(craftax_frames, [], args.codebook_size)
    assert 30 < len(codes) < args.codebook_size  # the frames are varied, and there is room for all
    codebook, result = twm.grow_codebook(args, empty(args), craftax_frames)
    np.testing.assert_array_equal(in_use(codebook), codes)
    np.testing.assert_array_equal(result, tokens)
    assert result.dtype == jnp.uint16


@pytest.mark.parametrize(
    "capacity", [2000, 300, 100]
)  # room for all; full amid the second chunk of a search; full early
def test_growth_equals_the_greedy_loop_on_random_patches(tiny, random_frames, capacity):
    args = tiny(codebook_size=capacity)
    codes, tokens = greedy(random_frames, [], capacity)
    assert (len(codes) == capacity) == (capacity < 2000)
    codebook, result = twm.grow_codebook(args, empty(args), random_frames)
    np.testing.assert_array_equal(in_use(codebook), codes)
    np.testing.assert_array_equal(result, tokens)


def test_growth_does_not_depend_on_how_frames_are_split_over_calls(tiny, random_frames):
    args = tiny(codebook_size=2000)
    whole, tokens = twm.grow_codebook(args, empty(args), random_frames)
    codebook, parts = empty(args), []
    for part in (random_frames[:4], random_frames[4:5], random_frames[5:]):
        codebook, one = twm.grow_codebook(args, codebook, part)
        parts.append(one)
    np.testing.assert_array_equal(codebook.codes, whole.codes)
    np.testing.assert_array_equal(np.concatenate(parts), tokens)
    # and not on how many environments a step holds, so far as codes go
    one_by_one, _ = twm.grow_codebook(args, empty(args), random_frames.reshape(-1, 1, 63, 63, 3))
    np.testing.assert_array_equal(one_by_one.codes, whole.codes)


def test_every_patch_is_within_the_limit_of_its_code_while_there_is_room(tiny, random_frames):
    args = tiny(codebook_size=2000)
    codebook, tokens = twm.grow_codebook(args, empty(args), random_frames)
    codes = np.asarray(codebook.codes, np.int64)
    distance = (
        np.square(patches_of(random_frames) - codes[np.asarray(tokens).reshape(len(tokens), -1)]).sum(-1) / 255**2
    )
    assert distance.max() <= 0.75
    assert distance.max() > 0.6  # the limit is nearly reached, so a smaller one would show
    between = np.square(in_use(codebook)[:, None].astype(np.int64) - in_use(codebook)[None]).sum(-1) / 255**2
    assert between[~np.eye(len(between), dtype=bool)].min() > 0.75


def test_a_patch_exactly_at_the_limit_is_not_added(tiny):
    args, frames = tiny(), np.zeros((1, 1, 63, 63, 3), np.uint8)
    frames[0, 0, 0, 7:12, 0] = 220, 19, 2, 1, 1  # 220^2 + 19^2 + 2^2 + 1 + 1 + 1 = 48,768 <= 48,768.75
    frames[0, 0, 0, 12, 0] = 1
    assert twm.grow_codebook(args, empty(args), frames)[0].size == 1
    frames[0, 0, 0, 13, 0] = 1  # 48,769
    codebook, tokens = twm.grow_codebook(args, empty(args), frames)
    assert codebook.size == 2 and tokens[0, 0].tolist() == [0, 1] + [0] * 79


def test_codes_never_change_and_a_full_codebook_is_frozen(tiny, random_frames):
    args = tiny(codebook_size=100)
    first, _ = twm.grow_codebook(args, empty(args), random_frames[:1, :1])
    assert 0 < first.size < 100
    full, _ = twm.grow_codebook(args, first, random_frames)
    assert full.size == 100 and len(full.codes) == 100
    np.testing.assert_array_equal(full.codes[: first.size], in_use(first))
    noise = np.random.default_rng(1).integers(0, 256, (2, 3, 63, 63, 3), np.uint8)
    after, tokens = twm.grow_codebook(args, full, noise)
    np.testing.assert_array_equal(after.codes, full.codes)
    assert after.size == 100
    _, expected = greedy(noise, in_use(full), 100)  # far from every code, they get the nearest one
    np.testing.assert_array_equal(tokens, expected)
    assert np.square(patches_of(noise)[0, 0] - in_use(full).astype(int)).sum(-1).min() > LIMIT


def test_encoding_a_decoded_frame_gives_its_tokens(tiny, random_frames):
    args = tiny(codebook_size=2000)
    codebook, _ = twm.grow_codebook(args, empty(args), random_frames)
    tokens = np.random.default_rng(2).integers(0, int(codebook.size), (2, 3, 81))
    frames = twm.decode(codebook, jnp.asarray(tokens.reshape(6, 81))).reshape(2, 3, 63, 63, 3)
    assert frames.dtype == jnp.uint8
    np.testing.assert_array_equal(patches_of(frames).reshape(2, 3, 81, 147), np.asarray(codebook.codes)[tokens])
    after, encoded = twm.grow_codebook(args, codebook, frames)
    np.testing.assert_array_equal(encoded, tokens)
    assert after.size == codebook.size


@pytest.mark.parametrize(
    "pair", [(0, 1), (3, 290), (255, 256), (40, 44)]
)  # in one chunk of the search, in two, in both
def test_ties_go_to_the_first_code(tiny, pair):
    args = tiny(codebook_size=300)
    codes = np.full((300, 147), 255, np.uint8)
    codes[pair[0]], codes[pair[1]] = 0, 0
    codes[pair[0], 0], codes[pair[1], 1] = 10, 10  # both at 100 from a patch of zeros
    distance, index = twm.nearest_code(empty(args, codes), jnp.zeros((2, 147)))
    assert index.tolist() == [pair[0]] * 2 and distance.tolist() == [100] * 2


def test_rows_beyond_the_size_are_not_codes(tiny):
    args = tiny(codebook_size=300)
    codebook = empty(args, np.full((280, 147), 200, np.uint8)).replace(size=jnp.int32(270))
    distance, index = twm.nearest_code(codebook, jnp.zeros((1, 147)))  # rows from 280 on are all zeros: nearer, unused
    assert index.tolist() == [0] and distance.tolist() == [147 * 200**2]


@pytest.mark.parametrize("size, expected", [(0, 256), (1, 256), (256, 256), (257, 512), (1025, 2048), (3000, 4000)])
def test_the_vocabulary_is_a_power_of_two_that_holds_all_codes(tiny, size, expected):
    codebook = twm.Codebook(jnp.zeros((1, 147), jnp.uint8), jnp.int32(size))
    assert twm.live_vocabulary(tiny(codebook_size=4000), codebook) == expected


def test_tokens_are_exact_in_float32():
    """Distances are differences of sums up to 147 x 255^2 = 9.6 million, which float32 holds exactly, as it must:
    squares of whole numbers below 2^24.
    """
    rng = np.random.default_rng(3)
    codes, patches = rng.integers(0, 256, (200, 147)), rng.integers(0, 256, (500, 147))
    codebook = twm.Codebook(jnp.asarray(codes, jnp.uint8), jnp.int32(200))
    distance, index = jax.jit(twm.nearest_code)(codebook, jnp.asarray(patches, jnp.float32))
    exact = np.square(patches[:, None] - codes[None]).sum(-1)
    np.testing.assert_array_equal(distance, exact.min(-1))
    np.testing.assert_array_equal(index, exact.argmin(-1))

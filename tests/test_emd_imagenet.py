"""emd_imagenet.py: known answers of the estimator on analytic objects, networks, contracts, and the command line.
Reference numbers come from closed forms, quadrature or a second way of computing; statistical bounds are 3 or 4 s.e.
"""

import dataclasses
import functools
import gzip
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import types
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    assert_golden,
    assert_same_tensors,
    assert_two_processes_equal_one,
    documented_keys,
    metrics_of,
    only,
    start_two_processes,
)
from torch import nn

import emd_imagenet as emd

UNCLIPPED = 1e9
STATE = ("score", "average", "adam_generator", "adam_score")  # and the generator
ACCELERATOR = emd.Accelerator(cpu=True)


def settings(**changes):
    return dataclasses.replace(emd.PRESETS["smoke"], **{"z_clip": UNCLIPPED, **changes})


def normal_from(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda like: torch.randn(like.shape, generator=generator, dtype=like.dtype)


def mixture(seed=0, components=5, dims=3, std=0.3):
    random = np.random.default_rng(seed)
    means = torch.tensor(random.normal(size=(components, dims)))
    weights = torch.tensor(random.dirichlet(np.full(components, 2.0)))
    return emd.GaussianMixture(means, std, weights)


def log_prob(q, y, sigma):
    """ln of a mixture's density after noise sigma, at y Float[B, D]: Float[B]."""
    variance = sigma.reshape(-1, 1) ** 2 + q.std**2
    squares = (y[:, None] - q.means).pow(2).sum(2)
    logits = q.log_weights - squares / (2 * variance) - 0.5 * y.shape[1] * (2 * math.pi * variance).log()
    return logits.logsumexp(1)


def slope(function, at, h=3e-4):
    """Gradient Float[B, D] of a function Float[B, D] -> Float[B], by fourth-order finite differences."""
    columns = []
    for axis in torch.eye(at.shape[1], dtype=at.dtype) * h:
        near, far = function(at + axis) - function(at - axis), function(at + 2 * axis) - function(at - 2 * axis)
        columns.append((8 * near - far) / (12 * h))
    return torch.stack(columns, 1)


# --- T1: conversions ---
@pytest.mark.parametrize("s", [0.1, 0.75, 5.0])
def test_the_mixtures_denoiser_gives_the_score_of_its_density(s):
    q, sigma = mixture(), torch.tensor([[s]], dtype=torch.float64)
    alpha, noise = 1 / math.sqrt(1 + s * s), s / math.sqrt(1 + s * s)
    x = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    d = q(x / alpha, sigma)
    score = slope(lambda u: log_prob(q, u / alpha, sigma), x)  # alpha is constant: its log-determinant has no slope
    torch.testing.assert_close((alpha * d - x) / noise**2, score, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("vp", [False, True])
def test_raw_outputs_of_a_mixture_mean_its_score_and_their_difference_that_of_denoisers(vp):
    """In float64, at 1e-9: F of [EDM] Table 1 with sigma_data 0.5, or eps of the VP row, from one exact denoiser."""
    q, p, labels = mixture(0), mixture(1), torch.zeros(20, dtype=torch.long)
    teacher, score = (emd.Denoiser(settings(vp=vp), None, exact) for exact in (q, p))
    y = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for s in (0.1, 0.75, 5.0):
        sigma = torch.full((20, 1), s, dtype=torch.float64)
        score_of_y = slope(lambda v, sigma=sigma: log_prob(q, v, sigma), y)
        raw = teacher.raw(y, sigma, labels)
        d = y - s * raw if vp else (0.25 * y + 0.5 * s * math.sqrt(s**2 + 0.25) * raw) / (s**2 + 0.25)
        torch.testing.assert_close((d - y) / s**2, score_of_y, atol=1e-9, rtol=1e-9)
        delta = emd.denoiser_difference(teacher, score, y, sigma, labels, None)
        torch.testing.assert_close(delta, q(y, sigma) - p(y, sigma), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("vp", [False, True])
def test_difference_of_raw_outputs_is_the_difference_of_denoisers(vp):
    args, teacher, score = tiny(vp=vp)
    _, z, eps, sigma, labels = draw(args)
    y = 0.5 * z + sigma * eps
    delta = emd.denoiser_difference(teacher, score, y, sigma, labels, None)
    expected = teacher(y, sigma, labels) - score(y, sigma, labels)
    torch.testing.assert_close(delta, expected, atol=1e-5, rtol=1e-4)
    assert (delta.flatten(1).abs().amax(1) > 1e-3).all()


# --- T2: both drifts are gradients of log rho ---
@pytest.mark.parametrize("corrector", ["eps-z", "x-z"])
def test_drifts_are_the_gradients_of_log_rho(corrector):
    q, p, s = mixture(0), mixture(1), 0.6
    sigma = torch.full((8, 1), s, dtype=torch.float64)
    mix = torch.tensor(np.random.default_rng(3).normal(size=(3, 3)))
    z, eps = normal_from(4)(torch.zeros(2, 8, 3, dtype=torch.float64))

    def g(z):
        return torch.tanh(z @ mix) + 0.3 * z

    def log_q_over_p(y):
        return log_prob(q, y, sigma) - log_prob(p, y, sigma)

    def log_rho(u, z):  # u is eps, or y
        y = g(z) + s * u if corrector == "eps-z" else u
        noise = u if corrector == "eps-z" else (u - g(z)) / s
        return log_q_over_p(y) - 0.5 * noise.pow(2).sum(1) - 0.5 * z.pow(2).sum(1)

    args = settings(corrector=corrector, k=1, gamma_eps=1e-3, gamma_z=1e-3)
    chain = emd.e_step(g, lambda y, s: q(y, s) - p(y, s), z, eps, sigma, torch.zeros_like, args)
    if corrector == "eps-z":
        u, moved = eps, (chain.clean / s + chain.nu - eps) / 1e-3
    else:
        u = g(z) + s * eps
        moved = (chain.x + chain.clean + s * chain.nu - u) / (1e-3 * s * s)  # the step of y is gamma_eps s^2
    torch.testing.assert_close(moved, slope(lambda v: log_rho(v, z), u), atol=1e-8, rtol=1e-8)
    torch.testing.assert_close((chain.z - z) / 1e-3, slope(lambda v: log_rho(u, v), z), atol=1e-8, rtol=1e-8)


# --- T3: full cancellation without bookkeeping ---
@pytest.mark.parametrize("corrector", ["eps-z", "x-z", "eps", "x"])
@pytest.mark.parametrize("langevin", ["euler", "ou"])
def test_residual_recursion_equals_subtracting_the_recorded_noise(corrector, langevin):
    q, p, gamma = mixture(0), mixture(1), 0.16
    sigma = torch.full((8, 1), 0.6, dtype=torch.float64)
    scale = math.sqrt(2 * gamma if langevin == "euler" else 1 - (1 - gamma) ** 2)
    for k in range(1, 17):
        args = settings(corrector=corrector, langevin=langevin, k=k, gamma_eps=gamma, gamma_z=0.01)
        recorded, draw = [], normal_from(5)
        z, eps = draw(torch.zeros(2, 8, 3, dtype=torch.float64))

        def normal_like(like, recorded=recorded, draw=draw):
            recorded.append(draw(like))
            return recorded[-1]

        chain = emd.e_step(torch.tanh, lambda y, s: q(y, s) - p(y, s), z, eps, sigma, normal_like, args)
        noises = recorded[:: 2 if args.moves_z else 1]
        assert len(noises) == k
        nu = (1 - gamma) ** k * eps + sum(scale * (1 - gamma) ** (k - 1 - i) * n for i, n in enumerate(noises))
        x = torch.tanh(chain.z)
        r = {c: emd.residual(chain, x, dataclasses.replace(args, cancel=c)) for c in ("full", "last", "none")}
        torch.testing.assert_close(r["full"], r["none"] - sigma * nu, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(r["last"], r["none"] - sigma * scale * noises[-1], atol=1e-12, rtol=1e-12)


def test_the_x_z_chain_is_langevin_on_y_itself():
    """Written out in y: its step is gamma_eps s^2, and it stays where it is when z moves."""
    q, p, s, gamma, gamma_z = mixture(0), mixture(1), 0.6, 0.16, 0.01
    sigma, draw = torch.full((8, 1), s, dtype=torch.float64), normal_from(5)
    z0, eps = draw(torch.zeros(2, 8, 3, dtype=torch.float64))
    args = settings(corrector="x-z", k=5, gamma_eps=gamma, gamma_z=gamma_z, cancel="none")
    chain = emd.e_step(torch.tanh, lambda y, s: q(y, s) - p(y, s), z0, eps, sigma, normal_from(6), args)
    draw, z, y = normal_from(6), z0, torch.tanh(z0) + s * eps
    for _ in range(5):
        n, n_z = draw(y), draw(z)
        pull_y = (q(y, sigma) - p(y, sigma) - (y - torch.tanh(z))) / s**2
        pull_z = (1 - torch.tanh(z) ** 2) * (y - torch.tanh(z)) / s**2 - z
        y = y + gamma * s**2 * pull_y + s * math.sqrt(2 * gamma) * n
        z = z + gamma_z * pull_z + math.sqrt(2 * gamma_z) * n_z
    torch.testing.assert_close(chain.z, z, atol=1e-12, rtol=1e-12)
    r = emd.residual(chain, torch.tanh(chain.z), args)
    torch.testing.assert_close(r, y - torch.tanh(z), atol=1e-12, rtol=1e-12)


def test_moving_x_alone_is_moving_eps_alone():
    q, p, sigma = mixture(0), mixture(1), torch.full((8, 1), 0.6, dtype=torch.float64)
    z, eps = normal_from(5)(torch.zeros(2, 8, 3, dtype=torch.float64))
    residuals = []
    for corrector in ("eps", "x"):
        args = settings(corrector=corrector, k=7)
        chain = emd.e_step(torch.tanh, lambda y, s: q(y, s) - p(y, s), z, eps, sigma, normal_from(6), args)
        residuals.append(emd.residual(chain, chain.x, args))
    torch.testing.assert_close(*residuals, atol=1e-12, rtol=1e-12)


# --- T4: the estimator's mean and variance against quadrature ---
S, THETA = 0.75, (0.5, 0.6, 0.2)  # alpha 0.8, sigma 0.6
TARGET = emd.GaussianMixture(torch.tensor([[-1.2], [1.0]]).double(), 0.25, torch.tensor([0.35, 0.65]).double())
GRID = torch.linspace(-14, 14, 5601, dtype=torch.float64)  # steps of 0.005
QUADRATURE_Z = torch.linspace(-8, 8, 2001, dtype=torch.float64)


def basis(z):
    return torch.stack([z, torch.tanh(2 * z), torch.ones_like(z)], -1)


def toy_generator(z):
    return (basis(z[:, 0]) @ z.new_tensor(THETA))[:, None]


def student_log_density(theta, y):
    """ln of the student's density of level S, and its denoiser, by quadrature over z. y Float[N]."""
    x = basis(QUADRATURE_Z) @ theta
    log_weights = -0.5 * QUADRATURE_Z**2 + math.log(0.008 / math.sqrt(2 * math.pi))
    logits = log_weights - (y[:, None] - x) ** 2 / (2 * S * S) - 0.5 * math.log(2 * math.pi * S * S)
    return logits.logsumexp(1), logits.softmax(1) @ x


@pytest.fixture(scope="module")
def toy():
    """Exact gradients of both Kullback-Leibler divergences, and Delta as a table on GRID."""
    sigma = torch.tensor([[S]], dtype=torch.float64)
    d_phi = torch.cat([student_log_density(GRID.new_tensor(THETA), part)[1] for part in GRID.split(2000)])
    table = TARGET(GRID[:, None], sigma)[:, 0] - d_phi
    y = torch.linspace(-9, 9, 3601, dtype=torch.float64)
    log_q = log_prob(TARGET, y[:, None], sigma)
    gradients = []
    for forward in (True, False):
        theta = torch.tensor(THETA, dtype=torch.float64, requires_grad=True)
        log_p = student_log_density(theta, y)[0]
        kl = (log_q.exp() * (log_q - log_p)).sum() if forward else (log_p.exp() * (log_p - log_q)).sum()
        gradients.append(torch.autograd.grad(0.005 * kl, theta)[0])

    def difference(y, s):
        place = ((y[:, 0] + 14) * 200).clamp(0, 5599)
        low = place.long()
        return (table[low] + (place - low) * (table[low + 1] - table[low]))[:, None]

    return gradients[0], gradients[1], difference


def toy_gradients(difference, chains, seed=0, cancels=("none", "last", "full"), **changes):
    """Per-chain gradients -J^T r of the plain likelihood, Float[chains, 3] for each kind of cancellation."""
    args = settings(weight="nll", gamma_eps=changes.pop("gamma_eps", 0.16), **changes)
    normal, sigma = normal_from(seed), torch.full((1, 1), S, dtype=torch.float64)
    z, eps = normal(torch.zeros(2, chains, 1, dtype=torch.float64))
    chain = emd.e_step(toy_generator, difference, z, eps, sigma, normal, args)
    x, jacobian = toy_generator(chain.z), basis(chain.z[:, 0])
    return {c: -jacobian * emd.residual(chain, x, dataclasses.replace(args, cancel=c)) for c in cancels}


def standard_error(samples):
    return samples.std(0) / math.sqrt(len(samples))


def within(mean, expected, error, count=3.0):
    assert ((mean - expected).abs() < count * error).all(), f"{mean} is not {expected} within {count} x {error}"


def test_quadrature_reproduces_the_stated_gradients(toy):
    torch.testing.assert_close(toy[0], toy[0].new_tensor([-0.1372, -0.1212, 0.0337]), atol=1e-4, rtol=0)
    torch.testing.assert_close(toy[1], toy[1].new_tensor([-0.1193, -0.1111, 0.0185]), atol=1e-4, rtol=0)


def test_one_step_on_eps_gives_the_reverse_kl_gradient_at_a_fraction_of_the_noise(toy):
    g = toy_gradients(toy[2], 400_000, corrector="eps", k=1)
    within(g["full"].mean(0), 0.16 * toy[1], standard_error(g["full"]))
    for name in ("none", "last"):
        within(g[name].mean(0), g["full"].mean(0), standard_error(g[name] - g["full"]))
    assert g["full"].std(0)[0] / g["none"].std(0)[0] < 0.1
    assert g["full"].std(0)[0].item() == pytest.approx(0.074, abs=0.002)
    assert g["none"].std(0)[0].item() == pytest.approx(1.35, abs=0.02)
    assert g["last"].std(0)[0].item() == pytest.approx(1.12, abs=0.02)


def test_sixteen_steps_at_the_papers_ratio_agree_between_cancellations(toy):
    g = toy_gradients(toy[2], 400_000, k=16, gamma_z=1e-4)
    for name in ("none", "last"):
        within(g[name].mean(0), g["full"].mean(0), standard_error(g[name] - g["full"]))
    within(g["full"].mean(0), torch.tensor([-0.1156, -0.1055, 0.0296]).double(), standard_error(g["full"]), 4)
    assert g["full"].std(0)[0] / g["none"].std(0)[0] < 0.35


def test_sixteen_steps_on_eps_alone_agree_between_cancellations(toy):
    g = toy_gradients(toy[2], 400_000, corrector="eps", k=16)
    for name in ("none", "last"):
        within(g[name].mean(0), g["full"].mean(0), standard_error(g[name] - g["full"]))
    assert g["full"].std(0)[0] / g["none"].std(0)[0] < 0.35


def test_full_cancellation_is_biased_where_gamma_z_is_as_large_as_gamma_eps(toy):
    g = toy_gradients(toy[2], 400_000, k=16, gamma_z=0.16)
    within(g["last"].mean(0), g["none"].mean(0), standard_error(g["last"] - g["none"]))
    error = standard_error(g["full"] - g["none"])
    assert ((g["full"].mean(0) - g["none"].mean(0)).abs() / error)[:2].min() > 10
    within(g["full"].mean(0), torch.tensor([-0.093, -0.070, 0.041]).double(), standard_error(g["full"]) + 2e-4, 3)


def test_exact_cancellation_is_unbiased_where_full_is_not(toy):
    args = settings(weight="nll", k=16, gamma_eps=0.16, gamma_z=0.16, cancel="exact")
    normal, sigma = normal_from(0), torch.full((1, 1), S, dtype=torch.float64)
    z, eps = normal(torch.zeros(2, 400_000, 1, dtype=torch.float64))
    chain = emd.e_step(toy_generator, toy[2], z, eps, sigma, normal, args)
    theta = torch.tensor(THETA, dtype=torch.float64, requires_grad=True)
    loss, _ = emd.m_step_loss(lambda z: (basis(z[:, 0]) @ theta)[:, None], chain, args)
    x = toy_generator(chain.z)
    none = -basis(chain.z[:, 0]) * emd.residual(chain, x, dataclasses.replace(args, cancel="none"))
    removed = basis(chain.z0[:, 0]) * S * chain.nu / S**2
    within(torch.autograd.grad(loss, theta)[0], none.mean(0), standard_error(removed))


def test_exact_cancellation_is_full_cancellation_where_z_stays(toy):
    """The sign of what it takes off at z_0 does not show in a mean: nu and z_0 are independent."""
    sigma, found = torch.full((1, 1), S, dtype=torch.float64), {}
    for cancel in ("exact", "full"):
        args, normal = settings(corrector="eps", k=4, gamma_eps=0.16, cancel=cancel), normal_from(0)
        theta = torch.tensor(THETA, dtype=torch.float64, requires_grad=True)
        z, eps = normal(torch.zeros(2, 50, 1, dtype=torch.float64))

        def g(z, theta=theta):
            return (basis(z[:, 0]) @ theta)[:, None]

        loss, _ = emd.m_step_loss(g, emd.e_step(g, toy[2], z, eps, sigma, normal, args), args)
        found[cancel] = torch.autograd.grad(loss, theta)[0]
    torch.testing.assert_close(found["exact"], found["full"], rtol=1e-12, atol=1e-12)


def test_a_long_chain_gives_the_forward_kl_gradient(toy):
    g = toy_gradients(toy[2], 60_000, k=1000, gamma_eps=0.02, gamma_z=0.002)
    for name in ("none", "last"):
        within(g[name].mean(0), toy[0], standard_error(g[name]))


# --- T5: the fixed point ---
def test_a_perfect_student_stays_where_it_is():
    target = emd.GaussianMixture(torch.tensor([[0.3, -0.4]]).double(), 0.5)
    cos, sin = math.cos(0.7), math.sin(0.7)
    perfect, sigma = (torch.tensor(x, dtype=torch.float64) / 2 for x in ([[cos, -sin], [sin, cos]], [[1.2]]))
    a, b = perfect.clone().requires_grad_(), target.means[0].clone().requires_grad_()
    optimizer, normal, args = torch.optim.SGD([a, b], 0.1), normal_from(1), settings(k=4, gamma_z=0.016)

    def g(z):
        return z @ a.T + b

    def chain_of(z, eps):
        cov, mean = a.detach() @ a.detach().T, b.detach()
        gain = cov @ torch.linalg.inv(cov + sigma**2 * torch.eye(2))  # of the student's own denoiser, as it is now
        return emd.e_step(g, lambda y, s: target(y, s) - mean - (y - mean) @ gain.T, z, eps, sigma, normal, args)

    for _ in range(200):
        chain = chain_of(*normal(torch.zeros(2, 64, 2).double()))
        loss, r = emd.m_step_loss(g, chain, args)
        assert r.abs().max() < 1e-12
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(a.detach(), perfect, atol=1e-12, rtol=0)
    noisy = emd.residual(chain, g(chain.z), dataclasses.replace(args, cancel="none"))
    within(noisy.mean(0), torch.zeros(2), standard_error(noisy), 4)
    assert noisy.std() > 0.5
    a.data *= 0.7  # no longer perfect
    assert emd.m_step_loss(g, chain_of(*normal(torch.zeros(2, 64, 2).double())), args)[1].abs().max() > 0.1


# --- T6: mode covering, against closed forms ---
TWO_MODES = emd.GaussianMixture(torch.tensor([[-1.0], [1.0]]).double(), 0.15)


def fit_linear(s, k, gamma_z, cancel, steps, lr=0.1, count=2000, target=TWO_MODES, a=0.15, b=0.9, **changes):
    """Distil `target` into A z + b with the student's exact denoiser; A and b, means of the last quarter."""
    dims = target.means.shape[1]
    a, b = a * torch.eye(dims, dtype=torch.float64), torch.full((dims,), b, dtype=torch.float64)
    args, normal = settings(k=k, gamma_eps=0.16, gamma_z=gamma_z, cancel=cancel, **changes), normal_from(0)
    sigma, eye, history = torch.full((1, 1), s, dtype=torch.float64), torch.eye(dims, dtype=torch.float64), []
    for _ in range(steps):
        z, eps = normal(torch.zeros(2, count, dims, dtype=torch.float64))
        cov = a @ a.T
        gain = cov @ torch.linalg.inv(cov + s * s * eye)

        def g(z, a=a, b=b):
            return z @ a.T + b

        def difference(y, level, b=b, gain=gain):
            return target(y, level) - b - (y - b) @ gain.T

        chain = emd.e_step(g, difference, z, eps, sigma, normal, args)
        r = emd.residual(chain, g(chain.z), args) / (1 - (1 - 0.16) ** k)
        a, b = a + lr * r.T @ chain.z / count, b + lr * r.mean(0)
        history.append((a, b, chain.logs["z_clipped_share"].mean()))
    tail = history[-max(1, steps // 4) :]
    return [torch.stack(part).mean(0).squeeze() for part in zip(*tail, strict=True)]


@pytest.mark.parametrize(("s", "a", "b"), [(0.3, 0.168, 0.994), (0.4, 0.888, 0.0), (0.6, 0.931, 0.0)])
def test_one_step_finds_the_reverse_kl_optimum(s, a, b):
    found = fit_linear(s, 1, 0.0, "full", 1500)
    assert abs(found[0].abs() - a) < 0.03
    assert abs(found[1] - b) < 0.03


@pytest.mark.parametrize("s", [0.4, 0.6])
def test_long_chains_match_moments(s):
    a, b, _ = fit_linear(s, 64, 0.016, "last", 200, lr=0.2)
    assert abs(a.abs() - math.sqrt(1 + 0.15**2)) < 0.04
    assert abs(b) < 0.04


def test_long_chains_leave_the_mode_that_one_step_is_stuck_on():
    assert fit_linear(0.3, 1, 0.0, "full", 600)[0].abs() < 0.25
    assert fit_linear(0.3, 16, 0.016, "last", 500, lr=0.2)[0].abs() > 0.9


def test_long_chains_match_moments_in_two_dimensions():
    means = torch.tensor([[-1.0, -0.3], [1.0, 0.3], [-0.6, 0.9], [0.6, -0.9]]).double()
    a, b, _ = fit_linear(0.5, 24, 0.016, "last", 200, lr=0.2, target=emd.GaussianMixture(means, 0.15), a=0.6, b=0.2)
    expected = means.T @ means / 4 + 0.15**2 * torch.eye(2)
    torch.testing.assert_close(a @ a.T, expected, atol=0.05, rtol=0)
    assert b.abs().max() < 0.04


def test_the_guard_on_the_drift_of_z_fires_where_the_chain_would_explode():
    assert not fit_linear(0.3, 16, 0.16, "full", 300)[0].abs() < 1e6
    a, _, share = fit_linear(0.3, 16, 0.16, "full", 300, z_clip=0.1)
    assert a.abs() < 2 and share > 0


# --- Networks ---
def tiny(**changes):
    """A teacher and a student score network that differ, of the smoke preset's UNet, and its settings."""
    args = settings(**changes)
    teacher, score = (emd.Denoiser(args, emd.make_unet(args)).eval() for _ in range(2))
    for seed, net in enumerate((teacher, score)):
        generator = torch.Generator().manual_seed(seed)
        for p in net.parameters():
            p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return args, teacher.requires_grad_(False), score


def draw(args, count=6, seed=0):
    noise = emd.Noise("cpu", seed)
    z = noise.normal(count, *args.image_shape)
    return noise, z, noise.normal_like(z), emd.draw_sigma(args, noise, count), torch.arange(count) % 10


def players(args, teacher, generator, score, labels, mask_seed=None):
    g = functools.partial(emd.generate, generator, labels=labels, sigma_star=args.sigma_star)
    return g, functools.partial(emd.denoiser_difference, teacher, score, labels=labels, mask_seed=mask_seed)


def test_one_step_on_eps_is_diff_instruct():
    args, teacher, score = tiny(corrector="eps", k=1, gamma_eps=0.16)
    noise, z, eps, sigma, labels = draw(args)
    student = emd.make_student(args, teacher)
    generator, difference = players(args, teacher, student, score, labels)
    chain = emd.e_step(generator, difference, z, eps, sigma, noise.normal_like, args)
    emd.m_step_loss(generator, chain, args)[0].backward()
    found = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    x = student(args.sigma_star * z, torch.full((6, 1, 1, 1), args.sigma_star), labels)
    y = (x + sigma * eps).detach()
    with torch.no_grad():
        direction = score(y, sigma, labels) - teacher(y, sigma, labels)
    (x * direction).sum().div(6).backward()
    for a, p in zip(found, student.parameters(), strict=True):
        torch.testing.assert_close(a, 0.16 * p.grad, rtol=1e-3, atol=1e-6)
    assert max(a.abs().max() for a in found) > 1e-3


def test_the_first_generator_is_the_teacher_at_lambda_star_on_scaled_noise():
    args, teacher, _ = tiny(lambda_star=-6.0)
    _, z, _, _, labels = draw(args)
    state = emd.init_state(args, teacher)
    expected = teacher(20.0855 * z, torch.full((6, 1, 1, 1), 20.0855), labels)
    for name in ("generator", "average"):
        found = emd.generate(state[name], z, labels, args.sigma_star)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("corrector", ["eps-z", "eps", "x"])  # in x-z, z leaves its y behind: not zero, but of mean 0
def test_at_the_start_the_generator_gets_no_gradient(corrector):
    args, teacher, _ = tiny(corrector=corrector, k=3, dropout=0.1)
    state = emd.init_state(args, teacher)
    noise, z, eps, sigma, labels = draw(args)
    g, difference = players(args, teacher, state["generator"], state["score"], labels, mask_seed=3)
    chain = emd.e_step(g, difference, z, eps, sigma, noise.normal_like, args)
    emd.m_step_loss(g, chain, args)[0].backward()
    assert chain.logs["delta_rms"].max() == 0
    assert all(not p.grad.any() for p in state["generator"].parameters())


def test_dropout_masks_are_shared_and_drop():
    args, teacher, _ = tiny(dropout=0.3)
    twin = emd.make_student(args, teacher)
    _, z, eps, sigma, labels = draw(args)
    y = z + sigma * eps
    assert not emd.denoiser_difference(teacher, twin, y, sigma, labels, 5).any()
    masked, other = teacher(y, sigma, labels, 5), teacher(y, sigma, labels, 6)
    assert not torch.allclose(masked, other) and not torch.allclose(masked, teacher(y, sigma, labels))


def test_beside_an_exact_teacher_there_are_no_masks():
    """It has none to share, so those of the student score network would be noise in Delta."""
    args = settings(dropout=0.3, teacher="gmm", train_teacher=False)
    teacher = emd.load_teacher(args, "gmm")
    score = emd.make_student(args, teacher)
    torch.nn.init.normal_(score.unet.conv_out.weight)  # it starts at 0
    _, z, eps, sigma, labels = draw(args)
    one, other = (emd.denoiser_difference(teacher, score, z + sigma * eps, sigma, labels, seed) for seed in (5, 6))
    assert one.any() and torch.equal(one, other)


def test_the_preconditioned_network_is_the_formula():
    args, teacher, _ = tiny()
    _, z, eps, sigma, labels = draw(args)
    y = z + sigma * eps
    raw = teacher.unet(y / (sigma**2 + 0.25).sqrt(), 250 * sigma.log().flatten(), labels).sample
    c_out = 0.5 * sigma / (sigma**2 + 0.25).sqrt()
    torch.testing.assert_close(teacher(y, sigma, labels), 0.25 / (sigma**2 + 0.25) * y + c_out * raw)
    x = 0.1 * eps
    loss, twin = emd.denoising_loss(args, teacher, x, labels, emd.Noise("cpu", 5)), emd.Noise("cpu", 5)
    mask_seed, sigma = int(twin.integers(2**31, 1)), emd.draw_sigma(args, twin, len(x))
    error = (teacher(x + sigma * twin.normal_like(x), sigma, labels, mask_seed) - x).pow(2).sum((1, 2, 3))
    torch.testing.assert_close(loss, (error * ((sigma**2 + 0.25) / (0.5 * sigma) ** 2).flatten()).mean())


def test_a_guided_diffusion_network_is_the_vp_row():
    """Its 1000 linear steps, D = (x_t - sigma eps) / alpha in the teacher's own variables, and half of its outputs."""
    _, teacher, _ = tiny(vp=True)
    steps = torch.tensor([0, 10, 500, 999])
    alpha = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0).sqrt()[steps].float()
    noise, labels = (1 - alpha**2).sqrt(), torch.arange(4)
    x_t = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    alpha, noise = alpha.view(4, 1, 1, 1), noise.view(4, 1, 1, 1)
    out = teacher.unet(x_t, steps, labels).sample
    assert out.shape == (4, 2, 8, 8)
    expected = (x_t - noise * out[:, :1]) / alpha
    torch.testing.assert_close(teacher(x_t / alpha, noise / alpha, labels), expected, rtol=1e-3, atol=1e-3)
    time = emd.precondition(torch.tensor([1e-3, 0.5, 1e3]), vp=True)[3]
    assert time[0] == 0 and time[2] == 999 and 0 < time[1] < 999


def test_bf16_difference_is_close_to_fp32_and_no_cast_weight_outlives_its_layer():
    args, teacher, score = tiny()
    caches = set()
    teacher.unet.conv_out.register_forward_hook(lambda *how: caches.add(torch.is_autocast_cache_enabled()))
    _, z, eps, sigma, labels = draw(args, 32)
    y = z * 0.5 + sigma * eps
    exact = emd.denoiser_difference(teacher, score, y, sigma, labels, None)
    teacher.bf16 = score.bf16 = True
    rounded = emd.denoiser_difference(teacher, score, y, sigma, labels, None)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.02
    assert caches == {False}


def test_heun_samples_a_gaussian():
    target = emd.GaussianMixture(torch.tensor([[0.3, -0.2, 0.1, 0.5]]), 0.4)
    z = torch.randn(20_000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    evaluations = []
    x = emd.heun(lambda y, s: evaluations.append(s) or target(y, s), z, 32).flatten(1)
    assert len(evaluations) == 63
    torch.testing.assert_close(x.mean(0), target.means[0], atol=0.02, rtol=0)
    torch.testing.assert_close(x.std(0), torch.full((4,), 0.4), atol=0.02, rtol=0)


def test_the_average_ramps_up_to_its_half_life():
    args = settings(ema=0.999, ema_ramp=0.05)
    assert emd.ema_decay(1, args) < 0.01
    assert emd.ema_decay(200, args) == pytest.approx(0.5 ** (1 / 10))
    assert emd.ema_decay(10**6, args) == pytest.approx(0.999)
    assert emd.ema_decay(1, settings(ema=0.999, ema_ramp=0)) == 0.999


def test_the_generators_step_size_falls_to_0_over_the_last_half(monkeypatch):
    rates, order = {"denoising": [], "generator": []}, []
    monkeypatch.setattr(emd, "accumulate", lambda *how: (order.append(how[2]), rates[how[2]].append(how[7])))
    monkeypatch.setattr(emd, "update_ema", lambda *nets: order.append("average"))
    state = dict.fromkeys(("generator", *STATE))
    for anneal in (False, True):
        args = settings(total_steps=8, generator_lr=0.1, score_lr=0.5, anneal_learning_rate=anneal)
        for step in range(1, 9):
            emd.train_iteration(args, None, state, step, None)
    constant, last_half = [0.1] * 8, [0.1, 0.075, 0.05, 0.025]
    assert rates["generator"] == pytest.approx(constant + [0.1] * 4 + last_half)
    assert rates["denoising"] == [0.5] * 16
    assert order == ["denoising", "generator", "average"] * 16


def test_a_chain_has_raised_noise_levels_and_a_dropout_mask_for_each_evaluation(monkeypatch):
    seen, seeds, args = [], [], settings(sigma_min=0.2)

    def chain(g, difference, z, eps, sigma, normal_like, args):
        seen.append(sigma.flatten())
        for _ in range(3):
            difference(z, sigma)
        raise StopIteration

    def draw_only(args, means, name, key, total, loss_of, optimizer, lr, clip=0.0):
        if name == "generator":
            loss_of(emd.Noise("cpu", 1), 20_000)

    monkeypatch.setattr(emd, "e_step", chain)
    monkeypatch.setattr(emd, "denoiser_difference", lambda *how: seeds.append(how[5]))
    monkeypatch.setattr(emd, "accumulate", draw_only)
    with pytest.raises(StopIteration):
        emd.train_iteration(args, None, {"generator": nn.Linear(1, 1)} | dict.fromkeys(STATE), 1, None)
    log_sigma = seen[0].log()
    assert log_sigma.min() == pytest.approx(math.log(0.2), abs=1e-6)
    least = 0.5 * (1 + math.erf((math.log(0.2) + 1.2) / 1.2 / math.sqrt(2)))  # of a normal draw to lie below
    assert (log_sigma <= math.log(0.2) + 1e-6).float().mean() == pytest.approx(least, abs=0.015)
    assert log_sigma.median() == pytest.approx(-1.2, abs=0.04)
    assert len(set(seeds)) == 3 and all(type(seed) is int for seed in seeds)


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_optimiser_is_adam_in_either_layout(channels_last):
    args, teacher, _ = tiny(channels_last=channels_last, beta2=0.9)
    state = emd.init_state(args, teacher)
    net, adam = state["generator"], state["adam_generator"]
    second = [torch.zeros_like(p) for p in net.parameters()]
    for update in range(1, 4):
        _, z, _, _, labels = draw(args, seed=update)
        emd.generate(net, z, labels, args.sigma_star).pow(2).mean().backward()
        before, grads = zip(*((p.detach().clone(), p.grad.clone()) for p in net.parameters()), strict=True)
        adam.param_groups[0]["lr"] = 1e-2
        adam.step(), adam.zero_grad()
        for p, old, grad, v in zip(net.parameters(), before, grads, second, strict=True):  # with beta1 = 0
            v.mul_(0.9).add_(0.1 * grad**2)
            expected = old - 1e-2 * grad / ((v / (1 - 0.9**update)).sqrt() + 1e-8)
            torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)


def test_an_optimiser_goes_on_exactly_in_the_other_layout(tmp_path):
    """Fused updates read a parameter and its moments in the order of memory, which --channels-last changes."""
    run, steps, after = emd.Run(settings(runs_dir=str(tmp_path)), 0, True), 0, {}
    for layout, other in ((False, False), (False, True), (True, False)):
        args, teacher, _ = tiny(channels_last=layout)
        state = emd.init_state(args, teacher)
        for update in range(1, 4):
            if update == 3:
                steps += 1
                emd.save_checkpoint(run.folder, steps, state)
                state = emd.init_state(*tiny(channels_last=other)[:2])
                emd.restore(run.folder, state, emd.load_checkpoint(run.folder)[1])
            net, adam = state["generator"], state["adam_generator"]
            _, z, _, _, labels = draw(args, seed=update)
            emd.generate(net, z, labels, args.sigma_star).pow(2).mean().backward()
            adam.param_groups[0]["lr"] = 1e-2
            adam.step(), adam.zero_grad()
        after[layout, other] = net.state_dict()
    for layouts in ((False, True), (True, False)):
        for name, value in after[False, False].items():
            torch.testing.assert_close(after[layouts][name], value, rtol=0, atol=1e-3)  # a tenth of an update


def test_an_update_takes_the_mean_over_its_micro_batches_and_clips_its_norm():
    weights, seen = nn.Parameter(torch.zeros(2)), []
    adam, means = torch.optim.SGD([weights], lr=1.0), emd.Means(ACCELERATOR)

    def loss_of(noise, count):
        seen.append(noise.normal(count, 2))
        return (weights * seen[-1]).sum(1).mean()

    for clip in (0.0, 0.1):
        before = weights.detach().clone()
        emd.accumulate(settings(micro_batch_size=3), means, "generator", (2, 1), 12, loss_of, adam, 0.5, clip)
        assert [len(part) for part in seen] == [3] * 4  # each with noise of its own
        mean, seen = torch.cat(seen).mean(0), []
        expected = mean * min(1.0, clip / mean.norm()) if clip else mean
        torch.testing.assert_close(before - weights.detach(), 0.5 * expected, rtol=1e-4, atol=1e-6)
        assert means.take()["losses/generator_grad_norm"] == pytest.approx(float(mean.norm()), rel=1e-4)
        assert weights.grad is None


def adm_forward(weights, x, timestep, labels, config, per_head):
    """A UNet of the ADM layout written out from OpenAI-format weights, for the key map to be compared with. Attention:
    heads of 64 channels and (three, head, channel) as in the EDM weights, or four and (head, three, channel).
    """
    f, groups = nn.functional, config["norm_num_groups"]
    pair = lambda name: (weights[name + ".weight"], weights[name + ".bias"])  # noqa: E731
    norm = lambda h, name: f.group_norm(h, groups, *pair(name), eps=1e-5)  # noqa: E731

    def block(h, name, resize=None):
        inner = f.silu(norm(h, name + ".in_layers.0"))
        if resize:
            inner, h = resize(inner), resize(h)
        inner = f.conv2d(inner, *pair(name + ".in_layers.2"), padding=1)
        scale, shift = f.linear(f.silu(emb), *pair(name + ".emb_layers.1"))[:, :, None, None].chunk(2, 1)
        inner = f.silu(norm(inner, name + ".out_layers.0") * (1 + scale) + shift)
        skip = f.conv2d(h, *pair(name + ".skip_connection")) if name + ".skip_connection.weight" in weights else h
        return skip + f.conv2d(inner, *pair(name + ".out_layers.3"), padding=1)

    def attend(h, name):
        b, c, height, width = h.shape
        qkv = f.conv1d(norm(h, name + ".norm").flatten(2), *pair(name + ".qkv"))
        if per_head:
            q, k, v = qkv.view(b, 4, 3, c // 4, height * width).unbind(2)
        else:
            q, k, v = qkv.view(b, 3, c // 64, 64, height * width).unbind(1)
        weight = (q.transpose(2, 3) @ k / math.sqrt(k.shape[2])).softmax(3)
        out = (v @ weight.transpose(2, 3)).reshape(b, c, -1)
        return h + f.conv1d(out, *pair(name + ".proj_out")).view_as(h)

    def both(h, name):
        h = block(h, name + ".0")
        return attend(h, name + ".1") if name + ".1.qkv.weight" in weights else h

    half = config["block_out_channels"][0] // 2
    angles = timestep[:, None] * torch.exp(-math.log(10_000) * torch.arange(half) / half)
    emb = f.linear(torch.cat([angles.cos(), angles.sin()], 1), *pair("time_embed.0"))
    emb = f.linear(f.silu(emb), *pair("time_embed.2")) + weights["label_emb.weight"][labels]
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    h = f.conv2d(x, *pair("input_blocks.0.0"), padding=1)
    stack, index = [h], 1
    for level, _ in itertools.product(range(levels), range(layers + 1)):
        if (index - 1) % (layers + 1) < layers:
            h = both(h, f"input_blocks.{index}")
        elif level < levels - 1:
            h = block(h, f"input_blocks.{index}.0", lambda u: f.avg_pool2d(u, 2))
        else:
            break
        stack.append(h)
        index += 1
    h = block(attend(block(h, "middle_block.0"), "middle_block.1"), "middle_block.2")
    for index in range(levels * (layers + 1)):
        name = f"output_blocks.{index}"
        h = both(torch.cat([h, stack.pop()], 1), name)
        if index % (layers + 1) == layers and index < levels * (layers + 1) - 1:
            up = 2 if name + ".1.qkv.weight" in weights else 1
            h = block(h, f"{name}.{up}", lambda u: f.interpolate(u, scale_factor=2.0))
    return f.conv2d(f.silu(norm(h, "out.0")), *pair("out.2"), padding=1)


@pytest.mark.parametrize("vp", [False, True])
def test_openai_format_weights_mean_the_same_network(tmp_path, vp):
    args = settings(unet_channels=(64, 128), unet_layers=2, dataset="imagenet", image_size=8, vp=vp)
    unet = emd.make_unet(args)
    config = unet.config

    class Recorder(dict):  # which names the key map asks for
        def __getitem__(self, name):
            asked.append(name)
            return super().__getitem__(name)

    asked = []
    # Random weights under OpenAI's names, their shapes from the architecture.
    c, e, generator, weights = (64, 128), 256, torch.Generator().manual_seed(0), {}

    def put(name, *shape, bias=True):
        weights[name + ".weight"] = torch.randn(*shape, generator=generator) / math.sqrt(math.prod(shape[1:]) or 1)
        if bias:
            weights[name + ".bias"] = 0.1 * torch.randn(shape[0], generator=generator)

    def put_norm(name, width):
        weights[name + ".weight"] = 1 + 0.1 * torch.randn(width, generator=generator)
        weights[name + ".bias"] = 0.1 * torch.randn(width, generator=generator)

    def put_block(name, wide_in, wide_out):
        put_norm(name + ".in_layers.0", wide_in)
        put(name + ".in_layers.2", wide_out, wide_in, 3, 3)
        put(name + ".emb_layers.1", 2 * wide_out, e)
        put_norm(name + ".out_layers.0", wide_out)
        put(name + ".out_layers.3", wide_out, wide_out, 3, 3)
        if wide_in != wide_out:
            put(name + ".skip_connection", wide_out, wide_in, 1, 1)

    def put_attention(name, width):
        put_norm(name + ".norm", width)
        put(name + ".qkv", 3 * width, width, 1)
        put(name + ".proj_out", width, width, 1)

    put("time_embed.0", e, 64), put("time_embed.2", e, e), put("label_emb", 1000, e, bias=False)
    put("input_blocks.0.0", 64, 3, 3, 3), put_norm("out.0", 64), put("out.2", 6 if vp else 3, 64, 3, 3)
    for name, wide_in, wide_out in (("input_blocks.1", 64, 64), ("input_blocks.2", 64, 64), ("input_blocks.3", 64, 64)):
        put_block(name + ".0", wide_in, wide_out)
    put_block("input_blocks.4.0", 64, 128), put_block("input_blocks.5.0", 128, 128)
    put_block("middle_block.0", 128, 128), put_block("middle_block.2", 128, 128), put_attention("middle_block.1", 128)
    for i, wide_in in enumerate((256, 256, 192, 192, 128, 128)):
        put_block(f"output_blocks.{i}.0", wide_in, c[1] if i < 3 else c[0])
    put_block("output_blocks.2.2", 128, 128)
    for name in ("input_blocks.4", "input_blocks.5", "output_blocks.0", "output_blocks.1", "output_blocks.2"):
        put_attention(name + ".1", 128)
    weights = {
        name: weights[name] for name in sorted(weights, key=lambda name: name[::-1])
    }  # their order means nothing
    emd.from_adm(unet, Recorder(weights), 4 if vp else None)
    assert sorted(weights) == sorted(asked)  # every name once, and none is left over
    path = tmp_path / "edm.pt"
    torch.save(weights, path)
    teacher = emd.load_teacher(args, str(path)).eval()
    x, labels = torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([3, 997])
    timestep = torch.tensor([-300.0, 250.0])
    with torch.no_grad():
        found = teacher.unet(x, timestep, labels).sample
        expected = adm_forward(weights, x, timestep, labels, config, vp)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    del weights["middle_block.1.qkv.bias"]
    torch.save(weights, path)
    with pytest.raises(emd.UserError, match=r"middle_block.1.qkv.bias"):
        emd.load_teacher(args, str(path))
    for name in [name for name in weights if name.startswith("input_blocks.2.")]:
        del weights[name]
    torch.save(weights, path)
    with pytest.raises(emd.UserError, match=r"edm.pt cannot be loaded \(ValueError"):
        emd.load_teacher(args, str(path))


def test_the_papers_unet_has_the_published_size(capsys):
    emd.dry_run(emd.Args())
    printed = capsys.readouterr().out
    assert "295,899,267 parameters" in printed and "219.31 GFLOP" in printed and "71 forward passes" in printed


@pytest.mark.parametrize("text", ["no json", '{"sample_size": 8}'], ids=["damaged", "without classes"])
def test_a_foreign_teacher_is_refused_by_the_plan(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(emd.UserError, match=r"--teacher .* cannot be read \("):
        emd.dry_run(settings(train_teacher=False, teacher=str(tmp_path)))


def test_the_plan_for_a_local_teacher_is_that_of_its_unet(tmp_path, capsys):
    plans = {}
    emd.make_unet(settings()).save_pretrained(tmp_path)
    shutil.copytree(tmp_path, tmp_path / "pipeline" / "unet")
    for teacher in ("", "gmm", tmp_path, tmp_path / "pipeline"):
        channels = settings().unet_channels if teacher in ("", "gmm") else (16, 16)
        emd.dry_run(settings(teacher=str(teacher), train_teacher=not teacher, teacher_steps=1, unet_channels=channels))
        plans[teacher] = re.search("UNet: .*", capsys.readouterr().out)[0]
    assert plans[""] == plans[tmp_path] == plans[tmp_path / "pipeline"] and "four copies" in plans[""]
    assert plans["gmm"] == plans[""].replace("four", "three")


# --- T7: a learned student score, on a ring of eight modes of unequal weight ---
@dataclasses.dataclass(frozen=True)
class RingArgs(emd.Args):
    @property
    def image_shape(self):
        return (2, 1, 1)


class Perceptron(nn.Module):
    """Takes the place of a UNet; outputs 0 at first."""

    def __init__(self, width=64):
        super().__init__()
        layers = [nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)]
        self.net = nn.Sequential(*layers)
        nn.init.zeros_(self.net[-1].weight), nn.init.zeros_(self.net[-1].bias)

    def forward(self, inputs, timestep, labels, return_dict):
        return (self.net(torch.cat([inputs.flatten(1), timestep[:, None] / 1000], 1)).view_as(inputs),)


def ring_scores(images, ring):
    """Share of points within three deviations of a mode, modes that hold a point, total variation of the shares."""
    distance, nearest = torch.cdist(images.flatten(1), ring.means).min(1)
    on_mode = distance < 3 * ring.std
    shares = nearest[on_mode].bincount(minlength=8) / on_mode.sum()
    return on_mode.float().mean().item(), int((shares > 0).sum()), 0.5 * (shares - ring.log_weights.exp()).abs().sum()


def test_a_ring_of_modes_is_learnt_without_losing_any():
    angles = torch.arange(8) * math.pi / 4
    weights = torch.tensor([1.0, 2, 1, 3, 1, 2, 1, 3])
    ring = emd.GaussianMixture(torch.stack([angles.cos(), angles.sin()], 1), 0.1, weights / weights.sum())
    args = RingArgs(k=4, lambda_star=0.0, sigma_mean=-1.2, batch_size=128, micro_batch_size=128, dropout=0.0, ema=0.98)
    args = dataclasses.replace(args, generator_lr=3e-3, score_lr=6e-3, dataset="digits")
    torch.manual_seed(0)
    teacher = emd.Denoiser(args, None, ring)
    state = {name: emd.Denoiser(args, Perceptron(), ring) for name in ("generator", "score")}
    state["average"] = emd.copy.deepcopy(state["generator"]).requires_grad_(False)
    state |= {f"adam_{n}": torch.optim.Adam(state[n].parameters(), betas=(0.0, 0.99)) for n in ("generator", "score")}
    z, labels = normal_from(9)(torch.zeros(4000, 2, 1, 1)), torch.zeros(4000, dtype=torch.long)
    before = ring_scores(emd.generate(state["average"], z, labels, 1.0), ring)
    means = emd.Means(ACCELERATOR)
    for step in range(1, 301):
        emd.train_iteration(args, teacher, state, step, means)
    after = ring_scores(emd.generate(state["average"], z, labels, 1.0), ring)
    print(before, after, means.take())
    assert before[0] < 0.15
    assert after[0] > 0.5 and after[1] == 8 and after[2] < 0.2
    # The student score network knows the student's samples: its loss is on the way from the teacher's to the floor,
    # that of the exact denoiser of samples like them (a narrow kernel around each of 4,000 others).
    x, others = (emd.generate(state["generator"], at, labels, 1.0).detach() for at in (z, normal_from(10)(z)))
    exact = emd.Denoiser(args, None, emd.GaussianMixture(others.flatten(1), 0.03, torch.full((4000,), 1 / 4000)))
    nets = (state["score"], teacher, exact)
    score, taught, floor = (emd.denoising_loss(args, net, x, labels, emd.Noise("cpu", 7)).item() for net in nets)
    print(score, taught, floor)
    assert floor < score < taught - 0.25 * (taught - floor), (score, taught, floor)  # 0.35 of the way, as measured


# --- T8: an exact teacher of 64 dimensions ---
def test_distilling_the_exact_teacher_of_digits_approaches_it():
    args = settings(teacher="gmm", train_teacher=False, dropout=0.0, batch_size=32, micro_batch_size=32, k=4, ema=0.9)
    args = dataclasses.replace(
        args, generator_lr=1e-3, score_lr=2e-3, eval_samples=600, eval_batch_size=300, heun_steps=16
    )
    teacher = emd.load_teacher(args, "gmm").requires_grad_(False)
    state, evaluator = emd.init_state(args, teacher), emd.Evaluator(args, ACCELERATOR, teacher)
    folder = types.SimpleNamespace(writes=False)
    start = evaluator(state["average"], folder, 0)
    for step in range(1, 61):
        emd.train_iteration(args, teacher, state, step, emd.Means(ACCELERATOR))
    end = evaluator(state["average"], folder, 60)
    print(start, end, evaluator.teacher_scores, sep="\n")
    assert end["eval/frechet_to_teacher"] < 0.8 * start["eval/frechet_to_teacher"]
    assert end["eval/recall_to_teacher"] > start["eval/recall_to_teacher"]
    assert end["eval/spread_ratio"] > start["eval/spread_ratio"] + 0.05


# --- T9 and the command line ---
SMALL = ["--preset", "smoke", "--media-every", 0, "--eval-samples", 0]


def run_main(capsys, *flags):
    """The script's main() in this process: exit code and what it printed."""
    code, out, err = conftest.run_main(emd, capsys, *flags)
    return code, out + err


def last_checkpoint(folder):
    """Every tensor of the newest student checkpoint, by name."""
    saved, found = emd.load_checkpoint(folder)[1], {}
    for part, state in saved.items():
        for name, value in state.get("state", state).items():
            found |= (
                {f"{part}.{name}": value} if torch.is_tensor(value) else {f"{part}.{name}.{k}": value[k] for k in value}
            )
    return found


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke preset, run once through the command line as a user would. Do not change it: copy it."""
    folder = tmp_path_factory.mktemp("smoke")
    command = [sys.executable, str(ROOT / "emd_imagenet.py"), "--preset", "smoke", "--runs-dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return only(folder)


@pytest.fixture
def copied(smoke, tmp_path):
    return Path(shutil.copytree(smoke, tmp_path / "copy"))


def test_smoke_leaves_what_it_promises(smoke):
    for name in ("args.json", "emd_imagenet.py", "metrics.jsonl", "eval.json", "teacher/config.json"):
        assert (smoke / name).stat().st_size > 0
    assert sorted(path.name for path in (smoke / "checkpoints").iterdir()) == ["000000022.pt", "000000024.pt"]
    assert {path.name.split("_")[0] for path in (smoke / "media").glob("*.png")} == {"samples", "teacher", "panel"}
    lines = metrics_of(smoke)
    assert [line["step"] for line in lines] == [*range(2, 25, 2), 24]
    assert {"losses/generator", "chain/z_clipped_share", "chain/residual_rms_s0.3"} <= lines[-2].keys()
    result = json.loads((smoke / "eval.json").read_text())
    assert result["features"].startswith("classifier, digits") and result["samples"] == 60
    assert {"frechet_to_data", "kid_to_teacher", "recall_to_data", "spread_ratio"} <= result["student"].keys()
    assert (result["student"]["evaluations_per_image"], result["teacher"]["evaluations_per_image"]) == (1, 7)


def test_logged_keys_are_the_documented_keys(smoke):
    page = (ROOT / "docs" / "emd_imagenet.md").read_text()
    documented = documented_keys("emd_imagenet")
    logged = {key for line in metrics_of(smoke) for key in line if key != "step"}
    assert logged <= documented, f"logged but not documented: {sorted(logged - documented)}"
    assert documented - logged <= {"perf/peak_device_memory_gb", "chain/residual_rms_s0", "chain/residual_rms_s1"}
    assert all(f"`{re.sub('_[0-9]+', '_*', path.name)}`" in page for path in (smoke / "media").iterdir())


def test_golden_numbers_of_the_first_updates(smoke):
    losses = [f"losses/{name}{norm}" for name in ("denoising", "generator") for norm in ("", "_grad_norm")]
    student = [*losses, "chain/delta_rms", "chain/z_norm", "chain/residual_rms_s0.3"]
    assert_golden("emd_imagenet", smoke, {2: losses[:2], 20: losses[:2], 22: student, 24: student})


def test_eval_only_repeats_the_scores_leaves_the_settings_and_draws_a_long_chain(copied, capsys, monkeypatch):
    before, settings_before = json.loads((copied / "eval.json").read_text()), (copied / "args.json").read_bytes()
    (copied / "eval.json").unlink()
    pictures = {path: path.stat().st_mtime_ns for path in (copied / "media").iterdir()}
    for flags, message in (
        (["--features", "/nowhere"], "--features /nowhere does not exist"),
        (["--lambda-star", -1], "--lambda-star -1.0 cannot change"),
        (["--seed", 7], "--seed 7 cannot change"),
    ):
        code, output = run_main(capsys, "--eval-only", copied, *flags)
        assert code == 2 and message in output
    assert pictures == {path: path.stat().st_mtime_ns for path in (copied / "media").iterdir()}
    logged, quiet = {}, lambda *names, **how: None
    tracker = types.SimpleNamespace(init=quiet, define_metric=quiet, log=logged.update, Image=str)
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    code, output = run_main(capsys, "--eval-only", copied, "--mcmc-steps", 30, "--track")
    assert code == 0, output
    assert logged["step"] == 24 and {"eval/kid_to_teacher", "media/samples"} <= logged.keys()
    after = json.loads((copied / "eval.json").read_text())
    for who, name in (("student", "frechet_to_data"), ("student", "kid_to_teacher"), ("teacher", "recall_to_data")):
        assert after[who][name] == pytest.approx(before[who][name], rel=1e-4)
    assert (copied / "args.json").read_bytes() == settings_before
    rows = np.asarray(emd.Image.open(copied / "media" / "mcmc_24.png")).reshape(5, 32, 320, 3).astype(int)
    moved = [abs(row - rows[0]).mean() for row in rows]
    assert moved[0] == 0 < moved[1] < moved[4]  # the longer the chain, the further it went


def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(smoke, tmp_path, capsys):
    code, output = run_main(capsys, *SMALL, "--total-steps", 2, "--runs-dir", tmp_path)
    assert code == 0, output
    folder = only(tmp_path)
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text() + '{"step": 23}\n{"step": 2')
    code, output = run_main(capsys, "--resume", folder, "--total-steps", 4)
    assert code == 0, output
    assert_same_tensors(last_checkpoint(folder), last_checkpoint(smoke))
    for ours, theirs in zip(metrics_of(folder), metrics_of(smoke)[:-1], strict=True):
        assert all(ours[key] == theirs[key] for key in theirs if not key.startswith("perf/"))


def test_a_teacher_that_was_interrupted_goes_on_exactly(smoke, tmp_path, capsys, monkeypatch):
    calls, original = [], emd.accumulate

    def interrupted(*inputs):
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        original(*inputs)

    monkeypatch.setattr(emd, "accumulate", interrupted)
    assert "stopped and saved after update 7;" in run_main(capsys, *SMALL, "--runs-dir", tmp_path)[1]
    assert not (only(tmp_path) / "teacher").exists()
    assert run_main(capsys, "--resume", only(tmp_path))[0] == 0
    assert_same_tensors(last_checkpoint(only(tmp_path)), last_checkpoint(smoke))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(smoke, copied, capsys):
    newest = copied / "checkpoints" / "000000024.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    code, output = run_main(capsys, "--resume", copied, "--eval-samples", 0, "--media-every", 0)
    assert code == 0 and newest.name in output
    assert_same_tensors(last_checkpoint(copied), last_checkpoint(smoke))


@pytest.mark.parametrize("flags, scored", [([], [24]), (["--total-steps", 5, "--eval-every", 4], [24, 25])])
def test_an_evaluation_that_an_interruption_took_is_made_up_for_once(flags, scored, copied, capsys):
    """After the last update, and after an earlier one. One that is there is not made again."""
    *lines, last = metrics_of(copied)
    (copied / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for _ in range(2):
        code, output = run_main(capsys, "--resume", copied, *flags, "--media-every", 0)
        assert code == 0, output
        found = [line for line in metrics_of(copied) if "eval/frechet_to_data" in line]
        assert [line["step"] for line in found] == scored
        assert found[0]["eval/frechet_to_data"] == pytest.approx(last["eval/frechet_to_data"], rel=1e-4)


def test_speed_is_that_of_the_updates_alone(monkeypatch):
    clock, lines = [0.0], []

    def update(done, means):
        means.add("losses/x", 1.0)
        clock[0] += 2

    monkeypatch.setattr(emd.time, "perf_counter", lambda: clock[0])
    run = types.SimpleNamespace(stop=False, writes=False, log=lambda step, logs: lines.append(logs))
    for _ in emd.loop(settings(log_every=2), run, ACCELERATOR, 0, 4, 0, {}, update):
        clock[0] += 100  # an evaluation
    assert [line["perf/updates_per_second"] for line in lines] == [0.5, 0.5]


def test_a_signal_during_the_exchange_between_processes_stops_the_next_update(smoke, tmp_path, capsys, monkeypatch):
    exchanges, reduce = [], emd.Accelerator.reduce

    def interrupted(self, tensor, *how):
        exchanges.append(tensor.ndim == 0)
        if tensor.ndim == 0 and sum(exchanges) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return reduce(self, tensor, *how)

    monkeypatch.setattr(emd.Accelerator, "reduce", interrupted)
    assert "stopped and saved after update 4;" in run_main(capsys, *SMALL, "--runs-dir", tmp_path)[1]


def test_a_resumed_run_needs_room_for_one_more_checkpoint(copied, capsys, monkeypatch):
    size = max(path.stat().st_size for path in (copied / "checkpoints").iterdir())
    for free, code in ((0.9, 2), (1.5, 0)):
        usage = types.SimpleNamespace(free=free * size)
        monkeypatch.setattr(emd.shutil, "disk_usage", lambda path, usage=usage: usage)
        assert run_main(capsys, "--resume", copied, "--total-steps", 5, "--eval-samples", 0)[0] == code


def test_the_disk_needs_room_for_the_networks_of_the_teacher_that_is_given(smoke, tmp_path, capsys, monkeypatch):
    needed = 3 * 7 * 4 * sum(p.numel() for p in emd.make_unet(settings()).parameters())
    flags = [*SMALL, "--no-train-teacher", "--teacher", smoke / "teacher", "--unet-channels", 16, 16]
    for free, code in ((0.99, 2), (1.01, 0)):
        usage = types.SimpleNamespace(free=free * needed)
        monkeypatch.setattr(emd.shutil, "disk_usage", lambda path, usage=usage: usage)
        found, output = run_main(capsys, *flags, "--total-steps", 1, "--runs-dir", tmp_path)
        assert found == code and ("are needed" in output) == (code == 2), output


def test_features_that_cannot_be_read_are_refused_before_training(tmp_path, capsys):
    (tmp_path / "features.pt").write_bytes(b"no network")
    flags = ["--preset", "smoke", "--features", tmp_path / "features.pt", "--runs-dir", tmp_path / "runs"]
    for content in (None, nn.Flatten()):  # the second has no logits to give
        if content:
            torch.jit.script(content).save(str(tmp_path / "features.pt"))
        code, error = run_main(capsys, *flags)
        assert code == 2 and f"--features {tmp_path / 'features.pt'} cannot be loaded" in error
        assert not (tmp_path / "runs").exists()


def test_resuming_takes_the_step_size_of_the_flags(copied, capsys):
    before = last_checkpoint(copied)
    flags = ["--resume", copied, "--eval-samples", 0, "--media-every", 0, "--total-steps", 5]
    assert run_main(capsys, *flags, "--generator-lr", 0)[0] == 0
    after = last_checkpoint(copied)
    same = {
        part: all(torch.equal(before[k], after[k]) for k in before if k.startswith(part)) for part in ("gen", "sco")
    }
    assert same == {"gen": True, "sco": False}


def test_a_refused_resume_changes_nothing(copied, capsys):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    for flags, message in (
        (["--total-steps", 1], "--total-steps 1 is below"),
        (["--teacher-steps", 30], "--teacher-steps 30 cannot change"),
        (["--no-train-teacher", "--teacher", "x"], "--train-teacher False cannot change"),
        (["--lambda-star", -1], "--lambda-star -1.0 cannot change"),
        (["--seed", 7], "--seed 7 cannot change"),
    ):
        code, error = run_main(capsys, "--resume", copied, *flags)
        assert code == 2 and message in error
        assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before
    settings = json.loads((copied / "args.json").read_text()) | {"train_teacher": False, "teacher": "x"}
    (copied / "args.json").write_text(json.dumps(settings))  # --vp is for a --teacher
    code, error = run_main(capsys, "--resume", copied, "--vp")
    assert code == 2 and "--vp True cannot change" in error


def test_a_resumed_run_takes_the_betas_of_the_flags(copied, capsys, monkeypatch):
    seen, accumulate = [], emd.accumulate

    def watched(*inputs):
        seen.append(inputs[6].param_groups[0]["betas"])
        accumulate(*inputs)

    monkeypatch.setattr(emd, "accumulate", watched)
    flags = ["--eval-samples", 0, "--media-every", 0, "--total-steps", 5, "--beta1", 0.5, "--beta2", 0.9]
    code, error = run_main(capsys, "--resume", copied, *flags)
    assert code == 0, error
    assert set(seen) == {(0.5, 0.9)}


def test_processes_that_cannot_share_a_batch_are_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(emd.UserError, match=r"--batch-size 8 .* of 4 .* 3 processes: .* --micro-batch-size 4"):
        emd.check_args(settings())
    (tmp_path / "args.json").write_text("{}")
    emd.check_args(settings(eval_only=str(tmp_path)))  # an evaluation has no such batches


def test_processes_are_not_inherited_from_a_run(copied):
    saved = json.loads((copied / "args.json").read_text()) | {"distributed": True, "track": True}
    (copied / "args.json").write_text(json.dumps(saved))
    resumed, evaluated = (emd.parse_args([flag, str(copied)]) for flag in ("--resume", "--eval-only"))
    assert not resumed.distributed and not evaluated.distributed
    assert resumed.track and not evaluated.track


def test_two_processes_equal_one(tmp_path, capsys):
    flags = [*SMALL, "--teacher-steps", 3, "--total-steps", 2, "--log-every", 1, "--teacher-batch-size", 8]
    flags += ["--micro-batch-size", 4, "--cancel", "last", "--score-updates", 2]
    evaluated = [*flags, "--eval-samples", 60]
    ranks = start_two_processes("emd_imagenet.py", *evaluated, "--runs-dir", tmp_path / "two")
    assert run_main(capsys, *flags, "--runs-dir", tmp_path / "one")[0] == 0
    errors = [rank.communicate(timeout=600)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    one, two = only(tmp_path / "one"), only(tmp_path / "two")
    assert_two_processes_equal_one(one, two, lambda folder: run_main(capsys, "--eval-only", folder))
    a, b = last_checkpoint(one), last_checkpoint(two)
    assert a.keys() == b.keys()
    # Gradients of rounding size may change sign, and Adam's first steps are a step size long whatever the gradient.
    for part in ("average.", "score."):
        differences = torch.cat([(a[k] - b[k]).abs().flatten() for k in a if k.startswith(part)])
        assert (differences > 2e-5).float().mean() < 0.01, part


def test_a_signal_to_one_of_two_processes_stops_both_saved(tmp_path):
    flags = [*SMALL, "--total-steps", 10_000, "--log-every", 1, "--save-every", 10_000, "--runs-dir", tmp_path]
    ranks = start_two_processes("emd_imagenet.py", *flags)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("*/teacher/config.json")) and time.monotonic() < deadline:
        time.sleep(0.2)
    ranks[1].send_signal(signal.SIGTERM)  # the one that neither logs nor saves
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    folder = only(tmp_path)
    last = metrics_of(folder)[-1]["step"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir())[-1] == f"{last:09}.pt" < "000010020.pt"


EXACT = ["--preset", "smoke", "--no-train-teacher", "--teacher", "gmm", "--eval-samples", 0, "--total-steps", 1]


@pytest.mark.parametrize(
    "changes", [["--corrector", "x-z", "--langevin", "ou"], ["--cancel", "exact", "--weight", "nll"]]
)
def test_other_estimators_and_precisions_run(tmp_path, capsys, changes):
    flags = [*EXACT, "--media-every", 1, "--runs-dir", tmp_path, *changes]
    code, output = run_main(capsys, *flags, "--dtype", "bf16", "--channels-last", "--max-grad-norm", 1)
    assert code == 0, output
    assert list((only(tmp_path) / "media").glob("panel_*.png"))


def test_beside_an_exact_teacher_the_students_networks_are_compiled(tmp_path, capsys, monkeypatch):
    compiled = []
    monkeypatch.setattr(emd.UNet2DModel, "compile", lambda self: compiled.append(self))
    flags = [*EXACT, "--media-every", 0, "--compile", "--runs-dir", tmp_path]
    assert run_main(capsys, *flags)[0] == 0
    assert len({id(unet) for unet in compiled}) == 2  # generator and score network


def test_no_graph_of_a_compiled_network_is_given_up(tmp_path, capsys, monkeypatch):
    """With gradients and without, frozen and not, with masks and without, in batches of all sizes, before and after an
    interruption: torch.compile stops compiling a function, with a warning, when it has more graphs than a limit.
    """
    config = torch._dynamo.config
    monkeypatch.setattr(config, "recompile_limit", config.recompile_limit)  # put back after the test
    monkeypatch.setattr(config, "fail_on_recompile_limit_hit", True)
    monkeypatch.setattr(emd.UNet2DModel, "compile", lambda self: nn.Module.compile(self, backend="eager"))
    torch._dynamo.reset()
    flags = ["--preset", "smoke", "--compile", "--teacher-steps", 2, "--unet-channels", 16, "--runs-dir", tmp_path]
    code, output = run_main(capsys, *flags, "--total-steps", 2, "--classifier-steps", 2)
    assert code == 0, output
    code, output = run_main(capsys, "--resume", only(tmp_path), "--total-steps", 4)
    assert code == 0, output


def test_a_diffusers_folder_is_a_teacher(smoke, tmp_path, capsys):
    flags = [*SMALL, "--no-train-teacher", "--teacher", smoke / "teacher", "--total-steps", 1, "--runs-dir", tmp_path]
    assert run_main(capsys, *flags)[0] == 0
    code, error = run_main(capsys, *flags, "--dataset", "fashion", "--image-size", 16)
    assert code == 2 and "--teacher" in error and "(1, 8, 8)" in error
    shutil.copytree(smoke / "teacher", tmp_path / "pipeline" / "unet")
    bare, inner = (emd.load_teacher(settings(), str(name)) for name in (smoke / "teacher", tmp_path / "pipeline"))
    torch.testing.assert_close(inner.state_dict(), bare.state_dict(), rtol=0, atol=0)


IMAGENET = ["--preset", "smoke", "--dataset", "imagenet", "--image-size", 8, "--total-steps", 0, "--eval-samples", 0]
IMAGENET += ["--teacher-steps", 2]


def test_image_folders_are_read_and_broken_images_named(tmp_path, capsys):
    random = np.random.default_rng(0)
    (tmp_path / "data" / ".cache").mkdir(parents=True)  # is no class
    for name in ("n01", "n02"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(12):
            pixels = random.integers(0, 256, (20, 30, 3), dtype=np.uint8)
            emd.Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.jpg")
    (tmp_path / "data" / "n02" / "3.jpg").write_bytes(b"not an image")
    images = emd.load_images(settings(dataset="imagenet", image_size=8, data_dir=str(tmp_path / "data")))
    pixels, labels = images(torch.tensor([0, 17, 23]))  # 0.jpg, 3.jpg (by name), 9.jpg
    assert pixels.shape == (3, 3, 8, 8) and pixels.dtype == torch.uint8
    assert labels.tolist() == [0, 1, 1] and len(images.bad) == 1
    error = capsys.readouterr().err
    assert "n02/3.jpg" in error and "--data-dir holds images of 2 of 1000 classes" in error
    flags = [*IMAGENET, "--data-dir", tmp_path / "data", "--runs-dir"]
    assert run_main(capsys, *flags, tmp_path / "runs")[0] == 0
    with pytest.raises(emd.UserError, match="holds neither class folders"):  # train/ and val/ are no classes
        emd.load_images(settings(dataset="imagenet", image_size=8, data_dir=str(tmp_path)))
    for path in (tmp_path / "data" / "n01").iterdir():
        path.write_bytes(b"")
    code, error = run_main(capsys, *flags, tmp_path / "others")  # folders are named by the second
    assert code == 2 and "--data-dir" in error


def test_a_long_row_of_broken_images_is_passed_over(tmp_path, capsys):
    (tmp_path / "bad.jpg").write_bytes(b"not an image")
    emd.Image.new("RGB", (8, 8)).save(tmp_path / "good.jpg")
    parts = [(tmp_path / f"{name}.jpg", 0, -1) for name in ["bad"] * 1500 + ["good"] * 14_000]
    images = emd.Images(range(len(parts)), parts=parts, size=8)
    assert images(torch.tensor([0, 1499, 1600]))[1].tolist() == [1500, 1500, 1600]
    assert len(images.bad) == 1500


def test_webdataset_shards_hold_the_same_images(tmp_path, capsys):
    random, folders, shards = np.random.default_rng(0), tmp_path / "folders", tmp_path / "shards"
    shards.mkdir()
    for shard in range(2):
        with tarfile.open(shards / f"train-{shard}.tar", "w") as file:
            for i in range(5):
                label, pixels = 2 * shard + i % 2, random.integers(0, 256, (20, 30, 3), dtype=np.uint8)
                path = folders / f"n{label}" / f"{shard}{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                emd.Image.fromarray(pixels).save(path)
                file.add(path, f"{shard}{i}.jpg")
                entry = tarfile.TarInfo(f"{shard}{i}.cls")
                entry.size = 1
                file.addfile(entry, io.BytesIO(str(label).encode()))
    found = {}
    for kind in (folders, shards):
        pixels, labels = emd.load_images(settings(dataset="imagenet", image_size=8, data_dir=str(kind)))(
            torch.arange(10)
        )
        found[kind] = sorted((int(label), image.numpy().tobytes()) for image, label in zip(pixels, labels, strict=True))
    assert found[folders] == found[shards] and len(found[shards]) == 10
    (shards / "train-2.tar").write_bytes(b"no archive")
    code, error = run_main(capsys, *IMAGENET, "--data-dir", shards, "--runs-dir", tmp_path / "runs")
    assert code == 2 and "train-2.tar is no readable shard" in error


def test_fashion_mnist_files_are_read(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    for name, values in (
        ("train-images-idx3-ubyte", pixels),
        ("train-labels-idx1-ubyte", np.arange(20, dtype=np.uint8) % 10),
    ):
        header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(header + values.tobytes()))
    images = emd.load_images(settings(dataset="fashion", image_size=32, data_dir=str(tmp_path)))
    found, labels = images(torch.tensor([3, 19]))
    np.testing.assert_array_equal(found[:, 0, 2:30, 2:30].numpy(), pixels[[3, 19]])
    assert labels.tolist() == [3, 9]
    half, _ = emd.load_images(settings(dataset="fashion", image_size=16, data_dir=str(tmp_path)))(torch.tensor([3]))
    assert half.shape == (1, 1, 16, 16)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 1, 0])))
    with pytest.raises(emd.UserError, match=r"--data-dir .* not 28x28"):
        emd.load_images(settings(dataset="fashion", image_size=16, data_dir=str(tmp_path), seed=2))  # not cached
    assert abs(half.float().mean() - found[0].float().mean()) < 0.5


BAD = [
    (["--preset", "huge"], "--preset huge"),
    ([], "--teacher"),
    (["--preset", "smoke", "--teacher", "gmm"], "--train-teacher"),
    (["--preset", "smoke", "--k", 0], "--k 0"),
    (["--preset", "smoke", "--gamma-eps", 1.5], "--gamma-eps 1.5"),
    (["--preset", "smoke", "--gamma-z", -1], "--gamma-z -1"),
    (["--preset", "smoke", "--generator-lr", "nan"], "--generator-lr nan"),
    (["--preset", "smoke", "--image-size", 16], "--image-size 16"),
    (["--preset", "smoke", "--unet-channels", 16, 20], "--unet-channels"),
    (["--preset", "smoke", "--unet-channels", 32, 48], "--unet-channels (32, 48) do not split"),
    (["--preset", "smoke", "--unet-channels", 48, 64], "--unet-channels (48, 64) do not split"),
    (["--preset", "smoke", "--unet-channels", 16, 16, 16, 16, 16], "--unet-channels"),
    (["--preset", "smoke", "--micro-batch-size", 3], "--micro-batch-size 3"),
    (["--preset", "smoke", "--eval-samples", 5], "--eval-samples 5"),
    (["--preset", "smoke", "--save-every", 3], "--save-every 3"),
    (["--preset", "smoke", "--lambda-star", 50], "--lambda-star 50"),
    (["--preset", "smoke", "--data-dir", "x"], "--data-dir x"),
    (["--preset", "smoke", "--distributed"], "--distributed"),
    (["--preset", "cpu", "--data-dir", "/nowhere"], "--data-dir /nowhere"),
    (["--preset", "smoke", "--features", "/nowhere"], "--features /nowhere does not exist"),
    (["--preset", "smoke", "--vp"], "--vp True is for a --teacher"),
    (["--resume", "/nowhere"], "--resume /nowhere"),
    (["--eval-only", "/nowhere"], "--eval-only /nowhere"),
    (["--preset", "cpu", "--no-train-teacher", "--teacher", "x", "--data-dir", "/"], "--data-dir /"),  # needed last
    (["--teacher", "/nowhere", "--eval-samples", 0], "--teacher /nowhere"),
    ([*IMAGENET, "--data-dir", "/nowhere"], "--data-dir /nowhere"),
    ([*IMAGENET, "--data-dir", ROOT / "docs" / "media"], "media holds neither class folders"),
    (IMAGENET, "--data-dir  is empty"),
    (["--teacher", "x", "--data-dir", "x"], "--features  is empty"),
    (["--preset", "smoke", "--resume", "a", "--eval-only", "b"], "exclude each other"),
]


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_what_the_user_can_put_right_is_one_sentence(flags, message, tmp_path, capsys):
    code, error = run_main(capsys, *flags, "--runs-dir", tmp_path)
    assert code == 2 and "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("emd_imagenet.py: error: ")]
    assert message in line
    assert not list(tmp_path.iterdir())  # no run folder is left behind


def test_a_foreign_checkpoint_and_a_diverged_loss_are_one_sentence(copied, tmp_path, capsys):
    torch.save({"generator": {}}, copied / "checkpoints" / "000000024.pt")
    code, error = run_main(capsys, "--resume", copied)
    assert code == 2 and f"{copied}: its checkpoint does not fit" in error
    for path in (copied / "checkpoints").iterdir():
        path.write_bytes(b"something else")
    code, error = run_main(capsys, "--resume", copied)
    assert code == 2 and f"{copied}: none of its checkpoints can be read" in error
    code, error = run_main(capsys, *SMALL, "--teacher-lr", 1e30, "--log-every", 1, "--runs-dir", tmp_path / "new")
    assert code == 2 and "training has diverged" in error


def test_inception_features_and_logits(tmp_path):
    class StandIn(nn.Module):
        def forward(self, images, return_features: bool = False, no_output_bias: bool = False):
            pooled = images.float().flatten(1)[:, :8] / 255
            return pooled if return_features else pooled.softmax(1)

    torch.jit.script(StandIn()).save(str(tmp_path / "inception.pt"))
    args = settings(features=str(tmp_path / "inception.pt"))
    images = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    features, logits = emd.Features(args, None)(images)
    torch.testing.assert_close(features, images.float().flatten(1)[:, :8] / 255)
    torch.testing.assert_close(logits.softmax(1), features.softmax(1))
    with pytest.raises(emd.UserError, match=r"--features nowhere.pt cannot be loaded"):
        emd.Features(dataclasses.replace(args, features="nowhere.pt"), None)


@pytest.mark.parametrize("ruler, name", [("inception-2015-12-05, digits", "fid"), ("efficientnet_lite0", "frechet")])
def test_only_a_distance_on_inception_features_is_called_an_fid(ruler, name):
    real, fake = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(0))
    compared = emd.compare(real, fake, ruler, torch.device("cpu"))
    assert {*compared} & {"fid", "frechet"} == {name}


def test_precision_and_recall_of_known_sets():
    real, normal = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)), normal_from(1)
    assert emd.precision_recall(real, real) == (1.0, 1.0)
    assert emd.precision_recall(real, real + 100) == (0.0, 0.0)
    precision, recall = emd.precision_recall(real, 0.05 * normal(real))  # collapsed: good samples of little variety
    assert precision > 0.95 and recall < 0.1
    real, fake = torch.tensor([[0.0], [1], [2], [3]]), torch.tensor([[3.9], [4.1], [50], [50.1]])
    assert emd.precision_recall(real, fake, k=1) == (0.25, 0.0)  # every real ball has radius 1
    assert emd.precision_recall(real, fake, k=2) == (0.5, 1.0)  # those at the ends 2; those of the fakes, 46 and more

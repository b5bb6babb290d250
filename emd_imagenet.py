# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "diffusers>=0.42,<0.43", "accelerate>=1.15,<2", "torchmetrics>=1.9,<2", "safetensors>=0.8,<1",
#   "numpy>=2.0,<3", "scikit-learn>=1.9,<2", "pillow>=12,<14", "tyro>=1.0,<2", "imageio>=2.37,<3",
#   "imageio-ffmpeg>=0.6,<1", "wandb>=0.25,<1",
# ]
# ///
"""EM Distillation of a class-conditional diffusion teacher into a one-step generator.
Papers: [EMD] arXiv:2405.16852, [EDM] arXiv:2206.00364, [DI] Diff-Instruct arXiv:2305.18455,
[PR] precision and recall arXiv:1904.06991. Details, deviations, results: docs/emd_imagenet.md

    python emd_imagenet.py --teacher FOLDER --data-dir IMAGENET/train --features INCEPTION.pt   # ImageNet-64
    python emd_imagenet.py --preset cpu                     # Fashion-MNIST: trains a teacher, then distils it
    python emd_imagenet.py --preset smoke                   # a minute: learns nothing, touches everything
    python emd_imagenet.py --resume runs/RUN_FOLDER         # goes on where that run stopped
    python emd_imagenet.py --eval-only runs/RUN_FOLDER      # scores that run's generator: eval.json and pictures
    accelerate launch emd_imagenet.py --teacher FOLDER ...  # several processes; --batch-size stays the global one

No images are needed to distil, only the teacher. Every update: 1 the student score network learns
the generator's own samples, 2 E-step: K Langevin steps on the pair of noise and latent towards the teacher,
3 M-step: the generator is regressed on where the chain went.
Symbols, all in "EDM space" y = x_t / alpha_t: z latent, x = g(z) generated image, eps noise, s = sigma noise level,
y = x + s eps, D_q and D_phi denoisers (posterior means of the clean image) of teacher and student, Delta = D_q - D_phi,
lambda = -2 ln s log signal-to-noise ratio. Axes: B images of a micro-batch, C H W pixels, N mixture components.
"""

import argparse
import contextlib
import copy
import dataclasses
import errno
import functools
import gzip
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any, Literal

import imageio.v3 as imageio
import numpy as np
import safetensors.torch
import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import UNet2DModel
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

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

    total_steps: int = 300_000  # generator updates of the whole run (0: only train the teacher)

    dataset: Literal["imagenet", "fashion", "digits"] = "imagenet"  # images for --train-teacher and for evaluation
    data_dir: str = ""  # its folder: ImageNet class folders or .tar shards, Fashion-MNIST idx.gz (empty: see docs)
    image_size: int = 64  # height and width of an image (fashion: 16 or 32, digits: 8)
    teacher: str = ""  # diffusers folder, hub id of a bare UNet, OpenAI .pt/.safetensors, gmm (empty: --train-teacher)
    vp: bool = False  # --teacher is guided-diffusion's: eps, 1000 linear steps, learned variance; if a file, four heads
    train_teacher: bool = False  # train an EDM teacher first, kept in the run folder as teacher/
    teacher_steps: int = 300_000  # updates of that training
    teacher_batch_size: int = 1024  # images per such update, all processes together
    teacher_lr: float = 1e-4  # Adam step size of that training, after a linear warmup over its first tenth
    gmm_std: float = 0.12  # deviation of each component of --teacher gmm, which has one component per training image
    unet_channels: tuple[int, ...] = (192, 384, 576, 768)  # of the levels of a UNet made here, fine to coarse
    unet_layers: int = 3  # residual blocks per level
    unet_attention: int = 3  # coarsest levels that have attention, in heads of 64 channels or of the narrowest width
    dropout: float = 0.1  # of teacher and score network, in training and E-step, there one mask for both (gmm: none)

    k: int = 16  # Langevin steps of the E-step (K)
    corrector: Literal["eps-z", "x-z", "eps", "x"] = "eps-z"  # what they move (eps: z stays; x: the same as eps)
    gamma_eps: float = 0.16  # Langevin step size of eps (0.4 squared); of x it is this times s squared
    gamma_z: float = 1.6e-5  # Langevin step size of z (0.004 squared)
    langevin: Literal["euler", "ou"] = "euler"  # noise sqrt(2 gamma), or the one that keeps unit variance exactly
    cancel: Literal["full", "last", "none", "exact"] = "full"  # which of the chain's noise the regression target loses
    weight: Literal["s2", "nll"] = "s2"  # of a noise level: sigma^2/alpha^2, as in the paper, or 1 (plain likelihood)
    z_clip: float = 0.1  # largest root-mean-square of one step's drift of z: guards against 1/s^2 at low noise
    sigma_min: float = 0.02  # lowest noise level of the E-step: log-normal draws below are raised to it
    sigma_mean: float = -1.2  # mean of ln sigma, in the E-step and in both denoising losses
    sigma_std: float = 1.2  # deviation of ln sigma
    lambda_star: float = -6.0  # log-SNR at which the teacher is the first generator: x = D(s* z, s*), s* = exp(3)
    score_updates: int = 1  # updates of the student score network per generator update
    generator_lr: float = 2e-6  # Adam step size of the generator
    anneal_learning_rate: bool = False  # the generator's step size falls linearly to 0 over the last half of the run
    score_lr: float = 1e-5  # Adam step size of the student score network
    beta1: float = 0.0  # of Adam, for generator and score network
    beta2: float = 0.99  # of Adam, for generator and score network
    max_grad_norm: float = 0.0  # generator gradients are clipped to this global norm (0: never)
    ema: float = 0.9999  # decay per update of the averaged generator and of the averaged teacher
    ema_ramp: float = 0.05  # the average's half-life is at most this share of the updates so far (0: no ramp)
    batch_size: int = 128  # images per update, all processes and micro-batches together
    micro_batch_size: int = 16  # images of one chain; gradients of the micro-batches are accumulated
    compile: bool = False  # torch.compile the UNets
    channels_last: bool = False  # memory format of the UNets (faster convolutions on many devices)

    heun_steps: int = 40  # steps of the teacher's sampler, 2 n - 1 network evaluations
    features: str = ""  # TorchScript, inception-2015-12-05.pt for FID (empty: a CNN trained here; not for imagenet)
    classifier_steps: int = 1500  # updates of that CNN, always from the same seed
    eval_samples: int = 50_000  # images of an evaluation, labels in turn (0: none)
    eval_batch_size: int = 250  # images generated at once in an evaluation
    eval_every: int = 0  # generator updates between evaluations (0: only after the last)
    mcmc_steps: int = 0  # a picture of student samples repaired by so many Langevin steps, with every picture (0: none)
    log_every: int = 100  # updates that one line of metrics.jsonl is the mean of
    save_every: int = 5000  # updates between checkpoints (the last update always saves)
    media_every: int = 5000  # generator updates between pictures (0: none)

    @property
    def sigma_star(self) -> float:
        return math.exp(-self.lambda_star / 2)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (3 if self.dataset == "imagenet" else 1, self.image_size, self.image_size)

    @property
    def num_classes(self) -> int:
        return 1000 if self.dataset == "imagenet" else 10

    @property
    def moves_z(self) -> bool:
        return self.corrector.endswith("z") and self.gamma_z > 0


# fmt: off
PRESETS = {
    "paper": Args(),
    "imagenet128": Args(  # DEVIATION(imagenet128 preset)
        preset="imagenet128", total_steps=200_000, image_size=128, unet_channels=(256, 256, 512, 768, 1024),
        unet_layers=2, batch_size=1024,
    ),
    "cpu": Args(  # DEVIATION(cpu preset)
        preset="cpu", total_steps=4000, dataset="fashion", image_size=16, train_teacher=True, teacher_steps=4000,
        teacher_batch_size=64, teacher_lr=1e-3, unet_channels=(16, 32, 32), unet_layers=1, unet_attention=1,
        dropout=0.0, lambda_star=-2.0, generator_lr=1e-4, anneal_learning_rate=True, score_lr=5e-4, ema=0.998,
        batch_size=8, micro_batch_size=64, channels_last=True, heun_steps=16, eval_samples=2000, log_every=20,
        save_every=500, media_every=500,
    ),
    "smoke": Args(
        preset="smoke", total_steps=4, dataset="digits", image_size=8, train_teacher=True, teacher_steps=20,
        teacher_batch_size=8, teacher_lr=1e-3, unet_channels=(16, 32), unet_layers=1, unet_attention=1, k=4,
        lambda_star=-2.0, generator_lr=1e-4, score_lr=5e-4, ema=0.9, batch_size=8, micro_batch_size=4, heun_steps=4,
        classifier_steps=60, eval_samples=60, eval_batch_size=20, log_every=2, save_every=2, media_every=2,
    ),
}
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
    """Refuse settings that cannot work, before anything is read or computed. Raises UserError."""
    check = functools.partial(require, args)
    may_be_0 = {"seed", "total_steps", "unet_attention", "eval_samples", "eval_every", "media_every", "mcmc_steps"}
    low = dict.fromkeys(may_be_0, 0) | {"sigma_mean": -20, "lambda_star": -20}
    low |= dict.fromkeys(("gamma_eps", "sigma_min", "sigma_std", "z_clip", "gmm_std"), 1e-6)
    high = dict.fromkeys(("dropout", "gamma_eps", "gamma_z", "beta1", "beta2", "ema"), 1)
    high |= {"seed": 2**32, "sigma_mean": 20, "lambda_star": 20}
    for name, value in dataclasses.asdict(args).items():
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) in (int, float):
                least, most = low.get(name, int(type(number) is int)), high.get(name, math.inf)
                check(name, least <= number < most, f"is out of range: give numbers from {least} to below {most}")
    sizes = {"digits": (8,), "fashion": (16, 32)}.get(args.dataset, (args.image_size,))
    check("image_size", args.image_size in sizes, f"does not exist for --dataset {args.dataset}: try {sizes[0]}")
    check("data_dir", args.dataset != "digits" or not args.data_dir, "is not for --dataset digits: leave it out")
    fits = args.unet_channels and args.image_size % 2 ** (len(args.unet_channels) - 1) == 0
    check("unet_channels", fits, f"are too few or too many levels for --image-size {args.image_size}: halve it by each")
    fits = all(width % 16 == width % min(64, *args.unet_channels) == 0 for width in args.unet_channels)
    check("unet_channels", fits, "do not split into heads: give multiples of 16 and of min(64, the narrowest)")
    for name in ("batch_size", "teacher_batch_size")[: 0 if args.eval_only else 1 + args.train_teacher]:
        batch, processes = getattr(args, name), int(os.environ.get("WORLD_SIZE", "1"))
        micro = min(batch, args.micro_batch_size)
        reason = f"does not split into micro-batches of {micro} for each of {processes} processes"
        reason += f": change it, or --micro-batch-size {args.micro_batch_size}"
        check(name, batch % (micro * processes) == 0, reason)
    fits = args.save_every % args.log_every == 0  # so that numbers are looked at before they are saved
    check("save_every", fits, f"is no multiple of --log-every {args.log_every}: make it one")
    least = args.num_classes * (4 if args.num_classes <= 10 else 2)
    check("eval_samples", not 0 < args.eval_samples < least, f"cannot show every class: give at least {least}, or 0")
    if args.dry_run:
        return
    one = bool(args.teacher) != args.train_teacher
    check("teacher", one, f"and --train-teacher {args.train_teacher}: give exactly one, see docs/emd_imagenet.md")
    check("vp", not (args.vp and args.train_teacher), "is for a --teacher of guided-diffusion: leave one out")
    check("total_steps", args.total_steps or args.train_teacher, "leaves nothing to do: give a number above 0")
    run = args.resume or args.eval_only
    before = json.loads((Path(run) / "args.json").read_text()) if run else {}
    for name in ("seed", "train_teacher", "teacher_steps", "lambda_star", "vp"):
        same = before.get(name, getattr(args, name)) == getattr(args, name)
        check(name, same, "cannot change in a run, whose checkpoints were made with it as it was: leave it out")
    imagenet, scored = args.dataset == "imagenet", args.eval_samples > 0
    needed = imagenet and (scored or args.train_teacher or args.teacher == "gmm")
    check("data_dir", not needed or args.data_dir, "is empty: name ImageNet's train folder")
    way_out = "name inception-2015-12-05.pt, or give --eval-samples 0"
    check("features", not (imagenet and scored) or args.features, f"is empty: {way_out}")
    for name in ("data_dir", "features"):  # before training, though they may be needed only after the last update
        check(name, Path(getattr(args, name)).exists(), "does not exist: name a file or folder that does")


# --- Images ---
IMAGE_KINDS = {".jpg", ".jpeg", ".png", ".webp"}


class Images:
    """Labelled images UInt8[B, C, H, W], in memory (digits, Fashion-MNIST) or decoded when asked for (ImageNet; parts:
    file, offset and length of each). One that cannot be decoded is named, counted and replaced by its neighbour.
    """

    def __init__(self, labels: Any, pixels: np.ndarray | None = None, parts: list | None = None, size: int = 0):
        self.labels, self.pixels, self.parts, self.size = torch.tensor(labels).long(), pixels, parts, size
        self.bad, self.pool = set(), ThreadPoolExecutor() if parts else None

    def __call__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        if self.pool is None:
            return torch.tensor(self.pixels[indices.numpy()]), self.labels[indices]
        pixels, kept = zip(*self.pool.map(self.decode, indices.tolist()), strict=True)
        return torch.tensor(np.stack(pixels)), self.labels[list(kept)]

    def decode(self, index: int) -> tuple[np.ndarray, int]:
        while True:
            path, offset, length = self.parts[index]
            try:
                with path.open("rb") as file:
                    file.seek(offset)
                    image = Image.open(io.BytesIO(file.read(length)))
                image.draft("RGB", (2 * self.size, 2 * self.size))  # a JPEG is shrunk while it is decoded
                square = ImageOps.fit(image.convert("RGB"), (self.size, self.size), Image.Resampling.BICUBIC)
                return np.asarray(square).transpose(2, 0, 1), index
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                if index not in self.bad:
                    self.bad.add(index)
                    print(f"warning: skipped image {len(self.bad)}, {path} at {offset} ({error})", file=sys.stderr)
                if len(self.bad) > len(self.parts) // 10:
                    problem = f"a tenth of the images cannot be decoded, such as {path}"
                    raise UserError(f"--data-dir: {problem}; replace or delete them.") from error
                index = (index + 1) % len(self.parts)


def index_shard(path: Path) -> Iterator[tuple[tuple[Path, int, int], int]]:
    """Where the images of an uncompressed webdataset shard lie, and the class numbers beside them (NAME.cls)."""
    with tarfile.open(path, "r:") as shard:
        members = {member.name: member for member in shard if member.isfile()}
        for name, member in members.items():
            stem, kind = os.path.splitext(name)
            if kind.lower() in IMAGE_KINDS and f"{stem}.cls" in members:
                label = int(shard.extractfile(members[f"{stem}.cls"]).read())
                yield (path, member.offset_data, member.size), label


def load_imagenet(args: Args) -> Images:
    """Class folders or webdataset shards in --data-dir itself, never below train/ and val/. Raises UserError."""
    check, way_out = functools.partial(require, args, "data_dir"), "name ImageNet's train folder"
    root, found = Path(args.data_dir), []
    shards, classes = sorted(root.glob("*.tar")), sorted(path for path in root.glob("[!.]*") if path.is_dir())
    for shard in shards:
        with refuse(f"--data-dir {root}: {shard.name} is no readable shard", way_out):
            found += index_shard(shard)
    for label, folder in () if shards else enumerate(classes):
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_KINDS)
        found += [((path, 0, -1), label) for path in files]
    check(bool(found), f"holds neither class folders of images nor .tar shards of them: {way_out}")
    parts, labels = zip(*found, strict=True)
    check(min(labels) >= 0 and max(labels) < args.num_classes, f"has more than {args.num_classes} classes: {way_out}")
    if (count := len(set(labels))) < args.num_classes:
        numbered = "" if shards else "; folders are numbered in their order"
        print(f"warning: --data-dir holds images of {count} of {args.num_classes} classes{numbered}", file=sys.stderr)
    return Images(labels, parts=list(parts), size=args.image_size)


def read_idx(path: Path) -> np.ndarray:
    """One file of Fashion-MNIST: four bytes of type and rank, the sizes, the values. Raises UserError."""
    way_out = "install the Debian package dataset-fashion-mnist, or name a folder with its four idx.gz files"
    with refuse(f"--data-dir {path.parent}: {path.name} cannot be read", way_out):
        raw = gzip.decompress(path.read_bytes())
        sizes = np.frombuffer(raw, ">i4", raw[3], offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(sizes)


@functools.cache
def load_images(args: Args) -> Images:
    """The training images of --dataset. Raises UserError."""
    if args.dataset == "imagenet":
        return load_imagenet(args)
    if args.dataset == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        return Images(digits.target, np.round(digits.images[:, None] * (255 / 16)).astype(np.uint8))
    folder = Path(args.data_dir or "/usr/share/datasets/fashion-mnist")
    pixels, labels = (read_idx(folder / f"train-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1"))
    fits = pixels.shape == (*labels.shape, 28, 28) and len(labels) > 0 and labels.max() < 10
    require(args, "data_dir", fits, f"holds pixels {pixels.shape}, labels {labels.shape}, not 28x28 and ten classes")
    pixels = np.pad(pixels, ((0, 0), (2, 2), (2, 2)))
    if args.image_size == 16:
        pixels = np.round(pixels.reshape(-1, 16, 2, 16, 2).mean((2, 4))).astype(np.uint8)
    return Images(labels.astype(int), pixels[:, None])


# --- Networks ---
SIGMA_DATA = 0.5
VP_LEVELS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().log1p().cumsum(0).neg().expm1().log() / 2


def precondition(sigma: Tensor, vp: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in and the UNet's timestep in D(y; s) = c_skip y + c_out F(c_in y, timestep): [EDM] Table 1 with
    timestep 1000 c_noise = 250 ln s, as in OpenAI's weights. Or of a network that predicts eps from x_t = alpha y on
    1000 linear steps: its time is where ln s lies between those of the steps.
    """
    if vp:  # DEVIATION(vp)
        levels, log_s = VP_LEVELS.to(sigma), sigma.log()
        above = torch.searchsorted(levels, log_s).clamp(1, 999)
        time = above - 1 + (log_s - levels[above - 1]) / (levels[above] - levels[above - 1])
        return torch.ones_like(sigma), -sigma, (1 + sigma**2).rsqrt(), time.clamp(0, 999)
    norm = (sigma**2 + SIGMA_DATA**2).sqrt()
    return (SIGMA_DATA / norm) ** 2, sigma * SIGMA_DATA / norm, 1 / norm, 250 * sigma.log()


class GaussianMixture(nn.Module):
    """The exact teacher: sum_n weights[n] N(means[n], std^2 I), by class where `labels` is given. Every quantity of a
    noise level has a closed form. means Float[N, D], weights Float[N], labels Int[N].
    """

    def __init__(self, means: Tensor, std: float, weights: Tensor | None = None, labels: Tensor | None = None):
        super().__init__()
        weights = torch.full_like(means[:, 0], 1 / len(means)) if weights is None else weights
        for name, value in (("means", means), ("log_weights", weights.log()), ("labels", labels)):
            self.register_buffer(name, value, persistent=False)
        self.std = std

    def forward(self, y: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Denoiser E[x | y], shaped as y. sigma: a level for each y, with trailing axes of size 1."""
        flat, variance = y.flatten(1), sigma.reshape(-1, 1) ** 2
        fit = flat @ self.means.T - 0.5 * (self.means**2).sum(1)  # -|y - mean|^2 / 2, without |y|^2: Float[B, N]
        logits = self.log_weights + fit / (variance + self.std**2)
        if labels is not None and self.labels is not None:
            logits = logits.masked_fill(labels[:, None] != self.labels, -math.inf)
        centre = logits.softmax(1) @ self.means  # Float[B, D]
        return ((variance * centre + self.std**2 * flat) / (variance + self.std**2)).view_as(y)


def make_unet(args: Args) -> UNet2DModel:
    """An untrained UNet of the ADM layout, which is ImageNet-64's EDM teacher with the paper preset's numbers."""
    levels, groups = len(args.unet_channels), math.gcd(32, *[width // 2 for width in args.unet_channels])
    attends = [level >= levels - args.unet_attention for level in range(levels)]
    torch.manual_seed(args.seed)
    how = {"in_channels": args.image_shape[0], "out_channels": args.image_shape[0] * (2 if args.vp else 1)}
    how |= {"block_out_channels": args.unet_channels, "layers_per_block": args.unet_layers}
    how |= {"down_block_types": ["AttnDownBlock2D" if attend else "ResnetDownsampleBlock2D" for attend in attends]}
    how |= {"up_block_types": ["AttnUpBlock2D" if attend else "ResnetUpsampleBlock2D" for attend in attends[::-1]]}
    how |= {"attention_head_dim": min(64, *args.unet_channels), "num_class_embeds": args.num_classes}
    how |= {"norm_num_groups": groups, "attn_norm_num_groups": groups, "resnet_time_scale_shift": "scale_shift"}
    unet = UNet2DModel(args.image_size, **how, downsample_type="resnet", upsample_type="resnet")
    for part in unet.modules():
        if args.vp and hasattr(part, "heads"):
            part.heads = 4  # at every width
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    return unet


ADM_RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2"}
ADM_RESNET |= {"out_layers.3": "conv2", "skip_connection": "conv_shortcut"}
ADM_OUTSIDE = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
ADM_OUTSIDE |= {"input_blocks.0.0": "conv_in", "label_emb": "class_embedding", "out.0": "conv_norm_out"}
ADM_OUTSIDE |= {"out.2": "conv_out"}


def from_adm(unet: UNet2DModel, adm: dict[str, Tensor], heads: int | None = None) -> dict[str, Tensor]:
    """State dict of `unet` from OpenAI's names. Both number their residual blocks, up- and downsamplers among them, and
    their attentions in the order of the forward pass. Queries, keys and values lie one after the other, each with all
    heads; with `heads`, head after head, each with its three. Raises KeyError, ValueError.
    """
    ours = sorted(dict(unet.named_modules()), key=lambda name: name[:1])  # down, mid, up

    def pairs(mark: str, kind: str) -> list[tuple[str, str]]:
        prefixes = {name.partition(mark)[0] for name in adm if mark in name}  # input, middle, output
        theirs = sorted(prefixes, key=lambda name: (name[0], *map(int, re.findall(r"\d+", name))))
        return list(zip(theirs, [name for name in ours if re.search(kind, name)], strict=True))

    blocks, wanted, state = pairs(".in_layers.0", r"(resnets|samplers)\.\d+$"), unet.state_dict(), {}
    names = [(f"{old}.{a}", f"{new}.{b}") for old, new in blocks for a, b in ADM_RESNET.items()]
    for part in ("weight", "bias"):
        for old, new in names + list(ADM_OUTSIDE.items()):
            if f"{new}.{part}" in wanted:  # only some residual blocks have a skip convolution
                state[f"{new}.{part}"] = adm[f"{old}.{part}"]
        for old, new in pairs(".qkv", r"attentions\.\d+$"):  # 1x1 convolutions there, linear layers here
            qkv = adm[f"{old}.qkv.{part}"]
            qkv = qkv.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2) if heads else qkv
            named = dict(zip(("to_q", "to_k", "to_v"), qkv.chunk(3), strict=True))
            for name, value in (named | {"to_out.0": adm[f"{old}.proj_out.{part}"]}).items():
                state[f"{new}.{name}.{part}"] = value.flatten(1) if part == "weight" else value
            state[f"{new}.group_norm.{part}"] = adm[f"{old}.norm.{part}"]
    return state


class Denoiser(nn.Module):
    """D(y; sigma) of [EDM] Eq. (7): a preconditioned UNet, an exact mixture, or their sum, which is how a student
    starts from an exact teacher. sigma Float[B, 1, 1, 1], labels Int[B]. bf16 is used inside the UNet only.
    """

    def __init__(self, args: Args, unet: UNet2DModel | None, exact: GaussianMixture | None = None):
        super().__init__()
        self.unet, self.exact, self.vp, self.bf16 = unet, exact, args.vp, args.dtype == "bf16"
        self.masks = [part for name, part in self.named_modules() if name.endswith(".dropout")]
        for mask in self.masks:
            mask.p = args.dropout if exact is None else 0.0  # an exact teacher has no masks to share
        self.memory = torch.channels_last if args.channels_last else torch.contiguous_format
        self.to(memory_format=self.memory)

    def raw(self, y: Tensor, sigma: Tensor, labels: Tensor, mask_seed: int | None = None) -> Tensor:
        """The network output F in D = c_skip y + c_out F, in fp32. With `mask_seed`, dropout with the masks of that
        seed: two networks of one architecture get the same ones, or their difference would be noise.
        """
        c_skip, c_out, c_in, timestep = precondition(sigma, self.vp)
        output = 0.0 if self.exact is None else (self.exact(y, sigma, labels) - c_skip * y) / c_out
        if self.unet is None:
            return output
        for mask in self.masks:
            mask.training = mask_seed is not None
        if mask_seed is not None:
            torch.manual_seed(mask_seed)  # whatever else draws from the global generator seeds it first
        inputs = (c_in * y).contiguous(memory_format=self.memory)
        with torch.autocast(y.device.type, torch.bfloat16, self.bf16, cache_enabled=False):  # casts are let go
            predicted = self.unet(inputs, timestep.flatten(), labels, return_dict=False)[0]
        return output + predicted[:, : y.shape[1]].float()  # what follows is guided-diffusion's learned variance

    def forward(self, y: Tensor, sigma: Tensor, labels: Tensor, mask_seed: int | None = None) -> Tensor:
        c_skip, c_out, _, _ = precondition(sigma, self.vp)
        return c_skip * y + c_out * self.raw(y, sigma, labels, mask_seed)


def load_teacher(args: Args, name: str) -> Denoiser:
    """The teacher that --teacher names, or of a run folder. Raises UserError."""
    if name == "gmm":
        images = load_images(args)
        pixels, labels = images(torch.arange(len(images.labels)))
        return Denoiser(args, None, GaussianMixture(to_float(pixels).flatten(1), args.gmm_std, labels=labels))
    way_out = "give a diffusers UNet2DModel folder (safetensors) or an OpenAI-format file of --unet-channels' layout"
    with refuse(f"--teacher {name} cannot be loaded", way_out):
        if Path(name).suffix in {".pt", ".safetensors"}:
            pickled = name.endswith(".pt")  # weights_only: nothing in the file is executed
            weights = torch.load(name, "cpu", weights_only=True) if pickled else safetensors.torch.load_file(name)
            unet = make_unet(args)
            unet.load_state_dict(from_adm(unet, weights, 4 if args.vp else None))
        else:
            inner = {"subfolder": "unet"} if (Path(name) / "unet").is_dir() else {}
            unet = UNet2DModel.from_pretrained(name, use_safetensors=True, **inner)
    shape, classes = (unet.config.in_channels, *[unet.config.sample_size] * 2), unet.config.num_class_embeds
    if (shape, classes) != (args.image_shape, args.num_classes):
        flags = f"--dataset {args.dataset} --image-size {args.image_size}: {args.image_shape} of {args.num_classes}"
        raise UserError(f"--teacher {name} makes images {shape} of {classes} classes, but {flags}; change one of them.")
    return Denoiser(args, unet)


def make_student(args: Args, teacher: Denoiser) -> Denoiser:
    """A trainable copy; beside an exact teacher, a UNet that outputs 0 at first."""
    if teacher.unet is None:
        return Denoiser(args, make_unet(args), teacher.exact).to(teacher.exact.means.device).eval()
    return copy.deepcopy(teacher).requires_grad_(True)


# --- Algorithm: pure functions of callables, so that analytic objects and networks run through the same lines ---
def generate(net: Callable, z: Tensor, labels: Tensor, sigma_star: float) -> Tensor:
    """x = g(z): the denoiser used once, at level s* on s* z. z Float[B, C, H, W], x of the same shape."""
    return net(sigma_star * z, torch.full_like(z[:, :1, :1, :1], sigma_star), labels)


def denoiser_difference(
    teacher: Denoiser, score: Denoiser, y: Tensor, sigma: Tensor, labels: Tensor, mask_seed: int | None
) -> Tensor:
    """Delta = D_q - D_phi as c_out (F_q - F_phi): c_skip y cancels, and small differences keep their precision."""
    with torch.no_grad():
        difference = teacher.raw(y, sigma, labels, mask_seed) - score.raw(y, sigma, labels, mask_seed)
        return precondition(sigma, teacher.vp)[1] * difference


# --- shared block: estimator ---
@dataclass
class Chain:
    """Where the E-step ended: y_K = g(z_K) + clean + sigma nu, in (x, z) with x in the place of g(z_K)."""

    z0: Tensor
    z: Tensor  # z_K
    sigma: Tensor
    x: Tensor  # g of the last latent but one; if z never moved it keeps its graph, and the M-step needs no second pass
    clean: Tensor  # the noise-free part of y - x, by a recursion to which no noise of eps is added
    nu: Tensor  # what is left of the initial and injected noise in eps_K: nu_0 = eps_0, decayed and added to each step
    last: Tensor  # noise injected in the last step
    logs: dict[str, Tensor]  # Float[B] each


def rms(values: Tensor) -> Tensor:
    return values.flatten(1).pow(2).mean(1).sqrt()


def e_step(
    generator: Callable, difference: Callable, z: Tensor, eps: Tensor, sigma: Tensor, normal_like: Callable, args: Args
) -> Chain:
    """[EMD] E-step: K Langevin steps on rho(eps, z), log rho = ln q(y) - ln p(y) - |eps|^2/2 - |z|^2/2, started
    at the student's own (eps_0, z_0). In (eps, z), with J = dg/dz and eps = clean / s + nu:
        eps <- (1 - gamma_eps) eps + gamma_eps Delta / s         + sqrt(2 gamma_eps) n
        z   <- (1 - gamma_z)   z   + gamma_z   J^T Delta / s^2   + sqrt(2 gamma_z)   n'
    In (x, z) the state is y, gamma_eps s^2 is its step, and J^T (y - g(z)) / s^2 pulls z. generator: z -> x,
    difference: (y, s) -> Delta. States have the type of z, at least fp32. sigma broadcasts against eps.
    """
    assert z.dtype in (torch.float32, torch.float64) and eps.dtype == z.dtype
    in_x, gamma, euler = args.corrector.startswith("x"), args.gamma_eps, args.langevin == "euler"
    scale, scale_z = (math.sqrt(2 * g if euler else g * (2 - g)) for g in (gamma, args.gamma_z))
    z0, nu, clean, clipped = z, eps, torch.zeros_like(eps), torch.zeros_like(z.flatten(1)[:, 0])
    x = first = None
    for step in range(args.k):
        if args.moves_z or step == 0:
            z, before = z.detach().requires_grad_(args.moves_z), x
            x = generator(z)
            if in_x and step > 0:  # z moved and y did not: the offset of y from g(z) did
                clean = clean + (before - x).detach()
        offset = clean + sigma * nu
        delta = difference(x.detach() + offset, sigma)
        first = delta if first is None else first
        last = scale * normal_like(eps)
        if args.moves_z:
            pull = (offset if in_x else delta) / sigma**2
            drift = args.gamma_z * torch.autograd.grad(x, z, pull.to(x.dtype))[0]
            # DEVIATION(z_clip): 1/s^2 explodes at low noise, so a sample's drift is shortened; how often is logged.
            size = rms(drift)
            drift = drift * (args.z_clip / size.clamp(min=args.z_clip)).view(-1, *[1] * (z.ndim - 1))
            clipped = clipped + (size > args.z_clip)
            z = (1 - args.gamma_z) * z.detach() + drift + scale_z * normal_like(z)
        nu = (1 - gamma) * nu + last
        clean = (1 - gamma) * clean + gamma * delta
    cosine = torch.cosine_similarity(first.flatten(1), delta.flatten(1))
    logs = {"z_norm": rms(z), "z_clipped_share": clipped / args.k, "delta_rms": rms(first), "delta_cosine": cosine}
    return Chain(z0, z, sigma, x.detach() if args.moves_z else x, clean, nu, last, logs)


def residual(chain: Chain, x: Tensor, args: Args) -> Tensor:
    """r: the M-step moves x = g(z_K) towards x + r ([EMD], noise cancellation). The negative log-likelihood
    |y - x|^2 / 2 s^2 has gradient -J^T r / s^2, and w(s) weighs that: w = s^2 leaves r.
    """
    noise = {"full": 0.0, "last": chain.nu - chain.last}.get(args.cancel, chain.nu)
    target = chain.clean + chain.sigma * noise
    if args.corrector == "x-z":  # y does not follow the last move of z
        target = target + (chain.x - x).detach()
    return target / (1 if args.weight == "s2" else chain.sigma**2)


def m_step_loss(generator: Callable[[Tensor], Tensor], chain: Chain, args: Args) -> tuple[Tensor, Tensor]:
    """Mean over the batch of |r|^2 / 2, whose gradient is -J_theta(z_K)^T r, and r itself."""

    def regress(x: Tensor, r: Tensor) -> Tensor:
        # (x - sg(x)) is 0: written so, a small r is not rounded to the precision of x.
        return 0.5 * (x - x.detach() - r).pow(2).flatten(1).sum(1).mean()

    x = generator(chain.z) if args.moves_z else chain.x
    r = residual(chain, x, args)
    loss = regress(x, r)
    if args.cancel == "exact":  # not in the paper: the noise is taken off at z_0, of which it is independent
        noise = chain.sigma * chain.nu / (1 if args.weight == "s2" else chain.sigma**2)
        loss = loss + regress(generator(chain.z0), -noise)
    return loss, r


# --- end shared block: estimator ---


def draw_sigma(args: Args, noise: "Noise", count: int) -> Tensor:
    return (args.sigma_mean + args.sigma_std * noise.normal(count, 1, 1, 1)).exp()


def denoising_loss(args: Args, net: Denoiser, x: Tensor, labels: Tensor, noise: "Noise") -> Tensor:
    """[EDM] Eq. (2) with its weight (s^2 + sigma_data^2) / (s sigma_data)^2 = 1 / c_out^2, levels, noise and dropout
    drawn: for teacher and student score network. Sum over pixels, mean over the batch.
    """
    mask_seed, sigma = int(noise.integers(2**31, 1)), draw_sigma(args, noise, len(x))
    error = net(x + sigma * noise.normal_like(x), sigma, labels, mask_seed) - x
    return (error / precondition(sigma, net.vp)[1]).pow(2).flatten(1).sum(1).mean()


def heun(denoise: Callable, z: Tensor, steps: int, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> Tensor:
    """[EDM] Algorithm 1: 2 steps - 1 evaluations of denoise(y, sigma) from z ~ N(0, I) to a sample."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    levels = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    y = z * high
    for here, there in zip(levels.tolist(), [*levels[1:].tolist(), 0.0], strict=True):
        slope = (y - denoise(y, torch.full_like(y[:, :1, :1, :1], here))) / here
        ahead = y + (there - here) * slope
        if there > 0:
            again = (ahead - denoise(ahead, torch.full_like(y[:, :1, :1, :1], there))) / there
            ahead = y + (there - here) * 0.5 * (slope + again)
        y = ahead
    return y


# --- Run folder, checkpoints, updates ---
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


# --- shared block: training ---
def to_float(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def tile(images: Tensor, columns: int) -> np.ndarray:
    """Float[N, C, H, W] in [-1, 1], row by row -> UInt8[rows H, columns W, 3]."""
    rows = to_uint8(images).expand(-1, 3, -1, -1).unflatten(0, (-1, columns))
    return rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).cpu().numpy()


def generator_lr(args: Args, step: int) -> float:
    """Constant, or with a linear decay over the last half of the run: which of them is the paper's, is unknown."""
    return args.generator_lr * (min(1.0, 2 - 2 * (step - 1) / args.total_steps) if args.anneal_learning_rate else 1.0)


def ema_decay(step: int, args: Args) -> float:
    """Decay of update `step`, counted from 1: at first the half-life is a share of the updates made."""
    return min(args.ema, 0.5 ** (1 / (args.ema_ramp * step))) if args.ema_ramp else args.ema


@torch.no_grad()
def update_ema(average: nn.Module, net: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)


class Noise:
    """Random numbers that depend on a key of integers alone: a resumed run, and more processes, draw the same."""

    def __init__(self, device: torch.device | str, *key: int):
        seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
        self.device, self.generator = device, torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype)

    def normal_like(self, like: Tensor) -> Tensor:
        return self.normal(*like.shape, dtype=like.dtype)

    def integers(self, high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), generator=self.generator, device=self.device)


class Means:
    """Means over updates, micro-batches and processes. add() takes a number or Float[B], which may be empty."""

    def __init__(self, acc: Accelerator):
        self.acc, self.sums = acc, {}

    def add(self, name: str, values: Tensor | float) -> None:
        values = torch.as_tensor(values, dtype=torch.float32, device=self.acc.device).detach().flatten()
        self.sums[name] = self.sums.get(name, 0) + torch.stack([values.sum(), torch.ones_like(values).sum()])

    def take(self) -> dict[str, float]:
        table = self.acc.reduce(torch.stack(list(self.sums.values())), "sum").tolist()
        names, self.sums = list(self.sums), {}
        return {name: total / count for name, (total, count) in zip(names, table, strict=True) if count}


@contextlib.contextmanager
def refuse(what: str, way_out: str) -> Iterator[None]:
    """Around the use of a file that may be missing, damaged or foreign: whatever it raises becomes a UserError."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{what} ({reason}); {way_out}.") from error


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """The state_dict of everything that moves; the last two are kept. Raises UserError."""
    path = folder / "checkpoints" / f"{step:09d}.pt"
    with refuse(f"--runs-dir: {path} was not written", f"make room, then --resume {folder}"):
        path.parent.mkdir(exist_ok=True)
        torch.save({name: part.state_dict() for name, part in state.items()}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)  # only a whole file gets the name
        for old in sorted(path.parent.glob("*.pt"))[:-2]:
            old.unlink()


def load_checkpoint(folder: Path) -> tuple[int, dict[str, Any]]:
    """Step and contents of the newest checkpoint that can be read; 0, {} if none was saved. Raises UserError."""
    paths = sorted((folder / "checkpoints").glob("*.pt"), reverse=True)
    for path in paths:
        try:
            return int(path.stem), torch.load(path, "cpu", weights_only=True, mmap=True)
        except Exception as error:  # a damaged file raises one of many types
            print(f"warning: {path} cannot be read ({type(error).__name__}); trying the one before", file=sys.stderr)
    if paths:
        raise UserError(f"--resume or --eval-only {folder}: none of its checkpoints can be read; name another run.")
    return 0, {}


def restore(folder: Path, state: dict[str, Any], saved: dict[str, Any]) -> None:
    """Fill networks and optimisers; of the latter the state, since flags may set other betas. Raises UserError."""
    what = f"--resume or --eval-only {folder}: its checkpoint does not fit these settings"
    with refuse(what, "leave out flags that change a size"):
        for name, part in state.items():
            stored, is_optimizer = saved[name], isinstance(part, torch.optim.Optimizer)
            if is_optimizer:
                stored = stored | {"param_groups": part.state_dict()["param_groups"]}
            part.load_state_dict(stored)
            for p, moments in part.state.items() if is_optimizer else ():
                # Fused updates walk through memory: a moment must lie as its parameter does, which a flag may change.
                moments |= {key: torch.empty_like(p).copy_(x) for key, x in moments.items() if x.shape == p.shape}


def accumulate(
    args: Args, means: Means, name: str, key: tuple, total: int, loss_of: Callable, optimizer: Any, lr: float, clip=0.0
) -> None:
    """One update on loss_of(noise, count), the mean over a micro-batch of `count` of the update's `total` images. The
    networks stay outside of any wrapper, so that the E-step's gradients of z start no communication: those of the
    parameters are summed over processes here.
    """
    acc, size, parameters = means.acc, min(args.micro_batch_size, total), optimizer.param_groups[0]["params"]
    for slot in range(acc.process_index, total // size, acc.num_processes):
        loss = loss_of(Noise(acc.device, args.seed, *key, slot), size)
        (loss * size / total).backward()
        means.add(f"losses/{name}", loss)
    for p in parameters if acc.num_processes > 1 else ():
        p.grad = acc.reduce(p.grad, "sum")
    means.add(f"losses/{name}_grad_norm", nn.utils.clip_grad_norm_(parameters, clip or math.inf))
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()


def loop(
    args: Args, run: Run, acc: Accelerator, first: int, updates: int, offset: int, state: dict, update: Callable
) -> Iterator[int]:
    """Calls update(done, means) for the updates of a stage beyond `first`, with logs and checkpoints of `state`, and
    yields `done` after each. `offset` counts the updates of earlier stages.
    """
    means, since, seconds = Means(acc), first, 0.0
    if first > 0:
        yield first  # a resumed run: what follows this update may be missing
    for done in range(first + 1, updates + 1):
        mark = time.perf_counter()
        update(done, means)
        # Any process may have been asked to stop: all of them do, after the same update.
        stop = acc.reduce(torch.tensor(float(run.stop), device=acc.device), "sum").item() > 0
        seconds += time.perf_counter() - mark
        last = done == updates
        if stop or last or done % args.log_every == 0:
            logs, speed = means.take(), (done - since) / seconds
            shown = "  ".join(f"{name[7:]} {value:.4g}" for name, value in logs.items() if name.startswith("losses/"))
            logs |= {"perf/updates_per_second": speed, "perf/peak_memory_gb": getrusage(RUSAGE_SELF).ru_maxrss / 2**20}
            if acc.device.type == "cuda":
                logs["perf/peak_device_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
            run.log(offset + done, logs)
            left, since, seconds = (updates - done) / speed / 3600, done, 0.0
            text = f"update {done:,} of {updates:,}  {shown}  {speed:.2f} updates/s  ETA {left:.2f} h"
            with contextlib.suppress(BrokenPipeError):  # Ctrl-C ends the reader of `... | tee LOG` as well
                acc.print(text, flush=True)
        if run.writes and (stop or last or done % args.save_every == 0):
            save_checkpoint(run.folder, offset + done, state)
        if stop and not last:
            acc.print(f"stopped and saved after update {done:,}; go on with: --resume {run.folder}")
            return
        yield done


def is_scored(run: Run, step: int) -> bool:
    """Whether metrics.jsonl has an evaluation of this step. The process that writes it looks."""
    lines = run.lines.read_text().splitlines() if run.writes else ()
    return broadcast_object_list([any(line.startswith(f'{{"step": {step}, "eval/') for line in lines)])[0]


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """[PR] Share of fakes in the reals' k-nearest-neighbour balls, and of reals in the fakes'. Features Float[N, D]."""

    def covered(points: Tensor, centres: Tensor) -> float:
        # k + 1: every centre is its own nearest neighbour
        radii = torch.cat([torch.cdist(part, centres).kthvalue(k + 1).values for part in centres.split(1000)])
        return float(torch.cat([(torch.cdist(p, centres) <= radii).any(1) for p in points.split(1000)]).double().mean())

    return covered(fake, real), covered(real, fake)


def fingerprint(net: nn.Module, file: str) -> str:
    """Of a network's weights, or of the file of one that was frozen, which holds them as constants."""
    weights = b"".join(value.cpu().numpy().tobytes() for value in net.state_dict().values())
    return hashlib.sha256(weights or Path(file).read_bytes()).hexdigest()[:12]


def compare(real: Tensor, fake: Tensor, ruler: str, device: torch.device) -> dict[str, float]:
    """Distances between two sets of features Float[N, D]. Only a Frechet distance on Inception's is an FID."""
    name = "fid" if ruler.startswith("inception") else "frechet"
    as_given, subset = nn.Identity(), min(1000, len(real) // 2, len(fake) // 2)
    as_given.num_features = real.shape[1]
    distance = FrechetInceptionDistance(as_given, sync_on_compute=False)  # every process holds all features
    kid = KernelInceptionDistance(as_given, subsets=50, subset_size=subset, sync_on_compute=False)
    for metric in (distance, kid):
        metric.update(real, real=True)
        metric.update(fake, real=False)
    precision, recall = precision_recall(real.to(device), fake.to(device))  # N^2 distances
    return {name: float(distance.compute()), "kid": float(kid.compute()[0]), "precision": precision, "recall": recall}


# --- end shared block: training ---


# --- Evaluation ---
class Features(nn.Module):
    """UInt8[B, C, H, W] -> features Float[B, D] and logits, from a TorchScript file or from a small CNN that is trained
    here, always from the same seed and batches, whatever --seed is: runs are measured with one ruler.
    """

    def __init__(self, args: Args, images: Images):
        super().__init__()
        self.from_file = bool(args.features)
        if self.from_file:
            way_out = "name inception-2015-12-05.pt, or give --eval-samples 0"
            with refuse(f"--features {args.features} cannot be loaded", way_out):
                self.net = torch.jit.load(args.features, "cpu")
                self(torch.zeros(2, *args.image_shape, dtype=torch.uint8))  # what it cannot give is found out now
            return
        torch.manual_seed(0)
        convs = [nn.Conv2d(args.image_shape[0], 32, 3, 1, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU()]
        head = [nn.Flatten(), nn.Linear(64 * (args.image_size // 4) ** 2, 64), nn.ReLU()]
        self.net = nn.Sequential(*convs, nn.Conv2d(64, 64, 3, 2, 1), nn.ReLU(), *head)
        self.head = nn.Linear(64, args.num_classes)
        optimizer = torch.optim.Adam(self.parameters(), 1e-3)
        for step in range(args.classifier_steps):
            pixels, labels = images(Noise("cpu", 0, step).integers(len(images.labels), 128))
            optimizer.zero_grad()
            cross_entropy(self(pixels)[1], labels).backward()
            optimizer.step()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self.from_file:
            images = images.expand(-1, 3, -1, -1)
            return self.net(images, return_features=True), self.net(images, no_output_bias=True).log()
        features = self.net(to_float(images))
        return features, self.head(features)


class Evaluator:
    """Compares generated images, their labels in turn, with the dataset and with the teacher's own samples."""

    def __init__(self, args: Args, acc: Accelerator, teacher: Denoiser):
        self.args, self.acc, self.labels = args, acc, torch.arange(args.eval_samples) % args.num_classes
        images = load_images(args)
        self.features = Features(args, images).to(acc.device).eval().requires_grad_(False)
        kind = Path(args.features).stem if args.features else "classifier"
        self.ruler = f"{kind}, {args.dataset} {args.image_size} px, weights {fingerprint(self.features, args.features)}"
        # As many images of each class as are generated, as far as there are.
        shuffled = torch.randperm(len(images.labels), generator=Noise("cpu", 0).generator)
        counts = self.labels.bincount(minlength=args.num_classes).tolist()
        picked = torch.cat([shuffled[images.labels[shuffled] == c][:n] for c, n in enumerate(counts)])
        self.references = {"data": self.describe(torch.cat([images(part)[0] for part in picked.split(1000)]))[0]}
        self.teacher_scores, self.references["teacher"], self.spread = self.score(
            lambda z, c: heun(lambda y, s: teacher(y, s, c), z, args.heun_steps), 2 * args.heun_steps - 1
        )

    @torch.no_grad()
    def describe(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        parts = [self.features(part.to(self.acc.device)) for part in pixels.split(self.args.eval_batch_size)]
        return tuple(torch.cat(part).float().cpu() for part in zip(*parts, strict=True))

    @torch.no_grad()
    def score(self, sampler: Callable[[Tensor, Tensor], Tensor], evaluations: int) -> tuple[dict, Tensor, Tensor]:
        """Scores of the images sampler(z, labels), made in chunks, their features, and their deviations by class."""
        args, acc, size, started = self.args, self.acc, self.args.eval_batch_size, time.perf_counter()
        pixels = torch.zeros(args.eval_samples, *args.image_shape, dtype=torch.uint8)  # on the host
        for index in range(acc.process_index, -(-args.eval_samples // size), acc.num_processes):
            labels = self.labels[index * size :][:size].to(acc.device)
            z = Noise(acc.device, 0, index).normal(len(labels), *args.image_shape)
            pixels[index * size :][:size] = to_uint8(sampler(z, labels))
        pixels = torch.cat([acc.reduce(part.to(acc.device), "sum").cpu() for part in pixels.split(1000)])
        seconds = (time.perf_counter() - started) * acc.num_processes / len(pixels)
        scores = {"evaluations_per_image": evaluations, "seconds_per_image": seconds}

        torch.manual_seed(0)  # torchmetrics draws subsets and splits from the global generator
        features, logits = self.describe(pixels)
        inception_score = InceptionScore(nn.Identity(), sync_on_compute=False)
        inception_score.update(logits)
        inception = self.ruler.startswith("inception")
        scores["inception_score" if inception else "classifier_score"] = float(inception_score.compute()[0])
        if not args.features:
            scores["label_accuracy"] = float((logits.argmax(1) == self.labels).double().mean())
        for reference, real in self.references.items():
            compared = compare(real, features, self.ruler, self.acc.device)
            scores |= {f"{key}_to_{reference}": value for key, value in compared.items()}
        # Mean over pixels: a collapse shows here first.
        spread = [to_float(pixels[self.labels == c]).std(0).mean() for c in range(args.num_classes)]
        return scores, features, torch.stack(spread)

    def __call__(self, generator: Denoiser, run: Run, step: int) -> dict[str, float]:
        """Scores of a generator, written to eval.json beside the teacher's."""
        student, _, spread = self.score(lambda z, labels: generate(generator, z, labels, self.args.sigma_star), 1)
        ratio = spread / self.spread
        student |= {"spread_ratio": float(ratio.mean()), "spread_ratio_worst": float(ratio.min())}
        result = {"step": step, "samples": len(self.labels), "features": self.ruler}
        text = json.dumps(result | {"student": student, "teacher": self.teacher_scores}, indent=2)
        if run.writes:
            (run.folder / "eval.json").write_text(text)
            print(text)
        return {f"eval/{name}": value for name, value in student.items()}


# --- Training ---
def train_teacher(args: Args, run: Run, acc: Accelerator, first: int, saved: dict[str, Any]) -> bool:
    """[EDM] training of a teacher on --dataset; its average is kept as RUN/teacher/. Whether it came to its end."""
    # DEVIATION(teacher's training): shorter than theirs.
    net, images = Denoiser(args, make_unet(args)).to(acc.device).eval(), load_images(args)
    average, adam = copy.deepcopy(net).requires_grad_(False), torch.optim.Adam(net.parameters(), fused=True)
    if args.compile:
        net.unet.compile()

    def loss_of(noise: Noise, count: int) -> Tensor:
        pixels, labels = images(noise.integers(len(images.labels), count).cpu())
        return denoising_loss(args, net, to_float(pixels.to(acc.device)), labels.to(acc.device), noise)

    def update(done: int, means: Means) -> None:
        lr = args.teacher_lr * min(1.0, 10 * done / args.teacher_steps)
        accumulate(args, means, "denoising", (0, done), args.teacher_batch_size, loss_of, adam, lr)
        update_ema(average, net, ema_decay(done, args))

    state = {"teacher": net, "average": average, "adam": adam}
    if saved:
        restore(run.folder, state, saved)
    acc.print(f"{run.folder}: {args.teacher_steps:,} updates of the teacher", flush=True)
    done = max([first, *loop(args, run, acc, first, args.teacher_steps, 0, state, update)])
    if run.writes and done == args.teacher_steps:
        average.unet.save_pretrained(run.folder / "teacher.tmp")
        (run.folder / "teacher.tmp").rename(run.folder / "teacher")  # a teacher/ that exists is whole
    acc.wait_for_everyone()
    return done == args.teacher_steps


def init_state(args: Args, teacher: Denoiser) -> dict[str, Any]:
    """What training changes: generator, score (the student score network), average (of the generator); optimisers."""
    state: dict[str, Any] = {name: make_student(args, teacher) for name in ("generator", "score", "average")}
    state["average"].requires_grad_(False)
    for name in ("generator", "score"):
        state[f"adam_{name}"] = torch.optim.Adam(state[name].parameters(), betas=(args.beta1, args.beta2), fused=True)
    return state


def train_iteration(args: Args, teacher: Denoiser, state: dict, step: int, means: Means) -> None:
    generator, score = state["generator"], state["score"]

    def draw(noise: Noise, count: int) -> tuple[Tensor, Tensor]:
        return noise.integers(args.num_classes, count), noise.normal(count, *args.image_shape)

    def score_loss(noise: Noise, count: int) -> Tensor:
        labels, z = draw(noise, count)
        with torch.no_grad():
            x = generate(generator, z, labels, args.sigma_star)
        return denoising_loss(args, score, x, labels, noise)

    def generator_loss(noise: Noise, count: int) -> Tensor:
        labels, z = draw(noise, count)
        sigma, eps = draw_sigma(args, noise, count), noise.normal_like(z)
        sigma = sigma.clamp(min=args.sigma_min)  # DEVIATION(sigma_min)
        # 2. E-step. While z moves the parameters are frozen, so that only gradients of z are computed.
        generator.requires_grad_(not args.moves_z)
        g = functools.partial(generate, generator, labels=labels, sigma_star=args.sigma_star)

        def difference(y: Tensor, sigma: Tensor) -> Tensor:  # every evaluation with a dropout mask of its own
            return denoiser_difference(teacher, score, y, sigma, labels, int(noise.integers(2**31, 1)))

        chain = e_step(g, difference, z, eps, sigma, noise.normal_like, args)
        # 3. M-step.
        generator.requires_grad_(True)
        loss, r = m_step_loss(g, chain, args)
        for low, high in ((0, 0.1), (0.1, 0.3), (0.3, 1), (1, math.inf)):
            means.add(f"chain/residual_rms_s{low}", rms(r)[((sigma >= low) & (sigma < high)).flatten()])
        for name, values in chain.logs.items():
            means.add(f"chain/{name}", values)
        return loss

    # 1. The student score network learns to denoise the generator's samples.
    for turn in range(args.score_updates):
        adam = state["adam_score"]
        accumulate(args, means, "denoising", (1, step, turn), args.batch_size, score_loss, adam, args.score_lr)
    adam, lr = state["adam_generator"], generator_lr(args, step)
    accumulate(args, means, "generator", (2, step), args.batch_size, generator_loss, adam, lr, args.max_grad_norm)
    # 4. The average that is evaluated.
    update_ema(state["average"], generator, ema_decay(step, args))


@torch.no_grad()
def write_media(args: Args, run: Run, step: int, teacher: Denoiser, state: dict, acc: Accelerator) -> None:
    """On fixed noise: samples of the averaged generator, once the teacher's; a panel with a row each for g(z), y at
    s = 0.5, D_q(y), D_phi(y), their difference four times enlarged, and y and g(z) after the chain. With --mcmc-steps
    K, a row each for g(z) + r after 0, K/30, K/10, K/3 and K steps of one chain: student samples being repaired.
    """
    noise, columns = Noise(acc.device, 0, 0), 10
    labels = torch.arange(8 * columns, device=acc.device) % columns * (args.num_classes // columns)
    z, few = noise.normal(8 * columns, *args.image_shape), labels[:columns]
    sigma, eps = torch.full_like(z[:columns, :1, :1, :1], 0.5), noise.normal_like(z[:columns])
    generator = functools.partial(generate, state["average"], labels=few, sigma_star=args.sigma_star)
    difference = functools.partial(denoiser_difference, teacher, state["score"], labels=few, mask_seed=None)

    def after(k: int) -> tuple[Tensor, Tensor, Tensor]:
        """y, g(z) and g(z) + r after k steps; the noise of a longer chain begins with that of a shorter one."""
        part = dataclasses.replace(args, k=k, cancel="full", weight="s2")
        with torch.enable_grad():  # of z
            chain = e_step(generator, difference, z[:columns], eps, sigma, Noise(acc.device, 0, 1).normal_like, part)
        x = generator(chain.z)
        y = x + residual(chain, x, dataclasses.replace(part, cancel="none"))
        return y, x, x + residual(chain, x, part)

    run.media(step, "samples", tile(generate(state["average"], z, labels, args.sigma_star), columns))
    if not list((run.folder / "media").glob("teacher_*")):
        run.media(step, "teacher", tile(heun(lambda y, s: teacher(y, s, labels), z, args.heun_steps), columns))
    x = generator(z[:columns])
    y = x + sigma * eps
    denoised = [teacher(y, sigma, few), state["score"](y, sigma, few), 4 * difference(y, sigma)]
    run.media(step, "panel", tile(torch.cat([x, y, *denoised, *after(args.k)[:2]]), columns))
    if args.mcmc_steps:
        rows = [after(max(1, round(args.mcmc_steps / part)))[2] for part in (30, 10, 3, 1)]
        run.media(step, "mcmc", tile(torch.cat([x, *rows]), columns))


def load_everything(args: Args, run: Run, acc: Accelerator, saved: dict, teacher=None) -> tuple[Denoiser, dict]:
    """The frozen teacher, and the student's state as it starts or as it was saved."""
    teacher = teacher or load_teacher(args, str(run.folder / "teacher") if args.train_teacher else args.teacher)
    state = init_state(args, teacher.to(acc.device).eval().requires_grad_(False))
    if "generator" in saved:
        restore(run.folder, state, saved)
    return teacher, state


def train(args: Args, acc: Accelerator) -> None:
    """Train from the start or from --resume, with logs, pictures and checkpoints on the way, then evaluate."""
    if args.eval_samples or (args.train_teacher and not args.resume):  # what cannot be read is refused now
        load_images(args)
    if args.eval_samples and args.features:
        Features(args, None)
    if args.compile:  # a network is compiled once for each use (gradients, dropout) and each batch size
        torch._dynamo.config.recompile_limit = 64
    step, saved = load_checkpoint(Path(args.resume)) if args.resume else (0, {})
    teacher = None if args.train_teacher else load_teacher(args, args.teacher)
    run = Run(args, step, acc.is_main_process)
    run.folder = Path(broadcast_object_list([str(run.folder)])[0])  # its time is the main process's
    with torch.device("meta"):  # a checkpoint holds three networks and Adam's two moments of two of them
        unet = (teacher and teacher.unet) or make_unet(args)
        size = 7 * 4 * sum(p.numel() for p in unet.parameters()) / 1e9
    needed = size * (3 - len(list(run.folder.glob("checkpoints/*.pt"))))  # two are kept while one is written
    if run.writes and (free := shutil.disk_usage(run.folder).free / 1e9) <= needed:
        raise UserError(f"the disk of {run.folder} has {free:.1f} GB free but {needed:.1f} are needed: make room.")
    if args.train_teacher and not (run.folder / "teacher").exists():
        if not train_teacher(args, run, acc, step, saved):
            return
        step, saved = args.teacher_steps, {}
    (teacher, state), saved = load_everything(args, run, acc, saved, teacher), {}  # what was loaded is let go
    offset = args.teacher_steps * args.train_teacher
    require(args, "total_steps", step - offset <= args.total_steps, f"is below the {step - offset} made: give more")
    acc.print(f"{run.folder}: {args.total_steps:,} updates of the generator", flush=True)
    for net in (teacher, state["generator"], state["score"]) if args.compile else ():
        if net.unet:
            net.unet.compile()
    evaluator, update = None, functools.partial(train_iteration, args, teacher, state)
    for done in loop(args, run, acc, max(0, step - offset), args.total_steps, offset, state, update):
        if last := done == args.total_steps:
            run.on_signal(signal.SIG_DFL)  # all is saved
        if run.writes and args.media_every and (last or done % args.media_every == 0):
            write_media(args, run, offset + done, teacher, state, acc)
        due = last or (args.eval_every and done % args.eval_every == 0)
        if args.eval_samples and due and not is_scored(run, offset + done):
            evaluator = evaluator or Evaluator(args, acc, teacher)
            run.log(offset + done, evaluator(state["average"], run, offset + done))


def evaluate(args: Args, acc: Accelerator) -> None:
    """--eval-only: scores and pictures of a run's newest checkpoint."""
    step, saved = load_checkpoint(Path(args.eval_only))
    require(args, "eval_only", "generator" in saved, f"has no student yet: go on with --resume {args.eval_only}")
    run = Run(args, writes=acc.is_main_process)
    teacher, state = load_everything(args, run, acc, saved)
    if run.writes:
        write_media(args, run, step, teacher, state, acc)
    scores = Evaluator(args, acc, teacher)(state["average"], run, step) if args.eval_samples else {}
    if run.wandb:  # metrics.jsonl stays as training left it
        run.wandb.log({"step": step, **scores})


def dry_run(args: Args) -> None:
    """Settings, parameter counts and an update's cost, from shapes alone: of a local --teacher's UNet or the flags'."""
    names = (Path(args.teacher, name) for name in ("unet/config.json", "config.json"))
    config = next((path for path in names if args.teacher and path.exists()), None)
    readable = refuse(f"--teacher {args.teacher} cannot be read", "give a folder of a class-conditional UNet2DModel")
    with readable, torch.device("meta"), FlopCounterMode(display=False) as counter:
        unet = UNet2DModel.from_config(json.loads(config.read_text())) if config else make_unet(args)
        image = torch.zeros(1, unet.config.in_channels, *args.image_shape[1:])
        unet(image, torch.zeros(1), torch.zeros(1, dtype=torch.long))
    flops, parameters = counter.get_total_flops(), sum(p.numel() for p in unet.parameters())
    chain = (4 if args.moves_z else 2) * args.k + 3  # see docs: a backward pass counts as two
    forwards = chain + 4 * args.score_updates + 3 * (args.cancel == "exact")
    total = forwards * args.batch_size * args.total_steps * flops
    total += 3 * args.teacher_batch_size * args.teacher_steps * flops * args.train_teacher
    print(json.dumps(dataclasses.asdict(args), indent=2))
    copies = "three" if args.teacher == "gmm" else "four"
    print(f"UNet: {parameters:,} parameters, in {copies} copies; a forward pass of an image is {flops / 1e9:.2f} GFLOP")
    print(f"an update: {forwards} forward passes of {args.batch_size} images (a backward pass counts as two)")
    speeds = {f"a GPU's {args.dtype}": 3e14 if args.dtype == "bf16" else 4e13, "two CPU cores": 5e10}  # assumed
    hours = ", ".join(f"{total / x / 3600:.1f} h at {x / 1e12:g} TFLOP/s ({name})" for name, x in speeds.items())
    print(f"in all {total / 1e15:.2f} PFLOP: {hours}")


# --- shared block: main ---
def main() -> None:
    try:
        args = parse_args()
        check_args(args)
        together = int(os.environ.get("WORLD_SIZE", "1")) > 1
        require(args, "distributed", together or not args.distributed, "needs `accelerate launch` to start the script")
        if args.dry_run:
            return dry_run(args)
        torch.backends.cudnn.allow_tf32 = False  # so that fp32 means fp32, as it does by default in matrix products
        acc = Accelerator()
        (evaluate if args.eval_only else train)(args, acc)
        acc.end_training()  # a process group whose threads outlive the interpreter may abort it
    except (UserError, OSError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not (full or isinstance(error, UserError) or error.errno == errno.EPIPE):
            raise
        print(f"{Path(__file__).name}: error: {error}{'; make room, then --resume the run' * full}", file=sys.stderr)
        sys.exit(2)


# --- end shared block: main ---


if __name__ == "__main__":
    main()

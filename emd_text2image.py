# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "diffusers>=0.42,<0.43", "transformers>=5.23,<6", "accelerate>=1.15,<2", "torchmetrics>=1.9,<2",
#   "safetensors>=0.8,<1", "numpy>=2.0,<3", "scipy>=1.17,<2", "pillow>=12,<14", "tyro>=1.0,<2", "imageio>=2.37,<3",
#   "imageio-ffmpeg>=0.6,<1", "wandb>=0.25,<1",
# ]
# ///
"""EM Distillation of a text-to-image latent diffusion pipeline into a generator of one network evaluation.
Papers: [EMD] arXiv:2405.16852, [LDM] arXiv:2112.10752, [CFG] arXiv:2207.12598, [DDIM] arXiv:2010.02502,
[PR] precision and recall arXiv:1904.06991. Details, deviations, results: docs/emd_text2image.md

    python emd_text2image.py --teacher stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts prompts.txt   # the paper's
    python emd_text2image.py --preset single-gpu --teacher FOLDER --prompts prompts.txt   # batch 64, K 4, bf16: ~23 GB
    python emd_text2image.py --preset cpu                   # drawn shapes: trains a small pipeline, then distils it
    python emd_text2image.py --preset smoke                 # a minute: learns nothing, touches everything
    python emd_text2image.py --resume runs/RUN_FOLDER       # goes on where that run stopped
    python emd_text2image.py --eval-only runs/RUN_FOLDER --generate "a red square"   # pictures from its pipeline/
    accelerate launch emd_text2image.py --teacher FOLDER ...   # several processes; --batch-size stays the global one

No images are needed to distil, only the teacher and captions. Every update: 1 the student score network learns the
generator's own latents, 2 E-step: K Langevin steps on the pair of noise and latent noise towards the guided teacher,
3 M-step: the generator is regressed on where the chain went.
Symbols, all in "EDM space" y = x_t / alpha_t: z ~ N(0, I), x = g(z, c) generated VAE latent for the caption c, eps
noise, s = sigma_t / alpha_t noise level of timestep t, y = x + s eps, D_q and D_phi denoisers of teacher and student,
Delta = D_q - D_phi. Axes: B images of a micro-batch, C H W of the VAE's latent, L D tokens and width of text features.
"""

import argparse
import contextlib
import copy
import dataclasses
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any, Literal

import diffusers
import imageio.v3 as imageio
import numpy as np
import torch
import transformers
import tyro
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from diffusers import UNet2DConditionModel as UNet
from PIL import Image, ImageDraw, ImageOps
from scipy import ndimage
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

for library in (diffusers, transformers):  # captions that are cut off are counted and said below
    library.utils.logging.set_verbosity_error()

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

    total_steps: int = 5000  # generator updates of the whole run (0: only train the teacher)

    teacher: str = ""  # diffusers Stable Diffusion folder or hub id, eps- or v-prediction (empty: with --train-teacher)
    prompts: str = ""  # captions: .txt, .jsonl, a webdataset .tar or a folder of those (empty: of --pictures)
    image_size: int = 512  # height and width of a picture
    guidance: float = 2.0  # classifier-free guidance of the teacher, w (1: none); student and its score have none
    text_cache_gb: float = 8.0  # a set of captions is encoded once if that fits into so much memory, else when drawn
    pictures: str = ""  # captioned pictures for --train-teacher, a webdataset .tar (empty: drawn shapes)
    train_teacher: bool = False  # train a pipeline on those first, kept in the run folder as teacher/
    vae_steps: int = 20_000  # updates of its autoencoder
    vae_lr: float = 1e-4  # Adam step size of those: linear warmup in the first tenth, linear decay in the last half
    teacher_steps: int = 200_000  # updates of its UNet and text encoder, after that
    teacher_batch_size: int = 256  # pictures per update of UNet or autoencoder, all processes together
    teacher_lr: float = 1e-4  # Adam step size of those, with the same warmup and decay
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"  # what a UNet made here predicts
    unet_channels: tuple[int, ...] = (320, 640, 1280, 1280)  # of a UNet made here; its last level lacks cross-attention
    unet_layers: int = 2  # residual blocks per level of a UNet made here
    text_width: int = 768  # of a text encoder made here
    text_layers: int = 12  # of a text encoder made here
    vae_channels: tuple[int, ...] = (128, 256, 512, 512)  # of the levels of an autoencoder made here

    k: int = 8  # Langevin steps of the E-step (K)
    corrector: Literal["eps-z", "x-z", "eps", "x"] = "eps-z"  # what they move (eps: z stays; x: the same as eps)
    gamma_eps: float = 0.09  # Langevin step size of eps (0.3 squared); of x it is this times s squared
    gamma_z: float = 2.5e-5  # Langevin step size of z (0.005 squared)
    langevin: Literal["euler", "ou"] = "euler"  # noise sqrt(2 gamma), or the one that keeps unit variance exactly
    cancel: Literal["full", "last", "none", "exact"] = "full"  # which of the chain's noise the regression target loses
    weight: Literal["s2", "nll"] = "s2"  # of a noise level: sigma^2/alpha^2, as in the paper, or 1 (plain likelihood)
    z_clip: float = 0.1  # largest root-mean-square of one step's drift of z: guards against 1/s^2 at low noise
    t_min: int = 20  # lowest timestep of the E-step
    t_max: int = 979  # highest timestep of the E-step; between the two they are equally likely
    t_star: int = 500  # timestep at which the teacher is the first generator: x = D(s* z, t*)
    score_updates: int = 1  # updates of the student score network per generator update
    generator_lr: float = 2e-6  # Adam step size of the generator
    anneal_learning_rate: bool = False  # the generator's step size falls linearly to 0 over the last half of the run
    score_lr: float = 1e-5  # Adam step size of the student score network
    beta1: float = 0.0  # of Adam, for generator and score network; at 0 no first moment is stored
    beta2: float = 0.99  # of Adam, for generator and score network
    max_grad_norm: float = 0.0  # generator gradients are clipped to this global norm (0: never)
    ema: float = 0.999  # decay per update of the averaged generator and of the averaged teacher
    ema_ramp: float = 0.05  # the average's half-life is at most this share of the updates so far (0: no ramp)
    batch_size: int = 1024  # pictures per update, all processes and micro-batches together
    micro_batch_size: int = 8  # pictures of one chain; gradients of the micro-batches are accumulated
    checkpointing: bool = False  # while distilling, compute activations again in the backward pass, not keep them

    ddim_steps: int = 25  # steps of the teacher's sampler
    eval_prompts: str = ""  # captions of evaluations, a file as for --prompts (empty: those)
    reference: str = ""  # folder of real pictures to compare with (empty: --pictures, or only the teacher)
    features: str = ""  # TorchScript file, inception-2015-12-05.pt for FID (empty: mean colours of 4x4 regions)
    clip: str = ""  # folder of a CLIPModel, for a CLIP score (empty: none)
    eval_samples: int = 0  # pictures of an evaluation (0: none)
    eval_per_prompt: int = 4  # of which so many share a caption; their distances are the diversity
    eval_batch_size: int = 16  # pictures generated at once in an evaluation
    eval_every: int = 0  # generator updates between evaluations (0: only after the last)
    generate: str = ""  # with --eval-only: eight pictures of this caption from the run's pipeline/, then stop
    log_every: int = 10  # updates that one line of metrics.jsonl is the mean of
    save_every: int = 250  # updates between checkpoints (the last update always saves)
    media_every: int = 250  # generator updates between pictures (0: none)

    @property
    def moves_z(self) -> bool:
        return self.corrector.endswith("z") and self.gamma_z > 0


# fmt: off
PRESETS = {
    "paper": Args(),
    "single-gpu": Args(  # DEVIATION(single-gpu preset)
        preset="single-gpu", dtype="bf16", k=4, batch_size=64, micro_batch_size=2, score_updates=2, max_grad_norm=10.0,
        checkpointing=True,
    ),
    "cpu": Args(  # DEVIATION(cpu preset)
        preset="cpu", total_steps=2000, train_teacher=True, vae_steps=3000, vae_lr=2e-3, teacher_steps=6000,
        teacher_batch_size=32, teacher_lr=1e-3, prediction="v_prediction", image_size=32, unet_channels=(48, 96),
        unet_layers=1, text_width=64, text_layers=2, vae_channels=(16, 32, 32), guidance=1.0, generator_lr=5e-5,
        score_lr=2.5e-4, ema=0.998, batch_size=16, micro_batch_size=32, eval_samples=512, eval_batch_size=64,
        log_every=20, save_every=500, media_every=500,
    ),
    "smoke": Args(
        preset="smoke", total_steps=4, train_teacher=True, vae_steps=3, vae_lr=1e-3, teacher_steps=5,
        teacher_batch_size=4, teacher_lr=1e-3, image_size=32, unet_channels=(16, 32), unet_layers=1, text_width=32,
        text_layers=1, vae_channels=(8, 8, 16), k=2, generator_lr=1e-4, score_lr=5e-4, ema=0.9, batch_size=4,
        micro_batch_size=2, ddim_steps=3, eval_samples=16, eval_batch_size=8, log_every=2, save_every=2, media_every=2,
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
    may_be_0 = {"seed", "total_steps", "vae_steps", "t_min", "t_star", "eval_samples", "eval_every", "media_every"}
    low = dict.fromkeys(may_be_0, 0) | dict.fromkeys(("gamma_eps", "z_clip", "guidance"), 1e-6)
    high = dict.fromkeys(("gamma_eps", "gamma_z", "beta1", "beta2", "ema"), 1) | {"seed": 2**32}
    high |= dict.fromkeys(("t_max", "t_star"), 1000)
    for name, value in dataclasses.asdict(args).items():
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) in (int, float):
                least, most = low.get(name, int(type(number) is int)), high.get(name, math.inf)
                check(name, least <= number < most, f"is out of range: give numbers from {least} to below {most}")
    check("t_max", args.t_min <= args.t_max, f"is below --t-min {args.t_min}: leave a range between them")
    for name in ("unet_channels", "vae_channels"):
        fits = getattr(args, name) and all(width % 8 == 0 for width in getattr(args, name))
        check(name, fits, "do not split into groups: give multiples of 8")
    check("unet_channels", len(args.unet_channels) > 1, "leave no level with cross-attention: give two or more")
    cells = 2 ** (len(args.vae_channels) + len(args.unet_channels) - 2)
    fits = not args.train_teacher or (args.image_size % 32 == 0 and args.image_size % cells == 0)
    check("image_size", fits, f"cannot be drawn and halved by each level: give multiples of {math.lcm(32, cells)}")
    check("text_width", args.text_width % 32 == 0, "does not split into heads of 32: give a multiple")
    for name in ("batch_size", "teacher_batch_size")[: 0 if args.eval_only else 1 + args.train_teacher]:
        batch, processes = getattr(args, name), int(os.environ.get("WORLD_SIZE", "1"))
        micro = min(batch, args.micro_batch_size)
        reason = f"does not split into micro-batches of {micro} for each of {processes} processes"
        reason += f": change it, or --micro-batch-size {args.micro_batch_size}"
        check(name, batch % (micro * processes) == 0, reason)
    fits = args.save_every % args.log_every == 0  # so that numbers are looked at before they are saved
    check("save_every", fits, f"is no multiple of --log-every {args.log_every}: make it one")
    samples, each = args.eval_samples, args.eval_per_prompt
    least = 4 * max(2, each * bool(args.pictures))  # a caption of --pictures has one picture to compare with
    check("eval_samples", samples % each == 0, f"is no multiple of --eval-per-prompt {each}")
    check("eval_samples", samples == 0 or samples >= least, f"are too few to compare: give {least} or more, or 0")
    check("generate", not args.generate or args.eval_only, "needs a run: name it with --eval-only")
    if args.dry_run:
        return
    one = bool(args.teacher) != args.train_teacher
    check("teacher", one, f"and --train-teacher {args.train_teacher}: give exactly one, see docs/emd_text2image.md")
    captioned = args.prompts or args.pictures or not args.teacher
    check("prompts", bool(captioned), "is empty: a --teacher needs captions, name their file")
    check("total_steps", args.total_steps or args.train_teacher, "leaves nothing to do: give a number above 0")
    run = args.resume or args.eval_only
    before = json.loads((Path(run) / "args.json").read_text()) if run else {}
    seed = ("seed",) * (not args.generate)  # which draws anew
    for name in (*seed, "train_teacher", "vae_steps", "teacher_steps", "t_star"):
        same = before.get(name, getattr(args, name)) == getattr(args, name)
        check(name, same, "cannot change in a run, whose checkpoints were made with it as it was: leave it out")
    same = bool(before.get("beta1", args.beta1)) == bool(args.beta1)
    check("beta1", same, "makes the optimiser of another kind than the run's: leave it out")
    # Before training, though they may be needed only after the last update.
    for name in () if args.generate else ("pictures", "eval_prompts", "reference", "features", "clip"):
        check(name, Path(getattr(args, name)).exists(), "does not exist: name a file or folder that does")


# --- Captions ---
@functools.cache
def read_prompts(args: Args, flag: str) -> list[str]:
    """The captions of the file or folder that --prompts or --eval-prompts names: lines of .txt, "caption", "prompt" or
    "text" of .jsonl, or the .txt members of a webdataset .tar. Prints what was left out. Raises UserError.
    """
    path, lines, left_out = Path(getattr(args, flag)), [], Counter()
    way_out = "name a .txt, .jsonl or .tar file, or a folder of them"
    with refuse(f"--{flag.replace('_', '-')} {path} cannot be read", way_out):
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.suffix == ".tar":
                with tarfile.open(file) as tar:
                    lines += [(tar.extractfile(m).read(), False) for m in tar if m.isfile() and m.name.endswith(".txt")]
            elif file.suffix in (".txt", ".jsonl"):
                lines += [(line, file.suffix == ".jsonl") for line in file.read_bytes().splitlines()]
            elif file == path:
                raise ValueError("it is of another kind" if path.exists() else "it does not exist")
    captions, known = [], set()
    for raw, is_json in lines:
        try:
            text = raw.decode("utf-8-sig")
            if is_json and text.strip():
                entry = json.loads(text)
                text = next(entry[key] for key in ("caption", "prompt", "text") if isinstance(entry.get(key), str))
            text.encode()  # JSON can hold half of a surrogate pair
            if "\0" in text:
                raise UnicodeError("it is UTF-16 or UTF-32")
        except (ValueError, RecursionError, StopIteration, AttributeError) as error:
            left_out["not UTF-8" if isinstance(error, UnicodeError) else "without a caption"] += 1
            continue
        text = " ".join(text.split())
        if not text or (text in known and flag == "prompts"):  # an evaluation takes a caption as often as it is there
            left_out["duplicate" if text else "empty"] += 1
        else:
            captions.append(text)
            known.add(text)
    report = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
    print(f"{path}: {len(captions):,} captions; left out: {report or 'none'}", flush=True)
    require(args, flag, bool(captions), "holds no caption: give one a line")
    return captions


class Captions:
    """Captions and their text features Float[B, L, D]: encoded once, all of them, if they fit into --text-cache-gb."""

    @torch.no_grad()
    def __init__(self, args: Args, pipe: StableDiffusionPipeline, texts: list[str], device: torch.device):
        self.texts, self.device, self.cache, self.pipe = texts, device, None, pipe
        pipe.text_encoder.to(device)
        self.empty, most = encode(pipe, [""]), pipe.tokenizer.model_max_length
        parts = [texts[i : i + 64] for i in range(0, len(texts), 64)]
        if long := sum(len(ids) > most for part in parts for ids in pipe.tokenizer(part).input_ids):
            print(f"{long:,} captions are longer than {most} tokens and are cut off there", flush=True)
        if self.empty.nbytes * len(texts) <= args.text_cache_gb * 1e9:
            self.cache = torch.empty(len(texts), *self.empty.shape[1:])
            for rows, part in zip(self.cache.split(64), parts, strict=True):
                rows.copy_(encode(pipe, part))
            pipe.text_encoder.to("cpu")  # its memory is the UNets'

    @torch.no_grad()
    def __call__(self, indices: Tensor) -> Tensor:
        """Features of the captions Int[B]."""
        if self.cache is not None:
            return self.cache[indices.cpu()].to(self.device)
        self.pipe.text_encoder.to(self.device)  # captions that were cached may have sent it away
        return encode(self.pipe, [self.texts[i] for i in indices.tolist()])


def encode(pipe: StableDiffusionPipeline, texts: list[str]) -> Tensor:
    """Text features as the pipeline makes them: padded, and cut off at the tokenizer's length. Float[B, L, D]."""
    return pipe.encode_prompt(texts, pipe.text_encoder.device, 1, False)[0]


# --- Shapes: captions from a grammar, pictures of them, and what a picture shows ---
COUNTS, SIZES, SHAPES = ("one", "two", "three"), {"small": 5, "large": 8}, ("circle", "square", "triangle")
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 230), "yellow": (240, 220, 20)}
BACKGROUNDS = {"black": (0, 0, 0), "white": (255, 255, 255), "grey": (128, 128, 128)}
PLACES = {"on the left": (-8, 0), "on the right": (8, 0), "at the top": (0, -8), "at the bottom": (0, 8)}
PLACES |= {"in the middle": (0, 0)}  # centre of the group on a canvas of 32 x 32, from its middle
ATTRIBUTES = ("count", "size", "colour", "shape", "position", "background")
PICTURE_KINDS = (".jpg", ".jpeg", ".png", ".webp")


@functools.cache
def grammar() -> dict[str, tuple[str, ...]]:
    """All 1,080 captions and the words of ATTRIBUTES that each asks for."""
    words = itertools.product(COUNTS, SIZES, COLOURS, SHAPES, PLACES, BACKGROUNDS)
    return {f"{w[0]} {w[1]} {w[2]} {w[3]}{'s' * (w[0] != 'one')} {w[4]} on a {w[5]} background": w for w in words}


def draw(caption: str, size: int, seed: int) -> np.ndarray:
    """One picture UInt8[size, size, 3] of a caption of the grammar; `seed` moves the group by up to a pixel of 32."""
    count, size_word, colour, shape, place, background = grammar()[caption]
    unit, n, jitter = size // 32, SIZES[size_word], np.random.default_rng(seed).integers(-1, 2, 2)
    image = Image.new("RGB", (size, size), BACKGROUNDS[background])
    pen, how_many = ImageDraw.Draw(image), COUNTS.index(count) + 1
    for i in range(how_many):
        along = 10 * i - 5 * (how_many - 1)  # a column on the left and right, else a row
        offset = (0, along) if place.endswith(("left", "right")) else (along, 0)
        x, y = (int(16 + PLACES[place][a] + offset[a] + jitter[a] - n // 2) * unit for a in (0, 1))
        far = unit * n - 1
        if shape == "triangle":
            pen.polygon([(x, y + far), (x + far, y + far), (x + far / 2, y)], COLOURS[colour])
        else:
            (pen.ellipse if shape == "circle" else pen.rectangle)((x, y, x + far, y + far), COLOURS[colour])
    return np.asarray(image)


def measure(pixels: Tensor) -> list[tuple[str, ...]]:
    """The words of ATTRIBUTES that pictures UInt8[B, 3, H, W] show, by their pixels: nearest palette colour, connected
    groups, their bounding boxes and how much of those they fill. "none" where nothing is seen.
    """
    palette = torch.tensor([*BACKGROUNDS.values(), *COLOURS.values()]).float()
    distance = torch.cdist(pixels.permute(0, 2, 3, 1).flatten(1, 2).float(), palette)
    return [words_of(near.numpy()) for near in distance.argmin(2).unflatten(1, pixels.shape[2:])]


def words_of(nearest: np.ndarray) -> tuple[str, ...]:
    """One picture's words, from the palette colour Int[H, W] of each pixel."""
    edge = np.concatenate([nearest[0], nearest[-1], nearest[:, 0], nearest[:, -1]])
    behind = np.bincount(edge, minlength=len(BACKGROUNDS))[: len(BACKGROUNDS)]
    background = list(BACKGROUNDS)[behind.argmax()] if behind.any() else "none"
    groups, unit, boxes, fills, colours = ndimage.label(nearest >= len(BACKGROUNDS))[0], len(nearest) / 32, [], [], []
    for group, (rows, columns) in enumerate(ndimage.find_objects(groups), 1):
        inside = groups[rows, columns] == group
        if inside.sum() >= 4 * unit**2:  # less is a speck
            boxes.append((rows.start, rows.stop, columns.start, columns.stop))
            fills.append(inside.mean())
            colours.extend(nearest[rows, columns][inside])
    if not boxes:
        return (*["none"] * 5, background)
    box, fill = np.array(boxes) / unit, np.mean(fills)
    side = np.maximum(box[:, 1] - box[:, 0], box[:, 3] - box[:, 2]).mean()
    colour = list(COLOURS)[np.bincount(colours).argmax() - len(BACKGROUNDS)]
    y, x = ((box[:, i].min() + box[:, i + 1].max()) / 2 - 16 for i in (0, 2))
    place = min(PLACES, key=lambda name: (PLACES[name][0] - x) ** 2 + (PLACES[name][1] - y) ** 2)
    shape = SHAPES[2] if fill < 0.7 else SHAPES[0] if fill < 0.93 else SHAPES[1]
    count = COUNTS[len(boxes) - 1] if len(boxes) <= len(COUNTS) else "none"
    return count, "small" if side < 6.5 else "large", colour, shape, place, background


@functools.cache
def load_pictures(args: Args) -> tuple[list[str], Callable[[str, int], np.ndarray]]:
    """Captions, and a picture UInt8[S, S, 3] for caption and seed: of --pictures, or drawn. Raises UserError."""
    if not args.pictures:
        return list(grammar()), lambda caption, seed: draw(caption, args.image_size, seed)
    found: dict[str, np.ndarray] = {}
    with refuse(f"--pictures {args.pictures} cannot be read", "name a .tar of NAME.txt beside NAME.png or NAME.jpg"):
        with tarfile.open(args.pictures) as shard:
            files = {member.name: shard.extractfile(member).read() for member in shard if member.isfile()}
        for name, content in files.items():
            if name.lower().endswith(PICTURE_KINDS):
                image = Image.open(io.BytesIO(content)).convert("RGB")
                caption = " ".join(files[os.path.splitext(name)[0] + ".txt"].decode().split())
                found[caption] = np.asarray(ImageOps.fit(image, (args.image_size, args.image_size)))
    require(args, "pictures", len(found) > 3, f"holds {len(found)} captioned pictures: name a .tar of four or more")
    print(f"{args.pictures}: {len(found):,} captions with a picture each, the last one of equal captions", flush=True)
    return list(found), lambda caption, seed: found[caption]


# --- Networks ---
def noise_levels(scheduler: Any) -> Tensor:
    """s_t = sigma_t / alpha_t, Float[T], of the timesteps with some signal: not of those of zero terminal SNR."""
    alphas = scheduler.alphas_cumprod.double().cpu()
    return ((1 - alphas) / alphas).sqrt()[alphas > 1e-6]


class Denoiser(nn.Module):
    """D(y; t, c) = c_skip y + c_out F(c_in y, t, c) of a UNet F that predicts eps or v, in VP form. The levels
    s_t are read from the scheduler's alphas. y Float[B, C, H, W], t Int[B], text Float[B, L, D]. With `guidance` w
    other than 1, F is F_u + w (F_c - F_u) ([CFG]), where u has the features `empty` Float[1, L, D] of the empty
    caption. D is linear in F, so this guides D alike.
    """

    guidance, empty = 1.0, None

    def __init__(self, args: Args, unet: UNet, scheduler: Any):
        super().__init__()
        self.unet, self.bf16 = unet, args.dtype == "bf16"
        self.v = scheduler.config.prediction_type == "v_prediction"
        self.register_buffer("levels", noise_levels(scheduler), persistent=False)

    def sigma(self, t: Tensor) -> Tensor:
        """s_t as Float[B, 1, 1, 1]."""
        return self.levels[t].float().view(-1, 1, 1, 1)

    def precondition(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in = alpha. eps = F: D = y - s F. v = F: D = alpha x_t - sigma F with x_t = alpha y."""
        s = self.sigma(t)
        alpha = (1 + s**2).rsqrt()
        return (alpha**2, -s * alpha, alpha) if self.v else (torch.ones_like(s), -s, alpha)

    def raw(self, y: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """F in fp32. Guidance takes one doubled batch."""
        x_t, guided = self.precondition(t)[2] * y, self.guidance != 1
        if guided:
            x_t, t, text = torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([self.empty.expand_as(text), text])
        with torch.autocast(y.device.type, torch.bfloat16, self.bf16, cache_enabled=False):  # casts are let go
            out = self.unet(x_t, t, text, return_dict=False)[0].to(y.dtype)
        return torch.lerp(*out.chunk(2), self.guidance) if guided else out

    def forward(self, y: Tensor, t: Tensor, text: Tensor) -> Tensor:
        c_skip, c_out, _ = self.precondition(t)
        return c_skip * y + c_out * self.raw(y, t, text)

    def store_bf16(self) -> None:
        """Keep the weights as autocast would round them, in half the memory: no value that is computed changes."""
        for part in self.modules():
            if self.bf16 and isinstance(part, (nn.Conv2d, nn.Linear)):
                part.to(torch.bfloat16)


def make_unet(args: Args) -> UNet:
    """An untrained UNet of Stable Diffusion 1's layout, which the default sizes are."""
    attends, side = len(args.unet_channels) - 1, args.image_size // 2 ** (len(args.vae_channels) - 1)
    how = {"down_block_types": ["CrossAttnDownBlock2D"] * attends + ["DownBlock2D"]}
    how |= {"up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * attends, "layers_per_block": args.unet_layers}
    how |= {"block_out_channels": args.unet_channels, "norm_num_groups": math.gcd(32, *args.unet_channels)}
    how |= {"attention_head_dim": max(1, min(8, args.unet_channels[0] // 16))}  # diffusers: the number of heads
    return UNet(side, **how, cross_attention_dim=args.text_width)


def make_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Byte-pair encoding in which each word of the captions is one token; others are spelled, non-ASCII is unknown.
    The library's own trainer numbers tokens in an order that changes from call to call.
    """
    letters, merges = [chr(code) for code in range(33, 127)], []
    for word in sorted(set(re.findall("[a-z]+", " ".join(captions).lower()))):
        parts = f" {' '.join(word)}</w> "
        for left, right in merges:
            parts = parts.replace(f" {left} {right} ", f" {left}{right} ")
        while len(pair := parts.split()[:2]) == 2:
            merges.append(tuple(pair))
            parts = parts.replace(f" {' '.join(pair)} ", f" {''.join(pair)} ")
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    tokens = dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"])
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, merges, model_max_length=16)


def make_pipeline(args: Args, captions: list[str]) -> StableDiffusionPipeline:
    """An untrained pipeline for such captions, drawn from --seed, with Stable Diffusion's noise schedule."""
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer(captions)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ids |= {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    size = {"hidden_size": args.text_width, "intermediate_size": 4 * args.text_width}
    size |= {"num_attention_heads": args.text_width // 32, "num_hidden_layers": args.text_layers}
    blocks = [[kind] * len(args.vae_channels) for kind in ("DownEncoderBlock2D", "UpDecoderBlock2D")]
    groups = math.gcd(32, *[width // 4 for width in args.vae_channels])  # no group of one channel
    vae = AutoencoderKL(3, 3, *blocks, args.vae_channels, norm_num_groups=groups, sample_size=args.image_size)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    more = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": args.prediction}
    text_encoder, unet = CLIPTextModel(CLIPTextConfig(**ids, **size)).eval(), make_unet(args).eval()
    parts = vae, text_encoder, tokenizer, unet, DDIMScheduler(**betas, **more)
    return StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False)  # nothing to check pictures with


def load_pipeline(args: Args, name: str, flag: str = "teacher") -> StableDiffusionPipeline:
    """A diffusers folder or hub id as a pipeline whose UNet is a teacher for these settings. Raises UserError."""
    way_out = "give a Stable Diffusion folder (safetensors), or a hub id where there is a network"
    with refuse(f"--{flag} {name} cannot be loaded", way_out):
        optional = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        how = {"dtype": torch.float32, "use_safetensors": True}  # whatever type was stored
        pipe = StableDiffusionPipeline.from_pretrained(name, **how, **optional)
        unet, kind = pipe.unet.config, pipe.scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction") or not isinstance(pipe.unet, UNet):
            raise ValueError(f"it is a {type(pipe.unet).__name__} that predicts {kind}, not epsilon or v_prediction")
        if unet.in_channels != pipe.vae.config.latent_channels:
            raise ValueError(f"its UNet reads {unet.in_channels} channels: no text-to-image model")
        if unet.addition_embed_type or unet.cross_attention_dim != pipe.text_encoder.config.hidden_size:
            raise ValueError("its UNet needs more than, or other, features than those of its text encoder")
    cells = 2 ** (len(pipe.vae.config.block_out_channels) + len(unet.block_out_channels) - 2)
    require(args, "image_size", args.image_size % cells == 0, f"is no multiple of {cells}, as {name} needs")
    last = len(noise_levels(pipe.scheduler)) - 1
    for time_flag in ("t_max", "t_star") if flag == "teacher" else ():
        require(args, time_flag, getattr(args, time_flag) <= last, f"is beyond the teacher's last timestep {last}")
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.enable_slicing()  # a picture at a time: a batch of 512-pixel ones would take more than the updates
    return pipe


@torch.no_grad()
def decode(pipe: StableDiffusionPipeline, latents: Tensor) -> Tensor:
    """VAE latents -> pictures Float[B, 3, S, S] in [-1, 1], larger by the VAE's factor, as the pipeline makes them."""
    return pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]


# --- Algorithm: pure functions of callables, so that analytic objects and networks run through the same lines ---
def generate(net: Denoiser, z: Tensor, text: Tensor, t_star: int) -> Tensor:
    """x = g(z, c): the denoiser used once, at t* on y = s* z, so that the UNet sees sigma* z. z Float[B, C, H, W]."""
    t = torch.full((len(z),), t_star, device=z.device)
    return net(net.sigma(t) * z, t, text)


@torch.no_grad()
def denoiser_difference(teacher: Denoiser, score: Denoiser, y: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """Delta = D_q - D_phi as c_out (F_q - F_phi): c_skip y cancels, and small differences keep their precision."""
    return teacher.precondition(t)[1] * (teacher.raw(y, t, text) - score.raw(y, t, text))


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


def denoising_loss(net: Denoiser, x: Tensor, t: Tensor, eps: Tensor, text: Tensor) -> Tensor:
    """Squared error of eps or v, whichever the network predicts: (D - x) / c_out. Sum over the latent, mean over B."""
    c_skip, c_out, _ = net.precondition(t)
    y = x + net.sigma(t) * eps
    return (net.raw(y, t, text) - (x - c_skip * y) / c_out).pow(2).flatten(1).sum(1).mean()


def ddim(denoise: Callable, z: Tensor, levels: Tensor, steps: int) -> Tensor:
    """[DDIM], deterministic, which in y is Euler's method: denoise(y, t) `steps` times, from z ~ N(0, I) to a latent.
    levels Float[T]: s_t, of which the last is the first one visited.
    """
    times = torch.linspace(len(levels) - 1, 0, steps + 1, device=z.device).round().long()[:-1]
    ratios = torch.cat([levels[times[1:]], levels.new_zeros(1)]) / levels[times]
    y = z * (1 + levels[-1] ** 2).sqrt()  # x_T = z
    for t, ratio in zip(times, ratios, strict=True):
        clean = denoise(y, t.expand(len(z)))
        y = clean + ratio * (y - clean)
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


CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
tags: [one-step, em-distillation]
---
One-step generator distilled by EM Distillation (arXiv:2405.16852) from `{teacher}`; its licence is the teacher's.

    pipe = diffusers.StableDiffusionPipeline.from_pretrained("FOLDER")
    image = pipe({caption!r}, num_inference_steps=1, guidance_scale=0).images[0]

Averaged weights after {step:,} generator updates on {captions:,} captions. Other step counts than 1 and guidance are
not supported. Settings, and scores measured by the script that trained it:

```json
{facts}
```
"""


def export(args: Args, run: Run, setup: "Setup", average: Denoiser, step: int) -> None:
    """RUN/pipeline: a diffusers folder of the averaged generator with a one-step scheduler, and its model card."""
    folder, aside, scores = run.folder / "pipeline", run.folder / "pipeline.tmp", run.folder / "eval.json"
    # The schedule cut off after t*: diffusers then starts at s* z, and Euler's one step to s = 0 is D(s* z, t*).
    kind, betas = setup.pipe.scheduler.config.prediction_type, setup.pipe.scheduler.betas[: args.t_star + 1].tolist()
    how = {"timestep_spacing": "trailing", "steps_offset": 1}  # diffusers warns without the latter, which does nothing
    scheduler = EulerDiscreteScheduler(len(betas), trained_betas=betas, prediction_type=kind, **how)
    parts = {"unet": average.unet, "scheduler": scheduler}
    pipe = StableDiffusionPipeline(**setup.pipe.components | parts, requires_safety_checker=False)
    pipe.unet.register_to_config(sample_size=setup.shape[1])  # the size that a call makes if it names none
    pipe.save_pretrained(aside)
    shown = [f.name for f in dataclasses.fields(args) if f.type is not str]  # a text may be a path of this machine
    scores = json.loads(scores.read_text()) if scores.exists() else {}
    facts = {"settings": {name: getattr(args, name) for name in ("preset", *shown)}}
    facts["scores"] = scores if scores.get("step") == step else "not evaluated"
    texts, made = setup.captions.texts, step - (args.vae_steps + args.teacher_steps) * args.train_teacher
    teacher = (Path(args.teacher).name if Path(args.teacher).exists() else args.teacher) or "a pipeline trained here"
    values = {"teacher": teacher, "caption": texts[0], "captions": len(texts), "step": made}
    (aside / "README.md").write_text(CARD.format(facts=json.dumps(facts, indent=2), **values))
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


# --- Evaluation ---
def load_features(args: Args, device: torch.device) -> tuple[str, Callable[[Tensor], Tensor]]:
    """A name, and UInt8[B, 3, H, W] -> Float[B, F]: those of a TorchScript file, or mean colours of 4x4 regions."""
    if not args.features:
        return "mean colours of 4x4 regions", lambda images: adaptive_avg_pool2d(to_float(images), 4).flatten(1)
    with refuse(f"--features {args.features} cannot be loaded", "name inception-2015-12-05.pt, or leave it out"):
        net = torch.jit.load(args.features, device).eval()
        features = functools.partial(net, return_features=True)
        features(torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device=device))  # what it cannot give is found out now
    return f"{Path(args.features).name}, weights {fingerprint(net, args.features)}", features


def load_clip(args: Args) -> tuple[nn.Module, CLIPTokenizer]:
    """The model of --clip. Raises UserError."""
    with refuse(f"--clip {args.clip} cannot be loaded", "name a CLIPModel folder"):
        model = transformers.CLIPModel.from_pretrained(args.clip, use_safetensors=True).eval()
        return model, CLIPTokenizer.from_pretrained(args.clip)


def shrink(images: Tensor, size: int = 256) -> Tensor:
    """Pictures larger than `size` at that size, by Pillow's Lanczos filter: the MSCOCO-30k protocol."""
    if images.shape[-1] <= size:
        return images
    pictures = map(Image.fromarray, images.permute(0, 2, 3, 1).cpu().numpy())
    small = [picture.resize((size, size), Image.Resampling.LANCZOS) for picture in pictures]
    return torch.tensor(np.stack(small)).permute(0, 3, 1, 2).to(images.device)


def load_reference(args: Args) -> Iterator[Tensor]:
    """Pictures of --reference, centre-cropped to squares of at most 256 pixels. Raises UserError."""
    size = min(256, args.image_size)
    paths = sorted(path for path in Path(args.reference).rglob("*") if path.suffix.lower() in PICTURE_KINDS)
    require(args, "reference", len(paths) >= 8, f"holds {len(paths)} pictures: name a folder of at least 8")
    for path in paths:
        with refuse(f"--reference {path} cannot be read", "delete it"):
            image = ImageOps.fit(Image.open(path).convert("RGB"), (size, size), Image.Resampling.LANCZOS)
        yield torch.tensor(np.asarray(image)).permute(2, 0, 1)[None]


@torch.no_grad()
def clip_score(model: nn.Module, tokenizer: Any, pixels: Tensor, texts: list[str], device: torch.device) -> float:
    """Mean cosine of picture and caption in a CLIPModel."""
    mean, std = torch.tensor([[0.4815, 0.4578, 0.4082], [0.2686, 0.2613, 0.2758]], device=device).view(2, 1, 3, 1, 1)
    size, most, total = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings, 0.0
    for i in range(0, len(texts), 32):
        images = interpolate(pixels[i : i + 32].to(device) / 255, (size, size), mode="bicubic", antialias=True)
        words = tokenizer(texts[i : i + 32], padding=True, truncation=True, max_length=most, return_tensors="pt")
        found = model.to(device)(pixel_values=(images - mean) / std, **words.to(device))
        total += float((found.image_embeds * found.text_embeds).sum())
    model.to("cpu")  # its memory is the UNets'
    return total / len(texts)


def diversity(name: str, features: Tensor, each: int, kept: Tensor) -> dict[str, float]:
    """Mean distance of two pictures of one caption that are both `kept` Bool[N]; nothing if there is no such pair.
    Features Float[N, D], with `each` pictures of a caption in a row.
    """
    distance = torch.cdist(*[features.unflatten(0, (-1, each))] * 2)
    kept = kept.unflatten(0, (-1, each))
    pairs = (kept[:, :, None] & kept[:, None]).triu(1)
    return {name: float(distance[pairs].mean())} if pairs.any() else {}


def compared_captions(args: Args, texts: list[str]) -> list[str]:
    """The captions whose pictures samples are compared with: none if one has no picture. Raises UserError."""
    if args.reference or not set(texts) <= set(load_pictures(args)[0]):
        return []
    if args.pictures:  # only drawn ones of a caption differ
        texts = [*dict.fromkeys(texts)]
        require(args, "pictures", len(texts) > 3, f"has {len(texts)} captions to compare with: give more captions")
    return texts


class Evaluator:
    """Compares the student at one network evaluation with the teacher at --ddim-steps, on equal captions and noise."""

    def __init__(self, args: Args, acc: Accelerator, setup: "Setup"):
        self.args, self.acc, self.setup, self.captions = args, acc, setup, setup.captions
        if args.eval_prompts:
            self.captions = Captions(args, setup.pipe, read_prompts(args, "eval_prompts"), acc.device)
        order = torch.randperm(len(self.captions.texts), generator=Noise("cpu", 0).generator)
        picks = order[torch.arange(args.eval_samples // args.eval_per_prompt) % len(order)]
        self.picks = picks.repeat_interleave(args.eval_per_prompt)
        self.texts, self.references = [self.captions.texts[i] for i in self.picks.tolist()], {}
        self.drawn, (self.ruler, self.features) = set(self.texts) <= grammar().keys(), load_features(args, acc.device)
        self.clip = load_clip(args) if args.clip else None
        if args.reference:
            self.references["data"] = torch.cat([self.extract(image) for image in load_reference(args)])
        elif texts := compared_captions(args, self.texts):
            real = [load_pictures(args)[1](text, seed) for seed, text in enumerate(texts)]
            self.references["data"] = self.extract(shrink(torch.tensor(np.stack(real)).permute(0, 3, 1, 2)))
        evaluations = args.ddim_steps * (1 + (args.guidance != 1))
        self.teacher_scores, self.references["teacher"] = self.score(setup.teacher_samples, evaluations)

    @torch.no_grad()
    def extract(self, pixels: Tensor) -> Tensor:
        size = self.args.eval_batch_size
        return torch.cat([self.features(part.to(self.acc.device)).float().cpu() for part in pixels.split(size)])

    @torch.no_grad()
    def score(self, sampler: Callable[[Tensor, Tensor], Tensor], evaluations: int) -> tuple[dict, Tensor]:
        """Scores of the latents sampler(z, text), made in chunks and decoded, and their features."""
        args, acc, size, started = self.args, self.acc, self.args.eval_batch_size, time.perf_counter()
        side = min(256, args.image_size)  # of shrink()
        pixels = torch.zeros(args.eval_samples, 3, side, side, dtype=torch.uint8)  # on the host
        for index in range(acc.process_index, -(-args.eval_samples // size), acc.num_processes):
            part = self.picks[index * size :][:size]
            z = Noise(acc.device, 0, index).normal(len(part), *self.setup.shape)
            made = decode(self.setup.pipe, sampler(z, self.captions(part)))
            pixels[index * size :][:size] = shrink(to_uint8(made))
        pixels = torch.cat([acc.reduce(part.to(acc.device), "sum").cpu() for part in pixels.split(1000)])
        seconds = (time.perf_counter() - started) * acc.num_processes / len(pixels)
        scores = {"evaluations_per_image": evaluations, "seconds_per_image": seconds}

        torch.manual_seed(0)  # torchmetrics draws subsets from the global generator
        features, each = self.extract(pixels), args.eval_per_prompt
        for reference, real in self.references.items():
            compared = compare(real, features, self.ruler, self.acc.device)
            scores |= {f"{key}_to_{reference}": value for key, value in compared.items()}
        scores |= diversity("diversity", features, each, torch.ones(len(features), dtype=torch.bool))
        if self.drawn:
            right = np.array([grammar()[text] for text in self.texts]) == np.array(measure(pixels))
            scores |= {f"accuracy_{name}": float(right[:, i].mean()) for i, name in enumerate(ATTRIBUTES)}
            scores |= {"accuracy_mean": float(right.mean()), "accuracy_all": float(right.all(1).mean())}
            in_place = torch.tensor(right[:, ATTRIBUTES.index("position")])  # a misplaced group is not a mode
            scores |= diversity("diversity_in_place", features, each, in_place)
        if args.clip:
            scores["clip_score"] = clip_score(*self.clip, pixels, self.texts, acc.device)
        return scores, features

    def __call__(self, average: Denoiser, run: Run, step: int) -> dict[str, float]:
        """Scores of a generator, written to eval.json beside the teacher's."""
        student, _ = self.score(lambda z, text: generate(average, z, text, self.args.t_star), 1)
        for name in ("diversity", "diversity_in_place"):
            if name in student and name in self.teacher_scores:
                student[f"{name}_ratio"] = student[name] / max(self.teacher_scores[name], 1e-12)
        result = {"step": step, "samples": len(self.texts), "captions": len(set(self.texts))}
        result |= {"features": self.ruler, "guidance": self.args.guidance}
        text = json.dumps(result | {"student": student, "teacher": self.teacher_scores}, indent=2)
        if run.writes:
            (run.folder / "eval.json").write_text(text)
            print(text)
        return {f"eval/{name}": value for name, value in student.items()}


# --- Training ---
def make_optimizer(args: Args, net: nn.Module) -> torch.optim.Optimizer:
    """Adam; with beta1 = 0 as RMSprop, the same up to adam_lr()'s factor, without a first moment to store."""
    if args.beta1:
        return torch.optim.Adam(net.parameters(), betas=(args.beta1, args.beta2), fused=True)
    return torch.optim.RMSprop(net.parameters(), alpha=args.beta2, eps=1e-8, foreach=False)  # True takes a copy of all


def adam_lr(args: Args, lr: float, update: int) -> float:
    """What `update`, counted from 1, multiplies by: RMSprop does not correct its second moment for its start at 0."""
    return lr if args.beta1 else lr * math.sqrt(1 - args.beta2**update)


def train_teacher(args: Args, run: Run, acc: Accelerator, first: int, saved: dict[str, Any]) -> bool:
    """[LDM] An autoencoder, then UNet and text encoder together, on captioned pictures. The average of the latter two
    and the autoencoder are kept as the pipeline RUN/teacher/. Whether it came to its end.
    """
    captions, picture = load_pictures(args)
    pipe = make_pipeline(args, captions).to(acc.device)
    vae, net = pipe.vae, nn.ModuleDict({"unet": pipe.unet, "text": pipe.text_encoder})
    denoiser, average = Denoiser(args, pipe.unet, pipe.scheduler).to(acc.device), copy.deepcopy(net)
    average.requires_grad_(False)
    adam_vae, adam = (torch.optim.Adam(part.parameters(), fused=True) for part in (vae, net))

    def batch(noise: Noise, count: int) -> tuple[Tensor, list[str]]:
        texts = [captions[i] for i in noise.integers(len(captions), count).tolist()]
        seeds = noise.integers(2**31, count).tolist()
        pixels = np.stack([picture(text, seed) for text, seed in zip(texts, seeds, strict=True)])
        return to_float(torch.tensor(pixels).permute(0, 3, 1, 2)).to(acc.device), texts

    def vae_loss(noise: Noise, count: int) -> Tensor:
        x, _ = batch(noise, count)
        posterior = vae.encode(x).latent_dist
        latent = posterior.mean + posterior.std * noise.normal_like(posterior.mean)
        divergence = posterior.kl().mean() / latent[0].numel()
        error = vae.decode(latent).sample - x  # small shapes need the square: the best absolute error ignores them
        return error.abs().mean() + error.square().mean() + 1e-4 * divergence

    @functools.cache  # the autoencoder is done when this is first asked
    @torch.no_grad()
    def scale() -> float:
        return 1 / float(vae.encode(batch(Noise(acc.device, 0, 0), 64)[0]).latent_dist.mean.std())

    def unet_loss(noise: Noise, count: int) -> Tensor:
        x, texts = batch(noise, count)
        with torch.no_grad():
            latent = scale() * vae.encode(x).latent_dist.mean
        keep = noise.integers(10, count).tolist()  # a tenth learns the empty caption, for guidance
        features = encode(pipe, [text if kept else "" for text, kept in zip(texts, keep, strict=True)])
        t = noise.integers(len(denoiser.levels), count)
        return denoising_loss(denoiser, latent, t, noise.normal_like(latent), features)

    def update(done: int, means: Means) -> None:
        stage = "autoencoder", done, args.vae_steps, vae_loss, adam_vae, args.vae_lr, 0.5  # unclipped, it breaks down
        if done > args.vae_steps:
            stage = "denoising", done - args.vae_steps, args.teacher_steps, unet_loss, adam, args.teacher_lr, 0.0
        name, part, parts, loss_of, optimizer, lr, clip = stage
        lr *= min(1.0, 10 * part / parts, 2 * (parts - part + 1) / parts)
        accumulate(args, means, name, (0, done), args.teacher_batch_size, loss_of, optimizer, lr, clip)
        if name == "denoising":
            update_ema(average, net, ema_decay(part, args))

    state = {"vae": vae, "net": net, "average": average, "adam_vae": adam_vae, "adam": adam}
    if saved:
        restore(run.folder, state, saved)
    updates = args.vae_steps + args.teacher_steps
    acc.print(f"{run.folder}: {args.vae_steps:,} updates of the autoencoder, {args.teacher_steps:,} of the UNet")
    done = max([first, *loop(args, run, acc, first, updates, 0, state, update)])
    if run.writes and done == updates:
        vae.register_to_config(scaling_factor=scale())
        net.load_state_dict(average.state_dict())
        pipe.save_pretrained(run.folder / "teacher.tmp", safe_serialization=True)
        (run.folder / "teacher.tmp").rename(run.folder / "teacher")  # a teacher/ that exists is whole
    acc.wait_for_everyone()
    return done == updates


@dataclass
class Setup:
    """What distillation does not change: shape is that of a latent, C H W."""

    pipe: StableDiffusionPipeline
    teacher: Denoiser  # guided
    captions: Captions
    shape: tuple[int, int, int]
    ddim_steps: int

    def teacher_samples(self, z: Tensor, text: Tensor) -> Tensor:
        return ddim(lambda y, t: self.teacher(y, t, text), z, self.teacher.levels, self.ddim_steps)


def init_state(args: Args, teacher: Denoiser) -> dict[str, Any]:
    """What training changes: generator, score (the student score network), average (of the generator); optimisers."""
    state: dict[str, Any] = {name: copy.deepcopy(teacher) for name in ("generator", "score", "average")}
    for net in state.values():
        net.guidance = 1.0
    for name in ("generator", "score"):
        state[name].requires_grad_(True)
        if args.checkpointing:
            state[name].unet.enable_gradient_checkpointing()
        state[f"adam_{name}"] = make_optimizer(args, state[name])
    return state


def train_iteration(args: Args, setup: Setup, state: dict, step: int, means: Means) -> None:
    teacher, generator, score, captions = setup.teacher, state["generator"], state["score"], setup.captions

    def draw_inputs(noise: Noise, count: int) -> tuple[Tensor, Tensor]:
        return captions(noise.integers(len(captions.texts), count)), noise.normal(count, *setup.shape)

    def score_loss(noise: Noise, count: int) -> Tensor:
        text, z = draw_inputs(noise, count)
        with torch.no_grad():
            x = generate(generator, z, text, args.t_star)
        t = noise.integers(len(teacher.levels), count)
        return denoising_loss(score, x, t, noise.normal_like(x), text)

    def generator_loss(noise: Noise, count: int) -> Tensor:
        text, z = draw_inputs(noise, count)
        # DEVIATION(t range): neither of the schedule's ends.
        t, eps = args.t_min + noise.integers(args.t_max - args.t_min + 1, count), noise.normal_like(z)
        # 2. E-step. While z moves the parameters are frozen, so that only gradients of z are computed.
        generator.requires_grad_(not args.moves_z)
        g = functools.partial(generate, generator, text=text, t_star=args.t_star)

        def difference(y: Tensor, sigma: Tensor) -> Tensor:
            return denoiser_difference(teacher, score, y, t, text)

        chain = e_step(g, difference, z, eps, teacher.sigma(t), noise.normal_like, args)
        # 3. M-step.
        generator.requires_grad_(True)
        loss, r = m_step_loss(g, chain, args)
        for low, high in ((0, 250), (250, 500), (500, 750), (750, math.inf)):
            means.add(f"chain/residual_rms_t{low}", rms(r)[(t >= low) & (t < high)])
        for name, values in chain.logs.items():
            means.add(f"chain/{name}", values)
        return loss

    # 1. The student score network learns to denoise the generator's latents.
    for turn in range(args.score_updates):
        lr = adam_lr(args, args.score_lr, (step - 1) * args.score_updates + turn + 1)
        accumulate(args, means, "denoising", (1, step, turn), args.batch_size, score_loss, state["adam_score"], lr)
    adam, lr = state["adam_generator"], adam_lr(args, generator_lr(args, step), step)
    accumulate(args, means, "generator", (2, step), args.batch_size, generator_loss, adam, lr, args.max_grad_norm)
    # 4. The average that is evaluated.
    update_ema(state["average"], generator, ema_decay(step, args))


@torch.no_grad()
def write_media(args: Args, run: Run, step: int, setup: Setup, state: dict, acc: Accelerator) -> None:
    """Two captions and eight noises each: a row of the guided teacher's pictures above the averaged generator's."""
    picks = Noise("cpu", 0, 1).integers(len(setup.captions.texts), 2).repeat_interleave(8)
    z, text, rows = Noise(acc.device, 0, 1).normal(16, *setup.shape), setup.captions(picks), []
    for at, words in zip(z.split(8), text.split(8), strict=True):
        rows += [setup.teacher_samples(at, words), generate(state["average"], at, words, args.t_star)]
    images = torch.cat([decode(setup.pipe, row) for row in rows])
    run.media(step, "samples", tile(images, 8), scale=max(1, 128 // args.image_size))


def load_everything(args: Args, run: Run, acc: Accelerator, texts: list, saved: dict, pipe=None) -> tuple[Setup, dict]:
    """The frozen parts, and the student's state as it starts or as it was saved."""
    pipe = pipe or load_pipeline(args, str(run.folder / "teacher") if args.train_teacher else args.teacher)
    for part in (pipe.vae.to(acc.device), pipe.text_encoder, pipe.unet):
        part.eval().requires_grad_(False)
    captions = Captions(args, pipe, texts, acc.device)
    teacher = Denoiser(args, pipe.unet, pipe.scheduler).to(acc.device)
    state = init_state(args, teacher)
    if "generator" in saved:
        restore(run.folder, state, saved)
    teacher.guidance, teacher.empty = args.guidance, captions.empty  # DEVIATION(guidance): the paper's is not known
    teacher.store_bf16()
    side = args.image_size // 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    return Setup(pipe, teacher, captions, (pipe.unet.config.in_channels, side, side), args.ddim_steps), state


def train(args: Args, acc: Accelerator) -> None:
    """Train from the start or from --resume, with logs, pictures and checkpoints on the way, then evaluate."""
    step, saved = load_checkpoint(Path(args.resume)) if args.resume else (0, {})
    captioned = load_pictures(args)[0]  # files are read before anything is downloaded or trained
    texts = read_prompts(args, "prompts") if args.prompts else captioned
    if args.eval_samples:  # what an evaluation cannot read is refused now, not after the last update
        load_features(args, torch.device("cpu"))
        if args.clip:
            load_clip(args)
        if args.reference:
            for _ in load_reference(args):
                pass
        compared_captions(args, read_prompts(args, "eval_prompts") if args.eval_prompts else texts)
    pipe = None if args.train_teacher else load_pipeline(args, args.teacher)
    run = Run(args, step, acc.is_main_process)
    run.folder = Path(broadcast_object_list([str(run.folder)])[0])  # its time is the main process's
    # A checkpoint holds three networks and the moments of two; two are kept while one is written, and one is exported.
    with torch.device("meta"):
        unet = pipe.unet if pipe else make_unet(args)
    absent, count = 3 - len(list(run.folder.glob("checkpoints/*.pt"))), sum(p.numel() for p in unet.parameters())
    needed = (absent * (7 if args.beta1 else 5) + 1) * 4 * count / 1e9
    if run.writes and (free := shutil.disk_usage(run.folder).free / 1e9) <= needed:
        raise UserError(f"the disk of {run.folder} has {free:.1f} GB free but {needed:.1f} are needed: make room.")
    if args.train_teacher and not (run.folder / "teacher").exists():
        if not train_teacher(args, run, acc, step, saved):
            return
        step, saved = args.vae_steps + args.teacher_steps, {}
    (setup, state), saved = load_everything(args, run, acc, texts, saved, pipe), {}  # what was loaded is let go
    offset = (args.vae_steps + args.teacher_steps) * args.train_teacher
    require(args, "total_steps", step - offset <= args.total_steps, f"is below the {step - offset} made: give more")
    acc.print(f"{run.folder}: {args.total_steps:,} updates of the generator", flush=True)
    evaluator, update = None, functools.partial(train_iteration, args, setup, state)
    for done in loop(args, run, acc, max(0, step - offset), args.total_steps, offset, state, update):
        if last := done == args.total_steps:
            run.on_signal(signal.SIG_DFL)  # all is saved
        if run.writes and args.media_every and (last or done % args.media_every == 0):
            write_media(args, run, offset + done, setup, state, acc)
        due = last or (args.eval_every and done % args.eval_every == 0)
        if args.eval_samples and due and not is_scored(run, offset + done):
            evaluator = evaluator or Evaluator(args, acc, setup)
            run.log(offset + done, evaluator(state["average"], run, offset + done))
        if last and run.writes:
            export(args, run, setup, state["average"], offset + done)


def evaluate(args: Args, acc: Accelerator) -> None:
    """--eval-only: scores, pictures and pipeline of a run's newest checkpoint; with --generate, pictures alone."""
    run = Run(args, writes=acc.is_main_process)
    if args.generate:
        require(args, "eval_only", (run.folder / "pipeline").exists(), "has no pipeline/: first leave out --generate")
        pipe = load_pipeline(args, str(run.folder / "pipeline"), "eval_only").to(acc.device)
        generator = torch.Generator("cpu").manual_seed(args.seed)
        how = {"num_inference_steps": 1, "guidance_scale": 0.0, "generator": generator}
        images = pipe([args.generate] * 8, height=args.image_size, width=args.image_size, **how).images
        name = "generated_" + re.sub(r"\W+", "_", args.generate.lower())[:60]
        run.media(args.seed, name, np.concatenate(images, axis=1), scale=1)
        return print(f"{run.folder / 'media' / f'{name}_{args.seed}.png'}")
    step, saved = load_checkpoint(Path(args.eval_only))
    require(args, "eval_only", "generator" in saved, f"has no student yet: go on with --resume {args.eval_only}")
    texts = read_prompts(args, "prompts") if args.prompts else load_pictures(args)[0]
    setup, state = load_everything(args, run, acc, texts, saved)
    state = {"average": state["average"]}  # the rest takes memory and is not needed
    scores = Evaluator(args, acc, setup)(state["average"], run, step) if args.eval_samples else {}
    if run.wandb:  # metrics.jsonl stays as training left it
        run.wandb.log({"step": step, **scores})
    if run.writes:
        write_media(args, run, step, setup, state, acc)
        export(args, run, setup, state["average"], step)


def memory_plan(args: Args, unet: UNet, text: Tensor, latent: Tensor) -> dict[str, float]:
    """Estimated GB of one process: what is stored, exactly; activations by the outputs of the layers of one pass, of
    which checkpointing keeps those of the blocks and one block's own.
    """
    inside, outputs = Counter(), Counter()
    weights, size = sum(p.numel() for p in unet.parameters()) / 1e9, 2 if args.dtype == "bf16" else 4

    def note(sizes: Counter, block: str, part: nn.Module, inputs: Any, output: Any) -> None:
        sizes[block] += (output[0] if isinstance(output, tuple) else output).numel() * size / 1e9

    for name, part in unet.named_modules():
        block = re.match(r"(\w+_blocks?\.(\d+\.)?(resnets|attentions)\.\d+)?", name)[0]
        if not list(part.children()):
            part.register_forward_hook(functools.partial(note, inside, block))
        elif name and name == block:
            part.register_forward_hook(functools.partial(note, outputs, block))
    unet(latent, torch.zeros(len(latent)), text)
    peak = outputs.total() + max(inside.values()) if args.checkpointing else inside.total()
    cast = 0 if args.checkpointing or args.dtype == "fp32" else 2 * weights  # kept for the backward pass
    return {
        "teacher's UNet": weights * size,
        "generator, its average, score network": 3 * 4 * weights,
        "gradients, of one network at a time": 4 * weights,
        "optimisers": 2 * 4 * weights * (2 if args.beta1 else 1),
        "activations of a micro-batch": peak,
        "weights of a pass in bf16": cast,
    }


def dry_run(args: Args) -> None:
    """Settings, sizes, and the work and memory of an update, from shapes alone: a local --teacher's or the flags'."""
    configs = Path(args.teacher).glob("*/config.json") if args.teacher else ()
    readable = refuse(f"--teacher {args.teacher} cannot be read", "give a Stable Diffusion folder")
    with readable, torch.device("meta"), torch.no_grad():
        parts = {path.parent.name: json.loads(path.read_text()) for path in configs}
        widths = parts["vae"]["block_out_channels"] if "vae" in parts else args.vae_channels
        side, tokens = args.image_size // 2 ** (len(widths) - 1), 16 if args.train_teacher else 77
        unet = UNet.from_config(parts["unet"]) if "unet" in parts else make_unet(args)
        width, shape = unet.config.cross_attention_dim, (unet.config.in_channels, side, side)
        with FlopCounterMode(display=False) as counter:
            unet(torch.zeros(1, *shape), torch.zeros(1), torch.zeros(1, tokens, width))
        flops, parameters = counter.get_total_flops(), sum(p.numel() for p in unet.parameters())
        size = min(args.micro_batch_size, args.batch_size)
        plan = memory_plan(args, unet, torch.zeros(size, tokens, width), torch.zeros(size, *shape))
    chain = ((4 if args.moves_z else 2) + (args.guidance != 1)) * args.k + 3  # see docs: a backward pass counts as two
    forwards = chain + 4 * args.score_updates + 3 * (exact := args.cancel == "exact")
    forwards += args.checkpointing * (args.k * args.moves_z + args.score_updates + 1 + exact)  # computed again
    total = forwards * args.batch_size * args.total_steps * flops
    total += 3 * args.teacher_batch_size * args.teacher_steps * flops * args.train_teacher
    print(json.dumps(dataclasses.asdict(args), indent=2))
    print(f"UNet: {parameters:,} parameters; a forward pass of a picture is {flops / 1e9:.2f} GFLOP")
    print(f"an update: {forwards} forward passes of {args.batch_size} pictures (a backward pass counts as two)")
    speeds = {f"a GPU's {args.dtype}": 3e14 if args.dtype == "bf16" else 4e13, "two CPU cores": 5e10}  # assumed
    hours = ", ".join(f"{total / x / 3600:.1f} h at {x / 1e12:g} TFLOP/s ({name})" for name, x in speeds.items())
    print(f"in all, with no autoencoder counted: {total / 1e15:.2f} PFLOP: {hours}")
    print("\n".join(f"memory: {amount:7.3f} GB  {what}" for what, amount in plan.items()))
    print(f"memory: {sum(plan.values()):7.3f} GB  in all; the VAE, a text encoder in use and CUDA itself come on top")


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

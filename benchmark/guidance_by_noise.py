"""Where in the noise a guided teacher misleads its one-step student, from a run folder of emd_text2image.py.

    python benchmark/guidance_by_noise.py RUN_FOLDER

For captions drawn at random: `wanted` is the mean of the teacher's many-step samples minus that of the student's, in
latents. At each of several timesteps the mean of Delta = D_q - D_phi over noises is compared with it, D_q once with the
run's guidance and once without. A cosine below 0 means that the M-step moves the student away from what the teacher
itself samples. Writes results/NAME.json, and NAME.png with a row for each caption of --show: teacher, student, then D_q
(guided) and D_phi at each timestep, of one noise.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import emd_text2image as t2i
import results

TIMESTEPS = (100, 300, 500, 600, 700, 850, 979)


@torch.no_grad()
def measure(setup: t2i.Setup, state: dict, args: t2i.Args, text: Tensor) -> tuple[list[dict], Tensor]:
    """One caption's text features Float[N, L, D], once for each noise -> rows of TIMESTEPS, latents for --show."""
    teacher, z = setup.teacher, t2i.Noise("cpu", 5).normal(len(text), *setup.shape)
    real, x = setup.teacher_samples(z, text), t2i.generate(state["average"], z, text, args.t_star)
    wanted, rows, shown = (real.mean(0) - x.mean(0)).flatten(), [], [real[:1], x[:1]]
    for step in TIMESTEPS:
        t, row = torch.full((len(text),), step), {}
        y = x + teacher.sigma(t) * t2i.Noise("cpu", 6, step).normal_like(x)
        fake = state["score"](y, t, text)
        for name, weight in (("without", 1.0), ("guided", args.guidance)):
            teacher.guidance = weight
            denoised = teacher(y, t, text)
            delta = (denoised - fake).mean(0).flatten()
            row[f"rms_{name}"] = float(delta.square().mean().sqrt())
            row[f"cosine_{name}"] = float(torch.cosine_similarity(delta, wanted, dim=0))
        rows.append(row)
        shown += [denoised[:1], fake[:1]]
    return rows, torch.cat(shown)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="RUN_FOLDER")
    parser.add_argument("--name", default="guidance_by_noise", help="of the result file and of the picture")
    parser.add_argument("--captions", type=int, default=32, help="captions drawn for the numbers")
    parser.add_argument("--noises", type=int, default=32, help="noises for each caption")
    parser.add_argument("--show", nargs="+", default=[], metavar="CAPTION", help="of the picture; of the run's prompts")
    parser.add_argument("--media", type=Path, default=ROOT / "docs" / "media", help="folder for the picture")
    flags = parser.parse_args(argv)
    try:
        args = t2i.parse_args(["--eval-only", flags.folder])
        step, saved = t2i.load_checkpoint(Path(flags.folder))
        texts = t2i.read_prompts(args, "prompts") if args.prompts else t2i.load_pictures(args)[0]
        setup, state = t2i.load_everything(args, t2i.Run(args, writes=False), Accelerator(cpu=True), texts, saved)
    except t2i.UserError as error:
        sys.exit(f"guidance_by_noise.py: {error}")
    if missing := set(flags.show) - set(texts):
        sys.exit(f"guidance_by_noise.py: --show {missing.pop()!r} is no prompt of the run: give captions that are")
    picks = torch.randperm(len(texts), generator=t2i.Noise("cpu", 4).generator)[: flags.captions].tolist()
    of = lambda pick: measure(setup, state, args, setup.captions(torch.tensor([pick] * flags.noises)))  # noqa: E731
    measured = [of(pick)[0] for pick in picks]
    metrics = {"captions": len(picks), "noises": flags.noises, "guidance": args.guidance, "timesteps": {}}
    for i, t in enumerate(TIMESTEPS):
        row = {name: float(np.mean([rows[i][name] for rows in measured])) for name in measured[0][0]}
        metrics["timesteps"][str(t)] = {"sigma": float(setup.teacher.sigma(torch.tensor([t])))} | row
        print(f"t {t:>4}  " + "  ".join(f"{name} {value:.3f}" for name, value in metrics["timesteps"][str(t)].items()))
    if shown := [of(texts.index(caption))[1] for caption in flags.show]:
        rows = [t2i.tile(t2i.decode(setup.pipe, latents), len(latents)) for latents in shown]
        flags.media.mkdir(parents=True, exist_ok=True)
        picture = np.concatenate(rows).repeat(2, axis=0).repeat(2, axis=1)
        Image.fromarray(picture).save(flags.media / f"{flags.name}.png")
    run = results.run_of(Path(flags.folder), dataclasses.asdict(args), step, metrics=metrics)
    run["label"] = "-".join(Path(flags.folder).resolve().parts[-3:-1])
    command = [f"runs/{Path(word).name}" if word == flags.folder else word for word in argv]
    results.write(flags.name, [" ".join(["python benchmark/guidance_by_noise.py", *command])], [run], {})


if __name__ == "__main__":
    main(sys.argv[1:])

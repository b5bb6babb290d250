"""What an update of emd_imagenet.py costs, beside the bare network evaluations that it is made of.

    python benchmark/emd_speed.py --preset cpu              # prints a table, writes benchmark/results/emd_speed.json

Unit: seconds of one forward pass without gradients (F). The three kinds of evaluation are timed on their own, added up
in the numbers that the algorithm needs, and compared with a whole update (score step, E-step, M-step, average).
Each figure is the median of `ROUNDS`, taken in turns, so that a busy machine slows all of them alike. On a CPU they are
seconds of processor time, all threads together, which other programs change little (OMP_NUM_THREADS=1: one thread).
"""

import dataclasses
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import emd_imagenet as emd
import results

ROUNDS = int(os.environ.get("ROUNDS", "5"))
SETTINGS = {"Diff-Instruct": ("eps", 1), "EMD-1": ("eps-z", 1), "EMD-4": ("eps-z", 4), "EMD-16": ("eps-z", 16)}


def seconds(function) -> float:
    gpu = torch.cuda.is_available()
    clock = time.perf_counter if gpu else time.process_time
    started = clock()
    function()
    if gpu:
        torch.cuda.synchronize()
    return clock() - started


def main() -> None:
    args = dataclasses.replace(emd.parse_args(), train_teacher=True, teacher="")
    emd.check_args(args)
    torch.backends.cudnn.allow_tf32 = False  # as in the script's main()
    means = emd.Means(Accelerator())
    device, size = means.acc.device, min(args.batch_size, args.micro_batch_size)
    teacher = emd.Denoiser(args, emd.make_unet(args)).to(device).eval().requires_grad_(False)
    state = emd.init_state(args, teacher)
    net, labels = state["generator"], torch.zeros(size, dtype=torch.long, device=device)
    z, seed = torch.randn(size, *args.image_shape, device=device), 1

    def forward():
        with torch.no_grad():
            teacher.raw(z, torch.full_like(z[:, :1, :1, :1], 0.5), labels, seed)

    def forward_vjp():
        net.requires_grad_(False)
        inputs = z.clone().requires_grad_()
        torch.autograd.grad(emd.generate(net, inputs, labels, args.sigma_star), inputs, z)
        net.requires_grad_(True)

    def forward_backward():
        emd.generate(net, z, labels, args.sigma_star).backward(z)
        net.zero_grad()

    def update(corrector, k):
        changed = dataclasses.replace(args, corrector=corrector, k=k)
        return lambda: emd.train_iteration(changed, teacher, state, 1, means)

    work = {"forward": forward, "forward_vjp": forward_vjp, "forward_backward": forward_backward}
    work |= {name: update(*setting) for name, setting in SETTINGS.items()}
    samples = {name: [] for name in work}
    for turn in range(ROUNDS + 1):  # the first one warms up
        for name, function in work.items():
            spent = seconds(function)
            if turn:
                samples[name].append(spent)
    median = {name: statistics.median(values) for name, values in samples.items()}
    bare, vjp, backward = median["forward"], median["forward_vjp"], median["forward_backward"]
    batches, rows = args.batch_size // size, {}
    print(f"batch {args.batch_size} in {batches}, F = {bare:.4f} s")
    print(f"F with gradients of z {vjp / bare:.2f} F, with gradients of parameters {backward / bare:.2f} F")
    for name, (corrector, k) in SETTINGS.items():
        chain = k * (2 * bare + vjp) if corrector == "eps-z" else 2 * k * bare
        parts = batches * (args.score_updates * (bare + backward) + chain + backward)
        nominal = (4 * k + 3 if corrector == "eps-z" else 2 * k + 3) + 4 * args.score_updates
        rows[name] = {"seconds": median[name], "evaluations_seconds": parts, "ratio": median[name] / parts}
        rows[name] |= {"forwards_nominal": nominal, "forwards_measured": median[name] / bare / batches}
        print(
            f"{name:14} {median[name]:8.3f} s an update, evaluations {parts:8.3f} s, ratio {rows[name]['ratio']:.3f}; "
            f"{rows[name]['forwards_measured']:.1f} F measured, {nominal} F nominal"
        )
    runs = [{"label": name, "seed": args.seed, "steps": ROUNDS, "metrics": row} for name, row in rows.items()]
    summary = {"preset": args.preset, "batch_size": args.batch_size, "threads": torch.get_num_threads(), **median}
    results.write("emd_speed", [" ".join(["python", *sys.argv])], runs, summary)


if __name__ == "__main__":
    main()

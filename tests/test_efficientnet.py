"""benchmark/efficientnet.py against two photographs and plain linear algebra."""

import pytest
import torch
from sklearn.datasets import load_sample_image

import efficientnet
import emd_imagenet as emd


def photograph(name: str) -> torch.Tensor:
    image = torch.tensor(load_sample_image(name)).permute(2, 0, 1)[None]  # UInt8[1, 3, 427, 640]
    return image[..., 106:533]


def test_it_knows_what_photographs_show():
    ruler = efficientnet.Ruler(224)
    likeliest = [int(ruler(photograph(name)).argmax()) for name in ("china.jpg", "flower.jpg")]
    assert likeliest == [698, 985]  # palace and daisy of ImageNet's classes


def test_features_are_principal_components_and_survive_the_file(tmp_path, monkeypatch, capsys):
    path = tmp_path / "efficientnet_lite0.pt"
    monkeypatch.setattr("sys.argv", ["efficientnet.py", str(path), "digits", "--count", "96", "--components", "8"])
    efficientnet.main()
    assert "8 components hold" in capsys.readouterr().out
    images = efficientnet.pictures("digits", 96)
    pooled = efficientnet.Ruler(64)(images, return_features=True).double()
    args = emd.parse_args(["--preset", "smoke", "--features", str(path)])
    features, logits = emd.Features(args, None)(images[:, :1])
    assert features.shape == (96, 8) and logits.shape == (96, 1000)
    covariance = features.double().T.cov()
    variances = torch.linalg.eigvalsh(pooled.T.cov()).flip(0)[:8]
    torch.testing.assert_close(covariance, variances.diag(), rtol=1e-3, atol=1e-3 * float(variances[0]))
    torch.testing.assert_close(features.mean(0), torch.zeros(8), rtol=0, atol=1e-3)


def test_pictures_come_from_folders_and_shards(tmp_path):
    for i, picture in enumerate(efficientnet.pictures("digits", 9).permute(0, 2, 3, 1).numpy()):
        emd.Image.fromarray(picture).resize((40, 40)).save(tmp_path / f"{i}.png")
    assert efficientnet.pictures(str(tmp_path), 8).shape[:2] == (8, 3)
    with pytest.raises(efficientnet.t2i.UserError, match="holds 0 pictures"):
        efficientnet.pictures(str(tmp_path / "nothing"), 8)

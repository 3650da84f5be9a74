"""A failure here means: an image gets other features than LongViT's, or its weights are read wrongly."""

from __future__ import annotations

import argparse

import pytest
import torch
from torch.nn.functional import conv2d, interpolate, layer_norm
from torch.testing import assert_close

from longnet_dist.models.longvit import SEGMENTS, LongViT, image_patches
from tests.unit.models.test_torchscale import published_blocks, weights_of_torchscale

E, P, BRANCHES = 32, 8, ((64, 128, 256, 512, 1024), (1, 2, 4, 8, 16))


def published_weights(*, table=6, classes=None, final_norm=False):
    """Weights by the published names; of a fine-tuned model if there are classes."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    weights = {f"encoder.{name}": x for name, x in weights_of_torchscale(E=E, final_norm=final_norm).items()}
    weights |= {"patch_embed.proj.weight": draw(E, 3, P, P) / 14, "patch_embed.proj.bias": draw(E)}
    weights |= {"pos_embed": draw(1, table**2, E)}
    if classes is None:
        return weights | {"norm.weight": draw(E), "norm.bias": draw(E)}
    head = {"head.weight": draw(classes, E), "head.bias": draw(classes)} if classes else {}
    return {
        f"model.{name}": x for name, x in weights.items()
    } | {"fc_norm.weight": draw(E), "fc_norm.bias": draw(E)} | head  # fmt: skip


def published(image, weights, classes):
    """The published model on one image, written from its description."""
    w = {name.removeprefix("model."): x for name, x in weights.items()}
    x = conv2d(image[None], w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=P)
    height, width = x.shape[-2:]
    n = int(w["pos_embed"].shape[1] ** 0.5)
    table = w["pos_embed"][0].T.reshape(1, E, n, n)
    if height * width != n * n or image.shape[-2] != image.shape[-1]:
        table = interpolate(table, scale_factor=((height + 0.1) / n, (width + 0.1) / n), mode="bicubic")
    x = (x + table).flatten(2)[0].T
    layers = {name.removeprefix("encoder."): y for name, y in w.items() if name.startswith("encoder.")}
    x = published_blocks(x, layers, 2, 16, BRANCHES)
    if classes is None:
        return layer_norm(x, (E,), w["norm.weight"], w["norm.bias"], 1e-6).mean(0)
    x = layer_norm(x.mean(0), (E,), w["fc_norm.weight"], w["fc_norm.bias"])
    return w["head.weight"] @ x + w["head.bias"] if classes else x


@pytest.mark.parametrize("classes", [None, 0, 3])
@pytest.mark.parametrize("sides", [(48, 48), (40, 88), (7 * 8 + 3, 56)])
def test_features_are_the_published_ones(tmp_path, classes, sides):
    """Also of images of other sides than the table's."""
    weights = published_weights(classes=classes)
    torch.save({"model": weights, "args": argparse.Namespace(lr=1.0)}, tmp_path / "longvit.pth")
    model = LongViT.from_pretrained(tmp_path / "longvit.pth")
    images = torch.randn(2, 3, *sides, dtype=torch.float64)
    expected = torch.stack([published(image, weights, classes) for image in images])
    assert_close(model(images), expected, rtol=0, atol=1e-11)


def test_weights_of_dino_and_of_older_encoders(tmp_path):
    weights = published_weights(final_norm=True)
    by_dino = {f"module.backbone.{name}": x for name, x in weights.items()} | {"module.head.mlp.weight": torch.zeros(2)}
    torch.save({"student": {}, "teacher": by_dino, "epoch": 3}, tmp_path / "longvit.pth")
    model = LongViT.from_pretrained(tmp_path / "longvit.pth", image_size=1024)
    image = torch.randn(3, 48, 48, dtype=torch.float64)
    assert_close(model(image[None])[0], published(image, weights, None), rtol=0, atol=1e-11)


def test_patches_are_those_of_a_convolution():
    images, weight = torch.randn(2, 3, 24, 35), torch.randn(5, 3, 8, 8)
    whole = image_patches(images, 8, 0, 12)
    expected = conv2d(images, weight, stride=8).flatten(2).transpose(1, 2)
    assert_close(whole @ weight.flatten(1).T, expected, rtol=0, atol=1e-4)
    for start, stop in ((0, 3), (2, 7), (5, 5), (11, 12)):
        assert torch.equal(image_patches(images, 8, start, stop), whole[:, start:stop])


def test_branches_follow_the_size_of_images():
    model = LongViT(4096, d_model=16, num_layers=1, num_heads=4, table_size=2)
    assert model.encoder.config.segment_lengths == SEGMENTS[4096] == (1024, 2048, 4096, 8192, 16384)


def test_mistakes_are_named(tmp_path):
    torch.save({"patch_embed.proj.weight": torch.zeros(2, 3, 8, 8)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="it is no LongViT"):
        LongViT.from_pretrained(tmp_path / "w.pth")
    weights = published_weights()
    weights["cls_token"] = weights.pop("norm.bias")
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"cls_token is unexpected; norm\.bias is missing"):
        LongViT.from_pretrained(tmp_path / "w.pth")
    model = LongViT(64, 8, 16, 1, 4)
    for shape in ((1, 4, 64, 64), (3, 64, 64), (1, 3, 7, 64)):
        with pytest.raises(ValueError, match=r"it must be \(B, 3, height, width\), of one patch or more of 8 x 8"):
            model(torch.zeros(shape))
    with pytest.raises(ValueError, match="an image needs a patch or more"):
        LongViT(16)

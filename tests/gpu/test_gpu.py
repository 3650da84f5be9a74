"""A failure here means: on a GPU, attention, loss or training is wrong, or takes more memory than it should."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch.testing import assert_close

import longnet_dist
from longnet_dist import Pattern, dilated_attention
from longnet_dist.models.loss import linear_token_loss, token_loss
from tests.cases import Case
from tests.gpu.test_kernels import largest_errors
from tests.unit.conftest import config  # noqa: F401

EPS = torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 192, 200, 208, 224, 256])
@pytest.mark.parametrize("G", [4, 1])
def test_every_head_dim_equals_the_oracle(head_dim, G):
    """Torch refuses to train with 193 to 224 on some GPUs; another kernel takes their place there."""
    case = Case(Pattern((64, 100, 300), (1, 3, 5)), N=300, H=4, G=G, B=2, D=head_dim, causal=True)
    errors = largest_errors(case)
    assert all(error < 4 * EPS for error in errors), errors  # Fails for NaN, too.


def test_float32_says_that_it_is_slow():
    from longnet_dist.attention.call import _warn_of_float32

    _warn_of_float32.cache_clear()
    q = torch.randn(1, 16, 2, 16, device="cuda")
    with pytest.warns(UserWarning, match="attention in float32 on a GPU is slow"):
        dilated_attention(q, q, q, Pattern((16,), (1,)))


def test_the_loss_of_a_large_vocabulary_reads_the_weights_gradient_few_times():
    """It is right, and never holds all logits."""
    torch.cuda.empty_cache()
    x = torch.randn(1, 8192, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(131_072, 256, device="cuda") / 16).bfloat16().requires_grad_()
    targets = torch.randint(131_072, (1, 8192), device="cuda")
    expected = token_loss(x[:, :512].float() @ weight.float().T, targets[:, :512])
    assert_close(linear_token_loss(x[:, :512], weight, targets[:, :512]).float(), expected, rtol=1e-3, atol=1e-3)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_token_loss(x, weight, targets).backward()
    assert torch.cuda.max_memory_allocated() - before < 3 * 2**30 < 8192 * 131_072 * 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning", r"ignore:The \.grad attribute of a Tensor")
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"compile": True}])
def test_a_run_learns_and_resumes(config, options):  # noqa: F811
    """Autocast is the default for float32 parameters."""
    model = dataclasses.replace(config.model, num_heads=2, d_model=32)
    config = dataclasses.replace(config, steps=20, checkpoint_every=10, model=model, **options)
    whole = longnet_dist.train(config)
    assert whole.losses[-1] < 0.8 * whole.losses[0]
    saved = json.loads((config.run_folder / "config.json").read_text())
    assert saved["autocast"] == (config.dtype == "float32")
    for path in sorted((config.run_folder / "checkpoints").glob("step-*20")):
        path.rename(path.with_name("later"))
    resumed = longnet_dist.train(config)
    assert len(resumed.losses) == 10
    assert resumed.losses == pytest.approx(whole.losses[10:], rel=2e-2)


@pytest.mark.parametrize("causal", [True, False])
def test_memory_of_the_forward(causal):
    """Beside the inputs: the output in bfloat16 and in float32, lse, and the blocks of one branch."""
    q, k, v = torch.randn(3, 1, 65_536, 16, 128, device="cuda", dtype=torch.bfloat16).unbind()
    pattern = Pattern.geometric(65_536, base=2048, growth=4)
    dilated_attention(q, k, v, pattern, causal=causal)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    dilated_attention(q, k, v, pattern, causal=causal)
    assert torch.cuda.max_memory_allocated() - before < 4 * q.nbytes

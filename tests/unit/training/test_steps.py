"""A failure here means: the learning rate, the weight decay or the compilation of steps is not as documented."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.testing import assert_close
from torch.torch_version import TorchVersion

import longnet_dist
from longnet_dist import LongNetConfig, TrainConfig
from longnet_dist.checkpoints.checkpoints import Checkpoints
from longnet_dist.training.state import load_model
from longnet_dist.training.steps import learning_rate, parameter_groups


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.25), (1, 0.5), (2, 0.75), (3, 1.0), (8, 0.2 + 0.8 * 0.5), (13, 0.2), (20, 0.2)],
)
def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine(step, expected):
    """With three steps of warmup, ten of the cosine, and a fifth of the peak at its end."""
    config = TrainConfig(steps=13, warmup_steps=3, learning_rate=2e-3, final_learning_rate=0.2)
    assert learning_rate(config, step) == pytest.approx(2e-3 * expected, rel=1e-12)


def test_matrices_decay_and_biases_and_norms_do_not():
    model = LongNetConfig(d_model=16, num_layers=1, num_heads=2, segment_lengths=(8,), dilation_rates=(1,)).build()
    decaying, others = parameter_groups(list(model.parameters()), 0.05)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.05, 0.0)
    assert all(p.dim() == 2 for p in decaying["params"])
    assert all(p.dim() == 1 for p in others["params"])
    assert len(decaying["params"]) + len(others["params"]) == len(list(model.parameters()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_steps_are_compiled_once(config):
    """Inductor compiles a block for training and for validation, and not again in later steps."""
    from torch._dynamo.utils import counters

    graphs = []
    for steps in (2, 6):
        torch.compiler.reset()
        counters.clear()
        folder = config.run_folder.with_name(f"run-{steps}")
        longnet_dist.train(
            dataclasses.replace(
                config, steps=steps, compile=True, grad_accumulation=2, validate_every=1, run_folder=folder
            )
        )
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_bfloat16_parameters_keep_updates_that_are_small(config):
    """Weights and moments are in float32, in checkpoints too; rounded to bfloat16, nearly no weight would change."""
    config = dataclasses.replace(config, dtype="bfloat16", learning_rate=1e-5, warmup_steps=0, checkpoint_every=1)
    longnet_dist.train(config)
    model = load_model(config.run_folder)
    names = dict(model.named_parameters())
    assert {p.dtype for p in names.values()} == {torch.bfloat16}
    checkpoints = Checkpoints(config.run_folder / "checkpoints")
    states = []
    for path in sorted((config.run_folder / "checkpoints").iterdir()):
        state = {
            f"{kind}{name}": torch.zeros(p.shape)
            for name, p in names.items()
            for kind in ("model.", "optimizer.exp_avg.")
        }
        checkpoints.load(path, state)
        states.append(state)
    before, after = states
    for name, p in names.items():
        if p.dim() < 2:  # One of few numbers may happen to be updated by less than float32 resolves.
            continue
        weight = after[f"model.{name}"]
        assert_close(p, weight.bfloat16())
        assert (weight != before[f"model.{name}"]).float().mean() > 0.95, name
        assert not torch.equal(weight, p.float()), name


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_bfloat16_learns_as_float32_does(config):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        folder = config.run_folder.with_name(dtype)
        run = dataclasses.replace(config, steps=20, grad_accumulation=2, dtype=dtype, run_folder=folder)
        losses[dtype] = longnet_dist.train(run).losses
    # Versions of torch below 2.13 draw other weights in bfloat16, whose losses differ by 4 %.
    same_draws = TorchVersion(torch.__version__) >= "2.13"
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02 if same_draws else 0.05)
    assert losses["float32"][-1] < 0.8 * losses["float32"][0]

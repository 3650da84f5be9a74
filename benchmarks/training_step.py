"""Compare a whole training step of a Llama with dilated and with dense attention, by length, in one run.

    OMP_NUM_THREADS=2 python benchmarks/training_step.py [--seq-lens 4096 8192 16384] [--rounds 3]

A step is forward, loss, backward and AdamW, of the same transformers model with random weights. Contestants:

- longnet_dist: after `apply(model, pattern)`, with the branches of the pattern that fit in the sequence;
- longnet_dist, dense: after `apply` with one branch as long as the sequence, which is dense attention;
- transformers, sdpa: the model as transformers builds it, with torch's own dense attention.

Ratios are of medians. Before anything is measured, the losses of the two dense contestants are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
import tyro
from measure import dtype_name, machine, median_seconds, peak_mib
from transformers import LlamaConfig, LlamaForCausalLM

from longnet_dist import Pattern
from longnet_dist.integrations.transformers import apply

BASELINE = "transformers, sdpa"


@dataclass
class Options:
    """The sizes to measure."""

    seq_lens: tuple[int, ...] = (4096, 8192, 16384)
    """Tokens per step."""
    hidden_size: int = 512
    """Width of the model; a head has 64 dimensions."""
    layers: int = 2
    """Number of decoder layers."""
    rounds: int = 3
    """Measured steps of each contestant and length."""
    segment_lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)
    """Segment length of each branch, in tokens."""
    dilation_rates: tuple[int, ...] = (1, 2, 4, 8)
    """Dilation rate of each branch."""

    def pattern(self, seq_len: int) -> Pattern:
        """Return the pattern of the branches whose segments are at most as long as the sequence."""
        pairs = zip(self.segment_lengths, self.dilation_rates, strict=True)
        branches = [(w, r) for w, r in pairs if w <= seq_len]
        if not branches:
            raise ValueError(f"no segment length of {self.segment_lengths} is at most {seq_len}: give a shorter one")
        lengths, rates = zip(*branches, strict=True)
        return Pattern(lengths, rates)


def main(options: Options) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    print(
        f"{machine(device)}, transformers {transformers.__version__}; {dtype_name(dtype)}, {options.layers} layers, "
        f"width {options.hidden_size}, {options.hidden_size // 64} heads, batch 1, causal, {options.rounds} rounds\n"
    )
    print("| N | contestant | median s | x speed of sdpa | peak MiB above the model | pattern |")
    print("|---:|---|---:|---:|---:|---|")
    for seq_len in options.seq_lens:
        pattern = options.pattern(seq_len)
        dense = Pattern((seq_len,), (1,))
        patterns = {"longnet_dist": pattern, "longnet_dist, dense": dense, BASELINE: None}
        models = {name: build(options, seq_len, p, dtype, device) for name, p in patterns.items()}
        tokens = torch.randint(models[BASELINE].config.vocab_size, (1, seq_len), device=device)
        steps = {name: training_step(model, tokens) for name, model in models.items()}
        # In their first step, all models have the same weights.
        losses = {name: step() for name, step in steps.items()}
        torch.testing.assert_close(losses["longnet_dist, dense"], losses[BASELINE], rtol=1e-3, atol=0)
        peaks = {name: peak_mib(step, device) for name, step in steps.items()}
        medians = median_seconds(steps, options.rounds, device)
        for name, seconds in medians.items():
            speed = medians[BASELINE] / seconds
            cells = [
                str(seq_len),
                name,
                f"{seconds:.3f}",
                f"{speed:.2f}",
                f"{peaks[name]:.0f}",
                branches(patterns[name]),
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


def build(options: Options, seq_len: int, pattern: Pattern | None, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    """Build the same random model each time, with dilated attention if there is a pattern."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=options.hidden_size,
        intermediate_size=options.hidden_size * 43 // 16,  # The proportion of Llama 2 7B.
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 64,
        max_position_embeddings=seq_len,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).to(device, dtype).train()
    return model if pattern is None else apply(model, pattern)


def training_step(model: LlamaForCausalLM, tokens: torch.Tensor) -> Callable[[], torch.Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> torch.Tensor:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach().float()

    return step


def branches(pattern: Pattern | None) -> str:
    return "dense" if pattern is None else " ".join(map(str, pattern.branches))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

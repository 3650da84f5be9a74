"""A failure here means: documents that share a sequence see each other, or padding is seen."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import strategies as st

from longnet_dist import (
    DilatedAttention,
    LongNetConfig,
    Pattern,
    SequenceMesh,
    dense_reference,
    dilated_attention,
    next_token_labels,
)
from longnet_dist.functional import scaled_dot_product_dilated_attention
from longnet_dist.plan.exchange import STRATEGIES
from tests.cases import NO_LATENCY, SLOW_STARTS, Case, cases, drawn
from tests.pool import WORLDS


def results(case, mesh=None, dtype=torch.float64, **documents):
    """Return the output, and the gradient of every input, joined over the ranks of a mesh."""
    inputs = case.tensors(dtype)
    split = (lambda x: x) if mesh is None else mesh.split
    local = {name: split(x) if name in "qkv" else x for name, x in inputs.items()}
    out, lse = dilated_attention(**case.arguments(local), mesh=mesh, return_lse=True, **documents)
    if mesh is not None:
        out, lse = mesh.join(out), mesh.join(lse)
    grads = list(torch.autograd.grad(out, list(inputs.values()), case.dout(dtype)))
    if case.biased and mesh is not None:
        grads[3] = mesh.sum(grads[3])
    return [out.detach(), lse.detach(), *grads]


def alone(case, documents):
    """Return what the oracle computes for each document alone; `documents` are (sequence, first, end)."""
    inputs = case.tensors()
    out = torch.zeros(case.B, case.N, case.H, case.D, dtype=torch.float64)
    lse = torch.full((case.B, case.N, case.H), -torch.inf, dtype=torch.float64)
    for sequence, first, end in documents:
        if first < end:
            parts = {n: x[sequence, first:end][None] if n in "qkv" else x for n, x in inputs.items()}
            part, part_lse = dense_reference(**case.arguments(parts), return_lse=True)
            out = out.index_put((torch.tensor(sequence), torch.arange(first, end)), part[0])
            lse[sequence, first:end] = part_lse[0].detach()
    if not out.requires_grad:  # No document has a token.
        return [out, lse, *map(torch.zeros_like, inputs.values())]
    grads = torch.autograd.grad(out, list(inputs.values()), case.dout(), allow_unused=True, materialize_grads=True)
    return [out.detach(), lse, *grads]


def check(group, examples, tolerance=1e-12):
    for case, offsets, lengths, options in examples:
        mesh = None if group is None else SequenceMesh(group, case.pattern, case.N, **options)
        of_sequences = [(b, *pair) for b in range(case.B) for pair in itertools.pairwise(offsets)]
        kinds = [({"cu_seqlens": torch.tensor(offsets, dtype=torch.int32)}, of_sequences)]
        kinds += [({"lengths": torch.tensor(lengths)}, [(b, 0, length) for b, length in enumerate(lengths)])]
        for arguments, documents in kinds:
            for actual, exact in zip(results(case, mesh, **arguments), alone(case, documents), strict=True):
                message = f"{case}, {arguments}, {options}"
                torch.testing.assert_close(actual, exact, rtol=0, atol=tolerance, msg=message)


@st.composite
def documents(draw, world: int):
    """Draw a case, offsets of documents (empty ones and single tokens among them), lengths, and a mesh's options."""
    case = draw(cases(longest=60))
    inner = draw(st.lists(st.integers(0, case.N), max_size=8))
    lengths = draw(st.lists(st.integers(0, case.N), min_size=case.B, max_size=case.B))
    chunk = draw(st.none() | st.integers(0, 5).map(lambda extra: max(1, -(-case.N // world)) + extra))
    options = {
        "chunk": chunk,
        "keep_kv": draw(st.none() | st.booleans()),
        "strategy": draw(st.sampled_from(STRATEGIES)),
        "hardware": draw(st.sampled_from([SLOW_STARTS, NO_LATENCY])),
    }
    return case, [0, *sorted(inner), case.N], lengths, options


@pytest.mark.parametrize("world", [0, *WORLDS])
def test_documents_equal_each_document_alone(pool, world):
    """On one device without a mesh (0), and over ranks, whose edges cut documents anywhere."""
    examples = drawn(documents(max(1, world)), 80)
    if world:
        pool.run(world, check, examples)
    else:
        check(None, examples)


def test_a_document_longer_than_many_ranks(pool):
    case = Case(Pattern((8, 32, 200), (1, 3, 5)), N=200, H=4, G=2, B=2, D=8, causal=True)
    pool.run(8, check, [(case, [0, 3, 3, 171, 172, 200], [200, 13], {})])


def check_other_documents_in_each_sequence(group):
    """Compare with a call for each sequence, whose documents begin elsewhere."""
    case = Case(Pattern((8, 32), (1, 3)), N=40, H=4, G=2, B=2, D=8, causal=True)
    mesh = SequenceMesh(group, case.pattern, case.N)
    inputs = [mesh.split(x) for x in case.tensors().values()]
    offsets = torch.tensor([[0, 13, 30, 40], [0, 39, 40, 40]])
    out = dilated_attention(*inputs, case.pattern, causal=True, mesh=mesh, cu_seqlens=offsets)
    for row, of_sequence in enumerate(offsets):
        alone = [x[row : row + 1] for x in inputs]
        expected = dilated_attention(*alone, case.pattern, causal=True, mesh=mesh, cu_seqlens=of_sequence)
        torch.testing.assert_close(out[row : row + 1], expected, rtol=0, atol=1e-12)
    empty = [x[:0] for x in inputs]
    assert dilated_attention(*empty, case.pattern, mesh=mesh, cu_seqlens=offsets[:0]).shape == empty[0].shape


@pytest.mark.parametrize("world", [0, 2])
def test_each_sequence_may_have_its_own_documents(pool, world):
    if world:
        pool.run(world, check_other_documents_in_each_sequence)
    else:
        check_other_documents_in_each_sequence(None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 5, 3, 20])}, "cu_seqlens has 3 after 5; no document may end before it begins"),
        ({"cu_seqlens": torch.tensor([0, 5, 19])}, "ends with 19; its first offset must be 0, and its last one N = 20"),
        ({"cu_seqlens": torch.tensor([1, 20])}, "cu_seqlens begins with 1 and ends with 20"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int32)}, "cu_seqlens is empty"),
        ({"cu_seqlens": torch.tensor([0.0, 20.0])}, r"cu_seqlens is torch.float32 of shape \(2,\); it must be int32"),
        ({"cu_seqlens": torch.tensor([[0, 20]])}, r"of shape \(1, 2\); .*or \(B, documents \+ 1\) with B = 2"),
        ({"cu_seqlens": torch.tensor([[0, 20], [0, 19]])}, "cu_seqlens begins with 0 and ends with 19"),
        ({"cu_seqlens": [0, 20]}, "cu_seqlens is a list; it must be int32 or int64"),
        ({"lengths": torch.tensor([3])}, r"lengths is torch.int64 of shape \(1,\); .* of shape \(B,\) = \(2,\)"),
        ({"lengths": torch.tensor([3, 21])}, r"lengths is \[3, 21\]; each must be between 0 and N = 20"),
        ({"lengths": torch.tensor([3, -1])}, r"lengths is \[3, -1\]"),
        ({"lengths": torch.tensor([3, 4]), "cu_seqlens": torch.tensor([0, 20])}, "do not go together"),
    ],
)
def test_offsets_that_cannot_be_are_an_error(arguments, message):
    q = torch.randn(2, 20, 2, 4)
    with pytest.raises(ValueError, match=message):
        dilated_attention(q, q, q, Pattern((4,), (1,)), **arguments)


def error_with_offsets(group, offsets_of_rank):
    mesh = SequenceMesh(group, Pattern((4, 20), (1, 2)), 20)
    q = mesh.split(torch.randn(2, 20, 2, 4))
    try:
        dilated_attention(q, q, q, mesh.pattern, mesh=mesh, cu_seqlens=torch.tensor(offsets_of_rank[mesh.rank]))
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        (([0, 5, 20], [0, 6, 20]), "documents (a digest of their offsets)"),
        (([0, 5, 20], [0, 5, 19]), "rank 1: cu_seqlens begins with 0 and ends with 19"),
    ],
)
def test_ranks_with_other_documents_all_get_the_error(pool, offsets, message):
    for error in pool.run(2, error_with_offsets, offsets):
        assert message in error


DOCUMENTS = [0, 7, 7, 8, 41, 60]


def model_of(**options):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 30}
    config = LongNetConfig(**sizes, segment_lengths=(8, 60), dilation_rates=(1, 3), **options)
    return config.build(dtype=torch.float64)


def loss_and_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def losses_of_documents(group, kind):
    """Return loss and gradients of documents in one sequence or of padded ones, and of each document alone."""
    model, generator = model_of(), torch.Generator().manual_seed(1)
    tokens = torch.randint(30, (1 if kind == "cu_seqlens" else 3, 60), generator=generator)
    if kind == "cu_seqlens":
        arguments = {"cu_seqlens": torch.tensor(DOCUMENTS)}
        alone = [tokens[:, a:b] for a, b in itertools.pairwise(DOCUMENTS) if b > a]
    else:
        arguments = {"lengths": torch.tensor([60, 0, 17])}
        alone = [tokens[:1], tokens[2:, :17]]
    mesh = None if group is None else SequenceMesh(group, model.config.pattern, 60)
    split = (lambda x: x) if mesh is None else mesh.split
    targets = next_token_labels(tokens)
    loss = model(split(tokens), mesh, split(targets), **arguments)
    packed = loss_and_gradients(model, loss)
    if mesh is not None:
        packed[1:] = [mesh.sum(grad) for grad in packed[1:]]
    sums = [model(x, targets=next_token_labels(x)) * (x.shape[1] - 1) for x in alone]
    count = sum(x.shape[1] - 1 for x in alone)
    return packed, loss_and_gradients(model, sum(sums) / count)


@pytest.mark.parametrize("kind", ["cu_seqlens", "lengths"])
@pytest.mark.parametrize("world", [0, 2, 4])
def test_a_model_learns_from_each_document_as_if_it_were_alone(pool, world, kind):
    """Positions begin anew, and no token is predicted from another document or from padding."""
    every = pool.run(world, losses_of_documents, kind) if world else [losses_of_documents(None, kind)]
    for packed, alone in every:
        for actual, expected in zip(packed, alone, strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"use_xpos": True}, {"use_rotary": True}, {"use_rel_pos_bias": True}])
@pytest.mark.parametrize("causal", [True, False])
def test_positions_of_a_layer_begin_anew(options, causal):
    layer = DilatedAttention(32, 4, (1, 3), (8, 60), causal=causal, **options).double()
    if layer.rel_pos_bias is not None:
        torch.nn.init.normal_(layer.rel_pos_bias)
    x = torch.randn(2, 60, 32, dtype=torch.float64)
    out = layer(x, cu_seqlens=torch.tensor(DOCUMENTS))
    alone = torch.cat([layer(x[:, a:b]) for a, b in itertools.pairwise(DOCUMENTS)], dim=1)
    torch.testing.assert_close(out, alone, rtol=0, atol=1e-12)
    padded = layer(x, lengths=torch.tensor([60, 11]))
    torch.testing.assert_close(padded[0], layer(x)[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(padded[1, :11], layer(x[1:, :11])[0], rtol=0, atol=1e-12)


def test_the_functional_door_takes_documents():
    pattern, q = Pattern((8, 60), (1, 3)), torch.randn(1, 4, 60, 8, dtype=torch.float64)
    out = scaled_dot_product_dilated_attention(q, q, q, pattern, cu_seqlens=torch.tensor(DOCUMENTS))
    parts = [q[:, :, a:b] for a, b in itertools.pairwise(DOCUMENTS)]
    alone = [scaled_dot_product_dilated_attention(x, x, x, pattern) for x in parts]
    torch.testing.assert_close(out, torch.cat(alone, dim=2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_documents_change_without_another_compilation(dynamic):
    pattern = Pattern((8, 40), (1, 3))

    def call(q, offsets):
        return dilated_attention(q, q, q, pattern, causal=True, cu_seqlens=offsets) * 2

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    q = torch.randn(1, 40, 3, 8, dtype=torch.float64, requires_grad=True)
    for number, offsets in enumerate(([0, 13, 40], [0, 40, 40], [0, 1, 40])):
        offsets = torch.tensor(offsets)
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            out = compiled(q, offsets)
        expected = call(q, offsets)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), q) for x in (out, expected)))


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 30], "ends with 30; its first offset must be 0, and its last one at most N = 20"),
        ([5, 20], "begins with 5 and ends with 20; its first offset must be 0"),
        ([0, 15, 10, 20], "has 10 after 15; no document may end before it begins"),
    ],
)
def test_offsets_of_a_compiled_call_are_checked_when_they_are_known(offsets, message):
    q = torch.randn(1, 20, 2, 4)
    call = torch.compile(
        lambda q, offsets: dilated_attention(q, q, q, Pattern((4,), (1,)), cu_seqlens=offsets), backend="aot_eager"
    )
    with pytest.raises(ValueError, match=message):
        call(q, torch.tensor(offsets))


def error_with_lengths(group):
    mesh = SequenceMesh(group, Pattern((4, 20), (1, 2)), 20)
    q = mesh.split(torch.randn(2 + mesh.rank, 20, 2, 4))
    with pytest.raises(ValueError, match=r"lengths \(a digest\)"):
        dilated_attention(q, q, q, mesh.pattern, mesh=mesh, lengths=torch.full((len(q),), 20))


def test_ranks_with_other_batches_of_lengths_all_get_the_error(pool):
    pool.run(2, error_with_lengths)

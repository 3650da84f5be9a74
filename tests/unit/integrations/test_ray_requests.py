"""A failure here means: a gang sends its ranks arguments that cannot work, or refuses ones that can."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from longnet_dist import LongNetConfig, Pattern
from longnet_dist.data.tokenizers import Bytes

pytestmark = pytest.mark.filterwarnings("ignore")

PATTERN = Pattern((4,), (1,))
TEXT = "token ids are {}; they must be integers"
NOT_DATA = [None, 7, [1.0, 2.0], {"a": 1}, object(), {1, 2}]
"""Values that are neither tensors nor arrays nor paths."""


def attention_inputs(dtype=np.float32):
    return [np.ones((1, 6, 2, 4), dtype) for _ in range(3)]


@pytest.fixture
def builder(tmp_path):
    """The requests of a gang of two, three rows of six on each rank, with a model of bytes."""
    from longnet_dist.integrations.ray.requests import RequestBuilder

    LongNetConfig(
        d_model=8, num_layers=1, num_heads=2, segment_lengths=(4,), dilation_rates=(1,)
    ).build().save_pretrained(tmp_path / "model")
    return RequestBuilder(2, tmp_path / "model", Bytes())


@pytest.mark.parametrize(
    "value",
    [*NOT_DATA, "missing.npy", "", torch.ones(1, 6, 2, 4, device="meta"), torch.ones(1, 6, 2, 4).to_sparse()],
    ids=repr,
)
def test_attention_of_what_is_no_array_raises(builder, value):
    for position in range(3):
        inputs = attention_inputs()
        inputs[position] = value
        with pytest.raises(ValueError, match=rf"{'qkv'[position]} is|no such file|'' names no file"):
            builder.attention(*inputs, PATTERN)


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8", "i8", "?", "c8", "c16", "O", "U3", "S3", "M8[s]", "V4", "g"])
def test_attention_of_a_dtype_that_no_kernel_takes_raises(builder, dtype, tmp_path):
    inputs = attention_inputs(dtype)
    with pytest.raises(ValueError, match=r"q is of .*; it must be of float16, bfloat16, float32 or float64"):
        builder.attention(*inputs, PATTERN)
    if np.dtype(dtype) != object:
        np.save(tmp_path / "q.npy", inputs[0])
        with pytest.raises(ValueError, match=r"q is of .*; it must be of float16"):
            builder.attention(tmp_path / "q.npy", *attention_inputs()[1:], PATTERN)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint16, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_attention_of_tensors_of_a_wrong_dtype_raises(builder, dtype):
    x = torch.ones(1, 6, 2, 4).to(dtype)
    with pytest.raises(ValueError, match=f"q is of {dtype}; it must be of float16"):
        builder.attention(x, x, x, PATTERN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"causal": "yes"}, "causal is 'yes'; it must be True or False"),
        ({"causal": None}, "causal is None"),
        ({"scale": "1"}, "scale is '1'; it must be None or a finite number"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"scale": True}, "scale is True"),
        ({"kernel": 5}, "kernel is 5; it must be one of auto, "),
        ({"kernel": ["auto"]}, "kernel is"),
        ({"out": 5}, "out is 5; it must be the path of a folder"),
        ({"out": ""}, "names no file or folder"),
        ({"out": "s3://bucket/x"}, "no path on this machine"),
        ({"pattern": (64, 1)}, r"pattern is \(64, 1\); it must be a longnet_dist.Pattern"),
    ],
)
def test_options_of_attention_that_cannot_work_raise(builder, options, message):
    options = {"pattern": PATTERN} | options
    with pytest.raises(ValueError, match=message):
        builder.attention(*attention_inputs(), **options)


def test_arrays_of_any_layout_are_sent_as_they_read(builder, tmp_path):
    """Byte-swapped, reversed and read-only arrays, and files of them."""
    whole = np.arange(48, dtype=np.float32).reshape(1, 6, 2, 4)
    read_only = whole.copy()
    read_only.flags.writeable = False
    np.save(tmp_path / "swapped.npy", whole.astype(">f4"))
    for x in (whole.astype(">f4"), whole[:, ::-1].copy()[:, ::-1], read_only, tmp_path / "swapped.npy"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            request = builder.attention(x, x, x, PATTERN)
            parts = [
                rows.read(*span)
                for rows, span in zip([arguments[1] for arguments in request.arguments], [(0, 3), (3, 6)], strict=True)
            ]
        assert_close(torch.cat(parts, 1), torch.from_numpy(whole))


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", ">u2", "u4", "i4", "u8", "i8", "<i8"])
def test_token_ids_of_every_integer_type_are_sent(builder, dtype, tmp_path):
    ids = np.array([3, 1, 4, 1, 5, 9], dtype)
    np.save(tmp_path / "ids.npy", ids)
    documents = [ids, ids.tolist(), tuple(ids.tolist()), tmp_path / "ids.npy"]
    if ids.dtype.isnative:
        documents.append(torch.from_numpy(ids))
    for document in documents:
        request = builder.score(document)
        assert request.num_rows == 6
        parts = [request.arguments[0][0].read(0, 4), request.arguments[1][0].read(3, 6)]
        assert all(part.dtype not in (torch.uint16, torch.uint32, torch.uint64) for part in parts)
        assert [part.tolist() for part in parts] == [[3, 1, 4, 1], [1, 5, 9]]


@pytest.mark.parametrize("read", ["score", "embed"])
@pytest.mark.parametrize(
    ("document", "message"),
    [
        (None, "the document is None; it must be text, bytes, token ids or a Path"),
        (7, "the document is 7; it must be text"),
        ({1, 2}, "the document is {1, 2}; it must be text"),
        ([1.5, 2.0], TEXT.format("float64")),
        ([1, None], TEXT.format("object")),
        (["a", "b"], TEXT.format("<U1")),
        ([True, False], TEXT.format("bool")),
        ([2**70], TEXT.format("object")),
        ([1, [2, 3]], "inhomogeneous"),
        ([[1, 2]], r"has shape \(1, 2\); it must be one sequence"),
        ([], "at least one token"),
        ("", "at least one token"),
        (np.ones(3, np.complex64), TEXT.format("complex64")),
        (np.array(["a"], object), TEXT.format("object")),
        (np.array([2**63], np.uint64), "holds 9223372036854775808; its numbers must be at most 9223372036854775807"),
        (
            torch.tensor([2**63 - 1, -(2**63)]).view(torch.uint64),
            "holds 9223372036854775808; its numbers must be at most 9223372036854775807",
        ),
        (torch.ones(3), TEXT.format("torch.float32")),
        (torch.ones(3, dtype=torch.bool), TEXT.format("torch.bool")),
        (torch.ones(3, dtype=torch.int64, device="meta"), "the document is on the device meta, and has no values"),
        (torch.ones(3, dtype=torch.int64).to_sparse(), "the document is a sparse or nested tensor"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_documents_that_cannot_work_raise(builder, read, document, message):
    with pytest.raises(ValueError, match=message):
        getattr(builder, read)(document)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", b"PK\x03\x04", b"not an array"])
def test_a_broken_array_file_raises(builder, content, tmp_path):
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.npy: not a whole \.npy file of numbers"):
        builder.score(tmp_path / "x.npy")
    with pytest.raises(ValueError, match=r"x\.npy: not a whole \.npy file of numbers"):
        builder.attention(tmp_path / "x.npy", *attention_inputs()[1:], PATTERN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_ranks": 1.5}, "num_ranks is 1.5; it must be a whole number of at least 1"),
        ({"num_ranks": True}, "num_ranks is True"),
        ({"num_ranks": "2"}, "num_ranks is '2'"),
        ({"cpus_per_rank": 0}, "cpus_per_rank is 0; it must be above 0"),
        ({"cpus_per_rank": float("nan")}, "cpus_per_rank is nan"),
        ({"cpus_per_rank": None}, "cpus_per_rank is None"),
        ({"gpus_per_rank": float("inf")}, "gpus_per_rank is inf"),
        ({"gpus_per_rank": -1}, "gpus_per_rank is -1"),
        ({"gpus_per_rank": 1.5}, "gpus_per_rank is 1.5; above 1 it must be a whole number"),
        ({"timeout": float("inf")}, "timeout is inf"),
        ({"timeout": "1"}, "timeout is '1'"),
        ({"form_timeout": float("nan")}, "form_timeout is nan"),
        ({"form_timeout": 0}, "form_timeout is 0"),
        ({"retries": -1}, "retries is -1; it must be a whole number of at least 0"),
        ({"retries": None}, "retries is None"),
        ({"placement": "NEAR"}, "placement is 'NEAR'; it must be one of PACK, SPREAD, STRICT_PACK, STRICT_SPREAD"),
        ({"placement": []}, r"placement is \[\]"),
        ({"labels": ["a"]}, r"labels is \['a'\]; it must be a dictionary of text to text"),
        ({"labels": {"a": 1}}, "labels is {'a': 1}"),
        ({"tokenizer": "gpt2"}, "tokenizer is 'gpt2'; .*load_tokenizer"),
        ({"model": 5}, "model is 5; it must be the path of a folder"),
        ({"model": ""}, "names no file or folder"),
    ],
)
def test_options_of_a_gang_that_cannot_work_raise(options, message, monkeypatch):
    from longnet_dist.integrations.ray import SequenceParallelGang

    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    with pytest.raises(ValueError, match=message):
        SequenceParallelGang(**({"num_ranks": 2} | options))


@pytest.mark.parametrize("content", ["[]", "{", '{"depth": 3}', "\x00"])
def test_a_broken_config_of_a_model_raises(content, tmp_path):
    from longnet_dist.integrations.ray.requests import RequestBuilder

    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: not the config of a model"):
        RequestBuilder(1, tmp_path, Bytes())

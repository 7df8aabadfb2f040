"""Artefacts: what is read back, and what is refused with which words."""

from __future__ import annotations

import contextlib
import io
import mmap
import pickle
import re
import struct
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from prefix_store.errors import InvalidPrefixError
from prefix_store.groups import DTYPES
from prefix_store.prefix import (
    MAX_TEMPLATE_CHARS,
    MAX_TRAINING_CHARS,
    METADATA_KEY,
    Prefix,
    version_of,
)
from tests.prefix_store.damage import damaged, with_header
from tests.prefix_store.examples import KEYS, SHAPE, VALUES, a_prefix, artefact

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
names = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=20)


@given(
    st.builds(
        a_prefix,
        shape=st.tuples(*[st.integers(1, 4)] * 4),
        method=names,
        base_model=names,
        template=st.just("") | text.map(lambda around: f"{around}{{source}}"),
        training=st.dictionaries(text, text, max_size=5),
    ),
    st.sampled_from(DTYPES),
)
def test_reads_back_what_it_wrote(prefix: Prefix, dtype: torch.dtype) -> None:
    wrote = prefix.to("cpu", dtype)

    read = Prefix.from_bytes(wrote.to_bytes())

    assert torch.equal(read.keys, wrote.keys)
    assert torch.equal(read.values, wrote.values)
    assert read.keys.dtype == dtype
    for name in ("method", "base_model", "template", "training"):
        assert getattr(read, name) == getattr(wrote, name)
    assert read.to_bytes() == wrote.to_bytes()


@pytest.mark.parametrize("last", [0, 4], ids=["halves of one tensor", "strided"])
def test_equal_prefixes_have_equal_bytes_however_they_lie_in_memory(last: int) -> None:
    plain = a_prefix(training={"a": "1", "b": "2"})
    keys, values = torch.stack([plain.keys, plain.values], dim=last).unbind(last)
    same = a_prefix(keys=keys, values=values, training={"b": "2", "a": "1"})

    assert same.to_bytes() == plain.to_bytes()
    assert a_prefix(seed=1).to_bytes() != plain.to_bytes()


def test_keys_and_values_may_be_one_tensor() -> None:
    ones = torch.ones(SHAPE)

    assert a_prefix(keys=ones, values=ones).to_bytes() == artefact()


def test_the_longest_texts_fit_the_header() -> None:
    longest = a_prefix(
        template="{source}" + "\U0001f600" * (MAX_TEMPLATE_CHARS - 8),
        training={"note": "\U0001f600" * (MAX_TRAINING_CHARS - 4)},
    )

    assert Prefix.from_bytes(longest.to_bytes()).training == longest.training


def test_version_is_the_hash_of_the_bytes() -> None:
    assert version_of(b"abc") == (
        "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_numbers_too_large_for_a_dtype_are_refused() -> None:
    prefix = a_prefix(keys=torch.full(SHAPE, 1e6), values=torch.ones(SHAPE))

    with pytest.raises(InvalidPrefixError, match="keys holds Inf"):
        prefix.to("cpu", torch.float16)


def _torch_saved() -> bytes:
    buffer = io.BytesIO()
    torch.save({KEYS: torch.ones(SHAPE)}, buffer)
    return buffer.getvalue()


def _with(number: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    tensor = torch.ones(SHAPE, dtype=dtype)
    tensor[-1, -1, -1, -1] = number
    return tensor


GOOD = artefact()
ONES = torch.ones(SHAPE)
WHOLE_HEADER = 8 + int.from_bytes(GOOD[:8], "little")


def test_the_hand_written_artefact_is_good() -> None:
    assert Prefix.from_bytes(GOOD).prefix_length == 5


@pytest.mark.parametrize(
    ("data", "says"),
    [
        pytest.param(b"", "not safetensors: it is empty", id="empty"),
        pytest.param(b"hello, world", "not safetensors: it begins with", id="text"),
        pytest.param(pickle.dumps({"a": 1}), "not safetensors: .* a Python pickle", id="pickle"),
        pytest.param(_torch_saved(), "torch.save writes: a pickle inside", id="torch.save"),
        pytest.param(b"GGUF\x03\0\0\0{", "a GGUF file", id="gguf"),
        pytest.param(GOOD[:WHOLE_HEADER], "truncated", id="no tensors"),
        pytest.param(GOOD[:-1], "truncated", id="last byte missing"),
        pytest.param(
            struct.pack("<Q", 400_000) + b'{"a":' * 80_000, "header is not JSON", id="deep header"
        ),
        pytest.param(
            artefact({KEYS: ONES}),
            "holds the tensors 'decoder.keys'; expected exactly 'decoder.keys', 'decoder.values'",
            id="tensor missing",
        ),
        pytest.param(
            artefact({KEYS: ONES, VALUES: ONES + 0, "extra": ONES + 1}),
            "'extra'; expected exactly",
            id="tensor too many",
        ),
        pytest.param(artefact({}), "holds the tensors none", id="no tensor"),
        pytest.param(artefact(metadata={}), "no 'prefixserve' metadata", id="no metadata"),
        pytest.param(artefact(metadata={"format": "pt"}), "not a prefix", id="others' metadata"),
        pytest.param(artefact(metadata={METADATA_KEY: "{"}), "not JSON", id="metadata not JSON"),
        pytest.param(
            artefact(metadata={METADATA_KEY: "[]"}), "not a JSON obj", id="metadata a list"
        ),
        pytest.param(artefact(format="prefixserve/9"), "format 'prefixserve/1'", id="format"),
        pytest.param(artefact(colour="red"), "colour.*; expected", id="metadata too many"),
        pytest.param(artefact(method=3), "method is '3'", id="method a number"),
        pytest.param(artefact(base_model="x" * 257), "at most 256", id="long base model"),
        pytest.param(artefact(base_model="a\x1b[31m"), "base_model .* printable", id="escape"),
        pytest.param(artefact(template="no place"), "expected {source}", id="template"),
        pytest.param(artefact(template="{source}" * 1000), "at most 4096", id="long template"),
        pytest.param(artefact(template="{source}\ud800"), "surrogate", id="half a pair"),
        pytest.param(artefact(template=["{source}"]), "template is", id="template a list"),
        pytest.param(artefact(training=["x"]), "training is not", id="training a list"),
        pytest.param(artefact(training={"a": 1}), "training is not", id="training a number"),
        pytest.param(
            artefact(training={"a": "x" * 20_000}), "20001 characters", id="training long"
        ),
        pytest.param(
            artefact({KEYS: torch.ones(2, 3, 5), VALUES: ONES}),
            r"keys has shape \[2, 3, 5\]; expected 4 dimensions",
            id="three dimensions",
        ),
        pytest.param(
            artefact({KEYS: torch.ones(2, 3, 0, 4), VALUES: torch.ones(2, 3, 0, 4)}),
            r"keys has shape \[2, 3, 0, 4\]; .* none of them 0",
            id="no positions",
        ),
        pytest.param(
            artefact({KEYS: ONES, VALUES: torch.ones(2, 3, 6, 4)}),
            r"keys is float32 \[2, 3, 5, 4\] and decoder.values is float32 \[2, 3, 6, 4\]",
            id="other lengths",
        ),
        pytest.param(
            artefact({KEYS: ONES, VALUES: ONES.half()}),
            "values is float16 .* expected the same shape and dtype",
            id="other dtypes",
        ),
        *(
            pytest.param(
                artefact({KEYS: ONES.to(dtype), VALUES: ONES.to(dtype) + 0}),
                f"keys has dtype {str(dtype)[6:]}; expected one of float16, bfloat16, float32",
                id=str(dtype),
            )
            for dtype in (torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64)
        ),
        pytest.param(
            artefact({KEYS: ONES.to(torch.float8_e4m3fn), VALUES: ONES}),
            "keys has dtype float8_e4m3fn",
            id="float8",
        ),
        pytest.param(
            artefact({KEYS: _with(float("nan")), VALUES: ONES}), "keys holds NaN", id="NaN"
        ),
        pytest.param(
            artefact({KEYS: ONES, VALUES: _with(float("-inf"))}), "values holds Inf", id="Inf"
        ),
        pytest.param(
            artefact({KEYS: ONES.bfloat16(), VALUES: _with(float("nan"), torch.bfloat16)}),
            "values holds NaN",
            id="bfloat16 NaN",
        ),
    ],
)
def test_refuses(data: bytes, says: str) -> None:
    with pytest.raises(InvalidPrefixError, match=says):
        Prefix.from_bytes(data)


@given(st.binary(max_size=200), st.integers(0, len(GOOD) - 1))
def test_damaged_bytes_are_refused_or_read_never_worse(noise: bytes, at: int) -> None:
    data = GOOD[:at] + noise + GOOD[at + len(noise) :]
    with contextlib.suppress(InvalidPrefixError):
        Prefix.from_bytes(data)


DAMAGED = damaged(GOOD)


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_refused(kind: str) -> None:
    data, says = DAMAGED[kind]

    with pytest.raises(InvalidPrefixError, match=re.escape(says)):
        Prefix.from_bytes(data)


@pytest.mark.parametrize("padding", range(8))
def test_tensors_are_views_of_whatever_holds_the_file(tmp_path: Path, padding: int) -> None:
    header, numbers = GOOD[8:WHOLE_HEADER], GOOD[WHOLE_HEADER:]
    data = with_header(header + b" " * padding, numbers)
    (tmp_path / "file").write_bytes(data)
    with (tmp_path / "file").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for buffer in (data, bytearray(data), memoryview(data), mapped):
        read = Prefix.from_bytes(buffer)
        assert torch.equal(read.keys, ONES)
        assert torch.equal(read.values, ONES)
        assert read.keys.data_ptr() % 4 == read.values.data_ptr() % 4 == 0
        if padding == 0:  # nothing is copied where numbers are aligned
            apart = read.values.data_ptr() - read.keys.data_ptr()
            assert apart == read.keys.nbytes


def test_a_view_shows_what_the_buffer_holds() -> None:
    buffer = bytearray(GOOD)
    read = Prefix.from_bytes(buffer)
    buffer[-4:] = struct.pack("<f", 3.0)

    assert read.values[-1, -1, -1, -1] == 3

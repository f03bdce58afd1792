"""Files made by other programs, as they are found in the wild."""

import os
from pathlib import Path

import numpy as np
import pytest

from src.data.sampling import BatchDataset
from src.data.sources import open_documents
from src.errors import DataError
from src.tokenizer import WorldTokenizer

FOLDER = os.environ.get("RWKV_TEST_DATA")

pytestmark = pytest.mark.skipif(FOLDER is None, reason="RWKV_TEST_DATA names no folder of real inputs")


def opened(data_type, name, vocab_size, ctx_len=1024):
    return open_documents(data_type, str(Path(FOLDER) / name), vocab_size, ctx_len=ctx_len)


def test_world_binidx():
    documents = opened("binidx", "default_text_document", 65536)
    assert documents.stream.dtype == np.int32
    assert (len(documents), documents.total_tokens) == (33, 39582)
    assert (documents.sizes.min(), documents.sizes.max()) == (54, 21029)
    assert all(documents.tokens(index)[-1] == 0 for index in range(33))
    assert "\ufffd" not in WorldTokenizer().decode(documents.tokens(3).tolist())


def test_world_binidx_for_a_smaller_model():
    with pytest.raises(DataError, match="vocabulary has ids 0 to 255"):
        opened("binidx", "default_text_document", 256)


def test_bytes_of_utf16_where_zero_is_an_ordinary_token():
    documents = opened("binidx", "demo-utf16", 256)
    assert len(documents) == 182
    assert documents.stream.dtype == np.uint16
    first = bytes(documents.tokens(0).tolist()).decode("utf-16-le")
    assert first.startswith("System: You are an AI assistant.")


def test_json_lines():
    documents = opened("jsonl", "demo.jsonl", 65536)
    assert len(documents) == 182
    text = WorldTokenizer().decode(documents.tokens(0).tolist())
    assert text.startswith("System: You are an AI assistant.")
    assert documents.tokens(0)[-1] == 0
    assert documents.stream_counted is None
    utf16 = opened("binidx", "demo-utf16", 256)
    assert bytes(utf16.tokens(0).tolist()).decode("utf-16-le") == text


def test_what_the_plan_says_of_pad_and_pack():
    documents = opened("binidx", "default_text_document", 65536)
    pad, pack = (BatchDataset(documents, mode=mode, ctx_len=1024, micro_bsz=4, seed=42) for mode in ("pad", "pack"))
    assert (pad.plan.unseen.cut_documents, pad.plan.unseen.cut_tokens) == (5, 25557)
    assert pad.plan.counted_targets_per_pass == pack.plan.counted_targets_per_pass == 39582 - 25557 - 33
    assert (pad.batches_per_pass, pack.batches_per_pass) == (9, 4)
    assert 0.3 < pad.plan.padding_share < 0.7
    assert pack.plan.padding_share == 0.0

"""Documents as slices of a stream."""

import numpy as np

from src.data.documents import Documents


def test_limits_and_counted_targets():
    stream = np.array([1, 2, 3, 4, 5, 6, 7], np.uint16)
    counted = np.array([1, 0, 1, 1, 1, 1, 0], bool)
    documents = Documents.from_stream("data", stream, np.array([0, 4]), np.array([4, 3]), 8, stream_counted=counted)
    assert documents.tokens(0, 3).tolist() == [1, 2, 3]
    assert documents.tokens(1, 9).tolist() == [5, 6, 7]
    assert documents.tokens(1).dtype == np.int64
    assert documents.counted(0, 3).tolist() == [True, False, True]
    assert documents.counted_targets(9).tolist() == [2, 1]
    assert documents.counted_targets(3).tolist() == [1, 1]
    assert documents.counted_targets(2).tolist() == [0, 1]
    assert documents.total_tokens == 7


def test_documents_may_overlap():
    stream = np.arange(10)
    documents = Documents.from_stream("data", stream, np.array([0, 4, 8]), np.array([5, 5, 2]), 10)
    assert [documents.tokens(index)[0] for index in range(3)] == [0, 4, 8]
    assert documents.counted_targets(100).sum() == 9

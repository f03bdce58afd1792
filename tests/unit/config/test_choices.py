"""Choices are stated in the configuration: what implements them by name knows exactly these."""

from src.config.hardware import PRECISIONS
from src.config.templates import TEMPLATE_NAMES
from src.data.preferences import TEMPLATES
from src.device import COMPUTE_DTYPES


def test_every_template_has_its_texts() -> None:
    assert set(TEMPLATES) == set(TEMPLATE_NAMES)


def test_every_precision_has_a_dtype() -> None:
    assert set(COMPUTE_DTYPES) == set(PRECISIONS)

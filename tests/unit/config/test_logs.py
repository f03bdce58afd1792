"""Addresses and projects that figures go to."""

import pytest

from src.config import PairConfig, TrainConfig
from src.config.logs import is_address, is_project
from src.errors import ConfigError


@pytest.mark.parametrize(
    "address",
    ["", "http://localhost:5000/", "http://localhost", "https://a.b.c/x/y", "HTTP://10.0.0.1:1", "http://[::1]:5000/"],
)
def test_addresses(address: str) -> None:
    assert is_address(address)


@pytest.mark.parametrize(
    "text",
    [
        "localhost:5000", "localhost", "//host", "http://", "http:///x", "http://[", "http://h:99999/", "http://h:x/",
        "http://h:0/", "file:///etc/passwd", "ftp://h/", "http://a b/", "http://é/", "http://a..b/", "http://h/?q",
        "http://h/#f", "http://h\n/", "http://" + "a" * 64, "javascript:1",
    ],
)  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    assert not is_address(text)


@pytest.mark.parametrize("config_class", [TrainConfig, PairConfig])
def test_no_address_is_a_sentence(config_class: type[TrainConfig] | type[PairConfig]) -> None:
    with pytest.raises(ConfigError, match="--fapi_logging_address localhost:5000 is no address: write it like http://"):
        config_class.from_flags({"fapi_logging_callback": "1", "fapi_logging_address": "localhost:5000"})
    with pytest.raises(ConfigError, match="--fapi_logging_address is empty: --fapi_logging_callback 1 needs"):
        config_class.from_flags({"fapi_logging_callback": "1", "fapi_logging_address": ""})


@pytest.mark.parametrize(
    ("text", "names"),
    [("", (None, "")), ("mine", (None, "mine")), ("my project", (None, "my project")), ("me/p", ("me", "p"))],
)
def test_a_project_may_have_an_entity(text: str, names: tuple[str | None, str]) -> None:
    assert is_project(text)
    given = {"load_model": "b", "data_file": "d", "wandb": text}
    assert TrainConfig.from_flags(given).wandb_names == names


@pytest.mark.parametrize("text", ["/", "me/", "/p", "a/b/c", "a#b", "a:b", " ", "a\nb", "x" * 129])
def test_what_is_no_project(text: str) -> None:
    assert not is_project(text)

"""What stands beside a file of tensors."""

from pathlib import Path

import pytest

from src.adapters.files import check_description, said_beside, states_beside, write_description
from src.errors import CheckpointError
from src.identity import FileIdentity


def test_a_name_that_leaves_no_room_for_a_suffix_has_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / ("x" * 255)).write_bytes(b"")
    assert said_beside(tmp_path / ("x" * 255)) is None
    assert said_beside(".") is None
    assert said_beside("/") is None


def test_what_a_json_file_says_of_the_file_of_its_name(tmp_path: Path) -> None:
    assert said_beside(tmp_path / "state.pth") is None
    write_description(tmp_path / "state.json", {"method": "states"})
    assert said_beside(tmp_path / "state.pth") == {"method": "states"}
    assert said_beside(tmp_path / "state.json") is None


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"method": 5}', "method is 5, expected a text"),
        ('{"method": null}', "method is null, expected a text"),
        ('{"r": "8"}', 'r is "8", expected a whole number'),
        ('{"r": true}', "r is true, expected a whole number"),
        ('{"r": 8.0}', "r is 8.0, expected a whole number"),
        ('{"scale": "x"}', 'scale is "x", expected a number'),
        ('{"scale": null}', "scale is null, expected a number"),
        ('{"scale": NaN}', "scale is NaN, expected a number"),
        ('{"alpha": 1e400}', "alpha is Infinity, expected a number"),
        (f'{{"scale": {10**400}}}', "expected a number"),
        ('{"quant": ["nf4"]}', 'quant is ["nf4"], expected a text'),
        ('{"quant_head": "no"}', 'quant_head is "no", expected true or false'),
        ('{"states": 1}', "states is 1, expected true or false"),
        ('{"base": 5}', "base is 5, expected an object or null"),
        ('{"base": {"size_bytes": "x"}}', 'size_bytes is "x", expected a whole number'),
        ('{"base": {"sha256": 5}}', "sha256 is 5, expected a text"),
        ('{"base_sha256": 5}', "base_sha256 is 5, expected a text"),
        ('{"flags": []}', "flags is [], expected an object"),
        ('{"flags": {"load_state": 5}}', "load_state is 5, expected a text"),
        ('{"architecture": [1]}', "architecture is [1], expected a text"),
    ],
)
def test_a_value_that_is_not_of_its_kind(content: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError) as refused:
        said_beside(tmp_path / "file.pth")
    assert problem in str(refused.value)
    assert f"{tmp_path}/file.json: " in str(refused.value)


def test_what_nobody_reads_may_be_anything(tmp_path: Path) -> None:
    content = {"base": None, "note": [1, {"a": None}], "versions": {}, "scale": 2, "alpha": 0.5}
    write_description(tmp_path / "file.json", content)
    assert said_beside(tmp_path / "file.pth") == content


def test_states_that_a_training_had_beside_it() -> None:
    assert states_beside(None) == states_beside({}) == states_beside({"flags": {"load_state": ""}}) == ""
    assert states_beside({"states": False, "flags": {"load_state": "s.pth"}}) == "s.pth"
    assert states_beside({"states": True, "flags": {"load_state": "s.pth"}}) == ""


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("states", "state.pth is no adapter (state.json): give it as --load_state"),
        ("full", "give it as --load_model"),
        ("lisa", "give it as --load_model"),
        ("parts", "give it as --load_adapter without --peft"),
        ("bone", "was made with --peft bone (state.json), not lora: use that"),
    ],
)
def test_what_another_method_made_says_where_it_belongs(method: str, expected: str, tmp_path: Path) -> None:
    write_description(tmp_path / "state.json", {"method": method})
    (tmp_path / "base.pth").write_bytes(b"x")
    with pytest.raises(CheckpointError) as refused:
        check_description(tmp_path / "state.pth", "lora", {}, FileIdentity(tmp_path / "base.pth"))
    assert expected in str(refused.value)

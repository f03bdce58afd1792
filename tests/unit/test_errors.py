"""How a program ends."""

import pytest

from src.errors import EXIT_CODE, ConfigError, UserError, exit_on_user_error


def ending(main: object, capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """(exit code, stderr) of an entry function."""
    with pytest.raises(SystemExit) as ended:
        exit_on_user_error(main)  # type: ignore[arg-type]
    return ended.value.code, capsys.readouterr().err


def test_a_user_error_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise ConfigError("--ctx_len 0 must be at least 1")

    assert EXIT_CODE == 2
    assert ending(main, capsys) == (2, "error: --ctx_len 0 must be at least 1\n")


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_the_code_is_what_main_returns(returned: int | None, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(lambda: returned, capsys) == (code, "")


def test_a_package_that_is_not_installed_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    code, said = ending(main, capsys)
    assert code == EXIT_CODE
    assert said.startswith("error: ")
    assert "has no package torch: activate the environment" in said


def test_a_module_that_is_our_own_mistake_keeps_its_traceback() -> None:
    def main() -> int:
        raise ModuleNotFoundError("No module named 'src.nothing'", name="src.nothing")

    with pytest.raises(ModuleNotFoundError):
        exit_on_user_error(main)


def test_an_interrupt_has_the_shells_code(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise KeyboardInterrupt

    assert ending(main, capsys) == (130, "interrupted\n")


def test_a_mistake_of_the_programmer_keeps_its_traceback() -> None:
    def main() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        exit_on_user_error(main)


def test_every_error_of_the_program_is_a_user_error() -> None:
    import src.errors

    kinds = [kind for kind in vars(src.errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) >= 6
    assert all(issubclass(kind, UserError) for kind in kinds)

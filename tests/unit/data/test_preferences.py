"""Preference files: what is read, what is refused, and the pairs made of it."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from src.config.templates import MIXED
from src.data.preferences import (
    PreferencePair,
    PreferenceRow,
    clean_text,
    make_pairs,
    read_rows,
)
from src.errors import ConfigError, DataError
from src.tokenizer import ByteTokenizer, tokenizer_for_vocabulary

BYTES = ByteTokenizer()


def written(folder: Path, content: str | bytes, name: str = "pairs.csv") -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def test_csv_with_bom_quoted_newlines_and_missing_rejects(tmp_path: Path) -> None:
    text = 'prompt,chosen,reject,note\r\n"a, ""b""","line one\nline two",worse,x\r\n\r\nc,d\r\n'
    rows = read_rows(written(tmp_path, b"\xef\xbb\xbf" + text.encode()))
    assert rows == [
        PreferenceRow(2, 'a, "b"', "line one\nline two", "worse"),
        PreferenceRow(5, "c", "d", ""),
    ]


def test_csv_fields_beyond_the_csv_modules_limit(tmp_path: Path) -> None:
    limit = 131_072  # as it is in a new process
    csv.field_size_limit(limit)
    rows = read_rows(written(tmp_path, f"chosen,prompt\n{'x' * (limit + 1)},p\n"))
    assert len(rows[0].chosen) == limit + 1


def test_jsonl_takes_reject_and_rejected(tmp_path: Path) -> None:
    lines = [
        '{"prompt": "p", "chosen": "c", "rejected": "r"}',
        "",
        '{"prompt": "q", "chosen": "é\\u2028", "reject": "s", "score": 3}',
        '{"prompt": "p", "chosen": "c", "rejected": null}',
    ]
    rows = read_rows(written(tmp_path, "\n".join(lines) + "\n", "pairs.jsonl"))
    assert rows == [
        PreferenceRow(1, "p", "c", "r"),
        PreferenceRow(3, "q", "é\u2028", "s"),
        PreferenceRow(4, "p", "c", ""),
    ]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "prompt,chosen,reject\n", "holds no rows"),
        ("a.csv", "prompt,answer\na,b\n", "no column 'chosen' (its first line has 'prompt' and 'answer')"),
        ("a.csv", "subject,answer\na,b\n", "no column 'prompt' and 'chosen'"),
        ("a.csv", 'prompt,chosen\na,b\nc,"d\ne,f\n', "line 3 has a quote that is never closed"),
        ("a.csv", 'prompt,chosen\n"a" b,c\n', "line 2 is no CSV"),
        ("a.csv", "prompt,chosen\na,b\nc\n", "(it has 1 of the 2 fields of the header)"),
        ("a.csv", "prompt,chosen\na,b\nc,Stra\xdfe\n".encode("latin-1"), "a.csv, line 3: not UTF-8 (byte 0xdf"),
        ("a.csv", "prompt,chosen\na,b\n".encode("utf-16"), "is UTF-16, expected UTF-8"),
        ("a.jsonl", '{"prompt": "p", "chosen": "c"}\n{"prompt"\n', "line 2: not valid JSON ("),
        ("a.jsonl", "[" * 100_000 + "\n", "ends inside the list that begins it"),
        ("a.jsonl", "[" * 100_000 + "]" * 100_000, "entry 1: nested too deeply"),
        ("a.jsonl", '{"prompt": "p"}\n' + "[" * 100_000 + "\n", "line 2: nested too deeply"),
        ("a.jsonl", "[1]\n", "entry 1: it is a number, expected an object"),
        ("a.jsonl", '{"prompt": "p"}\n', 'line 1: "chosen" is missing'),
        ("a.jsonl", '{"prompt": "p", "chosen": "\\ud83d"}\n', "half of a surrogate pair"),
        ("a.jsonl", '{"prompt": "p", "chosen": "\\u0000"}\n', '"chosen" holds a NUL character'),
        ("a.jsonl", '{"prompt": "p", "prompt": "q", "chosen": "c"}\n', "it has the key 'prompt' twice"),
        ("a.jsonl", '{"prompt": "p", "chosen": "c", "n": 1%s}\n' % ("0" * 5000), "number of thousands of digits"),
        (
            "a.jsonl",
            '{"prompt": "p", "chosen": "c", "reject": "r", "rejected": "s"}\n',
            "line 1: 'reject' is 'r' and 'rejected' is 's': leave one of them empty",
        ),
        ("a.csv", "prompt,chosen\na,b\0\n", 'line 2: "chosen" holds a NUL character'),
        ("a.csv", "prompt,chosen,prompt\na,b,c\n", "has several columns 'prompt'"),
        ("a.csv", "\n\n,\n", "has no column 'prompt' and 'chosen'"),
        (
            "a.csv",
            "prompt,chosen\na,b\nc,d, and more\n",
            "line 3: it has 3 fields, the header 2: put fields with commas in quotes (the last field read is ' and "
            "more')",
        ),
        (
            "a.csv",
            "prompt,chosen,reject,rejected\na,b,c,c\na,b,c,d\n",
            "line 3: 'reject' is 'c' and 'rejected' is 'd': leave one of them empty",
        ),
    ],
)
def test_unreadable_files_are_refused_in_one_sentence(
    tmp_path: Path, name: str, content: str | bytes, expected: str
) -> None:
    path = written(tmp_path, content, name)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    message = str(caught.value)
    assert expected in message
    assert path in message
    assert "\n" not in message


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist; check the path"):
        read_rows(str(tmp_path / "none.csv"))


def test_the_filled_column_of_two_for_rejects_counts(tmp_path: Path) -> None:
    rows = read_rows(written(tmp_path, "prompt,chosen,reject,rejected\np,c,,r\np,c,r,\np,c,r,r\np,c, ,\np,c\n"))
    assert [row.rejected for row in rows] == ["r", "r", "r", " ", ""]
    rows = read_rows(written(tmp_path, '{"prompt": "p", "chosen": "c", "reject": "", "rejected": "r"}'))
    assert rows[0].rejected == "r"


def test_what_is_not_read_is_named_once(tmp_path: Path) -> None:
    said: list[str] = []
    read_rows(written(tmp_path, "prompt,chosen,note,id\np,c,x,1\nq,c,,2\n"), said.append)
    assert said == ["Not read: 'id' (2 rows), 'note' (1 row)."]
    said.clear()
    read_rows(written(tmp_path, '{"prompt": "p", "chosen": "c", "score": []}\n', "a.jsonl"), said.append)
    assert said == ["Not read: 'score' (1 row)."]
    said.clear()
    asked = {"role": "user", "content": "p", "id": 1}
    answers = [
        json.dumps([asked, {"role": "assistant", "content": text, **more}])
        for text, more in (("c", {"thinking": "hm"}), ("r", {"weight": 0}))
    ]
    with (tmp_path / "messages.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("chosen", "rejected"), answers])
    assert read_rows(str(tmp_path / "messages.csv"), said.append) == [PreferenceRow(2, "p", "c", "r")]
    assert said[1:] == [
        "Not read: 'messages: id' (1 row), 'messages: reasoning' (1 row), 'messages: weight 0' (1 row)."
    ]


def test_carriage_returns_alone_end_lines(tmp_path: Path) -> None:
    assert read_rows(written(tmp_path, "prompt,chosen\ra,b\rc,d\r"))[1] == PreferenceRow(3, "c", "d", "")
    rows = read_rows(written(tmp_path, '{"prompt": "p", "chosen": "c"}\r{"prompt": "q", "chosen": "d"}\r', "a.jsonl"))
    assert rows[1] == PreferenceRow(2, "q", "d", "")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("  a\r\nb \n", "a\nb"),
        ("a\n\nb", "a\nb"),
        ("a\n\n\nb", "a\n\nb"),
        ("a\n\n\n\nb", "a\n\nb"),
        ("a\n\n\n\n\nb", "a\n\n\nb"),
        ("a\r\n\r\nb", "a\nb"),
        ("a\rb\r\rc", "a\nb\nc"),
    ],
)
def test_clean_text_halves_blank_lines_in_one_pass(before: str, after: str) -> None:
    assert clean_text(before) == after


def rows_of(count: int) -> list[PreferenceRow]:
    return [PreferenceRow(i + 2, f"p{i}", f"c{i}", f"r{i}" if i % 2 else " ") for i in range(count)]


def test_templates_of_seed_100_are_the_originals() -> None:
    texts = make_pairs("f", rows_of(3), BYTES, 1000).texts
    initials = "".join(text[0] for text in texts)
    assert initials.startswith("UUUQUUIUUUUU")
    assert [initials.count(letter) for letter in "UQI"] == [807, 80, 113]
    assert texts[0] == "User: p0\n\nAssistant: c0\n\n"
    assert texts[3] == "Question: p0\n\nAnswer: c0\n\n"
    assert texts[6] == "Input: p0\n\nResponse: c0\n\n"


def test_make_pairs_cycles_counts_and_shuffles() -> None:
    made: list[int] = []
    prepared = make_pairs("f", rows_of(3), BYTES, 7, template="user", on_pair=made.append)
    assert made == list(range(1, 8))
    assert [text.split(":")[1].split("\n")[0] for text in prepared.texts] == [
        *(" p0", " p1", " p2"),
        *(" p0", " p1", " p2"),
        " p0",
    ]
    assert prepared.empty_rejects == 5
    first = PreferencePair(BYTES.encode("User: p0\n\nAssistant:"), BYTES.encode(" c0\n\n"), BYTES.encode(" \n\n"))
    assert prepared.pairs.count(first) == 3
    assert first.as_tuple()[3:] == (0.5, 0.5)
    assert prepared.pairs != sorted(prepared.pairs, key=lambda pair: pair.prompt)
    assert make_pairs("f", rows_of(3), BYTES, 7, template="user").pairs == prepared.pairs
    assert make_pairs("f", rows_of(3), BYTES, 7, template="user", seed=1).pairs != prepared.pairs


def test_world_tokens_of_an_empty_reject() -> None:
    pytest.importorskip("pyrwkv_tokenizer")
    world = tokenizer_for_vocabulary(65536)
    pair = make_pairs("f", [PreferenceRow(2, "hi", "yes", "")], world, 1, template="user").pairs[0]
    assert pair.prompt == [24281, 59, 4571, 261, 5585, 41693, 59]
    assert pair.rejected == [3336]


def test_longest_cuts_prompts_at_the_beginning_and_answers_at_the_end() -> None:
    rows = [PreferenceRow(2, "p" * 30, "c" * 30, "r"), PreferenceRow(3, "p", "c", "r")]
    prepared = make_pairs("f", rows, BYTES, 2, template="user", longest=20)
    assert prepared.shortened == 1
    pair = next(pair for pair in prepared.pairs if len(pair.chosen) == 20)
    assert BYTES.decode(pair.prompt) == "p" * 8 + "\n\nAssistant:"
    assert BYTES.decode(pair.chosen) == " " + "c" * 19
    assert BYTES.decode(pair.rejected) == " r\n\n"
    assert "2 pairs, 0 without a reject, 1 shortened" in prepared.summary()[0]
    assert prepared.summary()[1] == "  prompt tokens: min 19, median 19, max 20"


def test_rows_without_prompt_or_chosen_answer_are_left_out_and_counted() -> None:
    rows = [
        PreferenceRow(2, " ", "c", "r"),
        PreferenceRow(3, "p", "\n", "r"),
        PreferenceRow(4, "p", "c", "r"),
    ]
    prepared = make_pairs("f", rows, BYTES, 2, template="user")
    assert prepared.texts == ["User: p\n\nAssistant: c\n\n"] * 2
    assert prepared.summary()[1] == "1 row, taken again from the first until there were as many pairs"
    others = [PreferenceRow(number, "p", f"c{number}", "r") for number in range(4)]
    assert "the first of 4 rows: --target_pair_count 4 takes all" in make_pairs("f", others, BYTES, 2).summary()[1]
    assert "row" not in " ".join(make_pairs("f", others, BYTES, 4).summary())
    assert prepared.summary()[-1] == "2 rows left out, prompt or chosen is blank (first: line 2)"
    with pytest.raises(DataError, match="none of the 2 rows"):
        make_pairs("f", rows[:2], BYTES, 2)


def test_make_pairs_refuses_impossible_numbers() -> None:
    with pytest.raises(ConfigError, match="--target_pair_count 0"):
        make_pairs("f", rows_of(1), BYTES, 0)
    with pytest.raises(ConfigError, match="--max_len 0"):
        make_pairs("f", rows_of(1), BYTES, 1, template=MIXED, longest=0)


def test_prompts_that_stand_in_a_template_get_no_other() -> None:
    ready = "User: a\r\n\r\nAssistant: b\n\nUser: c\n\nAssistant:"
    rows = [PreferenceRow(2, f" {ready} ", "d", "r"), PreferenceRow(3, "User: hi", "d", "r")]
    prepared = make_pairs("f", rows, BYTES, 2, template="question")
    assert prepared.texts == [
        "User: a\n\nAssistant: b\n\nUser: c\n\nAssistant: d\n\n",
        "Question: User: hi\n\nAnswer: d\n\n",
    ]
    assert "stands in them: 1 prompt." in prepared.summary()[-1]


def test_rejects_equal_to_the_chosen_answer_are_counted() -> None:
    prepared = make_pairs("f", [PreferenceRow(2, "p", "c ", "c")], BYTES, 1)
    assert prepared.summary()[-1] == "1 pairs with the chosen answer as reject: they train on it alone"


def test_rejects_that_a_model_wrote_may_hold_nul(tmp_path: Path) -> None:
    assert read_rows(written(tmp_path, "prompt,chosen,reject\na,b,\0\n"))[0].rejected == "\0"


class TestForms:
    """Preference files as their makers write them."""

    USER, GOOD, BAD = ({"role": role, "content": text} for role, text in (
        ("user", "p"), ("assistant", "c"), ("assistant", "r")
    ))  # fmt: skip
    LONG = "System: S\n\nUser: a\n\nAssistant: b\n\nUser: p\n\nAssistant:"
    BEFORE = (
        {"role": "system", "content": "S"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    )

    @pytest.mark.parametrize(
        ("entry", "prompt"),
        [
            ({"prompt": "p", "chosen": "c", "rejected": "r"}, "p"),
            ({"question": "p", "chosen": "c", "rejected": "r", "system": ""}, "p"),
            ({"system": "S", "question": "p", "chosen": "c", "rejected": "r"}, "System: S\n\nUser: p\n\nAssistant:"),
            ({"instruction": "p", "input": "q", "chosen": "c", "rejected": "r"}, "p\nq"),
            ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, "p"),
            ({"prompt": "p", "chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 8.5}, "p"),
            ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, "p"),
            ({"chosen": [*BEFORE, USER, GOOD], "rejected": [*BEFORE, USER, BAD]}, LONG),
            ({"prompt": [*BEFORE, USER], "chosen": "c", "rejected": "r"}, LONG),
            (
                {
                    "conversations": [{"from": "human", "value": "p"}],
                    "chosen": {"from": "gpt", "value": "c"}, "rejected": {"from": "gpt", "value": "r"},
                },
                "p",
            ),
            ({"chosen": "\n\nHuman: p\n\nAssistant: c", "rejected": "\n\nHuman: p\n\nAssistant: r"}, "p"),
            (
                {
                    "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: p\n\nAssistant: c",
                    "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: p\n\nAssistant: r",
                },
                LONG.removeprefix("System: S\n\n"),
            ),
            (
                {
                    "prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: p\n\nAssistant:",
                    "chosen": " c", "rejected": " r",
                },
                LONG.removeprefix("System: S\n\n"),
            ),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("container", ["list", "lines"])
    def test_pairs(self, tmp_path: Path, entry: dict[str, Any], prompt: str, container: str) -> None:
        said: list[str] = []
        content = json.dumps([entry] * 2, indent=1) if container == "list" else f"{json.dumps(entry)}\n" * 2
        rows = read_rows(written(tmp_path, content, "pairs.json"), said.append)
        rows = [replace(row, chosen=row.chosen.strip(), rejected=row.rejected.strip()) for row in rows]
        assert rows == [PreferenceRow(number, prompt, "c", "r") for number in (1, 2)]
        assert "1 of 2 rows equal an earlier one and count as often as they stand there." in said
        if "Human:" in json.dumps(entry):
            assert 'Recognised as preferences of dialogues, "Human: …" and "Assistant: …", 2 rows.' in said
        elif isinstance(entry["chosen"], str):
            prepared = make_pairs("pairs", rows, BYTES, 1, template="user")
            asked = prompt if "\n\nAssistant:" in prompt else f"User: {prompt}\n\nAssistant:"
            assert prepared.texts == [f"{asked} c\n\n"]
        else:
            assert any(line.startswith("Recognised as preferences of messages, 2 rows.") for line in said)

    @pytest.mark.parametrize(
        ("entry", "reason"),
        [
            ({"prompt": [], "chosen": "c"}, "no question before the answers"),
            ({"chosen": "Human: p"}, 'a "chosen" that does not end with an answer'),
            ({"chosen": "Assistant: p"}, "no question before the answers"),
            (
                {"chosen": "Human: p\n\nAssistant: c", "rejected": "Human: q\n\nAssistant: r"},
                "two answers to different questions",
            ),
            ({"prompt": "p", "chosen": [USER]}, 'a "chosen" that does not end with an answer'),
            ({"prompt": "p", "chosen": []}, 'a "chosen" that does not end with an answer'),
            ({"prompt": "x", "chosen": [USER, GOOD]}, "a chosen answer to another prompt"),
            (
                {"chosen": [USER, GOOD], "rejected": [{**USER, "content": "y"}, BAD]},
                "two answers to different questions",
            ),
            ({"prompt": [USER, GOOD], "chosen": "c"}, "an answer where the question should be"),
            ({"prompt": "p", "history": [["", "c"]], "chosen": "c"}, "an empty question"),
        ],
    )
    def test_those_that_cannot_be_used_are_left_out(self, tmp_path: Path, entry: dict[str, Any], reason: str) -> None:
        said: list[str] = []
        usable = {"prompt": "p", "chosen": "c", "rejected": "r"}
        rows = read_rows(written(tmp_path, json.dumps([entry, usable, entry]), "pairs.json"), said.append)
        assert rows == [PreferenceRow(2, "p", "c", "r")]
        assert said == [f"Left out: 2 with {reason} (first: entry 1)."]
        with pytest.raises(DataError, match=rf"because every row is left out: 1 with {reason} \(first: line 1\)"):
            read_rows(written(tmp_path, json.dumps(entry), "pairs.json"))

    def test_a_speaker_who_comes_twice_in_a_row_said_both_in_one_turn(self, tmp_path: Path) -> None:
        begun = "\n\nHuman: p\n\nHuman: q\n\nAssistant:"
        entry = {"chosen": f"{begun} c\n\nAssistant: d", "rejected": f"{begun} r"}
        said: list[str] = []
        path = written(tmp_path, json.dumps(entry), "pairs.json")
        assert read_rows(path, said.append) == [PreferenceRow(1, "p\nq", "c\nd", "r")]
        assert "3 messages joined to the one before, of the same speaker." in said

    def test_all_bad_lines_at_once(self, tmp_path: Path) -> None:
        with pytest.raises(
            DataError, match='2 entries cannot be read: line 2: "chosen" is missing; line 3: not valid JSON'
        ):
            read_rows(written(tmp_path, '{"prompt": "p", "chosen": "c"}\n{"prompt": "p"}\n{\n', "pairs.jsonl"))

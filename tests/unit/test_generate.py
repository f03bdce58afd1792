"""Sampling against the definition, written here as a slow loop; rows, stops and limits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import tiny_parameters, tiny_shape, tiny_states

from src import generate as generate_module
from src.data.preferences import PreferencePair
from src.errors import CheckpointError
from src.generate import (
    Conversation,
    SamplingSettings,
    answer_logps,
    draw,
    generate,
    read_prompts,
    sampling_probabilities,
)
from src.loading import LoadOptions, build_model
from src.model.language_model import LanguageModel
from src.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
SETTINGS = SamplingSettings(top_p=0.9, max_tokens=12, stop="", seed=3)
PROMPTS = ["a", "User: hello there, how do you do?\n\nAssistant:", "Question: b", "User: x\n\nAssistant:"]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    shape = tiny_shape()
    tensors = {**tiny_parameters(shape), **tiny_states(shape)}
    return build_model(tensors, shape, LoadOptions(torch.device("cpu"), torch.float32))


def reference_probabilities(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """The steps of the PyPI package rwkv's sampler for one row."""
    if temperature == 0:
        temperature, top_p = 1.0, 0.0
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    falling = np.sort(probabilities)[::-1]
    cutoff = falling[np.argmax(np.cumsum(falling) >= top_p)]
    probabilities[probabilities < cutoff] = 0
    if temperature != 1:
        probabilities = probabilities ** (1 / temperature)
    return probabilities / probabilities.sum()


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.85, 0.999])
def test_sampling_probabilities_match_the_client(temperature: float, top_p: float) -> None:
    logits = np.random.default_rng(0).normal(size=(5, 50)) * 2
    logits[1, 7] = logits[1, 9] = logits[1].max() + 1
    expected = np.stack([reference_probabilities(row.copy(), temperature, top_p) for row in logits])
    actual = sampling_probabilities(torch.from_numpy(logits), temperature, top_p)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-10, atol=1e-14)


def test_ties_at_the_threshold_stay() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, -5.0]])
    kept = sampling_probabilities(logits, 1.0, 0.5)[0] > 0
    assert kept.tolist() == [True, True, True, True, False]


def test_probabilities_survive_low_temperature_and_top_p_one() -> None:
    logits = torch.randn(1, 65536, generator=torch.Generator().manual_seed(0))
    cold = sampling_probabilities(logits, 0.01, 1.0)
    assert cold.isfinite().all()
    assert cold.sum().item() == pytest.approx(1)
    assert (sampling_probabilities(logits, 1.0, 1.0) > 0).sum() >= 65535


def test_draw_inverts_the_running_sum() -> None:
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    points = torch.tensor([0.0, 0.2499, 0.25, 0.9, 1 - 2**-53], dtype=torch.float64)
    assert draw(probabilities.expand(5, -1), points).tolist() == [1, 1, 3, 3, 3]


def slow_answer(model: LanguageModel, prompt: str, row: int, settings: SamplingSettings) -> list[int]:
    return slow_continuation(model, BYTES.encode(prompt), row, settings)


def slow_continuation(model: LanguageModel, context: list[int], row: int, settings: SamplingSettings) -> list[int]:
    """One row, the whole text through the model for every token, counts in a dict."""
    counts, answer = {}, []
    draws = np.random.default_rng((settings.seed, 0x5361_6D70, row)).random(settings.max_tokens)
    for number in draws:
        with torch.no_grad():
            hidden, _ = model(torch.tensor([context + answer]))
            logits = model.logits(hidden)[0, -1].double().numpy()
        for token, count in counts.items():
            logits[token] -= settings.presence_penalty + count * settings.frequency_penalty
        logits[0] = -1e10
        probabilities = reference_probabilities(logits, settings.temperature, settings.top_p)
        token = int(np.searchsorted(probabilities.cumsum(), number, side="right"))
        answer.append(token)
        counts = {seen: count * settings.penalty_decay for seen, count in counts.items()}
        counts[token] = counts.get(token, 0) + 1
    return answer


@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 0.7, "presence_penalty": 0.5, "frequency_penalty": 2.0, "penalty_decay": 0.5}],
)
def test_generate_matches_the_slow_loop(model: LanguageModel, changes: dict[str, float]) -> None:
    settings = replace(SETTINGS, **changes)
    answers = generate(model, BYTES, PROMPTS, settings, row_numbers=[4, 5, 6, 7])
    for prompt, row, answer in zip(PROMPTS, [4, 5, 6, 7], answers, strict=True):
        assert answer == BYTES.decode(slow_answer(model, prompt, row, settings))


def test_rows_do_not_depend_on_their_company(model: LanguageModel) -> None:
    together = generate(model, BYTES, PROMPTS, SETTINGS)
    alone = [generate(model, BYTES, [PROMPTS[row]], SETTINGS, row_numbers=[row])[0] for row in range(4)]
    assert alone == together
    assert generate(model, BYTES, PROMPTS, SETTINGS) == together
    assert generate(model, BYTES, PROMPTS, replace(SETTINGS, seed=4)) != together
    assert len(set(generate(model, BYTES, ["a"] * 4, SETTINGS))) == 4


def test_prompts_longer_than_a_chunk_are_read_in_pieces(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [BYTES.encode(prompt) for prompt in PROMPTS]
    logits, state = read_prompts(model, prompts)
    whole = generate(model, BYTES, PROMPTS, SETTINGS)
    monkeypatch.setattr(generate_module, "PROMPT_CHUNK_TOKENS", 13)
    pieces_logits, pieces_state = read_prompts(model, prompts)
    torch.testing.assert_close(pieces_logits, logits)
    for layer, pieces in zip(state, pieces_state, strict=True):
        for part, piece in zip(layer, pieces, strict=True):
            torch.testing.assert_close(piece, part)
    assert generate(model, BYTES, PROMPTS, SETTINGS) == whole


class ScriptedModel(LanguageModel):
    """Says the scripted text of each row, byte by byte; rows are told apart by their prompt's first token."""

    def __init__(self, scripts: dict[int, bytes]) -> None:
        super().__init__(tiny_shape(n_layer=1, n_embd=8))
        self.scripts = scripts
        self.rows_computed: list[int] = []
        self.mode_seen: list[bool] = []

    def forward(self, tokens, state=None, layout=None, *, return_state=False):  # type: ignore[no-untyped-def]
        from src.model.state import LayerState

        self.mode_seen.append(self.training)
        if layout is not None:
            firsts = [0, *(end + 1 for end in layout.last_positions.tolist()[:-1])]
            rows = tokens[0, firsts].float()
            hidden = torch.zeros(1, tokens.shape[1], 2)
            hidden[0, layout.last_positions, 0] = rows
            return hidden, [LayerState(rows[:, None], torch.zeros(len(rows), 1, 1, 1), torch.zeros(len(rows), 1))]
        self.rows_computed.append(len(tokens))
        if state is None:
            rows = tokens[:, 0].float()
            start = LayerState(rows[:, None], torch.zeros(len(rows), 1, 1, 1), torch.zeros(len(rows), 1))
            return torch.stack([start.att_shift, start.ffn_shift], -1), [start]
        old = state[0]
        said = old.ffn_shift + 1
        return torch.stack([old.att_shift, said], -1), [LayerState(old.att_shift, old.wkv, said)]

    def logits(self, hidden):  # type: ignore[no-untyped-def]
        logits = torch.zeros(*hidden.shape[:-1], 257)
        for row, (first, said) in enumerate(hidden.tolist()):
            script = self.scripts[int(first) - 1]
            logits[row, script[int(said)] + 1 if int(said) < len(script) else 0] = 100.0
        return logits


def say(scripts: dict[str, bytes], **changes: object) -> tuple[list[str], ScriptedModel, list[tuple[int, int]]]:
    model = ScriptedModel({ord(prompt): script for prompt, script in scripts.items()})
    settings = replace(SamplingSettings(frequency_penalty=0.0, max_tokens=8), **changes)
    finished: list[tuple[int, int]] = []
    answers = generate(
        model, BYTES, list(scripts), settings, on_finished=lambda row, tokens: finished.append((row, tokens))
    )
    return answers, model, finished


def test_rows_end_at_the_stop_text_and_then_cost_nothing() -> None:
    scripts = {"a": b"ab\n\nrest of it", "b": b"\n\n", "c": b"abcdefghijkl", "d": b"a\nb\n\nc"}
    answers, model, finished = say(scripts)
    assert answers == ["ab\n\n", "\n\n", "abcdefgh", "a\nb\n\n"]
    assert finished == [(1, 2), (0, 4), (3, 5), (2, 8)]
    assert model.rows_computed == [4, 3, 3, 2, 1, 1, 1]


def test_a_tail_is_kept_at_the_limit_even_if_it_is_half_a_character() -> None:
    answers, _, _ = say({"a": b"ab\n", "b": "日本".encode()}, max_tokens=3)
    assert answers == ["ab\n", "日"]
    answers, _, _ = say({"b": "日本".encode()}, max_tokens=5)
    assert answers == ["日\ufffd"]


def test_an_end_of_document_token_ends_a_row_unless_forbidden() -> None:
    answers, _, finished = say({"a": b"ab"}, forbidden_tokens=())
    assert (answers, finished) == (["ab"], [(0, 3)])
    answers, _, finished = say({"a": b"ab"})
    assert finished == [(0, 8)]
    assert "\0" not in answers[0]


def test_generation_leaves_mode_and_gradients_alone(model: LanguageModel) -> None:
    _, scripted, _ = say({"a": b"ab\n\n"})
    assert scripted.training
    assert not any(scripted.mode_seen)
    assert model.training
    generate(model, BYTES, ["a"], SETTINGS)
    hidden, _ = model(torch.tensor([[1, 2, 3]]))
    hidden.sum().backward()
    assert model.blocks[0].att.time_state.grad.abs().sum() > 0
    model.zero_grad()


def test_the_state_is_what_answers_start_from() -> None:
    shape = tiny_shape()
    options = LoadOptions(torch.device("cpu"), torch.float32)
    plain = build_model(tiny_parameters(shape), shape, options)
    tuned = build_model({**tiny_parameters(shape), **tiny_states(shape, scale=2.0)}, shape, options)
    assert generate(plain, BYTES, PROMPTS, SETTINGS) != generate(tuned, BYTES, PROMPTS, SETTINGS)


def test_no_prompts_and_empty_prompts(model: LanguageModel) -> None:
    assert generate(model, BYTES, [], SETTINGS) == []
    assert len(generate(model, BYTES, [""], SETTINGS)[0]) > 0


def test_output_that_is_not_finite_is_refused() -> None:
    shape = tiny_shape()
    tensors = tiny_parameters(shape)
    tensors["ln_out.weight"][0] = 3e38
    tensors["head.weight"] *= 1e6
    broken = build_model(tensors, shape, LoadOptions(torch.device("cpu"), torch.float32))
    with pytest.raises(CheckpointError, match="not finite"):
        generate(broken, BYTES, ["a"], SETTINGS)


@pytest.mark.parametrize("chunk_tokens", [0, 3])
def test_answer_logps_sum_over_the_answer(chunk_tokens: int, model: LanguageModel) -> None:
    pairs = [
        PreferencePair(BYTES.encode("User: a"), BYTES.encode(" b\n\n"), BYTES.encode(" cdef\n\n")),
        PreferencePair([5], [6, 7], []),
    ]

    def slow(prompt: list[int], answer: list[int]) -> float:
        with torch.no_grad():
            logp = model.logits(model(torch.tensor([prompt + answer]))[0])[0].log_softmax(-1)
        return sum(logp[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))

    done: list[int] = []
    for pair, (chosen, rejected) in zip(
        pairs, answer_logps(model, pairs, done.append, chunk_tokens=chunk_tokens), strict=True
    ):
        assert chosen == pytest.approx(slow(pair.prompt, pair.chosen), rel=1e-5)
        assert rejected == pytest.approx(slow(pair.prompt, pair.rejected), rel=1e-5)
    assert done == [1, 2]


class TestConversation:
    def test_a_first_answer_is_what_is_generated(self, model: LanguageModel) -> None:
        model.eval()
        for row, prompt in enumerate(PROMPTS):
            (whole,) = generate(model, BYTES, [prompt], SETTINGS, row_numbers=[row])
            pieces = list(Conversation(model, BYTES, SETTINGS).answer(prompt, row))
            assert "".join(pieces) == whole
            assert len(pieces) == SETTINGS.max_tokens
        model.train()

    def test_later_answers_go_on_with_the_whole_text(self, model: LanguageModel) -> None:
        """Against one text that is read from its beginning; the last token of an answer is read with the next turn."""
        model.eval()
        conversation = Conversation(model, BYTES, SETTINGS)
        text: list[int] = []
        for turn, prompt in enumerate(["hello", " and", "?"]):
            before = [*text, *BYTES.encode(prompt)]
            "".join(conversation.answer(prompt, turn))
            text = list(conversation.tokens)
            assert text[: len(before)] == before
            whole = slow_continuation(model, before, turn, SETTINGS)
            assert text[len(before) :] == whole
        model.train()

    def test_a_text_so_far_can_be_given(self, model: LanguageModel) -> None:
        model.eval()
        first = Conversation(model, BYTES, SETTINGS)
        list(first.answer("hello", 0))
        second = Conversation(model, BYTES, SETTINGS, tokens=first.tokens)
        assert list(second.answer("x", 1)) == list(first.answer("x", 1))
        assert second.tokens == first.tokens
        model.train()

    def test_an_answer_comes_in_whole_characters_without_its_stop_text(self) -> None:
        said = "aé日\n😀b"
        pieces, conversation = stream(said.encode() + b"\n\nmore")
        assert "".join(pieces) == said
        assert [piece for piece in pieces if piece] == ["a", "é", "日", "\n", "😀", "b"]
        assert BYTES.decode(conversation.tokens) == f"a{said}\n\n"

    def test_a_character_cut_off_by_the_limit_is_shown_as_such(self) -> None:
        pieces, _ = stream("日".encode(), max_tokens=2)
        assert pieces == ["", "\ufffd"]

    def test_what_is_no_utf8_is_shown_as_such(self) -> None:
        pieces, _ = stream(b"a\xff\xe6b\n\n")
        assert "".join(pieces) == "a\ufffd\ufffdb"

    def test_half_a_stop_text_at_the_limit_is_shown(self) -> None:
        pieces, conversation = stream(b"ab\n", max_tokens=3)
        assert "".join(pieces) == "ab\n"
        assert conversation.missing("\n\n") == "\n"

    def test_an_end_of_document_ends_it_and_is_no_part_of_the_text(self) -> None:
        pieces, conversation = stream(b"ab", forbidden_tokens=())
        assert "".join(pieces) == "ab"
        assert BYTES.decode(conversation.tokens) == "aab"
        assert conversation.missing("\n\n") == "\n\n"

    @pytest.mark.parametrize(
        ("text", "missing"), [("", ""), ("a\n\n", ""), ("a\n", "\n"), ("a", "\n\n"), ("\n", "\n"), ("\n\na", "\n\n")]
    )
    def test_what_a_text_lacks_at_its_end(self, model: LanguageModel, text: str, missing: str) -> None:
        model.eval()
        assert Conversation(model, BYTES, SETTINGS, tokens=BYTES.encode(text)).missing("\n\n") == missing
        model.train()

    def test_bytes_behind_the_stop_text_are_no_part_of_the_text(self) -> None:
        class Pairs(ByteTokenizer):
            """Token 200 is two bytes."""

            def decode_bytes(self, ids):  # type: ignore[no-untyped-def]
                return b"".join(b"\nx" if token == 200 else ByteTokenizer.decode_bytes(self, [token]) for token in ids)

        model = ScriptedModel({ord("a"): b"b\n" + bytes([199])}).eval()
        conversation = Conversation(model, Pairs(), SamplingSettings(frequency_penalty=0.0, max_tokens=8))
        assert "".join(conversation.answer("a", 0)) == "b"
        assert conversation.tokens == BYTES.encode("ab\n\n")

    @pytest.mark.parametrize("calls", [1, 2, 5])
    def test_an_interrupt_leaves_a_whole_conversation(self, model: LanguageModel, calls: int) -> None:
        """Whenever it comes, what follows is the same as if the text so far had just been read."""
        model.eval()
        conversation = Conversation(model, BYTES, SETTINGS)
        list(conversation.answer("hello", 0))
        before, count = list(conversation.tokens), 0
        forward = model.forward

        def interrupted(*arguments: object, **options: object) -> object:
            nonlocal count
            count += 1
            if count == calls:
                raise KeyboardInterrupt
            return forward(*arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "forward", interrupted)
            with pytest.raises(KeyboardInterrupt):
                list(conversation.answer(" you", 1))
        asked = [*before, *BYTES.encode(" you")]
        kept = conversation.tokens
        assert kept == before if calls == 1 else len(kept) == len(asked) + calls - 1
        again = Conversation(model, BYTES, SETTINGS, tokens=kept)
        assert list(conversation.answer("!", 2)) == list(again.answer("!", 2))
        model.train()

    def test_long_texts_are_read_in_pieces(self, model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
        model.eval()
        whole = list(Conversation(model, BYTES, SETTINGS).answer(PROMPTS[1], 0))
        monkeypatch.setattr(generate_module, "PROMPT_CHUNK_TOKENS", 13)
        assert list(Conversation(model, BYTES, SETTINGS).answer(PROMPTS[1], 0)) == whole
        model.train()


def stream(script: bytes, **changes: object) -> tuple[list[str], Conversation]:
    """The pieces of an answer with these bytes to the prompt "a"."""
    model = ScriptedModel({ord("a"): script}).eval()
    settings = replace(SamplingSettings(frequency_penalty=0.0, max_tokens=30), **changes)
    conversation = Conversation(model, BYTES, settings)
    return list(conversation.answer("a", 0)), conversation

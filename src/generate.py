"""Text from a model: batched, recurrent sampling with carried state; conversations; the scoring of given answers.

Prompts of different length are read together in packed rows. From then on every row is one step of the
recurrence per token, whatever came before, and a row that has finished leaves the batch.

Random numbers belong to (seed, row number): which rows are sampled together, and in what order, changes
nothing but the rounding of the model's output.

Letters: B rows, V vocabulary.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from src.config.sampling import SamplingFlags
from src.data.preference_batches import PairForm, PreferenceBatch, PreferenceDataset
from src.data.preferences import PreferencePair
from src.errors import CheckpointError
from src.layout import SegmentLayout
from src.losses import Role, group_number
from src.model.chunks import scores_in_chunks
from src.model.language_model import LanguageModel
from src.model.state import LayerState, ModelState, select_rows
from src.ops.token_logps import token_logps
from src.tokenizer import Tokenizer

PROMPT_CHUNK_TOKENS = 4096
"""Prompt tokens read at a time: bounds the memory of the first phase, whatever the prompts' lengths."""

_SAMPLING_STREAM = 0x5361_6D70  # keeps these random numbers apart from others of the same seed
_DRAWN_AT_ONCE = 256


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are chosen and when a row ends. Defaults are those of RWKV-LM-State-4bit-Orpo's rejects.

    Attributes:
        temperature: 0 takes the most probable token.
        top_p: only the most probable tokens that together reach this are sampled.
        presence_penalty: taken off the logit of every token seen in the answer.
        frequency_penalty: taken off once for each time it was seen.
        penalty_decay: factor on all counts per token generated.
        max_tokens: longest answer.
        stop: text that ends an answer; it stays in. Empty: none does.
        forbidden_tokens: never sampled; without 0 among them, an end-of-document token ends a row.
        seed: of the random numbers, 0 or more.
    """

    temperature: float = 1.0
    top_p: float = 0.3
    presence_penalty: float = 0.0
    frequency_penalty: float = 1.0
    penalty_decay: float = 0.996
    max_tokens: int = 1000
    stop: str = "\n\n"
    forbidden_tokens: tuple[int, ...] = (0,)
    seed: int = 42

    @classmethod
    def by(cls, flags: SamplingFlags, *, stop: str, may_end: bool) -> SamplingSettings:
        """What a command line says.

        Args:
            flags: of a program.
            stop: text that ends an answer.
            may_end: whether an end-of-document token may be sampled.
        """
        return cls(
            temperature=flags.temperature,
            top_p=flags.top_p,
            presence_penalty=flags.alpha_presence,
            frequency_penalty=flags.alpha_frequency,
            penalty_decay=flags.alpha_decay,
            max_tokens=flags.max_tokens,
            stop=stop,
            forbidden_tokens=() if may_end else (0,),
            seed=flags.seed,
        )


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    settings: SamplingSettings,
    *,
    row_numbers: Sequence[int] | None = None,
    on_finished: Callable[[int, int], None] = lambda row, tokens: None,
) -> list[str]:
    """Continues every prompt, from the model's `time_state`.

    Bytes that are not valid UTF-8, such as a character cut off at `max_tokens`, appear as U+FFFD.

    Args:
        model: on any device; its mode and gradients are left as they are.
        tokenizer: of its vocabulary.
        prompts: B texts; an empty one is read as the end-of-document token.
        settings: see SamplingSettings.
        row_numbers: B numbers that the random numbers are drawn for; by default 0 … B - 1.
        on_finished: called with a row's place among the prompts and its length in tokens, when it has ended.

    Returns:
        B answers, without their prompts, with the stop text where it was met.

    Raises:
        CheckpointError: the model's output is not finite.
    """
    numbers = list(range(len(prompts)) if row_numbers is None else row_numbers)
    assert len(numbers) == len(prompts)
    if not prompts:
        return []
    with inference(model):
        logits, state = read_prompts(model, [encoded_prompt(tokenizer, prompt) for prompt in prompts])
    return continued(model, tokenizer, logits, state, settings, row_numbers=numbers, on_finished=on_finished)


def encoded_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A prompt's tokens, at least one."""
    return tokenizer.encode(prompt) or [tokenizer.end_of_document]


def continued(
    model: LanguageModel,
    tokenizer: Tokenizer,
    logits: Tensor,
    state: ModelState,
    settings: SamplingSettings,
    *,
    row_numbers: Sequence[int],
    on_finished: Callable[[int, int], None] = lambda row, tokens: None,
) -> list[str]:
    """What follows texts that were read.

    Args:
        model, tokenizer, settings, row_numbers, on_finished: see `generate`.
        logits: [B, V] fp32, of every row's next token.
        state: the memory of the B texts.

    Returns:
        B answers, see `generate`.

    Raises:
        CheckpointError: the model's output is not finite.
    """
    answers = [_Answer(tokenizer, settings) for _ in row_numbers]
    with inference(model):
        sampler = _Sampler(settings, logits, row_numbers)
        active = list(range(len(row_numbers)))
        while True:
            tokens = sampler.sample(logits)
            running = []
            for place, token in enumerate(tokens.tolist()):
                _refuse_no_token(token)
                answer = answers[active[place]]
                if answer.take(token):
                    on_finished(active[place], answer.tokens)
                else:
                    running.append(place)
            if not running:
                return [answer.text for answer in answers]
            if len(running) < len(active):
                active = [active[place] for place in running]
                index = torch.tensor(running, device=logits.device)
                tokens, state = tokens[index], select_rows(state, index)
                sampler.keep(index)
            hidden, after = model(tokens[:, None], state, return_state=True)
            assert after is not None
            state = after
            logits = model.logits(hidden[:, -1]).float()


class Conversation:
    """One text that is read and gone on with in turns; what the model has read stays in its memory.

    An interrupt (KeyboardInterrupt) at any moment leaves it as a whole: a text that was being read was never there, and
    an answer ends with the token that came last.

    Args:
        model: in eval mode; the text starts from its `time_state`.
        tokenizer: of its vocabulary.
        settings: see SamplingSettings; every answer has penalties of its own.
        tokens: a text so far, which is read when it is needed.

    Attributes:
        tokens: the text so far.
    """

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, settings: SamplingSettings, tokens: Sequence[int] = ()
    ) -> None:
        assert not model.training
        self._model, self._tokenizer, self._settings = model, tokenizer, settings
        self._memory: tuple[ModelState | None, int] = (None, 0)
        self.tokens = list(tokens)

    def answer(self, text: str, number: int) -> Iterator[str]:
        """Reads a text and yields what follows as it is sampled, in whole characters and without the stop text.

        The first piece may be long in coming. Bytes that are not valid UTF-8 appear as U+FFFD.

        Args:
            text: goes on where the last answer ended; with the text so far at least one token.
            number: the random numbers are those of this row of `generate`.

        Raises:
            CheckpointError: the model's output is not finite.
        """
        before = len(self.tokens)
        self.tokens += self._tokenizer.encode(text)
        try:
            logits = self._read()
        except BaseException:
            if self._memory[1] <= before:
                del self.tokens[before:]
            raise
        sampler = _Sampler(self._settings, logits, [number])
        answer = _Answer(self._tokenizer, self._settings)
        while True:
            with torch.no_grad():
                token = int(sampler.sample(logits))
            _refuse_no_token(token)
            has_ended = answer.take(token)
            if token != self._tokenizer.end_of_document:
                self.tokens += self._without_overrun(token, answer.overrun_bytes)
            yield answer.fresh(has_ended)
            if has_ended:
                return
            logits = self._read()

    def missing(self, ending: str) -> str:
        """What has to follow so that the text so far, unless it is empty, ends with `ending`."""
        wanted = ending.encode()
        tail = self._tokenizer.decode_bytes(self.tokens[-len(wanted) :])
        if not tail or tail.endswith(wanted):
            return ""
        return wanted[_overlap(tail, wanted) :].decode("utf-8", errors="replace")

    def _without_overrun(self, token: int, overrun_bytes: int) -> list[int]:
        """The tokens of an answer's last one without its bytes behind the stop text."""
        if not overrun_bytes:
            return [token]
        kept = self._tokenizer.decode_bytes([token])[:-overrun_bytes]
        return self._tokenizer.encode(kept.decode("utf-8", errors="replace"))

    @torch.no_grad()
    def _read(self) -> Tensor:
        """Reads what was not read yet, one token at least, and gives logits [1, V] fp32 of the next."""
        state, count = self._memory
        hidden, state = _read_in_pieces(self._model, self.tokens[count:], state)
        logits = self._model.logits(hidden).float()
        self._memory = state, len(self.tokens)
        return logits


def read_prompts(model: LanguageModel, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, ModelState]:
    """What the model expects after each prompt, and its memory of it.

    Args:
        model: starts every prompt from its `time_state`.
        prompts: B lists of at least one token.

    Returns:
        (logits [B, V] fp32, state of B rows), on the model's device.
    """
    logits: list[Tensor] = []
    states: list[ModelState] = []
    for group in _chunks(prompts):
        if len(group) == 1 and len(group[0]) > PROMPT_CHUNK_TOKENS:
            last, state = _read_in_pieces(model, group[0])
        else:
            layout = SegmentLayout.packed([len(prompt) for prompt in group], model.device)
            row = torch.tensor([[token for prompt in group for token in prompt]])
            hidden, packed_state = model(row, layout=layout, return_state=True)
            assert packed_state is not None
            last, state = hidden[0, layout.last_positions.to(hidden.device)], packed_state
        logits.append(model.logits(last).float())
        states.append(state)
    return torch.cat(logits), joined(states)


def joined(states: Sequence[ModelState]) -> ModelState:
    """The memory of all texts, in their order."""
    layers = zip(*states, strict=True)
    return [LayerState(*map(torch.cat, zip(*layer, strict=True))) for layer in layers]


def _read_in_pieces(
    model: LanguageModel, tokens: Sequence[int], state: ModelState | None = None
) -> tuple[Tensor, ModelState]:
    """Last hidden state [1, C] and the memory after tokens of one row, at least one, that go on from `state`."""
    for start in range(0, len(tokens), PROMPT_CHUNK_TOKENS):
        piece = torch.tensor([list(tokens[start : start + PROMPT_CHUNK_TOKENS])])
        hidden, state = model(piece, state, return_state=True)
    assert state is not None
    return hidden[:, -1], state


def _chunks(prompts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Neighbouring prompts of together at most PROMPT_CHUNK_TOKENS tokens; a longer one alone."""
    group: list[Sequence[int]] = []
    room = PROMPT_CHUNK_TOKENS
    for prompt in prompts:
        assert prompt, "a prompt without tokens"
        if group and len(prompt) > room:
            yield group
            group, room = [], PROMPT_CHUNK_TOKENS
        group.append(prompt)
        room -= len(prompt)
    if group:
        yield group


def sampling_probabilities(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Probabilities after top-p, then temperature.

    Where rounding keeps the sum of all probabilities below top_p, all tokens stay.

    Args:
        logits: [B, V] fp32.
        temperature: 0 means top_p 0 at temperature 1: the most probable token, or those that share the top.
        top_p: tokens with a probability below the threshold are out, and all that equal it stay.

    Returns:
        [B, V] fp32, each row summing up to 1.

    Source: `PIPELINE.sample_logits` of the PyPI package rwkv 0.8.32.
    """
    if temperature == 0:
        temperature, top_p = 1.0, 0.0
    probabilities = logits.softmax(-1)
    falling = probabilities.sort(-1, descending=True).values
    reached = (falling.cumsum(-1) < top_p).sum(-1, keepdim=True)
    threshold = falling.gather(-1, reached.clamp(max=logits.shape[-1] - 1))
    kept = torch.where(probabilities >= threshold, probabilities, 0)
    if temperature != 1:
        # Divided by the largest first: a power far above 1 would round all of them to zero.
        kept = (kept / falling[:, :1]).pow(1 / temperature)
    return kept / kept.sum(-1, keepdim=True)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the running sum of probabilities passes each uniform number.

    Args:
        probabilities: [B, V], not necessarily normalised.
        uniform: [B] fp64 in [0, 1).

    Returns:
        int64 [B]; never a token of probability 0.
    """
    sums = probabilities.double().cumsum(-1)
    total = sums[:, -1]
    goal = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, goal[:, None], right=True)[:, 0]


class _Sampler:
    """Penalties, sampling and random numbers of the rows still running."""

    def __init__(self, settings: SamplingSettings, logits: Tensor, numbers: Sequence[int]) -> None:
        self._settings = settings
        self._forbidden = torch.tensor(settings.forbidden_tokens, dtype=torch.int64, device=logits.device)
        self._counts = torch.zeros_like(logits)
        self._generators = [np.random.default_rng((settings.seed, _SAMPLING_STREAM, number)) for number in numbers]
        self._draws = logits.new_empty((len(numbers), 0), dtype=torch.float64)
        self._step = 0

    def sample(self, logits: Tensor) -> Tensor:
        """int64 [B] tokens for logits [B, V]; -1 where the logits are not finite."""
        settings = self._settings
        if self._step % _DRAWN_AT_ONCE == 0:
            drawn = np.stack([generator.random(_DRAWN_AT_ONCE) for generator in self._generators])
            self._draws = torch.from_numpy(drawn).to(logits.device)
        finite = logits.isfinite().all(-1)
        scores = logits - self._counts * settings.frequency_penalty
        if settings.presence_penalty:
            scores -= settings.presence_penalty * (self._counts > 0)
        scores.index_fill_(1, self._forbidden, -torch.inf)
        scores = torch.where(finite[:, None], scores, 0)
        probabilities = sampling_probabilities(scores, settings.temperature, settings.top_p)
        tokens = draw(probabilities, self._draws[:, self._step % _DRAWN_AT_ONCE])
        self._counts *= settings.penalty_decay
        self._counts.scatter_add_(1, tokens[:, None], torch.ones_like(self._counts[:, :1]))
        self._step += 1
        return torch.where(finite, tokens, -1)

    def keep(self, index: Tensor) -> None:
        """Goes on with the rows named by int64 [K]."""
        self._counts = self._counts[index]
        self._draws = self._draws[index]
        self._generators = [self._generators[place] for place in index.tolist()]


class _Answer:
    """The text of one row while it grows. Stops are looked for in bytes: one can straddle tokens.

    Attributes:
        tokens: so many of them.
        stopped: whether it ends with the stop text.
        overrun_bytes: what the last token had beyond that.
    """

    def __init__(self, tokenizer: Tokenizer, settings: SamplingSettings) -> None:
        self._tokenizer = tokenizer
        self._stop = settings.stop.encode()
        self._limit = settings.max_tokens
        self._bytes = bytearray()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._given_bytes = 0
        self.tokens = 0
        self.stopped = False
        self.overrun_bytes = 0

    def take(self, token: int) -> bool:
        """Adds a token; True when the answer has ended with it."""
        self.tokens += 1
        if token == self._tokenizer.end_of_document:
            return True
        search_from = max(0, len(self._bytes) - len(self._stop) + 1)
        self._bytes += self._tokenizer.decode_bytes([token])
        if self._stop:
            end = len(self._bytes)
            place = self._bytes.find(self._stop, search_from)
            if place >= 0:
                del self._bytes[place + len(self._stop) :]
                self.stopped = True
                self.overrun_bytes = end - len(self._bytes)
                return True
        return self.tokens == self._limit

    @property
    def text(self) -> str:
        """All of it so far."""
        return self._bytes.decode("utf-8", errors="replace")

    def fresh(self, has_ended: bool) -> str:
        """What was not given before of it and no later token changes: whole characters, and not the stop text.

        Args:
            has_ended: whether no later token comes.
        """
        if self.stopped:
            end = len(self._bytes) - len(self._stop)
        else:
            end = len(self._bytes) - (0 if has_ended else _overlap(self._bytes, self._stop))
        start, self._given_bytes = self._given_bytes, end
        return self._decoder.decode(bytes(self._bytes[start:end]), final=has_ended)


def _overlap(text: bytes | bytearray, stop: bytes) -> int:
    """How many bytes at the end of a text may be the beginning of the stop text."""
    longest = min(len(stop) - 1, len(text))
    return next((count for count in range(longest, 0, -1) if text.endswith(stop[:count])), 0)


def _refuse_no_token(token: int) -> None:
    """Refuses what stands for a token where the model's output is not finite.

    Raises:
        CheckpointError: it is negative.
    """
    if token < 0:
        raise CheckpointError(
            "the model's output is not finite, so no token can be sampled: check the model and state files, and use "
            "--precision bf16 or fp32"
        )


def answer_logps(
    model: LanguageModel,
    pairs: Sequence[PreferencePair],
    on_pair: Callable[[int], None] = lambda done: None,
    *,
    chunk_tokens: int = 0,
) -> list[tuple[float, float]]:
    """Log-probabilities of chosen and rejected answers given their prompts, summed over the answer's tokens.

    Args:
        model: scored as it is, `time_state` included.
        pairs: tokens of its vocabulary.
        on_pair: called with the number of pairs done.
        chunk_tokens: pairs of more tokens are read in chunks of so many; 0: none is.

    Returns:
        (chosen, rejected) for every pair, in nats; 0 for an answer without tokens.
    """
    longest = max(len(tokens) for pair in pairs for tokens in (pair.prompt, pair.chosen, pair.rejected))
    dataset = PreferenceDataset(pairs, source="", form=PairForm.SHARED_PROMPT, longest=longest, micro_bsz=1, seed=0)
    sums: list[tuple[float, float]] = []
    with inference(model):
        for batch in dataset.batches_in_order():
            logp, groups = _pair_logps(model, batch, chunk_tokens)
            of_answers = [logp.double()[groups == group_number(0, role)].sum() for role in (Role.CHOSEN, Role.REJECTED)]
            chosen, rejected = torch.stack(of_answers).tolist()
            sums.append((chosen, rejected))
            on_pair(len(sums))
    return sums


def _pair_logps(model: LanguageModel, batch: PreferenceBatch, chunk_tokens: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a pair's targets, and their groups, [M] each."""
    if 0 < chunk_tokens < batch.layout.tokens:
        positions = (batch.targets >= 0).nonzero()[:, 0]
        sets = [batch.targets[positions].to(model.device)]
        ((logp, _),) = scores_in_chunks(model, batch.tokens, batch.layout, positions, sets, chunk_tokens)
        return logp, batch.groups[positions].to(model.device)
    on_device = batch.to(model.device)
    hidden, _ = model(on_device.tokens, layout=on_device.layout)
    logp, _ = token_logps(hidden[0], model.head_weight(), on_device.targets)
    return logp, on_device.groups


@contextmanager
def inference(model: LanguageModel) -> Iterator[None]:
    """No gradients and no dropout; the model's mode is put back."""
    was_training = model.training
    model.eval()
    try:
        # Not inference_mode: what the model caches meanwhile must stay usable for training.
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)

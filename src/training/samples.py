"""`--sample_prompts`: what the model answered before training and answers now, to the user's own prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl

from src.config import TrainConfig
from src.data.prompts import Prompt, read_sample_prompts
from src.data.templates import WORLD_CHAT
from src.errors import CheckpointError
from src.generate import SamplingSettings, generate
from src.model.language_model import LanguageModel
from src.model.shape import ModelShape
from src.tokenizer import WORLD_VOCABULARY, Tokenizer, tokenizer_for_vocabulary
from src.training.callbacks import TrainingMonitor
from src.training.logs import Sample, SamplesLog
from src.training.module import TrainingModule
from src.training.progress import BEGINNING, Start

_SETTINGS = SamplingSettings(top_p=0.5, frequency_penalty=0.2, max_tokens=120, stop="", forbidden_tokens=())
"""The model may end a document."""


class Sampler:
    """Answers the prompts of a file, always with the same random numbers.

    Args:
        prompts: at least one.
        tokenizer: of the model's vocabulary.
        settings: for texts; answers end with a blank line, too.
    """

    def __init__(self, prompts: Sequence[Prompt], tokenizer: Tokenizer, settings: SamplingSettings) -> None:
        self.prompts = prompts
        self._tokenizer = tokenizer
        self._settings = settings

    def answers(self, model: LanguageModel) -> list[str]:
        """One for each prompt, in their order, without what ended it.

        Raises:
            CheckpointError: the model's output is not finite.
        """
        answers = [""] * len(self.prompts)
        for is_turn in (False, True):
            numbers = [number for number, prompt in enumerate(self.prompts) if prompt.is_turn is is_turn]
            stop = WORLD_CHAT.turn_end if is_turn else ""
            texts = [self.prompts[number].text for number in numbers]
            settings = replace(self._settings, stop=stop)
            found = generate(model, self._tokenizer, texts, settings, row_numbers=numbers)
            for number, answer in zip(numbers, found, strict=True):
                answers[number] = answer.strip() if is_turn else answer
        return answers


def sampler_of(config: TrainConfig, shape: ModelShape, *, chats: bool) -> Sampler | None:
    """What `--sample_prompts` asks for.

    Args:
        config: the flags.
        shape: says which tokenizer it is.
        chats: whether the run trains on chats.

    Raises:
        DataError: prompts that cannot be read, or a vocabulary without a tokenizer.
    """
    if not config.sample_prompts:
        return None
    prompts = read_sample_prompts(config.sample_prompts, chats=chats)
    # Bytes and the like have few tokens, and a penalty would soon forbid the common letters.
    penalty = _SETTINGS.frequency_penalty if shape.vocab_size == WORLD_VOCABULARY else 0.0
    settings = replace(_SETTINGS, frequency_penalty=penalty, seed=config.random_seed)
    return Sampler(prompts, tokenizer_for_vocabulary(shape.vocab_size), settings)


class SampleWatch(pl.Callback):
    """Answers the prompts every so many optimizer steps on rank 0, and changes no step by that.

    Args:
        sampler: has the prompts.
        before: what was answered before training; of other ranks than 0 nothing.
        warn: tells the user.
        every: optimizer steps between two times; 0: after the last step only.
        monitor: its sinks are told, and its clock does not count the time.
        accumulate: micro-batches of an optimizer step.
        start: where in the run this process begins.
    """

    def __init__(
        self,
        sampler: Sampler,
        before: Sequence[str],
        warn: Callable[[str], None],
        *,
        every: int,
        monitor: TrainingMonitor,
        accumulate: int,
        start: Start = BEGINNING,
    ) -> None:
        self._sampler = sampler
        self._before = list(before)
        self._warn = warn
        self._every = every
        self._monitor = monitor
        self._accumulate = accumulate
        self._start = start

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Samples where a step closes whose number asks for it."""
        assert isinstance(module, TrainingModule)
        step = self._start.steps + trainer.global_step
        if (batch_idx + 1) % self._accumulate or not self._every or step % self._every or not trainer.is_global_zero:
            return
        begin = time.perf_counter()
        self.take(step, module.model)
        self._monitor.leave_out(time.perf_counter() - begin)

    def take(self, step: int, model: LanguageModel) -> None:
        """Answers after so many steps, and hands on what came of it."""
        try:
            answers = self._sampler.answers(model)
        except CheckpointError as problem:  # the next step says what is wrong
            self._warn(f"no samples after step {step:,}: {problem}")
            return
        asked = zip(self._sampler.prompts, self._before, answers, strict=True)
        log = SamplesLog(step, [Sample(prompt.shown, before, answer) for prompt, before, answer in asked])
        for sink in self._monitor.sinks:
            sink.samples(log)

    def end(self, step: int, model: LanguageModel) -> None:
        """Answers after the last step, unless that has been done."""
        if not self._every or step % self._every:
            self.take(step, model)

    def state(self) -> dict[str, Any]:
        """See `resume.Part`."""
        return {"texts": [prompt.text for prompt in self._sampler.prompts], "before": self._before}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `resume.Part`; `kept_answers` has been asked before."""


def kept_answers(sampler: Sampler, kept: Mapping[str, Any] | None) -> list[str] | None:
    """What an interrupted run's file says was answered before training; None if it does not, or of other prompts."""
    if kept is None or list(kept["texts"]) != [prompt.text for prompt in sampler.prompts]:
        return None
    return list(kept["before"])

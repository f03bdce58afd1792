"""`--sample_prompts`: what the model answered before training and answers now, to the user's own prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from src.config import TrainConfig
from src.data.prompts import Prompt, read_sample_prompts
from src.data.templates import CHAT_TEMPLATES, ChatTemplate
from src.generate import SamplingSettings, generate
from src.model.language_model import LanguageModel
from src.model.shape import ModelShape
from src.tokenizer import WORLD_VOCABULARY, Tokenizer, tokenizer_for_vocabulary

_SETTINGS = SamplingSettings(top_p=0.5, frequency_penalty=0.2, max_tokens=120, stop="", forbidden_tokens=())
"""The model may end a document."""


class Sampler:
    """Answers the prompts of a file, always with the same random numbers.

    Args:
        prompts: at least one.
        tokenizer: of the model's vocabulary.
        settings: for texts; answers end with a blank line, too.
        template: in which questions are answered.
    """

    def __init__(
        self, prompts: Sequence[Prompt], tokenizer: Tokenizer, settings: SamplingSettings, template: ChatTemplate
    ) -> None:
        self.prompts = prompts
        self._template = template
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
            stop = self._template.turn_end if is_turn else ""
            texts = [self.prompts[number].text for number in numbers]
            settings = replace(self._settings, stop=stop)
            found = generate(model, self._tokenizer, texts, settings, row_numbers=numbers)
            for number, answer in zip(numbers, found, strict=True):
                answers[number] = self._template.said(answer) if is_turn else answer
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
    template = CHAT_TEMPLATES[config.template]
    prompts = read_sample_prompts(config.sample_prompts, chats=chats, template=template)
    # Bytes and the like have few tokens, and a penalty would soon forbid the common letters.
    penalty = _SETTINGS.frequency_penalty if shape.vocab_size == WORLD_VOCABULARY else 0.0
    settings = replace(_SETTINGS, frequency_penalty=penalty, seed=config.random_seed)
    return Sampler(prompts, tokenizer_for_vocabulary(shape.vocab_size), settings, template)


def kept_answers(sampler: Sampler, kept: Mapping[str, Any] | None) -> list[str] | None:
    """What an interrupted run's file says was answered before training; None if it does not, or of other prompts."""
    if kept is None or list(kept["texts"]) != [prompt.text for prompt in sampler.prompts]:
        return None
    return list(kept["before"])

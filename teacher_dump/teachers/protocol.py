"""What the pass over a corpus asks of a teacher, whatever runs it. No torch here: a teacher behind a server needs none."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, Protocol

import numpy as np

# Number types of the weights; "auto" is float32 on a CPU, the model's own elsewhere.
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTISATIONS = ("none", "8-bit", "4-bit")
ATTENTIONS = ("auto", "sdpa", "eager", "flash_attention_2")
DEVICE_MAPS = ("none", "auto")


class Ability(StrEnum):
    """Something a teacher can give. Each extractor states those that it needs."""

    DISTRIBUTIONS = "whole next-token distributions"
    LIKELIEST = "the k likeliest next tokens"
    HIDDEN_STATES = "hidden states"
    GRADIENTS = "gradients"
    TEXT = "generated text"


@dataclass(frozen=True)
class Likeliest:
    """The tokens that a teacher finds likeliest at N positions, and how likely it finds those that stand there.

    Attributes:
        ids: int64 (N, k), likeliest first; −1 behind the last that was given.
        logprobs: theirs, nats, float64 (N, k); −∞ of a token that is never given, and behind the last.
        token_ids: int64 (N,), the tokens that stand there.
        token_logprobs: theirs, float64 (N,); −∞ of one that is never given.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    token_ids: np.ndarray
    token_logprobs: np.ndarray

    def part(self, which: slice | np.ndarray) -> Likeliest:
        """Some of the N positions."""
        return Likeliest(self.ids[which], self.logprobs[which], self.token_ids[which], self.token_logprobs[which])


@dataclass(frozen=True)
class TextRequest:
    """A text that a teacher is to write.

    Attributes:
        prompt: int64 (T,), T at least 1: what it goes on from.
        key: of its random generator, 64 bits: what is drawn for it is a function of the key and of how many tokens it has.
    """

    prompt: np.ndarray
    key: int


@dataclass(frozen=True)
class Writing:
    """How a teacher writes texts.

    Attributes:
        temperature: by which log-probabilities are divided before a token is drawn; with 0 the likeliest is taken.
        max_new_tokens: after which a text is cut off.
        stop_tokens: ids of the tokens that end a text.
        likeliest: how many of the likeliest tokens to keep at each token that is written.
    """

    temperature: float
    max_new_tokens: int
    stop_tokens: tuple[int, ...]
    likeliest: int = 0


@dataclass(frozen=True)
class WrittenText:
    """What a teacher wrote.

    Attributes:
        token_ids: int64 (N,), N at least 1; the last is one that ends a text, where it was not cut off.
        stopped: whether it ended by itself.
        logprobs: of each of its tokens at temperature 1, nats, float64 (N,).
        likeliest: of each of its tokens, with as many of the likeliest as were asked for; None where none were.
        tails: the log-probability of all others together, nats, float64 (N,); None where it is only what those leave of one.
    """

    token_ids: np.ndarray
    stopped: bool
    logprobs: np.ndarray
    likeliest: Likeliest | None = None
    tails: np.ndarray | None = None


@dataclass(frozen=True)
class Batching:
    """Which sequences a teacher may be asked about in one batch, so that each is answered as it is alone.

    Attributes:
        rule: "any"; "sides": those of at most `border` tokens, or those of more; "alone": none with another.
        border: tokens.
    """

    rule: Literal["any", "sides", "alone"] = "any"
    border: int = 0

    def together(self, length: int, other: int) -> bool:
        """Whether two sequences of so many tokens may share a batch."""
        if self.rule == "sides":
            return (length > self.border) == (other > self.border)
        return self.rule == "any"


class Prediction(Protocol):
    """A teacher's answer for a batch of B sequences, padded to T tokens.

    Attributes:
        teacher: whose.
        hidden: the last layer's hidden states, a torch tensor (B, T, H); None where logits are whole.
    """

    @property
    def teacher(self) -> Teacher: ...

    @property
    def hidden(self) -> Any: ...

    def layer_states(self, layer: int) -> Any:
        """The hidden states of a layer that the prediction was asked for with, with the ability HIDDEN_STATES.

        Args:
            layer: as transformers counts hidden states: 0 are the embeddings, 1 is what the first layer gives, and −1 is what
                the head sees; the number of layers is what the last gives, before the last norm.

        Returns:
            a torch tensor (B, T, H) in the model's dtype, on any device, without a gradient.
        """
        ...

    def logit_slices(self, rows: Any, positions: Any) -> Iterator[tuple[slice, Any]]:
        """The logits at (rows[i], positions[i]), slice by slice, with the ability DISTRIBUTIONS.

        Args:
            rows, positions: torch tensors, int64 (N,), on the teacher's device.

        Yields:
            which of the N, and their logits, float32 (n, V), on the teacher's device. They may be changed in place.
        """
        ...

    def likeliest(self, rows: np.ndarray, positions: np.ndarray) -> Likeliest:
        """What follows (rows[i], positions[i]), with the ability LIKELIEST and not DISTRIBUTIONS: the likeliest tokens, as many
        as the prediction was asked for, and the one that does follow.

        Args:
            rows, positions: int64 (N,); no position is a sequence's last.

        Raises:
            InputError: the teacher does not give them.
        """
        ...

    def drop(self) -> None:
        """Give up what is not there yet: the prediction is not going to be read."""
        ...

    def input_gradients(self, rows: Any, positions: Any, slopes: Callable[[slice, Any], Any]) -> tuple[Any, Any]:
        """How a function of some logits moves with the input embeddings, once, with the ability GRADIENTS and where the
        prediction was asked for with them.

        Args:
            rows, positions: as those of `logit_slices`, each pair once.
            slopes: of a slice of the N and its logits, float32 (n, V), which it may change in place: the function's gradient
                with regard to these logits, (n, V).

        Returns:
            embeddings and gradients, torch tensors (B, T, E) in the model's dtype.
        """
        ...


class Teacher(Protocol):
    """A teacher that can be asked.

    Attributes:
        description: what the manifest says of it: name, vocabulary_size, max_positions, dtype, and its files' SHA-256.
        tokenizer: its own, as transformers has them.
        device: of its tensors. device_name: for people, e.g. "cpu" or "NVIDIA H100 80GB HBM3".
        abilities: what it can give.
        vocabulary_size: how many tokens its distribution is over.
        impossible_tokens: those among them that it never gives, int64 (n,): rows that pad its head.
        stop_tokens: ids of the tokens that end its texts, as its configuration and its tokenizer have them; with the ability
            TEXT.
        ahead: how many sequences it may have been asked for before the first of them is read: more than one batch where
            answers come from elsewhere, and 0 where a prediction takes memory here.
        has_experts: whether it is known to be a mixture of experts, which rounding sends some tokens to others of.
    """

    @property
    def description(self) -> dict[str, Any]: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def device(self) -> Any: ...

    @property
    def device_name(self) -> str: ...

    @property
    def abilities(self) -> frozenset[Ability]: ...

    @property
    def vocabulary_size(self) -> int: ...

    @property
    def impossible_tokens(self) -> np.ndarray: ...

    @property
    def has_experts(self) -> bool: ...

    @property
    def stop_tokens(self) -> tuple[int, ...]: ...

    @property
    def ahead(self) -> int: ...

    def batching(self, longest: int, room: int) -> Batching:
        """Which sequences may share a batch, found by asking it; known at once when it is asked the same again.

        Args:
            longest: tokens of the longest sequence.
            room: positions of the largest batch, padding included.

        Raises:
            InputError: no way to ask it gives answers that depend on the sequence alone.
        """
        ...

    def check_gradients(self) -> None:
        """Make sure that a teacher with the ability GRADIENTS gives those of its answers.

        Raises:
            InputError: it does not.
        """
        ...

    def gradient_room(self, longest: int) -> int:
        """How many positions a batch of sequences of at most `longest` tokens may have where gradients are asked for, so that
        what is kept for them takes no more memory than is good."""
        ...

    def predict(
        self,
        token_ids: np.ndarray,
        attention_mask: np.ndarray,
        gradients: bool = False,
        layers: Collection[int] = (),
        likeliest: int = 0,
    ) -> Prediction:
        """Ask for a batch.

        Args:
            token_ids: int64 (B, T), padded on either side.
            attention_mask: bool (B, T).
            gradients: whether the prediction is asked for gradients, which takes far more memory.
            layers: whose hidden states it is asked for (see `Prediction.layer_states`).
            likeliest: how many of the likeliest tokens it is asked for (see `Prediction.likeliest`).

        Raises:
            InputError: the model does not give hidden states of these layers.
            MemoryError: the batch is too large for the device.
        """
        ...

    def write(self, requests: Sequence[TextRequest], writing: Writing) -> list[WrittenText]:
        """Write some texts as one batch, with the ability TEXT. What is written for a request depends, but for rounding, on the
        request alone.

        Raises:
            InputError: its log-probabilities are not finite.
            MemoryError: the batch is too large for the device.
        """
        ...

    def recognise(self, kept: Mapping[str, Any]) -> None:
        """Describe itself as it is described already, where it is told by what it answers, and may be the same up to noise.

        Args:
            kept: what a manifest says of the teacher of its dump.
        """
        ...

    def check_unchanged(self) -> None:
        """Make sure that it is still the one that was opened, where somebody else can put another in its place.

        Raises:
            InputError: it is not, or cannot be asked any more.
        """
        ...

    def tokens(self) -> tuple[list[str | None], list[str | None]]:
        """For each token id below the vocabulary size: its text as a person reads it, and the tokenizer's own name for it."""
        ...


class WithoutGradients:
    """What a `Teacher` without the ability GRADIENTS has of them: nothing asks it."""

    def check_gradients(self) -> None:
        """Never asked for."""
        raise NotImplementedError

    def gradient_room(self, longest: int) -> int:
        """Never asked for."""
        raise NotImplementedError


class WithoutTexts:
    """What a `Teacher` without the ability TEXT has of it: nothing asks it."""

    stop_tokens: tuple[int, ...] = ()

    def write(self, requests: Sequence[TextRequest], writing: Writing) -> list[WrittenText]:
        """Never asked for."""
        raise NotImplementedError

"""vLLM's engine in this process: token ids in, and out come the log-probabilities of what could follow each token.

What vLLM gives by its public interface are the k likeliest tokens. Whole distributions pass through one static function of its
sampler, `Sampler.gather_logprobs`, which is given them for the tokens of a prompt, some at a time, with the tokens that follow.
While the engine takes a step, a function of this module stands in for it and keeps what it is given. That rests on how vLLM is
made inside, so it is done with the versions in `WITH_DISTRIBUTIONS` alone, what was kept is held against what the public
interface says of each prompt, and `check_distributions` asks for some whole distributions both ways.

vLLM is imported here when an engine is started and not before.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from knowledge_store.errors import InputError
from knowledge_store.model_files import silence
from teacher_dump.teachers.protocol import Likeliest, TextRequest, Writing, WrittenText

# Versions that whole distributions have been taken from, by their beginnings.
WITH_DISTRIBUTIONS = ("0.32.",)

# Log-probabilities of a step that are held at once, float32. A step has at least MIN_STEP tokens.
STEP_LOGPROBS = {"cpu": 2**26, "cuda": 2**28}
MIN_STEP = 256

# What vLLM reads in the environment, unless it is there already: one process, in which its sampler can be reached; the model
# runner that uses it; nothing reported to anybody; and sequences as long as the model knows positions, with one more
# token, which is never run.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB; without it vLLM takes most of a machine's memory
}

# A part of what follows a prompt's tokens: which prompt, the first of these tokens' positions, and for each of n the
# log-probabilities of the vocabulary, float32 (n, V).
Part = tuple[int, int, torch.Tensor]


class EngineFailure(InputError):
    """vLLM does not do what it is known to do."""


@dataclass(frozen=True)
class VllmEngine:
    """A started engine.

    Attributes:
        engine: vLLM's own `LLMEngine`.
        sampling: its class of parameters.
        version: of vLLM. device: that it computes on.
        numbers: of requests.
    """

    engine: Any
    sampling: Any
    version: str
    device: torch.device
    numbers: Iterator[int]

    def likeliest(self, prompts: Sequence[np.ndarray], count: int) -> list[Likeliest]:
        """For each prompt, int64 (T,), what follows each of its tokens but the last: the likeliest `count` tokens (−1: all).

        Raises:
            EngineFailure: it does not answer about every token.
        """
        answers: dict[int, Likeliest] = {}
        with closing(self._steps(prompts, [self._asking(count)] * len(prompts))) as steps:
            for number, output in itertools.chain.from_iterable(steps):
                answers[number] = _likeliest(output.prompt_logprobs, prompts[number], count)
        return [answers[number] for number in range(len(prompts))]

    def distributions(self, prompts: Sequence[np.ndarray]) -> Generator[Part, None, None]:
        """What follows each token of each prompt, int64 (T,), but the last: whole distributions, part by part.

        Those of one prompt come in order. Each is to be used before the next is asked for.

        Raises:
            EngineFailure: what was kept is not what the public interface says.
        """
        kept: list[tuple[torch.Tensor, np.ndarray, torch.Tensor]] = []

        def keep(logprobs: torch.Tensor, count: int, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            own = logprobs.gather(1, tokens[:, None])
            kept.append((logprobs, tokens.cpu().numpy(), own[:, 0].cpu()))
            # Ranks are of no use, and take as long as to find the likeliest.
            return tokens[:, None].to(torch.int32), own, torch.zeros_like(tokens)

        done = [0] * len(prompts)
        said: list[list[torch.Tensor]] = [[] for _ in prompts]
        open_prompts = [number for number, prompt in enumerate(prompts) if len(prompt) > 1]
        asked = [self._asking(0)] * len(prompts)
        with closing(self._steps(prompts, asked, lambda: _standing_in(keep))) as steps:
            for finished in steps:
                parts: list[Part] = []
                for logprobs, tokens, own in kept:
                    number = _owner(prompts, done, open_prompts, tokens)
                    parts.append((number, done[number], logprobs))
                    done[number] += len(tokens)
                    said[number].append(own)
                    if done[number] == len(prompts[number]) - 1:
                        open_prompts.remove(number)
                kept.clear()
                for number, output in finished:
                    public = np.array(output.prompt_logprobs.logprobs, np.float32)
                    if not np.array_equal(public, torch.cat([torch.zeros(0), *said[number]]).numpy(), equal_nan=True):
                        raise EngineFailure(_UNKNOWN)
                while parts:
                    yield parts.pop(0)
        if open_prompts:
            raise EngineFailure(_UNKNOWN)

    def write(self, requests: Sequence[TextRequest], writing: Writing) -> list[WrittenText]:
        """Write texts, each with a generator of its own.

        Raises:
            EngineFailure: it leaves some unanswered, or does not say of each token how likely it is.
        """
        wanted = [
            self.sampling(
                temperature=writing.temperature,
                seed=request.key >> 1,  # it takes 63 bits
                max_tokens=writing.max_new_tokens,
                stop_token_ids=list(writing.stop_tokens),
                ignore_eos=True,  # it is among these
                logprobs=writing.likeliest,
                flat_logprobs=True,
                detokenize=False,
            )
            for request in requests
        ]
        texts: dict[int, WrittenText] = {}
        with closing(self._steps([request.prompt for request in requests], wanted)) as steps:
            for number, output in itertools.chain.from_iterable(steps):
                [text] = output.outputs
                ids = np.array(text.token_ids, np.int64)
                answers = _likeliest(text.logprobs, np.concatenate([[-1], ids]), writing.likeliest)
                kept = answers if writing.likeliest else None
                texts[number] = WrittenText(ids, text.finish_reason == "stop", answers.token_logprobs, kept)
        return [texts[number] for number in range(len(requests))]

    def _asking(self, count: int) -> Any:
        """Parameters of what is asked about a prompt: so many of the likeliest tokens at each of its own."""
        return self.sampling(max_tokens=1, temperature=0.0, prompt_logprobs=count, flat_logprobs=True, detokenize=False)

    def _steps(
        self, prompts: Sequence[np.ndarray], parameters: Sequence[Any], within: Callable[[], Any] = nullcontext
    ) -> Generator[list[tuple[int, Any]], None, None]:
        """Ask about prompts, and give for each step of the engine which of them it finished, with what it says of them.

        Args:
            prompts: token ids. parameters: of each.
            within: makes a context of each step.
        """
        names = {str(next(self.numbers)): number for number in range(len(prompts))}
        waiting = dict(names)
        try:
            for name, number in names.items():
                self.engine.add_request(name, {"prompt_token_ids": prompts[number].tolist()}, parameters[number])
            while self.engine.has_unfinished_requests():
                # To compile how ranks are counted, which nobody asks for here, takes a minute.
                with within(), torch.compiler.set_stance("force_eager"):
                    outputs = [output for output in self.engine.step() if output.finished]
                yield [(waiting.pop(output.request_id), output) for output in outputs]
            if waiting:
                raise EngineFailure("vLLM leaves sequences unanswered: look at what it logs, with VLLM_LOGGING_LEVEL=INFO")
        finally:
            if waiting:
                self.engine.abort_request(list(waiting))

    def check_distributions(self, prompts: Sequence[np.ndarray], tolerance: float) -> str | None:
        """Why whole distributions cannot be taken from this engine; None where they can.

        Args:
            prompts: to ask about both ways.
            tolerance: nats that two answers may be apart.
        """
        if not self.version.startswith(WITH_DISTRIBUTIONS):
            known = " and ".join(f"{version}x" for version in WITH_DISTRIBUTIONS)
            return f"they have been taken from {known} alone, and this is {self.version}"
        try:
            parts = [(number, first, part.cpu()) for number, first, part in self.distributions(prompts)]
        except (EngineFailure, AttributeError, ImportError, TypeError, IndexError, RuntimeError) as error:
            return str(error).strip().split("\n")[0]
        public = self.likeliest(prompts, -1)
        for number, first, part in parts:
            answers = public[number].part(slice(first, first + len(part)))
            if answers.ids.shape[1] != part.shape[1]:
                return f"they have {part.shape[1]} tokens, and its public interface gives {answers.ids.shape[1]}"
            held = part.double().gather(1, torch.from_numpy(answers.ids)).numpy()
            # Of tokens that are never given both are −∞.
            with np.errstate(invalid="ignore"):
                apart = np.where(held == answers.logprobs, 0, np.abs(held - answers.logprobs))
            if not (apart <= tolerance).all():
                return f"they are up to {np.nanmax(apart):.2g} nats from what its public interface says"
        return None


_UNKNOWN = "vLLM hands distributions to its sampler in an order that is not known"


def _owner(prompts: Sequence[np.ndarray], done: list[int], open_prompts: list[int], tokens: np.ndarray) -> int:
    """Whose tokens these are: the first unfinished prompt that goes on with them, since vLLM takes prompts in order."""
    for number in open_prompts:
        following = prompts[number][done[number] + 1 :][: len(tokens)]
        if np.array_equal(following, tokens):
            return number
    raise EngineFailure(_UNKNOWN)


@contextmanager
def _standing_in(function: Callable[..., Any]) -> Iterator[None]:
    """Let a function stand in for the sampler's `gather_logprobs`."""
    from vllm.v1.sample.sampler import Sampler

    original = Sampler.__dict__["gather_logprobs"]
    Sampler.gather_logprobs = staticmethod(function)
    try:
        yield
    finally:
        Sampler.gather_logprobs = original


def _likeliest(flat: Any, prompt: np.ndarray, count: int) -> Likeliest:
    """What vLLM's flat log-probabilities of a prompt say: for each token but the first, that of the token that stands there and
    then those of the likeliest, among which it is once more where it is one of them; of the first, nothing."""
    positions = len(prompt) - 1
    width, rest = divmod(len(flat.token_ids), positions) if positions else (count + 1, 0)
    if rest or width < 1:
        raise EngineFailure(f"vLLM gives {len(flat.token_ids)} log-probabilities for {positions} tokens of a prompt")
    ids = np.array(flat.token_ids, np.int64).reshape(positions, width)
    logprobs = np.array(flat.logprobs, np.float64).reshape(positions, width)
    if not np.array_equal(ids[:, 0], prompt[1:]):
        raise EngineFailure("vLLM gives the log-probabilities of other tokens than it was asked about")
    return Likeliest(ids[:, 1:], logprobs[:, 1:], ids[:, 0], logprobs[:, 0])


def start_engine(folder: Path, dtype: str, own_dtype: str, longest: int, room: int, vocabulary: int) -> VllmEngine:
    """Start vLLM's engine on a model's folder.

    Args:
        folder: with safetensors.
        dtype: of the weights; "auto" is float32 on a CPU, and the model's own elsewhere. own_dtype: the model's, where known.
        longest: tokens of the longest prompt.
        room: prompts that are there at once.
        vocabulary: its size, as the configuration has it.

    Raises:
        InputError: vLLM cannot be imported, or does not start; says why.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        with silence():
            import vllm
            from vllm.platforms import current_platform
    except Exception as error:  # it imports half of an environment, any part of which can be broken
        raise InputError(
            f"vLLM cannot be imported: {_first_line(error)}. TEACHERS.md says which versions fit"
            " together, in an environment of their own"
        ) from None
    on_cpu = current_platform.is_cpu()
    if dtype == "auto":  # which vLLM takes for 16 bits where a model has 32
        dtype = "float32" if on_cpu else own_dtype
    step = max(MIN_STEP, STEP_LOGPROBS["cpu" if on_cpu else "cuda"] // vocabulary)
    try:
        with silence():
            engine = vllm.LLMEngine.from_engine_args(
                vllm.EngineArgs(
                    model=str(folder),
                    skip_tokenizer_init=True,
                    load_format="safetensors",
                    dtype=dtype,
                    # vLLM wants room for one token that it generates.
                    max_model_len=longest + 1,
                    max_num_batched_tokens=step,
                    max_num_seqs=min(room, step),
                    max_logprobs=-1,
                    enable_prefix_caching=False,
                    enforce_eager=True,  # what is gained by compiling is gained where texts are generated
                    # Outside its memory are the distributions of a step, more than once.
                    gpu_memory_utilization=0.8,
                    async_scheduling=False,
                    disable_log_stats=True,
                )
            )
    except Exception as error:  # it refuses models and machines in many ways
        raise InputError(f"vLLM cannot run the teacher in {folder}: {_first_line(error)}") from None
    device = torch.device("cpu" if on_cpu else current_platform.device_type)
    return VllmEngine(engine, vllm.SamplingParams, vllm.__version__, device, itertools.count())


def _first_line(error: Exception) -> str:
    """What went wrong, in one line; pydantic's first line says how many errors there are, and the second which field."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if len(lines) > 1 and "validation error" in lines[0]:
        return lines[1]
    return lines[0] if lines else type(error).__name__

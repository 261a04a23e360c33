"""A module with as much of vLLM's surface as a teacher uses, over a model of transformers: for where vLLM is not installed.

It works on prompts in the order in which they came, `max_num_batched_tokens` at a time, so that long ones are cut, and hands
the log-probabilities of each part to `Sampler.gather_logprobs` as vLLM does. A text is written at once, with a generator of its
own.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM


@dataclass
class Faults:
    """What a fake engine does wrong.

    Attributes:
        newest_first: it takes the newest of the prompts that are there first. hooked: added to what its sampler is given.
        stop_after: it fails at a step after so many, once.
    """

    newest_first: bool = False
    hooked: float = 0.0
    stop_after: int | None = None


class Sampler:
    """vLLM's `Sampler`: the token that stands there and the likeliest, of log-probabilities (n, V)."""

    @staticmethod
    def gather_logprobs(logprobs: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        assert token_ids.dtype == torch.int64
        values, ids = logprobs.topk(num_logprobs, dim=1)
        own = logprobs.gather(1, token_ids[:, None])
        return torch.cat([token_ids[:, None], ids], 1).int(), torch.cat([own, values], 1), (logprobs >= own).sum(1)


@dataclass
class Request:
    """A prompt, and how far it is done."""

    name: str
    token_ids: list[int]
    parameters: Any
    done: int = 0
    outputs: list[SimpleNamespace] = field(default_factory=list)
    flat: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(token_ids=[], logprobs=[]))


class LLMEngine:
    """vLLM's `LLMEngine`."""

    faults = Faults()

    def __init__(self, arguments: SimpleNamespace):
        assert arguments.skip_tokenizer_init and arguments.max_logprobs == -1 and not arguments.enable_prefix_caching
        self.arguments = arguments
        dtype = getattr(torch, arguments.dtype)
        self.model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
        self.model_config = SimpleNamespace(dtype=dtype)
        self.requests: list[Request] = []
        self.steps = 0

    @classmethod
    def from_engine_args(cls, arguments: SimpleNamespace) -> LLMEngine:
        return cls(arguments)

    def add_request(self, name: str, prompt: dict[str, list[int]], parameters: SimpleNamespace) -> None:
        assert parameters.flat_logprobs and not parameters.detokenize
        if not hasattr(parameters, "logprobs"):
            assert parameters.max_tokens == 1
        if len(prompt["prompt_token_ids"]) + 1 > self.arguments.max_model_len:
            raise ValueError("the prompt is too long")
        self.requests.append(Request(name, prompt["prompt_token_ids"], parameters))

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def abort_request(self, names: list[str]) -> None:
        self.requests = [request for request in self.requests if request.name not in names]

    def _written(self, request: Request) -> SimpleNamespace:
        """A text behind a prompt: its tokens, why it ended, and of each token its log-probability and the likeliest ones'."""
        asked, ids = request.parameters, list(request.token_ids)
        generator = torch.Generator().manual_seed(asked.seed)
        flat, reason = SimpleNamespace(token_ids=[], logprobs=[]), "length"
        while len(ids) - len(request.token_ids) < asked.max_tokens and reason == "length":
            logprobs = self.model(torch.tensor([ids])).logits[0, -1].log_softmax(dim=-1, dtype=torch.float32)
            weights = (logprobs / asked.temperature).softmax(dim=-1) if asked.temperature else None
            token = logprobs.argmax()[None] if weights is None else weights.multinomial(1, generator=generator)
            places, values, _ = Sampler.gather_logprobs(logprobs[None], asked.logprobs, token)
            flat.token_ids += places.flatten().tolist()
            flat.logprobs += values.flatten().tolist()
            ids.append(int(token))
            if ids[-1] in asked.stop_token_ids:
                reason = "stop"
        return SimpleNamespace(token_ids=ids[len(request.token_ids) :], finish_reason=reason, logprobs=flat)

    @torch.inference_mode()
    def step(self) -> list[SimpleNamespace]:
        self.steps += 1
        if self.faults.stop_after is not None and self.steps > self.faults.stop_after:
            type(self).faults = Faults()
            raise KeyboardInterrupt
        room, finished = self.arguments.max_num_batched_tokens, []
        for request in reversed(self.requests) if self.faults.newest_first else self.requests:
            tokens = torch.tensor(request.token_ids)
            end = min(request.done + room, len(tokens))
            if end == request.done:
                break
            room -= end - request.done
            targets = tokens[request.done + 1 : end + 1]
            if hasattr(request.parameters, "logprobs"):
                request.outputs = [self._written(request)] if end == len(tokens) else []
            elif len(targets):
                logits = self.model(tokens[None, :end]).logits[0, request.done : request.done + len(targets)]
                logprobs = logits.log_softmax(dim=-1, dtype=torch.float32)
                count = request.parameters.prompt_logprobs
                ids, values, _ = Sampler.gather_logprobs(
                    logprobs if count else logprobs + self.faults.hooked,
                    logprobs.shape[1] if count == -1 else count,
                    targets,
                )
                request.flat.token_ids += ids.flatten().tolist()
                request.flat.logprobs += values.flatten().tolist()
            request.done = end
            if end == len(tokens):
                finished.append(request)
        self.abort_request([request.name for request in finished])
        return [
            SimpleNamespace(request_id=request.name, finished=True, prompt_logprobs=request.flat, outputs=request.outputs)
            for request in finished
        ]


def modules(version: str = "0.32.0") -> dict[str, ModuleType]:
    """The module and those in it that are imported, by name, for `sys.modules`."""
    contents: dict[str, dict[str, Any]] = {
        "vllm": {
            "__version__": version,
            "LLMEngine": type("LLMEngine", (LLMEngine,), {"faults": Faults()}),
            "EngineArgs": SimpleNamespace,
            "SamplingParams": SimpleNamespace,
        },
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: True, device_type="cpu")},
        "vllm.v1": {},
        "vllm.v1.sample": {},
        "vllm.v1.sample.sampler": {"Sampler": Sampler},
    }
    made = {}
    for name, attributes in contents.items():
        made[name] = ModuleType(name)
        made[name].__spec__ = ModuleSpec(name, None)
        vars(made[name]).update(attributes)
    return made


def install(monkeypatch: Any, version: str = "0.32.0") -> type[LLMEngine]:
    """Have what imports vLLM get the fake; gives the class of its engine, whose `faults` may be set."""
    for name in [name for name in sys.modules if name == "vllm" or name.startswith("vllm.")]:
        monkeypatch.delitem(sys.modules, name)
    fakes = modules(version)
    for name, module in fakes.items():
        monkeypatch.setitem(sys.modules, name, module)
    engine: type[LLMEngine] = fakes["vllm"].LLMEngine
    return engine

"""A teacher on this machine: any causal language model of transformers, its logits one slice of positions at a time.

The logits of a batch, (batch, length, vocabulary), are the largest thing a teacher makes and are never held whole: the backbone
runs once, then the head runs on slices of its hidden states. Some models do more than a matrix product there (Gemma 2 caps its
logits, Granite and Cohere scale them), so a short batch is checked against the model's own logits when a teacher is loaded,
and a model that differs is asked for its whole logits instead.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.backends.cpu import get_cpu_capability
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from knowledge_store.errors import InputError
from knowledge_store.model_files import panics_as_errors, silence
from knowledge_store.reporter import SILENT, Reporter
from teacher_dump.ranks import local_rank
from teacher_dump.teachers.files import EXPERTS, file_hashes, find_folder, model_files
from teacher_dump.teachers.loading import Loading, check_loading
from teacher_dump.teachers.prediction import SLICE_LOGITS, LocalPrediction
from teacher_dump.teachers.probes import check_gradients, check_looks_back, find_batching, gradient_bytes, impossible_tokens
from teacher_dump.teachers.protocol import DTYPES, Ability, Batching, TextRequest, Writing, WrittenText
from teacher_dump.teachers.tokenizer import stop_tokens, token_texts
from teacher_dump.teachers.writing import write_texts, writes_padded

UNKNOWN = 2**31  # as how many layers there are: none has that number

# Kept between a forward and a backward pass at once: larger batches pay little on a CPU, and more on a GPU.
GRADIENT_BYTES = {"cpu": 2**30, "cuda": 2**33, "mps": 2**31}


@dataclass
class LocalTeacher:
    """A loaded teacher (see `protocol.Teacher`).

    Attributes:
        model: in evaluation mode, on `device`.
        tokenizer: its own.
        description: what goes into the manifest about it, its files' hashes included.
        device: where it runs.
        whole_logits: whether its logits are more than head(backbone(tokens)).
        impossible_tokens: int64 (n,), those whose logits are always −inf.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    description: dict[str, Any]
    device: torch.device
    whole_logits: bool
    impossible_tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    _batchings: dict[tuple[int, int], Batching] = field(default_factory=dict)
    _gradient_bytes: dict[int, int] = field(default_factory=dict)

    @property
    def vocabulary_size(self) -> int:
        """How many tokens its distribution is over: the rows of its head."""
        return int(self.description["vocabulary_size"])

    @property
    def device_name(self) -> str:
        """Where it runs, for people: each device where there are several, and its kind of attention."""
        spread = getattr(self.model, "hf_device_map", None) or {}
        places = dict.fromkeys(str(_named(place)) for place in spread.values()) or [_named(self.device)]
        attention = getattr(getattr(self.model, "config", None), "_attn_implementation", None)
        return ", ".join(places) + (f" ({attention} attention)" if attention else "")

    @property
    def abilities(self) -> frozenset[Ability]:
        """What it can give: gradients only where it can be given embeddings instead of tokens."""
        more = {Ability.HIDDEN_STATES}
        if self.model is not None and self.model.can_generate():
            more.add(Ability.TEXT)
        if self.model is not None and "inputs_embeds" in signature(self._runner.forward).parameters:
            more.add(Ability.GRADIENTS)
        return frozenset({Ability.DISTRIBUTIONS, Ability.LIKELIEST} | more)

    @property
    def has_experts(self) -> bool:
        """Whether it is a mixture of experts."""
        config = self.model.config.get_text_config()
        return any((getattr(config, name, None) or 0) > 1 for name in EXPERTS)

    @property
    def ahead(self) -> int:
        """A prediction takes memory until it is read."""
        return 0

    @property
    def _runner(self) -> nn.Module:
        """What is run on a batch."""
        return self.model if self.whole_logits else _backbone(self.model)

    def batching(self, longest: int, room: int) -> Batching:
        """Which sequences may share a batch (see `probes.find_batching`)."""
        if (longest, room) not in self._batchings:
            self._batchings[longest, room] = find_batching(self, longest, room)
        return self._batchings[longest, room]

    def check_gradients(self) -> None:
        """Make sure that its gradients are those of its answers (see `probes.check_gradients`)."""
        check_gradients(self)

    def gradient_room(self, longest: int) -> int:
        """How many positions of sequences of at most `longest` tokens keep no more than GRADIENT_BYTES for their gradients."""
        if longest not in self._gradient_bytes:
            self._gradient_bytes[longest] = gradient_bytes(self, longest)
        return GRADIENT_BYTES[self.device.type] // self._gradient_bytes[longest]

    def predict(
        self,
        token_ids: np.ndarray,
        attention_mask: np.ndarray,
        gradients: bool = False,
        layers: Collection[int] = (),
        likeliest: int = 0,
    ) -> LocalPrediction:
        """Run the teacher on a batch. Hidden states of other layers than the last are kept of all layers while it runs.

        What the last layer gives, before the last norm, is no hidden state to transformers: it is seen on its way.

        Args:
            token_ids: int64 (B, T), padded on either side.
            attention_mask: bool (B, T).
            gradients: whether the prediction is asked for gradients.
            layers: whose hidden states it is asked for.
            likeliest: of no use here, where logits are whole.

        Raises:
            InputError: the model does not give hidden states of these layers.
        """
        tokens = torch.from_numpy(token_ids).to(self.device)
        mask = torch.from_numpy(attention_mask).to(self.device)
        arguments: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask.long()}
        if not attention_mask[:, 0].all():
            # Padding on the left moves a sequence to the right; its positions still count from 0.
            arguments["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
        count = self.description.get("layers") or UNKNOWN
        # What the head sees is at hand where the backbone runs by itself; to ask for all takes memory.
        at_hand = (count,) if self.whole_logits else (-1, count)
        if any(layer not in at_hand for layer in layers):
            arguments["output_hidden_states"] = True
        traced = None
        if gradients:
            with torch.no_grad():
                embeddings = self.model.get_input_embeddings()(arguments.pop("input_ids"))
            arguments["inputs_embeds"] = embeddings.detach().requires_grad_()
        unnormed: contextlib.AbstractContextManager[list[torch.Tensor]] = contextlib.nullcontext([])
        if count in layers:
            unnormed = _watched_output(self._last_layer(count))
        with torch.enable_grad() if gradients else torch.inference_mode(), unnormed as seen:
            answer = self._runner(**arguments, use_cache=False)
            outputs = answer.logits if self.whole_logits else answer.last_hidden_state
        if gradients:
            traced, outputs = (arguments["inputs_embeds"], outputs), outputs.detach()
        hidden, logits = (None, outputs) if self.whole_logits else (outputs, None)
        states = {layer: outputs if layer in at_hand else self._states_of(answer, layer) for layer in layers if layer != count}
        if count in layers:
            [states[count]] = seen
        return LocalPrediction(self, hidden, logits, traced, states)

    def _last_layer(self, count: int) -> nn.Module:
        """The last of so many layers. InputError: there is no list of them."""
        lists = {
            name: module
            for name, module in self._runner.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == count
        }
        if not lists:
            raise InputError(
                f"{self.description['name']} has no list of {count} layers, of whose last the states before the norm could be"
                f" taken: choose another layer than {count}"
            )
        # Inside a layer there may be lists of that length too (experts): the shortest name is the outermost.
        last: nn.Module = lists[min(lists, key=len)][-1]
        return last

    def _states_of(self, answer: Any, layer: int) -> torch.Tensor:
        """The hidden states of one layer. InputError: the model does not give them."""
        states = getattr(answer, "hidden_states", None)
        if not isinstance(states, tuple) or not -len(states) <= layer < len(states) or states[layer].ndim != 3:
            raise InputError(
                f"{self.description['name']} does not give the hidden states of layer {layer}"
                f" ({'it gives none' if not states else f'it gives those of {len(states)} layers, the embeddings among them'}):"
                " choose another layer, or leave this kind of knowledge out"
            )
        return states[layer].detach()

    @cached_property
    def nameless_tokens(self) -> np.ndarray:
        """The ids below the vocabulary size that the tokenizer does not have, int64 (n,)."""
        return np.setdiff1d(np.arange(self.vocabulary_size), list(self.tokenizer.get_vocab().values()))

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The tokens that end its texts."""
        return stop_tokens(self.model.generation_config.eos_token_id, self.tokenizer)

    @cached_property
    def _writes_padded(self) -> bool:
        return writes_padded(self)

    def write(self, requests: Sequence[TextRequest], writing: Writing) -> list[WrittenText]:
        """Write some texts as one batch, or each by itself where padding changes them (see `writing.write_texts`)."""
        if self._writes_padded:
            return write_texts(self, requests, writing)
        return [text for request in requests for text in write_texts(self, [request], writing)]

    def recognise(self, kept: Mapping[str, Any]) -> None:
        """It is told by its files."""

    def check_unchanged(self) -> None:
        """See `protocol.Teacher`: nobody puts another in its place."""

    def tokens(self) -> tuple[list[str | None], list[str | None]]:
        """For each token id its text and the tokenizer's own name for it (see `tokenizer.token_texts`)."""
        return token_texts(self.tokenizer, self.vocabulary_size)


@contextlib.contextmanager
def _watched_output(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """What a module gives within it, each time; of several things the first."""
    seen: list[torch.Tensor] = []

    def watch(_: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
        seen.append((result[0] if isinstance(result, tuple) else result).detach())

    handle = module.register_forward_hook(watch)
    try:
        yield seen
    finally:
        handle.remove()


def _named(device: Any) -> str:
    if device == "disk":
        return "disk"
    place = torch.device(device)
    return torch.cuda.get_device_name(place) if place.type == "cuda" else place.type


def _backbone(model: PreTrainedModel) -> nn.Module:
    return model.get_decoder()


def _needs_whole_logits(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether the model's logits are more than head(backbone(tokens)), found by watching one short forward pass."""
    head = model.get_output_embeddings()
    with contextlib.suppress(AttributeError, NotImplementedError, TypeError):  # a backbone that is none is called in vain
        backbone = _backbone(model)
        if head is None or backbone is None or backbone is model:
            return True
        seen: dict[str, torch.Tensor] = {}

        def watch(module: nn.Module, inputs: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
            seen["hidden"], seen["logits"] = inputs[0], result

        vocabulary = model.get_input_embeddings().num_embeddings
        tokens = (torch.arange(16, device=device).reshape(2, 8) * 7919) % vocabulary
        mask = torch.ones_like(tokens)
        handle = head.register_forward_hook(watch)
        try:
            with torch.inference_mode():
                logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
                hidden = backbone(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        finally:
            handle.remove()
        if "logits" not in seen or seen["hidden"].shape != hidden.shape:
            return True
        # The head's output must be the logits to the last bit; two runs of the backbone may differ by rounding. A model that
        # gives NaN is refused when it is asked, with the sequence's name.
        unchanged = torch.equal(torch.nan_to_num(seen["logits"].float()), torch.nan_to_num(logits.float()))
        tolerance = 64 * torch.finfo(hidden.dtype).eps * hidden.nan_to_num().abs().max().item()
        return not unchanged or not torch.allclose(seen["hidden"], hidden, rtol=0, atol=tolerance, equal_nan=True)
    return True


def find_device(name: str) -> torch.device:
    """The device a name means; "auto" is the first there is of CUDA, Apple's, and the CPU; of several of CUDA the one with
    the number that a launcher gave this process among those of its machine.

    Raises:
        InputError: torch knows no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if torch.cuda.device_count() > 1:
            name = f"cuda:{local_rank(os.environ) % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"torch has no device {name!r} here: try --device cpu") from None
    if device.type not in SLICE_LOGITS:
        raise InputError(f"--device {name} is not supported: use one of {', '.join(SLICE_LOGITS)}")
    return device


def load_teacher(
    teacher: str,
    gguf_file: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    *,
    reporter: Reporter = SILENT,
    **options: Any,
) -> LocalTeacher:
    """Load a teacher and hash its files.

    Args:
        teacher: a local folder or a hub id.
        gguf_file: name of a GGUF file in it.
        dtype: one of `protocol.DTYPES`; "auto" is float32 on a CPU, and the model's own elsewhere.
        device: see `find_device`.
        reporter: hears of progress, and of a model that takes more memory.
        options: the other fields of `loading.Loading`.

    Raises:
        InputError: it cannot be used; says why.
    """
    loading = Loading(gguf_file, dtype, device, **options)
    check_loading(loading)
    where = find_device(device)
    if dtype not in DTYPES:
        raise InputError(f"there is no dtype {dtype!r} for a teacher: use {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    folder = find_folder(teacher, gguf_file, loading.revision)
    files = model_files(folder, gguf_file)
    wanted = getattr(torch, dtype) if dtype != "auto" else torch.float32 if where.type == "cpu" else "auto"
    source: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    # Of weights that are kept on the disk, and are in no file as they are used.
    scratch = TemporaryDirectory(prefix="teacher-weights-") if loading.device_map != "none" else None
    try:
        with silence(), panics_as_errors():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **source)
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **source)
            _check_architecture(folder, config)
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=wanted,
                trust_remote_code=False,
                use_safetensors=None if gguf_file else True,
                output_loading_info=True,
                **_placement(loading, where, wanted, scratch.name if scratch else None),
                **source,
            )
        if scratch is not None:
            weakref.finalize(model, scratch.cleanup)
    except Exception as error:  # a broken folder fails in many ways, all of them the folder's
        if scratch is not None:
            scratch.cleanup()
        if isinstance(error, InputError):
            raise
        raise InputError(f"the teacher in {folder} cannot be loaded: {_first_line(error)}") from None
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(f"the weights in {folder} are incomplete: {missing[0]} and {len(missing) - 1} more are missing")
    if loading.device_map == "none" and not loading.quantised:
        model = model.to(where)
    model = model.eval().requires_grad_(False)
    where = _input_device(model, where)
    if where.type == "cpu" and dtype in ("bfloat16", "float16") and get_cpu_capability() == "AVX2":
        reporter.note(
            f"Warning: PyTorch is fast in {dtype} only on CPUs with AVX-512, which this one lacks, and takes several times"
            " as long as with --dtype float32"
        )
    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        raise InputError(f"the model in {folder} has no language-model head")
    with _asked(folder):
        whole = _needs_whole_logits(model, where)
    if whole:
        reporter.note(f"{teacher} changes its logits after the head, so whole logits are used: this takes more memory")
    config = model.config.get_text_config()
    description = {
        # A local teacher is called by its own name: where somebody keeps it is no part of what it is.
        "name": gguf_file or (folder.resolve().name if Path(teacher).is_dir() else teacher),
        "model_type": config.model_type,
        "parameters": _parameters(model),
        "hidden_size": getattr(config, "hidden_size", None),
        "layers": getattr(config, "num_hidden_layers", None),
        "vocabulary_size": head.weight.shape[0],
        "max_positions": _positions(config),
        "dtype": str(model.dtype).removeprefix("torch."),
        **({"quantize": loading.quantize} if loading.quantised else {}),
        "files": file_hashes(folder, files, reporter=reporter),
    }
    loaded = LocalTeacher(model, tokenizer, description, where, whole)
    with _asked(folder):
        check_looks_back(loaded)
        loaded.impossible_tokens = impossible_tokens(loaded)
    if len(loaded.impossible_tokens):
        description["impossible_tokens"] = len(loaded.impossible_tokens)
    return loaded


@contextlib.contextmanager
def _asked(folder: Path) -> Iterator[None]:
    """Ask a model that has just been loaded; InputError where it needs more than a text, which fails in many ways."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError) as error:
        raise InputError(f"the model in {folder} cannot be asked about a text: {_first_line(error)}") from None


def _placement(loading: Loading, where: torch.device, dtype: Any, scratch: str | None) -> dict[str, Any]:
    """What the library is told of where weights go, how large they are and how attention is computed."""
    arguments: dict[str, Any] = {}
    if loading.attention != "auto":
        arguments["attn_implementation"] = loading.attention
    if loading.device_map != "none":
        arguments |= {"device_map": loading.device_map, "max_memory": loading.memory, "offload_folder": scratch}
    elif loading.quantised:
        arguments["device_map"] = {"": where}
    if loading.quantised:
        compute = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
        arguments["quantization_config"] = (
            BitsAndBytesConfig(load_in_8bit=True)
            if loading.quantize == "8-bit"
            else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
        )
    return arguments


def _positions(config: PreTrainedConfig) -> int | None:
    """How many positions a model knows; None where there is no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def _parameters(model: PreTrainedModel) -> int:
    """How many parameters a model has, however they are kept: on the disk a shared one is there twice, and two of 4 bits count
    as one."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in type(model)(model.config).parameters())


def _input_device(model: PreTrainedModel, device: torch.device) -> torch.device:
    """Where a model that is spread over devices takes its inputs: its first accelerator, else the CPU."""
    devices = getattr(model, "hf_device_map", None)
    if not devices:
        return device
    return torch.device(next((place for place in devices.values() if place not in ("cpu", "disk")), "cpu"))


def _check_architecture(folder: Path, config: PreTrainedConfig) -> None:
    if config.is_encoder_decoder:
        raise InputError(
            f"the model in {folder} ({config.model_type}) is an encoder-decoder, whose predictions depend on a second text:"
            " choose a causal language model as the teacher"
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

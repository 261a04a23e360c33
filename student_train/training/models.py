"""Models and tokenizers as files: loading them without surprises, and rebuilding one with fewer layers.

Weights come from safetensors or GGUF only, no remote code runs, and everything is float32: a student is trained with
float32 weights, and a lower precision is the trainer's business, unless a run asks for weights in bfloat16.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from knowledge_store.errors import InputError
from knowledge_store.model_files import VOCABULARY_FILES, check_gguf, check_weights, hub_folder, panics_as_errors, silence
from student_train.training.adapters import merged
from student_train.training.model_folder import adapter_base, check_model_folder
from student_train.training.run_folder import check_base


def quieten() -> None:
    """Keep the library's own warnings and progress bars off the terminal; errors still show."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _folder(model: str, gguf_file: str | None) -> Path:
    """The folder that a model lies in. Both its parts are loaded from there: by a hub id, the library would ask the hub for
    each file it may have, again and again where the hub cannot be reached."""
    check_model_folder(model, gguf_file)
    return Path(model) if Path(model).is_dir() else hub_folder(model, gguf_file)


def load_tokenizer(model: str, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id.

    Raises:
        InputError: it is missing or cannot be read; the message names the model.
    """
    quieten()
    folder = _folder(model, gguf_file)
    if (base := adapter_base(folder)) is not None and not (folder / "tokenizer_config.json").is_file():
        return load_tokenizer(base)
    return _read_tokenizer(folder, model, gguf_file)


def tokenizer_beside(config: PreTrainedConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer in the folder that somebody loaded a model from; None where that is no local folder, or has none that can
    be read. Of a model with an adapter, that of its base."""
    name = config.name_or_path
    if not name or not any((Path(name) / file).is_file() for file in VOCABULARY_FILES):
        return None
    try:
        return _read_tokenizer(Path(name), name, None)
    except InputError:
        return None


def _read_tokenizer(folder: Path, model: str, gguf_file: str | None) -> PreTrainedTokenizerBase:
    try:
        with silence(), panics_as_errors():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **_gguf(gguf_file))
    except Exception as error:  # the library raises whatever its parsers raise
        raise InputError(f"cannot load a tokenizer from {model}: {first_line(error)}") from error


def load_configuration(model: str, gguf_file: str | None = None) -> PreTrainedConfig:
    """The configuration of a model folder or hub id, without its weights; of an adapter, that of its base.

    Raises:
        InputError: it is missing or cannot be read; the message names the model.
    """
    quieten()
    folder = _folder(model, gguf_file)
    if not gguf_file and (base := adapter_base(folder)) is not None:
        return load_configuration(base)
    try:
        with silence(), panics_as_errors():
            return AutoConfig.from_pretrained(folder, trust_remote_code=False, **_gguf(gguf_file))
    except Exception as error:  # the library raises whatever its parsers raise
        raise InputError(f"cannot load the configuration of {model}: {first_line(error)}") from error


def load_model(model: str, gguf_file: str | None = None) -> PreTrainedModel:
    """A causal language model in float32, from a folder or hub id; an adapter is merged into its base.

    Args:
        model: folder or hub id.
        gguf_file: name of a GGUF file in it; its weights are widened, and the mark of quantisation taken off, so that
            the model can be trained and saved.

    Raises:
        InputError: it is missing or cannot be read; the message names the model.
    """
    quieten()
    folder = _folder(model, gguf_file)
    if gguf_file:
        check_gguf(folder, gguf_file)
    elif (base := adapter_base(folder)) is not None:
        check_base(folder, base)
        return merged(load_model(base), folder)
    else:
        check_weights(folder)
    try:
        with silence(), panics_as_errors():
            loaded, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
                **(_gguf(gguf_file) if gguf_file else {"use_safetensors": True}),
            )
    except Exception as error:
        raise InputError(f"cannot load a causal language model from {model}: {first_line(error)}") from error
    if report["missing_keys"]:  # the library would fill them with random numbers
        missing = sorted(report["missing_keys"])
        raise InputError(f"the weights in {model} are incomplete: {missing[0]} and {len(missing) - 1} more are missing")
    return rebuild(loaded) if gguf_file else loaded


def hold_in_bfloat16(model: PreTrainedModel) -> PreTrainedModel:
    """A model whose weights are bfloat16, changed in place. What it computes positions from (RoPE) stays float32, as it does
    where such a model is loaded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    return model


def text_model(model: PreTrainedModel) -> PreTrainedModel:
    """The language model inside a model of texts and images, a copy in float32; a model of texts alone is given back as it is.

    Raises:
        InputError: it cannot be taken out, or answers otherwise by itself.
    """
    config = model.config.get_text_config()
    if config is model.config:
        return model
    kind = model.config.model_type
    try:
        alone = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        alone.get_decoder().load_state_dict(model.get_decoder().state_dict())
        alone.get_output_embeddings().load_state_dict(model.get_output_embeddings().state_dict())
    except (AttributeError, RuntimeError, ValueError) as error:
        raise InputError(f"the language model cannot be taken out of a {kind} model: {first_line(error)}") from error
    tokens = (torch.arange(24) * 7919 % config.vocab_size)[None]
    with torch.inference_mode():
        before, after = (some(input_ids=tokens, use_cache=False).logits for some in (model.eval(), alone))
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-4 * before.abs().max().item()):
        raise InputError(f"the language model of a {kind} model answers otherwise by itself: begin with another model")
    if model.generation_config is not None:
        alone.generation_config = copy.deepcopy(model.generation_config)
    return alone


def rebuild(model: PreTrainedModel, layers: list[int] | None = None) -> PreTrainedModel:
    """A fresh float32 copy of a decoder, with the given layers in the given order (all of them when None).

    The copy is made from the configuration and the state dict alone, so layer numbers, caches and marks of quantisation
    are those of a model that was always this size.

    Args:
        model: any decoder whose layers are one list of modules.
        layers: numbers of the layers to keep, 0-based and in range.

    Raises:
        InputError: the model's layers cannot be found, or its configuration does not fit fewer of them.
    """
    size_name = model.config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    state = model.state_dict()
    if layers is not None:
        total = layer_count(model)
        prefix = _layers_prefix(model, total)
        settings[size_name] = len(layers)
        for name, value in settings.items():
            # Lists such as layer_types say one thing of each layer.
            if "layer" in name and isinstance(value, list) and len(value) == total:
                settings[name] = [value[layer] for layer in layers]
        state = _renumbered(state, prefix, layers)
    settings["dtype"] = "float32"
    try:
        fresh = type(model)(type(model.config).from_dict(settings))
        fresh.load_state_dict(state)
    except (RuntimeError, ValueError, IndexError) as error:
        kind = model.config.model_type
        raise InputError(f"a {kind} model cannot be rebuilt from these layers: {first_line(error)}") from error
    if model.generation_config is not None:
        fresh.generation_config = copy.deepcopy(model.generation_config)
    return fresh.float().eval()


def layer_count(model: PreTrainedModel) -> int:
    """How many layers a decoder has.

    Raises:
        InputError: its configuration does not say.
    """
    total = getattr(model.config, "num_hidden_layers", None)
    if not isinstance(total, int):
        raise InputError(f"a {model.config.model_type} model does not say how many layers it has")
    return total


def _layers_prefix(model: PreTrainedModel, total: int) -> str:
    lists = [name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList) and len(module) == total]
    # Inside a layer there may be lists of that length too (experts): the shortest name is the outermost.
    if not lists:
        raise InputError(f"cannot find the list of {total} layers in a {model.config.model_type} model")
    return min(lists, key=len)


def _renumbered(state: dict[str, torch.Tensor], prefix: str, layers: list[int]) -> dict[str, torch.Tensor]:
    place = {layer: index for index, layer in enumerate(layers)}
    numbered = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    kept = {}
    for name, tensor in state.items():
        match = numbered.match(name)
        if match is None:
            kept[name] = tensor
        elif (layer := int(match[1])) in place:
            kept[f"{prefix}.{place[layer]}.{name[match.end() :]}"] = tensor
    return kept


def _gguf(gguf_file: str | None) -> dict[str, str]:
    return {"gguf_file": gguf_file} if gguf_file else {}


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

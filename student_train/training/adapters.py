"""LoRA adapters, as peft makes, saves and loads them: a run can train one, and its folder is loaded as a model is."""

from __future__ import annotations

import warnings
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, set_seed

from knowledge_store.errors import InputError
from knowledge_store.model_files import silence
from student_train.training.model_folder import check_peft


def add_adapter(model: PreTrainedModel, rank: int, *, base: str, seed: int) -> PreTrainedModel:
    """A model with a LoRA adapter, the only part of it that is trained; its head stays as it is.

    The adapter stands at the layers that peft chooses for the architecture, and at all linear layers of one that peft does not
    know. Its scale is 2 (`lora_alpha` is twice the rank), and without training it changes nothing.

    Args:
        model: changed in place; its weights may be bfloat16, and the adapter's are float32 all the same.
        rank: of the adapter's matrices, at least 1.
        base: folder or hub id that the adapter's configuration names the model by.
        seed: of its first weights.

    Returns:
        A `peft.PeftModel`.

    Raises:
        InputError: peft is not installed, or the model has no layer that it can adapt.
    """
    check_peft("--lora-rank")
    from peft import LoraConfig, TaskType, get_peft_model
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    kind = model.config.model_type
    settings = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=None if kind in KNOWN else "all-linear",
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base,
    )
    set_seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of settings that peft puts right by itself
            adapted = get_peft_model(model, settings)
    except ValueError as error:
        raise InputError(f"--lora-rank finds no layers that can be adapted in a {kind} model: train it whole") from error
    settings.base_model_name_or_path = base  # which peft takes from where the model was loaded
    if not any(parameter.requires_grad for parameter in adapted.parameters()):
        raise InputError(f"--lora-rank finds no layers that can be adapted in a {kind} model: train it whole")
    return adapted


def merged(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A model with an adapter's weights added to its own.

    Args:
        model: the adapter's base, changed in place.
        folder: of the adapter.

    Raises:
        InputError: peft is not installed, or the adapter does not fit the model.
    """
    check_peft(f"the adapter in {folder}")
    from peft import PeftModel

    try:
        with silence(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message=".*missing adapter keys")  # which it would leave as random numbers
            whole = PeftModel.from_pretrained(model, folder, torch_device="cpu", use_safetensors=True).merge_and_unload()
    except Exception as error:  # the library raises whatever its parsers raise
        lines = str(error).strip().splitlines()
        raise InputError(f"the adapter in {folder} cannot be used: {lines[0] if lines else type(error).__name__}") from error
    if (folder / "generation_config.json").is_file():
        whole.generation_config = GenerationConfig.from_pretrained(folder)
    return whole.requires_grad_(True).eval()  # peft froze the base's weights

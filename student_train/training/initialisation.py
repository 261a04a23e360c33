"""A student to begin with: a copy of a model that keeps some of its layers.

This is how DistilGPT2 was made. The embeddings, the head and the kept layers come over as they are, so the student
speaks the teacher's vocabulary and starts far from random.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from knowledge_store.errors import InputError
from student_train.training.model_folder import check_model_folder, stated_layers


@dataclass(frozen=True)
class Initialised:
    """What `initialise` made: its folder, its layers, its parameters, and how many of each the model had."""

    output: Path
    layers: int
    parameters: int
    layers_before: int
    parameters_before: int


def initialise(source: str, keep_layers: list[int], output: str | Path, *, gguf_file: str | None = None) -> Initialised:
    """Write a layer-dropped copy of a model, float32 safetensors, and its tokenizer.

    Args:
        source: folder or hub id of any decoder; of a model of texts and images, its language model is copied.
        keep_layers: layers to keep, 0-based, in ascending order.
        output: folder to make; it must not exist, or be empty. It appears complete or not at all.
        gguf_file: name of a GGUF file in `source`.

    Raises:
        InputError: the model cannot be loaded, a layer does not exist or is named twice, or `output` is not empty.
    """
    output = Path(output)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise InputError(f"{output} exists already: choose another --output, or remove it first")
    if not keep_layers:
        raise InputError("no layers to keep: give --keep-layers, such as --keep-layers 0,6,12")
    repeated = sorted({layer for layer in keep_layers if keep_layers.count(layer) > 1})
    if repeated:
        raise InputError(f"layer {repeated[0]} is named twice in --keep-layers")
    if keep_layers != sorted(keep_layers):
        raise InputError("the layers of --keep-layers must be in ascending order")
    check_model_folder(source, gguf_file)
    if (stated := stated_layers(source, gguf_file)) is not None:
        _check_layers(keep_layers, stated, source)
    # Imports torch, which takes seconds: mistakes are found before.
    from student_train.training.models import layer_count, load_model, load_tokenizer, rebuild, text_model

    tokenizer = load_tokenizer(source, gguf_file)
    model = text_model(load_model(source, gguf_file))
    total = layer_count(model)
    _check_layers(keep_layers, total, source)
    student = rebuild(model, keep_layers)

    temporary = output.with_name(f".tmp-{output.name}-{os.getpid()}")
    try:
        student.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.rename(output)
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Initialised(
        output=output,
        layers=len(keep_layers),
        parameters=student.num_parameters(),
        layers_before=total,
        parameters_before=model.num_parameters(),
    )


def _check_layers(keep_layers: list[int], total: int, source: str) -> None:
    missing = [layer for layer in keep_layers if not 0 <= layer < total]
    if missing:
        raise InputError(f"layer {missing[0]} does not exist: {source} has layers 0 to {total - 1}")

"""How a teacher is loaded, and what of it can be wrong before torch is imported."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec

from knowledge_store.errors import InputError
from teacher_dump.teachers.protocol import Ability

_ROOM = re.compile(r"(cpu|\d+)=(\d+(?:\.\d+)?\s*(?:[KMGT]i?B))", re.IGNORECASE)


@dataclass(frozen=True)
class Engine:
    """What runs a teacher, as far as it matters before anything heavy is imported.

    Attributes:
        package: that it needs. advice: what to do where that is missing.
        excluded: the fields of `Loading` that it does not have. reason: why, and what to do instead.
        flag: the option that chooses it, where that is not `--engine` with its name.
        abilities: what a teacher can give at most that it runs.
    """

    package: str = ""
    advice: str = ""
    excluded: tuple[str, ...] = ()
    reason: str = ""
    flag: str = ""
    abilities: frozenset[Ability] = frozenset(Ability)


SERVER = "vllm-server"
ENGINES = {
    "transformers": Engine(),
    "vllm": Engine(
        package="vllm",
        advice="pip install 'knowledge-store[vllm]' in an environment of its own, or leave --engine out",
        excluded=("gguf_file", "device", "device_map", "max_memory", "quantize", "attention"),
        reason="vLLM reads safetensors, quantised ones too, and finds devices and attention itself",
        abilities=frozenset({Ability.DISTRIBUTIONS, Ability.LIKELIEST, Ability.TEXT}),
    ),
    SERVER: Engine(
        package="httpx2",
        advice="pip install 'knowledge-store[teacher]'",
        excluded=("gguf_file", "dtype", "device", "device_map", "max_memory", "quantize", "attention"),
        reason="the server has loaded the teacher already, as it was started",
        flag="--teacher-url",
        abilities=frozenset({Ability.LIKELIEST}),
    ),
}


@dataclass(frozen=True)
class Loading:
    """How a teacher is loaded (see `configuration.TeacherOptions`, which has an option for each).

    Attributes:
        gguf_file: name of a GGUF file in its folder.
        dtype: one of `protocol.DTYPES`; "auto" is float32 on a CPU, and the model's own elsewhere.
        device: see `local.find_device`.
        device_map: one of `protocol.DEVICE_MAPS`. max_memory: room for weights on each device, as the option has it.
        quantize: one of `protocol.QUANTISATIONS`; None as "none".
        attention: one of `protocol.ATTENTIONS`.
        revision: of a hub id.
        engine: one of `ENGINES`.
        teacher_url: of a server, with the engine SERVER.
    """

    gguf_file: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    device_map: str = "none"
    max_memory: str | None = None
    quantize: str | None = None
    attention: str = "auto"
    revision: str | None = None
    engine: str = "transformers"
    teacher_url: str | None = None

    @property
    def quantised(self) -> bool:
        """Whether weights are made smaller as they are loaded."""
        return self.quantize not in (None, "none")

    @property
    def memory(self) -> dict[int | str, str] | None:
        """Room for weights by device: a number of an accelerator, or "cpu"."""
        if self.max_memory is None:
            return None
        pairs = (_ROOM.fullmatch(part.strip()) for part in self.max_memory.split(","))
        return {int(pair[1]) if pair[1].isdigit() else pair[1].lower(): pair[2] for pair in pairs if pair}


def check_loading(loading: Loading) -> None:
    """Make sure that a teacher can be loaded so.

    Raises:
        InputError: two options exclude each other, or a library is missing.
    """
    engine = ENGINES[loading.engine]
    for name in engine.excluded:
        if getattr(loading, name) not in (getattr(Loading, name), "none"):
            raise InputError(
                f"--{name.replace('_', '-')} does not go with {engine.flag or f'--engine {loading.engine}'}: {engine.reason}."
                " Leave one of the two out"
            )
    if engine.package and find_spec(engine.package) is None:
        flag = engine.flag or f"--engine {loading.engine}"
        raise InputError(f"{flag} needs the library {engine.package}, which is not here: {engine.advice}")
    if loading.device_map != "none" and loading.device != "auto":
        raise InputError("--device is one device and --device-map several: give one of the two")
    if loading.max_memory is not None:
        if loading.device_map == "none":
            raise InputError("--max-memory is the room for weights on each device of --device-map: give that too")
        wrong = next((part for part in loading.max_memory.split(",") if not _ROOM.fullmatch(part.strip())), None)
        if wrong is not None:
            raise InputError(f"--max-memory has {wrong!r}: give DEVICE=SIZE, such as 0=20GiB or cpu=64GiB, with commas between")
    if loading.quantised:
        if loading.gguf_file is not None:
            raise InputError("--quantize does not go with --gguf-file: a GGUF file has weights of its own size")
        if find_spec("bitsandbytes") is None:
            raise InputError(
                f"--quantize {loading.quantize} needs the library bitsandbytes, which is not here: pip install bitsandbytes"
            )
    if loading.device_map != "none" and find_spec("accelerate") is None:
        raise InputError("--device-map needs the library accelerate, which is not here: pip install accelerate")
    if loading.attention == "flash_attention_2" and find_spec("flash_attn") is None:
        raise InputError(
            "--attention flash_attention_2 needs the library flash-attn, which is not here: pip install flash-attn"
        )

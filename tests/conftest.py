"""A tiny teacher with random weights and a real byte-level tokenizer, and a store that it made: all there is to test with."""

from __future__ import annotations

import atexit
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from memory_storage import PLACES, Place, new_place
from torture.heartbeat import PATIENCE

# Set before any library reads them: no test may reach the network, and every process shares two cores.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

# A store flushes every file that it publishes. Where memory has room for all folders of a run, no test waits for a disk.
MEMORY = Path("/dev/shm")
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= 4 * 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

# A shell that runs tests in the background has them ignore Ctrl-C, and so would every process they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes is no property of what is tested.
UNCHECKED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("tests", deadline=None, suppress_health_check=UNCHECKED)
settings.load_profile("tests")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(params=PLACES)
def place(request, tmp_path) -> Place:
    """Where a store is to be: in a folder, or in a storage that has the calls of the protocol and nothing else."""
    return new_place(request.param, tmp_path / "store")


TEXT = """\
The lighthouse keeper counted the ships that passed each night, and wrote their names in a book.

When a storm came he lit the lamp early. "Better an hour too soon," he said, "than a minute too late." His daughter held
the ladder and asked how far the light could be seen. "As far as somebody looks for it," he answered.

In winter the book was nearly empty. They read old pages aloud: the Marigold, bound for the south with salt; the Patience,
which had lost a mast; the Second Wind, seen twice in one night and never again.
"""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

MARKED_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }}<|end|>{% endgeneration %}{% else %}{{ message['content'] }}<|end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(extra_words: tuple[str, ...] = ()):
    """A byte-level BPE tokenizer of about 400 tokens, with a chat template and no beginning-of-sequence token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>", *extra_words]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>", chat_template=CHAT_TEMPLATE
    )


def make_model(vocabulary_size: int, layers: int = 2, seed: int = 0, hidden_size: int = 32):
    """A small Llama whose random weights are large enough to make its predictions uneven."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.4,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def save_teacher(folder: Path, **model_arguments) -> Path:
    """A teacher's folder: model (with a head a little wider than the vocabulary) and tokenizer."""
    tokenizer = make_tokenizer()
    make_model(len(tokenizer) + 8, **model_arguments).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where hashes of files are kept between runs, instead of in the home of whoever runs the tests."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def frozen_heap() -> None:
    """Garbage is looked for among what is new: each training asks for it, and all that was imported is a million objects."""
    gc.collect()
    gc.freeze()
    if loading := sys.modules.get("torch.utils.data"):
        # What workers of a loader that became garbage may take to end, which nothing tells them to.
        loading._utils.MP_STATUS_CHECK_INTERVAL = 0.2


atexit.register(gc.unfreeze)  # libraries that count what they leak count it at the end


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch computes with one thread: the models are tiny, and more threads only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def skip_for(reason: str | None) -> None:
    """Skip a test for a reason that it cannot run here, if there is one."""
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that nobody may change."""
    return save_teacher(tmp_path_factory.mktemp("teacher") / "tiny")


@pytest.fixture(scope="session")
def loaded_teacher(teacher_folder: Path):
    """The same teacher, loaded."""
    from teacher_dump.teachers.local import load_teacher

    return load_teacher(str(teacher_folder), device="cpu")


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """A corpus file with these rows."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def story_rows(count: int, start: int = 0) -> list[dict]:
    """Rows of plain text of various lengths, with columns of their own."""
    words = TEXT.split()
    return [
        {"text": " ".join(words[(7 * row) % 60 :][: 5 + (11 * row) % 70]), "source": "ab"[row % 2], "score": row / 4}
        for row in range(start, start + count)
    ]


@pytest.fixture(scope="session")
def store_folder(tmp_path_factory: pytest.TempPathFactory, loaded_teacher, teacher_folder: Path) -> Path:
    """A store with the dumps "train" and "heldout" of the tiny teacher, which nobody may change."""
    from teacher_dump import DumpConfig, dump

    folder = tmp_path_factory.mktemp("stores")
    for name, rows in (("train", story_rows(29)), ("heldout", story_rows(10, start=30))):
        corpus = write_jsonl(folder / f"{name}.jsonl", rows)
        config = DumpConfig(str(teacher_folder), (corpus,), folder / "store", name, max_length=48, batch_size=4, shard_size=8)
        dump(config, teacher=loaded_teacher)
    return folder / "store"


STATES_ROWS = [
    *story_rows(6),
    {"prompt": "Who lit the lamp?", "completion": " The keeper did."},
    {"prompt": "Who lit the lamp?", "completion": " The keeper did."},
    {"prompt": "Who counted the ships?", "completion": " His daughter, in a book."},
]
# By name: of vectors, of hidden states, and of both.
VECTORS_DUMPS = {
    "states": {"kinds": ("positions", "vectors", "hidden")},
    "mean": {"kinds": ("vectors",), "vectors_layer": 1, "vectors_over": "all"},
    "last": {"kinds": ("vectors",), "vectors_layer": 0, "vectors_pooling": "last"},
}
HIDDEN_DUMPS = {
    "states": VECTORS_DUMPS["states"],
    "layers": {"kinds": ("hidden",), "hidden_layers": "0,-2", "hidden_where": "all", "hidden_every": 3},
    "exact": {"kinds": ("hidden",), "hidden_layers": "1,-1", "hidden_precision": "float16", "hidden_every": 2},
    "draft": {"kinds": ("positions", "hidden"), "hidden_layers": "0,-2,2", "hidden_where": "all"},
}


@pytest.fixture(scope="session")
def states_options(tmp_path_factory, teacher_folder) -> dict:
    """Options of a dump of STATES_ROWS."""
    corpus = write_jsonl(tmp_path_factory.mktemp("corpus") / "rows.jsonl", STATES_ROWS)
    return {"teacher": str(teacher_folder), "corpus": (corpus,), "max_length": 48, "batch_size": 4, "shard_size": 4}


@pytest.fixture(scope="session")
def states_store(tmp_path_factory, states_options, loaded_teacher) -> Path:
    """A store with VECTORS_DUMPS and HIDDEN_DUMPS, which nobody may change."""
    from teacher_dump import DumpConfig, dump

    folder = tmp_path_factory.mktemp("states") / "store"
    for name, more in {**VECTORS_DUMPS, **HIDDEN_DUMPS}.items():
        dump(DumpConfig(store=folder, name=name, **states_options, **more), teacher=loaded_teacher)
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """A student's folder."""
    return save_teacher(tmp_path_factory.mktemp("student") / "student", layers=1, seed=1)


@pytest.fixture
def settings(store_folder, student, tmp_path) -> dict:
    """Options of a short run of it."""
    return {
        "store": str(store_folder),
        "student": str(student),
        "output": str(tmp_path / "run"),
        "dump": "train",
        "batch_size": 4,
        "learning_rate": 1e-3,
        "steps": 6,
        "eval_fraction": 0.0,
    }


def run_command(package: str, *arguments: object, **options) -> subprocess.CompletedProcess[str]:
    """Run one of the three commands as a user would, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"}
    command = [sys.executable, "-m", f"{package}.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE, check=False, **options)

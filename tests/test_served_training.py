"""Training from a served store: as from its folder, with workers, and while the server is killed and started again."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
import torch
from processes import Running
from safetensors.torch import load_file
from served import TOKEN, assert_equal, served
from stores import write_store
from torch.utils.data import DataLoader
from torture.heartbeat import wait_until

from knowledge_store import InputError, KnowledgeStore
from knowledge_store.configuration import ServeConfig
from knowledge_store.reporter import Reporter
from knowledge_store.serving.service import serve
from knowledge_store.storage.served.tokens import ENVIRONMENT
from student_train.training.configuration import TrainConfig
from student_train.training.dataset import DistillationDataset
from student_train.training.run import train
from teacher_dump import DumpConfig, dump

KILLED_AFTER = (3, 9)  # batches


class Notes(Reporter):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)


def serve_alone(folder: str, tokens: str, port: int) -> None:
    """A server, in a process of its own."""
    config = ServeConfig(stores=(folder,), token_file=Path(tokens), bind=f"127.0.0.1:{port}")
    serve(config, lambda line: None, lambda sentence: print(sentence, flush=True))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_a_server_that_is_killed_in_mid_epoch_loses_and_repeats_nothing(tmp_path):
    folder, tokens, port = write_store(tmp_path / "store", size=30), tmp_path / "tokens", free_port()
    tokens.write_text(f"{TOKEN}\n")

    servers: list[Running] = []

    def start() -> None:
        servers.append(Running(serve_alone, str(folder), str(tokens), port, folder=tmp_path / "server"))
        wait_until(lambda: "Serving" in servers[-1].output, servers[-1].process.is_alive)

    def kill() -> None:
        servers[-1].process.kill()
        servers[-1].process.join()

    expected, reporter = list(KnowledgeStore.open(folder, cache_size=0).batches(batch_size=4, seed=2)), Notes()
    starting = threading.Thread(target=start)
    try:
        starting.start()
        starting.join()
        with KnowledgeStore.open(f"grpc://127.0.0.1:{port}", token_file=tokens, reporter=reporter) as store:
            found = []
            for batch in store.batches(batch_size=4, seed=2):
                found.append(batch)
                if len(found) in KILLED_AFTER:
                    starting.join()
                    kill()
                    starting = threading.Thread(target=start)
                    starting.start()
            assert len(found) == len(expected)
            for one, other in zip(found, expected, strict=True):
                assert_equal(one, other)
        assert f"Waiting for grpc://127.0.0.1:{port} for up to 2 min 00 s more: it does not answer" in reporter.notes[0]
        assert f"grpc://127.0.0.1:{port} answers again after" in reporter.notes[1]
    finally:
        starting.join()
        kill()


@pytest.mark.usefixtures("one_thread")
def test_a_run_is_the_same_as_from_the_folder(store_folder, student, tmp_path, monkeypatch):
    """With two workers, which are not forked; the token is the environment's, and in no file of the run."""
    options = {
        "student": str(student),
        "dump": "train",
        "batch_size": 4,
        "steps": 2,
        "learning_rate": 1e-3,
        "eval_fraction": 0.0,
    }
    train(TrainConfig(store=str(store_folder), output=str(tmp_path / "local"), **options))
    (tmp_path / "store").symlink_to(store_folder)
    with served(tmp_path / "store") as where:
        monkeypatch.setenv(ENVIRONMENT, TOKEN)
        train(TrainConfig(store=where.address, output=str(tmp_path / "served"), workers=2, **options))
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("local", "served")]
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())
    assert not any(TOKEN.encode() in path.read_bytes() for path in (tmp_path / "served").iterdir())


def test_a_dump_is_refused_before_its_corpus_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, TOKEN)
    with served(write_store(tmp_path / "store")) as where, pytest.raises(InputError, match="which is only read"):
        dump(DumpConfig(str(tmp_path / "no teacher"), (tmp_path / "no corpus",), where.address, "new"))


def test_a_forked_process_says_what_to_do(tmp_path):
    """It would wait for ever for threads that it has not got."""
    with served(write_store(tmp_path / "store", size=12)) as where, where.open() as store:
        dataset = DistillationDataset(store, batch_size=4)
        loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="fork")
        with pytest.raises(InputError, match="give the loader multiprocessing_context"):
            list(loader)
        assert dataset.start_method == "forkserver"

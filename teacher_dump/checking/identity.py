"""What is known of a teacher without asking it: whether its weights, tokenizer and vocabulary are those of the dump."""

from __future__ import annotations

from typing import Any

from knowledge_store import KnowledgeStore, Manifest
from teacher_dump.corpus.tokenisation import describe_tokenizer
from teacher_dump.teachers.loading import SERVER
from teacher_dump.teachers.protocol import Teacher

SERVED = ("engine_version", "served_name", "fingerprint")  # what a teacher behind a server is known by


def _weights(description: dict[str, Any]) -> list[str]:
    """Hashes of the files of weights, whatever their names."""
    files = description.get("files", {})
    return sorted(sha256 for name, sha256 in files.items() if name.endswith((".safetensors", ".gguf")))


def same_weights(manifest: Manifest, teacher: Teacher) -> tuple[bool, list[str]]:
    """Whether the teacher's weights are the dump's, and what else of it a person should know."""
    same = bool(_weights(manifest.teacher)) and _weights(manifest.teacher) == _weights(teacher.description)
    notes = [] if same else ["the teacher's files of weights are not those that the manifest names"]
    if SERVER in (engines := [record.get("engine") for record in (manifest.teacher, teacher.description)]):
        same = engines[0] == engines[1] and all(manifest.teacher.get(name) == teacher.description.get(name) for name in SERVED)
        notes = [] if same else ["of a teacher behind a server nobody can say which weights it has: its answers alone tell"]
    made, asked = (record.get("quantize", "none") for record in (manifest.teacher, teacher.description))
    if made != asked:
        same = False
        notes.append(f"the dump was made with --quantize {made}, and the teacher is asked with {asked} now")
    kept, now = manifest.teacher.get("dtype"), teacher.description.get("dtype")
    if kept != now and None not in (kept, now):
        notes.append(f"the dump was made in {kept}, and the teacher is asked in {now} now")
    return same, notes


def other_tokenizer(store: KnowledgeStore, manifest: Manifest, teacher: Teacher, notes: list[str]) -> list[str]:
    """Why the teacher's tokenizer is not the dump's, one sentence; none when it is, or only knows more."""
    kept = manifest.tokenizer.get("vocabulary_sha256")
    if kept is None or kept == describe_tokenizer(teacher.tokenizer)["vocabulary_sha256"]:
        return []
    kept_tokens = store.tokens(manifest.dump)["token"].to_pylist()
    tokens = {token: name for name, token in teacher.tokenizer.get_vocab().items()}
    changed = [token for token, name in enumerate(kept_tokens) if name is not None and tokens.get(token) != name]
    if not changed:
        notes.append("the teacher's tokenizer knows tokens that the dump's did not; all others are the same")
        return []
    token = changed[0]
    return [
        f"{len(changed):,} of the dump's {len(kept_tokens):,} tokens are others in the teacher's tokenizer:"
        f" {token} was {kept_tokens[token]!r} and is {tokens.get(token)!r}"
    ]


def other_model(manifest: Manifest, teacher: Teacher) -> str | None:
    """Why the teacher cannot even be asked."""
    if teacher.vocabulary_size != manifest.vocabulary_size:
        return (
            f"the dump's teacher has a vocabulary of {manifest.vocabulary_size:,} tokens,"
            f" and this one has {teacher.vocabulary_size:,}"
        )
    positions = teacher.description["max_positions"]
    if positions is not None and positions < manifest.plan["max_length"]:
        longest = manifest.plan["max_length"]
        return f"the dump has sequences of up to {longest:,} tokens, and this teacher knows {positions:,} positions"
    return None

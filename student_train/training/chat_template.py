"""Whether a student has the chat template that the conversations of its dumps were written by."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from knowledge_store import KINDS, KnowledgeStore
from knowledge_store.format.manifest import template_sha256
from knowledge_store.reporter import SILENT, Reporter
from student_train.losses.table import TEXT

SAMPLED = 8  # sequences looked at, which lie together


def note_template(
    tokenizer: PreTrainedTokenizerBase, store: KnowledgeStore, dumps: Sequence[str], *, reporter: Reporter = SILENT
) -> None:
    """Tell of conversations that a student learns, and that whoever asks the trained student by its own chat template will not
    write.

    Args:
        tokenizer: the student's, whose template is saved with the trained student.
        store: an open store.
        dumps: the dumps that it learns from.
        reporter: hears of each dump whose template the student does not have.
    """
    own = template_sha256(tokenizer.chat_template)
    special = {*tokenizer.all_special_ids, *(id for id, token in tokenizer.added_tokens_decoder.items() if token.special)}
    for dump in dumps:
        manifest = store.manifest(dump)
        written_by = manifest.plan.get("chat", {}).get("template_sha256") or manifest.tokenizer.get("chat_template_sha256")
        if written_by in (None, template_sha256(None), own) or not _has_turns(store, dump, special):
            continue
        reporter.note(
            f"Warning: the conversations of {dump} were written by a chat template, and the student's tokenizer has"
            f" {'another' if tokenizer.chat_template else 'none'}, by which the trained student may be asked otherwise than it"
            " learnt: put that template into the student's folder, as chat_template.jinja, before it is trained"
        )


def _has_turns(store: KnowledgeStore, dump: str, special: Collection[int]) -> bool:
    """Whether special tokens stand between the first token of a dump's first sequences and their targets, as a chat template
    writes them."""
    manifest = store.manifest(dump)
    kinds = [kind for kind in manifest.kinds if TEXT[0] in KINDS[kind].arrays(manifest)]
    ordinals = np.arange(min(SAMPLED, store.sequence_count(dump)))
    if not kinds or not len(ordinals):
        return False
    [batch] = store.batches(dump, batch_size=SAMPLED, ordinals=ordinals, shuffle=False, kinds=tuple(kinds[:1]))
    context = batch["attention_mask"].astype(bool) & ~batch["is_target"].astype(bool)
    return bool(np.isin(batch["input_ids"][:, 1:][context[:, 1:]], list(special)).any())

"""A teacher to try things with, made on the spot: a small Llama and its tokenizer, and two corpora for it.

    python -m benchmarks.tiny_model FOLDER [--steps 200]

The text is the language reference that every Python carries, so nothing is downloaded. Written are FOLDER/teacher, which any
transformers program can load, FOLDER/train.jsonl and FOLDER/heldout.jsonl, which have a row for each topic of the reference
(every fifth topic is held out), and FOLDER/chat.jsonl, conversations made of the titles and the beginnings of the topics. The
model has learnt enough in half a minute to prefer some tokens to others, and no more than that.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 1024
LENGTH, SEQUENCES = 128, 8  # of a training step
LEARNING_RATE = 3e-3
END = "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}{% else %}{{ message['content'] }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCABULARY` tokens with a chat template, trained on the texts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [END, "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END, chat_template=CHAT_TEMPLATE)


def train_model(tokenizer: PreTrainedTokenizerFast, texts: list[str], steps: int) -> LlamaForCausalLM:
    """A Llama of six layers and some 300,000 parameters, trained on the texts for so many steps."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # threads of one so small model mostly wait for each other
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    tokens = torch.tensor(tokenizer(END.join(texts), verbose=False)["input_ids"])
    for step in range(steps):
        starts = torch.randint(len(tokens) - LENGTH, (SEQUENCES,))
        batch = torch.stack([tokens[start : start + LENGTH] for start in starts.tolist()])
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step + 1 == steps:
            print(f"step {step + 1} of {steps}: loss {loss.item():.2f} nats a token", flush=True)
    return model.eval()


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """A corpus file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """Write the corpora, the tokenizer and the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=200, help="training steps of the teacher")
    options = parser.parse_args()
    rows: list[dict[str, object]] = [{"topic": name, "text": text.strip()[:2000]} for name, text in sorted(topics.items())]
    training = [row for place, row in enumerate(rows) if place % 5]
    options.folder.mkdir(parents=True, exist_ok=True)
    write_rows(options.folder / "train.jsonl", training)
    write_rows(options.folder / "heldout.jsonl", rows[::5])
    conversations = [
        [
            {"role": "user", "content": f"What does Python say about {row['topic']}?"},
            {"role": "assistant", "content": str(row["text"])[:300]},
        ]
        for row in training
    ]
    write_rows(options.folder / "chat.jsonl", [{"messages": turns} for turns in conversations])
    texts = [str(row["text"]) for row in training]
    tokenizer = make_tokenizer(texts)
    train_model(tokenizer, texts, options.steps).save_pretrained(options.folder / "teacher")
    tokenizer.save_pretrained(options.folder / "teacher")
    print(f"Written: {options.folder / 'teacher'} and, beside it, train.jsonl, heldout.jsonl and chat.jsonl")


if __name__ == "__main__":
    main()

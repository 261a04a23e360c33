"""The documents: what stands in them runs, is complete, and leads somewhere.

Every `sh`, `python` and `sql` block of a document is run, in order, in one folder for each document. Models, files and numbers
of steps are replaced from one table, `SUBSTITUTIONS`. A block that needs an engine, a device, a server or minutes has a comment
before it, `<!-- not run: the reason -->`; `NOT_RUN` lists those there are.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from conftest import story_rows, write_jsonl

from knowledge_store import KnowledgeStore
from knowledge_store.kinds.positions.selection import DRAW_WEIGHT

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for folder in (".", "knowledge_store", "teacher_dump", "student_train", "benchmarks")
    for path in (ROOT / folder).glob("*.md")
)
PROGRAMS = {name.replace("_", "-"): f"{name}.cli" for name in ("knowledge_store", "teacher_dump", "student_train")}

# What a document says, and what is run in its place. Names that lead to a tiny model or file lie in the folder of the test.
SUBSTITUTIONS = (
    ("meta-llama/Llama-3.1-8B", "teacher"),
    ("tuned/", "teacher"),
    ("quickstart/train.jsonl", "train.jsonl"),
    ("quickstart/heldout.jsonl", "heldout.jsonl"),
    ("quickstart/chat.jsonl", "chat.jsonl"),
    ("benchmarks.tiny_model quickstart", "benchmarks.tiny_model quickstart --steps 1"),
    ("--steps 40", "--steps 2"),
    ("topic", "source"),
    ("2,16,29,32", "0,1,2"),  # of a teacher with two layers
    ("--steps 100", "--steps 2"),
    ("--epochs 1", "--steps 2"),
    ("--teacher original", "--teacher teacher"),
    ("--model original", "--model teacher"),
    ("--model copies --gguf-file Q8_0.gguf", "--model student"),
    ("--model copies --gguf-file Q2_K.gguf", "--model student"),
    ('SFTConfig("runs/sft"', 'SFTConfig("runs/sft", bf16=False'),  # whose default needs a GPU
    ('DPOConfig("runs/dpo"', 'DPOConfig("runs/dpo", bf16=False, use_cpu=True'),
    ("'small'", "'train'"),
    ("'large'", "'heldout'"),
    ("--max-new-tokens 256", "--max-new-tokens 6"),
    ("finish = 'stop'", "finish <> ''"),  # a teacher with random weights seldom ends a text
)

# Blocks that are not run: document, and reason.
NOT_RUN = {
    ("README.md", "it installs packages"),
    ("README.md", "needs vLLM, a server, or files that others made"),
    ("README.md", "needs a bucket, and serves until it is told to end"),
    ("README.md", "names a model of the hub; TEXTS.md asks tiny ones the same"),
    ("CONTRIBUTING.md", "minutes, and packages to install"),
    ("benchmarks/RESULTS.md", "minutes to hours, with models and texts of your own"),
    ("knowledge_store/BUCKETS.md", "it needs a bucket"),
    ("knowledge_store/BUCKETS.md", "it needs the hub"),
    ("knowledge_store/PAGE.md", "it serves until it is told to end"),
    ("knowledge_store/RELIABILITY.md", "20 minutes of faults"),
    ("knowledge_store/SERVING.md", "it serves until it is told to end"),
    ("student_train/TRAINERS.md", "needs two GPUs"),
    ("teacher_dump/DATA.md", "downloads a data set"),
    ("teacher_dump/WORKERS.md", "benchmarks/launchers.py runs it"),
    ("teacher_dump/WORKERS.md", "it needs a cluster"),
    ("teacher_dump/IMPORTS.md", "downloads a data set"),
    ("teacher_dump/TEACHERS.md", "needs a server of vLLM"),
    ("teacher_dump/TEXTS.md", "needs a tokenizer with a token that begins a text"),
    ("teacher_dump/TEACHERS.md", "needs vLLM"),
}


@dataclass(frozen=True)
class Block:
    """A block of a document: its first line's number, its language, its text, and why it is not run (None: it is)."""

    line: int
    language: str
    text: str
    reason: str | None


def blocks(document: str) -> list[Block]:
    """All blocks of a document, in order."""
    text = (ROOT / document).read_text()
    pattern = re.compile(r"(?:<!-- not run: (?P<reason>.*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
    return [
        Block(text.count("\n", 0, match.start("text")) + 1, match["language"], match["text"], match["reason"])
        for match in pattern.finditer(text)
    ]


def substituted(text: str) -> str:
    for words, replacement in SUBSTITUTIONS:
        text = text.replace(words, replacement)
    return text


def run_line(line: str) -> None:
    """One line of a shell: a command of ours or a module, with globs, `< FILE` and `> FILE`, in this process."""
    words = shlex.split(line, comments=True)
    files = {sign: words[words.index(sign) + 1] for sign in "<>" if sign in words}
    for sign, name in files.items():
        words = [word for word in words if word not in (sign, name)]
    words = [
        name
        for word in words
        for name in (sorted(map(str, Path().glob(word))) if word.endswith(("*.jsonl", "*.parquet")) else [word])
    ]
    module = words[2] if words[:2] == ["python", "-m"] else PROGRAMS[words[0]]
    arguments = words[3:] if words[0] == "python" else words[1:]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [words[0], *arguments])
        if "<" in files:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(files["<"]).read_bytes())))
        try:
            importlib.import_module(module).main()
        except SystemExit as ended:
            assert not ended.code, f"exit code {ended.code}: {line}"
    if ">" in files:
        Path(files[">"]).write_text(printed.getvalue())


def run_block(block: Block) -> None:
    text = substituted(block.text)
    if block.language == "sh":
        for line in re.sub(r"\\\n\s*", "", text).splitlines():
            if line.strip():
                run_line(line)
    elif block.language == "python":
        exec(text, {"__name__": "document"})
    elif block.language == "sql":
        store = KnowledgeStore.open("knowledge")
        for statement in filter(str.strip, text.split(";\n")):
            assert store.sql(statement).num_columns
    elif block.language == "json":
        for line in text.splitlines():
            json.loads(line)
    elif block.language == "jinja":  # its first line is a comment with the name of its file
        Path(re.match(r"\{# (\S+) #\}\n", text)[1]).write_text(text)
    elif block.language == "yaml":
        Path("run.yaml").write_text(text)
        run_line("student-train run --config run.yaml --print-config")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, store_folder, teacher_folder) -> Path:
    """A folder with everything that documents name without making it."""
    folder = tmp_path_factory.mktemp("documents")
    shutil.copytree(store_folder, folder / "knowledge")
    shutil.copytree(teacher_folder, folder / "teacher")
    # The default --max-length is what documents use; more positions need no more weights.
    configuration = json.loads((folder / "teacher/config.json").read_text())
    (folder / "teacher/config.json").write_text(json.dumps({**configuration, "max_position_embeddings": 512}))
    shutil.copytree(folder / "teacher", folder / "student")
    rows = story_rows(12)
    (folder / "data").mkdir()
    for name, content in (("train.jsonl", rows), ("data/part-1.jsonl", rows), ("data/part-2.jsonl", story_rows(12, start=40))):
        write_jsonl(folder / name, content)
    write_jsonl(folder / "heldout.jsonl", story_rows(6, start=30))
    prompts = [f"Who lit lamp {row}?" for row in range(8)]
    turns = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": "The keeper did."}] for prompt in prompts]
    write_jsonl(folder / "chat.jsonl", [{"messages": each} for each in turns[:4]])
    pairs = [{"prompt": prompt, "chosen": " The keeper.", "rejected": " No one at all."} for prompt in prompts]
    write_jsonl(folder / "pairs.jsonl", pairs)
    answers = [" The keeper did.", " His daughter.", " It was no one."]
    write_jsonl(folder / "samples.jsonl", [{"prompt": prompt, "completions": answers} for prompt in prompts])
    questions = [{"prompt": f"Who lit the {thing}?"} for thing in ("lamp", "fire")]
    write_jsonl(folder / "questions.jsonl", questions)
    write_jsonl(folder / "subjects.jsonl", [{"subject": "the sea", "age": 5}, {"subject": "a lamp", "age": 9, "word": "mast"}])
    for name in ("test", "validation"):
        rows = [
            {"question": f"What is {name} {place}?", "options": ["a lamp", "a boat"], "answer": place % 2} for place in range(6)
        ]
        write_jsonl(folder / f"{name}.jsonl", rows)
    for name in ("distilled", "fine-tuned"):
        shutil.copytree(teacher_folder, folder / "runs" / name)
    (folder / "question.sql").write_text("SELECT count(*) FROM sequences")
    return folder


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # says TRL's own default
@pytest.mark.parametrize("document", [name for name in DOCUMENTS if any(not block.reason for block in blocks(name))])
def test_every_block_runs(document, prepared, tmp_path, monkeypatch):
    made_by_the_document = ("knowledge", "student", "runs") if document == "README.md" else ()
    shutil.copytree(prepared, tmp_path / "work", ignore=shutil.ignore_patterns(*made_by_the_document))
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.syspath_prepend(str(ROOT))
    for block in blocks(document):
        if block.reason is None:
            try:
                run_block(block)
            except BaseException as error:
                error.add_note(f"in the block at {document}:{block.line}")
                raise


def test_blocks_are_marked():
    languages = {block.language for document in DOCUMENTS for block in blocks(document)}
    assert languages <= {"sh", "python", "sql", "json", "jinja", "yaml", "text"}
    assert {(document, block.reason) for document in DOCUMENTS for block in blocks(document) if block.reason} == NOT_RUN


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_command_and_option_stands_in_a_document(program):
    text = "\n".join((ROOT / document).read_text() for document in DOCUMENTS)
    group = typer.main.get_command(importlib.import_module(PROGRAMS[program]).app)
    missing = []
    for name, command in group.commands.items():
        if f"{program} {name}" not in text:
            missing.append(name)
        for option in (each for parameter in command.params for each in parameter.opts if each.startswith("--")):
            if option != "--help" and not re.search(rf"--(no-)?{option[2:]}(?![\w-])", text):
                missing.append(f"{name} {option}")
    assert missing == []


def test_every_relation_stands_in_sql_md(store_folder):
    text = (ROOT / "knowledge_store/SQL.md").read_text()
    store = KnowledgeStore.open(store_folder)
    for relation in store.sql("SHOW TABLES")["name"].to_pylist():
        assert f"| `{relation}` |" in text
        columns = store.sql(f"DESCRIBE {relation}")["column_name"].to_pylist()
        if relation in ("positions", "candidates", "tokens"):
            assert [name for name in columns if f"`{name}`" not in text] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document):
    folder = (ROOT / document).parent
    links = re.findall(r"\]\(([^)#\s]+)", (ROOT / document).read_text())
    assert [link for link in links if not link.startswith("https://") and not (folder / link).exists()] == []


def test_the_readme_quotes_committed_figures():
    def figures(name: str):
        return json.loads((ROOT / "benchmarks" / name).read_text())["figures"]

    text = (ROOT / "README.md").read_text()
    size = figures("results/size.json")["teachers"][0]
    default = figures("results/size-default.json")["teachers"][0]
    assert default["draw_weight"] == DRAW_WEIGHT and f"**{default['bytes_per_position_with_draws']:.1f} bytes**" in text
    ratio = 4 * default["vocabulary_size"] / default["bytes_per_position_with_draws"]
    assert f", {ratio:,.0f} times smaller than float32 logits; " in text
    assert f"{size['bytes_per_position']:.1f} bytes without both, {size['ratio']:,} times (" in text
    layouts = [value for name, value in size["per_k"]["5"].items() if name != "knowledge-store"]
    assert f"{min(layouts):.1f} to {max(layouts):.1f} bytes" in text
    rows = figures("studies/fidelity.json")["table"]
    [way] = [row for row in rows if (row["experiment"], row["arm"]) == ("fine-tuned, one pass", "top-5, τ = 0.05")]
    assert f"**{100 * way['way']:.1f} ± {100 * way['way_sd']:.1f} %**" in text
    judged = figures("results/quantised_copies.json")
    dumped, copy = judged["original"]["store, top-50"], judged["copies"]["SmolLM2-135M-Instruct.Q4_K_M.gguf"]
    kl, low, high = copy["store, top-50"]["kl_less_the_original"]
    dense = judged["original"]["base file"]["bytes"] / judged["positions"]
    assert (
        f"**{dumped['bytes'] / dumped['positions']:.1f} bytes** to judge" in text and f"in 16 bits take {dense:,.0f};" in text
    )
    assert f"{kl:.3f} ± {(high - low) / 2:.3f}, exactly {copy['exact']['kl']:.3f} " in text
    steps = figures("results/training.json")["vocabularies"]["32,768"]["methods"]
    assert f"**{steps['store, sliced']['step_seconds_against_cross_entropy']:.2f}** of the time" in text
    assert f"{steps['online']['step_seconds_against_cross_entropy']:.1f} times as long" in text
    [points] = [
        claim["points"]
        for claim in figures("studies/trust.json")["claims"]
        if (claim["student"], claim["method"], claim["where"]) == ("whole", "candidates + draws", "all four")
        and (claim["baseline"], claim["metric"]) == ("over fine-tuning", "ece")
    ]
    assert f"**{-points[0]:.0f} points** less calibration error" in text
    assert f"({-points[2]:.1f} to {-points[1]:.1f}; two seeds;" in text


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 190

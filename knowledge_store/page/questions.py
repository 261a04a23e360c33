"""Questions that people have of a store, as the SQL that answers them. The page runs them, and shows them in its SQL box."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from knowledge_store.errors import InputError
from knowledge_store.sql.quoting import identifier, literal

LISTED = 100  # rows of a list
FEWEST = 20  # targets of a document, below which its mean says little
DRAWN = 40  # bars of a picture


@dataclass(frozen=True)
class Asked:
    """What a question is about.

    Attributes:
        dump: the dump; empty for all.
        keeps_entropy: whether the dump has `teacher_entropy`.
        column: a column of the corpus; text: what is searched for; other: another dump, or a file of a student's positions.
        judged: the columns of the student's file.
        knows_tokens: whether the dump says how likely each token was that stands there; an import may not.
        field: of the column, as SQL, where dumps have it in several types; empty where they do not.
    """

    dump: str = ""
    keeps_entropy: bool = True
    column: str = ""
    text: str = ""
    other: str = ""
    judged: tuple[str, ...] = ()
    knows_tokens: bool = True
    field: str = ""

    @property
    def value(self) -> str:
        """The values of the column, as SQL."""
        return self.field or identifier(self.column)

    def of_dump(self, relation: str = "") -> str:
        """The condition that a row is of the dump."""
        return f"{relation}dump = {literal(self.dump)}"

    @property
    def surprise(self) -> str:
        """How much a token surprised the teacher; where that is not kept, how much at least: it is no candidate."""
        if self.knows_tokens:
            return "-token_logprob"
        return "-coalesce(token_logprob, least(tail_logprob, candidate_logprobs[-1]))"

    @property
    def surprise_name(self) -> str:
        """The name of that in an answer."""
        return "surprise" if self.knows_tokens else "surprise_at_least"

    @property
    def divergence(self) -> str:
        """The student's divergence: the whole one where the file has it."""
        return "kl" if "kl" in self.judged else "kl_lower_bound"


@dataclass(frozen=True)
class Question:
    """A question that the page offers.

    Attributes:
        title: as a person asks it. words: what its answer means, in a sentence or two.
        needs: what it takes: a field of `Asked` that is not empty, `positions`, `student` or `dumps`.
        sql: makes its statement.
        picture: the column whose values are labels of bars, and the columns that are drawn as bars; empty for a table alone.
    """

    title: str
    words: str
    needs: tuple[str, ...]
    sql: Callable[[Asked], str]
    picture: tuple[str, ...] = ()


# What an answer says stands before where it is: on a narrow screen, the first columns are seen.
def _unsure(asked: Asked) -> str:
    measure = "teacher_entropy" if asked.keeps_entropy else "exp(tail_logprob)"
    name = "entropy" if asked.keeps_entropy else "tail"
    more = ", round(exp(tail_logprob), 3) AS tail" if asked.keeps_entropy else ""
    return f"""SELECT token_text, round({measure}, 3) AS {name}{more}, round(exp(token_logprob), 4) AS probability,
       dump, sequence_id, position
FROM positions
WHERE {asked.of_dump()} AND is_target AND {measure} IS NOT NULL
ORDER BY {measure} DESC
LIMIT {LISTED}"""


def _surprised(asked: Asked) -> str:
    return f"""SELECT token_text, round({asked.surprise}, 2) AS {asked.surprise_name},
       round(exp(candidate_logprobs[1]), 3) AS likeliest, dump, sequence_id, position
FROM positions
WHERE {asked.of_dump()} AND is_target
ORDER BY {asked.surprise} DESC
LIMIT {LISTED}"""


def _garbled(asked: Asked) -> str:
    return f"""SELECT round(avg({asked.surprise}), 3) AS {asked.surprise_name}, round(avg(exp(tail_logprob)), 3) AS tail,
       count(*) AS targets, file, row, dump, min(sequence_id) AS sequence_id
FROM positions JOIN sequences USING (dump, sequence_id)
WHERE {asked.of_dump()} AND is_target
GROUP BY dump, file, row
HAVING count(*) >= {FEWEST}
ORDER BY avg({asked.surprise}) DESC
LIMIT {LISTED}"""


def _by_column(asked: Asked) -> str:
    entropy = "round(avg(teacher_entropy), 3) AS entropy, " if asked.keeps_entropy else ""
    return f"""SELECT {asked.value} AS {identifier(asked.column)}, count(*) AS targets,
       round(avg({asked.surprise}), 3) AS {asked.surprise_name}, {entropy}round(avg(exp(tail_logprob)), 4) AS tail,
       round(1 - avg(exp(tail_logprob)), 4) AS coverage
FROM positions JOIN sequences USING (dump, sequence_id)
WHERE {asked.of_dump()} AND is_target
GROUP BY ALL
ORDER BY {asked.surprise_name} DESC
LIMIT {DRAWN}"""


def _tails(asked: Asked) -> str:
    return f"""SELECT CAST(least(floor(20 * exp(tail_logprob)), 19) AS INTEGER) / 20 AS tail_from, count(*) AS positions,
       round(avg({asked.surprise}), 3) AS {asked.surprise_name}
FROM positions
WHERE {asked.of_dump()} AND tail_logprob IS NOT NULL
GROUP BY ALL
ORDER BY ALL"""


def _text(asked: Asked) -> str:
    found = f"instr(lower(text), lower({literal(asked.text)}))"
    return f"""SELECT substring(text, greatest({found} - 60, 1), {len(asked.text) + 160}) AS text, dump, sequence_id
FROM (SELECT dump, sequence_id, string_agg(token_text, '' ORDER BY position) AS text
      FROM positions WHERE {asked.of_dump()} GROUP BY dump, sequence_id)
WHERE {found} > 0
ORDER BY sequence_id
LIMIT {LISTED}"""


def _value(asked: Asked) -> str:
    return f"""SELECT {asked.value} AS {identifier(asked.column)}, file, row, length, targets, dump, sequence_id
FROM sequences
WHERE {asked.of_dump()} AND contains(lower(CAST({asked.value} AS VARCHAR)), lower({literal(asked.text)}))
ORDER BY sequence_id
LIMIT {LISTED}"""


def _student(asked: Asked) -> str:
    student, kl = identifier(asked.other), f"student.{asked.divergence}"
    agrees = ", student.agrees" if "agrees" in asked.judged else ""
    # Another dump may have had the name when the student was judged.
    token = ", token_id" if "token_id" in asked.judged else ""
    return f"""SELECT positions.token_text, round({kl}, 3) AS {asked.divergence},
       round(exp(token_logprob), 4) AS teacher, round(exp(student.logprob), 4) AS student{agrees}, dump, sequence_id, position
FROM positions JOIN {student} AS student USING (dump, sequence_id, position{token})
WHERE {asked.of_dump()}
ORDER BY {kl} DESC
LIMIT {LISTED}"""


def _student_documents(asked: Asked) -> str:
    student, kl = identifier(asked.other), f"student.{asked.divergence}"
    return f"""SELECT round(avg({kl}), 3) AS {asked.divergence}, round(avg(-student.logprob), 3) AS student_surprise,
       count(*) AS targets, file, row, student.dump, min(student.sequence_id) AS sequence_id
FROM {student} AS student JOIN sequences USING (dump, sequence_id)
WHERE {asked.of_dump("student.")}
GROUP BY student.dump, file, row
ORDER BY avg({kl}) DESC
LIMIT {LISTED}"""


def _teachers(asked: Asked) -> str:
    return f"""SELECT one.token_text, round(abs(one.token_logprob - other.token_logprob), 3) AS difference,
       round(exp(one.token_logprob), 4) AS {identifier(asked.dump)},
       round(exp(other.token_logprob), 4) AS {identifier(asked.other)}, one.dump, one.sequence_id, one.position
FROM positions AS one
     JOIN positions AS other ON other.sequence_id = one.sequence_id AND other.position = one.position
     JOIN sequences AS text ON text.dump = one.dump AND text.sequence_id = one.sequence_id
     JOIN sequences AS same ON same.dump = other.dump AND same.sequence_id = other.sequence_id
          AND same.token_hash = text.token_hash
WHERE {asked.of_dump("one.")} AND other.dump = {literal(asked.other)} AND one.is_target
      AND one.token_logprob IS NOT NULL AND other.token_logprob IS NOT NULL
ORDER BY abs(one.token_logprob - other.token_logprob) DESC
LIMIT {LISTED}"""


QUESTIONS: Mapping[str, Question] = {
    "unsure": Question(
        "Where is the teacher unsure?",
        "Positions with the most entropy (nats) first: many tokens could come there. The tail is the probability of all tokens"
        " that are no candidates.",
        ("positions",),
        _unsure,
    ),
    "garbled": Question(
        "Which documents look garbled?",
        f"Rows of the corpus with at least {FEWEST} targets, those that surprise the teacher most first: tables, noise, the"
        " wrong language, mislabelled rows. Surprise is the mean of −ln p of the tokens (nats); where an import has no p of"
        " some, what it is at least, since the candidates and their tail bound p.",
        ("positions",),
        _garbled,
    ),
    "student": Question(
        "Where does my student differ most?",
        "Positions with the largest divergence of the student from the teacher (nats) first; beside it, the probability that"
        " each gave to the token of the text.",
        ("positions", "student"),
        _student,
    ),
    "student-documents": Question(
        "In which documents does my student differ most?",
        "Rows of the corpus by the student's mean divergence from the teacher (nats), the largest first.",
        ("student",),
        _student_documents,
    ),
    "surprised": Question(
        "What surprises the teacher most?",
        "Targets to which the teacher gave the least probability, and how sure it was of another token.",
        ("positions",),
        _surprised,
    ),
    "teachers": Question(
        "Where do two teachers differ most?",
        "Targets of the sequences that two dumps both have, token for token, by the difference of their log-probabilities of"
        " the token (nats), and the probability that each gave to it.",
        ("positions", "dumps"),
        _teachers,
    ),
    "column": Question(
        "How do parts of the corpus differ?",
        "Means over the targets of each value of a column of the corpus: surprise and entropy in nats, the probability of the"
        f" tail, and that of the candidates (coverage). Of more values than {DRAWN}, those that surprise most.",
        ("positions", "column"),
        _by_column,
        ("", "surprise", "surprise_at_least", "entropy", "tail", "coverage"),
    ),
    "tails": Question(
        "How much do the candidates leave over?",
        "How many positions have a tail of a probability from this value on, in twentieths, and how much the text surprises the"
        " teacher there (nats).",
        ("positions",),
        _tails,
        ("tail_from", "positions", "surprise", "surprise_at_least"),
    ),
    "text": Question(
        "Which sequences contain a text?",
        "Sequences whose tokens, one after the other, contain the text; capitals do not count.",
        ("positions", "text"),
        _text,
    ),
    "value": Question(
        "Which sequences have a value in a column?",
        "Sequences whose value of the column contains the text; capitals do not count.",
        ("column", "text"),
        _value,
    ),
}


def statement(name: str, asked: Asked) -> str:
    """The SQL of a question.

    Raises:
        InputError: there is no such question, or it lacks what it is about.
    """
    if name not in QUESTIONS:
        raise InputError(f"there is no question {name!r}: the page asks {', '.join(QUESTIONS)}")
    question = QUESTIONS[name]
    fields = {"column": asked.column, "text": asked.text, "student": asked.other, "dumps": asked.other}
    lacking = [need for need in question.needs if not fields.get(need, True)]
    if lacking:
        raise InputError(f"the question {question.title!r} takes {' and '.join(lacking)}: choose one")
    return question.sql(asked)

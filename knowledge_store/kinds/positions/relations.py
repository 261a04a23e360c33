"""The SQL relations of predictions: `positions`, with the text of each token and the teacher's entropy, and `candidates`."""

from knowledge_store.kinds.kind import Repeated

# −Σ q ln q over the candidates, and t · (H − ln t) of a tail of probability t and entropy H.
ENTROPY = """
            CASE WHEN rows.candidate_ids IS NOT NULL THEN
                CASE WHEN isinf(coalesce(rows.tail_logprob, 0)) THEN 0
                     ELSE exp(coalesce(rows.tail_logprob, 0)) * (rows.tail_entropy - coalesce(rows.tail_logprob, 0)) END
                - coalesce(list_sum(list_transform(rows.candidate_logprobs, lambda x: exp(x) * x)), 0) END"""


def positions_relation(keeps_entropy: bool) -> str:
    """The relation `positions` of a dump that keeps the entropy of tails, or of one that does not."""
    return f"""
        SELECT {{dump}} AS dump, rows.*, texts.list[CAST(rows.token_id AS BIGINT) + 1] AS token_text,
            CAST({ENTROPY if keeps_entropy else "NULL"} AS FLOAT) AS teacher_entropy
        FROM {{rows}} AS rows, {{texts}} AS texts"""


RELATIONS = {
    "candidates": """
        SELECT dump, sequence_id, "position", rank, token_id, texts.list[CAST(token_id AS BIGINT) + 1] AS token_text, logprob
        FROM (SELECT {dump} AS dump, sequence_id, "position",
                     CAST(generate_subscripts(candidate_ids, 1) AS INTEGER) AS rank,
                     unnest(candidate_ids) AS token_id,
                     unnest(candidate_logprobs) AS logprob
              FROM {rows}) AS ranked, {texts} AS texts""",
}

# A condition on positions may name `rank` and `logprob` of a candidate, and all of one as `candidates.NAME`.
EACH_CANDIDATE = Repeated(
    ("rank", "logprob", "candidates"),
    """
    SELECT * EXCLUDE (each_id), {'rank': rank, 'token_id': each_id, 'logprob': logprob} AS candidates
    FROM (SELECT *, CAST(generate_subscripts(candidate_ids, 1) AS INTEGER) AS rank,
                 unnest(candidate_ids) AS each_id, unnest(candidate_logprobs) AS logprob
          FROM {rows})""",
)

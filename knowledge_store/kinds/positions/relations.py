"""The SQL relations of predictions: `positions`, with the text of each token, and `candidates`, one row for each candidate."""

from knowledge_store.kinds.kind import Repeated

RELATIONS = {
    "positions": """
        SELECT {dump} AS dump, rows.*, texts.list[CAST(rows.token_id AS BIGINT) + 1] AS token_text
        FROM {rows} AS rows, {texts} AS texts""",
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

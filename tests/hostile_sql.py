"""Hostile SQL, by name: what strangers may try against a store, and where they try it (`lay_bait`).

`REFUSED` must raise an error. `BOMBS` must raise one, or be answered, within their limits. `HARMLESS` look hostile and may be
answered: nothing of what lies outside the store may be in the answer. In all of them, {store} is the store's folder, {outside}
the folder that it is in, which is the working folder too, and {secret} a file there. `WORDS` is what no answer may contain.
"""

from __future__ import annotations

import shutil
from pathlib import Path

WORDS = "the butler did it"

READERS = {
    "read_text": "SELECT content FROM read_text('{secret}.txt')",
    "read_blob": "SELECT content FROM read_blob('{secret}.txt')",
    "read_csv": "SELECT * FROM read_csv('{secret}.csv')",
    "read_csv_auto": "SELECT * FROM read_csv_auto(['{secret}.csv'], header = false)",
    "read_single_csv_file": "SELECT * FROM read_single_csv_file('{secret}.csv')",
    "read_json": "SELECT * FROM read_json('{secret}.json')",
    "read_ndjson_objects": "SELECT * FROM read_ndjson_objects('{secret}.json')",
    "read_parquet": "SELECT * FROM read_parquet('{secret}.parquet')",
    "parquet_scan": "SELECT * FROM parquet_scan('{secret}.parquet')",
    "parquet_metadata": "SELECT * FROM parquet_metadata('{secret}.parquet')",
    "parquet_file_metadata": "SELECT * FROM parquet_file_metadata('{secret}.parquet')",
    "parquet_full_metadata": "SELECT * FROM parquet_full_metadata('{secret}.parquet')",
    "parquet_kv_metadata": "SELECT * FROM parquet_kv_metadata('{secret}.parquet')",
    "parquet_schema": "SELECT * FROM parquet_schema('{secret}.parquet')",
    "parquet_bloom_probe": "SELECT * FROM parquet_bloom_probe('{secret}.parquet', 'a', 'x')",
    "read_duckdb": "SELECT * FROM read_duckdb('{secret}.duckdb')",
    "sniff_csv": "SELECT * FROM sniff_csv('{secret}.csv')",
    "glob": "SELECT * FROM glob('{outside}/*')",
    "glob of everything": "SELECT * FROM glob('**')",
    "glob of the store": "SELECT * FROM glob('{store}/*')",
    "read_text of a glob": "SELECT content FROM read_text('{outside}/*.txt')",
    "read_text of a list": "SELECT content FROM read_text(['{secret}.txt', '{store}/store.json'])",
    "bare Parquet file": "SELECT * FROM '{secret}.parquet'",
    "bare CSV file": "FROM '{secret}.csv'",
    "bare JSON file": 'SELECT * FROM "{secret}.json"',
    "bare DuckDB file": "SELECT * FROM '{secret}.duckdb'",
    "bare glob": "SELECT * FROM '{outside}/*.parquet'",
    "quoted name is a file": 'SELECT * FROM "{secret}.parquet" AS positions',
    "store's own file": "SELECT * FROM read_text('{store}/store.json')",
    "store's own shard": "SELECT * FROM '{store}/small/positions/00000.parquet'",
    "in-memory database's name": "SELECT content FROM read_text(':memory:')",
    "in-memory database's name, spelt out": "SELECT content FROM read_text('{outside}/:memory:')",
    "in-memory database's name, as blob": "SELECT content FROM read_blob('./:memory:')",
    "in-memory database's log": "SELECT content FROM read_text(':memory:.wal')",
    "temporary folder": "SELECT content FROM read_text('.tmp/secret.txt')",
    "empty path": "SELECT content FROM read_text('')",
    "symbolic link": "SELECT content FROM read_text('{outside}/link.txt')",
    "symbolic link in the store": "SELECT content FROM read_text('{store}/link.txt')",
    "symbolic link to a folder": "SELECT content FROM read_text('{store}/up/secret.txt')",
    "dots": "SELECT content FROM read_text('{store}/../secret.txt')",
    "dots in the middle": "SELECT content FROM read_text('{store}/small/../../secret.txt')",
    "file: URL": "SELECT content FROM read_text('file://{secret}.txt')",
    "path in capitals": "SELECT content FROM READ_TEXT('FILE:///{secret}.txt')",
    "password file": "SELECT content FROM read_text('/etc/passwd')",
    "environment of the process": "SELECT content FROM read_blob('/proc/self/environ')",
    "memory of the process": "SELECT * FROM read_csv('/proc/self/maps')",
    "standard input": "SELECT * FROM read_csv('/dev/stdin')",
    "endless device": "SELECT * FROM read_blob('/dev/zero')",
    "computed path": "SELECT content FROM read_text('{secret}' || '.txt')",
    "path from a query": "SELECT content FROM read_text((SELECT '{secret}.txt'))",
    "lateral path": "SELECT * FROM (VALUES ('{secret}.txt')) t(path), read_text(path)",
    "in a common table expression": "WITH x AS (SELECT content FROM read_text('{secret}.txt')) SELECT * FROM x",
    "in a subquery": "SELECT (SELECT content FROM read_text('{secret}.txt'))",
    "in EXISTS": "SELECT count(*) FROM dumps WHERE EXISTS (FROM read_text('{secret}.txt'))",
    "in a union": "SELECT dump FROM dumps UNION ALL SELECT content FROM read_text('{secret}.txt')",
    "in a join": "SELECT * FROM sequences POSITIONAL JOIN read_text('{secret}.txt')",
    "in DESCRIBE": "DESCRIBE SELECT * FROM read_parquet('{secret}.parquet')",
    "in SUMMARIZE": "SUMMARIZE SELECT * FROM '{secret}.parquet'",
    "in PIVOT": "PIVOT (SELECT * FROM read_csv('{secret}.csv')) ON column0",
    "DESCRIBE of a file": "DESCRIBE '{secret}.parquet'",
    "SUMMARIZE of a file": "SUMMARIZE '{secret}.parquet'",
    "by query": "FROM query('SELECT content FROM read_text(''{secret}.txt'')')",
    "by query_table": "FROM query_table('{secret}.parquet')",
    "by serialised SQL": "FROM json_execute_serialized_sql(json_serialize_sql('FROM read_text(''{secret}.txt'')'))",
    "by way of comments": "SELECT/**/content/*;*/FROM--\nread_text/**/(/**/'{secret}.txt')",
    "by its full name": "SELECT content FROM system.main.read_text('{secret}.txt')",
    "method call": "SELECT content FROM ('{secret}.txt').read_text()",
    "website": "SELECT content FROM read_text('https://example.org')",
    "bare website": "SELECT * FROM 'https://example.org/x.parquet'",
    "bucket": "SELECT * FROM read_parquet('s3://bucket/x.parquet')",
    "Hugging Face": "SELECT * FROM 'hf://datasets/a/b/x.parquet'",
}

WRITERS = {
    "COPY": "COPY dumps TO '{outside}/out.csv'",
    "COPY of a query": "COPY (SELECT 1) TO '{outside}/out.parquet' (FORMAT parquet)",
    "COPY over a shard": "COPY (SELECT 1) TO '{store}/small/positions/00000.parquet'",
    "COPY to standard output": "COPY dumps TO '/dev/stdout'",
    "COPY FROM": "COPY dumps FROM '{secret}.csv'",
    "COPY FROM DATABASE": "COPY FROM DATABASE memory TO other",
    "COPY of a pivot": "COPY (PIVOT dumps ON dump USING count(*)) TO '{outside}/out.csv'",
    "EXPLAIN COPY": "EXPLAIN COPY dumps TO '{outside}/out.csv'",
    "EXPLAIN ANALYZE COPY": "EXPLAIN ANALYZE COPY dumps TO '{outside}/out.csv'",
    "EXPLAIN ANALYZE COPY, formatted": "EXPLAIN (ANALYZE, FORMAT json) COPY (SELECT 1) TO '{outside}/out.csv'",
    "EXPLAIN ANALYZE COPY of a pivot": "EXPLAIN ANALYZE COPY (PIVOT dumps ON dump) TO '{outside}/out.csv'",
    "comment before EXPLAIN ANALYZE": "/* SELECT */ EXPLAIN ANALYZE COPY dumps TO '{outside}/out.csv'",
    "EXPORT": "EXPORT DATABASE '{outside}/out'",
    "IMPORT": "IMPORT DATABASE '{outside}'",
    "ATTACH": "ATTACH '{outside}/out.duckdb'",
    "ATTACH what is there": "ATTACH '{secret}.duckdb' AS other (READ_ONLY)",
    "ATTACH in memory": "ATTACH ':memory:' AS other",
    "DETACH": "DETACH memory",
    "USE": "USE store_tables",
    "INSTALL": "INSTALL httpfs",
    "INSTALL from a path": "INSTALL '{outside}/evil.duckdb_extension'",
    "LOAD": "LOAD httpfs",
    "LOAD from a path": "LOAD '{outside}/evil.duckdb_extension'",
    "FORCE INSTALL": "FORCE INSTALL spatial FROM community",
    "UPDATE EXTENSIONS": "UPDATE EXTENSIONS",
    "autoloaded function": "SELECT ST_Area(ST_GeomFromText('POINT(1 2)'))",
    "autoloaded table function": "SELECT * FROM sqlite_scan('{secret}.duckdb', 't')",
    "autoloaded spreadsheet": "SELECT * FROM read_xlsx('{secret}.xlsx')",
    "autoloaded sheet by its name": "FROM '{secret}.xlsx'",
    "PRAGMA": "PRAGMA database_list",
    "PRAGMA with a value": "PRAGMA memory_limit = '100GB'",
    "profiling to a file": "PRAGMA profile_output = '{outside}/profile.json'",
    "SET": "SET enable_external_access = true",
    "SET GLOBAL": "SET GLOBAL allowed_directories = ['{outside}']",
    "SET the limit": "SET memory_limit = '100GB'",
    "SET the temporary folder": "SET temp_directory = '{outside}'",
    "SET the home": "SET home_directory = '{outside}'",
    "SET search path for files": "SET file_search_path = '{outside}'",
    "SET VARIABLE": "SET VARIABLE x = (SELECT content FROM read_text('{secret}.txt'))",
    "RESET": "RESET memory_limit",
    "unlock": "SET lock_configuration = false",
    "query log": "SET log_query_path = '{outside}/log.sql'",
    "logging": "FROM enable_logging(storage = 'file', storage_config = {{'path': '{outside}/log'}})",
    "logging by CALL": "CALL enable_logging('QueryLog')",
    "profiling as a function": "FROM enable_profiling(save_location = '{outside}/profile')",
    "CALL": "CALL pragma_version()",
    "INSERT": "INSERT INTO positions VALUES (1)",
    "INSERT in WITH": "WITH x AS (INSERT INTO store_tables.dumps VALUES (1) RETURNING *) SELECT * FROM x",
    "DELETE in WITH": "WITH x AS (DELETE FROM dumps RETURNING *) SELECT * FROM x",
    "UPDATE in WITH": "WITH x AS (UPDATE dumps SET dump = 'x' RETURNING *) SELECT * FROM x",
    "COPY in WITH": "WITH x AS (COPY dumps TO '{outside}/out.csv') SELECT 1",
    "COPY in WITH, read": "WITH x AS (COPY (SELECT 1) TO '{outside}/out.parquet' (FORMAT parquet)) SELECT * FROM x",
    "COPY in WITH, materialised": "WITH x AS MATERIALIZED (COPY dumps TO '{outside}/out.csv') FROM x",
    "COPY in WITH in a subquery": "SELECT * FROM (WITH x AS (COPY dumps TO '{outside}/out.csv') SELECT 1)",
    "COPY in WITH over a shard": "WITH x AS (COPY dumps TO '{store}/small/positions/00000.parquet') SELECT 1",
    "COPY FROM in WITH": "WITH x AS (COPY store_tables.dumps FROM '{secret}.csv') SELECT 1",
    "INSERT in WITH, not read": "WITH x AS (INSERT INTO store_tables.dumps VALUES (1)) SELECT 1",
    "DELETE in WITH, not read": "WITH x AS (DELETE FROM dumps) SELECT 1",
    "UPDATE in WITH, not read": "WITH x AS (UPDATE dumps SET dump = 'x') SELECT 1",
    "MERGE in WITH": "WITH x AS (MERGE INTO dumps USING shards ON true WHEN MATCHED THEN DELETE) SELECT 1",
    "CREATE TABLE in WITH": "WITH x AS (CREATE TABLE mine AS SELECT 1) SELECT 1",
    "ATTACH in WITH": "WITH x AS (ATTACH '{outside}/out.duckdb') SELECT 1",
    "SET in WITH": "WITH x AS (SET enable_external_access = true) SELECT 1",
    "UPDATE": "UPDATE sequences SET length = 0",
    "DELETE": "DELETE FROM positions",
    "TRUNCATE": "TRUNCATE positions",
    "MERGE": "MERGE INTO dumps USING shards ON true WHEN MATCHED THEN DELETE",
    "DROP": "DROP VIEW positions",
    "ALTER": "ALTER TABLE dumps ADD COLUMN x INTEGER",
    "COMMENT ON": "COMMENT ON VIEW positions IS 'mine'",
    "CREATE TABLE": "CREATE TABLE mine AS SELECT 1",
    "CREATE TEMP TABLE": "CREATE TEMP TABLE mine AS SELECT content FROM read_text('{secret}.txt')",
    "CREATE TABLE of a pivot": "CREATE TABLE mine AS PIVOT dumps ON dump",
    "CREATE VIEW": "CREATE OR REPLACE VIEW positions AS SELECT 1",
    "CREATE MACRO": "CREATE MACRO f() AS TABLE FROM read_text('{secret}.txt')",
    "CREATE SECRET": "CREATE PERSISTENT SECRET s (TYPE s3)",
    "CREATE SEQUENCE": "CREATE SEQUENCE s",
    "CREATE by query": "FROM query('CREATE TABLE mine AS SELECT 1')",
    "SELECT INTO": "SELECT * INTO mine FROM dumps",
    "CHECKPOINT": "CHECKPOINT",
    "VACUUM": "VACUUM",
    "BEGIN": "BEGIN",
    "COMMIT": "COMMIT",
    "PREPARE": "PREPARE p AS SELECT 1",
    "EXECUTE": "EXECUTE p",
    "two statements": "SELECT 1; SELECT 2",
    "two statements, the second writes": "SELECT 1; COPY dumps TO '{outside}/out.csv'",
    "two statements, a comment between": "SELECT 1 /* ; */ ; -- \n COPY dumps TO '{outside}/out.csv'",
    "pivot and another": "PIVOT dumps ON dump USING count(*); COPY dumps TO '{outside}/out.csv'",
    "rollback and write": "ROLLBACK; CREATE TABLE mine AS SELECT 1",
}

INTRUDERS = {
    "environment": "SELECT getenv('HOME')",
    "Python variable": "SELECT * FROM python_variable",
    "Python variable, quoted": 'SELECT * FROM "python_variable"',
    "Python variable by its scan": "SELECT * FROM pandas_scan(python_variable)",
    "pointers": "SELECT * FROM arrow_scan(1, 2, 3)",
    "pointers of nothing": "SELECT * FROM arrow_scan(NULL, NULL, NULL)",
    "pointers from numbers": "SELECT * FROM arrow_scan(140000000000000::UBIGINT::POINTER, 0::POINTER, 0::POINTER)",
    "scan without a table": "SELECT * FROM seq_scan()",
    "Python function": "SELECT * FROM python_map_function((SELECT 1))",
    "extensions that are there": "SELECT * FROM duckdb_extensions()",
    "another database": "SELECT * FROM other.main.positions",
    "parameter": "SELECT $1",
    "error of one's own": "SELECT error('mine')",
    "half a character": "SELECT '\udcff'",
    "no SQL": "SELCT 1",
    "nothing": "",
    "a comment": "-- nothing",
    "no end": "SELECT 'no end",
    "a NUL": "SELECT \x00 FROM read_text('{secret}.txt')",
}

REFUSED = {**READERS, **WRITERS, **INTRUDERS}

HARMLESS = {
    "settings": "SELECT name, value FROM duckdb_settings()",
    "databases": "SELECT * FROM duckdb_databases()",
    "secrets": "SELECT * FROM duckdb_secrets()",
    "which_secret": "SELECT * FROM which_secret('s3://x', 's3')",
    "temporary files": "SELECT * FROM duckdb_temporary_files()",
    "logs": "SELECT * FROM duckdb_logs()",
    "writing a log": "SELECT write_log('x')",
    "views": "SELECT sql FROM duckdb_views()",
    "variables": "SELECT getvariable('x')",
    "own query": "SELECT current_query()",
    "a path taken apart": "SELECT parse_path('{secret}.txt')",
    "checkpoint": "SELECT * FROM checkpoint()",
    "seed": "SELECT setseed(0.5)",
    "name of a file as text": "SELECT '{secret}.txt' AS \"read_text('x')\"",
    "comments": "/* COPY */ SELECT 1 -- ; COPY dumps TO '{outside}/out.csv'",
    "semicolons": "SELECT 'a;b' AS \"c;d\";;",
    "pivot": "PIVOT sequences ON truncated USING count(*) GROUP BY dump",
    "pivot in WITH": "WITH p AS (PIVOT sequences ON length USING count(*) GROUP BY dump) SELECT * FROM p",
    "own common table named as a relation": "WITH positions AS (SELECT 1) SELECT * FROM positions",
    "deep brackets": "SELECT " + "(" * 500 + "1" + ")" * 500,
    "many columns": "SELECT " + ", ".join(str(number) for number in range(2000)),
}

# Many rows: DuckDB looks at its limits between them.
ROW_BOMBS = {
    "cross join": "SELECT count(*) FROM range(1000000) a, range(1000000) b, range(1000000) c WHERE a.range + b.range = c.range",
    "cross join of the store": f"SELECT count(p0.dump) FROM {', '.join(f'positions p{n}' for n in range(9))}",
    "endless recursion": "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT max(n) FROM t",
    "doubling recursion": "WITH RECURSIVE t(s) AS (SELECT 'x' UNION ALL SELECT s || s FROM t) SELECT max(length(s)) FROM t",
    "branching recursion": "WITH RECURSIVE t AS (SELECT 1 AS n UNION ALL SELECT n + m FROM t, range(9) r(m)) FROM t",
    "string gathered": "SELECT string_agg(repeat('x', 1000000), '') FROM range(100000000)",
    "list gathered": "SELECT list(range) FROM range(100000000000)",
    "endless rows": "SELECT * FROM range(100000000000000)",
    "endless rows, repeated": "SELECT * FROM repeat('x', 10000000000000)",
    "endless wide rows": "SELECT repeat('x', 10000) FROM range(100000000000000)",
    "series of series": "SELECT * FROM generate_series(1, 1000000000) a, generate_series(1, 1000000000) b",
    "endless groups": "SELECT range % 1000000007, count(*) FROM range(100000000000) GROUP BY 1",
    "endless order": "SELECT * FROM range(10000000000) ORDER BY hash(range)",
    "endless distinct": "SELECT count(DISTINCT range::VARCHAR) FROM range(10000000000)",
    "endless window": "SELECT sum(range) OVER (ORDER BY hash(range)) FROM range(10000000000)",
    "large histogram": "SELECT histogram(range) FROM range(10000000000)",
    "sleep": "SELECT sleep_ms(100000000)",
    "sleep as elsewhere": "SELECT pg_sleep(100000)",
}

# Long expressions, or deep ones: DuckDB looks at nothing until they are done.
EXPRESSION_BOMBS = {
    "long string": "SELECT repeat('x', 2000000000)",
    "long string, hidden": "SELECT length(repeat('x', 1000000000 + (random() * 5)::BIGINT))",
    "padded string": "SELECT lpad('x', 2147483647, 'y')",
    "printed string": "SELECT printf('%2000000000d', 1)",
    "formatted string": "SELECT format('{{:>2000000000}}', 'x')",
    "string replaced": "SELECT replace(repeat('a', 60000), 'a', repeat('b', 60000))",
    "string hashed": "SELECT sha256(repeat('x', 1500000000))",
    "string of strings": "SELECT repeat(repeat('x', 1000000), 4000)",
    "strings compared": "SELECT levenshtein(repeat('a', 400000), repeat('b', 400000))",
    "strings compared, with memory": "SELECT damerau_levenshtein(repeat('a', 100000), repeat('b', 100000))",
    "long list": "SELECT list_sum(range(1000000000))",
    "long list answered": "SELECT range(100000000)",
    "list sorted": "SELECT list_sort(range(300000000))",
    "list reduced": "SELECT list_reduce(range(100000000), lambda x, y: x + y)",
    "list of lists": "SELECT flatten(list_transform(range(50000), lambda x: range(50000)))",
    "list in a list": (
        "SELECT list_transform(range(10000000), lambda x: list_sum(list_transform(range(10000), lambda y: y * x)))"
    ),
    "list resized": "SELECT array_resize([1], 1000000000)",
    "list unrolled": "SELECT count(*) FROM (SELECT unnest(range(1000000000)))",
    "pattern": "SELECT regexp_replace(repeat('a', 50000000), '(a|aa)+$', 'b', 'g')",
    "pattern of counts": "SELECT regexp_matches(repeat('a', 100000), '((a{{0,100}}){{0,100}}){{0,100}}b')",
    "pattern splits": "SELECT regexp_split_to_array(repeat('a ', 100000000), ' ')",
    "dates": "SELECT strptime(repeat('1', 100000000), repeat('%Y', 1000000))",
    "JSON": "SELECT json_extract(repeat('[', 100000000), '$')",
    "JSON, nested": "SELECT (repeat('[', 1000000) || repeat(']', 1000000))::JSON",
    "pivot of many": "PIVOT (FROM range(100000000)) ON range",
    "deeper brackets": "SELECT " + "(" * 200000 + "1" + ")" * 200000,
    "deep sum": "SELECT " + "1+" * 100000 + "1",
    "deep subqueries": "SELECT * FROM " + "(SELECT * FROM " * 3000 + "dumps" + ")" * 3000,
    "many common tables": (
        "WITH t0 AS (SELECT 1 AS n)"
        + "".join(f", t{i} AS (SELECT a.n FROM t{i - 1} a, t{i - 1} b UNION ALL FROM t{i - 1})" for i in range(1, 30))
        + " SELECT count(*) FROM t29"
    ),
    "bits": "SELECT bit_count(repeat('1', 1000000000)::BIT)",
    "large numbers": "SELECT list_product(list_transform(range(100000000), lambda x: x::DOUBLE))",
}

BOMBS = {**ROW_BOMBS, **EXPRESSION_BOMBS}


def lay_bait(outside: Path) -> None:
    """Put files with WORDS in them where the attempts look for some; the store is outside/store."""
    import duckdb
    import pyarrow as pa
    import pyarrow.parquet as pq

    (outside / ".tmp").mkdir()
    for name in ("secret.txt", "secret.csv", ":memory:", ":memory:.wal", ".tmp/secret.txt"):
        (outside / name).write_text(f"{WORDS}\n")
    (outside / "secret.json").write_text(f'{{"who": "{WORDS}"}}\n')
    pq.write_table(pa.table({"who": [WORDS]}), outside / "secret.parquet")
    with duckdb.connect(str(outside / "secret.duckdb")) as connection:
        connection.execute("CREATE TABLE t AS SELECT ? AS who", [WORDS])
    shutil.copy(outside / "secret.txt", outside / "secret.xlsx")
    (outside / "link.txt").symlink_to(outside / "secret.txt")
    (outside / "store/link.txt").symlink_to(outside / "secret.txt")
    (outside / "store/up").symlink_to(outside)


def filled_in(sql: str, outside: Path) -> str:
    """An attempt against the store outside/store."""
    if "{" not in sql:
        return sql
    return sql.format(store=outside / "store", outside=outside, secret=outside / "secret")


def standing(outside: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder there: its size and when it was changed."""
    return {
        str(path.relative_to(outside)): (status.st_size, status.st_mtime_ns)
        for path in outside.rglob("*")
        for status in [path.lstat()]
    }

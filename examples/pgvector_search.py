"""Search the bundled corpus with PostgreSQL and pgvector.

It needs a server. With Docker:

    docker run --rm -d --name pgvector -p 5432:5432 -e POSTGRES_PASSWORD=gircse pgvector/pgvector:pg17
    pip install gircse "psycopg[binary]" pgvector
    python examples/pgvector_search.py "how fast do nerves send signals?"
    docker stop pgvector

Another server is named by DATABASE_URL; the role must be allowed to CREATE EXTENSION vector.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.resources import files

import psycopg
from pgvector.psycopg import register_vector
from psycopg.sql import SQL

from gircse import GIRCSE

DATABASE_URL = os.environ.get("DATABASE_URL", "postgresql://postgres:gircse@localhost:5432/postgres")
INSTRUCTION = "Given a question, retrieve sentences that answer it"
NUM_STEPS = 2  # K, the same for documents and queries
SENTENCES = 60


def main(question: str) -> None:
    """Fill a table and ask it."""
    lines = files("gircse").joinpath("data/demo_corpus.jsonl").read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line) for line in lines[:SENTENCES]]
    with psycopg.connect(DATABASE_URL) as connection:
        connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        register_vector(connection)
        model = GIRCSE()
        vectors = model.encode_document(
            [document["text"] for document in documents], num_steps=NUM_STEPS, normalize_embeddings=True
        )
        connection.execute("DROP TABLE IF EXISTS gircse_sentences")
        table = SQL("CREATE TABLE gircse_sentences (id text PRIMARY KEY, body text, topic text, embedding vector({}))")
        connection.execute(table.format(vectors.shape[1]))
        with connection.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO gircse_sentences VALUES (%s, %s, %s, %s)",
                [
                    (document["id"], document["text"], document["topic"], vector)
                    for document, vector in zip(documents, vectors, strict=True)
                ],
            )
        # <=> is cosine distance. HNSW indexes take up to 2,000 dimensions; beyond that use halfvec (up to 4,000).
        connection.execute("CREATE INDEX ON gircse_sentences USING hnsw (embedding vector_cosine_ops)")
        query = model.encode_query(question, instruction=INSTRUCTION, num_steps=NUM_STEPS, normalize_embeddings=True)
        rows = connection.execute(
            "SELECT 1 - (embedding <=> %s), id, body FROM gircse_sentences ORDER BY embedding <=> %s LIMIT 3",
            (query, query),
        )
        for similarity, key, body in rows:
            print(f"{similarity:.3f}  {key}  {body}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "how fast do nerves send signals?")

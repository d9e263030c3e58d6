"""Search the bundled corpus with Qdrant in local mode: no server, nothing to start.

pip install gircse qdrant-client
python examples/qdrant_local.py "how fast do nerves send signals?"
"""

from __future__ import annotations

import json
import sys
from importlib.resources import files

from qdrant_client import QdrantClient, models

from gircse import GIRCSE

INSTRUCTION = "Given a question, retrieve sentences that answer it"
NUM_STEPS = 2  # K, the same for documents and queries
SENTENCES = 60


def main(question: str) -> None:
    """Index, ask, and ask again among the sentences of one topic."""
    lines = files("gircse").joinpath("data/demo_corpus.jsonl").read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line) for line in lines[:SENTENCES]]
    model = GIRCSE()
    vectors = model.encode_document(
        [document["text"] for document in documents], num_steps=NUM_STEPS, normalize_embeddings=True
    )

    client = QdrantClient(":memory:")  # or path="folder", or url="http://localhost:6333"
    client.create_collection(
        "sentences",
        vectors_config=models.VectorParams(size=vectors.shape[1], distance=models.Distance.COSINE),
    )
    client.upsert(
        "sentences",
        [
            models.PointStruct(id=number, vector=vector.tolist(), payload=document)
            for number, (document, vector) in enumerate(zip(documents, vectors, strict=True))
        ],
    )

    query = model.encode_query(question, instruction=INSTRUCTION, num_steps=NUM_STEPS, normalize_embeddings=True)
    health = models.Filter(must=[models.FieldCondition(key="topic", match=models.MatchValue(value="health"))])
    for title, condition in (("all topics", None), ("health only", health)):
        print(title)
        found = client.query_points("sentences", query=query.tolist(), query_filter=condition, limit=3).points
        for point in found:
            assert point.payload is not None
            print(f"  {point.score:.3f}  {point.payload['id']}  {point.payload['text']}")
    client.close()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "how fast do nerves send signals?")

"""An index for a program: asked by meaning, by words or by both, ranked again with more steps on request, and changed.

Knows the table, the manifest and how ranks are merged; knows no terminal. A document's score is that of its best chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from gircse.checksum import vectors_checksum
from gircse.errors import GircseError, UsageError
from gircse.search import DEFAULT_CANDIDATES, SearchMode
from gircse.search.corpus import DocumentList
from gircse.search.index import IndexSummary, embed_chunks, index_corpus, remove_documents
from gircse.search.manifest import IndexSettings, Manifest
from gircse.search.rerank import embed_query
from gircse.search.settings import choose_settings
from gircse.search.table import ChunkTable, files_in_words

if TYPE_CHECKING:
    from gircse.model import GIRCSE

RRF_CONSTANT = 60
"""k of reciprocal rank fusion, score = sum of 1 / (k + rank) (Cormack, Clarke and Buettcher, SIGIR 2009)."""


@dataclass(frozen=True)
class SearchHit:
    """A document (or chunk) found.

    Attributes:
        document_id: Of the document.
        chunk_id: Of its best chunk.
        score: What it is ranked by: cosine similarity, BM25, or the sum of reciprocal ranks.
        similarity: Cosine similarity of that chunk to the query; None where no vector was made.
        text: Of that chunk.
        metadata: Of the document, without nulls.
    """

    document_id: str
    chunk_id: str
    score: float
    similarity: float | None
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


class SearchIndex:
    """An index that `gircse index` or `create` made. It may stay open: every search sees the last update.

    Args:
        folder: The index.
        model: Embeds queries; must be the one that embedded the documents. Not needed for ``mode="text"``.

    Raises:
        UsageError: There is no index.
        GircseError: The model is another one, or the index is damaged.

    Example:
        >>> index = SearchIndex.create("wiki.index", GIRCSE(), [{"id": "plants", "text": "Plants eat light."}])
        >>> index.search("how do plants eat?", top=3, where="language = 'English'")
    """

    def __init__(self, folder: str | Path, model: GIRCSE | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        with files_in_words(self.folder):
            self.table = ChunkTable.open(self.folder)
        self.model: GIRCSE | None = None
        self._model_fits: IndexSettings | None = None
        if model is not None:
            self.use_model(model)

    def use_model(self, model: GIRCSE) -> None:
        """Embed queries with this model from now on.

        Raises:
            GircseError: It is not the one that embedded the documents, or its vectors have another length.
        """
        settings = self.manifest.settings
        if vectors_checksum(model.encoder) != settings.model_checksum:
            name = settings.model or "another version of the model that ships with gircse"
            raise GircseError(
                f"{self.folder} was made with {name}, whose weights are not those of the model given; "
                "search with that model, or index the corpus again with --overwrite"
            )
        if model.get_embedding_dimension() != settings.dimension:
            raise GircseError(
                f"{self.folder} holds vectors of {settings.dimension} numbers, and this model's have "
                f"{model.get_embedding_dimension()}; set its truncate_dim, or index the corpus again with --overwrite"
            )
        self.model, self._model_fits = model, settings

    @classmethod
    def create(
        cls,
        folder: str | Path,
        model: GIRCSE,
        documents: Iterable[Mapping[str, Any]],
        *,
        overwrite: bool = False,
        **choices: Any,
    ) -> SearchIndex:
        """Make an index of documents in memory; `gircse index` makes one of a file.

        Args:
            folder: Of the index.
            model: Embeds documents, and queries.
            documents: Mappings with an ``id`` and a ``text``; all other keys are metadata.
            overwrite: Replace an index that is there.
            **choices: As `gircse.search.settings.choose_settings` takes them: ``instruction``, ``num_steps``,
                ``chunk_tokens``, ``chunk_overlap``, ``text_language``.

        Raises:
            UsageError: There is an index already, or a choice is out of range.
            InputDataError: A document lacks its text or its id, or an id occurs twice.
        """
        folder = Path(folder)
        if Manifest.find(folder) is not None and not overwrite:
            raise UsageError(f"{folder} is there already; open it by SearchIndex(folder, model), or overwrite it")
        settings = choose_settings(model, None, id_column="id", **choices)
        index_corpus(model, DocumentList(documents), folder, settings, overwrite=overwrite)
        return cls(folder, model)

    def add(self, documents: Iterable[Mapping[str, Any]]) -> IndexSummary:
        """Put documents in, and in the place of those with the same ids; what has not changed is not embedded again.

        Args:
            documents: As `create` takes them.

        Raises:
            UsageError: The index has row numbers for ids.
            InputDataError: A document lacks its text or its id, or an id occurs twice.
            GircseError: There is no model, or another run is at work on the index.
        """
        if self.model is None:
            raise GircseError("adding documents needs the model: SearchIndex(folder, model)")
        self.manifest = Manifest.read(self.folder)
        if self._model_fits != self.manifest.settings:  # the index was made anew since
            self.use_model(self.model)
        settings = self.manifest.settings
        return index_corpus(self.model, DocumentList(documents), self.folder, settings, keep_others=True)

    def remove(self, ids: Iterable[str]) -> int:
        """Take documents out; how many of them were there."""
        return remove_documents(self.folder, ids)

    def search(
        self,
        query: str,
        *,
        mode: SearchMode = "hybrid",
        top: int = 10,
        where: str | None = None,
        instruction: str | None = None,
        num_steps: int | None = None,
        chunks: bool = False,
        exact: bool = False,
        rerank_steps: int | None = None,
        candidates: int = DEFAULT_CANDIDATES,
    ) -> list[SearchHit]:
        """The best documents, best first.

        Args:
            query: What is asked.
            mode: What decides the rank; ``hybrid`` is ``vector`` until the index has its full-text part, at its end.
            top: So many at most.
            where: An SQL condition over metadata columns, ``document_id`` and ``text``.
            instruction: Of the query; the model's ``query`` prompt where not given.
            num_steps: K; only that of the index is taken, because vectors of another K would rank worse silently.
            chunks: One hit a chunk instead of one a document.
            exact: Compare every vector even where there is an approximate index.
            rerank_steps: Rank the candidates again by vectors made with so many steps.
            candidates: Chunks that are ranked again, and the depth of both rankings in hybrid search.

        Raises:
            UsageError: An argument is out of range, `where` is not understood, or K is not that of the index.
            GircseError: There is no model, the index has been made anew with another one, ``mode="text"`` is asked of
                an index that lacks its full-text part yet, or a file of the index cannot be read.
        """
        self.check(query, where, num_steps)
        if mode not in get_args(SearchMode):
            raise UsageError(f"mode must be one of {', '.join(get_args(SearchMode))}, not {mode!r}")
        if top < 1 or candidates < 1:
            raise UsageError(f"top and candidates must be 1 or more, not {top} and {candidates}")
        if mode == "text" and rerank_steps is None:
            vector, prompt = None, None
        else:
            if self.model is None:
                raise GircseError("search by meaning needs the model: SearchIndex(folder, model)")
            if self._model_fits != self.manifest.settings:  # the index was made anew since
                self.use_model(self.model)
            prompt = self._query_prompt(instruction)
            vector = embed_query(self.model, query, prompt, self.manifest.settings.num_steps)
        key = "chunk_id" if chunks else "document_id"
        depth = top if mode != "hybrid" and rerank_steps is None else max(candidates, top)
        with files_in_words(self.folder):
            by = key if rerank_steps is None else "chunk_id"
            rows = self._candidates(query, vector, mode, depth, where, exact, key=by)
            if by != key and len(_best(rows, key)) < top:  # chunks of one long document may be all candidates
                more = self._candidates(query, vector, mode, top, where, exact, key=key)
                rows = _best([*rows, *more], by)
        if rerank_steps is not None:
            rows = _best(self._reranked(query, prompt, rows, rerank_steps), key)
        return [self._hit(row) for row in rows[:top]]

    def check(self, query: str, where: str | None = None, num_steps: int | None = None) -> None:
        """Refuse what `search` would refuse, before a model is loaded for it.

        Raises:
            UsageError: The query is empty, `where` is not understood, K is not that of the index, or the index is gone.
        """
        if not query.strip():
            raise UsageError("the query is empty; give a text")
        self.manifest = Manifest.read(self.folder)
        made = self.manifest.settings.num_steps
        if num_steps is not None and num_steps != made:
            raise UsageError(
                f"{self.folder} was made with {made} refinement steps, not {num_steps}; leave --num-steps out, use "
                f"--rerank-steps {num_steps}, or index the corpus again with --num-steps {num_steps} --overwrite"
            )
        if where is not None:
            with files_in_words(self.folder):
                self.table.check_where(where)

    def _query_prompt(self, instruction: str | None) -> str | None:
        assert self.model is not None, "checked by the caller"
        return self.model.prompts.get("query") if instruction is None else self.model.format_instruction(instruction)

    def _candidates(
        self,
        query: str,
        vector: np.ndarray | None,
        mode: SearchMode,
        count: int,
        where: str | None,
        exact: bool,
        key: str,
    ) -> list[dict[str, Any]]:
        def by_vector(limit: int) -> list[dict[str, Any]]:
            assert vector is not None, "only text search goes without"
            return self.table.vector_search(vector, limit, where, exact=exact)

        def by_text(limit: int) -> list[dict[str, Any]]:
            return self.table.text_search(query, limit, where, vector)

        if not self.table.count_chunks():
            return []
        if mode == "vector" or (mode == "hybrid" and not self.table.has_text_index):
            return [{**row, "score": row["similarity"]} for row in _deep_enough(by_vector, count, key)]
        if mode == "text":
            return [{**row, "score": row["bm25"]} for row in _deep_enough(by_text, count, key)]
        return fuse([_deep_enough(by_vector, count, key), _deep_enough(by_text, count, key)], key)

    def _reranked(
        self, query: str, prompt: str | None, rows: list[dict[str, Any]], num_steps: int
    ) -> list[dict[str, Any]]:
        if not rows:
            return []
        assert self.model is not None, "checked by the caller"
        vector = embed_query(self.model, query, prompt, num_steps)
        texts = [row["text"] for row in rows]
        scores = embed_chunks(self.model, texts, self.manifest.settings, num_steps) @ vector
        ranked = [{**row, "score": float(s), "similarity": float(s)} for row, s in zip(rows, scores, strict=True)]
        return sorted(ranked, key=lambda row: -row["score"])

    def _hit(self, row: dict[str, Any]) -> SearchHit:
        return SearchHit(
            row["document_id"], row["chunk_id"], row["score"], row.get("similarity"), row["text"], row["metadata"]
        )


def fuse(rankings: Sequence[Sequence[dict[str, Any]]], key: str) -> list[dict[str, Any]]:
    """Reciprocal rank fusion: rows by the sum of 1 / (k + rank) over the rankings; the first ranking's row is kept."""
    scores: dict[str, float] = {}
    rows: dict[str, dict[str, Any]] = {}
    for ranking in rankings:
        for rank, row in enumerate(ranking, start=1):
            scores[row[key]] = scores.get(row[key], 0.0) + 1 / (RRF_CONSTANT + rank)
            rows.setdefault(row[key], row)
    return [{**rows[name], "score": scores[name]} for name in sorted(scores, key=lambda name: -scores[name])]


def _best(rows: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The first row of every document."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(row[key], row)
    return list(found.values())


def _deep_enough(fetch: Callable[[int], list[dict[str, Any]]], count: int, key: str) -> list[dict[str, Any]]:
    """The best row of each of `count` documents, however many chunks of one document come first."""
    limit = count
    while True:
        rows = fetch(limit)
        best = _best(rows, key)
        if len(best) >= count or len(rows) < limit:
            return best[:count]
        limit *= 4

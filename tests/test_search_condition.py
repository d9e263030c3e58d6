"""Conditions of a search: taken as they are written, or refused; never in part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gircse.errors import UsageError
from gircse.search.condition import in_parentheses
from gircse.search.table import Chunk, ChunkTable

pytest.importorskip("lancedb")

TOPICS = ("a", "it's", "x) OR (y", "b; -- /* $ ?", '"`', "\\", "")
ROWS = [{"year": 2018 + n % 3, "topic": topic} for n, topic in enumerate(TOPICS * 2)]
Condition = tuple[str, Callable[[dict[str, Any]], bool]]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ChunkTable:
    columns: Any = {"year": "int64", "topic": "string", "2020_total": "int64"}
    table = ChunkTable.create(tmp_path_factory.mktemp("table"), 1, columns)
    table.add([Chunk(str(n), 0, "", "words", row) for n, row in enumerate(ROWS)], np.ones((len(ROWS), 1)))
    return table


def found(table: ChunkTable, where: str) -> set[int]:
    rows = table.vector_search(np.ones(1, dtype=np.float32), len(ROWS), where, exact=True)
    return {int(row["document_id"]) for row in rows}


def by_year(operator: str, year: int) -> Condition:
    compare = {"=": int.__eq__, "<": int.__lt__, ">=": int.__ge__}[operator]
    return f"year {operator} {year}", lambda row: compare(row["year"], year)


def by_topic(topics: list[str]) -> Condition:
    quoted = ["'" + topic.replace("'", "''") + "'" for topic in topics]
    return f"`topic` IN ({', '.join(quoted)})", lambda row: row["topic"] in topics


def joined(operator: str, a: Condition, b: Condition) -> Condition:
    if operator == "and":
        return f"({a[0]}) and {b[0]}", lambda row: a[1](row) and b[1](row)
    return f"({a[0]} OR {b[0]})", lambda row: a[1](row) or b[1](row)


SIMPLE = st.one_of(
    st.builds(by_year, st.sampled_from(["=", "<", ">="]), st.integers(2017, 2021)),
    st.builds(by_topic, st.lists(st.sampled_from(TOPICS), min_size=1, max_size=3)),
)
CONDITIONS = st.recursive(
    SIMPLE, lambda inner: st.builds(joined, st.sampled_from(["and", "or"]), inner, inner), max_leaves=4
)
GLUE = st.sampled_from([" ", " ORR ", ") AND (", "; ", " -- ", " /* ", ", ", " AND ) OR ( ", "\n", ") ", " 'x' ", "$$"])
few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@few
@given(CONDITIONS)
def test_a_condition_finds_the_rows_that_it_describes(table: ChunkTable, condition: Condition) -> None:
    where, holds = condition
    table.check_where(where)
    assert found(table, where) == {number for number, row in enumerate(ROWS) if holds(row)}


@few
@given(CONDITIONS, GLUE, CONDITIONS)
def test_two_conditions_that_nothing_joins_are_refused(
    table: ChunkTable, first: Condition, glue: str, second: Condition
) -> None:
    where = first[0] + glue + second[0]
    for ask in (table.check_where, lambda where: found(table, where)):
        with pytest.raises(UsageError) as caught:
            ask(where)
        assert str(caught.value).startswith(f"--where {where!r}: ")


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("year = 2018 topic = 'a'", "it is whole before 'topic'; join conditions by AND or OR; metadata columns: year"),
        ("year = 2018; topic = 'a'", "';' can only stand in quotes"),
        ("year = 2018) AND (topic = 'a'", "its parentheses do not match"),
        ("(year = 2018", "its parentheses do not match"),
        ("topic = 'a", "a quote is not closed"),
        ("topic = n'a'", "a string stands in plain quotes"),
        ("year = ?", r"'\?' can only stand in quotes"),
        ("year =", "Expected: an expression, found: its end"),
        ("", "Expected: an expression, found: its end"),
        ("2020_total = 1", "it is whole before '_total'; .* columns: year, topic, `2020_total` .in backticks"),
        ("colour = 1", "No field named colour; metadata columns: year, topic, `2020_total`"),
    ],
)
def test_what_is_wrong_is_said(table: ChunkTable, where: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        table.check_where(where)


def test_a_name_that_begins_with_a_digit_stands_in_backticks(table: ChunkTable) -> None:
    assert found(table, "`2020_total` IS NULL") == set(range(len(ROWS)))
    assert in_parentheses("topic LIKE'a%'") == "(topic LIKE'a%')"

"""Tables: cells where their row and column are, order of numbers, counts."""

from __future__ import annotations

from random import Random

from qwen2vl.synth.compositing.layers import Text
from qwen2vl.synth.documents import DocumentSample, sample_table
from qwen2vl.synth.spec import Mixture
from tests.synth.documents.drawings import assert_text_is_whole, facts_of, samples


def grid_of(sample: DocumentSample) -> list[list[str]]:
    """Return the text of the cells by their places in the picture, header first."""
    titles = {fact.answer for fact in facts_of(sample, "table_title")}
    texts = [layer for layer in sample.picture.layers if isinstance(layer, Text)]
    rows = sorted({layer.y for layer in texts})
    grid = [
        [one.text for one in sorted((t for t in texts if t.y == y), key=lambda one: one.x)]
        for y in rows
    ]
    return [row for row in grid if row[0] not in titles or len(row) > 1]


def test_text_is_neither_cut_nor_covered() -> None:
    for sample in samples(sample_table, 60):
        assert_text_is_whole(sample.picture)


def test_cells_are_in_their_row_and_column() -> None:
    for sample in samples(sample_table, 60):
        head, *rows = grid_of(sample)
        assert 2 <= len(rows) <= 6 and 2 <= len(head) <= 5
        lower = [name.lower() for name in head]
        by_label = {row[0].lower(): row for row in rows}
        assert len(by_label) == len(rows)
        for fact in facts_of(sample, "table_cell"):
            label, column = (field.lower() for field in fact.fields)
            assert by_label[label][lower.index(column)] == fact.answer
        for fact in facts_of(sample, "table_row_of"):
            column = lower.index(fact.fields[1].lower())
            assert [row[0] for row in rows if row[column] == fact.fields[0]] == [fact.answer]
        for task, row in (("table_first", rows[0]), ("table_last", rows[-1])):
            for fact in facts_of(sample, task):
                assert row[lower.index(fact.fields[0].lower())] == fact.answer


def test_counts_header_and_rows() -> None:
    for sample in samples(sample_table, 40):
        head, *rows = grid_of(sample)
        answers = {fact.task: fact.answer for fact in sample.facts}
        assert answers["table_rows"] == str(len(rows))
        assert answers["table_columns"] == str(len(head))
        assert answers["table_header"] == ", ".join(head)
        read = [fact.answer for fact in facts_of(sample, "read_table_row")]
        assert read == [" ".join(row) for row in rows]


def test_numbers_are_compared_as_numbers() -> None:
    answers = []
    for sample in samples(sample_table, 80):
        head, *rows = grid_of(sample)
        lower = [name.lower() for name in head]
        for task, pick in (("table_largest", max), ("table_smallest", min)):
            for fact in facts_of(sample, task):
                column = lower.index(fact.fields[0].lower())
                assert pick(rows, key=lambda row: int(row[column]))[0] == fact.answer
        for fact in facts_of(sample, "table_larger"):
            a, b, name = (field.lower() for field in fact.fields)
            column = lower.index(name)
            values = {row[0].lower(): int(row[column]) for row in rows}
            assert fact.answer == ("yes" if values[a] > values[b] else "no")
            answers.append(fact.answer)
    assert 0.35 < answers.count("yes") / len(answers) < 0.65


def test_pictures_that_are_too_small_have_no_table() -> None:
    mixture = Mixture(fonts="bundled", picture_side=(28, 40))
    assert sample_table(Random(1), mixture) is None

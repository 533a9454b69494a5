"""Near duplicates and overlap against exhaustive comparison."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

pytest.importorskip("datasketch", reason="datasketch is not installed: pip install 'peftkern[data]'")

from peftkern.finetune.errors import InputError  # noqa: E402
from peftkern.transfer.data.duplicates import bands, jaccard, near_duplicates, shingles, words  # noqa: E402
from peftkern.transfer.data.overlap import overlap  # noqa: E402

pytestmark = pytest.mark.any_isa


def texts(count: int = 60, seed: int = 0) -> list[str]:
    """Texts of 40 to 80 random words."""
    draw = random.Random(seed)
    return [" ".join(f"w{draw.randrange(500)}" for _ in range(draw.randrange(40, 80))) for _ in range(count)]


def edited(text: str, changes: int, seed: int = 0) -> str:
    """The text with some words replaced."""
    draw, parts = random.Random(seed), text.split()
    for _ in range(changes):
        parts[draw.randrange(len(parts))] = "other"
    return " ".join(parts)


def with_copies() -> list[str]:
    plain = texts()
    return plain + [edited(text, index % 4, index) for index, text in enumerate(plain[:30])] + plain[:3]


def pairs(rows: list[str], threshold: float) -> Iterator[tuple[int, int]]:
    sets = [shingles(text) for text in rows]
    return ((i, j) for i in range(len(rows)) for j in range(i) if jaccard(sets[i], sets[j]) >= threshold)


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_no_pair_is_left_and_every_dropped_row_has_its_twin(threshold: float) -> None:
    rows = with_copies()
    found = near_duplicates(rows, threshold=threshold)
    sets = [shingles(text) for text in rows]
    dropped = {duplicate.row for duplicate in found.dropped}
    for duplicate in found.dropped:
        assert duplicate.kept not in dropped and len(rows[duplicate.kept]) >= len(rows[duplicate.row])
        assert duplicate.similarity == jaccard(sets[duplicate.row], sets[duplicate.kept]) >= threshold
    assert [pair for pair in pairs(rows, threshold) if not dropped & set(pair)] == []
    assert found.exact >= 3 and sum(map(len, found.clusters.values())) == len(dropped)
    assert f"of {len(rows)} rows" in found.verdict


def test_a_chain_does_not_take_out_what_resembles_nothing_that_stays() -> None:
    """B resembles A and C, but A and C do not resemble each other: of the three, two stay."""
    parts = [f"w{index}" for index in range(60)]
    rows = [" ".join(parts[start : start + 40]) for start in (0, 5, 10)]
    left, middle, right = map(shingles, rows)
    assert jaccard(left, middle) > 0.7 > jaccard(left, right)
    found = near_duplicates(rows, threshold=0.7)
    assert len(found.dropped) == 1


def test_candidates_are_found_with_the_probability_that_is_promised() -> None:
    for threshold in (0.3, 0.5, 0.8, 0.95):
        count, rows = bands(threshold)
        assert 1 - (1 - threshold**rows) ** count >= 0.99 and count * rows <= 256
    with pytest.raises(ValueError, match="threshold: got 0.001"):
        bands(0.001)


def test_similar_pairs_at_the_threshold_are_missed_in_no_more_than_a_few_percent() -> None:
    """Pairs just above 0.8, of 200; each is a candidate with 99 % or more."""
    draw = random.Random(1)
    missed = 0
    for trial in range(100):
        base = [f"t{trial}w{draw.randrange(10**6)}" for _ in range(120)]
        twin = base[:-13]  # 103 of 116 shingles
        rows = [" ".join(base), " ".join(twin)]
        assert 0.8 <= jaccard(*map(shingles, rows)) < 0.9
        missed += not near_duplicates(rows, threshold=0.8).dropped
    assert missed <= 3


def test_shingles() -> None:
    assert words("It's, say, 3 O'Clock!") == ["it", "s", "say", "3", "o", "clock"]
    assert shingles("a b c d e f") == {"a b c d e", "b c d e f"}
    assert shingles("A, b") == {"a b"} and shingles("...") == set()
    assert shingles("abc d", 3, "characters") == {"abc", "bc ", "c d"}
    assert jaccard(set(), set()) == 0.0 and jaccard({"a", "b"}, {"b", "c"}) == pytest.approx(1 / 3)


def test_rows_without_words_are_left_alone_and_languages_without_spaces_compared() -> None:
    assert near_duplicates(["...", "???", ""]).dropped == ()
    rows = ["これは同じ文章ですが少し違います", "これは同じ文章ですが少し違いますね"]
    assert not near_duplicates(rows).dropped
    assert near_duplicates(rows, size=3, unit="characters").dropped[0].kept == 1


def test_many_copies_are_compared_with_the_kept_one_only() -> None:
    base = " ".join(texts(4))
    rows = [base + " and its end", *(edited(base, 2, seed) for seed in range(300))]
    found = near_duplicates(rows)
    assert len(found.dropped) == 300 and found.candidates < 3 * len(rows)


def test_it_draws_itself_also_where_there_is_nothing() -> None:
    from matplotlib.figure import Figure

    for rows in (with_copies(), texts(5)):
        found = near_duplicates(rows)
        found.draw(Figure().add_subplot())
    assert "no near duplicates among 5 rows" in found.verdict


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "no rows to compare"),
        (["a"], {"threshold": 0}, "must be above 0 and at most 1"),
        (["a"], {"threshold": 1.2}, "must be above 0 and at most 1"),
        (["a"], {"unit": "letters"}, "got 5 letters"),
        (["a"], {"size": 0}, "got 0 words"),
    ],
)
def test_bad_input(rows: list[str], options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        near_duplicates(rows, **options)


# ---- overlap


def coverage(row: str, training: list[str], run: int) -> float:
    """By its definition, word for word."""
    seen = {tuple(words(text)[i : i + run]) for text in training for i in range(len(words(text)) - run + 1)}
    parts = words(row)
    marked = [
        any(tuple(parts[s : s + run]) in seen for s in range(max(0, i - run + 1), i + 1))
        for i in range(len(parts))
    ]
    return sum(marked) / len(parts)


def test_coverage_is_its_definition() -> None:
    training = texts(30)
    evaluation = [edited(text, index, index) for index, text in enumerate(training[:15])] + texts(5, seed=9)
    for run in (3, 13):
        found = overlap(training, evaluation, run=run)
        assert found.coverage == pytest.approx([coverage(row, training, run) for row in evaluation])


def test_which_rows_overlap() -> None:
    training, fresh = texts(20), texts(3, seed=5)
    evaluation = [training[7] + " and an end", *fresh, "A short line."]
    found = overlap([*training, "a SHORT line!"], evaluation)
    assert found.rows == (0, 4) and found.training == (7, 20)
    assert "2 of 5 evaluation rows" in found.verdict
    clean = overlap(training, fresh)
    assert clean.rows == clean.training == () and "none of 3 evaluation rows" in clean.verdict


def test_a_long_training_text_that_holds_an_evaluation_row() -> None:
    """Its Jaccard similarity is small, but the row was seen."""
    training = [" ".join(texts(30))]
    found = overlap(training, [texts(30)[12]])
    assert found.rows == (0,) and found.coverage[0] == 1.0
    from matplotlib.figure import Figure

    found.draw(Figure().add_subplot())


def test_bad_sides() -> None:
    with pytest.raises(InputError, match="rows on both sides"):
        overlap([], ["a"])
    with pytest.raises(InputError, match="got 0 and 0.5"):
        overlap(["a"], ["a"], run=0)

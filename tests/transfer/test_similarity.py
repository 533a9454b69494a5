"""The proxy A-distance on known shifts, and what it must not be fooled by: documents, dimensions, sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy.stats import norm

from peftkern.finetune.errors import InputError
from peftkern.transfer.features import Features
from peftkern.transfer.similarity import distance_by_depth, domain_similarity, proxy_a_distance

_QUICK = {"repeats": 2, "null_draws": 2}


def _draw(n: int, d: int, seed: int, shift: float = 0.0) -> np.ndarray:
    features = np.random.default_rng(seed).standard_normal((n, d))
    features[:, 0] += shift
    return features


def test_one_domain_is_its_null() -> None:
    distance = proxy_a_distance(_draw(300, 20, 0), _draw(300, 20, 1), **_QUICK)
    assert not distance.differs and distance.value < 0.3 and "cannot tell" in distance.verdict
    assert all(abs(value) < 0.5 for value in distance.null)


def test_domains_without_overlap_are_two_apart() -> None:
    distance = proxy_a_distance(_draw(200, 20, 0), _draw(200, 20, 1, shift=30), **_QUICK)
    assert distance.value == 2.0 and distance.differs and distance.verdict.startswith("the domains differ")


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_a_known_shift_gives_the_known_distance(kind: str) -> None:
    shift = 1.5  # of one of three dimensions: the best classifier errs by the normal tail beyond half of it
    wanted = 2 * (1 - 2 * norm.sf(shift / 2))
    distance = proxy_a_distance(_draw(1500, 3, 0), _draw(900, 3, 1, shift), kind=kind, **_QUICK)
    assert distance.rows == 900
    assert abs(distance.value - wanted) < 3 * distance.interval.se
    assert distance.interval.se < 0.1 and distance.differs


def test_documents_do_not_leak() -> None:
    def domain(seed: int) -> tuple[np.ndarray, np.ndarray]:
        documents = np.repeat(np.arange(24), 10)
        centres = 3 * _draw(24, 40, seed)
        return centres[documents] + 0.1 * _draw(240, 40, seed + 100), documents

    (source, ours), (target, theirs) = domain(0), domain(1)
    few = {"folds": 3, "repeats": 1, "null_draws": 2}
    leaking = proxy_a_distance(source, target, **few)
    grouped = proxy_a_distance(source, target, source_documents=ours, target_documents=theirs, **few)
    assert leaking.value > 1 > grouped.value and not grouped.differs


@pytest.mark.slow
def test_more_dimensions_than_rows_separate_nothing() -> None:
    distance = proxy_a_distance(_draw(60, 500, 0), _draw(60, 500, 1), **_QUICK)
    assert not distance.differs and distance.value < 1


def test_distances_by_depth() -> None:
    layers = np.stack([_draw(120, 4, 0), np.vstack([_draw(60, 4, 1), _draw(60, 4, 2, shift=30)])])
    found = distance_by_depth(Features({"mean": layers}, (0, 3)), 60, **_QUICK)
    assert found.keys() == {0, 3} and not found[0].differs and found[3].value == 2.0


def test_bad_input_is_named() -> None:
    few = np.repeat(np.arange(4), 10)
    with pytest.raises(InputError, match="target: there are 4 documents, fewer than the 10"):
        proxy_a_distance(_draw(40, 3, 0), _draw(40, 3, 1), target_documents=few)
    with pytest.raises(InputError, match="source: there are 3 documents for 40 rows"):
        proxy_a_distance(_draw(40, 3, 0), _draw(40, 3, 1), source_documents=[1, 2, 3])


def test_a_report_on_texts() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=128,
    )
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    rng = np.random.default_rng(0)

    def texts(words: list[str], n: int = 40) -> list[str]:
        return [" ".join(rng.choice(words, 12)) + "." for _ in range(n)]

    sea, hill = ["wave", "salt", "ship", "foam", "the", "a"], ["rock", "tree", "path", "crag", "the", "a"]
    report = domain_similarity(model, texts(sea), texts(hill), tokenizer=_Letters(), folds=3, **_QUICK)
    assert report.characters.value > 1.8 and report.characters.differs and not report.lengths.differs
    assert report.mmd.p_value < 0.05 and report.words.overlap == 0.0 and report.words.within_overlap == 1.0
    assert report.source_bits.value == pytest.approx(7, abs=0.3)  # of 128 letters by chance
    assert "A-distance, characters | " in report.table() and report.verdict in report.table()
    axes = Figure().subplots()
    report.draw(axes)
    assert "A-distance" in axes.get_title()
    same = domain_similarity(
        model,
        texts(sea),
        texts(sea),
        tokenizer=_Letters(),
        folds=3,
        bits=False,
        **_QUICK,
    )
    assert not same.features.differs and same.mmd.p_value > 0.01 and same.source_bits is None


class _Letters:
    """A tokenizer of one token a letter."""

    pad_token_id, eos_token_id = 0, 1

    def __call__(
        self,
        texts,
        *,
        max_length: int = 512,
        truncation: bool = False,
        return_tensors: str | None = None,
        **_: object,
    ):
        many = [texts] if isinstance(texts, str) else texts
        rows = [[ord(letter) % 128 for letter in text][: max_length if truncation else None] for text in many]
        return {"input_ids": torch.tensor(rows) if return_tensors else rows}

    def decode(self, ids, **_: object) -> str:
        return "".join(map(chr, ids.tolist()))

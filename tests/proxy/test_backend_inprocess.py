"""The backend in this process against transformers and NumPy."""

from __future__ import annotations

import pytest
import torch

import tiny_lm
from fedpeft.core.errors import ModelError, RequestError
from fedpeft.proxy.blackbox import Full, Labels, TopK
from fedpeft.proxy.inprocess import load_inprocess, tell
from fedpeft.proxy.tokenizers import fingerprint
from proxy.lent import CONTEXT, PADDED, TOKENIZER, VOCAB, large, prompts, reference

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}


def test_its_caps():
    caps = large().caps
    assert (caps.vocab, caps.full, caps.top_k, caps.block, caps.max_context) == (VOCAB, True, VOCAB, True, CONTEXT)
    assert caps.fingerprint == fingerprint(TOKENIZER) and caps.deterministic
    assert caps.identity != large("llama", 3).caps.identity != large("gpt2").caps.identity


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_are_log_probabilities_over_real_tokens(family):
    """Padding of the embedding matrix, of which the likeliest row may be one, is cut before the softmax."""
    texts = prompts()
    session = large(family).open(texts, Full())
    new = [[5, 6], [7, 8], [9, 10]]
    later = session.scores(new)
    for row, text in enumerate(texts):
        right = reference([*text, *new[row]], family).float()
        torch.testing.assert_close(session.first.values[row, 0], right[len(text) - 1], **TOLERANCE)
        torch.testing.assert_close(later.values[row], right[len(text) :], **TOLERANCE)
    assert later.values.shape == (3, 2, VOCAB) and later.ids is None and later.exact
    assert torch.equal(later.mass, torch.ones(3, 2)) and PADDED > VOCAB


def test_the_likeliest_and_labels():
    texts, labels = prompts(1), (9, 3, 40)
    full = large().open(texts, Full()).first
    top, own = large().open(texts, TopK(6)).first, large().open(texts, Labels(labels)).first
    for row in range(3):
        values = full.values[row, 0].tolist()
        ids = sorted(range(VOCAB), key=lambda i: (-values[i], i))[:6]
        assert top.ids is not None and top.ids[row, 0].tolist() == ids
        assert top.values[row, 0].tolist() == [values[i] for i in ids]
        assert own.values[row, 0].tolist() == [values[i] for i in labels]
        assert own.ids is not None and own.ids[row, 0].tolist() == list(labels)
        mass = sum(torch.tensor(values).double().exp()[ids]).item()
        assert float(top.mass[row, 0]) == pytest.approx(mass, abs=1e-6) and mass < 1


def test_golden_mass_and_ties():
    """Log-probabilities of (2, 1, 0): the two likeliest cover .909969. Of equal ones the lower id comes first."""
    told = tell(torch.tensor([[[2.0, 1.0, 0.0]]]), TopK(2))
    assert float(told.mass) == pytest.approx(0.909969, abs=1e-6)
    tied = tell(torch.tensor([[[1.0, 3.0, 3.0, 3.0, 0.0]]]), TopK(2))
    assert tied.ids is not None and tied.ids.tolist() == [[[1, 2]]]


def test_sessions_go_back_and_lose_rows():
    texts = prompts(2)
    session = large().open(texts, Full())
    session.scores([[5, 6, 7]] * 3)
    session.rollback(2)
    session.keep([2, 0])
    found = session.scores([[8], [9]])
    for row, (text, last) in enumerate(((texts[2], 8), (texts[0], 9))):
        torch.testing.assert_close(found.values[row, 0], reference([*text, 5, last])[-1].float(), **TOLERANCE)
    with pytest.raises(RequestError, match="cannot be taken back"):
        session.rollback(3)
    with pytest.raises(RequestError, match="cannot be kept"):
        session.keep([2])
    session.close()
    session.close()


def test_what_it_cannot_read_is_refused():
    for wrong, words in (
        ([[1] * (CONTEXT + 1)], f"reads {CONTEXT}"),
        ([[VOCAB]], f"token {VOCAB}"),
        ([[]], "no tokens"),
    ):
        with pytest.raises(RequestError, match=words):
            large().open(wrong, Full())
    session = large().open([[1] * CONTEXT], Full())
    with pytest.raises(RequestError, match=f"{CONTEXT + 1} tokens"):
        session.scores([[1]])


def test_a_folder_is_loaded_and_bfloat16_is_not_exact(tmp_path):
    folder = str(tiny_lm.save("llama", TOKENIZER, tmp_path / "causal", PADDED))
    exact, rough = load_inprocess(folder), load_inprocess(folder, "bfloat16", max_batch=2)
    assert exact.caps.identity.startswith(f"{folder}@") and exact.caps.vocab == VOCAB
    assert exact.caps.identity != rough.caps.identity and rough.caps.max_batch == 2
    texts = [[5, 6, 7]]
    first, other = exact.open(texts, Full()).first, rough.open(texts, Full()).first
    assert first.exact and not other.exact and other.values.dtype == torch.float32
    assert 0 < float((first.values - other.values).abs().max()) < 1


def test_a_model_that_does_not_continue_texts_is_refused(tmp_path):
    folder = str(tiny_lm.save("bert", tiny_lm.word_tokenizer(), tmp_path / "masked", 40))
    with pytest.raises(ModelError, match="family bert"):
        load_inprocess(folder)

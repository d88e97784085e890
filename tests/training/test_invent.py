"""Words for names: those of the evaluation are none of those of training."""

from training_cases import small_corpus, words_of


def test_heldout_words_are_no_training_words() -> None:
    corpus = small_corpus()
    given, held_out = set(words_of(corpus, False)), set(words_of(corpus, True))
    assert len(given) > 50
    assert not given & held_out

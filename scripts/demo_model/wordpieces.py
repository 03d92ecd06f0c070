"""A WordPiece vocabulary by byte-pair merging, written out because the `tokenizers` trainer breaks ties at random.

Two runs of that trainer give different vocabularies; this one depends on the text alone.
"""

import heapq
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from tokenizers import BertWordPieceTokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
N_CHARACTERS = 100  # the most frequent ones; words with others are left to [UNK]
MIN_WORD_COUNT = 2

Pair = tuple[str, str]


def train_tokenizer(texts: Sequence[str], size: int) -> BertWordPieceTokenizer:
    """A lower-casing WordPiece tokenizer with `size` pieces, the special ones first."""
    plain = BertWordPieceTokenizer(lowercase=True)
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in plain.pre_tokenizer.pre_tokenize_str(plain.normalizer.normalize_str(text)))
    vocabulary = merge_pieces(words, size - len(SPECIAL))
    return BertWordPieceTokenizer({piece: i for i, piece in enumerate((*SPECIAL, *vocabulary))}, lowercase=True)


def merge_pieces(counts: Counter[str], size: int) -> list[str]:
    """`size` pieces: the characters, then the most frequent pair of neighbours again and again (ties: by spelling)."""
    frequency: Counter[str] = Counter()
    for word, times in counts.items():
        frequency.update({character: word.count(character) * times for character in set(word)})
    ranked = sorted(frequency, key=lambda character: (-frequency[character], character))
    alphabet = set(ranked[:N_CHARACTERS])
    words = [(w, n) for w, n in sorted(counts.items()) if n >= MIN_WORD_COUNT and alphabet.issuperset(w)]
    spelled = [[word[0], *(f"##{character}" for character in word[1:])] for word, _ in words]
    vocabulary = dict.fromkeys(sorted({piece for pieces in spelled for piece in pieces}))

    totals: Counter[Pair] = Counter()
    places: dict[Pair, set[int]] = {}
    for index, pieces in enumerate(spelled):
        for pair in pairwise(pieces):
            totals[pair] += words[index][1]
            places.setdefault(pair, set()).add(index)
    heap = [(-total, pair) for pair, total in totals.items()]
    heapq.heapify(heap)
    while len(vocabulary) < size and heap:
        total, best = heapq.heappop(heap)
        if totals[best] != -total or not total:  # an outdated entry
            continue
        vocabulary[best[0] + best[1].removeprefix("##")] = None
        changed: set[Pair] = set()
        for index in places.pop(best):
            before, spelled[index] = spelled[index], _join(spelled[index], best)
            for pieces, sign in ((before, -1), (spelled[index], 1)):
                for pair in pairwise(pieces):
                    totals[pair] += sign * words[index][1]
                    changed.add(pair)
                    if sign > 0:
                        places.setdefault(pair, set()).add(index)
        for pair in sorted(changed):
            heapq.heappush(heap, (-totals[pair], pair))
    return list(vocabulary)


def _join(pieces: list[str], pair: Pair) -> list[str]:
    """`pieces` with every occurrence of `pair` as one piece, from the left."""
    joined: list[str] = []
    for piece in pieces:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece.removeprefix("##")
        else:
            joined.append(piece)
    return joined

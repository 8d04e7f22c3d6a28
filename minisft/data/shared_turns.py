"""One copy of what the turns of a conversation share.

A template that drops earlier reasoning (Qwen 3) makes a conversation of n answers n documents, each with everything before its
answer (chat/masks.py, strategy D). Together they are about n / 2 times as long as the conversation. But most of their tokens
are the same ones at the same positions, and a token's hidden state depends on the tokens before it only. So the documents
are laid out as a tree, in which a common beginning is there once:

    document 1    q1 r1 a1                        stream     q1 r1 a1 | a1 q2 r2 a2 | a2 q3 r3 a3
    document 2    q1 a1 q2 r2 a2                  position   0  1  2    1  2  3  4    4  5  6  7
    document 3    q1 a1 q2 a2 q3 r3 a3            parent        q1      q1            q2

q: a question, r a reasoning, a an answer. A piece is what a document adds to the one before it, and begins behind the last
token that both have. The keys of a token end where the first piece begins that leaves it out: those of r1 at a1 of
document 2, those of q1 with the whole tree. So the query at i sees the key at k <= i < end[k] if and only if k is among the
tokens before i in its own document. Loss and gradients are those of separate documents, up to rounding.

A window counts tokens of the stream, and pieces of other documents stand between a token and its past. So trees are not longer
than the shortest window of the model, in which they are seen as a whole. A state that is carried along the stream
(Mamba, linear attention) has one past; such a model cannot share at all. `longest_tree` (model/model_config.py) says which.
"""

from dataclasses import replace

import numpy as np

from minisft.data.cache import Documents, Turns
from minisft.data.documents import first_trained, rows_of


def may_share(documents: Documents) -> bool:
    """Whether a row has several documents, other than the answers of a preference."""
    row = rows_of(documents.cache)[documents.index]
    return documents.cache.role is None and bool(((row[1:] == row[:-1]) & (np.diff(documents.index) > 0)).any())


def share_turns(documents: Documents, limit: int | None) -> Documents:
    """The same documents in trees of at most `limit` tokens (None = any number), each a unit; unchanged if none shares a token.

    Documents of a row are in one tree if each begins like the one before it. If a source has its documents several times in an
    epoch, each time is a tree.
    """
    if not may_share(documents):
        return documents
    assert (np.diff(documents.index) >= 0).all()  # as in the cache
    # A document that comes twice is beside itself: the second time belongs to a second tree of its row.
    _, first, of = np.unique(documents.index, return_index=True, return_inverse=True)
    time = np.arange(len(documents)) - first[of]
    row, ids = rows_of(documents.cache)[documents.index], documents.cache.ids
    order = np.lexsort((documents.index, time, row))
    index, start, end = (column[order] for column in (documents.index, documents.start, documents.end))
    row, time = row[order], time[order]
    context = np.maximum(first_trained(documents.cache)[index] - start, 0)  # what a piece skips is not trained

    shared = np.zeros(len(index), dtype=np.int64)
    begins = np.ones(len(index), dtype=bool)  # which pieces begin a tree
    length = int(end[0] - start[0])  # of the tree so far
    for i in range(1, len(index)):
        own = int(end[i] - start[i])
        if row[i] == row[i - 1] and time[i] == time[i - 1]:
            most = min(own - 1, int(context[i]), int(end[i - 1] - start[i - 1]))
            differs = ids[start[i] : start[i] + most] != ids[start[i - 1] : start[i - 1] + most]
            common = int(differs.argmax()) if differs.any() else most
            if common and (limit is None or length + own - common <= limit):
                shared[i], begins[i] = common, False
                length += own - common
                continue
        length = own
    if not shared.any():
        return documents
    turns = Turns(np.append(np.flatnonzero(begins), len(index)), shared)
    targets = None if documents.num_targets is None else documents.num_targets[order]  # none is in what a piece skips
    return replace(documents, index=index, start=start, end=end, num_targets=targets, turns=turns)


def tree_bounds(begin: np.ndarray, first_position: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The row before the first token of each piece, int64 [N]; -1 for a piece at position 0. Corrects `end` [T] in place.

    begin [N+1]: piece i is tokens begin[i] : begin[i + 1]. first_position [N]: its first position; if not 0, that many
    tokens of the piece before it, with all that this one continues, come before it. end: the end of each token's tree.
    """
    parent = np.full(len(first_position), -1, dtype=np.int64)
    path: list[tuple[int, int, int]] = []  # what the last document consists of: (position, row, length) of each part
    for i in np.flatnonzero(first_position):
        position, row = int(first_position[i]), int(begin[i])
        if first_position[i - 1] == 0:
            path = [(0, int(begin[i - 1]), row - int(begin[i - 1]))]
        while path[-1][0] >= position:
            _, other, length = path.pop()
            end[other : other + length] = row
        at, other, length = path.pop()
        kept = position - at
        end[other + kept : other + length] = row
        path += [(at, other, kept), (position, row, int(begin[i + 1]) - row)]
        parent[i] = other + kept - 1
    return parent

"""How full rows become with the documents of a store."""

from emu3.data.store import Store
from emu3.data.stream import Rows, SourceSettings, StreamSettings

_WINDOWS = 8


def fill_of(store: Store, context: int, window: int, seed: int = 0) -> str:
    """In words: the share of full tokens in the rows of an epoch, or of its first windows."""
    settings = StreamSettings(
        sources=(SourceSettings(store=store.folder),), context=context, window=window
    )
    rows = Rows(settings, store.vocabulary, seed)
    windows = [rows.window(n).rows for n in range(min(_WINDOWS, -(-len(store) // window)))]
    packed = [row for window_rows in windows for row in window_rows]
    tokens = sum(piece.length for row in packed for piece in row)
    cut = sum(piece.start > 0 for row in packed for piece in row)
    left_out = f"; {rows.left_out:,} images and clips are longer" if rows.left_out else ""
    return (
        f"COUNTED: {len(packed):,} rows of {rows.room:,} tokens are "
        f"{tokens / len(packed) / rows.room:.2%} full; texts are cut {cut:,} times{left_out}"
    )

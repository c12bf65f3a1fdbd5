"""Text: its sources, documents and tokens, and the contexts packed from them."""

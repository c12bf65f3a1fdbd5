"""Text: where it comes from, its documents, its tokens, contexts packed from it."""

"""Text only: sources become documents, documents a pack, packs and turns a prompt. Never imports torch."""

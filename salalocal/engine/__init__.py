"""Token ids in, token ids out: loading, prefill, decoding and sampling over explicit states; knows no text."""

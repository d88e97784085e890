"""A conversation over a pack of documents: questions go in, events come out; for every face and for programs."""

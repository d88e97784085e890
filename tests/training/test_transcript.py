"""What a transcript knows about its ids: where names were asked, and which document a row is about."""

import numpy as np
import pytest
from training_cases import small_maker

from training.archive import ArchiveMaker, unique_paths
from training.score import answer_spans
from training.transcript import Prompt, Sample, Transcript, Turn


@pytest.fixture
def maker(seed: int) -> ArchiveMaker:
    return small_maker(seed)


def transcript_of(maker: ArchiveMaker, first: int = 1) -> Transcript:
    documents = unique_paths(maker.archive(1800, 4))
    prompt = Prompt(list(documents), *maker.prompt(documents, first=first), first)
    return Transcript(prompt, maker.tokenizer, 4000)


def text_at(maker: ArchiveMaker, sample: Sample, position: int) -> str:
    return maker.tokenizer.decode([int(sample.ids[position])])


def test_a_missing_name_is_copied_from_the_question(maker: ArchiveMaker) -> None:
    transcript = transcript_of(maker)
    name = "QUILLED_WOMBAT_31"
    transcript.add(Turn("missing", f"What is {name}?", f"{name} is not in these files.", key=name))
    sample = transcript.sample()
    ((first, stop),) = answer_spans(sample)
    rows = [row for row in range(first, stop) if sample.sources[row] >= 0]
    assert len(rows) >= 4 and rows[0] == first
    for row in rows:
        assert sample.boundary <= sample.sources[row] < first
        assert text_at(maker, sample, row)[-1] in text_at(maker, sample, sample.sources[row])


@pytest.mark.parametrize("number", [1, 640])
def test_rows_know_the_number_of_their_document_or_of_the_one_in_question(maker: ArchiveMaker, number: int) -> None:
    transcript = transcript_of(maker, number)
    documents = transcript.prompt.documents
    index = len(documents) - 1
    path = documents[index].path
    line = next(i for i, text in enumerate(documents[index].lines) if text.strip())
    key = documents[index].lines[line].split()[0]
    transcript.add(Turn("where", f"Which file defines {key}?", f"{key} is defined in `{path}`.", index, line, key))
    transcript.add(Turn("value", f"What is {key} in {path}?", documents[index].lines[line].strip(), index, line, key))
    sample = transcript.sample()
    text = maker.tokenizer.decode(sample.ids[: sample.boundary].tolist(), skip_special_tokens=False)
    assert f'<document index="{number + index}">' in text
    for document, places in enumerate(transcript.prompt.line_at):
        assert (sample.addresses[transcript.prompt.path_at[document] : places[-1] + 1] == number + document).all()
        assert (sample.headers[places[0] : places[-1] + 1] == transcript.header_end(document)).all()
        assert (sample.headers[transcript.prompt.path_at[document] : places[0]] == -1).all()
    for first, stop in answer_spans(sample):
        assert (sample.addresses[first - 1 : stop - 2] == number + index).all()
    second = answer_spans(sample)[-1][0]
    linked = np.flatnonzero(sample.hops[sample.boundary : second] == transcript.header_end(index)) + sample.boundary
    assert len(linked) == 1 and path.endswith(text_at(maker, sample, linked[0] - 1).strip())


def test_a_question_that_names_no_file_has_no_address(maker: ArchiveMaker) -> None:
    transcript = transcript_of(maker)
    transcript.add(Turn("missing", "What is WOMBAT_3?", "WOMBAT_3 is not in these files.", key="WOMBAT_3"))
    sample = transcript.sample()
    assert (sample.addresses[sample.boundary :] == -1).all()

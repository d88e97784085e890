"""The quantizer: a model folder comes in, one with integer weights goes out, step by step; for the `quantize` command.

One layer is in memory at a time, and the source is mapped anew for each, so a checkpoint larger than memory takes no
more than its largest step. A run that was stopped goes on at the first step that was not finished, and its result is
byte for byte that of an undisturbed one, on any number of threads of a CPU, or on the same CUDA device.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.folder import ModelFolder
from salalocal.checkpoint.names import EMBEDDING
from salalocal.checkpoint.strict_json import one_line
from salalocal.device import peak_memory_bytes
from salalocal.errors import CheckpointError, NumericError, RequestError
from salalocal.quant.calibration import STAGES, BlockReader, Streams, embed, input_of
from salalocal.quant.gptq import make_feedback
from salalocal.quant.job import Job, Record, finished_card, free_bytes, open_job
from salalocal.quant.matrix import Inputs, MatrixErrors, quantize_matrix
from salalocal.quant.recipe import GPTQ, QuantizeOptions, Step, make_steps, quantization_record
from salalocal.quant.stored import from_stored, stored_tensors
from salalocal.quant.workers import Workers, pieces

# Raised whenever the same input comes to give other bytes: a job begun before then is not gone on with.
_RECIPE = 3
_EXTRA_BYTES = 64 * 2**20  # tokenizer, index, card, headers of shards
_ROWS_CHECKED_AT_ONCE = 1024
# Hidden states are kept after so much work, and after so many times what it took to write them: finished layers are
# never quantized again, and after a stop the text is read through no more of them than were finished since.
_KEEP_HIDDEN_AFTER_S = 60.0
_WORK_PER_WRITING = 10
_CPU = torch.device("cpu")

Errors = dict[str, MatrixErrors]


@dataclass(frozen=True)
class StepProgress:
    """A step that is done. Units: seconds, bytes.

    `error` is the largest relative error of a matrix of the step, None if it quantizes none; `left_s` is None until a
    layer has been timed; `is_resumed` says that an earlier run has done it; `peak_bytes` is the host's,
    `device_peak_bytes` that of a CUDA device, if one is used.
    """

    step: int
    num_steps: int
    name: str
    error: float | None
    elapsed_s: float
    left_s: float | None
    peak_bytes: int
    is_resumed: bool
    device_peak_bytes: int = 0


class Quantizer:
    """One quantization, from a source folder to a place for the result; `sequences` are token ids to calibrate on.

    GPTQ needs sequences; with them, rounding to nearest reports the errors of outputs too. Raises: RequestError,
    CheckpointError.
    """

    def __init__(
        self,
        source: Path | ModelFolder,
        out: Path,
        options: QuantizeOptions,
        sequences: Sequence[Sequence[int]] = (),
        threads: int | None = None,
        device: torch.device = _CPU,
    ) -> None:
        if options.method == GPTQ and not sequences:
            raise RequestError("GPTQ needs calibration text", "--calibration PATH, or --method rtn")
        checkpoint = Checkpoint.open(source)
        if checkpoint.config.quantization_config is not None:
            raise RequestError(
                f"{one_line(source, 160)}: quantized already", "name the original, for the built-in model builtin:bf16"
            )
        checkpoint.validate()
        self._source, self._out, self._options = ModelFolder.of(source), out, options
        self._sequences = sequences
        self._threads = threads if device.type == "cpu" else 1  # a card does one thing at a time
        self._device = device
        self._config, self._config_dict = checkpoint.config, checkpoint.config_dict
        self._source_bytes, self._fingerprint = checkpoint.num_bytes, checkpoint.fingerprint
        self._dtype = torch.float16 if checkpoint.weights_dtype == torch.float16 else torch.bfloat16
        self._steps = make_steps(checkpoint.config, options)

    def run(self, on_progress: Callable[[StepProgress], None] = lambda progress: None) -> Record:
        """Quantize, or go on with it, and give back the card of the result.

        Raises: CheckpointError if the source changes, or files cannot be read or written; NumericError naming a
        tensor with NaN or infinity; RequestError if something else stands at the place; BusyError.
        """
        identity = self._identity()
        finished = finished_card(self._out, identity)
        if finished is not None:
            return finished
        with open_job(self._out, identity, len(self._steps)) as job:
            self._check_space(job)
            with Workers(self._threads) as workers:
                self._walk(job, workers, on_progress)
            return job.finish(self._source.path, self._quantized_config(), self._card(job))

    def _walk(self, job: Job, workers: Workers, on_progress: Callable[[StepProgress], None]) -> None:
        started_s, first = time.monotonic(), len(job.records)
        keep_at_s = started_s + _KEEP_HIDDEN_AFTER_S
        streams = self._streams_behind(job, workers)
        num_worked = 0
        for number, step in enumerate(self._steps):
            if number >= first:
                stored = self._stored(step)
                tensors, errors = self._make_step(step, stored, streams, workers)
                job.save_step(tensors, {name: asdict(error) for name, error in errors.items()})
                if number == 0:
                    streams = self._embedded(stored[EMBEDDING])
                elif streams and time.monotonic() > keep_at_s:
                    keep_at_s = _keep(job, streams)
                num_worked += step.num_quantized
            elapsed_s = time.monotonic() - started_s
            num_left = sum(later.num_quantized for later in self._steps[number + 1 :])
            on_progress(
                StepProgress(
                    step=number + 1,
                    num_steps=len(self._steps),
                    name=step.name,
                    error=max((errors["weights"] for errors in job.records[number].values()), default=None),
                    elapsed_s=elapsed_s,
                    left_s=elapsed_s * num_left / num_worked if num_worked else None,
                    peak_bytes=peak_memory_bytes(_CPU),
                    is_resumed=number < first,
                    device_peak_bytes=peak_memory_bytes(self._device) if self._device.type == "cuda" else 0,
                )
            )

    def _streams_behind(self, job: Job, workers: Workers) -> Streams | None:
        """What the first step not done reads: as an earlier run has kept it, read on through what it has made."""
        num_done = len(job.records)
        if not self._sequences or not 0 < num_done <= self._config.num_hidden_layers:
            return None
        shapes = [(1, len(sequence), self._config.hidden_size) for sequence in self._sequences]
        kept = job.load_hidden(shapes * (2 if self._has_original else 1))
        if kept is None:
            step, streams = 0, self._embedded(self._stored(self._steps[0])[EMBEDDING])
        else:
            step, streams = kept[0], Streams.of(kept[1], self._has_original)
        for number in range(step + 1, num_done):
            self._read_on(number, job.load_step(number), streams, workers)
        return streams

    def _read_on(self, number: int, made: Mapping[str, Tensor], streams: Streams | None, workers: Workers) -> None:
        """Bring the streams through a layer that is done."""
        step = self._steps[number]
        reader = self._reader(step, self._stored(step), streams, workers)
        if reader is None:
            return
        for name, scheme in step.schemes.items():
            module = name.removesuffix("weight")
            leaves = {stored.removeprefix(module): part for stored, part in made.items() if stored.startswith(module)}
            quantized = from_stored({leaf: part.to(self._device) for leaf, part in leaves.items()}, scheme)
            reader.replace(_inside(step, name), quantized.dequantize())
        for stage in STAGES:
            reader.advance(stage)

    def _make_step(
        self, step: Step, stored: Mapping[str, Tensor], streams: Streams | None, workers: Workers
    ) -> tuple[dict[str, Tensor], Errors]:
        """The tensors of a step and the errors of its matrices; the streams become what the next step reads."""
        for name, tensor in stored.items():
            _check_finite(name, tensor, workers)
        tensors = {name: _sixteen_bit(tensor).cpu() for name, tensor in stored.items() if name not in step.schemes}
        errors: Errors = {}
        reader = self._reader(step, stored, streams, workers)
        for stage, names in _by_input(step).items():
            inputs = self._inputs(reader.measure(stage)) if reader else None
            for name in names:
                quantized, errors[name] = quantize_matrix(
                    stored[name], step.schemes[name], self._dtype, inputs, workers
                )
                module = name.removesuffix(".weight")
                tensors |= {f"{module}.{leaf}": part.cpu() for leaf, part in stored_tensors(quantized).items()}
                if reader:
                    reader.replace(_inside(step, name), quantized.dequantize())
            if reader:
                reader.advance(stage)
        return tensors, errors

    def _stored(self, step: Step) -> dict[str, Tensor]:
        """The tensors of a step as the source has them, on the device."""
        checkpoint = Checkpoint.open(self._source)  # anew, so that pages of earlier steps are given back
        if checkpoint.fingerprint != self._fingerprint:
            raise CheckpointError(f"{one_line(self._source, 160)}: changed while it was quantized", "start again")
        return {name: checkpoint.tensor(name).to(self._device) for name in step.shapes}

    def _embedded(self, table: Tensor) -> Streams | None:
        if not self._sequences:
            return None
        hidden = embed(self._config, table, self._sequences)
        return Streams(hidden, list(hidden) if self._has_original else None)

    def _reader(
        self, step: Step, stored: Mapping[str, Tensor], streams: Streams | None, workers: Workers
    ) -> BlockReader | None:
        """None if there is no text, or nothing of the step reads it."""
        if streams is None or step.layer is None:
            return None
        tensors = {_inside(step, name): tensor for name, tensor in stored.items()}
        return BlockReader(self._config, step.layer, tensors, streams, workers)

    def _inputs(self, products: list[Tensor]) -> Inputs:
        moments = products[0].float()
        if self._options.method != GPTQ:
            return Inputs(moments, None)
        # Given up, so that their memory is free as soon as they are used: they are the largest tensors of all.
        feedback = make_feedback(products.pop(0), self._options.damping, products.pop() if products else None)
        return Inputs(moments, feedback)

    @property
    def _has_original(self) -> bool:
        """Whether the text is also read with the original weights: for what makes up for the loss of others."""
        return self._options.method == GPTQ

    def _check_space(self, job: Job) -> None:
        needed = sum(step.result_bytes for step in self._steps[len(job.records) :]) + _EXTRA_BYTES
        # Hidden states of two streams, twice: while one file replaces the other.
        needed += 2 * 2 * 4 * self._config.hidden_size * sum(map(len, self._sequences))
        free = free_bytes(self._out)
        if needed > free:
            raise CheckpointError(
                f"{one_line(self._out, 160)}: {needed / 2**30:.2f} GiB are needed, {free / 2**30:.2f} GiB are free",
                "make room, or name an --out on another disk",
            )

    def _identity(self) -> Record:
        """What makes the result: equal identities give equal bytes."""
        calibration = None
        if self._sequences:
            text = json.dumps([list(sequence) for sequence in self._sequences]).encode()
            calibration = {
                "sha256": hashlib.sha256(text).hexdigest(),
                "sequence_tokens": [len(sequence) for sequence in self._sequences],
            }
        return {
            "recipe": _RECIPE,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "cpu",
            "source": self._fingerprint,
            "options": asdict(self._options),
            "calibration": calibration,
        }

    def _card(self, job: Job) -> Record:
        return {
            "source_bytes": self._source_bytes,
            "result_bytes": job.result_bytes,
            "relative_errors": {name: errors for record in job.records for name, errors in record.items()},
        }

    def _quantized_config(self) -> Record:
        config, dtype = dict(self._config_dict), str(self._dtype).removeprefix("torch.")
        for name in ("dtype", "torch_dtype"):
            if name in config:
                config[name] = dtype
        return {**config, "quantization_config": quantization_record(self._config, self._options, dtype)}


def _keep(job: Job, streams: Streams) -> float:
    """Write the hidden states, and say when to do it again."""
    started_s = time.monotonic()
    job.save_hidden(streams.tensors)
    ended_s = time.monotonic()
    return ended_s + max(_KEEP_HIDDEN_AFTER_S, _WORK_PER_WRITING * (ended_s - started_s))


def _inside(step: Step, name: str) -> str:
    """The name of a tensor inside its layer."""
    return name.removeprefix(f"model.layers.{step.layer}.")


def _by_input(step: Step) -> dict[str, list[str]]:
    """The quantized matrices of a step by what they read, in the order of the forward pass."""
    names: dict[str, list[str]] = {}
    for name in step.schemes:
        names.setdefault(input_of(name), []).append(name)
    return names


def _check_finite(name: str, tensor: Tensor, workers: Workers) -> None:
    counts: Iterator[int] = workers.map(_count_not_finite, pieces(tensor, _ROWS_CHECKED_AT_ONCE))
    bad = sum(counts)
    if bad:
        raise NumericError(
            f"tensor {one_line(name)}: {bad:,} of {tensor.numel():,} values are NaN or infinite",
            "fetch or train the model again: its file is damaged",
        )


def _count_not_finite(values: Tensor) -> int:
    return int((~torch.isfinite(values)).sum())


def _sixteen_bit(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype.itemsize == 2 else tensor.to(torch.bfloat16)

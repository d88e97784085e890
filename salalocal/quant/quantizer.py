"""The quantizer: a model folder comes in, one with integer weights goes out, step by step; for the `quantize` command.

One layer is in memory at a time, and the source is mapped anew for each, so a checkpoint larger than memory takes no
more than its largest step. A run that was stopped goes on at the first step that was not finished, and its result is
byte for byte that of an undisturbed one, on any number of threads.
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
from salalocal.checkpoint.names import EMBEDDING
from salalocal.checkpoint.strict_json import one_line
from salalocal.device import peak_memory_bytes
from salalocal.errors import CheckpointError, NumericError, RequestError
from salalocal.quant.calibration import INPUT_OF, BlockWeights, advance, embed, input_moments
from salalocal.quant.gptq import make_feedback
from salalocal.quant.int4 import to_gptq
from salalocal.quant.job import Job, Record, finished_card, free_bytes, open_job
from salalocal.quant.matrix import Inputs, MatrixErrors, quantize_matrix
from salalocal.quant.recipe import GPTQ, QuantizeOptions, Step, gptq_record, make_steps
from salalocal.quant.workers import Workers, pieces

# Raised whenever the same input comes to give other bytes: a job begun before then is not gone on with.
_RECIPE = 1
_EXTRA_BYTES = 64 * 2**20  # tokenizer, index, card, headers of shards
_ROWS_CHECKED_AT_ONCE = 1024

Errors = dict[str, MatrixErrors]


@dataclass(frozen=True)
class StepProgress:
    """A step that is done. Units: seconds, bytes.

    `error` is the largest relative error of a matrix of the step, None if it quantizes none; `left_s` is None until a
    layer has been timed; `is_resumed` says that an earlier run has done it.
    """

    step: int
    num_steps: int
    name: str
    error: float | None
    elapsed_s: float
    left_s: float | None
    peak_bytes: int
    is_resumed: bool


class Quantizer:
    """One quantization, from a source folder to a place for the result; `sequences` are token ids to calibrate on.

    GPTQ needs sequences; with them, rounding to nearest reports the errors of outputs too. Raises: RequestError,
    CheckpointError.
    """

    def __init__(
        self,
        source: Path,
        out: Path,
        options: QuantizeOptions,
        sequences: Sequence[Sequence[int]] = (),
        threads: int | None = None,
    ) -> None:
        if options.method == GPTQ and not sequences:
            raise RequestError("GPTQ needs calibration text", "--calibration PATH, or --method rtn")
        checkpoint = Checkpoint.open(source)
        if checkpoint.config.quantization_config is not None:
            raise RequestError(f"{one_line(source, 160)}: quantized already", "quantize the original model")
        checkpoint.validate()
        self._source, self._out, self._options = source, out, options
        self._sequences = sequences
        self._threads = threads
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
            return job.finish(self._source, self._quantized_config(), self._card(job))

    def _walk(self, job: Job, workers: Workers, on_progress: Callable[[StepProgress], None]) -> None:
        started_s, first = time.monotonic(), len(job.records)
        hidden: list[Tensor] = []
        if first < len(self._steps) and self._steps[first].layer is not None and self._sequences:
            hidden = job.load_hidden() if first else []
        num_worked = 0
        for number, step in enumerate(self._steps):
            if number >= first:
                tensors, errors, hidden = self._make_step(step, hidden, workers)
                job.save_step(tensors, {name: asdict(error) for name, error in errors.items()}, hidden)
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
                    peak_bytes=peak_memory_bytes(torch.device("cpu")),
                    is_resumed=number < first,
                )
            )

    def _make_step(
        self, step: Step, hidden: list[Tensor], workers: Workers
    ) -> tuple[dict[str, Tensor], Errors, list[Tensor]]:
        """The tensors of a step, the errors of its matrices, and what the next step reads."""
        checkpoint = Checkpoint.open(self._source)  # anew, so that pages of earlier steps are given back
        if checkpoint.fingerprint != self._fingerprint:
            raise CheckpointError(f"{one_line(self._source, 160)}: changed while it was quantized", "start again")
        stored = {name: checkpoint.tensor(name) for name in step.shapes}
        for name, tensor in stored.items():
            _check_finite(name, tensor, workers)
        if step.layer is not None:
            return self._make_layer(step, step.layer, stored, hidden, workers)
        hidden = embed(self._config, stored[EMBEDDING], self._sequences) if EMBEDDING in stored else []
        return {name: _sixteen_bit(tensor) for name, tensor in stored.items()}, {}, hidden

    def _make_layer(
        self, step: Step, layer: int, stored: Mapping[str, Tensor], hidden: list[Tensor], workers: Workers
    ) -> tuple[dict[str, Tensor], Errors, list[Tensor]]:
        prefix = f"model.layers.{layer}."
        tensors: dict[str, Tensor] = {}
        errors: Errors = {}
        wide = {name.removeprefix(prefix): tensor.float() for name, tensor in stored.items()} if hidden else {}
        inputs = self._inputs(BlockWeights(self._config, layer, wide), hidden, workers) if hidden else {}
        for name, tensor in stored.items():
            if name not in step.schemes:
                tensors[name] = _sixteen_bit(tensor)
                continue
            module = name.removesuffix(".weight")
            known = inputs.get(INPUT_OF[module.removeprefix(prefix)])
            quantized, errors[name] = quantize_matrix(tensor, step.schemes[name], self._dtype, known, workers)
            tensors |= {f"{module}.{leaf}": packed for leaf, packed in to_gptq(quantized).items()}
            if hidden:
                wide[name.removeprefix(prefix)] = quantized.dequantize()
        is_last = layer + 1 == self._config.num_hidden_layers
        hidden = [] if is_last else advance(BlockWeights(self._config, layer, wide), hidden, workers)
        return tensors, errors, hidden

    def _inputs(self, weights: BlockWeights, hidden: list[Tensor], workers: Workers) -> dict[str, Inputs]:
        inputs = {}
        for name, moments in input_moments(weights, hidden, workers).items():
            feedback = make_feedback(moments, self._options.damping) if self._options.method == GPTQ else None
            inputs[name] = Inputs(moments.float(), feedback)
        return inputs

    def _check_space(self, job: Job) -> None:
        needed = sum(step.result_bytes for step in self._steps[len(job.records) :]) + _EXTRA_BYTES
        # What the next step reads, twice: while one replaces the other.
        needed += 2 * 4 * self._config.hidden_size * sum(map(len, self._sequences))
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
            "source": self._fingerprint,
            "options": asdict(self._options),
            "calibration": calibration,
        }

    def _card(self, job: Job) -> Record:
        return {
            "source_bytes": self._source_bytes,
            "result_bytes": sum(step.result_bytes for step in self._steps),
            "relative_errors": {name: errors for record in job.records for name, errors in record.items()},
        }

    def _quantized_config(self) -> Record:
        config = dict(self._config_dict)
        for name in ("dtype", "torch_dtype"):
            if name in config:
                config[name] = str(self._dtype).removeprefix("torch.")
        return {**config, "quantization_config": gptq_record(self._config, self._options)}


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

"""What pays at 4 bits and for int8 activations: every `Variant` on the built-in model, and some on random matrices.

    python benchmarks/quantization_study.py --out study.json                     # all variants; hours on two cores
    python benchmarks/quantization_study.py --out study.json --jobs 16           # minutes on sixteen
    python benchmarks/quantization_study.py --out study.json --only "GPTQ" "RTN" --calibration-tokens 16384

Quantization is simulated: weights are rounded and put back as float32, which is what every format stands for. The text
is the shipped one: the beginnings of some conversations to calibrate on, those of the evaluation half to measure on.
Nothing random is drawn for the model; the matrices are seeded. A variant that stands in --out with the same texts is
not measured again. Prints a Markdown table. `--write-ids` stores the texts as token ids, `--ids` reads them back, for a
machine that has torch and little else.
"""

import argparse
import hashlib
import json
import multiprocessing
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.study_matrices import matrix_rows
from benchmarks.study_table import VARIANTS, as_table
from benchmarks.study_variants import (
    DOWN,
    GATE_UP,
    OUT,
    QKV,
    InputMoments,
    SimulatedLinear,
    Variant,
    bits_of,
    int8_group_size,
    quantize_maps,
    round_alone,
)  # fmt: skip
from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.hub import find_model
from salalocal.durable import replace_file
from salalocal.engine.engine import Engine, EngineConfig
from salalocal.evals.divergence import Reference, compare, read_reference
from salalocal.kernels.norm import rms_norm
from salalocal.kernels.swiglu import swiglu
from salalocal.model.config import SPARSE, SalaConfig
from salalocal.model.layers import DenseLinear
from salalocal.model.mixers import MIXERS
from salalocal.model.sala import SalaModel, SwitchRule
from salalocal.model.state import StateSpec
from salalocal.quant.calibration import INPUT_OF, input_of

MODEL = "builtin:bf16"
CHUNK_TOKENS = 2048
NEAR_TIE_NATS = 0.5

Weights = dict[str, Tensor]


class Block:
    """One block whose maps can be looked between: what each group of them reads, given what came before."""

    def __init__(self, config: SalaConfig, layer: int, weights: Mapping[str, Tensor]) -> None:
        self._config, self._layer = config, layer
        prefix = f"model.layers.{layer}."
        self.weights = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        self.maps = {
            name: {leaf: self.weights[f"{leaf}.weight"] for leaf in INPUT_OF if self._reads(leaf, name)}
            for name in (QKV, OUT, GATE_UP, DOWN)
        }

    def _reads(self, leaf: str, name: str) -> bool:
        return INPUT_OF[leaf] == name and f"{leaf}.weight" in self.weights

    def normed(self, hidden: Tensor) -> Tensor:
        """What q, k, v and the gate read."""
        return rms_norm(hidden, self.weights["input_layernorm.weight"], self._config.rms_norm_eps)

    def mixed(self, normed: Tensor, maps: Weights) -> Tensor:
        """What o_proj reads."""
        make = partial(_linear_or_identity, OUT)
        mixer = MIXERS[self._config.mixer_types[self._layer]](self._config, "self_attn", make, "meta", torch.float32)
        assert isinstance(mixer, nn.Module)
        tensors = {name: maps.get(name.removesuffix(".weight"), weight) for name, weight in self.weights.items()}
        mine = {name.removeprefix("self_attn."): t for name, t in tensors.items() if name.startswith("self_attn.")}
        mixer.load_state_dict({name: t for name, t in mine.items() if name != "o_proj.weight"}, assign=True)
        state = mixer.new_state(
            StateSpec(
                batch_size=1,
                capacity=len(normed),
                sparse_from=SwitchRule.POSITION.sparse_from(self._config.sparse.dense_len),
                device=normed.device,
                dtype=torch.float32,
            )
        )
        return torch.cat([mixer(chunk[None], state)[0] for chunk in normed.split(CHUNK_TOKENS)])

    def joined(self, hidden: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The residual stream with a branch added. Shapes: x [T, in], weight [hidden, in]."""
        return hidden + (x @ weight.t()) * self._config.residual_scale

    def normed_again(self, hidden: Tensor) -> Tensor:
        """What gate and up read."""
        return rms_norm(hidden, self.weights["post_attention_layernorm.weight"], self._config.rms_norm_eps)

    def gated(self, normed: Tensor, maps: Weights) -> Tensor:
        """What down_proj reads."""
        return swiglu(normed @ maps["mlp.gate_proj"].t(), normed @ maps["mlp.up_proj"].t())


class Original:
    """The model as it is, and the hidden states that its blocks and its o_proj read on the calibration text."""

    def __init__(self, config: SalaConfig, weights: Weights, sequences: Sequence[Sequence[int]]) -> None:
        self.config, self.weights = config, weights
        self.blocks = [Block(config, layer, weights) for layer in range(config.num_hidden_layers)]
        table = weights["model.embed_tokens.weight"]
        self.embedded = [table[torch.tensor(ids)] * config.scale_emb for ids in sequences]
        self.hidden: list[list[Tensor]] = []
        self.mixed: list[list[Tensor]] = []
        hidden = self.embedded
        for block in self.blocks:
            mixed = [block.mixed(block.normed(h), _all_maps(block)) for h in hidden]
            self.hidden.append(hidden)
            self.mixed.append(mixed)
            hidden = [_after_mixer(block, h, x) for h, x in zip(hidden, mixed, strict=True)]


class Walk:
    """Quantizes a model block by block, each on what the ones in front have become."""

    def __init__(self, original: Original, variant: Variant) -> None:
        self._original, self._variant = original, variant

    def run(self) -> Weights:
        """The weights that are left, by their names in the checkpoint."""
        weights, hidden = dict(self._original.weights), list(self._original.embedded)
        for layer in range(len(self._original.blocks)):
            maps, hidden = self._block(layer, hidden)
            weights |= {f"model.layers.{layer}.{leaf}.weight": weight for leaf, weight in maps.items()}
        return weights

    def _block(self, layer: int, hidden: list[Tensor]) -> tuple[Weights, list[Tensor]]:
        block, is_staged = self._original.blocks[layer], self._variant.order == "stages"
        maps = dict(_all_maps(block))
        known = self._originals(layer, hidden)
        for name in (QKV, OUT, GATE_UP, DOWN):
            seen = maps if is_staged else _all_maps(block)
            if name == QKV:
                x = [block.normed(h) for h in hidden]
            elif name == OUT:
                x = mixed = [block.mixed(n, seen) for n in x]
            elif name == GATE_UP:
                middle = [block.joined(h, m, seen[OUT]) for h, m in zip(hidden, mixed, strict=True)]
                x = [block.normed_again(m) for m in middle]
            else:
                x = [block.gated(n, seen) for n in x]
            moments = InputMoments(_mean_products(x, x), _mean_products(known[name], x) if known else None)
            is_sparse = self._original.config.mixer_types[layer] == SPARSE
            maps |= quantize_maps(self._variant, name, block.maps[name], moments, is_sparse)
        if is_staged:
            return maps, [block.joined(m, n, maps["mlp.down_proj"]) for m, n in zip(middle, x, strict=True)]
        mixed = [block.mixed(block.normed(h), maps) for h in hidden]
        return maps, [_after_mixer(block, h, m, maps) for h, m in zip(hidden, mixed, strict=True)]

    def _originals(self, layer: int, hidden: list[Tensor]) -> dict[str, list[Tensor]]:
        """What the maps would read with original weights, in the whole model or in this block alone."""
        if self._variant.drift is None:
            return {}
        block = self._original.blocks[layer]
        maps = _all_maps(block)
        if self._variant.drift == "model":
            hidden, mixed = self._original.hidden[layer], self._original.mixed[layer]
            normed = [block.normed(h) for h in hidden]
        else:
            normed = [block.normed(h) for h in hidden]
            mixed = [block.mixed(n, maps) for n in normed]
        again = [block.normed_again(block.joined(h, m, maps[OUT])) for h, m in zip(hidden, mixed, strict=True)]
        return {QKV: normed, OUT: mixed, GATE_UP: again, DOWN: [block.gated(n, maps) for n in again]}


def quantized_weights(original: Original, variant: Variant) -> Weights:
    """The weights that a variant leaves of a model."""
    if variant.needs_inputs:
        return Walk(original, variant).run()
    weights = dict(original.weights)
    for layer, block in enumerate(original.blocks):
        is_sparse = original.config.mixer_types[layer] == SPARSE
        for leaf, weight in _all_maps(block).items():
            rounded = round_alone(variant, weight, bits_of(variant, leaf, is_sparse))
            weights[f"model.layers.{layer}.{leaf}.weight"] = rounded
    return weights


def make_model(config: SalaConfig, weights: Weights, variant: Variant | None = None) -> SalaModel:
    """A float32 model with these weights, with the activations that a variant asks for."""

    def linear(name: str, in_features: int, out_features: int) -> nn.Module:
        read = input_of(name)
        if variant is None or variant.activations is None or read not in variant.activation_inputs:
            return DenseLinear(in_features, out_features, "meta", torch.float32)
        is_rotated = read in variant.rotated_activations
        return SimulatedLinear(in_features, out_features, int8_group_size(variant), is_rotated)

    model = SalaModel(config, linear, "meta", torch.float32)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


@torch.no_grad()
def measure(original: Original, reference: Reference, variant: Variant) -> dict[str, Any]:
    """One row of the table. Units: seconds, nats, shares from 0 to 1."""
    started_s = time.monotonic()
    weights = quantized_weights(original, variant)
    rounded_s = time.monotonic() - started_s
    engine = Engine(make_model(original.config, weights, variant), EngineConfig(CHUNK_TOKENS))
    row: dict[str, Any] = asdict(compare(reference, engine))
    row |= {"bits_per_weight": bits_per_weight(original, variant), "quantize_s": rounded_s}
    row |= flips(reference, engine) if variant.counts_flips else {}
    return {"variant": asdict(variant), **row, "wall_s": time.monotonic() - started_s}


def flips(reference: Reference, engine: Engine) -> dict[str, float]:
    """How close to each other the original's two likeliest tokens are where the likeliest is another one now."""
    margins, has_flipped = [], []
    for number, ids in enumerate(reference.sequences):
        start = 0
        for logits in engine.iter_logits(ids):
            first, second = reference.log_probabilities(number, start, start + len(logits)).topk(2).values.t()
            likeliest = reference.log_probabilities(number, start, start + len(logits)).argmax(-1)
            margins.append(first - second)
            has_flipped.append(likeliest != logits.argmax(-1))
            start += len(logits)
    all_margins, is_flip = torch.cat(margins), torch.cat(has_flipped)
    is_near = all_margins < NEAR_TIE_NATS
    return {
        "near_tie_nats": NEAR_TIE_NATS,
        "flips_near_ties": float((is_near & is_flip).sum() / is_flip.sum()),
        "median_margin_of_flips_nats": float(all_margins[is_flip].median()),
        "near_ties": float(is_near.double().mean()),
        "top1_agreement_without_near_ties": float((~is_flip[~is_near]).double().mean()),
    }


def bits_per_weight(original: Original, variant: Variant) -> float:
    """Bits of codes and scales (16 each; 32 of a codebook's blocks of 64) over the weights of all maps."""
    bits = count = 0.0
    for layer, block in enumerate(original.blocks):
        is_sparse = original.config.mixer_types[layer] == SPARSE
        for leaf, weight in _all_maps(block).items():
            of_map = bits_of(variant, leaf, is_sparse) + 16 / variant.group_size
            of_map = {"none": 16.0, "nf4": 4.5, "fp4": 4.5}.get(variant.method, of_map)
            bits, count = bits + of_map * weight.numel(), count + weight.numel()
    return bits / count


def _all_maps(block: Block) -> Weights:
    return {leaf: weight for maps in block.maps.values() for leaf, weight in maps.items()}


def _after_mixer(block: Block, hidden: Tensor, mixed: Tensor, maps: Weights | None = None) -> Tensor:
    maps = maps or _all_maps(block)
    middle = block.joined(hidden, mixed, maps[OUT])
    return block.joined(middle, block.gated(block.normed_again(middle), maps), maps[DOWN])


def _linear_or_identity(without: str, name: str, in_features: int, out_features: int) -> nn.Module:
    return nn.Identity() if name == without else DenseLinear(in_features, out_features, "meta", torch.float32)


def _mean_products(left: Iterable[Tensor], right: Iterable[Tensor]) -> Tensor:
    total, count = 0.0, 0
    for a, b in zip(left, right, strict=True):
        for rows, others in zip(a.split(CHUNK_TOKENS), b.split(CHUNK_TOKENS), strict=True):
            total = total + (rows.t() @ others).double()
        count += len(a)
    assert isinstance(total, Tensor)
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("study.json"))
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--only", nargs="+", help="names of variants, or beginnings of them")
    parser.add_argument("--calibration-tokens", type=int, default=65_536)
    parser.add_argument("--calibration-texts", type=int, default=4, help="conversations that share these tokens")
    parser.add_argument("--evaluation-tokens", type=int, default=32_768)
    parser.add_argument("--ids", type=Path, help="texts as token ids")
    parser.add_argument("--write-ids", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the random matrices")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # processes are forked, and torch's own threads would not survive that
    texts = json.loads(arguments.ids.read_text()) if arguments.ids else shipped_ids()
    if arguments.write_ids:
        arguments.write_ids.write_text(json.dumps(texts))
        return
    calibration = _beginnings(texts["calibration"][: arguments.calibration_texts], arguments.calibration_tokens)
    evaluation = _beginnings(texts["evaluation"], arguments.evaluation_tokens)
    record = _begun(arguments.out, {"calibration": _summary(calibration), "evaluation": _summary(evaluation)})
    checkpoint = Checkpoint.open(find_model(MODEL))
    weights = {name: checkpoint.tensor(name).float() for name in checkpoint.tensor_names}
    chosen = [v for v in VARIANTS if not arguments.only or v.name.startswith(tuple(arguments.only))]
    missing = [variant for variant in chosen if variant.name not in record["variants"]]
    if missing:
        with torch.no_grad():
            original = Original(checkpoint.config, weights, calibration)
        engine = Engine(make_model(checkpoint.config, weights), EngineConfig(CHUNK_TOKENS))
        reference = read_reference(engine, evaluation)
        with multiprocessing.get_context("fork").Pool(arguments.jobs) as pool:
            for row in pool.imap_unordered(partial(measure, original, reference), missing):
                record["variants"][row["variant"]["name"]] = row
                _write(arguments.out, record)
                print(f"{row['variant']['name']}: KL {row['kl_mean_nats']:.4f}, {row['wall_s']:.0f} s", flush=True)
    record["matrices"] = record.get("matrices") or matrix_rows(arguments.seed)
    _write(arguments.out, record)
    print(as_table(record))


def shipped_ids() -> dict[str, list[list[int]]]:
    """The shipped texts as ids."""
    # Here, since a machine that is given ids need not have what these import.
    from salalocal.session.texts import CALIBRATION, EVALUATION, shipped_text
    from salalocal.session.tokens import TextCodec

    codec = TextCodec.from_folder(find_model(MODEL).path)
    return {name: [list(ids) for ids in shipped_text(name, codec).texts] for name in (CALIBRATION, EVALUATION)}


def _beginnings(texts: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
    return [ids[: num_tokens // len(texts)] for ids in texts]


def _summary(sequences: Sequence[Sequence[int]]) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps([list(ids) for ids in sequences]).encode()).hexdigest()
    return {"sha256": digest, "sequence_tokens": [len(ids) for ids in sequences]}


def _begun(path: Path, texts: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier run on the same texts has measured."""
    if path.exists():
        record: dict[str, Any] = json.loads(path.read_text())
        if all(record[name] == value for name, value in texts.items()):
            return record
    return {**texts, "model": MODEL, "torch": torch.__version__, "machine": platform.platform(), "variants": {}}


def _write(path: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps(dict(record), indent=1, allow_nan=False) + "\n"
    replace_file(path, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()

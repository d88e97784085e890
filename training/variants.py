"""Makes the shipped folder of one model in two forms that share what is equal in them: int4, the default, and bf16.

In: an exported bf16 folder, then what `salalocal quantize` makes of it. Out: salalocal/builtin/ with, per form, a
config and an index, and three files of weights: `model-shared` (embedding, norms), `model-bf16`, `model-int4`. For: the
runtime. Run, in this order:

    python -m training.variants original training/runs/exported
    salalocal quantize --model builtin:bf16 --method gptq --sensitive 8 --out training/runs/int4
    python -m training.variants quantized training/runs/int4

The same folders give the same bytes.
"""

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.folder import ModelFolder
from salalocal.checkpoint.names import CONFIG_FILE, EMBEDDING, INDEX_FILE, SINGLE_FILE
from salalocal.quant.job import CARD_FILE
from training.tokenizer import BUILTIN

ORIGINAL = "bf16"
COMPANIONS = ("generation_config.json", "chat_template.jinja")
SHARED_SHARD, ORIGINAL_SHARD, QUANTIZED_SHARD = (f"model-{part}.safetensors" for part in ("shared", ORIGINAL, "int4"))


def publish_original(source: Path, out: Path) -> None:
    """Writes the variant bf16, which is the default too until a quantized form stands beside it."""
    checkpoint = Checkpoint.open(source)
    checkpoint.validate()
    for name in COMPANIONS:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)
    for path in (out / SINGLE_FILE, out / QUANTIZED_SHARD, out / CARD_FILE):
        path.unlink(missing_ok=True)
    files = {name: SHARED_SHARD if is_shared(checkpoint, name) else ORIGINAL_SHARD for name in checkpoint.tensor_names}
    for shard in (SHARED_SHARD, ORIGINAL_SHARD):
        save_shard(checkpoint, [name for name, file in files.items() if file == shard], out / shard)
    for place in (ModelFolder(out), ModelFolder(out, ORIGINAL)):
        write_head(place, checkpoint.config_dict, files)
        Checkpoint.open(place).validate()


def publish_quantized(source: Path, out: Path) -> None:
    """Makes a quantized copy of the variant bf16 the default. Raises: ValueError if a shared tensor differs."""
    checkpoint, original = Checkpoint.open(source), Checkpoint.open(ModelFolder(out, ORIGINAL))
    files = {name: SHARED_SHARD for name in original.tensor_names if is_shared(original, name)}
    for name in files:
        if not checkpoint.tensor(name).equal(original.tensor(name)):
            raise ValueError(f"{name} is not that of {out}: quantize builtin:{ORIGINAL}")
    own = [name for name in checkpoint.tensor_names if name not in files]
    save_shard(checkpoint, own, out / QUANTIZED_SHARD)
    write_head(ModelFolder(out), checkpoint.config_dict, files | dict.fromkeys(own, QUANTIZED_SHARD))
    shutil.copyfile(source / CARD_FILE, out / CARD_FILE)


def is_shared(checkpoint: Checkpoint, name: str) -> bool:
    """Whether no form of the model quantizes a tensor: the embedding and what is no matrix."""
    return name == EMBEDDING or len(checkpoint.shape(name)) != 2


def save_shard(checkpoint: Checkpoint, names: list[str], path: Path) -> None:
    """Writes some tensors of a checkpoint into one file."""
    save_file({name: checkpoint.tensor(name).contiguous() for name in names}, path, metadata={"format": "pt"})
    path.chmod(0o644)


def write_head(place: ModelFolder, config: Mapping[str, Any], files: Mapping[str, str]) -> None:
    """Writes config and index of one form; without white space in the index, which is a third of it."""
    folder = place.path
    num_bytes = sum(path.stat().st_size for path in (folder / file for file in set(files.values())))
    index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(files.items()))}
    place.file(CONFIG_FILE).write_text(json.dumps(dict(config), indent=1) + "\n")
    place.file(INDEX_FILE).write_text(json.dumps(index, separators=(",", ":")) + "\n")


def main() -> None:
    """Parses the command line and publishes one form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("form", choices=("original", "quantized"))
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path, default=BUILTIN)
    arguments = parser.parse_args()
    (publish_original if arguments.form == "original" else publish_quantized)(arguments.source, arguments.out)
    size = sum(path.stat().st_size for path in arguments.out.iterdir())
    print(f"{size / 1e6:.2f} MB in {arguments.out}")


if __name__ == "__main__":
    main()

"""Writes the trained model as a Hugging Face folder.

In: saved weights (training/runs/NAME). Out: config.json, model.safetensors (bf16), generation_config.json and
chat_template.jinja in training/runs/exported. For: training/variants.py, which makes the shipped folder of it.
Run: `python -m training.export training/runs/two`. With `--before FOLDER --share 0.75` what is written lies between the
weights that training began with and those it gave: it keeps more of what the former could do.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from training.model import EmbeddedModel, Shape
from training.trainer import restore

EXPORTED = Path(__file__).parent / "runs" / "exported"
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- if not loop.first %}{{ '\\n' }}{% endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif -%}
"""


@torch.no_grad()
def move_towards(model: EmbeddedModel, other: Path, share: float) -> None:
    """Moves every weight that share of the way to those of another folder."""
    goal = EmbeddedModel(model.shape)
    restore(goal, other)
    for weight, target in zip(model.parameters(), goal.parameters(), strict=True):
        weight.lerp_(target, share)


def main() -> None:
    """Converts and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--share", type=float, default=1.0, help="of the way from --before to the weights")
    parser.add_argument("--out", type=Path, default=EXPORTED)
    arguments = parser.parse_args()
    if (arguments.before is None) != (arguments.share == 1.0):
        parser.error("--before and --share go together")
    arguments.out.mkdir(parents=True, exist_ok=True)
    shape = Shape()
    model = EmbeddedModel(shape)
    restore(model, arguments.weights)
    if arguments.before is not None:
        move_towards(model, arguments.before, 1.0 - arguments.share)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, arguments.out / "model.safetensors", metadata={"format": "pt"})
    config = shape.to_hf()
    (arguments.out / "model.safetensors").chmod(0o644)
    (arguments.out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (arguments.out / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")
    (arguments.out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    size = sum(path.stat().st_size for path in arguments.out.iterdir())
    print(f"{sum(t.numel() for t in tensors.values())} parameters, {size / 1e6:.1f} MB in {arguments.out}")


if __name__ == "__main__":
    main()

"""A public Monet checkpoint (MonetLLM/*) as a checkpoint of this project.

    python -m tiered.convert MonetLLM/monet-vd-850M-100BT-hf converted/monet-vd-850M
    python -m tiered.convert tests/golden/monet-vd converted/golden

SOURCE is a hub name or a folder. Names and shapes are the same in both; what is checked is that
every tensor found its place, that none was left over, and that the written checkpoint predicts bit
for bit what the loaded one does. The result loads anywhere through AutoModelForCausalLM
(trust_remote_code) and has what `modeling_monet.py` adds: the tiled loss, purged experts.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer

from modeling_monet import MonetForCausalLM
from tiered.store import UserError, atomic_folder


def convert(source: str, target: Path) -> int:
    """Write the checkpoint; its number of parameters. Raises UserError where tensors disagree."""
    try:
        model, info = MonetForCausalLM.from_pretrained(source, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{source}: cannot be loaded ({' '.join(str(error).split())[:300]})"
        ) from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise UserError(
                f"{source}: {kind.replace('_', ' ')}: {', '.join(map(str, info[kind]))[:300]}"
            )
    model.eval()
    ids = torch.arange(3, 19)[None] % model.config.vocab_size
    with torch.inference_mode():
        expected = model(ids).logits
    with atomic_folder(target) as path:
        model.save_pretrained(path)
        try:
            AutoTokenizer.from_pretrained(source).save_pretrained(path)
        except (OSError, ValueError, KeyError):
            print(f"{source}: no tokenizer; the checkpoint has none either")
        with torch.inference_mode():
            found = MonetForCausalLM.from_pretrained(path).eval()(ids).logits
        if not torch.equal(found, expected):
            raise UserError(f"{target}: would predict otherwise than {source}; not written")
    return sum(p.numel() for p in model.parameters())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="hub name or folder")
    parser.add_argument("target", type=Path, help="new folder")
    given = parser.parse_args()
    if given.target.exists():
        parser.error(f"{given.target} exists")
    try:
        count = convert(given.source, given.target)
    except (UserError, OSError, SafetensorError) as error:
        print(f"tiered.convert: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{given.target}: {count:,} parameters, equal predictions")


if __name__ == "__main__":
    main()

"""Prefill a 70B model whose weights do not fit in GPU memory, nor in RAM: they come from the SSD.

    python examples/prefill_70b_ssd.py --model Llama-3.1-70B/
    python examples/prefill_70b_ssd.py --layers 12   # no checkpoint at hand: one of its shape

One layer of that shape holds 1.71 GB in bfloat16, so `--layers 12` writes 21.6 GB to `--folder`.
"""

import argparse
import time
from pathlib import Path

import torch

import wsm_ext as wsm
from wsm_ext.hf.synthetic import PRESETS, make_llama_checkpoint

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--model", help="a model's folder, or its id on the hub")
parser.add_argument("--layers", type=int, help="make a synthetic checkpoint of that many layers")
parser.add_argument("--folder", type=Path, help="where it goes (llama-70b-N-layers here)")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--device-memory", default="12GiB")
parser.add_argument("--host-memory", default="16GiB")
parser.add_argument("--lookahead", type=int, default=3, help="layers in flight ahead")
parser.add_argument("--batch", type=int, default=1)
parser.add_argument("--tokens", type=int, default=2048)
parser.add_argument("--passes", type=int, default=3)
options = parser.parse_args()
if (options.model is None) == (options.layers is None):
    parser.error("give either --model or --layers")

path = options.model
if options.layers is not None:
    path = options.folder or Path(f"llama-70b-{options.layers}-layers")
    if not (path / "config.json").exists():
        print(f"writing {options.layers} layers to {path}")
        make_llama_checkpoint(path, layers=options.layers, **PRESETS["70b"])

with wsm.from_pretrained(
    path,
    device=options.device,
    device_memory=options.device_memory,
    host_memory=options.host_memory,
    config={"lookahead_units": options.lookahead},
) as model:
    print(model.plan)
    shape = (options.batch, options.tokens)
    ids = torch.randint(0, model.config.vocab_size, shape, device=options.device)
    for _ in range(options.passes):
        begin = time.perf_counter()
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        first_tokens = logits[:, -1].argmax(-1).tolist()  # waits for the device
        seconds = time.perf_counter() - begin
        links = model.stats()["last_pass"]
        print(
            f"{seconds:.2f} s, {ids.numel() / seconds:,.0f} tokens/s, "
            f"disk {links['disk_bytes'] / seconds / 1e9:.2f} GB/s, "
            f"to the device {links['h2d_bytes'] / seconds / 1e9:.2f} GB/s, "
            f"first tokens {first_tokens}"
        )

"""Unlimiformer (Bertsch 2023): what does it take to read half a million tokens with an encoder-decoder, and to answer from them?

    python reproductions/unlimiformer.py TEXT --out reproductions/unlimiformer

A model of BART-base's shape reads TEXT (.txt or .txt.gz, which comes again where it is used up) to 16k, 64k, 256k and 500k
tokens, once each, and then generates 64 tokens that retrieve from what was read, on a store that is exact. Weights are random
unless --model names a model: they cost what trained ones cost, and say nothing of quality, which this does not measure. The
store is written to a file, read back, and asked again: the answer must be the same.

What is judged: the longest text is read; the seconds to read a token stay level, within 20 % of those at 64k; the store grows by
one state a token and no more; memory past it is level, within 20 % of the store-less peak at 64k; what was saved answers alike.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, BartConfig, BartForConditionalGeneration

import longspan as ls
from longspan.meter import Meter

NEW = 64
"""Tokens of an answer."""
WARM = 4096
"""Tokens that are read before anything is timed."""
BASE = {
    "vocab_size": 50265,
    "d_model": 768,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 12,
    "decoder_attention_heads": 12,
    "encoder_ffn_dim": 3072,
    "decoder_ffn_dim": 3072,
    "max_position_embeddings": 1024,
}
"""BART-base."""


def read(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")


def load(options: argparse.Namespace) -> tuple[Any, torch.Tensor]:
    """The model, and the text as ids (1, the longest length)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    text, longest = read(options.text), max(options.lengths)
    if options.model is None:
        torch.manual_seed(0)
        model = BartForConditionalGeneration(BartConfig(**BASE))
        ids = torch.tensor(list(text.encode()))  # bytes: what is read makes no difference to what it costs
    else:
        model = AutoModelForSeq2SeqLM.from_pretrained(options.model)
        ids = AutoTokenizer.from_pretrained(options.model)(text, return_tensors="pt", verbose=False)["input_ids"][0]
    ids = ids.repeat(-(-longest // len(ids)))[:longest]
    return model.to(device, dtype).eval(), ids[None].to(device)


def answer(model: Any, book: ls.Encoded) -> torch.Tensor:
    return model.generate(
        encoder_outputs=book.outputs(), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, num_beams=1
    )


def measure(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    meter = Meter(model.device, model)
    with meter.prefill(ids.shape[1]):
        book = ls.Encoded.of(model, ids)
    with meter.decode(NEW):
        said = answer(model, book)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "book.safetensors"
        book.save(place, model)
        again = answer(model, ls.Encoded.load(place, model))
    cost = meter.report()
    return {
        "tokens": ids.shape[1],
        "states": sum(len(row) for row in book.rows),
        "store_bytes": sum(row.numel() * row.element_size() for row in book.rows),
        "read_s": cost["prefill_s"],
        "answer_s_per_token": cost["decode_s_per_token"],
        "peak_read_bytes": cost["peak_prefill_bytes"],
        "peak_answer_bytes": cost["peak_decode_bytes"],
        "weights_bytes": cost["weights_bytes"],
        "saved_answers_alike": bool(torch.equal(said, again)),
    }


def judge(rows: list[dict[str, Any]], wanted: int) -> dict[str, bool]:
    """What was measured, of the claims; the second length is what the longest is compared with."""
    said = {f"{wanted:,} tokens are read": bool(rows) and rows[-1]["tokens"] == wanted}
    if len(rows) > 2:
        some, most = rows[1], rows[-1]
        a_token = [row["read_s"] / row["tokens"] for row in (some, most)]
        said["seconds to read a token are level"] = abs(a_token[1] / a_token[0] - 1) <= 0.2
        beside = [row["peak_read_bytes"] - row["store_bytes"] for row in (some, most)]
        said["memory beside the store is level"] = abs(beside[1] / beside[0] - 1) <= 0.2
    said["one state a token is stored"] = all(row["states"] == row["tokens"] for row in rows)
    said["what was saved answers alike"] = all(row["saved_answers_alike"] for row in rows)
    return said


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="a folder or hub id of a BART, T5 or LED; BART-base's shape if left out")
    parser.add_argument("--method", default="unlimiformer")
    parser.add_argument(
        "--lengths", type=lambda text: [int(n) for n in text.split(",")], default=[2**14, 2**16, 2**18, 500_000]
    )
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    model, ids = load(options)
    rows: list[dict[str, Any]] = []
    with ls.applied(model, options.method):
        measure(model, ids[:, :WARM])
        for length in options.lengths:
            rows.append(measure(model, ids[:, :length]))
            one = rows[-1]
            print(
                f"{length:>9,} tokens: read in {one['read_s']:.2f} s, {one['answer_s_per_token'] * 1e3:.1f} ms a token of "
                f"the answer, store {one['store_bytes'] / 1e6:.0f} MB, peak {(one['peak_read_bytes'] or 0) / 1e9:.2f} GB",
                flush=True,
            )
            written = {
                "method": options.method,
                "model": options.model or "BART-base's shape, random weights",
                "text": options.text.name,
                "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "CPU",
                "dtype": str(model.dtype).removeprefix("torch."),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "rows": rows,
                "claims": judge(rows, max(options.lengths)),
            }
            (options.out / "unlimiformer.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    for claim, holds in judge(rows, max(options.lengths)).items():
        print(f"{'holds' if holds else 'does not hold'}: {claim}")


if __name__ == "__main__":
    main()

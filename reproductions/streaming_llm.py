"""StreamingLLM over a stream of any length, beside what else could read it: is the loss level, the step, the memory?

    python reproductions/streaming_llm.py TEXT --tokens 100000 --out reproductions/streaming_llm
    python reproductions/streaming_llm.py TEXT --tokens 4m --chunk 16k --probe 64 --out reproductions/streaming_llm
    python reproductions/streaming_llm.py TEXT --method streaming:sinks=0,window=2048 --out reproductions/streaming_llm

Reads TEXT (.txt or .txt.gz; several files follow one another, and come again where they are used up) with the built-in model and
`streaming` on it, through the fixed-shape step, scoring each token as it comes. With --chunk tokens pass in chunks, which give
the same result, and only the last `probe` tokens of every tenth one by one. Writes one record for every tenth of the way: mean
NLL, median milliseconds a step, bytes of the cache. The paper's figure is that the loss stays level to four million tokens; since
passages differ by more than a drift would, the stream ends with the passage that it begins with (100,000 tokens, or a quarter of
a shorter stream), and what is judged is its loss at both places, within 2 %, and that steps and the cache are level.

Beside it, in the same run and on the same tokens, the last `probe` before 8k, 16k, 32k, … tokens (--no-peers leaves them out):

    window recomputed     as many tokens as the cache holds, read anew for every token: the paper's baseline
    dense cache           stock attention over everything so far, until it is out of memory or out of --peer-s seconds
    static cache          stock `generate` with transformers' compiled static cache (CUDA; time only)

What streaming comes to is in the file before the peers begin, and each peer's records as soon as it is done.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import DynamicCache

import longspan as ls
from longspan.bench.timings import generate_row
from longspan.core.facts import facts_of
from longspan.core.method import combination
from longspan.memory.streaming import StreamingLLM
from longspan.reading.stream_decoder import StreamDecoder
from longspan.util.failures import is_out_of_memory
from longspan.util.units import read_size

SEGMENTS = 10
PROMPT = 4096
READ = 16384
"""Tokens that the dense peer reads at once."""
PASSAGE = 100_000
"""Tokens of the passage that a stream begins and ends with."""
LEVEL = 0.02
TIME_LEVEL = 0.1
"""How far loss and time of a step may be from where they began."""


def read(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")


def tokens_of(texts: list[Path], tokenizer: Any, count: int) -> Tensor:
    """(1, count): the texts after one another, again and again, and at the end the passage that they begin with."""
    ids = torch.tensor([i for path in texts for i in tokenizer(read(path), verbose=False)["input_ids"]])
    stream = ids.repeat(-(-count // len(ids)))[:count]
    last = passage(count)
    stream[-last:] = stream[:last].clone()
    return stream[None]


def passage(count: int) -> int:
    """Tokens of the passage that a stream of `count` begins and ends with."""
    return min(PASSAGE, count // 4)


def level(losses: Tensor, records: list[dict[str, Any]], prompt: int) -> dict[str, Any]:
    """The passage's mean loss at the stream's beginning, past the prompt, and at its end, and what holds. losses (count,), NaN
    where a token was not read: of the prompt, and of the last ones, fewer than `SEGMENTS`, and what comes after them."""
    count, last = len(losses), passage(len(losses))
    first, again = (losses[begin + prompt : begin + last - SEGMENTS].mean().item() for begin in (0, count - last))
    steps, sizes = [r["ms_per_step"] for r in records], {r["cache_bytes"] for r in records}
    even = all(abs(step / steps[0] - 1) <= TIME_LEVEL for step in steps)
    said = {
        f"at the end a passage's loss is within {LEVEL:.0%} of that at the beginning": abs(again / first - 1) <= LEVEL,
        f"a step takes the same time in every tenth, within {TIME_LEVEL:.0%} of the first": even,
        "the cache is level": len(sizes) == 1,
    }
    return {"passage_tokens": last - SEGMENTS - prompt, "first_nll": first, "last_nll": again, "claims": said}


def length(text: str) -> int:
    return read_size(text, "length")


def now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Stream:
    """One reading by streaming. losses[i] and times[i]: nats and seconds of the step that reads token i; NaN where none did."""

    def __init__(self, model: Any, ids: Tensor, prompt: int):
        self.model, self.ids = model, ids
        self.losses = torch.full((ids.shape[1],), torch.nan, device=ids.device)
        self.times = torch.full((ids.shape[1],), torch.nan, dtype=torch.float64)
        self.cache = DynamicCache(config=model.config)
        model(input_ids=ids[:, :prompt], past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.decoder = StreamDecoder(model, self.cache, compile=model.device.type == "cuda")

    def steps(self, start: int, end: int) -> None:
        for i in range(start, end):
            begun = now(self.model)
            logits = self.decoder.step(self.ids[:, i : i + 1])
            self.losses[i] = F.cross_entropy(logits.float(), self.ids[:, i + 1])
            self.times[i] = now(self.model) - begun

    def chunks(self, start: int, end: int, size: int) -> None:
        for i in range(start, end, size):
            part = self.ids[:, i : min(i + size, end)]
            logits = self.model(input_ids=part, past_key_values=self.cache, use_cache=True).logits[0]
            after = self.ids[0, i + 1 : i + 1 + len(logits)]
            for j in range(0, len(logits), 1024):
                loss = F.cross_entropy(logits[j : j + 1024].float(), after[j : j + 1024], reduction="none")
                self.losses[i + j : i + j + len(loss)] = loss

    def cache_bytes(self) -> int:
        held = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for layer in self.cache.layers
            for t in (layer.keys, layer.values, layer.sink_keys)
        }
        return sum(held.values())


@torch.inference_mode()
def stream(
    model: Any, ids: Tensor, options: argparse.Namespace, places: list[int]
) -> tuple[Stream, list[dict[str, Any]]]:
    """Reads everything; single steps are where a tenth or one of `places` ends, or everywhere without chunks."""
    made, end = Stream(model, ids, options.prompt), ids.shape[1] - 1
    size = (end - options.prompt) // SEGMENTS
    tenths = [options.prompt + size * (s + 1) for s in range(SEGMENTS)]
    done = options.prompt
    for stop in sorted({*tenths, *places}):
        first = max(done, stop - options.probe) if options.chunk else done
        if options.chunk:
            made.chunks(done, first, options.chunk)
        made.steps(first, stop)
        done = stop
    records = []
    for stop in tenths:
        part = slice(stop - size, stop)
        timed = [t for t in made.times[part].tolist() if t == t]
        records.append(
            {
                "from_token": part.start,
                "to_token": stop,
                "nll": made.losses[part].mean().item(),
                "ms_per_step": 1000 * statistics.median(timed),
                "cache_bytes": made.cache_bytes(),
            }
        )
    return made, records


def record_of(peer: str, at: int, losses: list[float], times: list[float], **more: Any) -> dict[str, Any]:
    return {
        "peer": peer,
        "at": at,
        "nll": statistics.fmean(losses),
        "ms_per_step": 1000 * statistics.median(times),
        **more,
    }


@torch.inference_mode()
def recomputed(model: Any, ids: Tensor, places: list[int], window: int, probe: int) -> Iterator[dict[str, Any]]:
    """The last `window` tokens read anew for every token."""
    for at in places:
        losses, times = [], []
        for i in range(at - probe, at):
            begun = now(model)
            logits = model(input_ids=ids[:, i + 1 - window : i + 1], use_cache=False, logits_to_keep=1).logits[:, -1]
            times.append(now(model) - begun)
            losses.append(F.cross_entropy(logits.float(), ids[:, i + 1]).item())
        yield record_of("window recomputed", at, losses, times)


@torch.inference_mode()
def dense(model: Any, ids: Tensor, places: list[int], probe: int, most_s: float) -> Iterator[dict[str, Any]]:
    """Stock attention and a cache of everything."""
    cache, done, begun = DynamicCache(config=model.config), 0, time.perf_counter()
    for at in places:
        losses, times = [], []
        while done < at:
            if time.perf_counter() - begun > most_s:
                yield {"peer": "dense cache", "at": at, "note": f"past {most_s:,.0f} s at {done:,} tokens"}
                return
            alone = done >= at - probe
            end = done + 1 if alone else min(done + READ, at - probe)
            start = now(model)
            logits = model(input_ids=ids[:, done:end], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            if alone:
                times.append(now(model) - start)
                losses.append(F.cross_entropy(logits[:, -1].float(), ids[:, end]).item())
            done = end
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        yield record_of("dense cache", at, losses, times, cache_bytes=held)


def static(
    model: Any, ids: Tensor, places: list[int], probe: int, most_s: float, reached: int
) -> Iterator[dict[str, Any]]:
    """transformers' compiled static cache; `generate` chooses its tokens, so it has no loss here. It reads its prompt twice, by
    full attention: no farther than `reached`, where the dense cache came in its seconds."""
    begun = time.perf_counter()
    for at in places:
        past = time.perf_counter() - begun > most_s
        if past or at > reached:
            why = f"past {most_s:,.0f} s" if past else f"the dense cache did not come so far in {most_s:,.0f} s"
            yield {"peer": "static cache", "at": at, "note": why}
            return
        row = generate_row(model, ids[:, :at], max(8, min(probe, 64)), static=True)
        yield {
            "peer": "static cache",
            "at": at,
            "ms_per_step": 1000 * (row.seconds or 0.0),
            "first_call_s": row.first_s,
        }


def measured(records: Iterator[dict[str, Any]], peer: str) -> list[dict[str, Any]]:
    """All that a peer gets done; what stops it is its last record."""
    made: list[dict[str, Any]] = []
    try:
        for record in records:
            made.append(record)
            print(told(record), flush=True)
    except Exception as error:  # whatever goes wrong with a peer is its result
        note = "out of memory" if is_out_of_memory(error) else f"failed: {type(error).__name__}: {error}"
        made.append({"peer": peer, "note": note})
        print(told(made[-1]), flush=True)
    return made


def peers(
    model: Any, ids: Tensor, made: Stream, options: argparse.Namespace, places: list[int]
) -> Iterator[list[dict[str, Any]]]:
    """All records of one peer after another, each beside streaming's figures on the same tokens."""
    probe, most = options.probe, options.peer_s
    running: list[tuple[str, Callable[[], Iterator[dict[str, Any]]]]] = [
        ("window recomputed", lambda: recomputed(model, ids, places, options.capacity, probe)),
        ("dense cache", lambda: dense(model, ids, places, probe, most)),
    ]
    reached = options.capacity
    if model.device.type == "cuda":
        sizes = [options.capacity, *places[2::2]]  # each is compiled anew
        running.append(("static cache", lambda: static(model, ids, sizes, probe, most, reached)))
    for peer, begin in running:
        records = measured(begin(), peer)
        if peer == "dense cache":
            reached = max([reached, *(r["at"] for r in records if "nll" in r)])
        for record in records:
            if "nll" in record:
                part = slice(record["at"] - probe, record["at"])
                record["streaming_nll"] = made.losses[part].mean().item()
                record["streaming_ms_per_step"] = 1000 * made.times[part].nanmedian().item()
        yield records
        gc.collect()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()


def told(record: dict[str, Any]) -> str:
    figures = [f"NLL {record['nll']:.3f}"] if "nll" in record else []
    figures += [f"{record['ms_per_step']:.3f} ms"] if "ms_per_step" in record else []
    figures += [f"{record['cache_bytes'] / 1e6:.1f} MB"] if "cache_bytes" in record else []
    return f"{record['peer']:>18}, at {record.get('at', 0):>9,}: {'  '.join([*figures, record.get('note', '')])}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, nargs="+")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", default="streaming:sinks=4,window=2044")
    parser.add_argument("--tokens", type=length, default=100_000)
    parser.add_argument("--prompt", type=length, default=PROMPT, help="read at once, before the first step")
    parser.add_argument("--chunk", type=length, default=0, help="tokens read at once between single steps")
    parser.add_argument("--probe", type=length, default=32, help="single steps that are compared with peers")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--peer-s", type=float, default=90.0, help="seconds after which a peer stops")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if passage(options.tokens) < 2 * options.prompt:
        raise SystemExit(
            f"--tokens {options.tokens:,} are too few for a prompt of {options.prompt:,}: 8 times that or more"
        )
    model, tokenizer = ls.load(options.model)
    ids = tokens_of(options.text, tokenizer, options.tokens).to(model.device)
    places = [2 * options.prompt << i for i in range(30) if 2 * options.prompt << i < ids.shape[1]]
    if not options.peers:
        places = []
    (method,) = combination(options.method).resolve(facts_of(model), None).methods
    if not isinstance(method, StreamingLLM):
        raise SystemExit(f"--method is a streaming:sinks=…,window=…, not {options.method}")
    options.capacity = method.sinks + method.recent
    ls.apply(model, method)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    made, records = stream(model, ids, options, places)
    peak = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else None
    for r in records:
        place = f"{r['from_token']:>9,}–{r['to_token']:<9,}"
        print(f"{place} NLL {r['nll']:.3f}  {r['ms_per_step']:.3f} ms  {r['cache_bytes'] / 1e6:.1f} MB", flush=True)
    ls.remove(model)
    made.cache, made.decoder = None, None  # type: ignore[assignment]  # their memory is the peers'
    result = {
        "method": options.method,
        "model": options.model,
        "text": [path.name for path in options.text],
        "tokens": ids.shape[1],
        "chunk": options.chunk,
        "probe": options.probe,
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "CPU",
        "dtype": str(model.dtype),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peak_bytes": peak,
        "segments": records,
        "level": level(made.losses, records, options.prompt),
        "peers": [],
    }
    said = result["level"]
    print(f"the same passage: NLL {said['first_nll']:.4f} at the beginning, {said['last_nll']:.4f} at the end")
    for claim, holds in said["claims"].items():
        print(f"{'holds' if holds else 'does not hold'}: {claim}", flush=True)
    write(result, options)
    if options.peers:
        for found in peers(model, ids, made, options, places):
            result["peers"] += found
            write(result, options)


def write(result: dict[str, Any], options: argparse.Namespace) -> None:
    """What there is so far: a run that is broken off leaves it."""
    options.out.mkdir(parents=True, exist_ok=True)
    name = options.method.replace(":", "-").replace(",", "-").replace("=", "")
    (options.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

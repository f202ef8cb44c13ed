"""Decoding with a rolling KV cache as one fixed step, which a CUDA graph replays.

Once the ring buffer is full, every step is the same work on the same tensors: rotate the sink keys of all layers by one more
position, overwrite the oldest key and value, attend to all slots. Token number, slot and positions are on the device, so
the host decides nothing and thousands of kernel launches become one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from longspan.hf.compat import cache_of, given_cache, with_cache
from longspan.hf.rolling import StreamingLayer
from longspan.hf.site import Site, site_of
from longspan.memory.streaming import SinkKeys, Streaming
from longspan.util.device import on_device
from longspan.util.errors import NotSupported

PREFERRED = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""SDPA backends by speed: for one query over a few thousand keys cuDNN takes about half of FlashAttention's time on Hopper."""


class StreamDecoder:
    """Decodes token by token with `streaming`, from a cache that contains the prompt.

        decoder = StreamDecoder(model, cache)
        logits = decoder.step(ids)            # (B, 1) -> (B, vocabulary)
        ids = decoder.greedy(ids, 100)        # (B, 1) -> (B, 100) greedy tokens, chosen on the device
        for token in decoder.stream(ids): …   # the same one by one, without end

    graph: replay a CUDA graph (None: on CUDA). compile: let torch.compile fuse the step first, which takes about a minute.
    Until the ring buffer is full, steps are ordinary forwards. Between steps the model may read other tokens with the same
    cache, such as a chat's next turn, as long as its rows stay the same.

    Raises `NotSupported` for a model without streaming, an empty cache, layers on several devices, or a model whose own
    window is shorter than the ring buffer.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, *, graph: bool | None = None, compile: bool = False):
        site = _streaming_site(model)
        if site is None:
            raise NotSupported('StreamDecoder needs a model with streaming on it: apply(model, "streaming") first')
        if not cache.layers or not isinstance(cache.layers[0], StreamingLayer) or cache.get_seq_length() == 0:
            raise NotSupported("StreamDecoder needs a streaming cache that contains the prompt: run the prompt first")
        self.model, self.site, self.cache = model, site, cache
        self.layers = cast(list[StreamingLayer], cache.layers)
        if len({layer.device for layer in self.layers}) > 1:
            raise NotSupported("StreamDecoder runs on one device; this model's layers are spread over several")
        if not _attends_to_whole_ring(site):
            raise NotSupported(
                f"StreamDecoder attends to the whole ring buffer; this model's layers attend to the last "
                f"{site.facts.sliding_window:,} tokens only. Use the model's own generate, or fewer sinks and a shorter window"
            )
        device = self.layers[0].device
        self.leading = leading(model)
        self.graph = device.type == "cuda" if graph is None else graph
        self.compile = compile
        self._ready = False
        self._token_on_device = -1
        self._recorded: torch.cuda.CUDAGraph | None = None
        batch = self.layers[0].keys.shape[0]
        pad = self.layers[0].pad
        self.ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.pad = torch.zeros(batch, 1, dtype=torch.long, device=device) if pad is None else pad[:, None].to(device)
        self.token = torch.zeros(1, dtype=torch.long, device=device)
        self._fixed_from = self.capacity + int(self.pad.max()) - 1

    @property
    def capacity(self) -> int:
        """Slots of the ring buffer and the sinks together, in tokens."""
        return self.layers[0].sinks + self.layers[0].window

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Reads one token per row, (B, 1), and returns the next logits, (B, vocabulary).

        With a graph the next step overwrites the result.
        """
        with on_device(self.ids.device):
            if self.layers[0].seen < self._fixed_from:
                logits = self.model(input_ids=ids, use_cache=True, **with_cache(self.model, self.cache)).logits[:, -1]
                self.ids.copy_(logits.argmax(-1, keepdim=True))
                return logits
            self._prepare()
            self.ids.copy_(ids)
            return self._advance()

    @torch.inference_mode()
    def greedy_step(self) -> Tensor:
        """Reads the last step's likeliest token and returns the next, (B, 1), on the device.

        The next step overwrites the result.
        """
        if self.layers[0].seen < self._fixed_from:
            self.step(self.ids.clone())
        else:
            with on_device(self.ids.device):
                self._prepare()
                self._advance()
        return self.ids

    def stream(self, ids: Tensor) -> Iterator[Tensor]:
        """Greedy tokens after `ids` (B, 1), without end, each (B, 1) on the CPU.

        A token is computed while the one before is copied to the CPU, so after n tokens the cache contains one more.
        """
        self.step(ids)
        pending = self._copy_to_cpu()
        while True:
            self.greedy_step()
            following = self._copy_to_cpu()
            yield pending()
            pending = following

    def greedy(self, ids: Tensor, count: int) -> Tensor:
        """`count` greedy tokens after `ids` (B, 1), as (B, count) on the device."""
        self.step(ids)
        tokens = [self.ids.clone()]
        while len(tokens) < count:
            tokens.append(self.greedy_step().clone())
        return torch.cat(tokens, dim=1)

    def _copy_to_cpu(self) -> Callable[[], Tensor]:
        """Starts copying the newest token to the CPU; the returned function waits for it."""
        if self.ids.device.type != "cuda":
            token = self.ids.clone()
            return lambda: token
        with on_device(self.ids.device):
            host = torch.empty(self.ids.shape, dtype=self.ids.dtype, pin_memory=True)
            host.copy_(self.ids, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()

        def wait() -> Tensor:
            arrived.synchronize()
            return host

        return wait

    def _advance(self) -> Tensor:
        if self._recorded is not None:
            self._recorded.replay()
        else:
            self.logits = self._run()
        for layer in self.layers:
            layer.seen += 1
        self._token_on_device = self.layers[0].seen
        return self.logits

    def _prepare(self) -> None:
        """Once, stacks all layers' keys and records the graph.

        Later, accounts for tokens read between steps.
        """
        if self._ready:
            if self._token_on_device != self.layers[0].seen:
                self.token.fill_(self.layers[0].seen)
            return
        self.token.fill_(self.layers[0].seen)
        with torch.inference_mode(False):  # the cache is used after the decoder, in whatever mode
            self.keys = torch.stack([layer.keys for layer in self.layers])
        for i, layer in enumerate(self.layers):
            layer.keys = self.keys[i]
        self._sinks = SinkKeys(self.site, self.layers)
        self._forward = self._model_step
        if self.compile:
            # Products with one row become reductions that fuse with the operations around them, and with one another.
            options: dict[str, Any] | None = None
            if self.graph:
                options = {"coordinate_descent_tuning": True, "combo_kernels": True, "benchmark_combo_kernel": False}
            self._forward = torch.compile(self._model_step, dynamic=False, options=options)
        if self.graph:
            self._record()
        self._ready = True

    def _run(self) -> Tensor:
        """One step on the device's tensors, which a graph records."""
        sinks, window = self.layers[0].sinks, self.layers[0].window
        slot = sinks + (self.token - sinks) % window
        if sinks:
            self._rotate_sinks(sinks, window)
        with sdpa_kernel(PREFERRED, set_priority=True):
            logits = self._forward(self.ids, self.token - self.pad - self.leading, slot)
        self.token.add_(1)
        self.ids.copy_(logits.argmax(-1, keepdim=True))
        return logits

    def _rotate_sinks(self, sinks: int, window: int) -> None:
        for layers, rotated in self._sinks.turned(self.token + 1 - sinks - window - self.pad):
            which = slice(None) if len(layers) == len(self.layers) else layers
            self.keys[which, :, :, :sinks] = rotated.to(self.keys.dtype)

    def _model_step(self, ids: Tensor, positions: Tensor, slot: Tensor) -> Tensor:
        for layer in self.layers:
            layer.fixed_slot = slot
        try:
            out = self.model(
                input_ids=ids,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
                **with_cache(self.model, self.cache),
            )
        finally:
            for layer in self.layers:
                layer.fixed_slot = None
        return out.logits[:, -1]

    def _record(self) -> None:
        """Warms up on a side stream, restores the cache, and records one step."""
        before: dict[str, Any] = {
            "keys": self.keys.clone(),
            "values": [layer.values.clone() for layer in self.layers],
            "token": self.token.clone(),
            "ids": self.ids.clone(),
        }
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        self.keys.copy_(before["keys"])
        for layer, values in zip(self.layers, before["values"], strict=True):
            layer.values.copy_(values)
        self.token.copy_(before["token"])
        self.ids.copy_(before["ids"])
        recorded = torch.cuda.CUDAGraph()
        # By default one stream serves all graphs, on the device of the first.
        with torch.cuda.graph(recorded, stream=stream):
            self.logits = self._run()
        self._recorded = recorded


def leading(model: PreTrainedModel) -> int:
    """The number of tokens that the model itself puts before a text.

    They are in the cache and not in the input.
    """
    return int(getattr(model.base_model, "leading", 0))


def steps_are_faster(model: PreTrainedModel) -> bool:
    """True where `stream_generate` is faster than the model's forward: streaming on one CUDA device."""
    site = _streaming_site(model)
    if site is None or model.device.type != "cuda" or not _attends_to_whole_ring(site):
        return False
    return len({p.device for p in model.parameters()}) == 1


def _streaming_site(model: PreTrainedModel) -> Site | None:
    site = site_of(model)
    return site if site is not None and isinstance(site.state, Streaming) else None


def _attends_to_whole_ring(site: Site) -> bool:
    """True where the model's own window, if it has one, covers all slots of the ring buffer."""
    window, method = site.facts.sliding_window, site.state.method
    return window is None or window >= method.sinks + method.recent


@torch.no_grad()
def stream_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    compile: bool = False,
    **model_kwargs: Any,
) -> Tensor:
    """Greedy decoding and sampling through `StreamDecoder`, for transformers' own `generate`:

        model.generate(ids, custom_generate=ls.stream_generate)

    compile: as in `StreamDecoder`. Returns the prompt with its continuation, (B, T). Raises `NotSupported` for beams and
    for results other than the tokens.
    """
    if (generation_config.num_beams or 1) > 1 or generation_config.return_dict_in_generate:
        raise NotSupported(
            "stream_generate samples or takes the likeliest token and returns tokens alone; for beams, scores or a dict "
            "leave out custom_generate"
        )
    cache, mask = given_cache(model_kwargs), model_kwargs.get("attention_mask")
    end = max(0, cache.get_seq_length() - leading(model)) if cache is not None else 0
    for part in input_ids[:, end:].split(generation_config.prefill_chunk_size or input_ids.shape[1], dim=1):
        end += part.shape[1]
        part_mask = None if mask is None else mask[:, :end]
        read = model(
            input_ids=part, attention_mask=part_mask, use_cache=True, logits_to_keep=1, **with_cache(model, cache)
        )
        cache = cache_of(read)
    decoder, logits = StreamDecoder(model, cast(Cache, cache), compile=compile), read.logits[:, -1]
    running = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    while True:
        scores = logits_processor(input_ids, logits.to(torch.float32, copy=True))  # type: ignore[arg-type]
        token = scores.softmax(-1).multinomial(1)[:, 0] if generation_config.do_sample else scores.argmax(-1)
        if not bool(running.all()):
            token = torch.where(running, token, cast(int, generation_config.pad_token_id))
        input_ids = torch.cat((input_ids, token[:, None]), dim=1)
        if streamer is not None:
            streamer.put(token.cpu())
        running &= ~stopping_criteria(input_ids, scores)  # type: ignore[arg-type]
        if not bool(running.any()):
            break
        logits = decoder.step(token[:, None])
    if streamer is not None:
        streamer.end()
    return input_ids

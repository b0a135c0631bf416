# SPDX-License-Identifier: Apache-2.0
"""What of a PEFT adapter_config.json decides ΔW: rank, alpha, their patterns and rsLoRA.

Everything that would make ΔW something other than scaling · B · A is refused here, with its reason.
"""

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from vllm_merge.errors import UserInputError

Number = TypeVar("Number", int, float)

MAX_CONFIG_BYTES = 4 * 2**20

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

    def unmatched_patterns(self, modules: Collection[str]) -> list[str]:
        """A sentence for each rank_pattern or alpha_pattern key that matches none of `modules`."""
        return [
            f"{field} key {key!r} matches no module of the adapter and has no effect"
            for field, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern))
            for key, _ in pattern
            if not _matches_any(key, modules)
        ]


def parse_config(data: bytes, where: Path) -> LoraConfig:
    """Parse and check adapter_config.json; `where` names the file in messages. Raises UserInputError."""
    if len(data) > MAX_CONFIG_BYTES:
        raise UserInputError(f"{where}: {len(data):,} bytes; an adapter_config.json has at most {MAX_CONFIG_BYTES:,}")
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
            (key, _rank(value, f"rank_pattern[{key!r}]", where))
            for key, value in _pattern(fields, "rank_pattern", where).items()
        ),
        alpha_pattern=tuple(
            (key, _alpha(value, f"alpha_pattern[{key!r}]", where))
            for key, value in _pattern(fields, "alpha_pattern", where).items()
        ),
        use_rslora=_flag(fields.get("use_rslora", False), "use_rslora", where),
        base_model=_text(fields.get("base_model_name_or_path"), "base_model_name_or_path", where),
        revision=_text(fields.get("revision"), "revision", where),
    )


def _refuse_other_kinds(fields: Mapping[str, object], where: Path) -> None:
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise UserInputError(f"{where}: peft_type is {kind!r}; only 'LORA' adapters can be merged")
    for field, reason in _REFUSED_FIELDS.items():
        if fields.get(field) not in (None, False, [], {}):
            raise UserInputError(f"{where}: {field} is set: {reason}; train or convert the adapter without it")
    bias = fields.get("bias", "none")
    if bias != "none":
        raise UserInputError(
            f"{where}: bias is {bias!r}; only 'none' is allowed, because trained biases are not part of a LoRA merge"
        )
    init = fields.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise UserInputError(
            f"{where}: init_lora_weights is {init!r}, which changes the base weights; save the adapter again with "
            "PEFT's path_initial_model_for_weight_conversion, which turns it into an ordinary LoRA"
        )


def _matcher(key: str) -> re.Pattern[str]:
    # PEFT's rule: the key is a regular expression for the end of the module's name, from a dot or its beginning.
    return re.compile(rf"(.*\.)?({key})$")


def _whole_name(key: str) -> str | None:
    """The one name that `key` matches, if it is of the form `^model\\.layers\\.0$`; merged adapters have "
    "many of those."""
    found = re.fullmatch(r"\^((?:[\w-]|\\\.)+)\$", key)
    return found[1].replace("\\.", ".") if found else None


def _matches_any(key: str, modules: Collection[str]) -> bool:
    if (name := _whole_name(key)) is not None:
        return name in modules
    matcher = _matcher(key)
    return any(matcher.match(module) for module in modules)


def _at_modules(
    pattern: tuple[tuple[str, Number], ...], modules: Collection[str], default: Number
) -> dict[str, Number]:
    """Each module's value: that of the first key that matches it, else `default`."""
    values = dict.fromkeys(modules, default)
    for key, value in reversed(pattern):
        if (name := _whole_name(key)) is not None:
            if name in values:
                values[name] = value
        else:
            matcher = _matcher(key)
            values.update((module, value) for module in modules if matcher.match(module))
    return values


def _pattern(fields: Mapping[str, object], field: str, where: Path) -> dict[str, object]:
    pattern = fields.get(field) or {}
    if not isinstance(pattern, dict):
        raise UserInputError(f"{where}: {field} must map module names to numbers, found {type(pattern).__name__}")
    for key in pattern:
        try:
            _matcher(key)
        except re.error as error:
            raise UserInputError(f"{where}: {field} key {key!r} is not a regular expression ({error.msg})") from None
    return pattern


def _rank(value: object, field: str, where: Path) -> int:
    if type(value) is not int or value < 1:
        raise UserInputError(f"{where}: {field} is {value!r}; a rank is a whole number of at least 1")
    return value


def _alpha(value: object, field: str, where: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserInputError(f"{where}: {field} is {value!r}; an alpha is a finite number")
    return value


def _flag(value: object, field: str, where: Path) -> bool:
    if not isinstance(value, bool):
        raise UserInputError(f"{where}: {field} is {value!r}; allowed are true and false")
    return value


def _text(value: object, field: str, where: Path) -> str | None:
    if value is not None and not isinstance(value, str):
        raise UserInputError(f"{where}: {field} is {value!r}; allowed are text and null")
    return value or None

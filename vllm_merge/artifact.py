# SPDX-License-Identifier: Apache-2.0
"""The result of a merge: factors, a report of what the merge did, and the recipe it came from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vllm_merge.adapters.arrangement import FactorViews
from vllm_merge.adapters.factors import Adapter, LoraFactors, factors_sha256, natural_key
from vllm_merge.adapters.sequence_state import REPORT_FILE
from vllm_merge.errors import UserInputError

RECIPE_FILE = "recipe.json"


@dataclass(slots=True)
class MergeReport:
    """What a merge did. Norms are Frobenius norms; every mapping without another key goes by module.

    energy_kept: share of ‖ΔW‖²_F that the rank keeps, None where nothing was cut off. input_norms: by module, then by
    adapter in order (0 where it lacks the module). sign_conflict: share of the entries, in the space of the merge, whose
    adapters disagree in sign; of those that are kept, for methods that elect signs; absent for methods that work on
    singular vectors and so see no entries. seconds: by stage; `statistics` and `merge` include what they prepare on the
    way, `factors` includes the first part of `report`.
    cosines, column_overlaps, row_overlaps: of every two adapters, in the order (0, 1), (0, 2), …, (1, 2), …;
    result_cosines: of every adapter with the result; effective_rank: of the result. `algebra.overview` defines them; None
    stands where an adapter lacks the module. overall: the same and norms, energy and seconds of the whole model.
    peak_workspace_bytes: most bytes held at once beside inputs and result, counted from the sizes of the arrays.
    continuation: what a sequential method needs, beside the factors, to go on with one more adapter.
    """

    method: str
    space: str
    adapters: list[str] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)
    energy_kept: dict[str, float | None] = field(default_factory=dict)
    input_norms: dict[str, list[float]] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    cosines: dict[str, list[float | None]] = field(default_factory=dict)
    result_cosines: dict[str, list[float | None]] = field(default_factory=dict)
    column_overlaps: dict[str, list[float | None]] = field(default_factory=dict)
    row_overlaps: dict[str, list[float | None]] = field(default_factory=dict)
    effective_rank: dict[str, float | None] = field(default_factory=dict)
    sign_conflict: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_workspace_bytes: int = 0
    dropped_adapters: list[str] = field(default_factory=list)
    dropped_modules: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    continuation: dict[str, Any] = field(default_factory=dict)
    overall: dict[str, Any] = field(default_factory=dict)

    def describe(
        self, modules: Sequence[str], by_module: Mapping[str, Sequence[Any]], overall: Mapping[str, Sequence[Any]]
    ) -> None:
        """Take over what was found: by name of the field, the values of `modules`, and one of the whole model."""
        self.overall = {name: values[0] for name, values in overall.items()}
        for name, values in by_module.items():
            if name == "sign_conflict" and self.sign_conflict:  # counted by the method itself, of what it keeps
                self.overall[name] = sum(self.sign_conflict.values()) / len(self.sign_conflict)
            else:
                setattr(self, name, {m: v for m, v in zip(modules, values, strict=True) if v is not None})
        kept = {m: 1.0 if share is None else share for m, share in self.energy_kept.items() if m in self.norms}
        before = sum(self.norms[m] ** 2 / share for m, share in kept.items())
        after = sum(norm**2 for norm in self.norms.values())
        squares = [sum(norms[i] ** 2 for norms in self.input_norms.values()) for i in range(len(self.adapters))]
        self.overall |= {
            "norm": after**0.5,
            "input_norms": [square**0.5 for square in squares],
            "energy_kept": after / before if before > 0 else 1.0,
            "least_energy_kept": min(kept.values(), default=1.0),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


class MergedAdapter:
    """A merged adapter: module → LoraFactors with scaling 1, in natural module order."""

    def __init__(
        self,
        name: str,
        factors: Mapping[str, LoraFactors],
        report: MergeReport,
        provenance: Mapping[str, object],
        base_model: str | None = None,
    ) -> None:
        self.name = name
        self.factors: Mapping[str, LoraFactors] = factors  # views are made when they are asked for, in natural order
        if not isinstance(factors, FactorViews):
            self.factors = {module: factors[module] for module in sorted(factors, key=natural_key)}
        self.report = report
        self.provenance: dict[str, object] = dict(provenance)
        self.base_model = base_model

    def delta(self, module: str) -> Tensor:
        """ΔW of a module as a dense (d_out, d_in) float32 matrix, of an embedding (features, tokens).

        KeyError for a module that is not in the result.
        """
        return self.factors[module].delta()

    @property
    def rank(self) -> int:
        """Largest rank over the modules (0 without modules)."""
        return max((module.rank for module in self.factors.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(module.nbytes for module in self.factors.values())

    @property
    def tensors_sha256(self) -> str:
        """SHA-256 (hex) of names, shapes, dtypes and bytes of the factors, the same after saving and loading."""
        return factors_sha256(self.factors)

    def as_adapter(self) -> Adapter:
        """The result as an adapter that can be merged again, or continued by the sequential method that made it."""
        return Adapter(
            self.name, self.factors, base_model=self.base_model, metadata={"continuation": self.report.continuation}
        )

    def save_pretrained(self, path: str | Path) -> None:
        """Write a PEFT folder with the report and the recipe beside; the folder appears whole or not at all.

        Raises UserInputError when the path exists already, or when the result has no module.
        """
        from vllm_merge.adapters.folders import new_folder
        from vllm_merge.adapters.peft import write_adapter

        if not self.factors:
            raise UserInputError(f"'{self.name}' has no module with a weight change; there is nothing to write")
        with new_folder(Path(path)) as folder:
            write_adapter(folder, self.factors, base_model=self.base_model)
            _write_json(folder / REPORT_FILE, self.report.to_dict())
            _write_json(folder / RECIPE_FILE, {"name": self.name, **self.provenance})

    @classmethod
    def from_pretrained(cls, path: str | Path) -> MergedAdapter:
        """Read a folder that save_pretrained wrote. Raises UserInputError for another kind of folder."""
        folder = Path(path)
        adapter = Adapter.from_peft(folder)
        report = MergeReport(**_read_json(folder / REPORT_FILE))
        provenance = _read_json(folder / RECIPE_FILE)
        name = str(provenance.pop("name"))
        return cls(name, adapter.factors, report, provenance, adapter.base_model)

    def __repr__(self) -> str:
        return f"MergedAdapter({self.name!r}, {len(self.factors)} modules, rank {self.rank})"


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserInputError(f"{path.parent} has no {path.name}; it was not written by a merge") from None
    except (OSError, ValueError) as error:
        raise UserInputError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserInputError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content

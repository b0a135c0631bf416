# SPDX-License-Identifier: Apache-2.0
"""The engine: parameters, ranks, reports, errors, cancelling, and the workspace it promises to keep to."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.adapters_in_memory import SHAPES, distance, map_factors, random_adapter, three, weighted_sum, zero_adapter
from tests.kernels.running import on_a_gpu
from vllm_merge import Adapter, LoraFactors, MergeCancelled, MergeError, UserInputError, merge
from vllm_merge.algebra.workspace import Workspace
from vllm_merge.engine import Job, _check_reachable
from vllm_merge.engine.finish import finite


def test_the_example_of_the_documentation() -> None:
    a = Adapter("a", {"layers.0.q_proj": LoraFactors(torch.randn(4, 16), torch.randn(8, 4), 2.0)})
    b = Adapter("b", {"layers.0.q_proj": LoraFactors(torch.randn(2, 16), torch.randn(8, 2))})
    m = merge(
        [a, b], merge_method="ties", space="knots", weights=[0.6, 0.4], parameters={"density": 0.2}, rank="lossless"
    )
    factors = m.factors["layers.0.q_proj"]
    assert factors.scaling == 1.0
    assert torch.allclose(m.delta("layers.0.q_proj"), factors.B @ factors.A)
    assert m.delta("layers.0.q_proj").shape == (8, 16)
    assert m.report.ranks == {"layers.0.q_proj": factors.rank}
    assert m.nbytes == factors.nbytes


def test_adapters_on_another_gpu_are_refused() -> None:
    def on(device: str) -> Any:
        return SimpleNamespace(
            name=device, factors={"m": SimpleNamespace(A=SimpleNamespace(device=torch.device(device)))}
        )

    for adapters, target in ((["cuda:1", "cpu", "cuda:1"], "cuda:1"), (["cuda:0", "cuda:1"], "cpu")):
        _check_reachable([on(device) for device in adapters], torch.device(target))
    with pytest.raises(
        UserInputError, match="adapter 'cuda:0' lies on cuda:0, and the merge works on cuda:1; read it to"
    ):
        _check_reachable([on("cpu"), on("cuda:0")], torch.device("cuda:1"))


@pytest.mark.parametrize("space", ["core", "delta", "knots"])
def test_task_arithmetic_is_the_weighted_sum(space: str) -> None:
    merged = merge(
        three(), merge_method="task_arithmetic", space=space, weights=[0.7, 0.2, -0.4], parameters={"lambda": 0.5}
    )
    assert distance(merged, weighted_sum(three(), [0.35, 0.1, -0.2])) < 1e-6
    assert set(merged.report.ranks.values()) == {10}
    assert set(merged.report.energy_kept.values()) == {None}


def test_precedence_of_parameters() -> None:
    merged = merge(
        three(),
        merge_method="task_arithmetic",
        parameters={"weight": 2.0},
        adapter_parameters=[{"weight": 3.0}, {}, {"weight": {"layers.0.q_proj": 5.0}}],
    )
    everywhere = weighted_sum(three(), [3.0, 2.0, 2.0])
    everywhere["layers.0.q_proj"] = weighted_sum(three(), [3.0, 2.0, 5.0])["layers.0.q_proj"]
    assert distance(merged, everywhere) < 1e-6
    assert distance(merge(three(), merge_method="task_arithmetic"), weighted_sum(three(), [1.0, 1.0, 1.0])) < 1e-6


def test_lambda_by_module() -> None:
    merged = merge(three(), merge_method="task_arithmetic", parameters={"lambda": {"layers.0.q_proj": 0.5}})
    expected = weighted_sum(three(), [1.0, 1.0, 1.0])
    expected["layers.0.q_proj"] *= 0.5
    assert distance(merged, expected) < 1e-6


def test_missing_modules() -> None:
    x, y, z = three()
    y = Adapter("y", {m: f for m, f in y.factors.items() if m != "layers.0.q_proj"})
    mean = merge([x, y, z], merge_method="linear")
    assert distance(mean, weighted_sum([x, y, z], [1 / 3] * 3)) < 1e-6
    assert mean.report.ranks["layers.0.q_proj"] == 5
    assert mean.report.input_norms["layers.0.q_proj"][1] == 0.0
    disjoint = merge([x, y, z], merge_method="linear", space="knots").delta("layers.0.q_proj")
    both = weighted_sum([x, z], [0.5, 0.5])["layers.0.q_proj"]
    assert torch.allclose(disjoint.double(), both, atol=1e-6)


def test_report_of_a_truncated_merge() -> None:
    full = merge(three(), merge_method="task_arithmetic")
    merged = merge(three(), merge_method="task_arithmetic", rank=2)
    for module in SHAPES:
        ratio = float(merged.delta(module).square().sum() / full.delta(module).square().sum())
        assert merged.report.energy_kept[module] == pytest.approx(ratio, abs=1e-5)
        assert merged.report.norms[module] == pytest.approx(float(merged.delta(module).norm()), rel=1e-5)
        norms = [float(adapter.factors[module].delta().norm()) for adapter in three()]
        assert merged.report.input_norms[module] == pytest.approx(norms, rel=1e-5)
    assert any("keep under 90% of their energy" in warning for warning in merged.report.warnings) == any(
        kept is not None and kept < 0.9 for kept in merged.report.energy_kept.values()
    )
    assert set(merged.report.seconds) == {"prepare", "merge", "truncate", "factors", "report"}
    assert merged.report.peak_workspace_bytes > 0


def test_low_energy_is_warned_about() -> None:
    many = [random_adapter(str(seed), 4, seed) for seed in range(5)]
    assert "4 of 4 modules keep under 90%" in merge(many, merge_method="linear", rank=1).report.warnings[0]
    assert merge(many, merge_method="linear").report.warnings == []


def test_zero_results_are_dropped() -> None:
    x = random_adapter("x", 3, 1)
    gone = merge([x, x], merge_method="task_arithmetic", weights=[1.0, -1.0])
    assert gone.factors == {}
    assert sorted(gone.report.dropped_modules) == sorted(SHAPES)
    nothing = merge([zero_adapter()], merge_method="linear")
    assert (nothing.factors, nothing.report.dropped_adapters) == ({}, ["zero"])


def test_cancelling_adapters_inside_one_adapter_count_as_zero() -> None:
    x = random_adapter("x", 2, 1)
    cancelled = map_factors(x, lambda f: LoraFactors(torch.cat([f.A, f.A]), torch.cat([f.B, -f.B], 1)))
    assert merge([cancelled, x], merge_method="linear").report.dropped_adapters == ["x"]


@pytest.mark.parametrize("merge_method", ["linear", "tsv_m"])
@pytest.mark.parametrize("report", ["full", "brief"])
def test_an_infinite_adapter_is_no_zero_adapter(merge_method: str, report: Any) -> None:
    x, y = random_adapter("x", 2, 1), random_adapter("y", 1, 2)
    for factors in y.factors.values():
        factors.B[3, 0] = float("inf")
    with pytest.raises(MergeError, match=r"adapter 'y', module 'layers.0.q_proj': .* not finite"):
        merge([x, y], merge_method=merge_method, report=report)


@pytest.mark.parametrize("merge_method", ["ties", "dare_ties", "pcb", "sce"])
def test_modules_that_no_adapter_changes(merge_method: str) -> None:
    """Those of one shape are a batch that has no direction at all; of another rank, one by itself."""

    def unchanged(adapter: Adapter) -> Adapter:
        zero = {m: LoraFactors(f.A[:2], f.B[:, :2] * 0) for m, f in adapter.factors.items() if "up" in m}
        return Adapter(adapter.name, {**adapter.factors, **zero})

    adapters = [unchanged(random_adapter("x", 3, 1)), unchanged(random_adapter("y", 3, 2))]
    for workspace_bytes in (1 << 30, 20_000):
        merged = merge(adapters, merge_method=merge_method, space="knots", workspace_bytes=workspace_bytes)
        assert list(merged.factors) == ["layers.0.q_proj", "layers.1.q_proj"]
        assert sorted(merged.report.dropped_modules) == ["layers.0.up_proj", "layers.1.up_proj"]


def test_not_finite_inputs_and_results() -> None:
    x, y, z = three()
    broken = dict(y.factors)
    bad = broken["layers.1.q_proj"].B.clone()
    bad[3, 1] = float("nan")
    broken["layers.1.q_proj"] = LoraFactors(broken["layers.1.q_proj"].A, bad)
    for space in ("core", "delta", "knots"):
        with pytest.raises(MergeError, match=r"adapter 'y', module 'layers.1.q_proj': .* not finite"):
            merge([x, Adapter("y", broken), z], merge_method="linear", space=space)
    with pytest.raises(MergeError, match=r"module 'layers.0.up_proj|q_proj': the merged weight change is not finite"):
        merge(
            three(),
            merge_method="task_arithmetic",
            space="delta",
            weights=[3e38, 3e38, 3e38],
            parameters={"lambda": 1e6},
        )
    with pytest.raises(MergeError, match=r"do not fit torch.float16"):
        merge(three(), merge_method="task_arithmetic", weights=[1e12, 1.0, 1.0], dtype=torch.float16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"merge_method": "linear", "weights": [1.0]}, "weights has 1 entries for 3 adapters"),
        ({"merge_method": "linear", "weights": [1.0, -1.0, 0.0]}, "add up to 0"),
        ({"merge_method": "linear", "precondition": ["norm_cop"]}, "unknown precondition 'norm_cop', did you mean"),
        ({"merge_method": "linear", "rank": "some"}, "allowed are 'auto'"),
        ({"merge_method": "liner"}, "did you mean 'linear'"),
        ({"merge_method": "linear", "space": "factors"}, "not defined in space 'factors'"),
        (
            {"merge_method": "linear", "weights": [1, 1, 1], "adapter_parameters": [{}, {"weight": 1.0}, {}]},
            "adapter 'y': its weight is given twice",
        ),
        ({"merge_method": "ties", "adapter_parameters": [{}, {}, {"density": 0}]}, "adapter 'z': .*'density' is 0"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        merge(three(), **arguments)


def test_no_adapters_and_other_shapes() -> None:
    with pytest.raises(UserInputError, match="no adapter to merge"):
        merge([], merge_method="linear")
    other = Adapter("other", {"layers.0.q_proj": LoraFactors(torch.ones(1, 5), torch.ones(4, 1))})
    with pytest.raises(
        UserInputError, match=r"module 'layers.0.q_proj': adapter 'other' has ΔW of shape \(4, 5\), adapter 'x'"
    ):
        merge([*three(), other], merge_method="linear")


@pytest.mark.parametrize("stage", ["prepare", "statistics", "merge", "truncate"])
def test_cancel_in_every_stage(stage: str) -> None:
    seen: list[str] = []

    def progress(name: str, done: int, total: int) -> None:
        assert 0 <= done < total == len(SHAPES)
        seen.append(name)

    with pytest.raises(MergeCancelled):
        merge(three(), merge_method="ties", progress=progress, cancelled=lambda: stage in seen)
    assert seen[-1] == stage
    assert len(seen) == seen.index(stage) + 1


@pytest.mark.parametrize("space", ["delta", "knots", "core"])
@pytest.mark.parametrize("rank", ["lossless", 3])
def test_a_small_workspace_gives_the_same_result(space: str, rank: int | str) -> None:
    """Every bound on the workspace: batches of one module, strips, and merged entries made anew at every pass."""
    arguments: dict[str, Any] = {"merge_method": "ties", "space": space, "rank": rank, "parameters": {"density": 0.5}}
    plenty = merge(three(), **arguments)
    for workspace in (1 << 18, 1 << 14, 1):
        assert distance(merge(three(), workspace_bytes=workspace, **arguments), plenty) < 3e-6


def test_results_do_not_depend_on_the_seed_when_exact() -> None:
    one, two = (merge(three(), merge_method="ties", seed=seed).tensors_sha256 for seed in (0, 1))
    assert one == two


def test_half_precision() -> None:
    half = [
        map_factors(adapter, lambda f: LoraFactors(f.A.bfloat16(), f.B.bfloat16(), f.scaling)) for adapter in three()
    ]
    merged = merge(half, merge_method="linear", dtype=torch.bfloat16)
    assert {f.A.dtype for f in merged.factors.values()} == {torch.bfloat16}
    assert distance(merged, weighted_sum(half, [1 / 3] * 3)) < 1e-2


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensor storages made while it is on and still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def _gone(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live -= nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self._known:
                    self._known.add(key)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._gone, key, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out


def test_a_delta_merge_keeps_to_its_workspace() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {f"layers.{i}.proj": (512, 384) for i in range(6)}
    adapters = [
        Adapter(
            str(k),
            {
                m: LoraFactors(torch.randn(4, i, generator=generator), torch.randn(o, 4, generator=generator))
                for m, (o, i) in shapes.items()
            },
        )
        for k in range(6)
    ]
    dense = sum(6 * 4 * o * i for o, i in shapes.values())  # all ΔW_i at once
    workspace = dense // 2
    with LiveBytes() as memory:
        merged = merge(adapters, merge_method="ties", space="delta", rank=16, workspace_bytes=workspace)
    assert memory.peak - merged.nbytes <= workspace < dense
    assert merged.report.peak_workspace_bytes <= workspace


def test_a_result_keeps_no_memory_of_what_was_cut_off() -> None:
    def lopsided(adapter: Adapter) -> Adapter:
        """All modules but the first have one direction that counts."""
        faded = torch.tensor([1.0] + [1e-4] * (adapter.rank - 1))
        factors = {m: LoraFactors(f.A, f.B * faded) for m, f in adapter.factors.items() if m != "layers.0.q_proj"}
        return Adapter(adapter.name, {**adapter.factors, **factors})

    adapters = [lopsided(random_adapter("x", 8, 1)), lopsided(random_adapter("y", 8, 2))]
    merged = merge(adapters, merge_method="tsv_m", rank={"energy": 0.999})
    assert merged.report.ranks["layers.0.q_proj"] > merged.report.ranks["layers.1.q_proj"]
    storages = [tensor.untyped_storage() for f in merged.factors.values() for tensor in (f.A, f.B)]
    assert sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) == merged.nbytes


@pytest.mark.parametrize("merge_method", ["tsv_m", "opcm", "ties"])
def test_modules_of_several_shapes_keep_to_their_workspace(merge_method: str) -> None:
    """Cores of several shapes at once where that fits (tsv_m), what statistics hold beside them where it does not (opcm), and
    what is merged of several shapes until it is cut (ties in knots)."""
    generator = torch.Generator().manual_seed(0)
    rank, workspace = 32 if merge_method == "opcm" else 8, 16 << 20
    sizes = {"q": (512, 384), "k": (128, 384), "up": (1024, 384), "down": (384, 1024)}
    shapes = {f"layers.{i}.{name}": size for i in range(6) for name, size in sizes.items()}

    def adapter(name: str) -> Adapter:
        pairs = {
            m: (torch.randn(rank, i, generator=generator), torch.randn(o, rank, generator=generator))
            for m, (o, i) in shapes.items()
        }
        return Adapter(name, {m: LoraFactors(a, b) for m, (a, b) in pairs.items()})

    adapters = [adapter(str(k)) for k in range(4)]
    with LiveBytes() as memory:
        merged = merge(adapters, merge_method=merge_method, rank=16, workspace_bytes=workspace, report="brief")
    assert memory.peak - merged.nbytes <= merged.report.peak_workspace_bytes <= workspace


def test_a_merge_leaves_nothing_for_the_cycle_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it held on a GPU would stay there until Python looks for cycles, which in a server is seldom."""
    made: list[weakref.ref[Job]] = []

    class Watched(Job):
        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            made.append(weakref.ref(self))

    monkeypatch.setattr("vllm_merge.engine.Job", Watched)
    adapters = three()[:2]
    gc.collect()
    gc.disable()
    try:
        for method, space in (
            ("linear", "core"),
            ("ties", "knots"),
            ("ties", "delta"),
            ("dare_ties", "delta"),
            ("tsv_m", "core"),
            ("ctm", "core"),
        ):
            merged = merge(adapters, merge_method=method, space=space, rank=4)
            assert made.pop()() is None, method
            assert merged.factors
    finally:
        gc.enable()


def test_the_sources_of_a_merge_do_not_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made on a GPU alone, and ask whether the merge is to go on."""
    given: list[Callable[[], None]] = []
    monkeypatch.setattr("vllm_merge.engine.job.Sources", lambda *arguments: given.append(arguments[-1]))

    class OnAGpu:
        device = torch.device("cuda")
        workspace = Workspace(1, 1)
        adapters: tuple[Adapter, ...] = ()
        cancelled = staticmethod(lambda: True)

    job = OnAGpu()
    gone = weakref.ref(job)
    Job.sources.func(job)  # type: ignore[arg-type]
    del job
    assert gone() is None
    with pytest.raises(MergeCancelled):
        given[0]()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, on_a_gpu])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_one_value_that_is_not_finite_is_found(device: str, dtype: torch.dtype, wrong: float) -> None:
    """Among the largest that there are, which are."""
    values = torch.full((3, 40, 50), torch.finfo(dtype).max, dtype=dtype, device=device)
    values[:, ::2] *= -1
    assert finite(values, (-1, -2)).tolist() == [True, True, True]
    assert finite(values)
    values[1, 39, 7] = wrong
    assert finite(values, (-1, -2)).tolist() == [True, False, True]
    assert not finite(values)

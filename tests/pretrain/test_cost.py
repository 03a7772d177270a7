"""What is said of a model's cost, beside what is counted."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from configs.load import find, load
from data_pipeline.batch import collate
from pretrain import cost
from pretrain.config import EngineConfig, ModelConfig, OptimConfig, PartConfig, RunConfig
from pretrain.cost import cost_of, measured_flops, peak_flops, training_bytes
from pretrain.engine import TorchEngine
from pretrain.init import initialise
from pretrain.layout import Layout
from pretrain.models.build import build

VOCAB, LENGTH, ROWS = 61, 32, 2
CPU = torch.device("cpu")


def small(**keys):
    mixers = tuple(PartConfig(name=name, options={"heads": 2}) for name in ("attention", "correlation"))
    model = build(ModelConfig(**{"width": 16, "depth": 2, "length": LENGTH, "mixers": mixers, **keys}), VOCAB)
    model = model.to_empty(device="cpu")
    initialise(model, 0)
    return model


def batch_of(packed):
    tokens = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH + 1))
    return collate(tokens, [np.array([7] if packed else [], dtype=np.int64)] * ROWS, np.zeros(ROWS, dtype=np.int64))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_parameters_are_counted_once_and_tables_apart(tie, positions):
    model = small(tie=tie, positions=positions, bias=True, norm="layernorm")
    told = cost_of(model)
    assert told.parameters == sum(p.numel() for p in dict.fromkeys(model.parameters()))
    assert told.embedding_parameters == 16 * (VOCAB + (LENGTH if positions == "learned" else 0))


@pytest.mark.parametrize("channel", ["mlp", "swiglu"])
def test_a_models_operations_are_those_that_torch_counts(channel):
    """Causal matrices are stated half: a dense form spends that part twice."""
    model, batch = small(channel=PartConfig(name=channel)), batch_of(packed=True)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.logits(batch.tokens_BT, Layout(batch.doc_BT, batch.pos_BT, False))
    halved = sum(block.mixer.halved_flops_per_token(LENGTH) for block in model.blocks)
    stated = cost_of(model).flops_per_token / 3 + halved
    assert counter.get_total_flops() / (ROWS * LENGTH) == pytest.approx(stated, rel=0.02)


def test_training_costs_three_forward_passes_as_torch_counts_them():
    model, batch = small(), batch_of(packed=True)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(batch).total.backward()
    halved = sum(block.mixer.halved_flops_per_token(LENGTH) for block in model.blocks)
    stated = cost_of(model).flops_per_token + 3 * halved
    in_place = 2 * model.width * VOCAB  # the gradient of the head's weights: the counter passes over addmm_
    assert counter.get_total_flops() / (ROWS * LENGTH) + in_place == pytest.approx(stated, rel=0.01)


@pytest.mark.parametrize("preset", ["attention-50k", "leviathan-50k"])
def test_a_presets_figures_on_the_meta_device_are_those_of_its_tensors(preset):
    config = load(RunConfig, [find(f"models/{preset}")]).model
    there = build(config, 65)
    assert all(p.is_meta for p in there.parameters())
    told, here = cost_of(there), there.to_empty(device="cpu")
    initialise(here, 0)
    assert told == cost_of(here)
    assert told.parameters == sum(p.numel() for p in here.parameters())


def test_the_state_of_decoding_is_that_of_its_tensors():
    model = small()
    with torch.no_grad():
        _, state = model.decode(torch.zeros(1, LENGTH, dtype=torch.long), model.initial_state(1))
    held = sum(
        t.numel() for t in torch.utils._pytree.tree_leaves(state) if torch.is_tensor(t) and t.is_floating_point()
    )
    assert cost_of(model).state_bytes == pytest.approx(2 * held, rel=0.02)


# ---- memory


def numel(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_plain_torch_holds_what_is_stated(precision):
    config = EngineConfig(name="torch", precision=precision)
    engine = TorchEngine(small(), OptimConfig(), config, sources=1, seed=0, device=CPU)
    engine.model(batch_of(packed=False)).total.backward()
    weights = list(engine.model.parameters())
    held = {id(t): t for t in weights} | {id(p): p for g in engine.optimizer.param_groups for p in g["params"]}
    moments = [t for state in engine.optimizer.state.values() for t in state.values() if t.ndim]
    counted = numel(held.values()) + numel([p.grad for p in weights]) + numel(moments)
    assert training_bytes(cost_of(engine.model).parameters, config, 1) == counted


@pytest.mark.parametrize(
    ("zero", "whole", "sharded"),
    # bytes of a parameter on every rank, and shared by all ranks
    [(0, {"fp32": 16, "bf16": 16}, 0), (1, {"fp32": 8, "bf16": 4}, 12),
     (2, {"fp32": 4, "bf16": 2}, {"fp32": 16, "bf16": 14}), (3, {"fp32": 0, "bf16": 0}, {"fp32": 20, "bf16": 16})],
)  # fmt: skip
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("world", [1, 2, 8])
def test_each_stage_of_zero_shards_one_thing_more(zero, whole, sharded, precision, world):
    shared = sharded[precision] if isinstance(sharded, dict) else sharded
    config = EngineConfig(zero=zero, precision=precision)
    assert training_bytes(8000, config, world) == 8000 * whole[precision] + 8000 * shared // world


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_ranks_that_share_experts_hold_a_part_of_their_weights_and_gradients(zero):
    alone, shared = (EngineConfig(zero=zero, expert_parallel=size) for size in (1, 4))
    saved = {1: 8, 2: 4, 3: 0}[zero]  # bytes of a parameter that every rank would hold
    assert training_bytes(8000, alone, 4, 6000) - training_bytes(8000, shared, 4, 6000) == saved * 4500


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_an_offloaded_optimizer_takes_its_masters_and_moments_with_it(zero):
    here, there = (
        training_bytes(8000, EngineConfig(zero=zero, precision="bf16", offload_optimizer=off), 4)
        for off in (False, True)
    )
    assert here - there == 12 * 8000 // 4


# ---- peaks


def test_the_peak_of_an_unknown_device_is_measured_soon_and_positive():
    for precision in ("fp32", "bf16"):
        began = time.perf_counter()
        assert 1e8 < peak_flops(CPU, precision) < 1e15
        assert time.perf_counter() - began < 10


def test_however_short_the_time_one_product_is_measured():
    assert measured_flops(CPU, torch.float32, seconds=1e-9) > 0


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0, 67.0),
        ("NVIDIA H100 PCIe", 756.0, 51.0),
        ("NVIDIA H100 NVL", 835.0, 60.0),
        ("NVIDIA H200", 989.0, 67.0),
        ("NVIDIA H200 NVL", 835.0, 60.0),
        ("NVIDIA GH200 480GB", 989.0, 67.0),
        ("NVIDIA A100-SXM4-80GB", 312.0, 19.5),
        ("Tesla V100-SXM2-16GB", 125.0, 15.7),
        ("NVIDIA L4", 121.0, 30.3),
        ("NVIDIA L40S", 362.0, 91.6),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("NVIDIA L40", None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("Some Other GPU", None, None),
    ],
)
def test_a_gpu_is_known_by_its_whole_name_and_any_other_is_measured(name, bf16, fp32, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(cost, "measured_flops", lambda device, dtype: (device, dtype))
    cuda = torch.device("cuda")
    for precision, known, dtype in (("bf16", bf16, torch.bfloat16), ("fp32", fp32, torch.float32)):
        assert peak_flops(cuda, precision) == (1e12 * known if known else (cuda, dtype))

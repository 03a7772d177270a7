"""What holds on a GPU: every fast form against its equation, and whole runs by the command line on one device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_pipeline.batch import IGNORE
from pretrain.checkpoint_files import newest_readable, verify
from pretrain.layout import Layout
from pretrain.ops.attention import attend, attend_naive
from pretrain.ops.loss import cross_entropy, cross_entropy_naive
from pretrain.ops.norm import rms_norm, rms_norm_naive
from pretrain.ops.rotary import Rotary
from pretrain.run_folder import RunFolder, read_lines
from tests.conftest import events, leviathan, losses, write_tiny
from tests.contract.cases import LENGTH, ROWS, WIDTH, make_mixer, noise, packed

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(),
        reason=f"torch {torch.__version__} sees no CUDA device here",
    ),
]

FAR = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""How far a result may lie from the same equation in float64, as a share of its norm."""

over_precisions = pytest.mark.parametrize("dtype", list(FAR), ids=["fp32", "bf16"])
over_layouts = pytest.mark.parametrize("layout", [Layout.single(ROWS, LENGTH), packed()], ids=["ramps", "packed"])

Function = Callable[..., Tensor]


def there(layout: Layout) -> Layout:
    """A layout on the device."""
    return Layout(layout.doc_BT.to(DEVICE), layout.pos_BT.to(DEVICE), layout.ramps)


def assert_near(
    fast: Function, plain: Function, inputs: Sequence[Tensor], dtype: torch.dtype, far: float | None = None
) -> None:
    """Output and gradients of `fast` in `dtype` on the device lie near those of `plain` in float64 on the CPU, both of
    the same values."""
    rounded = [x.to(dtype) for x in inputs]
    results = []
    for function, given in ((fast, [x.to(DEVICE) for x in rounded]), (plain, [x.double() for x in rounded])):
        leaves = [x.clone().requires_grad_() for x in given]
        y = function(*leaves)
        (y * noise(*y.shape, seed=7).to(y)).sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for number, (got, expected) in enumerate(zip(*results)):
        assert got is not None and expected is not None
        assert got.device.type == DEVICE
        assert got.shape == expected.shape
        error = (got.cpu().double() - expected).norm() / expected.norm()
        assert error < (far or FAR[dtype]), f"{'output' if number == 0 else f'gradient {number}'} is off by {error:.1e}"


# ---- the arithmetic


@over_precisions
@over_layouts
@pytest.mark.parametrize(
    ("kv_heads", "width"), [(4, 16), (2, 16), (1, 16), (4, 8)], ids=["MHA", "GQA", "MQA", "narrow"]
)
def test_attention_equals_its_equation(kv_heads, width, layout, dtype):
    inputs = noise(ROWS, 4, LENGTH, 16), noise(ROWS, kv_heads, LENGTH, 16, seed=3), noise(ROWS, kv_heads, LENGTH, width)
    device_layout = there(layout)
    assert_near(
        lambda q, k, v: attend(q, k, v, device_layout, 0.25),
        lambda q, k, v: attend_naive(q, k, v, layout.mask(), 0.25),
        inputs,
        dtype,
    )


@over_precisions
@over_layouts
@pytest.mark.parametrize("name", ["attention", "correlation"])
def test_a_mixer_equals_the_equation_that_it_decodes_with(name, layout, dtype):
    fast = make_mixer(name, {}).to(dtype)
    plain = make_mixer(name, {})
    plain.load_state_dict(fast.state_dict())
    fast.to(DEVICE)
    names = [n for n, _ in fast.named_parameters()]
    device_layout = there(layout)

    def trained_form(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(fast, dict(zip(names, parameters)), (x, device_layout))[0]

    def equation(x: Tensor, *parameters: Tensor) -> Tensor:
        whole = Layout(layout.doc_BT, layout.pos_BT, False)
        state = plain.initial_state(ROWS, x)
        return torch.func.functional_call(plain, dict(zip(names, parameters)), (x, whole, state))[0]

    inputs = noise(ROWS, LENGTH, WIDTH), *(p.detach() for p in plain.parameters())
    # several operations, each of which rounds
    assert_near(trained_form, equation, inputs, dtype, far=3 * FAR[dtype])


@over_precisions
@pytest.mark.parametrize("shape", [(7,), (3, 5, 16), (2, 3, 4, 33)])
def test_rms_norm_equals_its_equation(shape, dtype):
    inputs = noise(*shape), noise(shape[-1], seed=3)
    assert_near(lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: rms_norm_naive(x, w, 1e-6), inputs, dtype)


@over_precisions
@pytest.mark.parametrize("chunk", [1, 13 * 61, 10**6])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_cross_entropy_in_chunks_equals_the_whole(chunk, bias, dtype):
    targets = torch.randint(0, 61, (90,), generator=torch.Generator().manual_seed(0))
    targets[::7] = IGNORE
    inputs = (noise(90, 16), noise(61, 16, seed=3), *([noise(61, seed=4)] if bias else []))
    on_device = targets.to(DEVICE)

    def fast(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return cross_entropy(x, w, b, on_device, chunk)[0][None]

    def plain(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return cross_entropy_naive(x, w, b, targets).sum()[None]

    assert_near(fast, plain, inputs, dtype)
    low = [x.to(dtype) for x in inputs]
    per_token = cross_entropy(*(x.to(DEVICE) for x in low), *([] if bias else [None]), on_device, chunk)[1]
    expected = cross_entropy_naive(*(x.double() for x in low), *([] if bias else [None]), targets)
    assert torch.equal(per_token.cpu() == 0, targets == IGNORE)
    assert (per_token.cpu().double() - expected).norm() / expected.norm() < FAR[dtype]


@over_precisions
@pytest.mark.parametrize("shift", [0, 100_000], ids=["near", "far"])
def test_rotation_equals_its_complex_form(shift, dtype):
    pos = torch.arange(LENGTH)[None] + shift
    rotary = Rotary.of(pos.to(DEVICE), 16, 1e4, dtype)
    exact = Rotary.of(pos, 16, 1e4, torch.float64)
    assert exact.phase is not None
    # angles are rounded to fp32 once: at 100,000 turns that is 4e-3 of a radian
    if shift and dtype == torch.float32:
        exact = Rotary(*(x.cpu().double() for x in (rotary.cos, rotary.sin)), None)
    assert_near(rotary.rotate, exact.rotate, [noise(2, 3, LENGTH, 16)], dtype)


# ---- whole runs

REPEATABLE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""The one setting without which cuBLAS itself may answer the same question differently."""


def train(folder: Path, shards: Path, corpus: Path, *words: object, env: dict[str, str] | None = None) -> RunFolder:
    """Twenty steps by the command line with the configuration for GPUs."""
    folder.mkdir(parents=True)
    config = write_tiny(folder, shards, corpus)
    # a step that compiles, or loads a library, takes longer than a step of this size may; and a peak that is stated
    # need not be measured, which takes more memory than the run
    place = (f"engine.device={DEVICE}", "launch.hang_s=120", "log.peak_tflops=1")
    done = leviathan("train", config, "engine/cuda", *place, *words, "--ranks", 1, env=env, timeout=300)
    assert done.code == 0, done.err + done.out
    run = RunFolder(folder / "runs" / "tiny")
    assert sorted(losses(run)) == list(range(1, 21))
    return run


def values(run: RunFolder) -> list[float]:
    return [row["loss"] for row in run.steps().values()]


def final_hashes(run: RunFolder) -> list[str]:
    found = newest_readable(run)
    assert found.step == 20
    return [note["sha256"] for note in found.facts["files"]]


FP32 = ("engine.precision=fp32",)
TORCH = ("engine.name=torch",)
ENGINES = {
    "torch": TORCH,
    "zero0": ("engine.zero=0",),
    "zero1": ("engine.zero=1",),
    "zero2": ("engine.zero=2",),
    "zero3": ("engine.zero=3",),
    "offload": ("engine.zero=1", "engine.offload_optimizer=true"),
}


@pytest.fixture(scope="module")
def on_the_cpu(shards: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The reference: plain torch on the CPU in fp32."""
    folder = tmp_path_factory.mktemp("cpu") / "run"
    return train(folder, shards, corpus, *TORCH, *FP32, "engine.device=cpu")


@pytest.mark.parametrize("engine", list(ENGINES))
def test_it_trains_in_bf16_and_follows_the_cpu(engine, on_the_cpu, shards, corpus, tmp_path):
    run = train(tmp_path / "run", shards, corpus, *ENGINES[engine])
    (start,) = events(run, "start")
    assert start.endswith(f"bf16, {DEVICE})")
    assert values(run) == pytest.approx(values(on_the_cpu), rel=3e-2)
    assert values(run)[-1] < 0.9 * values(run)[0]
    assert not events(run, "fault", "skip", "warning", "save_failed")
    for step in run.committed_steps():
        assert verify(run.checkpoints / f"step_{step:09d}") is None
    if DEVICE == "cuda":
        # what the device holds, not what the process does: that is a GiB or more
        assert all(0 < row["memory_mib"] < 300 for row in run.steps().values())


@pytest.mark.parametrize("engine", ["torch", "zero1", "zero3"])
def test_in_fp32_its_losses_are_those_of_the_cpu(engine, on_the_cpu, shards, corpus, tmp_path):
    run = train(tmp_path / "run", shards, corpus, *ENGINES[engine], *FP32)
    assert values(run) == pytest.approx(values(on_the_cpu), rel=1e-3)
    # before the first update nothing can have added up
    assert values(run)[0] == pytest.approx(values(on_the_cpu)[0], rel=1e-5)


@pytest.mark.parametrize("engine", ["torch", "zero1"])
def test_killed_and_resumed_it_ends_with_the_same_bits(engine, shards, corpus, tmp_path):
    words = (*ENGINES[engine], *FP32)
    quiet, again = (train(tmp_path / name, shards, corpus, *words, env=REPEATABLE) for name in ("quiet", "again"))
    assert losses(quiet) == losses(again), "the device does not repeat itself: nothing can be said of a resumed run"
    killed = train(
        tmp_path / "killed", shards, corpus, *words, env=REPEATABLE | {"LEVIATHAN_FAULT": "step.before_update:0:12"}
    )
    assert "SIGKILL" in events(killed, "fault")[0]
    # from the checkpoint of step 10, or of 5 where steps are so fast that the later one was still being written
    (restart,) = events(killed, "restart")
    assert restart.startswith("restart 1/∞ from step ")
    assert losses(killed) == losses(quiet)
    assert final_hashes(killed) == final_hashes(quiet)


@pytest.mark.parametrize("engine", ["torch", "zero1"])
@pytest.mark.parametrize("option", ["compile", "activation_checkpointing"])
def test_an_option_for_speed_or_memory_changes_no_loss_beyond_rounding(
    engine, option, on_the_cpu, shards, corpus, tmp_path
):
    run = train(tmp_path / "run", shards, corpus, *ENGINES[engine], *FP32, f"engine.{option}=true")
    assert values(run) == pytest.approx(values(on_the_cpu), rel=1e-3)


def test_held_out_text_is_judged_alike_on_both_devices(shards, corpus, tmp_path):
    run = train(tmp_path / "run", shards, corpus, *TORCH, *FP32)
    for device in (DEVICE, "cpu"):
        done = leviathan("eval", run.path, "--rows", 8, "--device", device)
        assert done.code == 0, done.err
    here, there_ = read_lines(run.evals)
    assert here["loss"] == pytest.approx(there_["loss"], rel=1e-5)
    assert here["sources"].keys() == there_["sources"].keys() == {"letters", "lists"}


def test_text_is_written_from_a_model_trained_there(shards, corpus, tmp_path):
    run = train(tmp_path / "run", shards, corpus, *TORCH)
    done = leviathan("generate", run.path, "--prompt", "the sea ", "--tokens", 20, "--temperature", 0)
    assert done.code == 0, done.err
    assert done.out.startswith("the sea ")
    assert len(done.out) > len("the sea ")


@pytest.mark.skipif(DEVICE != "cuda", reason="a CPU has room for any number of ranks")
def test_more_ranks_than_devices_are_refused_with_the_number(tiny):
    count = torch.cuda.device_count()
    ranks = count + 1
    words = (f"train.batch_rows={4 * ranks}", "--ranks", ranks)
    done = leviathan("train", tiny, "engine/cuda", *words)
    assert done.code == 78, done.err
    assert f"which has {count} GPUs; start at most {count} ranks there" in done.err


def test_the_doctor_names_the_device():
    done = leviathan("doctor", timeout=200)
    if DEVICE == "cuda":
        assert torch.cuda.get_device_name(0).split()[-1] in done.out
    assert "Traceback" not in done.err

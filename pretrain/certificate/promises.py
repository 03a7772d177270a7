"""What every mixer promises of its outputs and gradients: one function a promise, in float64.

Each returns what it measured, and raises Refused with one sentence where the promise is not kept.

Shapes: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from pretrain.certificate.trial import (
    LENGTH,
    ROWS,
    VOCAB,
    WIDTH,
    Candidate,
    Measured,
    Refused,
    general,
    noise,
    packed,
    piece,
    tokens,
)
from pretrain.layout import Layout
from pretrain.mixer import Positions, TokenMixer

EXACT, STREAM, ROUNDING, BF16 = 1e-12, 1e-10, 1e-10, 5e-2
CUTS = ((5,), (1, 2, 3), (23,), (16, 32), (47,))


def causal(candidate: Candidate) -> Measured:
    """No output changes when a later token does, and no gradient flows from an output to a later input."""
    slack = ROUNDING if candidate.says("rounding") else 0.0
    cure = "let y[t] depend on x[: t + 1] alone, or set `causal = False`"
    model, ids, layout = candidate.model(), tokens(), Layout.single(ROWS, LENGTH)
    before, worst = model.logits(ids, layout), 0.0
    for t in (1, 20, LENGTH - 1):
        changed = ids.clone()
        changed[0, t:] = (changed[0, t:] + 1) % VOCAB
        after = model.logits(changed, layout)
        gap, where = _gap(after[:1, :t], before[:1, :t])
        if not gap <= slack:
            raise Refused(f"changing the tokens from {t} on moves an earlier output by {gap:.1e} ({where}); {cure}")
        worst = max(worst, gap)
    mix, x = candidate.mixer(), noise(1, LENGTH, WIDTH).requires_grad_()
    y, _ = mix(x, Layout.single(1, LENGTH))
    (grad,) = torch.autograd.grad(y[0, 20].sum(), x, allow_unused=True, materialize_grads=True)
    leak = float(grad[0, 21:].abs().max())
    if not leak <= slack:
        raise Refused(f"output 20 has a gradient of {leak:.1e} with respect to a later input; {cure}")
    if torch.count_nonzero(grad[0, :21]) == 0:
        raise Refused("output 20 has no gradient with respect to any input; do not detach what is read")
    return Measured(max(worst, leak), "largest change of an earlier output")


def prefix(candidate: Candidate) -> Measured:
    """The length of a row changes nothing in its beginning."""
    model, ids = candidate.model(), tokens()
    whole, worst = model.logits(ids, Layout.single(ROWS, LENGTH)), 0.0
    for t in (1, 7, 31):
        gap, where = _gap(model.logits(ids[:, :t], Layout.single(ROWS, t)), whole[:, :t])
        if not gap <= EXACT:
            raise Refused(
                f"the first {t} of {LENGTH} tokens give other outputs where they are all, by {gap:.1e} ({where});"
                " do not use the actual length of a row"
            )
        worst = max(worst, gap)
    return Measured(worst, "largest difference of a prefix alone")


def rows(candidate: Candidate) -> Measured:
    """Rows of a batch do not see each other."""
    model, ids, layout = candidate.model(), tokens(), Layout.single(ROWS, LENGTH)
    before = model.logits(ids, layout)
    changed = ids.clone()
    changed[1:] = tokens(seed=9)[1:]
    gap, where = _gap(model.logits(changed, layout)[:1], before[:1])
    cure = "take no mean, norm or sum over the rows of a batch"
    if not gap == 0:
        raise Refused(f"changing the other rows moves an output of row 0 by {gap:.1e} ({where}); {cure}")
    gap, where = _gap(model.logits(ids[:1], Layout.single(1, LENGTH)), before[:1])
    if not gap <= EXACT:
        raise Refused(f"a row alone gives other outputs than in a batch, by {gap:.1e} ({where}); {cure}")
    return Measured(gap, "largest difference of a row alone")


def documents(candidate: Candidate) -> Measured:
    """A packed document is read as if it stood alone."""
    model, ids, layout = candidate.model(), tokens(), packed()
    together, worst = model.logits(ids, layout), 0.0
    for row in range(ROWS):
        for number in layout.doc_BT[row].unique():
            place = torch.nonzero(layout.doc_BT[row] == number).flatten()
            alone = model.logits(ids[row : row + 1, place], Layout.single(1, len(place)))
            gap, _ = _gap(together[row : row + 1, place], alone)
            if not gap <= EXACT:
                raise Refused(
                    f"the document at token {int(place[0])} of row {row} gives other outputs than alone, by {gap:.1e};"
                    " look back only as far as layout.pos_BT, or set `isolates = False`"
                )
            worst = max(worst, gap)
    return Measured(worst, "largest difference of a document alone")


def forms(candidate: Candidate) -> Measured:
    """The form for rows of one document equals the general one; outputs have the inputs' shape; no state, none back."""
    mix, x, layout = candidate.mixer(), noise(ROWS, LENGTH, WIDTH), Layout.single(ROWS, LENGTH)
    (y, state), (z, _) = mix(x, layout), mix(x, general(layout))
    for out in (y, z):
        if out.shape != x.shape:
            raise Refused(f"inputs {tuple(x.shape)} give outputs {tuple(out.shape)}; return (B, T, D)")
    if state is not None:
        raise Refused("without a state a state comes back; return None beside the outputs")
    gap, where = _gap(y, z)
    if not gap <= EXACT:
        raise Refused(f"with layout.ramps outputs differ by {gap:.1e} ({where}); let both forms compute the same")
    return Measured(gap, "largest difference of the plain form and the general one")


def decoding(candidate: Candidate) -> Measured:
    """Step by step with a state gives what the training form gives."""
    model, ids, worst = candidate.model(), tokens(), 0.0
    for kind, layout in (("rows of one document", Layout.single(ROWS, LENGTH)), ("packed rows", packed())):
        whole, state, steps = model.logits(ids, layout), model.initial_state(ROWS), []
        for t in range(LENGTH):
            logits, state = model.decode(ids[:, t : t + 1], state, piece(layout, t, t + 1))
            steps.append(logits)
        gap, where = _gap(torch.cat(steps, dim=1), whole)
        if not gap <= STREAM:
            raise Refused(
                f"token by token, {kind} give other outputs than at once, by {gap:.1e} ({where});"
                " let forward with a state go on where it ended"
            )
        worst = max(worst, gap)
    return Measured(worst, "largest difference of step by step and at once")


def pieces(candidate: Candidate) -> Measured:
    """Pieces with a state give the outputs and the gradients of the whole."""
    mix, layout, x, worst = candidate.mixer(), packed(), noise(ROWS, LENGTH, WIDTH), 0.0
    whole, grads = _run(mix, x, layout, ())
    names = ["the input", *(name for name, _ in mix.named_parameters())]
    for cuts in CUTS:
        parts, part_grads = _run(mix, x, layout, cuts)
        gap, where = _gap(parts, whole)
        cure = "let the state hold all that later tokens need, or set `streams = False`"
        if not gap <= STREAM:
            raise Refused(f"a row cut at {_listed(cuts)} gives other outputs, by {gap:.1e} ({where}); {cure}")
        for name, a, b in zip(names, part_grads, grads):
            if not bool(((a - b).abs() <= STREAM + 1e-9 * b.abs()).all()):
                far = float((a - b).abs().max())
                raise Refused(f"a row cut at {_listed(cuts)} gives {name} another gradient, by {far:.1e}; {cure}")
        worst = max(worst, gap)
    return Measured(worst, "largest difference of pieces and the whole")


def gradients(candidate: Candidate) -> Measured:
    """Every parameter gets a gradient."""
    model = candidate.model()
    loss = F.cross_entropy(model.logits(tokens(), packed()).flatten(0, 1), tokens(seed=4).flatten())
    loss.backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or torch.count_nonzero(p.grad) == 0]
    if dead:
        raise Refused(f"{', '.join(dead)} of a model get no gradient; use these parameters, or leave them out")
    return Measured(len(list(candidate.mixer().parameters())), "parameters, each with a gradient")


def meta(candidate: Candidate) -> Measured:
    """It is built without memory, with the shapes it has with memory, and runs whoever tells positions."""
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in candidate.built().named_parameters()}
    there = {n: p.shape for n, p in candidate.mixer().named_parameters()}
    if shapes != there:
        odd = sorted(n for n in shapes.keys() | there.keys() if shapes.get(n) != there.get(n))
        raise Refused(f"{', '.join(odd)} have other shapes on the meta device; let options and site alone decide them")
    real = [n for n, p in candidate.shapes().named_parameters() if not p.is_meta]
    if real:
        raise Refused(f"{', '.join(real)} have memory on the meta device; make them with torch.empty(shape)")
    choices: tuple[Positions, ...] = ("none", "learned")
    for positions in choices:
        candidate.model(positions).logits(tokens(), packed())
    return Measured(sum(shape.numel() for shape in shapes.values()), f"values of parameters at width {WIDTH}")


def bf16(candidate: Candidate) -> Measured:
    """bf16 stays near float64 in outputs and gradients."""
    exact, low, layout = candidate.mixer(), candidate.mixer().bfloat16(), packed()
    with torch.no_grad():
        for p, q in zip(exact.parameters(), low.parameters()):
            p.copy_(q)
    x, results = noise(ROWS, LENGTH, WIDTH).bfloat16(), []
    for mix, value in ((exact, x.double()), (low, x)):
        value = value.clone().requires_grad_()
        y, _ = mix(value, layout)
        y.double().square().mean().backward()
        assert value.grad is not None
        results.append((y.detach().double(), value.grad.double()))
    worst = 0.0
    for what, a, b in zip(("outputs", "gradients"), *results):
        drift = float((a - b).norm() / a.norm())
        if not drift < BF16:
            raise Refused(f"{what} in bf16 are off by {drift:.1%}; compute what is sensitive (sums, exponents) in fp32")
        worst = max(worst, drift)
    return Measured(worst, "relative error of outputs and gradients")


def batched(candidate: Candidate) -> Measured:
    """Under torch.func.vmap over parameters and inputs it computes what a loop over them does."""
    layout, x = packed(), noise(2, ROWS, LENGTH, WIDTH)
    members, worst = [_Streamed(candidate.mixer(seed)) for seed in (0, 7)], 0.0
    parameters, buffers = stack_module_state(members)
    for cuts in ((), (20,)) if candidate.says("streams") else ((),):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that some operation is run in a loop concerns speed alone
            together = vmap(lambda p, b, x_BTD, cuts=cuts: functional_call(members[0], (p, b), (x_BTD, layout, cuts)))(
                parameters, buffers, x
            )
        loop = torch.stack([member(value, layout, cuts) for member, value in zip(members, x)])
        gap, where = _gap(together.flatten(0, 1), loop.flatten(0, 1))
        if not gap <= EXACT:
            raise Refused(f"under torch.func.vmap outputs are off by {gap:.1e} ({where}); use plain torch operations")
        worst = max(worst, gap)
        grads = torch.autograd.grad(together.square().sum(), list(parameters.values()))
        wanted = torch.autograd.grad(loop.square().sum(), [p for member in members for p in member.parameters()])
        for number, (name, grad) in enumerate(zip(parameters, grads)):
            if not torch.allclose(grad, torch.stack(wanted[number :: len(grads)]), rtol=1e-9, atol=STREAM):
                raise Refused(f"under torch.func.vmap {name} gets another gradient; use plain torch operations")
    return Measured(worst, "largest difference of batched members and a loop over them")


class _Streamed(nn.Module):
    """A mixer whose outputs come at once (no cuts), or in pieces with a state."""

    def __init__(self, mix: TokenMixer) -> None:
        super().__init__()
        self.mix = mix

    def forward(self, x_BTD: Tensor, layout: Layout, cuts: Sequence[int]) -> Tensor:
        if not cuts:
            return self.mix(x_BTD, layout)[0]
        state, parts = self.mix.initial_state(x_BTD.shape[0], x_BTD), []
        for start, stop in zip((0, *cuts), (*cuts, x_BTD.shape[1])):
            y_BTD, state = self.mix(x_BTD[:, start:stop], piece(layout, start, stop), state)
            parts.append(y_BTD)
        return torch.cat(parts, dim=1)


def _run(mix: TokenMixer, x: Tensor, layout: Layout, cuts: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Outputs, and gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    y = _Streamed(mix)(x, layout, cuts)
    loss = (y * noise(*y.shape, seed=5)).sum()
    return y.detach(), list(
        torch.autograd.grad(loss, [x, *mix.parameters()], allow_unused=True, materialize_grads=True)
    )


def _gap(got: Tensor, want: Tensor) -> tuple[float, str]:
    """The largest difference of two (B, T, ·), and where it is; one that is no number is the largest."""
    gap_BT = (got - want).detach().abs().amax(-1)
    row, token = divmod(int(gap_BT.argmax()), gap_BT.shape[1])
    return float(gap_BT.max()), f"row {row}, token {token}"


def _listed(cuts: Sequence[int]) -> str:
    return " and ".join(map(str, cuts))

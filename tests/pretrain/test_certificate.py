"""A wrong mixer is refused, with the right reason. Each is a right one with one mistake in it."""

from __future__ import annotations

import pytest

from configs.errors import ConfigError
from launcher.mixers import TEMPLATES
from pretrain.certificate.issue import PROMISES, certify, verdict
from pretrain.certificate.trial import Candidate

RIGHT = (TEMPLATES / "mixer.py").read_text()
BY_NAME = {promise.name: promise for promise in PROMISES}
VALUES, FIRST = "v_BTD, keep_D = self.value(x_BTD)", "y_BTD = (1 - keep_D) * v_BTD"
LAST, SEEN = "if state is None:", "return earlier_BTD * (layout.pos_BT >= lag)[:, :, None]"
CARRIED = "y_BTD + keep_D**step_T1 * state[:, None] * goes_on_BT1"
MISTAKES = {
    "a look at the next token": (FIRST, f"{FIRST}.roll(-1, 1)", "causal", "moves an earlier output by"),
    "a mean over time": (FIRST, f"{FIRST} - v_BTD.mean(1, True)", "causal", "moves an earlier output by"),
    "a look at the next token, detached": (FIRST, f"{FIRST}.roll(-1, 1).detach()", "causal", "an earlier output by"),
    "a gradient from the future": (
        FIRST,
        f"{FIRST} + (v_BTD.roll(-1, 1) - v_BTD.roll(-1, 1).detach())",
        "causal",
        "output 20 has a gradient of",
    ),
    "no gradient of what is read": (VALUES, f"{VALUES}.detach()", "causal", "no gradient with respect to any input"),
    "a word that is no number": (FIRST, f"{FIRST} * float('nan')", "causal", "moves an earlier output by nan"),
    "the actual length": (FIRST, f"{FIRST} / x_BTD.shape[1]", "prefix", "do not use the actual length of a row"),
    "a mean over rows": (FIRST, f"{FIRST} - v_BTD.mean(0, True)", "rows", "moves an output of row 0 by"),
    "a batch norm": (
        FIRST,
        f"{FIRST} / v_BTD.var(0, keepdim=True, unbiased=False).add(1).sqrt()",
        "rows",
        "take no mean, norm or sum over the rows",
    ),
    "a look into another document": (SEEN, "return earlier_BTD", "documents", "the document at token 1 of row 0"),
    "another plain form": (
        LAST,
        f"y_BTD = y_BTD if layout.ramps or state is not None else y_BTD * 1.001\n        {LAST}",
        "documents",
        "gives other outputs than alone",
    ),
    "a state that nobody asked for": (
        "return self.out(y_BTD), None",
        "return self.out(y_BTD), y_BTD[:, -1]",
        "forms",
        "a state comes back",
    ),
    "outputs of another shape": (
        "return self.out(y_BTD), None",
        "return self.out(y_BTD)[..., :1], None",
        "forms",
        "give outputs (3, 48, 1)",
    ),
    "a state that is forgotten": (CARRIED, f"{CARRIED} * 0", "decoding", "token by token, rows of one document give"),
    "a state that outlives its document": (
        "goes_on_BT1 = layout.pos_BT[:, :, None] >= step_T1",
        "goes_on_BT1 = 1",
        "decoding",
        "packed rows give",
    ),
    "a piece read as if it were one token": (
        CARRIED,
        CARRIED.replace("keep_D**step_T1", "keep_D"),
        "pieces",
        "a row cut at 5 gives other outputs",
    ),
    "a state without a gradient": (CARRIED, CARRIED.replace("state", "state.detach()"), "pieces", "another gradient"),
    "a parameter that nobody uses": (
        "        declare(self, {",
        "        self.spare = nn.Parameter(torch.empty(3))\n"
        "        declare(self, {'spare': values(lambda: torch.zeros(3)), ",
        "gradients",
        "blocks.0.mixer.spare, blocks.1.mixer.spare of a model get no gradient",
    ),
    "a parameter with memory": (
        "torch.empty(site.width)",
        "torch.empty(site.width, device='cpu')",
        "meta",
        "memory have memory on the meta",
    ),
    "a difference of large numbers": (FIRST, f"{FIRST} + 1000 - 1000", "bf16", "outputs in bf16 are off by"),
    "a branch on a value": (
        VALUES,
        f"assert self.memory.sum().item() < 1e9\n        {VALUES}",
        "vmap",
        "it fails in line",
    ),
    "half the operations": ("return 4 * self.width", "return 2 * self.width", "FLOPs", "the formulas say 2,048"),
    "twice the state": ("return 2 * self.width", "return 4 * self.width", "state", "state_bytes says 128"),
    "operations that grow where nobody looks": (
        "return 4 * self.width * self.width",
        "return 4 * self.width * max(self.width, length - 100)",
        "growth",
        "the growth of operations is T^1.00, and T^2",
    ),
    "a state that grows where nobody looks": (
        "return 2 * self.width",
        "return 2 * max(self.width, length - 100)",
        "growth",
        "the growth of the state is T^0.00",
    ),
    "a matrix over time": (
        LAST,
        "square_BTT = (y_BTD[:, :, None, 0] - y_BTD[:, None, :, 0]).square()\n"
        f"        y_BTD = y_BTD + 0 * torch.exp(-square_BTT).diagonal(0, 1, 2)[..., None]\n        {LAST}",
        "growth",
        "the growth of what training keeps is T^1.93, and T^1.00 is stated",
    ),
}


@pytest.fixture
def candidate(tmp_path):
    """Make a candidate of the right mixer's text with some of it replaced."""

    def make(*changes: tuple[str, str]) -> Candidate:
        text = RIGHT
        for old, new in changes:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        path = tmp_path / "tried.py"
        path.write_text(text)
        return Candidate("tried", file=str(path))

    return make


def first_broken(tried: Candidate):
    return next((found for found in certify(tried) if found.kept is False), None)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_mixer_is_refused_for_what_is_wrong_with_it(candidate, mistake):
    old, new, promise, reason = MISTAKES[mistake]
    found = first_broken(candidate((old, new)))
    assert found is not None, "it was certified"
    assert found.promise == promise, found
    assert reason in found.told
    assert "\n" not in found.told


def test_the_right_one_is_certified_whole(candidate):
    verdicts = list(certify(candidate()))
    assert [found.promise for found in verdicts] == [promise.name for promise in PROMISES]
    assert all(found.kept for found in verdicts)
    assert all(found.number is not None for found in verdicts)


# ---- flags decide what is asked for


def test_a_mixer_that_does_not_promise_causality_is_not_asked_for_it(candidate):
    tried = candidate((FIRST, f"{FIRST} - v_BTD.mean(1, True)"), ("causal = True", "causal = False"))
    for name in ("causal", "prefix", "decoding", "state"):
        found = verdict(BY_NAME[name], tried)
        assert (found.kept, found.told) == (None, "not promised: causal = False")
    assert verdict(BY_NAME["rows"], tried).kept


def test_a_mixer_that_does_not_promise_to_isolate_or_to_stream_is_not_asked_for_that(candidate):
    tried = candidate((SEEN, "return earlier_BTD"), ("isolates = True", "isolates = False"))
    assert verdict(BY_NAME["documents"], tried).kept is None
    tried = candidate((CARRIED, f"{CARRIED} * 0"), ("streams = True", "streams = False"))
    assert verdict(BY_NAME["pieces"], tried).kept is None
    assert verdict(BY_NAME["vmap"], tried).kept


@pytest.mark.parametrize(("leak", "allowed"), [(1e-13, True), (1e-9, False)])
def test_a_mixer_that_says_it_rounds_may_round_and_no_more(candidate, leak, allowed):
    leaking = (FIRST, f"{FIRST} + {leak} * v_BTD.roll(-1, 1)")
    assert verdict(BY_NAME["causal"], candidate(leaking)).kept is False
    tried = candidate(leaking, ("causal = True", "causal = True\n    rounding = True"))
    assert verdict(BY_NAME["causal"], tried).kept is allowed


def test_a_mixer_that_keeps_a_matrix_may_say_so_and_one_that_does_not_may_not(candidate):
    dense, square = ("causal = True", "causal = True\n    dense = True"), MISTAKES["a matrix over time"][:2]
    assert verdict(BY_NAME["growth"], candidate(square, dense)).kept
    found = verdict(BY_NAME["growth"], candidate(dense))
    assert found.kept is False
    assert "and T^2.00 is stated" in found.told


# ---- what is no mixer at all


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import torch\n1 / 0\n", "tried.py fails in line 2 (ZeroDivisionError: division by zero)"),
        ("def f(:\n", "tried.py fails in line 1 (SyntaxError"),
        ("x = 1\n", "tried.py registers no mixer; decorate its class with @register(Config)"),
    ],
)
def test_a_file_that_is_no_mixer_is_a_mistake_in_one_sentence(tmp_path, text, told):
    path = tmp_path / "tried.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        list(certify(Candidate("tried", file=str(path))))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_name_that_does_not_exist_gets_the_nearest_that_does():
    with pytest.raises(ConfigError, match="no mixer is called 'atention'; did you mean 'attention'"):
        list(certify(Candidate("atention")))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("self.width = site.width", "self.width = site.widht", "AttributeError"),
        ("    def state_bytes", "    def stat_bytes", "TypeError"),
        ("F.pad(y_BTD[:, :-lag]", "F.pad(y_BTD[:, : 1 - lag]", "it fails in line"),
    ],
)
def test_a_mixer_that_raises_is_refused_with_the_line_it_raises_in(candidate, old, new, told):
    found = first_broken(candidate((old, new)))
    assert found.promise == "causal"
    assert told in found.told
    assert found.told.startswith("it fails")

"""Losses, presets and advantages against what other frameworks' own functions gave, as recorded in tests/parity/."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from cases import assert_close

from fastgrpo import Objective, advantages, policy_loss

RECORDED = {
    path.stem: json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "parity").glob("*.json"))
}
CASES = [(package, name) for package, recorded in RECORDED.items() for name in recorded["cases"]]
ADVANTAGE_CASES = [
    (package, name) for package, recorded in RECORDED.items() for name in recorded.get("advantage_cases", ())
]


def test_what_is_recorded():
    assert {package: recorded["version"][:12] for package, recorded in RECORDED.items()} == {
        "verl": "0.9.1",
        "openrlhf": "0.11.2",
        "skyrl": "0.4.0",
        "prime-rl": "559b44772e47",
        "slime": "624b824a898a",
        "nemo-rl": "7ea279abfbeb",
        "areal": "1.0.4",
        "roll": "8eb27cc2dc34",
        "miles": "31f1ca961a94",
    }
    assert len(CASES) > 160 and len(ADVANTAGE_CASES) > 35


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("package, name", CASES)
def test_equals_the_framework(package, name, dtype):
    case = RECORDED[package]["cases"][name]
    x = {key: torch.tensor(value, dtype=torch.float64).to(dtype) for key, value in RECORDED[package]["inputs"].items()}
    options = dict(case["objective"])
    only_kl, in_fp32, without_old = (options.pop(name, False) for name in ("only_kl", "fp32", "without_old"))
    num_items = options.pop("num_items", None)
    preset = options.pop("preset", None)
    objective = Objective(**options) if preset is None else Objective.preset(preset, **options)
    leaf = x["logp"].requires_grad_()
    loss = policy_loss(
        leaf,
        torch.zeros_like(x["advantages"]) if only_kl else x["advantages"],
        completion_mask=x["mask"],
        old_per_token_logps=None if without_old else x["old"],
        sampling_per_token_logps=x["sampling"],
        ref_per_token_logps=x["ref"],
        num_generations=2,
        num_items_in_batch=num_items,
        objective=objective,
    ).loss
    rel = 1e-6 if dtype == torch.float64 and not in_fp32 else 1e-5
    assert loss.item() == pytest.approx(case["loss"], rel=rel)
    (gradient,) = torch.autograd.grad(loss, leaf)
    # of each token, because without a bound one of ratio e^25 outweighs all others of the batch
    want = torch.tensor(case["gradient"], dtype=torch.float64)
    torch.testing.assert_close(gradient.double(), want, rtol=rel, atol=1e-12 if rel == 1e-6 else 1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("package, name", ADVANTAGE_CASES)
def test_advantages_equal_the_framework(package, name, dtype):
    """Groups of two or more, since frameworks differ on a completion that is alone."""
    recorded = RECORDED[package]
    case = recorded["advantage_cases"][name]
    x = {
        key: torch.tensor(value, dtype=torch.float64).to(dtype) for key, value in recorded["advantage_inputs"].items()
    }
    function, mask, options = getattr(advantages, case["function"]), x[case["mask"]], dict(case["options"])
    in_fp32 = options.pop("fp32", False)
    options = {key: x[value] if isinstance(value, str) and value in x else value for key, value in options.items()}
    takes = inspect.signature(function).parameters
    options |= dict(completion_mask=mask) if "completion_mask" in takes else {}
    if "group_ids" in takes and "num_generations" not in options:
        options["group_ids"] = x["ids"].long()
    got = function(x[case["rewards"]], **options)
    got = got if got.dim() == 2 else got[:, None] * mask
    rel = 1e-6 if dtype == torch.float64 and not in_fp32 else 1e-5
    assert_close(got, torch.tensor(case["advantages"], dtype=torch.float64), rel)

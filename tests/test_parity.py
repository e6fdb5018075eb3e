"""Losses and presets against what other frameworks' own functions gave, recorded by tests/parity/record.py."""

import json
from pathlib import Path

import pytest
import torch
from cases import assert_close

from fastgrpo import Objective, policy_loss

RECORDED = {
    path.stem: json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "parity").glob("*.json"))
}
CASES = [(package, name) for package, recorded in RECORDED.items() for name in recorded["cases"]]


def test_what_is_recorded():
    assert {package: recorded["version"][:12] for package, recorded in RECORDED.items()} == {
        "verl": "0.9.1",
        "openrlhf": "0.11.2",
        "skyrl": "0.4.0",
        "prime-rl": "559b44772e47",
        "slime": "624b824a898a",
        "nemo-rl": "7ea279abfbeb",
    }
    assert len(CASES) > 80


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("package, name", CASES)
def test_equals_the_framework(package, name, dtype):
    case = RECORDED[package]["cases"][name]
    x = {key: torch.tensor(value, dtype=torch.float64).to(dtype) for key, value in RECORDED[package]["inputs"].items()}
    options = dict(case["objective"])
    only_kl, in_fp32, without_old = (options.pop(name, False) for name in ("only_kl", "fp32", "without_old"))
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
        objective=objective,
    ).loss
    rel = 1e-6 if dtype == torch.float64 and not in_fp32 else 1e-5
    assert loss.item() == pytest.approx(case["loss"], rel=rel)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert_close(gradient, torch.tensor(case["gradient"], dtype=torch.float64), rel)

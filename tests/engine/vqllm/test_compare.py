"""The comparison: arms, rows that survive a stop, tables, and the way to and from GGUF."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize

from vqllm.checkpoint import Checkpoint
from vqllm.cli import main
from vqllm.errors import CorruptCheckpoint, EvaluationError, InvalidConfig, UnsupportedModel
from vqllm.evaluation import bench
from vqllm.evaluation.compare import Comparison, ComparisonConfig, Row, read_row, slug
from vqllm.evaluation.compare_arms import OurArm, PeerArm, PublishedArm, run_measured
from vqllm.evaluation.compare_grid import PeerPaths, baselines, our_grid, parse_arm, peers
from vqllm.evaluation.compare_table import collect, duel, duels, to_csv, to_json, to_markdown
from vqllm.evaluation.peers.base import PeerJob, PeerResult, run_program
from vqllm.evaluation.peers.dense import DenseFolder
from vqllm.evaluation.peers.gguf_export import export_gguf, import_linears, permute_rows
from vqllm.evaluation.peers.gptqmodel import GptqModel
from vqllm.evaluation.peers.llamacpp import LlamaCpp
from vqllm.evaluation.reference import StoredReference
from vqllm.evaluation.windows import WindowConfig
from vqllm.gguf_import import unpermute_rows
from vqllm.runtime.engine import EngineConfig
from vqllm.runtime.loading import make_executor
from vqllm.sources import PlainSource

MakeFolder = Callable[..., Path]
RunVqllm = Callable[..., tuple[int, str, str]]

TEXT = "the quick brown fox jumps over the lazy dog. " * 30


@dataclass(frozen=True)
class NoisyPeer:
    """Adds noise to every weight; counts its runs in a file."""

    name: str
    noise: float
    log: Path
    reason: str | None = None

    def missing(self) -> str | None:
        return self.reason

    def run(self, job: PeerJob) -> PeerResult:
        if self.noise < 0:
            raise EvaluationError("this peer always fails")
        with self.log.open("a") as file:
            file.write("x")
        source, generator = Checkpoint(job.source), np.random.default_rng(len(job.text.name))
        with DenseFolder(source, job.work / "dense") as dense:
            for name in source.linear_names():
                weight = source.dense_linear(name)
                noise = generator.normal(0, self.noise, weight.shape).astype(np.float32)
                dense.put(name, weight + noise)
        return PeerResult(job.work / "dense", 4.0, 1000, {"noise": 14})


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def config(tiny_folder: Path, text: Path, tmp_path: Path) -> ComparisonConfig:
    return ComparisonConfig(
        reference=tiny_folder,
        texts={"foxes": text},
        output=tmp_path / "out",
        calibration=text,
        calibration_windows=4,
        calibration_length=64,
        windows=WindowConfig(64, 6),
        seeds=(0, 1),
    )


def noisy(tmp_path: Path, noise: float, name: str = "noisy", family: str = "peer") -> PeerArm:
    return PeerArm(NoisyPeer(name, noise, tmp_path / f"{name}.log"), family)


def test_rows_survive_a_stop(config: ComparisonConfig, tmp_path: Path) -> None:
    arm = noisy(tmp_path, 0.01)
    first = Comparison(config).run([arm])
    assert [row.seed for row in first] == [0, 1]
    assert all(0 < row.results["foxes"]["mean_kl"] < 1 for row in first)
    assert Comparison(config).run([arm]) == first
    assert (tmp_path / "noisy.log").read_text() == "xx"
    longer = replace(config, windows=WindowConfig(64, 7))
    assert Comparison(longer).run([arm])[0].results["foxes"]["tokens"] == 7 * 63
    assert (tmp_path / "noisy.log").read_text() == "xxxx"
    assert not list((config.output / "work").iterdir())


def test_what_was_made_before_a_stop_is_scored(
    config: ComparisonConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm, config = noisy(tmp_path, 0.01), replace(config, seeds=(0,))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Comparison, "_score", stop)
        comparison = Comparison(config)
        with pytest.raises(KeyboardInterrupt):
            comparison.run([arm])
    (row,) = Comparison(config).run([arm])
    assert (tmp_path / "noisy.log").read_text() == "x"
    assert row.seconds == 0
    assert row.results["foxes"]["mean_kl"] > 0


def test_seeds_calibrate_on_different_windows(config: ComparisonConfig) -> None:
    texts = [Comparison(config).calibration(seed).path.read_text() for seed in (0, 1, 2)]
    assert len(set(texts)) == 3


def test_an_arm_that_fails_or_is_missing_stops_nobody(
    config: ComparisonConfig, tmp_path: Path
) -> None:
    absent = PeerArm(NoisyPeer("absent", 0.0, tmp_path / "a", "not installed"), "peer")
    rows = Comparison(config).run([noisy(tmp_path, -1.0, "bad"), absent, noisy(tmp_path, 0.01)])
    reasons = {row.arm: row.failure for row in rows}
    assert reasons == {"bad": "this peer always fails", "absent": "not installed", "noisy": ""}
    markdown = to_markdown(rows, ["foxes"])
    assert "- absent: not installed" in markdown
    assert "- bad: this peer always fails" in markdown


def test_our_arms_run_the_command(config: ComparisonConfig) -> None:
    options = ("--method", "gptq", "--bits", "4", "--group-size", "32")
    (row,) = Comparison(replace(config, seeds=(0,))).run([OurArm("gptq 4", options)])
    assert row.failure == ""
    assert 4 < row.bpw < 6
    assert row.peak_bytes > 1e7
    assert 0.5 < row.results["foxes"]["ratio"] < 2


def test_vptq_as_published_is_a_baseline(config: ComparisonConfig) -> None:
    (row,) = Comparison(replace(config, seeds=(0,))).run([PublishedArm(2)])
    assert row.failure == ""
    assert row.results["foxes"]["mean_kl"] > 0


def test_a_failing_command_is_quoted(tmp_path: Path) -> None:
    program = [sys.executable, "-c", "import sys; print('out of luck'); sys.exit(3)"]
    with pytest.raises(EvaluationError, match="code 3: out of luck"):
        run_measured(program, tmp_path / "log")
    with pytest.raises(EvaluationError, match="code 3: out of luck"):
        run_program(program, tmp_path / "log")


def test_the_stored_reference_is_the_exact_executor(tiny_folder: Path, tmp_path: Path) -> None:
    windows = np.random.default_rng(0).integers(0, 256, (5, 32))
    checkpoint = Checkpoint(tiny_folder)
    stored = StoredReference(PlainSource(checkpoint), windows)
    runner = make_executor(checkpoint, "torch", EngineConfig(max_num_sequences=1))
    for window in windows:
        np.testing.assert_allclose(
            stored.score(window.tolist()), runner.score(window.tolist()), atol=2e-4
        )
    caches = [tmp_path / "hidden.npy"] * 2
    kept = [StoredReference(PlainSource(checkpoint), windows, cache) for cache in caches][1]
    np.testing.assert_array_equal(
        stored.score(windows[0].tolist()), kept.score(windows[0].tolist())
    )
    with pytest.raises(KeyError):
        stored.score([1, 2, 3])


def made_row(arm: str, family: str, bpw: float, loss: float, seed: int = 0) -> Row:
    """A row whose 40 windows lose about `loss` nats each."""
    generator = np.random.default_rng(seed)
    reference = np.linspace(3, 4, 40)
    nll = reference + loss * generator.uniform(0.8, 1.2, 40)
    facts: dict[str, Any] = {
        "ratio": float(np.exp((nll - reference).mean())),
        "reference_perplexity": float(np.exp(reference.mean())),
        "tokens": 40 * 511,
        "window_nll": nll.tolist(),
        "window_reference_nll": reference.tolist(),
        "window_kl": (nll - reference).tolist(),
    }
    metrics = ("ratio_low", "ratio_high", "mean_kl", "median_kl", "p99_kl", "top1_agreement")
    facts |= dict.fromkeys((*metrics, "flips"), loss)
    return Row(arm, family, seed, bpw, 10**6, results={"wiki": facts}, types={"Q2_K": 3})


def test_duels_are_paired_and_fair_in_bits() -> None:
    rows = [
        made_row("tcq 2", "ours", 2.1, 0.30),
        made_row("tcq 2", "ours", 2.1, 0.32, seed=1),
        made_row("peer 2", "peer", 2.3, 0.60),
        made_row("peer small", "peer", 2.05, 0.1),
        made_row("peer wide", "peer", 2.7, 0.2),
        made_row("vq 2", "ours", 2.2, 0.50),
        made_row("tcq 4", "ours", 4.2, 0.02),
        made_row("peer 4", "peer", 4.1, 0.1),
        made_row("peer 5", "peer", 5.5, 0.1),
    ]
    results = duels(collect(rows, "wiki"))
    assert [(one.ours, one.theirs, one.is_won) for one in results] == [
        ("tcq 2", "peer 2", True),
        ("tcq 2", "peer wide", False),
        ("tcq 2", "peer 4", False),
        ("tcq 4", "peer 5", True),
    ]
    same = duel(collect(rows[:1], "wiki")[0], collect(rows[:1], "wiki")[0])
    assert same.ratio == (1, 1, 1)
    assert not same.is_won


def test_tables_hold_every_arm() -> None:
    rows = [made_row("a", "ours", 2.1, 0.3), made_row("a", "ours", 2.1, 0.4, seed=1)]
    rows += [made_row("b", "peer", 2.2, 0.5), Row("c", "peer", 0, failure="no\nluck")]
    markdown = to_markdown(rows, ["wiki", "absent"])
    for part in ("| a | 2.1 | 2 |", "| b | 2.2 | 1 |", "- c: no luck", "3 Q2_K"):
        assert part in markdown
    table = list(csv.DictReader(io.StringIO(to_csv({"model": rows}, ["wiki"]))))
    assert [line["arm"] for line in table] == ["a", "b"]
    assert "window_nll" not in json.dumps(to_json(rows, ["wiki"]))


def test_excess_loss_is_compared_at_the_same_codebooks() -> None:
    rows = [made_row("vptq 2", "ours", 2.1, 0.2)]
    rows += [made_row("VPTQ as published 2", "vptq as published", 2.1, 0.5)]
    assert "| vptq 2 | 0.6 (0.6 to 0.6) |" in to_markdown(rows, ["wiki"])


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "row.json"
    path.write_text('{"arm": 1}')
    with pytest.raises(CorruptCheckpoint, match=r"row\.json"):
        read_row(path)


def test_the_grid_names_every_arm_once(tmp_path: Path) -> None:
    arms = our_grid(("gptq", "tcq"), (2.0, 2.25), ("none", "quarot"))
    arms += [*baselines(), *peers(PeerPaths(None, None, tmp_path))]
    names = [slug(arm.name) for arm in arms]
    assert len(set(names)) == len(names)
    assert "--bpw" in arms[4].options  # type: ignore[attr-defined]
    assert {arm.family for arm in arms} == {
        *["ours", "baseline", "llama.cpp", "gptqmodel"],
        "vptq as published",
    }
    assert parse_arm("mine = --bits 3").options == ("--bits", "3")
    with pytest.raises(InvalidConfig, match="NAME=OPTIONS"):
        parse_arm("--bits 3")


def test_what_a_peer_leaves_behind_lies_beside_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("work").mkdir()
    Path("words.py").write_text("open('left', 'w').close()")
    run_program([sys.executable, Path("words.py")], Path("work/log"))
    assert Path("work/left").is_file()


def test_absent_peers_say_why(tmp_path: Path) -> None:
    assert "no folder" in str(LlamaCpp(None, "Q2_K", tmp_path).missing())
    assert "llama-imatrix" in str(LlamaCpp(tmp_path, "Q2_K", tmp_path).missing())
    assert "no Python" in str(GptqModel(None, 4).missing())
    assert "not there" in str(GptqModel(tmp_path / "python", 4).missing())


def test_rows_of_peers_do_not_depend_on_where_their_programs_are(tmp_path: Path) -> None:
    here = peers(PeerPaths(tmp_path, tmp_path / "python", tmp_path / "cache"))
    nowhere = peers(PeerPaths(None, None, tmp_path / "other"))
    assert [repr(arm) for arm in here] == [repr(arm) for arm in nowhere]
    assert len({repr(arm) for arm in here}) == len(here)


def test_permuted_rows_come_back() -> None:
    weight = np.arange(48 * 3, dtype=np.float32).reshape(48, 3)
    moved = permute_rows(weight, 3)
    assert (moved[:4, 0] == weight[[0, 8, 1, 9], 0]).all()
    np.testing.assert_array_equal(unpermute_rows(moved, 3), weight)


def test_a_folder_goes_to_gguf_and_back(tiny_folder: Path, tmp_path: Path) -> None:
    path, folder = tmp_path / "tiny.gguf", tmp_path / "back"
    export_gguf(tiny_folder, path)
    linears = import_linears(path, tiny_folder, folder)
    assert linears.bpw == 32
    assert linears.types == {"F32": 14}
    before, after = Checkpoint(tiny_folder).store, Checkpoint(folder).store
    assert set(before.names) == set(after.names)
    for name in before.names:
        np.testing.assert_array_equal(before.float32(name), after.float32(name))


def test_quantized_tensors_are_counted_by_their_type(tiny_folder: Path, tmp_path: Path) -> None:
    exact, path = tmp_path / "exact.gguf", tmp_path / "q.gguf"
    export_gguf(tiny_folder, exact)
    writer = GGUFWriter(path, "llama")
    for tensor in GGUFReader(exact).tensors:
        kind = GGMLQuantizationType.F32
        if "ffn_" in tensor.name and "norm" not in tensor.name:
            kind = GGMLQuantizationType.Q4_0
        writer.add_tensor(tensor.name, quantize(np.array(tensor.data), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    linears = import_linears(path, tiny_folder, tmp_path / "back")
    assert linears.types == {"F32": 8, "Q4_0": 6}
    config = Checkpoint(tiny_folder).config
    mlp = 2 * 3 * config.hidden_size * config.intermediate_size
    rest = config.num_linear_parameters - mlp
    assert linears.bpw == pytest.approx((4.5 * mlp + 32 * rest) / (mlp + rest))


def test_other_architectures_have_no_gguf_export(make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder(architectures=["MistralForCausalLM"], model_type="mistral")
    with pytest.raises(UnsupportedModel, match="Mistral"):
        export_gguf(folder, tmp_path / "x.gguf")


def test_the_command_writes_three_tables(
    tiny_folder: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["compare", tiny_folder, "-o", tmp_path / "out", "--text", f"foxes={text}"]
    words += ["--methods", "", "--no-baselines", "--arm", "g=--bits 4 --group-size 32"]
    words += ["--seeds", "1", "--calibration", text, "--calibration-windows", "4"]
    words += ["--window-length", "64", "--windows", "4", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["vqllm", *map(str, words)])
    with pytest.raises(SystemExit) as done:
        main()
    captured = capsys.readouterr()
    assert not done.value.code, captured.err
    assert "### foxes" in captured.out
    assert "llama.cpp Q2_K: no folder" in captured.out
    for suffix in ("md", "csv", "json"):
        assert (tmp_path / "out" / f"comparison.{suffix}").stat().st_size > 100


@pytest.mark.parametrize("bits", ["x", "nan", "0", "2,17"])
def test_widths_that_are_no_widths_are_refused(
    bits: str, tiny_folder: Path, text: Path, tmp_path: Path, run_vqllm: RunVqllm
) -> None:
    words = (tiny_folder, "-o", tmp_path / "out", "--text", text, "--bits", bits)
    code, _, errors = run_vqllm("compare", *words)
    assert code == 1
    assert f"bits is '{bits}'" in errors


def test_the_benchmark_writes_its_page_and_keeps_rows(
    tiny_folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [tiny_folder, "--text", f"foxes={text}", "--output", tmp_path, "--work", tmp_path / "w"]
    words += ["--calibration", text, "--windows", "4", "--window-length", "64"]
    words += ["--seeds", "1", "--threads", "1"]
    bench.main([str(word) for word in [*words, "--only", "rtn 4,q2_k"]])
    assert "RTN 4, seed 0" in capsys.readouterr().err
    bench.main([str(word) for word in [*words, "--only", "none of them"]])
    page = (tmp_path / "quantization.md").read_text()
    for part in ("| RTN 4 |", "## Reference tiny", "4 windows (spread) of 64", "Cost model"):
        assert part in page
    assert json.loads((tmp_path / "quantization.json").read_text())["references"]["tiny"]["rows"]
    assert "RTN 4" in (tmp_path / "quantization.csv").read_text()
    with pytest.raises(InvalidConfig, match="NAME=FILE"):
        bench.main([str(tiny_folder), "--text", "file.txt"])


def test_folders_for_the_tables_are_made_before_hours_of_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, copy = tmp_path / "a" / "b", tmp_path / "c" / "rows.json"

    def run(*_: object) -> None:
        assert output.is_dir()
        assert copy.parent.is_dir()
        raise InvalidConfig("reference", "none", "a model")

    monkeypatch.setattr(bench, "_run", run)
    with pytest.raises(InvalidConfig, match="reference"):
        bench.main(["none", "--output", str(output), "--json", str(copy)])

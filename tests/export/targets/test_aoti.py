from __future__ import annotations

import platform
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.export import export_artifact
from compress.export.targets import Census, ExportSkippedError, aoti
from compress.measure.machine import has_vnni
from compress.quantize import calibrate, convert, prepare
from compress.runtime.engines import make_engine
from compress.runtime.manifest import read_manifest
from compress.surgery.capture import export_program
from tests.export.programs import artifact, floating, quantized, tiny

EXACT = pytest.mark.skipif(not has_vnni(), reason="without VNNI no package of int8 kernels is built")


def test_kernels_are_told_apart() -> None:
    code = """
        aoti_torch_cpu__qconv_pointwise_tensor(a); aoti_torch_cpu__qconv2d_pointwise_binary_tensor(b);
        aoti_torch_cpu__qlinear_pointwise_tensor(c); aoti_torch_cpu_mkldnn__convolution_pointwise(d);
        aoti_torch_cpu__linear_pointwise(e); aoti_torch_cpu_addmm_out(f); aoti_torch_cpu_bmm_out(g);
        aoti_torch_empty_strided(h); aoti_torch_cpu_copy_(i);
        cpp_fused_quantize_per_tensor_0(j);
        cpp_fused_dequantize_per_tensor_relu_1(k);
    """
    assert aoti.count_kernels([code]).int8_kernels == 3
    assert aoti.count_kernels([code]).float_kernels == 4
    assert aoti.count_kernels([code]).conversions == 1
    assert aoti.count_kernels(["int main() {}"]) == Census(0, 0, conversions=0)


@EXACT
def test_every_layer_became_an_integer_kernel() -> None:
    census = read_manifest(artifact()).targets["aoti"].census
    assert (census["int8_kernels"], census["float_kernels"]) == (7, 0)
    assert census["conversions"] >= 1  # that of the input


def test_the_census_sees_the_silent_fallback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What Inductor does without freezing: the same program, in floats, without a word.
    settings = {**aoti._settings(), "freezing": False}
    monkeypatch.setattr(aoti, "_settings", lambda: settings)
    monkeypatch.setattr(aoti, "has_vnni", lambda: True)
    census = aoti.build(tiny().program, tmp_path / aoti.FILE)
    assert census.int8_fraction < 0.5


@EXACT
def test_outputs_are_those_of_the_program_whatever_the_batch() -> None:
    # In particular with one input channel, where Inductor's own outputs are in the wrong order.
    trained = quantized()
    with torch.no_grad():
        wanted = trained.program.module()(trained.inputs)
    package = torch._inductor.aoti_load_package(str(artifact() / aoti.FILE))
    for num in (1, 2, 150):
        found = package(trained.inputs[:num])
        # Sums in another order may fall to another side of a rounding; that moves an output by one step of many.
        assert float((found - wanted[:num]).norm() / wanted[:num].norm()) < 0.01


class Residual(nn.Module):
    """Adds a product to the very input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


@EXACT
@pytest.mark.slow
def test_the_callers_input_stays_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(8, 16)
    prepared = prepare(Residual().eval(), [inputs[:2]], "int8")
    calibrate(prepared, [(inputs,)])
    program = export_program(convert(prepared.eval()), [inputs[:2]])
    found = aoti.build(program, tmp_path / aoti.FILE)
    assert (found.int8_kernels, found.float_kernels) == (1, 0)
    before = inputs.clone()
    outputs = make_engine("aoti", tmp_path / aoti.FILE)([inputs])[0]
    assert torch.equal(inputs, before)
    with torch.no_grad():
        torch.testing.assert_close(outputs, prepared(inputs), atol=0.02, rtol=0)


@EXACT
def test_the_package_is_small_and_holds_no_sources_and_no_debug_information() -> None:
    path = artifact() / aoti.FILE
    with zipfile.ZipFile(path) as package:
        names = package.namelist()
        library = package.read(next(name for name in names if name.endswith(".so")))
        sources = [package.read(name) for name in names if name.endswith(".cpp")]
    assert not any(sources)
    assert b".debug_line" not in library
    assert b".symtab" not in library
    assert path.stat().st_size < 250_000


def test_without_vnni_integers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(8, 16)
    prepared = prepare(nn.Linear(16, 4).eval(), [inputs[:2]], "int8")
    calibrate(prepared, [(inputs,)])
    monkeypatch.setattr(aoti, "has_vnni", lambda: False)
    with pytest.raises(ExportSkippedError, match="aoti: expected a processor with VNNI for int8, got one without"):
        aoti.build(export_program(convert(prepared.eval()), [inputs[:2]]), tmp_path / aoti.FILE)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_without_vnni_narrow_weights_are_taken_and_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    inputs, layer = torch.rand(64, 256), nn.Linear(256, 8).eval()
    with torch.no_grad():
        layer.weight.abs_()  # pairs of products add up
    prepared = prepare(layer, [inputs[:2]], "int8_reduced")
    calibrate(prepared, [(inputs,)])
    converted = convert(prepared.eval())
    monkeypatch.setattr(aoti, "has_vnni", lambda: False)
    census = aoti.build(export_program(converted, [inputs[:2]]), tmp_path / aoti.FILE)
    assert (census.int8_kernels, census.float_kernels) == (1, 0)
    (found,) = make_engine("aoti", tmp_path / aoti.FILE)([inputs])
    torch.testing.assert_close(found, converted(inputs), rtol=1e-4, atol=1e-4)


class Gated(nn.Module):
    """Adds what activations give to the layer's input, and to something else."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for activation, (first, second) in ((F.relu, self.layers[:2]), (F.gelu, self.layers[2:])):
            x = x + activation(first(x))
            x = activation(second(x)) + x.sigmoid()
        return x


@pytest.mark.slow
def test_sums_behind_activations_are_compiled(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(8, 16)
    prepared = prepare(Gated().eval(), [inputs[:2]], "int8_reduced")
    calibrate(prepared, [(inputs,)])
    program = export_program(convert(prepared.eval()), [inputs[:2]])
    found = aoti.build(program, tmp_path / aoti.FILE)
    assert (found.int8_kernels, found.float_kernels) == (4, 0)
    with torch.no_grad():
        outputs = make_engine("aoti", tmp_path / aoti.FILE)([inputs])[0]
        torch.testing.assert_close(outputs, prepared(inputs), atol=0.03, rtol=0)


@pytest.mark.parametrize("scheme", [None, pytest.param("int8", marks=[EXACT, pytest.mark.slow])])
def test_no_call_lays_out_weights_anew(scheme: str | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    # Of one channel, whose two orders of dimensions are the same and mean different orders of what is made of it.
    layers = nn.Conv2d(1, 48, 3, padding=1, stride=4), nn.ReLU(), nn.Conv2d(48, 48, 3, padding=1)
    network: nn.Module = nn.Sequential(*layers).eval()
    inputs = torch.randn(2, 1, 8, 8)
    if scheme:
        prepared = prepare(network, [inputs], scheme)
        calibrate(prepared, [(inputs,)])
        network = convert(prepared.eval())
    aoti.build(export_program(network, [inputs]), tmp_path / aoti.FILE)
    engine = make_engine("aoti", tmp_path / aoti.FILE, num_threads=1)
    for batch in (1, 2, 16):
        x = torch.randn(batch, 1, 8, 8)
        engine([x])  # makes what it keeps
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            (got,) = engine([x])
        told = [line.split(",") for line in capfd.readouterr().out.splitlines() if line.startswith("onednn_verbose")]
        kinds = [fields[5] for fields in told if "exec" in fields]
        assert kinds.count("convolution") == 2
        assert not [fields for fields in told if "reorder" in fields and "48x48x3x3" in fields]
        torch.testing.assert_close(got, network(x), rtol=1e-4, atol=1e-5)


def test_products_of_transposed_values_are_integers_whatever_the_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(8, 6, 16)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()  # its attention puts the batch second
    prepared = prepare(encoder, [inputs[:2]], "int8_reduced")
    calibrate(prepared, [(inputs,)])
    program = export_program(convert(prepared.eval()), [inputs[:2]])
    found = aoti.build(program, tmp_path / aoti.FILE)
    assert (found.int8_kernels, found.float_kernels) == (4, 1)  # attention's own products are one kernel in floats
    engine = make_engine("aoti", tmp_path / aoti.FILE)
    for num in (1, 8):
        with torch.no_grad():
            torch.testing.assert_close(engine([inputs[:num]])[0], prepared(inputs[:num]), atol=0.03, rtol=0)


def test_no_compiler_is_a_reason_to_skip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(ExportSkippedError, match=r"expected a C\+\+ compiler, got none"):
        aoti.build(tiny().program, tmp_path / aoti.FILE)
    assert not list(tmp_path.iterdir())


def test_what_inductor_does_not_compile_is_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **settings: object) -> None:
        raise RuntimeError("no such operator\nWhile executing it")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    made = floating()
    with pytest.warns(UserWarning, match=r"aoti: expected .*, got RuntimeError: no such operator\. Leave"):
        manifest = export_artifact(
            made.program,
            tmp_path / "artifact",
            targets=["aoti", "eager"],
            reference=made.reference,
            held_out=[made.inputs],
        )
    assert list(manifest.targets) == ["eager"]


def test_requirements_name_this_machine() -> None:
    requires = aoti.requires()
    assert requires["arch"] == platform.machine()
    assert torch.__version__.startswith(requires["torch"] + ".")
    assert "avx2" in requires["flags"] or platform.machine() != "x86_64"

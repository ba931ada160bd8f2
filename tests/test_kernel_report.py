"""benchmarks/kernel_report.py and kernel_inspection.py: what they read from compilers and machine code, the bounds
that follow from it, and real kernels from the compiler to the table."""

from __future__ import annotations

import csv
import itertools
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import cuda_sources
import kernel_inspection
import kernel_report
import rooflines
import triton_cases
from kernel_inspection import Loop, class_of, inner_loop, parse_sass

from asvit_fast import ops
from asvit_fast.kernels import tile_table

# the words of ptxas -v; the second kernel spills
PTXAS = """\
ptxas info    : Compiling entry function '_ZN10asvit_fast12_GLOBAL__N_16kernelIfLi2EEEvPT_l' for 'sm_90'
ptxas info    : Function properties for _ZN10asvit_fast12_GLOBAL__N_16kernelIfLi2EEEvPT_l
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 24624 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function 'plain' for 'sm_90'
ptxas info    : Function properties for plain
    24 bytes stack frame, 20 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 24 bytes cumulative stack size
"""

# the words of cuobjdump -sass: a loop that waits inside of a loop that works, part of which is behind the exit
SASS = """\
		Function : busy
        /*0000*/                   LDC R1, c[0x0][0x28] ;            /* 0x00000a00ff017b82 */
        /*0010*/                   LDG.E.128 R4, [R2] ;              /* 0x00000a00ff017b82 */
        /*0020*/                   FFMA R8, R4, R5, R8 ;             /* 0x00000a00ff017b82 */
        /*0030*/                   SYNCS.PHASECHK.TRYWAIT P0, [R9] ; /* 0x00000a00ff017b82 */
        /*0040*/              @!P0 BRA 0x30 ;                        /* 0x00000a00ff017b82 */
        /*0050*/               @P1 BRA 0xb0 ;                        /* 0x00000a00ff017b82 */
        /*0060*/                   MUFU.EX2 R8, R8 ;                 /* 0x00000a00ff017b82 */
        /*0070*/                   HGMMA.64x64x16.F32 R24, gdesc ;   /* 0x00000a00ff017b82 */
        /*0080*/                   BRA.U UP0, 0x20 ;                 /* 0x00000a00ff017b82 */
        /*0090*/              @!PT STG.E.U16 desc[UR4][R2.64], R8 ;  /* 0x00000a00ff017b82 */
        /*00a0*/                   EXIT ;                            /* 0x00000a00ff017b82 */
        /*00b0*/                   LDS.64 R6, [R6] ;                 /* 0x00000a00ff017b82 */
        /*00c0*/                   BRA 0x60 ;                        /* 0x00000a00ff017b82 */
        /*00d0*/                   BRA 0xd0 ;                        /* 0x00000a00ff017b82 */
		Function : straight
        /*0000*/                   LDL.LU R2, [R1] ;                 /* 0x00000a00ff017b82 */
        /*0010*/                   EXIT ;                            /* 0x00000a00ff017b82 */
"""


# --------------------------------------------------------------------------- machine code


def test_loops():
    functions = parse_sass(SASS)
    assert list(functions) == ["busy", "straight"]
    assert [i.name for i in functions["busy"]][:2] == ["LDC", "LDG.E.128"]
    loop = inner_loop(functions["busy"])
    assert loop.found == "branch at 0x80 back to 0x20"
    assert loop.mix == {"fp32": 1, "mufu": 1, "tensor": 1, "shared": 1, "other": 5}  # LDS comes back, the wait counts
    assert loop.instructions == 9
    assert loop.global_bytes == 0
    straight = inner_loop(functions["straight"])
    assert straight.found == "no loop: the whole kernel"
    assert straight.mix == {"local": 1, "other": 1}


def test_values_that_the_compiler_has_lost():
    """The stack pointer in their place, which loads and stores and its own adjustments may have."""
    lines = [
        "LDC R1, c[0x0][0x28]", "IADD3 R1, R1, -0x10, RZ", "STL.64 [R1+0x8], R2", "PRMT R13, R1, 0x3340, R1",
        "IADD3 R69, P1, R1, 0x20, RZ", "@P1 IADD3.X R70, R12, -0x3ffffff0, R1, P1, !PT", "EXIT",
    ]  # fmt: skip
    text = "Function : lost\n" + "\n".join(f"/*{16 * n:04x}*/ {line} ;" for n, line in enumerate(lines))
    found = kernel_inspection.stack_pointer_uses(parse_sass(text)["lost"])
    assert [i.name for i in found] == ["IADD3", "IADD3.X"]


def test_the_loop_with_more_exponentials():
    """One of two loops beside each other, and not the one around both."""
    lines = [
        "IADD3 R1",
        *["FADD R1"] * 9,
        "BRA.U UP0, 0x10",
        "MUFU.EX2 R1",
        "BRA.U UP0, 0xb0",
        "BRA.U UP0, 0x0",
        "EXIT",
    ]
    text = "Function : two\n" + "\n".join(f"/*{16 * n:04x}*/ {line} ;" for n, line in enumerate(lines))
    assert inner_loop(parse_sass(text)["two"]).start == 0xB0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("HMMA.16816.F32.BF16", "tensor"), ("HGMMA.64x64x16", "tensor"), ("UTCHMMA", "tensor"), ("DMMA", "tensor"),
        ("MUFU.EX2", "mufu"), ("FFMA", "fp32"), ("FFMA2", "fp32"), ("FADD.FTZ", "fp32"), ("FMNMX", "other"),
        ("LDS.128", "shared"), ("LDSM.16.M88", "shared"), ("STS", "shared"), ("LDG.E", "global"),
        ("STG.E.64", "global"), ("LDGSTS.E.BYPASS.128", "global"), ("LDL", "local"), ("IMAD", "other"),
    ],
)  # fmt: skip
def test_classes(name, kind):
    assert class_of(name) == kind


def test_bytes_of_a_warp():
    widths = {
        "LDGSTS.E.BYPASS.LTC128B.128": 16,
        "LDG.E": 4,
        "LDG.E.64": 8,
        "LDG.E.128.CONSTANT": 16,
        "STG.E.U16": 2,
        "LDG.E.U8": 1,
        "LDS.128": 0,
    }
    assert {name: kernel_inspection._bytes(name) // 32 for name in widths} == widths


# --------------------------------------------------------------------------- bounds


def test_occupancy():
    gpu, occupancy = rooflines.GPUS[90], rooflines.occupancy
    assert occupancy(gpu, 32, 0, 8) == 1.0
    assert occupancy(gpu, 255, 0, 8) == 8 / 64  # 256 x 32 x 8 registers: one block
    assert occupancy(gpu, 128, 0, 4) == 16 / 64
    assert occupancy(gpu, 32, 100 * 1024, 4) == 8 / 64  # two blocks of shared memory
    assert occupancy(gpu, 16, 0, 1) == 32 / 64  # 32 blocks
    assert rooflines.GPUS[80].shared < gpu.shared


def test_rates():
    """The clock is the one of the data sheet's tensor rate: operations per clock and multiprocessor are powers of 2."""
    for gpu in rooflines.GPUS.values():
        per_clock = gpu.tensor_16 / (gpu.multiprocessors * gpu.clock)
        assert min(abs(per_clock / power - 1) for power in (2048, 4096, 8192)) < 0.01
        assert gpu.tensor_32 == gpu.tensor_16 / 2 or gpu.tensor_32 == pytest.approx(gpu.tensor_16 / 2, rel=0.01)
        assert len(gpu.source) > 20
    assert rooflines.GPUS[90].exponentials == pytest.approx(3.9e12, rel=0.01)


def test_bounds():
    gpu = rooflines.GPUS[90]
    mix = {"mufu": 32, "fp32": 100, "other": 268}
    loop = Loop(0, 16, kernel_inspection.Counter(mix), 0)
    work = rooflines.Work("score", 64 * 64, exponentials=1.0, operations=64.0, bytes=0.5)
    bounds = rooflines.bounds(gpu, loop, 4, work, half=True)
    per_score = 400 * 4 / 4 / (64 * 64)  # instructions of all warps, four a clock
    assert bounds.issue == pytest.approx(1e12 * per_score / (132 * 1.83e9))
    assert bounds.pipes == pytest.approx(1e12 * 32 * 2 * 4 / 4096 / (132 * 1.83e9))
    assert bounds.roofline == bounds.exponential == pytest.approx(0.2587, rel=1e-3)
    assert rooflines.bounds(gpu, loop, 4, work, half=False).tensor == pytest.approx(64e12 / 494e12)


# --------------------------------------------------------------------------- compilers


def test_what_ptxas_says():
    found = cuda_sources.parse(PTXAS, 90, {"plain": 96})
    template, plain = found.values()
    assert list(found)[1] == "plain"
    assert template.name in ("kernel<float, 2>", "_ZN10asvit_fast12_GLOBAL__N_16kernelIfLi2EEEvPT_l")
    assert (template.registers, template.spilled_bytes, template.shared_bytes) == (40, 0, 24624)
    assert (plain.registers, plain.spilled_bytes, plain.warps) == (255, 20, 3)


def test_scores_of_cuda_kernels():
    def work(name: str, **mix: int) -> rooflines.Work:
        report = kernel_inspection.KernelReport(name, 90, 168, 0, 0, 4, b"")
        return cuda_sources.work_of(report, Loop(0, 16, kernel_inspection.Counter(mix), 0))

    tensor = "window_attention_taylor_tensor_kernel<2, 16>"
    one_tile = 2 * (2 * 6 * 3 + 1)  # components in two instructions; two products of six pairs of orders, three each
    assert work(tensor, tensor=one_tile, mufu=8).units == 4 * 16 * 8
    assert work(tensor, tensor=2 * one_tile, mufu=12).units == 4 * 16 * 16
    assert work(tensor, tensor=one_tile).operations == 2 * 2 * 3 * 6 * 16
    assert work("window_attention_taylor_kernel<float, 1, 8, 2>", mufu=10).units == 128 / 2 * 8
    for name, mix in ((tensor, {"mufu": 3}), ("window_attention_taylor_kernel<float, 1, 8, 2>", {}), ("other<1>", {})):
        assert work(name, **mix) == rooflines.Work("byte", 0.0)  # a loop that has no scores


def test_every_kernel_is_reported(root):
    """A new Triton kernel is started by one of the ops of the table, too."""
    text = "\n".join(path.read_text() for path in (root / "kernels").glob("*.py"))
    kernels = set(re.findall(r"^def (\w+)_kernel\(\n    \w+_pointer", text, re.MULTILINE))
    shapes = (
        "N=49 d=8 bias=0",
        "N=144 d=32 bias=1",
        "N=256 keys=576 d=30 bias=1",
        "orders=1",
        "orders=1 tanh=0 bias=1",
        "K=8 C=88",
        "K=4 C=88",
        "N=49",
    )
    launched = {case.kernel for case in triton_cases.cases([90], ["bf16"], lambda label: label in shapes)}
    assert kernels == launched


def test_cases():
    labels = {triton_cases.label_of(shape) for op in triton_cases.OPS for shape in op.shapes}
    assert {f"N={n} d={d} bias=0" for n, d in itertools.product((49, 196, 784), (4, 8, 16, 22, 29, 32, 45))} <= labels
    assert {f"N={n} d=32 bias=1" for n in (49, 64, 144, 98, 392)} | {"N=343 d=16 bias=1"} <= labels


def test_cases_are_what_ops_start():
    """Forward and backward, with the tiles of the GPU's family, and as a launch specialises."""
    found = list(triton_cases.cases([80, 90], ["fp32"], lambda label: label == "N=49 d=8 bias=0"))
    assert [(case.arch, case.kernel.removeprefix("window_attention_")) for case in found] == [
        (arch, name) for arch in (80, 90) for name in ("tiled", "tiled_backward")
    ]
    launch, expected = found[0].launch, tile_table.choose("tiled", "ampere", bits=32, tokens=49, block_d=16, axes=2)
    assert launch.constants | launch.options == launch.constants | launch.options | expected
    assert launch.signature["q_pointer"] == "*fp32" and launch.signature["scale"] == "fp32"
    assert "q_pointer" in launch.divisible and "height" not in launch.divisible  # sizes are not specialised
    assert found[0].work().units == min(expected["BLOCK_M"], 49) * min(expected["BLOCK_N"], 49)
    (gelu,) = triton_cases.cases([90], ["bf16"], lambda label: label == "orders=1 tanh=0 bias=0")
    assert gelu.launch.signature["count"] == "i32" and "count" in gelu.launch.divisible
    assert gelu.launch.constants["channels"] == 1  # as Triton makes every 1 a constant
    assert ops.gelu_taylor(torch.zeros(1, 3)).tolist() == [[0.0] * 3]  # ops are themselves again


def test_same_architectures_as_the_build(root):
    archs = ", ".join(f'"{arch / 10:.1f}"' for arch in rooflines.GPUS)
    assert f"DEFAULT_ARCHS = ({archs})" in (root / "setup.py").read_text()


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_triton_kernels(tmp_path, capsys):
    """The way from the compiler to the table: one tile, and a loop over blocks whose exponentials are known."""
    out = tmp_path / "report.csv"
    arguments = ["--out", str(out), "--jobs", "1", "--arch", "90"]
    assert kernel_report.main([*arguments, "--kernel", "window_attention_single_tile", "--shape", "N=49 d=8"]) == 0
    assert kernel_report.main([*arguments, "--kernel", "window_attention_tiled", "--shape", "N=784 d=8"]) == 0
    assert kernel_report.main([*arguments, "--kernel", "window_attention_tiled", "--shape", "N=784 d=8"]) == 0
    shown = capsys.readouterr().out
    assert "H200" in shown and "SPILLS" not in shown
    rows = {row["kernel"].removeprefix("window_attention_"): row for row in rows_of(out)}
    assert list(rows) == ["single_tile", "single_tile_backward", "tiled", "tiled_backward"]
    for row in rows.values():
        assert int(row["spilled"]) <= kernel_report.FEW and int(row["tensor"]) > 0 and "back to" in row["loop"]
        assert float(row["pipes_ps"]) >= float(row["exp_ps"]) > 0.2  # at least an exponential per score
        assert float(row["issue_ps"]) > float(row["tensor_ps"])
        assert 0 < float(row["occupancy"]) <= 1
    tiled = rows["tiled"]
    lanes = 32 * int(tiled["warps"]) * int(tiled["mufu"])
    assert 1.0 <= lanes / float(tiled["units"]) <= 1.2  # an exponential per score, and some to rescale


@pytest.mark.slow
def test_a_cuda_source(tmp_path, capsys):
    if cuda_sources.find_nvcc() is None:
        pytest.skip("no nvcc: set CUDA_HOME or PATH")
    out = tmp_path / "report.csv"
    arguments = ["--arch", "90", "--kernel", "layer_norm_taylor.cu", "--jobs", "1", "--out", str(out)]
    assert kernel_report.main(arguments) == 0
    assert "24 kernels compiled" in capsys.readouterr().out
    rows = rows_of(out)
    assert len(rows) == 24 and all(row["kernel"].startswith("layer_norm_taylor_kernel<") for row in rows)
    assert all(row["spilled"] == "0" and row["warps"] == "8" for row in rows)


def test_spills_fail(monkeypatch, capsys):
    """Only on Hopper; the message says which."""
    body = parse_sass(SASS)["busy"]
    work = rooflines.Work("score", 1.0, exponentials=1.0)
    for arch, code in ((90, 1), (80, 0)):
        compiled = kernel_inspection.KernelReport("k", arch, 255, 24, 0, 4, b"")
        row = kernel_report.row_of("window_attention_tiled", "N=784 d=8 bias=0", "bf16", compiled, body, work)
        monkeypatch.setattr(kernel_report, "collect", lambda *_, row=row: [row])
        options = ["--arch", str(arch), "--kernel", "window_attention_tiled", "--out", ""]
        assert kernel_report.main(options) == code
        shown = capsys.readouterr().out
        assert "SPILLS" in shown and "window_attention_tiled N=784 d=8 bias=0 bf16: 24 bytes per thread" in shown


def test_nothing_to_do(capsys):
    assert kernel_report.main(["--kernel", "nonsense"]) == 2
    message = capsys.readouterr().err
    assert "triton_cases.py" in message and "window_attention_single_tile" in message and "N=49 d=8" in message
    for option, value in (("--dtype", "nope"), ("--arch", "91")):
        with pytest.raises(SystemExit):
            kernel_report.main([option, value])
        assert f"{option} must be some of" in capsys.readouterr().err

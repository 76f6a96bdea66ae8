"""Kernels: the C library and the portable path against plain PyTorch in float64, for every width, odd shapes and groups, and threads."""

import ctypes
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from tightfit.formats.kernels import cpu, portable
from tightfit.formats.packing import pack, packed_bytes

SHAPES = ((5, 1, 1), (7, 172, 1), (4, 384, 3), (9, 500, 1), (13, 512, 4), (6, 768, 8), (11, 1024 + 96, 35), (2, 2064, 1), (8, 2048, 8))
"""Rows, columns, groups; groups of 32, 96, 128, 256 columns and whole rows."""


@pytest.fixture(params=["library", "portable"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to compute, where this machine has both."""
    if request.param == "portable":
        monkeypatch.setattr(cpu, "_library", lambda: (None, "this test forbids it"))
    elif not cpu.has_kernel():
        pytest.skip("no CPU kernel here")
    return request.param


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Case:
    """A random matrix in both formats, and what they stand for, by arithmetic that shares nothing with the kernels."""

    def __init__(self, rows: int, columns: int, groups: int, bits: int) -> None:
        random = torch.Generator().manual_seed(rows * columns + bits)
        self.columns = columns
        codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=random)
        self.packed = pack(codes, bits)
        self.table = torch.randn(rows, 2**bits, generator=random).bfloat16()
        self.scale = torch.rand(rows, groups, generator=random).bfloat16()
        self.zero = torch.randint(0, 2**bits, (rows, groups), dtype=torch.uint8, generator=random)
        self.zero[0, 0] = 255
        self.dense_table = torch.gather(self.table, 1, codes.long())
        scale, zero = (part.float().repeat_interleave(columns // groups, dim=1) for part in (self.scale, self.zero))
        self.dense_affine = scale * (codes.float() - zero)
        self.random = random

    def x(self, tokens: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(tokens, self.columns, generator=self.random).to(dtype)


def assert_near(found: torch.Tensor, x: torch.Tensor, dense: torch.Tensor) -> None:
    """Within what rounding the result and adding in float32 may cost."""
    exact = x.double() @ dense.double().t()
    sizes = x.double().abs() @ dense.double().abs().t()
    of_result, of_sums = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}[x.dtype], 2**-19
    assert found.dtype == x.dtype
    assert ((found.double() - exact).abs() <= of_result * exact.abs() + of_sums * sizes + 1e-30).all()


@pytest.mark.parametrize("rows, columns, groups", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_products_equal_those_of_the_dense_matrix(path: str, bits: int, rows: int, columns: int, groups: int) -> None:
    case = Case(rows, columns, groups, bits)
    for dtype in (torch.bfloat16, torch.float32) if path == "library" else (torch.float32,):  # torch's own sums are rougher in bfloat16
        for tokens in (1, 2, 3, 16):
            x = case.x(tokens, dtype)
            assert_near(cpu.table_product(x, case.packed, case.table), x, case.dense_table)
            assert_near(cpu.affine_product(x, case.packed, case.scale, case.zero), x, case.dense_affine.to(dtype))


@pytest.mark.parametrize("rows, columns, groups", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_decoding_is_exact(path: str, bits: int, rows: int, columns: int, groups: int) -> None:
    case = Case(rows, columns, groups, bits)
    for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float64):
        assert torch.equal(cpu.table_decode(case.packed, case.table, columns, dtype), case.dense_table.to(dtype))
        found = cpu.affine_decode(case.packed, case.scale, case.zero, columns, dtype)
        assert found.dtype == dtype and torch.equal(found, case.dense_affine.to(dtype))


def test_eight_bits_multiply_too(path: str) -> None:
    case = Case(7, 192, 3, 8)
    x = case.x(3, torch.float32)
    assert_near(cpu.affine_product(x, case.packed, case.scale, case.zero), x, case.dense_affine)


def test_other_dtypes_multiply_too(path: str) -> None:
    case = Case(9, 500, 1, 4)
    x = case.x(2, torch.float64)
    found = cpu.table_product(x, case.packed, case.table)
    assert found.dtype == torch.float64 and torch.allclose(found, x @ case.dense_table.double().t())
    assert cpu.table_product(x.half(), case.packed, case.table).dtype == torch.float16


def test_a_row_does_not_depend_on_its_neighbours_or_threads(path: str, two_threads: None) -> None:
    case = Case(257, 2048 + 48, 1, 3)  # enough weights to be shared
    for dtype in (torch.bfloat16, torch.float32):
        x = case.x(3, dtype)
        shared = cpu.table_product(x, case.packed, case.table)
        torch.set_num_threads(1)
        alone = cpu.table_product(x, case.packed, case.table)
        torch.set_num_threads(2)
        if path == "library":
            assert torch.equal(shared, alone)
            some = cpu.table_product(x, case.packed[100:105], case.table[100:105])
            assert torch.equal(shared[:, 100:105], some)
        assert_near(shared.float(), x.float(), case.dense_table) if dtype == torch.float32 else None
        assert torch.equal(cpu.table_decode(case.packed, case.table, case.columns, dtype), case.dense_table.to(dtype))


def test_stored_tensors_and_inputs_may_lie_anywhere(path: str) -> None:
    """Weights that are mapped from a file begin at any byte."""
    case = Case(9, 300, 1, 4)
    raw = bytearray(b"\0" + case.packed.numpy().tobytes() + case.table.view(torch.int8).numpy().tobytes())
    packed = torch.frombuffer(raw, dtype=torch.int8, offset=1, count=case.packed.numel()).view(case.packed.shape)
    table = torch.frombuffer(raw, dtype=torch.bfloat16, offset=1 + case.packed.numel(), count=case.table.numel()).view(case.table.shape)
    assert table.data_ptr() % 2 == 1 or packed.data_ptr() % 2 == 1
    wide = case.x(4, torch.float32).repeat_interleave(2, dim=1)
    x = wide[:, ::2]
    assert not x.is_contiguous()
    assert_near(cpu.table_product(x, packed, table), x, case.dense_table)


def test_nothing_is_written_past_the_result() -> None:
    if not cpu.has_kernel():
        pytest.skip("no CPU kernel here")
    library, _ = cpu._library()
    assert isinstance(library, ctypes.CDLL)
    for bits in (2, 3, 4):
        for columns in (1, 17, 500, 513):
            case = Case(3, columns, 1, bits)
            room = torch.full((3 * columns + 64,), 7.0)
            library.tightfit_decode(bits, 1, 0, columns, 0, 3, case.packed.data_ptr(), case.table.data_ptr(), None, room.data_ptr())
            assert torch.equal(room[: 3 * columns].view(3, columns), case.dense_table.float()) and (room[3 * columns :] == 7).all()


def test_no_tokens_and_no_rows(path: str) -> None:
    case = Case(5, 64, 1, 4)
    assert cpu.table_product(torch.empty(0, 64), case.packed, case.table).shape == (0, 5)
    assert cpu.table_product(torch.ones(2, 64), case.packed[:0], case.table[:0]).shape == (2, 0)
    assert cpu.table_decode(case.packed[:0], case.table[:0], 64, torch.bfloat16).shape == (0, 64)


def test_shapes_and_work_are_known_without_values() -> None:
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        x, packed = torch.empty(3, 100, dtype=torch.bfloat16), torch.empty(7, packed_bytes(100, 3), dtype=torch.int8)
        table = torch.empty(7, 8, dtype=torch.bfloat16)
        scale, zero = torch.empty(7, 1, dtype=torch.bfloat16), torch.empty(7, 1, dtype=torch.uint8)
        for found in (cpu.table_product(x, packed, table), cpu.affine_product(x, packed, scale, zero)):
            assert found.shape == (3, 7) and found.dtype == torch.bfloat16
        for found in (cpu.table_decode(packed, table, 100, torch.float32), cpu.affine_decode(packed, scale, zero, 100, torch.float32)):
            assert found.shape == (7, 100) and found.dtype == torch.float32
    assert counter.get_total_flops() == 2 * (2 * 3 * 100 * 7)


def peak_bytes(call: Callable[[], torch.Tensor]) -> int:
    """The most that lives at once while `call` runs, by the allocator's records."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = call()
    del kept
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [512, 500])
def test_the_kernels_allocate_what_they_say(dtype: torch.dtype, columns: int) -> None:
    if not cpu.has_kernel():
        pytest.skip("no CPU kernel here")
    case = Case(40, columns, 1, 4)
    x = case.x(3, dtype)
    result, dense = 3 * 40 * dtype.itemsize, 40 * columns * dtype.itemsize
    assert peak_bytes(lambda: cpu.table_product(x, case.packed, case.table)) == result + cpu.padded_bytes(3, columns, dtype)
    assert peak_bytes(lambda: cpu.affine_product(x, case.packed, case.scale, case.zero)) == result + cpu.padded_bytes(3, columns, dtype)
    assert cpu.table_decode_bytes(40, columns, 4, dtype) == cpu.affine_decode_bytes(40, columns, 4, dtype) == 0
    assert peak_bytes(lambda: cpu.table_decode(case.packed, case.table, columns, dtype)) == dense
    assert peak_bytes(lambda: cpu.affine_decode(case.packed, case.scale, case.zero, columns, dtype)) == dense


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("rows, columns", [(200, 4096), (50, 1000), (2, 700_000)])
def test_the_portable_path_allocates_at_most_what_it_says(bits: int, rows: int, columns: int) -> None:
    case = Case(rows, columns, 1, bits)
    dense, most = rows * columns * 2, portable.decode_bytes(rows, columns, bits, torch.bfloat16)
    by_table = peak_bytes(lambda: portable.table_decode(case.packed, case.table, columns, torch.bfloat16)) - dense
    by_group = peak_bytes(lambda: portable.affine_decode(case.packed, case.scale, case.zero, columns, torch.bfloat16)) - dense
    assert 0.9 * most <= by_table <= most and 0.9 * most <= by_group <= most


def test_the_portable_path_goes_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "SLICE_CODES", 1000)
    case = Case(31, 300, 1, 3)
    assert torch.equal(portable.table_decode(case.packed, case.table, 300, torch.float32), case.dense_table.float())
    assert torch.equal(portable.affine_decode(case.packed, case.scale, case.zero, 300, torch.float32), case.dense_affine)


def test_says_once_why_the_portable_path_is_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    case = Case(3, 64, 1, 4)
    broken = tmp_path / "_table.so"
    broken.write_bytes(b"no library")
    for file, reason in ((tmp_path / "none.so", "it was not built"), (broken, "_table.so")):
        monkeypatch.setattr(cpu, "LIBRARY", file)
        cpu._library.cache_clear()
        cpu._say_portable.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                cpu.table_decode(case.packed, case.table, 64, torch.float32)
        assert not cpu.has_kernel()
        assert len(caplog.records) == 1 and reason in caplog.records[0].getMessage()
    monkeypatch.undo()
    cpu._library.cache_clear()
    cpu._say_portable.cache_clear()


@pytest.mark.parametrize("fault", ["row bytes", "table", "groups"])
def test_the_library_is_not_called_with_what_it_would_read_past(fault: str) -> None:
    if not cpu.has_kernel():
        pytest.skip("no CPU kernel here")
    case, x = Case(4, 64, 2, 4), torch.ones(1, 64)
    with pytest.raises(AssertionError):
        if fault == "row bytes":
            cpu.table_product(torch.ones(1, 128), case.packed, case.table)
        elif fault == "table":
            cpu.table_product(x, case.packed, case.table[:, :8].contiguous())
        else:
            cpu.affine_product(x, case.packed, case.scale.repeat(1, 2), case.zero.repeat(1, 2))  # groups of 16 columns


def test_a_forked_child_has_threads_of_its_own(two_threads: None) -> None:
    case = Case(257, 2048, 1, 4)
    x = case.x(1, torch.float32)
    expected = cpu.table_product(x, case.packed, case.table)
    child = os.fork()
    if child == 0:  # pragma: no cover
        same = torch.equal(cpu.table_product(x, case.packed, case.table), expected) if cpu.has_kernel() else True
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_build_goes_on_without_a_compiler(tmp_path: Path) -> None:
    checkout = Path(__file__).resolve().parents[2]
    (tmp_path / "hatch_build.py").write_bytes((checkout / "hatch_build.py").read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", "import hatch_build, pathlib; print(hatch_build.build(pathlib.Path('.')))"],
        cwd=tmp_path,
        env={**os.environ, "CC": "no-such-compiler", "PATH": "", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False" and done.stderr.strip() == "tightfit: built without CPU kernels (no C compiler)"


IN_TRITON = """
import sys, torch
from tightfit.formats.kernels import portable, triton
from tightfit.formats.packing import pack

device = sys.argv[1]
shapes = ((4, 544, 17), (3, 172, 1)) if device == "cpu" else ((4, 4096, 32), (3, 11008, 86), (2, 513, 1), (4, 2144, 67))
for bits, columns, groups in shapes:
    torch.manual_seed(0)
    packed = pack(torch.randint(0, 2**bits, (5, columns), dtype=torch.uint8, device=device), bits)
    table = torch.randn(5, 2**bits, device=device).bfloat16()
    scale = torch.rand(5, groups, device=device).bfloat16()
    zero = torch.randint(0, 2**bits, (5, groups), dtype=torch.uint8, device=device)
    by_table = portable.table_decode(packed, table, columns, torch.float32)
    by_group = portable.affine_decode(packed, scale, zero, columns, torch.float32)
    assert torch.equal(triton.table_decode(packed, table, columns, torch.float32), by_table)
    assert torch.equal(triton.affine_decode(packed, scale, zero, columns, torch.float32), by_group)
    x = torch.randn(2, columns, device=device)
    for dense, found in ((by_table, triton.table_product(x, packed, table)), (by_group, triton.affine_product(x, packed, scale, zero))):
        sizes = x.double().abs() @ dense.double().abs().t()
        assert ((found.double() - x.double() @ dense.double().t()).abs() <= 2**-19 * sizes).all()
print("equal")
"""


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_triton_equals_the_portable_path(device: str) -> None:
    """On a CPU by Triton's interpreter, in a process of its own: it is chosen before the import."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1" if device == "cpu" else "0"}
    done = subprocess.run([sys.executable, "-c", IN_TRITON, device], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "equal", done.stderr

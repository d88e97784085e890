"""Every launch configuration of the int4 and int8 GEMMs, the scratches and the activation quantizers that ships."""

from dataclasses import replace

from compile_case import CompileCase

from salalocal.kernels.int4 import activations_by_row, gemm, int8_gemm, scratch
from salalocal.kernels.int4.gemm_launch import INT4_BF16_LAUNCH, INT4_INT8_LAUNCH, INT8_LAUNCH, GemmLaunch

TABLES = {"int8": INT4_INT8_LAUNCH, "bf16": INT4_BF16_LAUNCH, "scratch": INT8_LAUNCH}
SCALARS = {
    "factor": "fp32",
    "num_rows": "i32",
    "num_columns": "i32",
    "num_groups": "i32",
    "num_features": "i32",
    "num_splits": "i32",
    "residual_stride": "i32",
    "y_stride": "i32",
}
ALIGNED = ("x", "octets", "w", "scales", "inverses", "x_scales", "row_scales", "residual", "y", "num_columns")
STRIDES = ("residual_stride", "y_stride")

# Once a tile of the int4 GEMM, where the residual is loaded beside 128 sums a thread; the loop spills nothing.
EPILOGUE_SPILL_BYTES = 96
# Where a residual is loaded number by number, since its rows start anywhere: no shape of the 9B.
ANYWHERE_SPILL_BYTES = 1280


# The settings of mma.sync cards with the most shared memory or registers; sm_89 runs the code of sm_86.
OTHERS = (80, 86)
LARGEST = (GemmLaunch(128, 128, 128, 8, 4, programs=2),)


def int4_case(
    math: str, launch: GemmLaunch, group: int, has_splits: bool, has_residual: bool, cards: tuple[int, ...]
) -> CompileCase:
    is_int8, half = math == "int8", group // 2
    element = "i8" if is_int8 else "bf16"
    types = dict.fromkeys(("inverses", "x_scales", "row_scales"), "*fp32") | SCALARS
    types |= {"scales": "*bf16", "residual": "*bf16", "y": "*bf16", "partials": "*i32", "counters": "*i32"}
    types["x"] = f"tensordesc<{element}[{launch.rows}, {half}]>" if launch.has_tma else f"*{element}"
    types["octets"] = f"tensordesc<i8[{launch.columns}, {half}]>" if launch.has_tma else "*i8"
    constants = {
        "GROUP": group,
        "ROWS": launch.rows,
        "COLUMNS": launch.columns,
        "STEPS": max(1, launch.depth // group),
        "SPAN": 8,
        "STAGES": launch.num_stages,
        "IS_INT8": is_int8,
        "HAS_SPLITS": has_splits,
        "HAS_TMA": launch.has_tma,
        "HAS_RESIDUAL": has_residual,
        "HAS_ASM": True,
    }
    name = f"{math} g{group} {launch.rows}x{launch.columns}x{launch.depth} {launch.num_warps}w{launch.num_stages}s"
    name += " split" if has_splits else ""
    divisible = [one for one in ALIGNED if one in types and not types[one].startswith("tensordesc")]
    return CompileCase(
        name, gemm._int4_gemm_kernel, types, constants, launch.num_warps, launch.num_stages,
        (*divisible, *STRIDES, "partials", "num_groups"), cards,
        max_spill_bytes=EPILOGUE_SPILL_BYTES if has_residual else 0,
    )  # fmt: skip


def int8_case(launch: GemmLaunch, epilogue: str, cards: tuple[int, ...], is_aligned: bool = True) -> CompileCase:
    types = {"x_scales": "*fp32", "row_scales": "*fp32", "residual": "*bf16", "y": "*bf16"} | SCALARS
    types["x"] = f"tensordesc<i8[{launch.rows}, {launch.depth}]>" if launch.has_tma else "*i8"
    types["w"] = f"tensordesc<i8[{launch.columns}, {launch.depth}]>" if launch.has_tma else "*i8"
    constants = {
        "ROWS": launch.rows,
        "COLUMNS": launch.columns,
        "DEPTH": launch.depth,
        "SPAN": 8,
        "STAGES": launch.num_stages,
        "HAS_TMA": launch.has_tma,
        "WALKS": launch.walks,
        "EPILOGUE": epilogue,
        "HAS_ASM": True,
    }
    name = f"w8a8 {epilogue} {launch.rows}x{launch.columns}x{launch.depth} {launch.num_warps}w{launch.num_stages}s"
    name += " walks" if launch.walks else ""
    divisible = [one for one in ALIGNED if one in types and not types[one].startswith("tensordesc")]
    if not is_aligned:  # rows of outputs that start anywhere; see `int8_gemm`
        divisible.remove("num_columns")
    return CompileCase(
        name + ("" if is_aligned else " anywhere"), int8_gemm._int8_gemm_kernel, types, constants, launch.num_warps,
        launch.num_stages, (*divisible, *(STRIDES if is_aligned else ()), "num_features"), cards,
        max_spill_bytes=0 if is_aligned else ANYWHERE_SPILL_BYTES,
    )  # fmt: skip


def gemm_cases() -> list[CompileCase]:
    """Every setting once: on the card of its table, those of the int4 GEMM without wgmma on sm_120; what needs most
    also on the others of its kind."""
    cases = []
    for math, table in TABLES.items():
        cards: dict[GemmLaunch, set[int]] = {}
        for oldest, rows in table.items():
            for _, found in rows:
                for launch in [found] if isinstance(found, GemmLaunch) else found:
                    shape = replace(launch, span=8, programs=min(launch.programs, 2))  # what changes the code
                    is_alike = oldest in (80, 120) and math != "scratch"
                    cards.setdefault(shape, set()).add(120 if is_alike else oldest)
        for launch, known in cards.items():
            shipped = tuple(sorted(known | (set(OTHERS) if launch in LARGEST else set())))
            if math == "scratch":
                cases += [int8_case(launch, epilogue, shipped) for epilogue in ("residual", "swiglu")]
                if launch.walks:
                    still = replace(launch, walks=False)
                    cases += [int8_case(still, epilogue, shipped, False) for epilogue in ("plain", "residual")]
            else:
                cases.append(int4_case(math, launch, 128, launch.programs > 1, True, shipped))
    return [*cases, int4_case("int8", GemmLaunch(16, 128, 256, 8, 3), 64, False, False, (120,))]


def scratch_case(kind: str, group: int, bits: int = 4) -> CompileCase:
    y = {"int8": "*i8", "bf16": "*bf16", "fp8": "*fp8e4nv"}[kind]
    types = {
        "octets": "*i8" if bits == 4 else "*i16",
        "scales": "*bf16",
        "ratios": "*fp32",
        "y": y,
        "y_stride": "i32",
        "num_rows": "i32",
        "num_groups": "i32",
    }
    constants = {
        "GROUP": group,
        "BITS": bits,
        "KIND": kind,
        "ROWS": scratch._ROWS,
        "GROUPS": 512 // group,
        "HAS_ASM": True,
    }
    cards = (90, 120) if kind == "bf16" else (90,)  # the one with most registers on all
    divisible = ("octets", "scales", "ratios", "y", "y_stride", "num_rows", "num_groups")
    return CompileCase(
        f"scratch {kind} g{group} {bits} bits", scratch._decode_kernel, types, constants, 4, 3, divisible, cards
    )


def quantize_case(name: str, block: int, limit: float) -> CompileCase:
    kernel = {
        "rows": activations_by_row._quantize_rows_kernel,
        "norm": activations_by_row._rms_norm_quantize_rows_kernel,
        "swiglu": activations_by_row._swiglu_quantize_kernel,
        "split": activations_by_row._split_rows_kernel,
    }[name]
    strides = {"x_stride": "i32", "gate_stride": "i32", "up_stride": "i32", "num_columns": "i32", "eps": "fp32"}
    tensors = dict.fromkeys(("x", "gate", "up", "weight"), "*bf16" if name == "split" else "*i32") | {"scales": "*fp32"}
    tensors |= {"y": "*bf16", "codes": "*i8" if limit == 127.0 else "*fp8e4nv"}
    types = {one: kind for one, kind in (tensors | strides).items() if one in kernel.arg_names}
    constants = {"LIMIT": limit, "BLOCK": block, "IN_WORDS": True, "HAS_ASM": True}
    constants = {one: value for one, value in constants.items() if one in kernel.arg_names}
    divisible = tuple(one for one in types if one != "eps")
    cards = (90, 120) if name == "swiglu" else (90,)  # the one with most registers on all
    return CompileCase(
        f"quantize {name} {block}", kernel, types, constants, activations_by_row._num_warps(block), 3, divisible, cards
    )


CASES = [
    *gemm_cases(),
    *(scratch_case(kind, 128, bits) for kind in ("int8", "bf16", "fp8") for bits in (4, 8)),
    *(quantize_case(name, 16384, 127.0) for name in ("rows", "norm", "swiglu", "split")),
    quantize_case("rows", 4096, 448.0),
]

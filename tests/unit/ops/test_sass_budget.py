"""Budgets of the CUDA kernels' machine code: spills, blocks per SM, instructions a column.

What ptxas makes is the only evidence about speed that a machine without a GPU can give. Where nvcc
or nvdisasm is missing the tests of the kernels are skipped; those of the reader of listings run.
"""

from __future__ import annotations

import pytest

from tests.support import sass

# Instructions per column of each main loop. The first version of the kernels had 30.6 for the
# statistics, 44.8 with a top-k (fp32), and 16.4, 23.1 and 36.5 for the three gradients. The budgets
# leave 5 to 10 % for another nvcc than 13.0.
INSTRUCTIONS = {
    "statistics fp32": {"": 21.5},
    "statistics and top-k fp32": {"": 24},
    "statistics bf16": {"": 23.5},
    "statistics and top-k bf16": {"": 26},
    "gradient fp32": {"policy": 11.5, "reverse": 22.5, "forward": 36.5},
    "gradient fp32 to bf16": {"policy": 11.5, "reverse": 23, "forward": 37},
    "gradient bf16": {"policy": 12, "reverse": 24.5, "forward": 38.5},
}
# Of 64; the first version's fp32 kernels had 16.
LEAST_WARPS, LEAST_BLOCKS = 24, 2


@pytest.fixture(scope="module")
def figures():
    reason = sass.missing()
    if reason is not None:
        pytest.skip(reason)
    return sass.figures()


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instructions_per_column(figures, name):
    measured = figures[name].per_column
    assert measured.keys() == INSTRUCTIONS[name].keys(), "a main loop was not found"
    for loop, budget in INSTRUCTIONS[name].items():
        assert 0.8 * budget < measured[loop] <= budget, (name, loop, measured[loop])


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_occupancy_and_spills(figures, name):
    kernel = figures[name]
    blocks = kernel.blocks_per_sm()
    assert blocks >= LEAST_BLOCKS, (name, kernel)
    assert blocks * kernel.threads // 32 >= LEAST_WARPS, (name, kernel)
    # One reload in a turn of 16 columns hides behind their loads.
    assert kernel.hot_spills <= 1, (name, kernel)


def test_every_kernel_of_the_sources_has_a_budget():
    assert INSTRUCTIONS.keys() == sass.KERNELS.keys()


LISTING = """\
.L_x_0:
        /*0000*/                   ISETP.GE.AND P0, PT, R0, R1, PT ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
        /*0020*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0030*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0040*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0050*/                   LDG.E.128 R8, desc[UR4][R2.64+0x200] ;
.L_x_2:
        /*0060*/                   MUFU.EX2 R9, R4 ;
        /*0070*/               @P1 BRA `(.L_x_3) ;
        /*0080*/                   MUFU.EX2 R9, R4 ;
        /*0090*/                   LDL R9, [R1] ;
        /*0098*/                   FFMA R9, R4, R5, R9 ;
.L_x_3:
        /*00a0*/                   IADD3 R0, R0, 0x1, RZ ;
        /*00b0*/               @P2 BRA `(.L_x_0) ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   NOP;
"""


def test_the_cheapest_way_around_a_loop_is_found():
    code = sass.parse(LISTING)
    assert len(code) == 14 and code[4].labels == (".L_x_1",)
    ways = sass.ways_around(code, 0, 12)
    # The entries of sass.Work -> instructions.
    assert ways == {
        (2, 0, 1, 0, 0, 0): 8,
        (2, 0, 2, 0, 1, 1): 11,
        (0, 1, 1, 0, 0, 0): 8,
        (0, 1, 2, 0, 1, 1): 11,
    }


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [
        (82, 512, 144, 1),
        (64, 512, 144, 2),
        (80, 256, 704, 3),
        (64, 256, 704, 4),
        (32, 128, 0, 16),
        (32, 32, 0, 32),
        (32, 256, 100_000, 2),
    ],
)
def test_blocks_per_sm(registers, threads, shared, blocks):
    """The cases are of NVIDIA's occupancy calculator for compute capability 9.0."""
    assert sass.Figures(registers, 0, 0, shared, threads, {}, 0).blocks_per_sm() == blocks

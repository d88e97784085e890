"""The sizes of the block choice, for its kernels, the state that pools keys, and the sparse mixer."""

from dataclasses import dataclass

COARSE_FACTOR = 4  # k2 is pooled over windows and strides four times those of k1


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockGeometry:
    """The sizes of the block choice, named as in `sparse_config`. Units: tokens; init_blocks and topk count blocks."""

    kernel_size: int
    kernel_stride: int
    block_size: int
    init_blocks: int
    window_size: int
    topk: int

    def __post_init__(self) -> None:
        if (
            min(self.kernel_size, self.kernel_stride, self.block_size) < 1
            or min(self.init_blocks, self.window_size) < 0
        ):
            raise ValueError(f"block geometry has a size out of range: {self}")
        if self.kernel_size % self.kernel_stride or self.block_size % self.kernel_stride:
            raise ValueError(f"kernel_stride divides neither or only one of kernel_size and block_size: {self}")
        if self.window_size % self.block_size:
            raise ValueError(f"block_size does not divide window_size: {self}")
        if self.topk <= self.init_blocks:
            raise ValueError(f"topk leaves no room for the init blocks and the row's own block: {self}")

    @property
    def local_blocks(self) -> int:
        """Blocks before the row's own that are always picked."""
        return self.window_size // self.block_size

    @property
    def budget(self) -> int:
        """Blocks that a row picks once it has that many."""
        return self.topk + self.local_blocks

    @property
    def reach(self) -> int:
        """Positions below this pick every block up to their own, which is dense attention. Units: tokens."""
        return self.budget * self.block_size

    @property
    def free_blocks(self) -> int:
        """Blocks of the budget that the scores decide."""
        return self.topk - self.init_blocks - 1

    @property
    def pooled_per_block(self) -> int:
        """k1 windows that start in one block: m."""
        return self.block_size // self.kernel_stride

    @property
    def overlap(self) -> int:
        """k1 windows that start before a block and reach into it: r - 1."""
        return self.kernel_size // self.kernel_stride - 1

    @property
    def coarse_kernel_size(self) -> int:
        """Window of k2."""
        return COARSE_FACTOR * self.kernel_size

    @property
    def coarse_kernel_stride(self) -> int:
        """Stride of k2."""
        return COARSE_FACTOR * self.kernel_stride

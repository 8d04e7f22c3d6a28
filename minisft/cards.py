"""What a graphics card can do at most: the two rates that bound a training step, and the number of its multiprocessors.

Only the H200 was measured: a copy on the device, bytes read and written, and a bf16 matrix product of 8192 x 8192 x 8192.
These are 90 % of the bandwidth and 80 % of the matmul rate of NVIDIA's data sheet (4.8 TB/s, 989 TFLOP/s without sparsity).
The other cards have the same shares of their own data sheets: H100 SXM 3.35 TB/s and 989 TFLOP/s, A100 SXM with 80 GB 2.039 TB/s
and 312 TFLOP/s, L40S 0.864 TB/s and 362 TFLOP/s, RTX 4090 1.008 TB/s and 165 TFLOP/s with fp32 accumulation. Nobody has measured
these here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    name: str
    copy: float  # bytes/s that are read and written
    matmul: float  # FLOP/s of bf16 products that are added up in fp32
    num_sms: int  # multiprocessors
    capability: tuple[int, int]  # compute capability
    memory: float  # bytes, as its name says

    def seconds(self, num_bytes: float, flops: float) -> float:
        """The least time for so much traffic and arithmetic, which overlap: the roofline."""
        return max(num_bytes / self.copy, flops / self.matmul)


CARDS = {
    card.name: card
    for card in (
        Card("H200", 4.3e12, 788e12, 132, (9, 0), 141e9),  # measured
        Card("H100", 3.35e12 * 4.3 / 4.8, 788e12, 132, (9, 0), 80e9),  # from the data sheet
        Card("A100", 2.039e12 * 4.3 / 4.8, 312e12 * 788 / 989, 108, (8, 0), 80e9),  # from the data sheet
        Card("L40S", 0.864e12 * 4.3 / 4.8, 362e12 * 788 / 989, 142, (8, 9), 48e9),  # from the data sheet
        Card("4090", 1.008e12 * 4.3 / 4.8, 165.2e12 * 788 / 989, 128, (8, 9), 24e9),  # from the data sheet
    )
}
